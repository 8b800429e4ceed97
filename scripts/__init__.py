"""Programs around the core: `python -m scripts.NAME`, as evaluate, pretrain, claims and bench."""
