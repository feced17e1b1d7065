"""Every script answers --help, and refuses in one line what it does not know."""

import runpy
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (REPOSITORY / "scripts").glob("*.py") if path.name != "interrupt.py")


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script as a program, in this process: (exit status, stdout, stderr)."""

    def run(script, *flags):
        path = str(REPOSITORY / "scripts" / script)
        monkeypatch.chdir(REPOSITORY)
        monkeypatch.setattr(sys, "argv", [path, *flags])
        monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(path, run_name="__main__")
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run


def test_all_scripts_are_here():
    assert len(SCRIPTS) > 20


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_a_script_does_and_a_flag_that_is_none_costs_one_line(run, script):
    status, out, err = run(script, "--help")
    assert (status, err) == (0, "")
    assert "--help" in out or "--config" in out
    status, out, err = run(script, "--bogus")
    assert status == 2, out
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith(f"{script}: error: ")


def test_an_abbreviated_flag_is_none(run):
    status, _, err = run("worked_example.py", "--seq=8")
    assert (status, err.count("\n")) == (2, 1)
    assert "--seq=8" in err


def test_a_plan_of_nothing_takes_no_config(run):
    status, _, err = run("plan.py", "--table2", "--config.seq_len=1024")
    assert status == 2
    assert err == "plan.py: error: --config.seq_len=1024: --table2 plans nothing; leave it out, or see plan.py --help\n"
