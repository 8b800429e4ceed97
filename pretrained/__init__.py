"""Models, prefixes and runs on the disk: other people's formats, and ours."""
