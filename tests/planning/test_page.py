"""The page of a plan: whole in itself, escaped, and alive in a browser."""

import html.parser
import json
import re
import shlex
import shutil
import subprocess

import pytest

from ring_attention.hardware.topology import find_topology
from ring_attention.planning.advice import advise
from ring_attention.planning.page import Advised, make_page
from ring_attention.planning.plan import make_plan
from ring_attention.planning.strategy_map import map_strategies
from ring_attention.training.flags import load_config, override

NAME = "a </script><b>& 'name\""
COMMAND = shlex.join(["python", "train.py", "--config=tiny", f"--config.name={NAME}"])
BROWSERS = ("chromium", "chromium-headless-shell", "chrome-headless-shell", "google-chrome", "chromium-browser")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
EMPTY = {"meta", "input", "br"}


class Reader(html.parser.HTMLParser):
    """Collects a page's tags, its addresses and the text of its elements, and checks that what opens is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.addresses, self.names = [], {}, [], set()

    def handle_starttag(self, tag, attributes):
        self.names.add(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


@pytest.fixture(scope="module")
def page():
    config = override(load_config("tiny"), [f"--config.name={NAME}"])
    plan = make_plan(config, find_topology("v5e:2x4"))
    found = map_strategies(plan.share, columns=4, rows=3)
    advised = [Advised("Fastest that fits", f"by <{NAME}>", COMMAND)]
    return make_page(plan, advise(config, plan.share.topology), advised, found)


def read(page):
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def test_a_page_needs_no_other_file_and_is_small(page):
    reader = read(page)
    assert reader.addresses == []
    assert not re.search(r"@import|url\(|https?://(?!www\.w3\.org/2000/svg)", page.split("<details")[0])
    assert not {"link", "img", "iframe", "object"} & reader.names
    assert len(page.encode()) < 500_000
    assert {"svg", "rect", "table"} <= reader.names


def test_what_the_plan_names_is_text_and_no_markup(page):
    reader = read(page)
    spans = re.search(r"<code>(.*?)</code>", page, re.DOTALL)[1]
    assert html.unescape(re.sub(r"</?span>", "", spans)) == COMMAND
    assert reader.texts["h1"][0].startswith(NAME)
    data = next(text for text in reader.texts["script"] if text.startswith("{"))
    assert json.loads(data)["devices"] == 2


def drive(page, script, tmp_path):
    """The page as a real browser has it after it ran a script."""
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", f"--user-data-dir={tmp_path}"]
    done = subprocess.run(
        [BROWSER, *flags, "--dump-dom", f"file://{path}"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_in_a_browser_sliders_move_the_map_and_the_button_copies_the_command(page, tmp_path):
    script = """
    const [slider, out] = ["tokens", "tokens-out"].map(id => document.getElementById(id));
    const seen = [document.querySelectorAll("#bars .bar").length, out.textContent];
    slider.value = slider.max;
    slider.dispatchEvent(new Event("input"));
    seen.push(out.textContent, document.querySelectorAll("#grid .cell").length);
    Object.defineProperty(navigator, "clipboard", {value: {writeText: async text => { seen.push("clip: " + text); }}});
    document.querySelector("button[data-copy]").click();
    setTimeout(() => { document.body.dataset.seen = JSON.stringify(seen); }, 100);
    """
    dom = drive(page, script, tmp_path)
    assert 'data-ready="yes"' in dom, "the page's own script ran to its end"
    bars, before, after, cells, copied = json.loads(html.unescape(re.search(r'data-seen="(.*?)"', dom)[1]))
    assert bars > 1
    assert before != after
    assert cells == 4 * 3
    assert copied == f"clip: {COMMAND}"
    assert "Copied" in dom
