import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from ring_attention.evaluation.loss_plot import _running_mean, _spread, plot_losses


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "loss": 2 + 6 / step} for step in range(1, 301)]
    lines += [{"step": step, "heldout_loss": 2.1 + 6 / step} for step in (100, 200, 300)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved while the test runs."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def test_plot_losses_draws_900_by_550_pixels(metrics, tmp_path):
    path = tmp_path / "loss.png"
    plot_losses(metrics, path, references={"a reference with a rather long name": 2.3}, ylabel="bits per byte")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert imread(path).shape[:2] == (550, 900)


def test_plot_losses_keeps_labels_inside_and_apart(metrics, tmp_path, drawn):
    references = {"gzip -9": 2.31, "xz -9": 2.3, "5-gram": 2.305, "bzip2": 2.12}
    plot_losses(metrics, tmp_path / "loss.png", references=references)
    texts = drawn[0].axes[0].texts
    boxes = sorted((Text.get_window_extent(text) for text in texts), key=lambda box: box.y0)  # without the arrows
    assert len(boxes) == 5
    assert all(below.y1 <= above.y0 for below, above in zip(boxes, boxes[1:], strict=False))
    assert all(0 <= box.x0 < box.x1 <= 900 and 0 <= box.y0 < box.y1 <= 550 for box in boxes)


def test_plot_losses_labels_references_and_last_held_out(metrics, tmp_path, drawn):
    plot_losses(metrics, tmp_path / "loss.png", references={"gzip -9": 2.31}, ylabel="bits per byte")
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.texts] == ["held out, last  2.120", "gzip -9  2.310"]
    assert axes.get_ylabel() == "bits per byte"


def test_plot_losses_scale_ignores_the_steep_start(metrics, tmp_path, drawn):
    plot_losses(metrics, tmp_path / "loss.png")
    low, high = drawn[0].axes[0].get_ylim()
    assert low < 2.02  # the last training loss
    assert high < 4  # the first is 8


@pytest.mark.parametrize("name", ["loss", "heldout_loss"])
def test_plot_losses_needs_one_of_the_two_losses(tmp_path, name):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 10, name: 2.5}) + "\n")
    plot_losses(path, tmp_path / "loss.png")
    assert imread(tmp_path / "loss.png").shape[:2] == (550, 900)


def test_plot_losses_refuses_metrics_without_a_loss(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl holds no 'loss'"):
        plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")


def test_loss_plot_does_not_load_pyplot():
    program = "import ring_attention.evaluation.loss_plot, sys; sys.exit('matplotlib.pyplot' in sys.modules)"
    path = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", program], env=path, check=False).returncode == 0


def test_running_mean_keeps_lines_and_shrinks_noise():
    line = np.linspace(5, 2, 501)
    noise = np.random.default_rng(0).normal(size=501)
    np.testing.assert_allclose(_running_mean(line), line, rtol=1e-12)
    assert _running_mean(noise).std() < 0.5 * noise.std()


def test_spread_keeps_order_and_gap():
    spread = _spread([0.1, 0.5, 0.5, 0.51, 0.9], 0.05)
    assert np.diff(spread).min() >= 0.05 - 1e-12
    np.testing.assert_allclose(spread[[0, 4]], [0.1, 0.9])
    np.testing.assert_allclose(spread[1:4].mean(), np.mean([0.5, 0.5, 0.51]))
