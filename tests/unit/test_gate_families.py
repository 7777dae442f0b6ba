"""Every family's gate against transformers' own router module, on rows that no model has seen."""

from pathlib import Path

import pytest
import torch

from cluster.core.descriptors import DType, LayerDescriptor
from cluster.registry.checkpoint import Checkpoint
from kit.models import FAMILIES, save_tiny, tiny_model
from router_service.core.gate import Choices, Gate
from router_service.models import as_tensor

TORCH = {DType.FP32: torch.float32, DType.BF16: torch.bfloat16, DType.FP16: torch.float16}
NUM_ROWS = 600


def _routers(model: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """Router modules by decoder layer index."""
    return {int(name.split(".")[2]): module for name, module in model.named_modules() if type(module).__name__.lower().endswith("topkrouter")}


def _dense(ids_TK: torch.Tensor, values_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    return torch.zeros((len(ids_TK), num_experts)).scatter_(1, ids_TK.long(), values_TK.float())


def _by_the_index_rule(scores_TE: torch.Tensor, k: int) -> torch.Tensor:
    rows = [sorted(range(len(row)), key=lambda index, row=row: (-row[index], index))[:k] for row in scores_TE.tolist()]
    return torch.tensor(rows)


def _check_against(router: torch.nn.Module, layer: LayerDescriptor, gate: Gate, dtype: DType, seed: int) -> int:
    """Compare on fresh rows; returns how many rows were tied at the k-th place."""
    x_TD = torch.randn((NUM_ROWS, layer.expert.hidden_size), generator=torch.Generator().manual_seed(seed)).to(TORCH[dtype])
    with torch.no_grad():
        _, their_weights_TK, their_ids_TK = router(x_TD)
    ours = gate(x_TD)
    k, num_experts = layer.gate.top_k, layer.num_experts
    clear_T, tied_T = _separated(ours, k, dtype)
    chosen, theirs = _dense(ours.ids_TK, torch.ones(NUM_ROWS, k), num_experts), _dense(their_ids_TK, torch.ones(NUM_ROWS, k), num_experts)
    assert torch.equal(chosen[clear_T], theirs[clear_T])
    assert clear_T.float().mean() > 0.75
    if layer.gate.score != "sparsemixer":
        assert torch.equal(ours.ids_TK.long(), _by_the_index_rule(ours.scores_TE, k))
    same_T = (chosen == theirs).all(dim=1)
    torch.testing.assert_close(
        _dense(ours.ids_TK, ours.weights_TK, num_experts)[same_T],
        _dense(their_ids_TK, their_weights_TK, num_experts)[same_T],
        rtol=2 * torch.finfo(their_weights_TK.dtype).eps,
        atol=1e-7,
    )
    return int(tied_T.sum())


def _separated(choices: Choices, k: int, dtype: DType) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose k-th and next score differ by more than the dtype's rounding, and rows where they are equal."""
    best = choices.scores_TE.float().sort(dim=1, descending=True).values
    gap_T = best[:, k - 1] - best[:, k]
    return gap_T > torch.finfo(TORCH[dtype]).eps * best[:, k - 1].abs().clamp(min=torch.finfo(TORCH[dtype]).tiny), gap_T == 0


@pytest.mark.parametrize("dtype", [DType.FP32, DType.BF16, DType.FP16])
@pytest.mark.parametrize("family", FAMILIES)
def test_choices_and_weights_are_those_of_transformers(family: str, dtype: DType, tmp_path: Path) -> None:
    routers = _routers(tiny_model(family, TORCH[dtype], seed=3))
    with Checkpoint(save_tiny(family, tmp_path / family, TORCH[dtype], seed=3)) as checkpoint:
        descriptor = checkpoint.descriptor(family)
        assert {entry.layer for entry in descriptor.layers} == set(routers)
        tied = 0
        for entry in descriptor.layers:
            gate = Gate(entry.gate, {name: as_tensor(array) for name, array in checkpoint.gate(entry.layer).items()}, descriptor.dtype)
            tied += _check_against(routers[entry.layer], entry, gate, dtype, seed=entry.layer + 11)
    assert tied <= NUM_ROWS * len(routers) * 0.08


def test_rows_tied_at_the_last_place_are_few_and_follow_the_index_rule_at_128_experts() -> None:
    import transformers
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    from cluster.core.descriptors import ExpertDescriptor, GateDescriptor

    config = transformers.Qwen3MoeConfig(num_experts=128, num_experts_per_tok=8, hidden_size=64, norm_topk_prob=True)
    router = Qwen3MoeTopKRouter(config).to(torch.bfloat16)
    weight_ED = torch.randn((128, 64), generator=torch.Generator().manual_seed(0)) / 8
    with torch.no_grad():
        router.weight.copy_(weight_ED)
    descriptor = GateDescriptor(num_experts=128, top_k=8, normalize=True, weight_dtype="model")
    layer = LayerDescriptor(layer=0, num_experts=128, expert=ExpertDescriptor(hidden_size=64, intermediate_size=8), gate=descriptor)
    gate = Gate(descriptor, {"weight": weight_ED.to(torch.bfloat16)}, DType.BF16)
    tied = _check_against(router, layer, gate, DType.BF16, seed=5)
    assert 0 < tied < NUM_ROWS * 0.2
