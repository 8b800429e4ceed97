"""Models, prefixes and runs on the disk: other people's formats, and ours."""
import utils.before_torch  # noqa: F401
