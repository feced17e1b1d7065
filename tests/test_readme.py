"""The README's promises, run as they are written there."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_ten_lines_run_and_give_the_dense_result(tmp_path):
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    check = """
import numpy as np
q, k, v = (layout.unpermute(x, axis=1) for x in (q, k, v))
want = jax.nn.dot_product_attention(q, k, v, is_causal=True)
np.testing.assert_allclose(out, want, atol=1e-5)
print("equal")
"""
    (tmp_path / "snippet.py").write_text(snippet + check)
    done = subprocess.run([sys.executable, tmp_path / "snippet.py"], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "equal\n", done.stderr
    lines = [line for line in snippet.splitlines() if line]
    assert len(lines) <= 11


def test_ci_runs_the_readmes_two_commands():
    commands = re.findall(r"```bash\n(pip install -e .* && (?:pytest|python train.py))\n```", README)
    lines = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert len(commands) == 2
    assert {*commands} <= {line.strip() for line in lines}


def test_ci_installs_the_lowest_version_of_all_that_is_declared():
    lowest = subprocess.run([sys.executable, ROOT / ".ci/lowest"], capture_output=True, text=True, check=True).stdout
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    requirements = re.findall(r'"([\w-]+)[^"]*>=([\d.]+)"', setup)
    assert {*lowest.split()} == {f"{name}=={version}" for name, version in requirements}
    assert "jax==0.10.2" in lowest.split()
    assert len(requirements) > 15


def test_every_file_that_the_readme_names_is_there():
    named = re.findall(r"`((?:configs|tests|scripts)/[\w./]+|train\.py)`", README) + re.findall(
        r"\]\((\w[^)]*)\)", README
    )
    files = [name.partition("#")[0] for name in named if not name.startswith("http")]
    missing = [name for name in files if not (ROOT / name).exists()]
    assert not missing
    assert len(files) > 8
