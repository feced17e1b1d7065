import io

import pytest

from ring_attention.training.progress import TrainProgress, _duration, _short


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    seconds = 0.0

    def __call__(self):
        return self.seconds


def run(file, *, steps, **kwargs):
    """Run a loop whose first step takes 100 s and every later one 2 s."""
    clock = Clock()
    with TrainProgress(file=file, clock=clock, **kwargs) as progress:
        for step in steps:
            clock.seconds += 2 if clock.seconds else 100
            progress.update(step, loss=2.5, tokens_per_second=12345.0, peak_share=0.4567)
            if step == 7:
                progress.update(step, heldout_loss=2.75)
    return file.getvalue()


def terminal(monkeypatch, columns, **kwargs):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "24")
    # The last line drawn, without colours and cursor movements.
    from rich.text import Text

    output = run(Terminal(), **kwargs)
    return [Text.from_ansi(line).plain for line in output.replace("\r", "\n").split("\n") if "/" in line]


def test_progress_prints_plain_lines_to_a_file():
    lines = run(io.StringIO(), steps=range(1, 13), num_steps=12, plain_every=5).splitlines()
    assert lines == [
        "step  5/12  loss 2.500  12.3k tok/s  45.7% of peak  0:00:14 left",
        "step 10/12  loss 2.500  held out 2.750  12.3k tok/s  45.7% of peak  0:00:04 left",
        "step 12/12  loss 2.500  held out 2.750  12.3k tok/s  45.7% of peak  0:00:00 left",
    ]


def test_progress_of_a_resumed_run_counts_on():
    lines = run(io.StringIO(), steps=range(101, 106), num_steps=1000, start_step=100, plain_every=5).splitlines()
    assert lines == ["step  105/1000  loss 2.500  12.3k tok/s  45.7% of peak  0:29:50 left"]


def test_progress_prints_a_note_as_it_is():
    file = io.StringIO()
    note = "[checkpoint] " + 30 * "runs/tiny/checkpoints "
    with TrainProgress(num_steps=10, file=file) as progress:
        progress.note(note)
    assert file.getvalue() == note + "\n"


@pytest.mark.parametrize("columns", [80, 120])
def test_progress_live_line_holds_all_numbers_unwrapped(monkeypatch, columns):
    steps = range(99_990, 100_000)
    line = terminal(monkeypatch, columns, steps=steps, num_steps=100_000, start_step=99_989)[-1]
    for words in ["99999/100000", "loss 2.500", "12.3k tok/s", "45.7%", "0:00:02"]:
        assert words in line
    assert len(line.rstrip()) <= columns
    assert "…" not in line


def test_progress_live_line_fits_80_columns(monkeypatch):
    line = terminal(monkeypatch, 80, steps=range(1, 10), num_steps=100_000)[-1]
    assert "held 2.750" in line
    assert "…" not in line


def test_progress_writes_control_characters_to_terminals_only():
    plain = run(io.StringIO(), steps=range(1, 11), num_steps=10)
    live = run(Terminal(), steps=range(1, 11), num_steps=10)
    assert plain.replace("\n", "").isprintable()
    assert "\x1b" in live


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.5, "0.5"), (950, "950"), (999.4, "999"), (999.6, "1k"), (12345, "12.3k"), (1.2e6, "1.2M"), (3e9, "3G")],
)
def test_short_has_three_digits(number, text):
    assert _short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (3 * 86400 + 7200, "3d 2h")]
)
def test_duration_reads_as_clock_and_from_two_days_as_days(seconds, text):
    assert _duration(seconds) == text
