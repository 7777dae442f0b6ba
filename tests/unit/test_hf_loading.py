"""Loading: a model that names moelastic comes without its experts, every other one comes whole; what cannot be replaced is refused. Needs no cluster."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from cluster.core.errors import ConfigError
from kit.models import EXPERT_WIDTH, FAMILIES, HIDDEN, NUM_EXPERTS, NUM_LAYERS, VOCAB, save_tiny, tiny_model
from router_service.client import RouterClient
from router_service.hf import register_cluster_experts, stamp_layers
from router_service.hf_loading import layer_of

NOBODY = "127.0.0.1:9"
MOE_LAYERS = {"qwen2_moe": [1], "qwen3_moe": [0, 2], "deepseek_v2": [1, 2], "deepseek_v3": [1, 2]}


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """A registration whose router does not exist: loading asks nothing of it."""
    experts = register_cluster_experts(NOBODY, name="moelastic-nobody")
    yield
    experts.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, root / family) for family in FAMILIES}


def _load(folder: Path, implementation: str = "moelastic-nobody", **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation=implementation, **options)


def _experts(model: Any) -> dict[int, Any]:
    return {layer_of(module): module for module in model.modules() if hasattr(module, "_moelastic_layer")}


def _num_parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_names_moelastic_loads_all_but_its_experts(folders: dict[str, Path], family: str) -> None:
    remote, report = _load(folders[family], output_loading_info=True)
    local = _load(folders[family], "eager")
    layers = MOE_LAYERS.get(family, list(range(NUM_LAYERS)))
    width = HIDDEN if family == "gpt_oss" else EXPERT_WIDTH
    biases = 2 * width + HIDDEN if family == "gpt_oss" else 0
    assert _num_parameters(local) - _num_parameters(remote) == len(layers) * NUM_EXPERTS * (3 * HIDDEN * width + biases)
    assert {key: list(value) for key, value in report.items() if value} == {}
    assert list(_experts(remote)) == layers
    assert all(not list(module.parameters()) for module in _experts(remote).values())
    assert not any(parameter.is_meta for parameter in remote.parameters())
    theirs = dict(local.named_parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in remote.named_parameters())


def test_a_model_beside_it_in_the_process_is_the_one_it_always_was(folders: dict[str, Path]) -> None:
    _load(folders["mixtral"])
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        found = _load(folders["mixtral"], "eager")(ids).logits
        expected = tiny_model("mixtral")(ids).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("key", ["model.layers.0.mlp.stranger.weight", "model.layers.7.mlp.experts.0.gate_proj.weight", "model.experts.weight"])
def test_other_unexpected_keys_are_still_reported(folders: dict[str, Path], key: str, tmp_path: Path) -> None:
    tensors = load_file(folders["olmoe"] / "model.safetensors")
    save_file({**tensors, key: torch.ones(2, 2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folders["olmoe"] / "config.json").read_text())
    _, report = _load(tmp_path, output_loading_info=True)
    (reported,) = {found.replace("gate_up_proj", "0.gate_proj.weight") for found in report["unexpected_keys"]}
    assert reported == key


def test_missing_keys_of_the_local_part_are_still_reported(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(folders["olmoe"] / "model.safetensors")
    missing = "model.layers.1.self_attn.q_proj.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != missing}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folders["olmoe"] / "config.json").read_text())
    _, report = _load(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {missing}
    assert not report["unexpected_keys"]


def test_a_name_that_nobody_registered_is_refused_with_those_there_are(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"moelastic-typo.*is not supported.*moelastic-nobody"):
        _load(folders["mixtral"], "moelastic-typo")


def test_a_model_built_before_the_registration_says_what_to_do_and_that_helps(folders: dict[str, Path]) -> None:
    model = _load(folders["qwen3_moe"], "eager")
    for module in _experts(model).values():
        del module._moelastic_layer
    model.set_experts_implementation("moelastic-nobody")
    with pytest.raises(ConfigError, match="stamp_layers"):
        model(torch.ones(1, 2, dtype=torch.long))
    assert stamp_layers(model) == len(MOE_LAYERS["qwen3_moe"])
    assert list(_experts(model)) == MOE_LAYERS["qwen3_moe"]


_SWITCH = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "num_experts": 4, "vocab_size": VOCAB}
_JET = {"hidden_size": 16, "num_hidden_layers": 1, "num_key_value_heads": 2, "kv_channels": 4, "intermediate_size": 16, "vocab_size": VOCAB}
_LONGCAT = {"vocab_size": VOCAB, "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2}


@pytest.mark.parametrize(
    ("auto", "config", "fields"),
    [
        (AutoModelForSeq2SeqLM, "SwitchTransformersConfig", _SWITCH),
        (AutoModelForCausalLM, "JetMoeConfig", _JET),
        (AutoModelForCausalLM, "LongcatFlashConfig", _LONGCAT),
    ],
)
def test_families_whose_experts_cannot_be_replaced_are_refused(auto: Any, config: str, fields: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="does not take its experts from transformers' experts interface"):
        auto.from_config(getattr(transformers, config)(**fields), experts_implementation="moelastic-nobody")


def test_a_dense_model_may_name_moelastic_and_stays_whole() -> None:
    config = transformers.LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCAB)
    dense = AutoModelForCausalLM.from_config(config, experts_implementation="moelastic-nobody")
    assert _num_parameters(dense) == _num_parameters(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("method", ["mxfp4", "fp8"])
def test_experts_that_a_quantiser_would_swap_are_refused_with_the_remedy(folders: dict[str, Path], method: str) -> None:
    config = transformers.AutoConfig.from_pretrained(folders["gpt_oss"])
    config.quantization_config = {"quant_method": method}
    with pytest.raises(ConfigError, match=r"Config\(dequantize=True\)"):
        AutoModelForCausalLM.from_config(config, experts_implementation="moelastic-nobody")
    config.quantization_config = {"quant_method": method, "dequantize": True}
    assert list(_experts(AutoModelForCausalLM.from_config(config, experts_implementation="moelastic-nobody"))) == [0, 1, 2]


def test_the_twin_is_known_without_a_registration(tmp_path: Path) -> None:
    """In a process of its own: others here have registered clusters."""
    script = (
        "import sys; from transformers import AutoModelForCausalLM; from router_service.hf import REFERENCE; "
        "print(AutoModelForCausalLM.from_pretrained(sys.argv[1], experts_implementation=REFERENCE).config._experts_implementation)"
    )
    command = [sys.executable, "-c", script, str(save_tiny("mixtral", tmp_path / "mixtral"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "moelastic_reference"


@pytest.mark.parametrize("name", ["eager", "grouped_mm", "moelastic_reference"])
def test_names_of_other_implementations_cannot_be_taken(name: str) -> None:
    with pytest.raises(ConfigError, match="is an experts implementation already"):
        register_cluster_experts(NOBODY, name=name)


def test_a_registration_needs_a_router_or_a_client() -> None:
    with pytest.raises(ConfigError, match="endpoint is missing"):
        register_cluster_experts()
    with RouterClient(NOBODY) as client:
        register_cluster_experts(client=client, name="moelastic-with-client")
