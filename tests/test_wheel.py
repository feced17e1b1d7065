"""The wheel, installed into an environment of its own, has all commands and configs, in a folder that holds nothing."""

import os
import shutil
import subprocess
import sys
import sysconfig

import pytest
from command_lines import REPOSITORY

MODEL = ["--config.model.num_layers=1", "--config.seq_len=64", "--config.attention.block_q=16"]
FIVE_STEPS = ["--config.num_steps=5", "--config.eval_every=5", "--config.checkpoint_every=5", "--config.log_every=1"]
ONE_DEVICE = ["--config.mesh.fsdp=1", "--config.mesh.sp=1", "--config.mesh.tp=1"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The folder of a virtual environment with the wheel, which finds the other packages where these tests do."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(REPOSITORY / "ring_attention", source / "ring_attention")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "venv"


@pytest.fixture
def ring_attention(environment, tmp_path):
    """Run `ring-attention` in an empty folder."""

    def run(*words):
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
        command = [str(environment / "bin" / "ring-attention"), *words]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)

    return run


def test_wheel_plans_a_packaged_config_in_an_empty_folder(ring_attention):
    done = ring_attention("plan", "--config=gpu_8xh100_7b", "--topology=h100:1x8")
    assert done.returncode == 0, done.stderr
    advice, *_ = [line for line in done.stdout.splitlines() if "--config=gpu_8xh100_7b" in line]
    assert "ring-attention train --config=gpu_8xh100_7b" in advice


def test_wheel_trains_five_steps_in_an_empty_folder(ring_attention, tmp_path):
    done = ring_attention("train", "--config=tiny", *MODEL, *FIVE_STEPS, *ONE_DEVICE)
    assert done.returncode == 0, done.stderr
    assert "this Transformer" in done.stdout
    assert "ring-attention train --config=tiny" in done.stdout
    assert (tmp_path / "runs" / "tiny" / "checkpoints" / "5").is_dir()


def test_wheel_lists_its_configs(ring_attention):
    done = ring_attention("train", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("ring-attention train   (the same as --config=cpu_demo)", "\n  tiny\n", "\n  lwm_7b\n"):
        assert words in done.stdout
    done = ring_attention("train", "--config=configs/tiny.py")
    assert done.returncode == 2
    assert done.stderr.startswith("ring-attention train: error: --config=configs/tiny.py: there is no such file; did")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["doctor", "generate", "evaluate", "finetune", "import", "export"])
def test_wheel_has_the_other_commands(ring_attention, command):
    done = ring_attention(command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: ring-attention {command}")
