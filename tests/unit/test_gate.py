"""Gates as data: against plain references in fp64, and the rule for ties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.core.descriptors import DType, GateDescriptor
from cluster.core.errors import CheckpointError, DataLoss
from router_service.core.choose import choose
from router_service.core.gate import Gate
from router_service.core.gate_scores import top_k
from router_service.core.layer_call import GateChoice

D, E, K, T = 24, 8, 3, 64


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _reference_softmax(x_TD: torch.Tensor, weight_ED: torch.Tensor, *, normalize: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64, plainly: probabilities over all experts, the K best, gathered."""
    probabilities_TE = torch.softmax(x_TD.double() @ weight_ED.double().T, dim=-1)
    weights_TK, ids_TK = torch.topk(probabilities_TE, K, dim=-1)
    if normalize:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return ids_TK, weights_TK * scale


@pytest.mark.parametrize("normalize", [True, False])
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1.0, 2.5]))
def test_softmax_gates_agree_with_fp64(normalize: bool, seed: int, scale: float) -> None:
    weight_ED, x_TD = _random(E, D, seed=seed), _random(T, D, seed=seed + 1)
    gate = Gate(GateDescriptor(num_experts=E, top_k=K, normalize=normalize, scale=scale), {"weight": weight_ED}, DType.FP32)
    choices = gate(x_TD)
    ids_TK, weights_TK = _reference_softmax(x_TD, weight_ED, normalize=normalize, scale=scale)
    clear_T = (choices.scores_TE.sort(dim=1, descending=True).values.diff(dim=1).abs()[:, :K] > 1e-5).all(dim=1)
    assert torch.equal(choices.ids_TK[clear_T].long(), ids_TK[clear_T])
    torch.testing.assert_close(choices.weights_TK[clear_T].double(), weights_TK[clear_T], rtol=1e-5, atol=1e-6)


def test_a_two_layer_gate_agrees_with_fp64() -> None:
    tensors = {"fc1_weight": _random(16, D), "fc1_bias": _random(16, seed=1), "fc2_weight": _random(E, 16, seed=2), "fc2_bias": _random(E, seed=3)}
    gate = Gate(GateDescriptor(kind="mlp_tanh", num_experts=E, top_k=K, score="topk_softmax"), tensors, DType.FP32)
    x_TD = _random(T, D, seed=4)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    logits_TE = torch.tanh(x_TD.double() @ wide["fc1_weight"].T + wide["fc1_bias"]) @ wide["fc2_weight"].T + wide["fc2_bias"]
    best_TK, ids_TK = torch.topk(logits_TE, K)
    choices = gate(x_TD)
    assert torch.equal(choices.ids_TK.long(), ids_TK)
    torch.testing.assert_close(choices.weights_TK.double(), torch.softmax(best_TK, dim=-1), rtol=1e-5, atol=1e-6)


def test_a_position_aware_gate_adds_the_embedding_of_each_position() -> None:
    tensors = {"weight": _random(E, D), "position_embedding": _random(10, D, seed=1)}
    gate = Gate(GateDescriptor(kind="position", num_experts=E, top_k=K), tensors, DType.FP32)
    plain = Gate(GateDescriptor(num_experts=E, top_k=K), {"weight": tensors["weight"]}, DType.FP32)
    x_TD, positions_T = _random(T, D, seed=2), torch.arange(T) % 10
    with_positions, shifted = gate(x_TD, positions_T), gate(x_TD, (positions_T + 1) % 10)
    added = plain(x_TD + tensors["position_embedding"][positions_T])
    assert gate.num_positions == 10
    assert torch.equal(with_positions.ids_TK, added.ids_TK)
    assert torch.equal(with_positions.weights_TK, added.weights_TK)
    assert not torch.equal(with_positions.ids_TK, shifted.ids_TK)


def test_the_correction_bias_moves_the_choice_and_never_the_weights() -> None:
    weight_ED, x_TD = _random(E, D), _random(T, D, seed=1)
    favour_last = torch.zeros(E).index_fill_(0, torch.tensor([E - 1]), 10.0)
    descriptor = GateDescriptor(num_experts=E, top_k=K, score="sigmoid", correction_bias=True)
    choices = Gate(descriptor, {"weight": weight_ED, "correction_bias": favour_last}, DType.FP32)(x_TD)
    assert (choices.ids_TK[:, 0] == E - 1).all()
    scores_TE = torch.sigmoid(x_TD @ weight_ED.T)
    torch.testing.assert_close(choices.weights_TK, scores_TE.gather(1, choices.ids_TK.long()))


@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
def test_group_limits_choose_inside_the_best_groups_only(group_score: str) -> None:
    descriptor = GateDescriptor(num_experts=E, top_k=K, num_groups=4, top_groups=2, group_score=group_score)
    choices = Gate(descriptor, {"weight": _random(E, D)}, DType.FP32)(_random(T, D, seed=1))
    assert all(len(groups.unique()) <= 2 for groups in choices.ids_TK // 2)
    assert (torch.isinf(choices.scores_TE).sum(dim=1) == 4).all()


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(st.integers(-2, 2), min_size=6, max_size=6), min_size=1, max_size=8), st.integers(1, 6))
def test_ties_are_broken_by_expert_index(rows: list[list[int]], k: int) -> None:
    chosen = top_k(torch.tensor(rows, dtype=torch.bfloat16), k)
    assert chosen.tolist() == [sorted(range(6), key=lambda index, row=row: (-row[index], index))[:k] for row in rows]


def test_a_row_is_gated_alike_wherever_it_stands_in_a_batch() -> None:
    gate = Gate(GateDescriptor(num_experts=E, top_k=K, normalize=True, weight_dtype="model"), {"weight": _random(E, D).bfloat16()}, DType.BF16)
    x_TD = _random(T, D, seed=1).bfloat16()
    order = torch.randperm(T, generator=torch.Generator().manual_seed(2))
    straight, shuffled = gate(x_TD), gate(x_TD[order])
    assert torch.equal(straight.ids_TK[order], shuffled.ids_TK)
    assert torch.equal(straight.weights_TK[order], shuffled.weights_TK)


@pytest.mark.parametrize(
    ("fields", "shapes", "words"),
    [
        ({"top_k": E + 1}, {"weight": (E, D)}, "more than its 8 experts"),
        ({"top_k": 3, "score": "sparsemixer"}, {"weight": (E, D)}, "sparsemixer chooses 2"),
        ({"top_k": 2, "num_groups": 3}, {"weight": (E, D)}, "3 equal groups"),
        ({"top_k": 3, "num_groups": 4, "top_groups": 1}, {"weight": (E, D)}, "2 experts of its top_groups"),
        ({"top_k": 1, "num_groups": 8, "top_groups": 2, "group_score": "top2_sum"}, {"weight": (E, D)}, "two experts in each group"),
        ({"top_k": 2}, {"weight": (E + 1, D)}, "tensor weight has shape [9, 24]"),
        ({"top_k": 2}, {"weight": (E, D), "bias": (E,)}, "bias, weight where weight are expected"),
        ({"top_k": 2, "correction_bias": True}, {"weight": (E, D)}, "correction_bias"),
        ({"top_k": 2, "kind": "position"}, {"weight": (E, D)}, "position_embedding"),
    ],
)
def test_a_gate_that_cannot_choose_is_refused_by_name(fields: dict[str, object], shapes: dict[str, tuple[int, ...]], words: str) -> None:
    descriptor = GateDescriptor.model_validate({"num_experts": E, **fields})
    with pytest.raises(CheckpointError) as refused:
        Gate(descriptor, {name: torch.zeros(shape) for name, shape in shapes.items()}, DType.FP32)
    assert words in str(refused.value)


def test_scores_that_overflow_name_the_rows_and_serve_nothing() -> None:
    gate = Gate(GateDescriptor(num_experts=E, top_k=K), {"weight": torch.full((E, D), 60000.0).half()}, DType.FP16)
    x_TD = torch.zeros(4, D).half()
    x_TD[2] = 60000.0
    with pytest.raises(DataLoss) as lost:
        choose(GateChoice(), gate, x_TD)
    assert lost.value.failed_rows == (2,)
