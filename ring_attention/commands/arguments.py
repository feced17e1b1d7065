"""Flags of the commands: argparse, but that a mistake costs one line."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from ring_attention.checks import ConfigError, local_path, one_line


@contextlib.contextmanager
def as_mistakes(*kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of these kinds, whose messages are one line, into the mistakes of a command line that they are.

    Raises:
      ConfigError: in place of them.
    """
    try:
        yield
    except kinds as error:
        raise ConfigError(str(error)) from error


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that reports a mistake in one line on stderr and ends with exit status 2.

    It takes no abbreviations, so that a flag that is misspelt is none. Flags are spelt with underscores, and hyphens
    are read as such. A description is printed as it is written.
    """

    def __init__(self, *args, **kwargs):
        """Take what `ArgumentParser` takes."""
        defaults = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        defaults["prog"] = Path(sys.argv[0]).name  # Python 3.14 would say how the module was started
        super().__init__(*args, **(defaults | kwargs))

    def parse_known_args(self, args=None, namespace=None):
        """Parse, with the hyphens in the names of our flags read as underscores."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._underscored(word) for word in words], namespace)

    def add_heads(self, *, heads: int, kv_heads: int, head_dim: int) -> None:
        """Add the flags of an attention's heads, with these defaults."""
        self.add_argument("--heads", type=int, default=heads, metavar="H", help="query heads")
        self.add_argument("--kv_heads", type=int, default=kv_heads, metavar="K", help="key/value heads")
        self.add_argument("--head_dim", type=int, default=head_dim, metavar="D", help="numbers in a head")

    def add_out(self, words: str = "write the results as JSON to this file") -> None:
        """Add the flag of a file to write, None by default."""
        self.add_argument("--out", type=local_path, metavar="FILE", help=f"also {words}")

    def error(self, message: str):
        """End with one line."""
        self.exit(2, f"{self.prog}: error: {one_line(message)}; see {self.prog} --help\n")

    def _underscored(self, word: str) -> str:
        name, equals, value = word.partition("=")
        spelt = f"--{name[2:].replace('-', '_')}"
        return f"{spelt}{equals}{value}" if spelt in self._option_string_actions else word
