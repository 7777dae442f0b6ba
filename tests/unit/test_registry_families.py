"""The family records against transformers itself: keys that `save_pretrained` writes, defaults of the config classes, layers that have experts."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cluster.core.descriptors import DType
from cluster.core.errors import CheckpointError
from cluster.registry.checkpoint import Checkpoint
from cluster.registry.describe import config_dtype, describe, gate_record, moe_layers
from cluster.registry.families import FAMILIES as RECORDS
from cluster.registry.families import FromConfig, Layout
from cluster.registry.tensor_files import TensorFiles
from kit.models import CUSTOM, FAMILIES, NUM_EXPERTS, TOP_K, save_custom, save_tiny, tiny_model

# Of a layer's expert block, what stays with the model.
_LOCAL = re.compile(r"shared_expert|\.mlp\.(gate_proj|up_proj|down_proj)\.weight$")
_CONFIGS = {
    "mixtral": transformers.MixtralConfig,
    "qwen2_moe": transformers.Qwen2MoeConfig,
    "qwen3_moe": transformers.Qwen3MoeConfig,
    "olmoe": transformers.OlmoeConfig,
    "deepseek_v2": transformers.DeepseekV2Config,
    "deepseek_v3": transformers.DeepseekV3Config,
    "gpt_oss": transformers.GptOssConfig,
    "granitemoe": transformers.GraniteMoeConfig,
    "phimoe": transformers.PhimoeConfig,
}


def _config(family: str, folder: Path) -> dict[str, Any]:
    return json.loads((save_tiny(family, folder) / "config.json").read_text())


def _keys(layout: Layout, layer: int) -> set[str]:
    patterns = [layout.down, layout.gate, layout.up, layout.gate_up, layout.gate_up_bias, layout.down_bias, *layout.gates.values()]
    return {pattern.format(layer=layer, expert=expert) for pattern in patterns if pattern for expert in range(NUM_EXPERTS)}


def _check_keys(family: str, folder: Path) -> None:
    with Checkpoint.open(folder) as checkpoint, TensorFiles(folder) as files:
        layers = [entry.layer for entry in checkpoint.descriptor("m").layers]
        ours = {key for layer in layers for key in _keys(checkpoint._layout, layer)}
        blocks = {key for key in files.entries if re.search(r"\.(mlp|block_sparse_moe)\.", key) and not _LOCAL.search(key)}
    assert ours == blocks, family


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_are_exactly_those_that_save_pretrained_writes(family: str, tmp_path: Path) -> None:
    _check_keys(family, save_tiny(family, tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_memory_form_of_transformers_is_read_too(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "memory", save_original_format=False)
    _check_keys(family, tmp_path / "memory")
    save_tiny(family, tmp_path / "original")
    with Checkpoint.open(tmp_path / "memory") as memory, Checkpoint.open(tmp_path / "original") as original:
        assert memory.descriptor("m") == original.descriptor("m")
        layer = memory.descriptor("m").layers[-1].layer
        for ours, theirs in ((memory.expert(layer, 5), original.expert(layer, 5)), (memory.gate(layer), original.gate(layer))):
            assert ours.keys() == theirs.keys()
            assert all((ours[name] == theirs[name]).all() for name in ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_the_decoder_layers_that_have_experts(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    theirs = {int(name.split(".")[2]) for name, _ in model.named_modules() if name.endswith(".experts")}
    assert set(moe_layers(_config(family, tmp_path))) == theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_the_config_class(family: str) -> None:
    record, config = RECORDS[family], _CONFIGS[family]()
    sources = [record.first_dense_layers, record.sparse_step, record.dense_layers, *record.gate.values(), *record.expert.values()]
    checked = 0
    for source in sources:
        if not isinstance(source, FromConfig) or not source.keys or source.only_if:
            continue
        value = getattr(config, source.keys[0])
        assert (tuple(value) if isinstance(value, list) else value) == source.default, source.keys
        checked += 1
    if family in ("qwen3_moe", "deepseek_v3", "gpt_oss", "phimoe"):
        assert checked


@pytest.mark.parametrize("family", FAMILIES)
def test_descriptor_counts_what_the_model_has(family: str, tmp_path: Path) -> None:
    with Checkpoint.open(save_tiny(family, tmp_path)) as checkpoint:
        model = checkpoint.descriptor("m")
    experts = next(module for name, module in tiny_model(family).named_modules() if name.endswith(".experts"))
    per_expert = sum(parameter[0].numel() for parameter in experts.parameters())
    assert model.family == family
    assert model.dtype is DType.FP32
    assert all(entry.num_experts == NUM_EXPERTS and entry.gate.top_k == TOP_K for entry in model.layers)
    assert model.layers[0].expert.num_bytes == per_expert * 4


def test_groups_count_only_where_the_method_uses_them(tmp_path: Path) -> None:
    config = _config("deepseek_v2", tmp_path)
    assert gate_record(config).num_groups == 4
    assert gate_record({**config, "topk_method": "greedy"}).num_groups == 1


def test_norm_topk_prob_is_off_unless_the_config_says_so(tmp_path: Path) -> None:
    config = _config("olmoe", tmp_path)
    del config["norm_topk_prob"]
    assert not gate_record(config).normalize
    assert gate_record({**config, "norm_topk_prob": True}).normalize


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "dbrx"}, "'dbrx' is not served"),
        ({"model_type": None}, "model_type None"),
        ({"topk_method": "greedy"}, "topk_method of deepseek_v3"),
        ({"scoring_func": "softmax"}, "scoring_func of deepseek_v3"),
        ({"moe_layer_freq": 2}, "moe_layer_freq of deepseek_v3"),
        ({"hidden_act": "mish"}, "hidden_act 'mish'"),
        ({"n_routed_experts": "8"}, "n_routed_experts must be a whole number"),
        ({"num_experts_per_tok": 9}, "9 experts per token, but there are 8"),
        ({"n_group": 3}, "8 experts in 3 groups"),
        ({"topk_group": 5}, "of which 5 are kept"),
        ({"n_group": 8, "topk_group": 1}, "do not fit into the 1 groups"),
        ({"first_k_dense_replace": 3}, "no layer with experts"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"routed_scaling_factor": "big"}, "scale"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused_by_its_field(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    config = {**_config("deepseek_v3", tmp_path), **change}
    with pytest.raises(CheckpointError, match=re.escape(words)):
        describe(config, name="m", dtype=DType.BF16)


def test_element_type_is_read_under_both_keys_and_others_are_refused() -> None:
    assert config_dtype({"dtype": "bfloat16"}) is DType.BF16
    assert config_dtype({"torch_dtype": "float16"}) is DType.FP16
    assert config_dtype({"torch_dtype": "torch.float32"}) is DType.FP32
    assert config_dtype({}) is None
    with pytest.raises(CheckpointError, match="float64"):
        config_dtype({"dtype": "float64"})


@pytest.mark.parametrize(
    "gate",
    [
        {"kind": "linear", "score": "sigmoid", "correction_bias": True, "bias": True, "normalize": True, "normalize_eps": 1e-20, "scale": 2.0},
        {"kind": "mlp_tanh", "score": "topk_softmax"},
        {"kind": "position", "score": "softmax"},
    ],
)
@pytest.mark.parametrize("gated", [True, False])
def test_custom_models_say_their_gate_in_the_fields_of_its_descriptor(gate: dict[str, Any], gated: bool, tmp_path: Path) -> None:
    folder = save_custom(tmp_path, gate=gate, gated=gated, dtype=torch.bfloat16)
    with Checkpoint.open(folder) as checkpoint:
        model = checkpoint.descriptor("m")
        assert model.family == CUSTOM
        assert [entry.layer for entry in model.layers] == [0, 2]
        assert model.layers[0].gate.model_dump(exclude_defaults=True) == {
            "num_experts": NUM_EXPERTS,
            "top_k": TOP_K,
            **{key: value for key, value in gate.items() if value not in ("linear", "softmax")},
        }
        assert model.layers[0].expert.gated is gated
        assert ("gate_up" in checkpoint.expert(2, 1)) is gated
        names = set(checkpoint.gate(0))
    expected = {"mlp_tanh": {"fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"}, "position": {"weight", "position_embedding"}}
    assert names == expected.get(gate["kind"], {"weight", "bias", "correction_bias"})


def test_a_custom_gate_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    folder = save_custom(tmp_path, gate={"kind": "linear", "temperature": 2})
    with pytest.raises(CheckpointError, match="temperature"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("layers", [None, [], [0, 0], [-1], ["0"], 3])
def test_custom_moe_layers_must_be_distinct_indices(layers: Any, tmp_path: Path) -> None:
    folder = save_custom(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="layer"):
        moe_layers({**config, "moe_layers": layers})
