"""Dispatch order: a bijection between choices and places, grouped by expert."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from router_service.core.dispatch import order_choices

IDS = hnp.arrays(np.int32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=20), elements=st.integers(-1, 9))


@settings(deadline=None, max_examples=300)
@given(IDS)
def test_every_used_choice_has_one_place_and_every_place_its_choice(ids_TK: NDArray[np.int32]) -> None:
    order = order_choices(ids_TK)
    used = ids_TK >= 0
    assert (order.place_TK >= 0).tolist() == used.tolist()
    assert sorted(order.place_TK[used].tolist()) == list(range(int(used.sum())))
    tokens, _ = np.nonzero(used)
    assert (order.rows_N[order.place_TK[used]] == tokens).all()


@settings(deadline=None, max_examples=300)
@given(IDS)
def test_each_expert_has_one_run_of_rows_in_token_order(ids_TK: NDArray[np.int32]) -> None:
    order = order_choices(ids_TK)
    assert [part.index for part in order.experts] == sorted(set(ids_TK[ids_TK >= 0].tolist()))
    assert [part.start for part in order.experts] == [0, *[part.stop for part in order.experts]][: len(order.experts)]
    for part in order.experts:
        rows = order.rows_N[part.start : part.stop]
        assert part.num_rows == int((ids_TK == part.index).sum()) > 0
        assert (np.diff(rows) >= 0).all()
        places = np.arange(part.start, part.stop)
        assert (ids_TK[np.isin(order.place_TK, places)] == part.index).all()


def test_a_request_without_a_used_choice_dispatches_nothing() -> None:
    order = order_choices(np.full((3, 2), -1, np.int32))
    assert order.experts == ()
    assert order.rows_N.size == 0
