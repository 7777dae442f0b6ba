"""From a checkpoint's config.json to the descriptors of its model: which layers have experts, what they compute, how their gate chooses. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from cluster.core.descriptors import DType, ExpertDescriptor, GateDescriptor, LayerDescriptor, ModelDescriptor
from cluster.core.errors import CheckpointError
from cluster.registry.families import ACTIVATIONS, CUSTOM_FAMILY, FAMILIES, Family, FromConfig

Config = Mapping[str, Any]
_DTYPES = {"bfloat16": DType.BF16, "float16": DType.FP16, "float32": DType.FP32}
_MAX_LAYERS = 10_000
SPARSEMIXER_TOP_K = 2


def family_of(config: Config) -> Family | None:
    """The record of the config's `model_type`; None for the custom layout. Raises CheckpointError for a type that is not served."""
    name = config.get("model_type")
    if name == CUSTOM_FAMILY:
        return None
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        message = f"config.json: model_type {name!r} is not served; one of {', '.join([*FAMILIES, CUSTOM_FAMILY])} is needed"
        raise CheckpointError(message)
    for key, values in family.supported.items():
        if config.get(key) is not None and config[key] not in values:
            message = f"config.json: {key} of {family.name} is {config[key]!r}; only {' or '.join(map(repr, values))} is served"
            raise CheckpointError(message)
    return family


def describe(config: Config, *, name: str, dtype: DType, gated: bool = True) -> ModelDescriptor:
    """The model that a config describes, served in `dtype`. `gated` matters for the custom layout only. Raises CheckpointError, naming the field."""
    family = family_of(config)
    layers = moe_layers(config)
    try:
        expert = _expert(config, family, dtype=dtype, gated=gated)
        gate = gate_record(config)
        entries = tuple(LayerDescriptor(layer=layer, num_experts=gate.num_experts, expert=expert, gate=gate) for layer in layers)
        return ModelDescriptor(name=name, family=family.name if family else CUSTOM_FAMILY, dtype=dtype, layers=entries)
    except ValidationError as error:
        message = f"config.json does not describe a model that can be served: {_first(error)}"
        raise CheckpointError(message) from error


def config_dtype(config: Config) -> DType | None:
    """The element type that the config names, under its new or its old key; None when it names none. Raises CheckpointError for another type."""
    name = config.get("dtype") or config.get("torch_dtype")
    if name is None:
        return None
    dtype = _DTYPES.get(str(name).removeprefix("torch."))
    if dtype is None:
        message = f"config.json: dtype {name!r} is not served; one of {', '.join(_DTYPES)} is needed"
        raise CheckpointError(message)
    return dtype


def moe_layers(config: Config) -> tuple[int, ...]:
    """Decoder layer indices that have experts, ascending. Raises CheckpointError when there are none."""
    family = family_of(config)
    if family is None:
        layers = _custom_layers(config)
    else:
        first = _integer(config, family.first_dense_layers)
        step = max(1, _integer(config, family.sparse_step))
        dense = set(_read(config, family.dense_layers))
        count = _integer(config, FromConfig(("num_hidden_layers",)))
        layers = tuple(layer for layer in range(first, min(count, _MAX_LAYERS)) if layer not in dense and (layer + 1) % step == 0)
    if not layers:
        message = "config.json describes no layer with experts"
        raise CheckpointError(message)
    return layers


def gate_record(config: Config) -> GateDescriptor:
    """How the gate of every MoE layer chooses. Raises CheckpointError, naming the field."""
    family = family_of(config)
    if family is None:
        fields = {**_mapping(config, "gate"), "num_experts": _integer(config, FromConfig(("num_experts",))), "top_k": _integer(config, _TOP_K)}
    else:
        fields = {name: _value(config, value) for name, value in family.gate.items()}
        fields |= {"num_experts": _integer(config, family.num_experts), "top_k": _integer(config, family.top_k)}
    try:
        gate = GateDescriptor(**fields)
    except ValidationError as error:
        message = f"config.json does not describe a gate that can be served: {_first(error)}"
        raise CheckpointError(message) from error
    _check_gate(gate)
    return gate


_TOP_K = FromConfig(("num_experts_per_tok",))


def _check_gate(gate: GateDescriptor) -> None:
    if gate.top_k > gate.num_experts:
        message = f"config.json: {gate.top_k} experts per token, but there are {gate.num_experts}"
        raise CheckpointError(message)
    if gate.score == "sparsemixer" and gate.top_k != SPARSEMIXER_TOP_K:
        message = f"config.json: a sparsemixer gate chooses {SPARSEMIXER_TOP_K} experts per token, not {gate.top_k}"
        raise CheckpointError(message)
    if gate.num_experts % gate.num_groups or gate.top_groups > gate.num_groups:
        message = f"config.json: {gate.num_experts} experts in {gate.num_groups} groups of which {gate.top_groups} are kept is not possible"
        raise CheckpointError(message)
    if gate.top_k > gate.num_experts // gate.num_groups * gate.top_groups:
        message = f"config.json: {gate.top_k} experts per token do not fit into the {gate.top_groups} groups that are kept of {gate.num_groups}"
        raise CheckpointError(message)


def _expert(config: Config, family: Family | None, *, dtype: DType, gated: bool) -> ExpertDescriptor:
    width = family.width if family else FromConfig(("expert_intermediate_size",))
    own = {name: _value(config, value) for name, value in family.expert.items()} if family else {"gated": gated}
    act = str(config.get("hidden_act", "silu"))
    if act not in ACTIVATIONS:
        message = f"config.json: hidden_act {act!r} is not served; one of {', '.join(ACTIVATIONS)} is needed"
        raise CheckpointError(message)
    return ExpertDescriptor.model_validate(
        {
            "hidden_size": _integer(config, FromConfig(("hidden_size",))),
            "intermediate_size": _integer(config, width),
            "activation": ACTIVATIONS[act],
            "dtype": dtype,
            **own,
        }
    )


def _custom_layers(config: Config) -> tuple[int, ...]:
    layers = config.get("moe_layers")
    if not isinstance(layers, list) or not all(type(layer) is int and 0 <= layer < _MAX_LAYERS for layer in layers) or len(set(layers)) != len(layers):
        message = "config.json: moe_layers must be a list of distinct decoder layer indices"
        raise CheckpointError(message)
    return tuple(sorted(layers))


def _value(config: Config, value: object) -> Any:  # noqa: ANN401  # a field of a config may be anything; pydantic judges it
    return _read(config, value) if isinstance(value, FromConfig) else value


def _read(config: Config, source: FromConfig) -> Any:  # noqa: ANN401  # as above
    if source.only_if and config.get(source.only_if[0]) != source.only_if[1]:
        return source.default
    found = (config[key] for key in source.keys if config.get(key) is not None)
    return next(found, source.default)


def _integer(config: Config, source: FromConfig) -> int:
    value = _read(config, source)
    if type(value) is not int or value < 0:
        message = f"config.json: {' or '.join(source.keys)} must be a whole number that is not negative"
        raise CheckpointError(message)
    return value


def _mapping(config: Config, key: str) -> Mapping[str, Any]:
    value = config.get(key, {})
    if not isinstance(value, dict):
        message = f"config.json: {key} must be an object"
        raise CheckpointError(message)
    return value


def _first(error: ValidationError) -> str:
    entry = error.errors(include_input=False, include_url=False)[0]
    return f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}"
