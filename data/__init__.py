"""Text only: the tokenizer, the tasks and the bundled micro-world. Nothing here knows a tensor."""
