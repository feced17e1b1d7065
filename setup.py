"""Package metadata. Settings of the tools stand in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="ring_attention",
    version="0.1.0",
    description="Exact attention over sequences too long for one accelerator, in JAX.",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["ring_attention", "ring_attention.*"]),
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "grain>=0.2.18",
        "einops>=0.8.2",
        "absl-py>=2.5",
        "ml_collections>=1.1.0",
        "numpy>=2.0",
        "rich>=14.3",
        "tensorboardX>=2.6.5",
        "matplotlib>=3.10.7",
        "tokenizers>=0.22.2",
        "safetensors>=0.8",
    ],
    extras_require={
        "test": [
            "pytest>=9.0",
            "flatbuffers>=25.12.19",
            "pytest-xdist>=3.8",
            "hypothesis>=6.150",
            "chex>=0.1.92",
            "ruff>=0.15",
        ],
        # The other side of tests/interop and scripts/benchmark_training.py; torch as it was tried.
        "interop": ["torch==2.13.0", "transformers>=5.0"],
        # Compilers for hardware that is not there, for scripts/plan.py, check_pods.py and reproduce_table3.py: those
        # that the installed JAX names as its own.
        "compile-tpu": ["jax[tpu]>=0.10.2"],
        "compile-gpu": ["jax[cuda12-local]>=0.10.2"],
        # The paper's own code, for scripts/benchmark_attention.py to measure ours against.
        "benchmark": ["ringattention==0.1.2"],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
