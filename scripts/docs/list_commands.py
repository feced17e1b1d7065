"""List the commands that README and the documentation tell people to type.

    python scripts/docs/list_commands.py

`tests/test_docs.py` checks that each of them exists and takes the flags that it is given, and runs the cheap ones.
"""

import argparse
import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = "python|pip|pytest|ruff|ring-attention|sbatch|scripts/|bash"
LINE = re.compile(rf"^(?:    )?(?:[A-Z_]+=\S+ )*((?:{PROGRAMS}).*)$", re.MULTILINE)
CODE = re.compile(r"```bash\n(.*?)```|^((?:    .*\n)+)", re.MULTILINE | re.DOTALL)


class Command(NamedTuple):
    """A command of a page.

    Attributes:
      page: the name of the page.
      words: the command, as a shell splits it, without what stands after `#`.
    """

    page: str
    words: list[str]


def find_commands(page: Path) -> list[Command]:
    """The commands in blocks of code of a page, those joined by && one by one."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    blocks = [fenced or indented for fenced, indented in CODE.findall(text)]
    lines = [line for block in blocks for line in LINE.findall(block)]
    parts = [part for line in lines for part in line.split(" && ")]
    return [Command(page.name, shlex.split(part, comments=True)) for part in parts]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for page in PAGES:
        for command in find_commands(page):
            print(f"{command.page}: {shlex.join(command.words)}")
