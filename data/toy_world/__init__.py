"""The invented world of the bundled models: words, pre-training text, tables and headlines."""
