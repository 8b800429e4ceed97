"""Programs around the core: `python -m scripts.NAME`, as evaluate, pretrain, claims and bench."""
import utils.before_torch  # noqa: F401
