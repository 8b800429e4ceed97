"""What any program needs: command lines (cli.py) and files that are whole or absent (files.py)."""
