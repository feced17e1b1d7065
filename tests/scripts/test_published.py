import dataclasses

import pytest

from scripts.verify.published import ATTENTION_ALONE, COMPARISONS, planned_rate
from scripts.verify.published_steps import all_steps
from scripts.verify.times import attention_table, ratio_of, within


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda comparison: comparison.name)
def test_published_orders_are_predicted(comparison):
    assert comparison.order_agrees()


def test_published_order_upside_down_disagrees():
    first = COMPARISONS[0]
    upside_down = {name: 1 / figure for name, figure in first.predict().items()}
    assert not dataclasses.replace(first, predict=lambda: upside_down).order_agrees()


STEPS = all_steps()


def test_steps_that_are_held_out_are_not_those_that_set_constants():
    held, used = ({step.id for step in STEPS[kind]} for kind in ("held out", "sets constants"))
    assert abs(len(held) - len(used)) <= 1
    assert not held & used
    assert len(held) >= 24


def test_steps_measured_on_an_h100_are_planned_within_a_tenth():
    assert all(0.9 < ratio_of(step) < 1.1 for step in STEPS["measured"])


def test_most_published_steps_are_planned_near_their_seconds():
    for kind in ("sets constants", "held out"):
        ratios = [ratio_of(step) for step in STEPS[kind]]
        assert len(within(ratios)) > 0.75 * len(ratios)
    slower = [1.6 * ratio_of(step) for step in STEPS["held out"]]
    assert len(within(slower)) < 0.5 * len(slower)  # the control


def test_attention_alone_is_planned_near_what_magiattention_charted():
    table, ratios = attention_table()
    assert table.row_count == len(ATTENTION_ALONE)
    assert len(ratios) == 4 * len(ATTENTION_ALONE)
    assert all(0.85 < ratio < 1.2 for ratio in ratios)


@pytest.mark.parametrize("devices", [8, 16, 32, 64])
@pytest.mark.parametrize("backward", [False, True])
def test_attention_alone_has_the_order_that_magiattention_charted(devices, backward):
    published = {name: rates[devices] for (name, back), rates in ATTENTION_ALONE.items() if back == backward}
    planned = {name: planned_rate(name, devices, backward) for name in published}
    apart = [(a, b) for a in published for b in published if published[a] > 1.05 * published[b]]
    assert apart
    assert all(planned[a] > planned[b] for a, b in apart)
