"""Write docs/api.md from the docstrings of everything public.

    python scripts/docs/write_api.py

`tests/test_docs.py` fails where the page is not what this writes.
"""

import argparse
import inspect
import re
import textwrap
from pathlib import Path
from types import ModuleType

import ring_attention as ra

PAGE = Path(__file__).parents[2] / "docs/api.md"
GROUPS = {
    "Attention over a sharded sequence": [
        "ring_attention",
        "context_attention",
        "ring_attention_shard",
        "context_attention_shard",
        "flax_attention_fn",
    ],
    "Where tokens lie": ["SequenceLayout", "DealtRows"],
    "Devices": ["make_mesh", "simulate_devices", "compiler_options"],
    "Strategies, and masks of one's own": ["STRATEGIES", "Strategy", "Mask", "Intervals"],
    "One device": ["blockwise_attention", "blockwise_feedforward", "BlockSizes"],
    "Generating": ["decode_attention", "decode_attention_shard"],
    "Checking and saving": ["reference_attention", "testing", "SAVED_NAMES"],
}
INTRODUCTION = """# API

Written by `python scripts/docs/write_api.py` from the docstrings; change those. `import ring_attention as ra` has all
of it. Arrays are positional, everything else is given by keyword. The letters of shapes: B batch, T query tokens, S key
tokens, H query heads, K key/value heads, D head dim, P devices of the ring. Capitals are global sizes, lower case is a
device's share.
"""
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):$")
CONSTANTS = {
    "STRATEGIES": "Name -> strategy with its default options, and the facts about it.",
    "SAVED_NAMES": "Names of what `jax.checkpoint` keeps of an attention, so that no ring runs twice.",
}


def signature_of(function: object, name: str) -> str:
    """`name(arguments)` with defaults and without types, which the text below gives."""
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not any(text.startswith("*") for text in parameters):
            parameters.append("*")
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        parameters.append(f"{stars}{parameter.name}{default}")
    return f"{name}({', '.join(parameters)})"


def shown(signature: str) -> str:
    """A signature as a block, in several lines where it is long; not marked as Python, which ruff would format."""
    name, _, arguments = signature.partition("(")
    if len(signature) > 100:
        lines = textwrap.wrap(arguments[:-1], 96, break_long_words=False, break_on_hyphens=False)
        signature = "\n".join([f"{name}(", *(f"    {line}" for line in lines), ")"])
    return f"```text\n{signature}\n```"


def to_markdown(docstring: str) -> str:
    """A docstring in Google's form as Markdown: sections are lists, what is indented is shown as it stands."""
    section, out = "", []
    for line in inspect.cleandoc(docstring).splitlines():
        if found := SECTION.match(line):
            section = found[1]
            out += [f"**{section}**", ""]
        elif section and line.strip():
            is_item = line.startswith("  ") and not line.startswith("   ")
            names, colon, text = line.strip().partition(": ")
            named = section not in ("Returns", "Yields") and is_item and colon and re.fullmatch(r"[\w*, ]+", names)
            if named:
                out.append(f"- `{names.replace(', ', '`, `')}`: {text}")
            elif section in ("Returns", "Raises", "Yields") and is_item:
                out.append(line.strip())
            elif not line.startswith(" "):  # prose after a section
                section = ""
                out += ["", line]
            else:
                out.append("  " + line.strip())
        else:
            out.append(line)
    return _fenced(out)


def _fenced(lines: list[str]) -> str:
    """The lines, those that are indented outside lists between fences."""
    out, block = [], []

    def close():
        if block:
            drawn = textwrap.dedent("\n".join(block)).strip("\n")
            out.extend(["", "```text", drawn, "```", ""])
            block.clear()

    for line in lines:
        in_list = not block and bool(out) and out[-1].startswith(("- ", "  "))
        if (line.startswith("  ") and not in_list) or (block and not line):
            block.append(line)
        else:
            close()
            out.append(line)
    close()
    return "\n".join(out)


def describe_class(cls: type, name: str) -> list[str]:
    """The class, then its public methods and properties that have something to say."""
    out = [shown(signature_of(cls, name)), to_markdown(cls.__doc__ or "")]
    for member, value in vars(cls).items():
        function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        docstring = getattr(function, "__doc__", None)
        if member.startswith("_") or not docstring or not (inspect.isfunction(function) or isinstance(value, property)):
            continue
        heading = member if isinstance(value, property) else signature_of(function, member).replace("(self, ", "(")
        out += [f"#### `{name}.{heading.replace('(self)', '()')}`", to_markdown(docstring)]
    return out


def describe_strategies() -> list[str]:
    """A table of the strategies by name."""
    rows = ["| name | exact | memory | communication | options |", "|---|---|---|---|---|"]
    for name, strategy in ra.STRATEGIES.items():
        options = ", ".join(f"`{field}`" for field in inspect.signature(type(strategy)).parameters) or "none"
        exact = "yes" if strategy.exact else "no"
        rows.append(f"| `{name}` | {exact} | {strategy.memory} | {strategy.communication} | {options} |")
    return [CONSTANTS["STRATEGIES"], "\n".join(rows)]


def describe(name: str, value: object, level: str = "###") -> list[str]:
    """Paragraphs about one public name."""
    prefix = "ra." if level == "###" else "ra.testing."
    out = [f"{level} {prefix}{name}"]
    if isinstance(value, ModuleType):
        own = [name for name, member in vars(value).items() if getattr(member, "__module__", "") == value.__name__]
        members = [
            part for member in own if member[0] != "_" for part in describe(member, getattr(value, member), "####")
        ]
        return [*out, to_markdown(value.__doc__ or ""), *members]
    if name == "STRATEGIES":
        return [*out, *describe_strategies()]
    if name in CONSTANTS:
        return [*out, f"`{value!r}`", CONSTANTS[name]]
    if inspect.isclass(value):
        return [*out, *describe_class(value, f"{prefix}{name}")]
    return [*out, shown(signature_of(value, f"{prefix}{name}")), to_markdown(value.__doc__ or "")]


def make_page() -> str:
    """The whole page."""
    grouped = [name for names in GROUPS.values() for name in names]
    missing = {*ra.__all__} - {*grouped}
    if missing:
        raise ValueError(f"public names in no group: {', '.join(sorted(missing))}; add them to GROUPS")
    parts = [INTRODUCTION.strip()]
    for group, names in GROUPS.items():
        parts.append(f"## {group}")
        for name in names:
            if name in ra.__all__:
                parts += describe(name, getattr(ra, name))
    return "\n\n".join(re.sub(r"\n{3,}", "\n\n", part.strip("\n")) for part in parts) + "\n"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(make_page(), encoding="utf-8")
    print(f"wrote {PAGE}")
