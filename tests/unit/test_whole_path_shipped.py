"""The shipped checkpoint over the whole path in one process: each layer and 200 tokens of text, beside the twin and transformers.

Shape legend: T rows, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from examples.demo.settings import MODEL
from examples.tiny_moe_lm.scoring import PROMPTS, heldout_texts
from kit.in_process import InProcessCluster, in_process_cluster
from router_service.client import RouterClient
from router_service.hf import REFERENCE, register_cluster_experts

REMOTE = "moelastic-shipped"
NUM_TOKENS = 200
NUM_LAYERS = 4
# Of the norm of each row, against transformers' eager experts.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])

logging.disable_progress_bar()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessCluster]:
    """It serves bf16, the checkpoint's own type."""
    with in_process_cluster({"bf16": MODEL}, tmp_path_factory.mktemp("bf16")) as made:
        yield made


@pytest.fixture(scope="module")
def cluster_fp32(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessCluster]:
    with in_process_cluster({"fp32": MODEL}, tmp_path_factory.mktemp("fp32"), dtype="fp32") as made:
        yield made


@pytest.fixture(scope="module")
def clients(cluster: InProcessCluster, cluster_fp32: InProcessCluster) -> Iterator[dict[torch.dtype, RouterClient]]:
    with cluster.client() as bf16, cluster_fp32.client() as fp32:
        yield {torch.bfloat16: bf16, torch.float32: fp32}


def _load(implementation: str, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype, experts_implementation=implementation).eval()


@contextmanager
def _experts_seen(model: Any) -> Iterator[list[tuple[tuple[torch.Tensor, ...], torch.Tensor]]]:
    """Every call of a layer's experts while the block runs, in order: its inputs and its output."""
    seen: list[tuple[tuple[torch.Tensor, ...], torch.Tensor]] = []
    hooks = [layer.mlp.experts.register_forward_hook(lambda _module, inputs, output: seen.append((inputs, output))) for layer in model.model.layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of any row, as a share of its norm."""
    return float(((found - expected).double().norm(dim=1) / expected.double().norm(dim=1)).max())


@DTYPES
def test_every_layer_of_real_text_equals_the_twin_and_is_close_to_eager(clients: dict[torch.dtype, RouterClient], dtype: torch.dtype) -> None:
    """Rows, choices and weights of each layer are those of transformers' own pass, so that no layer hides another's error."""
    experts = register_cluster_experts(client=clients[dtype], name=REMOTE)
    tokenizer, eager, twin = AutoTokenizer.from_pretrained(MODEL), _load("eager", dtype), _load(REFERENCE, dtype)
    ids = tokenizer(heldout_texts()["code"][:1500], return_tensors="pt").input_ids[:, :256]
    with torch.inference_mode(), _experts_seen(eager) as seen:
        eager(ids)
    assert len(seen) == NUM_LAYERS
    for layer, (inputs, eager_TD) in enumerate(seen):
        twin_layer = twin.model.layers[layer].mlp.experts
        with torch.inference_mode():
            remote_TD, twin_TD = experts(twin_layer, *inputs), twin_layer(*inputs)
        assert remote_TD.dtype == dtype
        assert _largest_difference(remote_TD, eager_TD) <= TOLERANCES[dtype], layer
        if dtype is torch.bfloat16:
            assert torch.equal(remote_TD, twin_TD), layer
        else:
            assert _largest_difference(remote_TD, twin_TD) <= 1e-6, layer


@DTYPES
def test_200_tokens_of_text_are_those_of_one_process(clients: dict[torch.dtype, RouterClient], dtype: torch.dtype) -> None:
    """The twin in bf16, bit for bit the same arithmetic; transformers itself in fp32."""
    experts = register_cluster_experts(client=clients[dtype], name=REMOTE)
    inputs = AutoTokenizer.from_pretrained(MODEL)(PROMPTS["code"], return_tensors="pt")
    limits: dict[str, Any] = {"min_new_tokens": NUM_TOKENS, "max_new_tokens": NUM_TOKENS, "do_sample": False, "pad_token_id": 0}
    experts.start_usage()
    found = _load(REMOTE, dtype).generate(**inputs, **limits)
    usage = experts.usage()
    expected = _load(REFERENCE if dtype is torch.bfloat16 else "eager", dtype).generate(**inputs, **limits)
    assert found.shape[1] == inputs.input_ids.shape[1] + NUM_TOKENS
    assert torch.equal(found, expected)
    assert usage.tokens == NUM_LAYERS * (found.shape[1] - 1)
    assert usage.outcomes["exact"] == sum(usage.outcomes.values()) == 2 * usage.tokens
