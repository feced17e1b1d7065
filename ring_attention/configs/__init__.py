"""Configs to begin with: `--config=NAME` takes NAME.py of this folder. In a checkout configs/ is a link to it."""
