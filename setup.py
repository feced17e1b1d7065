"""Package metadata. Settings of the tools stand in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

REPOSITORY = ""
"""The address of the public repository, such as "https://HOST/OWNER/ring_attention"; set it before a release.

A package index shows README without the files beside it. With an address the links and pictures there are absolute;
without one the links are plain text and the pictures are left out, so that nothing is broken.
"""

ATTENTION = [
    "jax>=0.10.2",
    "einops>=0.8.2",
    "numpy>=2.0",
]
"""What ring_attention.attention and ring_attention.parallel import: all that the public functions need."""

TRAIN = [
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "grain>=0.2.18",
    "absl-py>=2.5",
    "ml_collections>=1.1.0",
    "rich>=14.3",
    "tensorboardX>=2.6.5",
    "matplotlib>=3.10.7",
    "tokenizers>=0.23.1",
    "safetensors>=0.8",
]
"""What models, data, training, inference, evaluation, planning and the scripts need beside it."""

EXTRAS = {
    "train": TRAIN,
    "test": [
        *TRAIN,
        "pytest>=9.0",
        "flatbuffers>=25.12.19",
        "pytest-xdist>=3.8",
        "hypothesis>=6.150",
        "chex>=0.1.92",
        "ruff>=0.15",
        "setuptools>=77.0.3",
    ],
    # The other side of tests/interop and `scripts.benchmarks training`; torch as it was tried. transformers 5.0 turns
    # whole heads of Phi-4-mini, and mixes two generations of keys in what it writes of OLMo 3; up to 5.21 it reads a
    # tokenizer.json otherwise than written where a LlamaTokenizer is named, spaces and newlines left out.
    "interop": [*TRAIN, "torch==2.13.0", "transformers>=5.22"],
    # Compilers for hardware that is not there, for scripts/plan.py --compile and `scripts.verify`: those that
    # the installed JAX names as its own. XLA for GPU calls ptxas, which is in nvidia-cuda-nvcc, with nvidia-nvvm.
    "compile-tpu": [*TRAIN, "jax[tpu]>=0.10.2"],
    "compile-gpu": [*TRAIN, "jax[cuda13-local]>=0.10.2", "nvidia-cuda-nvcc>=13.0.48", "nvidia-nvvm"],
    # impl="tokamax", which impl="auto" takes on Hopper and Blackwell where cuDNN cannot do what is asked; it needs
    # jax 0.11.1, and so Python 3.12.
    "tokamax": [*TRAIN, 'tokamax>=0.0.17; python_version >= "3.12"'],
    # In CI only; node comes from the package index, too. Pinned, because each version finds something new.
    "types": [*TRAIN, "pyright[nodejs]==1.1.414"],
    # The paper's own code, for `scripts.benchmarks attention` to measure ours against.
    "benchmark": [*TRAIN, "ringattention==0.1.2"],
}

LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)]+)\)")


def make_long_description(readme: str, repository: str) -> str:
    """README as a package index can show it: the targets of links beside it made absolute, or left out."""

    def replace(link: re.Match) -> str:
        if re.match(r"https?:|#", link["target"]):
            return link[0]
        if not repository:
            return "" if link["picture"] else link["text"]
        kind = "raw" if link["picture"] else "blob"
        return f"{link['picture']}[{link['text']}]({repository}/{kind}/main/{link['target']})"

    return LINK.sub(replace, readme)


def read_version() -> str:
    """The version that the package itself states."""
    source = Path("ring_attention/__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.*)"', source, re.MULTILINE)[1]


def project_urls(repository: str) -> dict[str, str]:
    """Where to read more, by what is there."""
    urls = {"Paper": "https://arxiv.org/abs/2310.01889"}
    if repository:
        urls["Source"] = repository
        urls["Documentation"] = f"{repository}/blob/main/docs/README.md"
        urls["Changelog"] = f"{repository}/blob/main/CHANGELOG.md"
        urls["Issues"] = f"{repository}/issues"
    return urls


if __name__ == "__main__":
    setup(
        name="ring_attention",
        version=read_version(),
        description="Exact attention over sequences too long for one accelerator, in JAX.",
        long_description=make_long_description(Path("README.md").read_text(encoding="utf-8"), REPOSITORY),
        long_description_content_type="text/markdown",
        author="The ring_attention authors",
        url=REPOSITORY or None,
        project_urls=project_urls(REPOSITORY),
        keywords="attention, ring attention, context parallelism, long context, transformers, JAX",
        license_expression="Apache-2.0",
        license_files=["LICENSE"],
        python_requires=">=3.11",
        entry_points={"console_scripts": ["ring-attention = ring_attention.commands.console:main"]},
        packages=find_packages(include=["ring_attention", "ring_attention.*"]),
        package_data={"ring_attention": ["py.typed", "planning/page.html"]},
        install_requires=ATTENTION,
        extras_require=EXTRAS,
        classifiers=[
            "Development Status :: 4 - Beta",
            "Intended Audience :: Developers",
            "Intended Audience :: Science/Research",
            "Operating System :: POSIX :: Linux",
            "Programming Language :: Python :: 3",
            "Programming Language :: Python :: 3 :: Only",
            "Programming Language :: Python :: 3.11",
            "Programming Language :: Python :: 3.12",
            "Programming Language :: Python :: 3.13",
            "Topic :: Scientific/Engineering :: Artificial Intelligence",
            "Typing :: Typed",
        ],
    )
