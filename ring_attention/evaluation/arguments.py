"""Flags of the scripts: argparse, but that a mistake costs one line."""

import argparse

from ring_attention.checks import one_line


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that says what is wrong in one line on stderr, ends with exit status 2, and takes no
    abbreviations: a flag that is misspelt is none. Descriptions, which are docstrings, are printed as they are written.
    """

    def __init__(self, *args, **kwargs):
        """Take what `ArgumentParser` takes."""
        defaults = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        super().__init__(*args, **(defaults | kwargs))

    def error(self, message: str):
        """End with one line."""
        self.exit(2, f"{self.prog}: error: {one_line(message)}; see {self.prog} --help\n")
