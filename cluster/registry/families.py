"""What each model family calls things: keys of its tensors, fields of its config, and how its gate chooses. Records only; one reader serves all.

The facts are those of transformers 5.23 (`modeling_*.py`, `conversion_mapping.py`); a test compares them with what `save_pretrained` writes.
Shape legend: D model width, F expert width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

CUSTOM_FAMILY = "moelastic"


@dataclass(frozen=True, slots=True)
class FromConfig:
    """A value of config.json: the first of `keys` that is present and not null, else `default`; without a default the field is required.

    With `only_if` (key, value), the default holds unless the config says so.
    """

    keys: tuple[str, ...]
    default: Any = None
    only_if: tuple[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tensors of a layer lie: patterns of `{layer}` and, unless `fused`, `{expert}`; fused tensors hold all experts along a leading axis E.

    `gates` maps the gate's tensor names to keys. `transposed`: expert tensors are stored [in, out] instead of [out, in]. `interleaved`: gate and up
    alternate along the output axis. `mxfp4`: weights are stored as `<key>_blocks` and `<key>_scales`.
    """

    gates: Mapping[str, str]
    down: str
    gate: str | None = None
    up: str | None = None
    gate_up: str | None = None
    gate_up_bias: str | None = None
    down_bias: str | None = None
    fused: bool = False
    transposed: bool = False
    interleaved: bool = False
    mxfp4: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """One family. `layouts` are tried in order: the first whose `down` key is in the checkpoint holds.

    `gate` maps fields of GateDescriptor, and `expert` fields of ExpertDescriptor, to a value or to a field of the config.
    `supported` lists, for fields that change the arithmetic, the values that are served; an absent field is fine.
    """

    name: str
    layouts: tuple[Layout, ...]
    num_experts: FromConfig
    width: FromConfig
    gate: Mapping[str, Any]
    expert: Mapping[str, Any] = field(default_factory=dict)
    top_k: FromConfig = FromConfig(("num_experts_per_tok",))
    first_dense_layers: FromConfig = FromConfig((), 0)
    sparse_step: FromConfig = FromConfig((), 1)
    dense_layers: FromConfig = FromConfig((), ())
    supported: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


# The custom layout; a gate uses the keys of its kind, and an expert without `gate_proj` is not gated.
CUSTOM_LAYOUT = Layout(
    {
        "weight": "layers.{layer}.gate.weight",
        "bias": "layers.{layer}.gate.bias",
        "correction_bias": "layers.{layer}.gate.correction_bias",
        "fc1_weight": "layers.{layer}.gate.fc1.weight",
        "fc1_bias": "layers.{layer}.gate.fc1.bias",
        "fc2_weight": "layers.{layer}.gate.fc2.weight",
        "fc2_bias": "layers.{layer}.gate.fc2.bias",
        "position_embedding": "layers.{layer}.gate.position_embedding",
    },
    "layers.{layer}.experts.{expert}.down_proj.weight",
    gate="layers.{layer}.experts.{expert}.gate_proj.weight",
    up="layers.{layer}.experts.{expert}.up_proj.weight",
)

ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}

_MLP = "model.layers.{layer}.mlp."
_SPARSE = "model.layers.{layer}.block_sparse_moe."


_GPT_OSS = _MLP + "experts."


def _split(prefix: str, names: tuple[str, str, str], gates: Mapping[str, str]) -> Layout:
    gate, up, down = (f"{prefix}experts.{{expert}}.{name}.weight" for name in names)
    return Layout({name: prefix + key for name, key in gates.items()}, down, gate=gate, up=up)


def _in_memory(prefix: str, gates: Mapping[str, str]) -> Layout:
    """What transformers 5 holds in memory, and writes when told not to keep the original form."""
    keys = {name: prefix + key for name, key in gates.items()}
    return Layout(keys, prefix + "experts.down_proj", gate_up=prefix + "experts.gate_up_proj", fused=True)


_GATE: Mapping[str, str] = {"weight": "gate.weight"}
_BIASED_GATE: Mapping[str, str] = {**_GATE, "correction_bias": "gate.e_score_correction_bias"}
_PROJ = ("gate_proj", "up_proj", "down_proj")
_W132 = ("w1", "w3", "w2")
_PROJ_LAYOUTS = (_split(_MLP, _PROJ, _GATE), _in_memory(_MLP, _GATE))

_SOFTMAX_FP32: Mapping[str, Any] = {"score": "softmax", "score_dtype": "fp32"}
_NORM_IF_ASKED: Mapping[str, Any] = {**_SOFTMAX_FP32, "normalize": FromConfig(("norm_topk_prob",), default=False), "weight_dtype": "model"}
_NUM_EXPERTS = FromConfig(("num_experts", "num_local_experts"))
_NUM_LOCAL = FromConfig(("num_local_experts", "num_experts"))
_ROUTED = FromConfig(("n_routed_experts",))
_MOE_WIDTH = FromConfig(("moe_intermediate_size",))
_WIDTH = FromConfig(("intermediate_size",))
_SPARSE_STEP = FromConfig(("decoder_sparse_step",), 1)
_DENSE_LAYERS = FromConfig(("mlp_only_layers",), ())

_GROUPED_V2 = ("topk_method", "group_limited_greedy")
_GPT_OSS_KEYS = Layout(
    {"weight": _MLP + "router.weight", "bias": _MLP + "router.bias"},
    _GPT_OSS + "down_proj",
    gate_up=_GPT_OSS + "gate_up_proj",
    gate_up_bias=_GPT_OSS + "gate_up_proj_bias",
    down_bias=_GPT_OSS + "down_proj_bias",
    fused=True,
    interleaved=True,
)

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(
            "mixtral",
            layouts=(_split(_SPARSE, _W132, _GATE), _in_memory(_MLP, _GATE)),
            num_experts=_NUM_LOCAL,
            width=_WIDTH,
            gate={**_SOFTMAX_FP32, "normalize": True, "weight_dtype": "fp32"},
        ),
        Family(
            "qwen2_moe",
            layouts=_PROJ_LAYOUTS,
            num_experts=_NUM_EXPERTS,
            width=_MOE_WIDTH,
            gate=_NORM_IF_ASKED,
            sparse_step=_SPARSE_STEP,
            dense_layers=_DENSE_LAYERS,
        ),
        Family(
            "qwen3_moe",
            layouts=_PROJ_LAYOUTS,
            num_experts=_NUM_EXPERTS,
            width=_MOE_WIDTH,
            gate=_NORM_IF_ASKED,
            sparse_step=_SPARSE_STEP,
            dense_layers=_DENSE_LAYERS,
        ),
        Family(
            "olmoe",
            layouts=_PROJ_LAYOUTS,
            num_experts=_NUM_EXPERTS,
            width=_WIDTH,
            gate=_NORM_IF_ASKED,
        ),
        # transformers scales the weights of this family and never normalises them, whatever norm_topk_prob says.
        Family(
            "deepseek_v2",
            layouts=_PROJ_LAYOUTS,
            num_experts=_ROUTED,
            width=_MOE_WIDTH,
            gate={
                **_SOFTMAX_FP32,
                "linear_dtype": "fp32",
                "num_groups": FromConfig(("n_group",), 1, only_if=_GROUPED_V2),
                "top_groups": FromConfig(("topk_group",), 1, only_if=_GROUPED_V2),
                "group_score": "max",
                "scale": FromConfig(("routed_scaling_factor",), 1.0),
                "weight_dtype": "fp32",
            },
            first_dense_layers=FromConfig(("first_k_dense_replace",), 0),
            supported={"topk_method": ("greedy", "group_limited_greedy"), "scoring_func": ("softmax",), "moe_layer_freq": (1,)},
        ),
        Family(
            "deepseek_v3",
            layouts=(_split(_MLP, _PROJ, _BIASED_GATE), _in_memory(_MLP, _BIASED_GATE)),
            num_experts=_ROUTED,
            width=_MOE_WIDTH,
            gate={
                "score": "sigmoid",
                "score_dtype": "fp32",
                "linear_dtype": "fp32",
                "correction_bias": True,
                "num_groups": FromConfig(("n_group",), 8),
                "top_groups": FromConfig(("topk_group",), 4),
                "group_score": "top2_sum",
                "normalize": FromConfig(("norm_topk_prob",), default=True),
                "normalize_eps": 1e-20,
                "scale": FromConfig(("routed_scaling_factor",), 2.5),
                "weight_dtype": "fp32",
            },
            first_dense_layers=FromConfig(("first_k_dense_replace",), 3),
            supported={"topk_method": ("noaux_tc",), "scoring_func": ("sigmoid",), "moe_layer_freq": (1,)},
        ),
        Family(
            "gpt_oss",
            # Blocks run along the input axis, so what they expand to is [out, in] already.
            layouts=(replace(_GPT_OSS_KEYS, transposed=True), replace(_GPT_OSS_KEYS, mxfp4=True)),
            num_experts=_NUM_LOCAL,
            width=_WIDTH,
            gate={"score": "topk_softmax", "bias": True, "score_dtype": "model", "weight_dtype": "model"},
            expert={
                "bias": True,
                "swiglu_limit": FromConfig(("swiglu_limit",), 7.0),
                "swiglu_alpha": FromConfig(("swiglu_alpha",), 1.702),
                "swiglu_up_offset": 1.0,
            },
        ),
        Family(
            "granitemoe",
            layouts=(
                Layout({"weight": _SPARSE + "router.layer.weight"}, _SPARSE + "output_linear.weight", gate_up=_SPARSE + "input_linear.weight", fused=True),
                _in_memory(_SPARSE, {"weight": "router.weight"}),
            ),
            num_experts=_NUM_LOCAL,
            width=_WIDTH,
            gate={"score": "topk_softmax", "score_dtype": "fp32", "weight_dtype": "model"},
        ),
        Family(
            "phimoe",
            layouts=(_split(_SPARSE, _W132, _GATE), _in_memory(_MLP, {"weight": "router.weight"})),
            num_experts=_NUM_LOCAL,
            width=_WIDTH,
            gate={"score": "sparsemixer", "jitter_eps": FromConfig(("router_jitter_noise",), 0.01), "score_dtype": "model", "weight_dtype": "model"},
            supported={"num_experts_per_tok": (2,)},
        ),
    )
}
