"""The encoder-decoder of the paper: BART (model.py) and its three prefixes (prefix.py)."""
