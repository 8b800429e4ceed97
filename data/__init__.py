"""From files to tensors: tasks and their formats, tokens, pairs, batches; the paper's settings."""
import utils.before_torch  # noqa: F401
