"""Every command answers --help, and refuses in one line what it does not know."""

import importlib
import sys
from importlib import import_module

import pytest
from command_lines import REPOSITORY, call_command, run_command

from ring_attention.commands import console, plan, program
from ring_attention.commands.arguments import Parser
from scripts import launch_local
from scripts.figures import worked_example

FOLDERS = [importlib.import_module(f"scripts.{name}.__main__") for name in ("benchmarks", "verify", "figures")]
COMMANDS = console.COMMANDS | {f"{f.__package__} {name}": found for f in FOLDERS for name, found in f.COMMANDS.items()}


@pytest.fixture
def call(capsys):
    """Call a command in this process: (exit status, stdout, stderr)."""

    def call(name, main, *flags):
        status = call_command(name, main, *flags)
        return status, *capsys.readouterr()

    return call


def test_every_file_with_a_main_is_a_command():
    mains = {
        path.relative_to(REPOSITORY).with_suffix("").as_posix().replace("/", ".")
        for folder in ("scripts", "ring_attention/commands")
        for path in (REPOSITORY / folder).rglob("*.py")
        if "\ndef main(" in path.read_text(encoding="utf-8")
    }
    found = {command.module for command in COMMANDS.values()}
    others = {"scripts.launch_local", "ring_attention.commands.console"}
    assert mains - others == found
    assert len(found) > 25


@pytest.mark.parametrize("name", COMMANDS)
def test_command_has_help_and_refuses_an_unknown_flag(call, name):
    main = import_module(COMMANDS[name].module).main
    status, out, err = call(name, main, "--help")
    assert (status, err) == (0, "")
    assert "--help" in out or "--config" in out
    status, out, err = call(name, main, "--bogus")
    assert status == 2, out
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith(f"{name}: error: ")


def test_launcher_has_help_and_refuses_an_unknown_flag(call):
    assert call("launch_local.py", launch_local.main, "--help")[::2] == (0, "")
    status, _, err = call("launch_local.py", launch_local.main, "--bogus")
    assert (status, err.count("\n")) == (2, 1)


def test_parser_knows_no_abbreviations(call):
    status, _, err = call("worked_example", worked_example.main, "--seq=8")
    assert (status, err.count("\n")) == (2, 1)
    assert "--seq=8" in err


def test_parser_reads_hyphens_as_underscores_in_its_own_flags():
    parser = Parser()
    parser.add_argument("--seq_len", type=int)
    parser.add_argument("--name")
    args, rest = parser.parse_known_args(["--seq-len=8", "--name=a-b", "--config.some-field=1", "--other-flag"])
    assert (args.seq_len, args.name) == (8, "a-b")
    assert rest == ["--config.some-field=1", "--other-flag"]
    assert parser.parse_args(["--seq-len", "8"]).seq_len == 8


def test_flags_of_all_commands_are_spelt_with_underscores():
    for command in COMMANDS.values():
        path = REPOSITORY / f"{command.module.replace('.', '/')}.py"
        words = [word for line in path.read_text(encoding="utf-8").splitlines() for word in line.split('"')]
        assert [word for word in words if word.startswith("--") and "-" in word[2:] and " " not in word] == [], path


def test_plan_of_table_2_takes_no_config(call):
    status, _, err = call("plan.py", plan.main, "--table2", "--config.seq_len=1024")
    assert status == 2
    assert err == "plan.py: error: --config.seq_len=1024: --table2 plans nothing; leave it out, or see plan.py --help\n"


@pytest.mark.parametrize(("words", "status"), [(["--help"], 0), ([], 2), (["nothing"], 2)])
def test_choose_lists_the_commands(words, status, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ring-attention", *words])
    monkeypatch.setattr(program, "_guard", lambda: None)
    with pytest.raises(SystemExit) as ended:
        console.main()
    assert ended.value.code == status
    out, err = capsys.readouterr()
    assert all(name in out + err for name in console.COMMANDS)
    assert err.count("\n") == bool(status)


@pytest.mark.parametrize("name", ["train.py", "plan.py", "launch_local.py", "verify ranking"])
def test_command_starts_in_a_process_of_its_own(name):
    done = run_command(name, "--bogus")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
