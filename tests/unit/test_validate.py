"""Every bad call is refused as InvalidRequest with the path of its field and a message that stands alone; nothing else ever is raised."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.core.descriptors import DType, ExpertDescriptor, GateDescriptor, LayerDescriptor
from cluster.core.errors import InvalidRequest
from router_service.core.layer_call import GateChoice, LayerCall, Overflow, TopK
from router_service.core.validate import check_call

D, E, T = 6, 4, 3
LAYER = LayerDescriptor(layer=0, num_experts=E, expert=ExpertDescriptor(hidden_size=D, intermediate_size=8), gate=GateDescriptor(num_experts=E, top_k=2))
GOOD = LayerCall("r1", "m", 0, torch.ones(T, D, dtype=torch.bfloat16), GateChoice(), deadline_s=math.inf)


def _check(call: LayerCall, *, num_positions: int = 0, max_tokens: int = 100) -> torch.Tensor:
    return check_call(call, LAYER, DType.BF16, max_tokens=max_tokens, num_positions=num_positions)


def _hidden(tensor: torch.Tensor) -> LayerCall:
    return replace(GOOD, hidden_states=tensor)


def _chosen(ids: list[list[int]] | torch.Tensor, weights: torch.Tensor | None = None) -> LayerCall:
    ids_TK = ids if isinstance(ids, torch.Tensor) else torch.tensor(ids, dtype=torch.int32)
    return replace(GOOD, routing=TopK(ids_TK, torch.ones(ids_TK.shape) if weights is None else weights))


def _gate(**fields: object) -> LayerCall:
    return replace(GOOD, routing=GateChoice(**fields))


def _spoilt(value: float, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    hidden = torch.ones(T, D, dtype=dtype)
    hidden[1, 2] = value
    return hidden


NAN_WEIGHT = torch.tensor([[1.0, 0.0], [math.nan, 1.0], [1.0, 0.0]])
BAD = {
    "rank 1": (_hidden(torch.ones(D, dtype=torch.bfloat16)), "hidden_states.shape", "rank 2"),
    "rank 3": (_hidden(torch.ones(1, T, D, dtype=torch.bfloat16)), "hidden_states.shape", "flatten batch and sequence"),
    "zero tokens": (_hidden(torch.ones(0, D, dtype=torch.bfloat16)), "hidden_states.shape", "at least one token"),
    "too many tokens": (_hidden(torch.ones(101, D, dtype=torch.bfloat16)), "hidden_states.shape", "1 to 100 rows"),
    "wrong width": (_hidden(torch.ones(T, D + 1, dtype=torch.bfloat16)), "hidden_states.shape", "width 6"),
    "wrong float dtype": (_hidden(torch.ones(T, D, dtype=torch.float16)), "hidden_states.dtype", "bf16"),
    "integer dtype": (_hidden(torch.ones(T, D, dtype=torch.int32)), "hidden_states.dtype", "fp32"),
    "NaN": (_hidden(_spoilt(math.nan)), "hidden_states", "row 1"),
    "Inf": (_hidden(_spoilt(math.inf)), "hidden_states", "row 1"),
    "minus Inf in fp32": (_hidden(_spoilt(-math.inf, torch.float32)), "hidden_states", "row 1"),
    "beyond bf16": (_hidden(_spoilt(3.4e38, torch.float32)), "hidden_states", "beyond the range of bf16"),
    "id too large": (_chosen([[0, 1], [1, E], [0, 1]]), "top_k.expert_ids", "0 to 3"),
    "id below -1": (_chosen([[0, 1], [1, 0], [-2, 1]]), "top_k.expert_ids", "row 2"),
    "id extreme": (_chosen([[-(2**31), 1], [1, 2**31 - 1], [0, 1]]), "top_k.expert_ids", "row 0"),
    "duplicate ids": (_chosen([[0, 1], [2, 2], [0, 1]]), "top_k.expert_ids", "names an expert twice in row 1"),
    "K above E": (_chosen([[0, 1, 2, 3, -1]] * T), "top_k.expert_ids.shape", "1 to 4 columns"),
    "K of zero": (_chosen(torch.zeros((T, 0), dtype=torch.int32)), "top_k.expert_ids.shape", "1 to 4 columns"),
    "ids for other tokens": (_chosen([[0, 1]]), "top_k.expert_ids.shape", "[3, K]"),
    "ids of rank 1": (_chosen(torch.zeros(T, dtype=torch.int32)), "top_k.expert_ids.shape", "[3, K]"),
    "ids as int64": (_chosen(torch.zeros((T, 1), dtype=torch.int64)), "top_k.expert_ids.dtype", "int32"),
    "weights in bf16": (_chosen([[0], [1], [2]], torch.ones(T, 1, dtype=torch.bfloat16)), "top_k.weights.dtype", "fp32"),
    "weights of another shape": (_chosen([[0], [1], [2]], torch.ones(T, 2)), "top_k.weights.shape", "shape of top_k.expert_ids"),
    "NaN weight": (_chosen([[0, 1]] * T, NAN_WEIGHT), "top_k.weights", "row 1"),
    "Inf weight": (_chosen([[0, 1]] * T, torch.full((T, 2), math.inf)), "top_k.weights", "finite"),
    "needless positions": (_gate(positions_T=torch.zeros(T, dtype=torch.int32)), "gate.positions", "does not use positions"),
    "capacity factor of zero": (_gate(overflow=Overflow.DROP, capacity_factor=0.0), "gate.capacity_factor", "above 0"),
    "negative capacity factor": (_gate(overflow=Overflow.NEXT_BEST, capacity_factor=-1.0), "gate.capacity_factor", "above 0"),
    "capacity factor NaN": (_gate(overflow=Overflow.DROP, capacity_factor=math.nan), "gate.capacity_factor", "finite"),
    "capacity factor Inf": (_gate(overflow=Overflow.DROP, capacity_factor=math.inf), "gate.capacity_factor", "finite"),
}
BAD_POSITIONS = {
    "missing": (_gate(), "gate.positions", "is missing"),
    "floats": (_gate(positions_T=torch.zeros(T)), "gate.positions.dtype", "uint32"),
    "of other tokens": (_gate(positions_T=torch.zeros(T + 1, dtype=torch.uint32)), "gate.positions.shape", "[3]"),
    "beyond the last": (_gate(positions_T=torch.tensor([0, 9, 10], dtype=torch.int64).to(torch.uint32)), "gate.positions", "row 2"),
    "negative": (_gate(positions_T=torch.tensor([0, -1, 0])), "gate.positions", "row 1"),
}


def _assert_refused(call: LayerCall, field: str, words: str, *, num_positions: int = 0) -> None:
    with pytest.raises(InvalidRequest) as refused:
        _check(call, num_positions=num_positions)
    assert refused.value.field == field
    assert words in str(refused.value)
    assert str(refused.value).startswith(field.removesuffix(".shape").removesuffix(".dtype"))


@pytest.mark.parametrize("case", BAD)
def test_a_bad_call_is_refused_by_the_path_of_its_field(case: str) -> None:
    _assert_refused(*BAD[case])


@pytest.mark.parametrize("case", BAD_POSITIONS)
def test_bad_positions_are_refused_by_a_position_aware_gate(case: str) -> None:
    call, field, words = BAD_POSITIONS[case]
    _assert_refused(call, field, words, num_positions=10)


def test_no_message_quotes_a_value() -> None:
    for call, _, _ in BAD.values():
        with pytest.raises(InvalidRequest) as refused:
            _check(call)
        assert not any(word in str(refused.value) for word in ("2147483", "nan ", "tensor("))


@pytest.mark.parametrize(
    "call",
    [
        GOOD,
        _hidden(torch.ones(T, D)),
        _hidden(torch.ones(100, D)),
        _chosen([[0, 1], [-1, -1], [3, -1]]),
        _chosen([list(range(E))] * T),
        _chosen([[0, -1]] * T, torch.tensor([[1.0, math.nan]] * T)),
        _gate(overflow=Overflow.DROP, capacity_factor=1.0),
        _gate(capacity_factor=math.nan),
    ],
    ids=["gate", "fp32", "most tokens", "unused choices", "all experts", "NaN weight of an unused choice", "capacity", "factor without a policy"],
)
def test_a_good_call_passes_with_its_rows_in_the_models_dtype(call: LayerCall) -> None:
    x_TD = _check(call)
    assert x_TD.dtype == torch.bfloat16
    assert torch.equal(x_TD, call.hidden_states.to(torch.bfloat16))


def test_rows_that_require_grad_are_detached() -> None:
    assert not _check(_hidden(torch.ones(T, D, requires_grad=True))).requires_grad


SHAPES = st.lists(st.integers(0, 5), min_size=0, max_size=3)
FLOATS = st.sampled_from([torch.bfloat16, torch.float32, torch.float16, torch.int32, torch.uint8, torch.bool])
INTS = st.sampled_from([torch.int32, torch.int64, torch.uint32, torch.float32])
SPECIAL = st.sampled_from([0.0, 1.0, -1.0, math.nan, math.inf, 1e38])


def _filled(shape: list[int], dtype: torch.dtype, seed: int, special: float) -> torch.Tensor:
    values = torch.randint(-2, 6, tuple(shape), generator=torch.Generator().manual_seed(seed)).float()
    values = torch.where(values == 5, torch.tensor(special), values) if dtype.is_floating_point else values.abs()
    return values.to(dtype)


@settings(deadline=None, max_examples=500)
@given(shapes=st.tuples(SHAPES, SHAPES, SHAPES), floats=st.tuples(FLOATS, FLOATS), ints=INTS, seed=st.integers(0, 99), special=SPECIAL, gated=st.booleans())
def test_whatever_comes_it_passes_or_is_refused_by_a_field_of_the_request(
    shapes: tuple[list[int], list[int], list[int]],
    floats: tuple[torch.dtype, torch.dtype],
    ints: torch.dtype,
    seed: int,
    special: float,
    gated: bool,
) -> None:
    # Half of the hidden states have the right width, so that what comes after them is reached.
    first = [shapes[0][0] if shapes[0] else 1, D] if seed % 2 else shapes[0]
    hidden, ids, weights = _filled(first, floats[0], seed, special), _filled(shapes[1], ints, seed + 1, special), _filled(shapes[2], floats[1], seed, special)
    routing = GateChoice(ids, Overflow(seed % 3), special) if gated else TopK(ids, weights)
    x_TD, field, message = None, "", ""
    try:
        x_TD = _check(replace(GOOD, hidden_states=hidden, routing=routing), num_positions=5 * (seed % 2))
    except InvalidRequest as refused:
        field, message = refused.field, str(refused)
    if x_TD is None:
        assert field.split(".")[0] in {"hidden_states", "top_k", "gate"}
        assert len(message) > 20
    else:
        assert x_TD.shape == hidden.shape
        assert torch.isfinite(x_TD).all()
