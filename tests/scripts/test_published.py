import dataclasses

import pytest

from scripts.verify.published import COMPARISONS


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda comparison: comparison.name)
def test_published_orders_are_predicted(comparison):
    assert comparison.order_agrees()


def test_published_order_upside_down_disagrees():
    first = COMPARISONS[0]
    upside_down = {name: 1 / figure for name, figure in first.predict().items()}
    assert not dataclasses.replace(first, predict=lambda: upside_down).order_agrees()
