"""A pipeline over fake lanes with everything it needs: a random model, experts that are plain functions, a table, calls and what they should give."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cluster.core.descriptors import DType, ExpertDescriptor, GateDescriptor, LayerDescriptor, Manifest, ModelDescriptor
from cluster.core.ids import ExpertId
from cluster.core.routing_table import RoutingTable, TableCopy
from kit.lanes import FakeLanes, copy_on, table_of
from router_service.core.combine import finish
from router_service.core.reference import experts_output
from router_service.models import ServedModel, make_model
from router_service.pipeline import GateChoice, LayerCall, Pipeline, TopK

torch.set_num_threads(1)

D, E, K, T = 16, 6, 2, 20
NAME = "tiny"


Copies = Callable[[int, int], Iterable[TableCopy]]


def version_of(index: int) -> str:
    """A made-up digest."""
    return f"{index:064x}"


def expert_forward(expert: ExpertId, _: str, rows_ND: torch.Tensor) -> torch.Tensor:
    """Each expert its own function, computed in the rows' dtype."""
    return torch.tanh(rows_ND * (expert.index + 1)) + expert.layer


def served(dtype: DType = DType.BF16) -> ServedModel:
    """A model with MoE layers 0 and 3 and random gates."""
    expert = ExpertDescriptor(hidden_size=D, intermediate_size=8, dtype=dtype)
    gate = GateDescriptor(num_experts=E, top_k=K, normalize=True)
    layers = tuple(LayerDescriptor(layer=layer, num_experts=E, expert=expert, gate=gate) for layer in (0, 3))
    manifest = Manifest(model=ModelDescriptor(name=NAME, family="custom", dtype=dtype, layers=layers), experts={}, gates={})
    rng = np.random.default_rng(0)
    return make_model(manifest, "", {layer: {"weight": rng.standard_normal((E, D)).astype(np.float32)} for layer in (0, 3)})


def one_copy_each(layer: int, index: int) -> list[TableCopy]:
    """Every expert on one of three actors."""
    return [copy_on(f"a{(layer + index) % 3}", version_of(index))]


def table(copies: Copies = one_copy_each, *, epoch: int = 7) -> RoutingTable:
    """The table of both layers; `copies(layer, index)` places each expert."""
    return table_of(NAME, {(layer, index): copies(layer, index) for layer in (0, 3) for index in range(E)}, epoch=epoch)


@dataclass
class Setup:
    """A pipeline with everything under it; `table` may be changed at any time."""

    pipeline: Pipeline
    lanes: FakeLanes
    model: ServedModel
    table: RoutingTable | None


def setup(copies: Copies = one_copy_each, **options: Any) -> Setup:
    """A pipeline over the experts above."""
    lanes, model = FakeLanes(expert_forward), served()
    made = Setup(None, lanes, model, table(copies))
    made.pipeline = Pipeline(lanes, {NAME: model}, lambda: made.table, random.Random(0), shadows=lanes, **options)
    return made


def call(seed: int = 0, *, num_tokens: int = T, dtype: torch.dtype = torch.bfloat16, timeout_s: float = 20.0, **fields: Any) -> LayerCall:
    """A gated call of layer 3 with fresh random rows."""
    hidden = torch.randn((num_tokens, D), generator=torch.Generator().manual_seed(seed)).to(dtype)
    deadline_s = asyncio.get_running_loop().time() + timeout_s
    return replace(LayerCall("r", NAME, 3, hidden, GateChoice(), deadline_s), **fields)


def expected(of: LayerCall, model: ServedModel) -> torch.Tensor:
    """The reply, plainly: the gate's or the caller's choices, each expert on its rows, one combine."""
    x_TD = of.hidden_states.to(torch.bfloat16)
    if isinstance(of.routing, TopK):
        ids_TK, weights_TK = of.routing.expert_ids_TK, of.routing.weights_TK
    else:
        choices = model.layer(of.layer).gate(x_TD)
        ids_TK, weights_TK = choices.ids_TK, choices.weights_TK
    total = experts_output(x_TD, ids_TK.numpy(), weights_TK, lambda index, rows: expert_forward(ExpertId(NAME, of.layer, index), "", rows))
    return finish(total, of.hidden_states.dtype)
