"""An example: one source and all its references. Text only."""
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    source: str
    targets: tuple[str, ...]        # several references; training takes each as a pair of its own
    topic: str = ""                 # WebNLG's category, or the "topic" of a line of JSON
