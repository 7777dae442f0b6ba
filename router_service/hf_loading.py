"""What registration does to transformers models as they are built: experts modules learn their layer, and those that live in a cluster lose their weights.

`PreTrainedModel.post_init` runs at the end of every model's construction, before a weight is read. Models that name another implementation only get
their layers numbered.
"""

from __future__ import annotations

import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Final

from torch import nn
from transformers import PreTrainedModel

from cluster.core.errors import ConfigError

_LAYER: Final = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?=\.|$)")
_EXPERT_COUNT: Final = re.compile(r"(?:moe_)?(?:num|n)_(?:local_|routed_)?experts")
# These swap experts modules for their own after construction, unless they are told to dequantise.
_QUANTISED_EXPERTS: Final = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
_lock: Final = threading.Lock()


def install(is_remote: Callable[[str | None], bool]) -> None:
    """Wrap `post_init`, once in a process. `is_remote` tells whether an `experts_implementation` runs in a cluster."""
    with _lock:
        if getattr(PreTrainedModel.post_init, "_moelastic", False):
            return
        original = PreTrainedModel.post_init

        def post_init(self: PreTrainedModel) -> None:
            stamp_layers(self)
            if is_remote(getattr(self.config, "_experts_implementation", None)):
                _leave_weights_out(self)
            original(self)

        post_init._moelastic = True  # type: ignore[attr-defined]
        PreTrainedModel.post_init = post_init


def stamp_layers(model: nn.Module) -> int:
    """Tell each experts module its decoder layer index; models built after a registration are stamped already. Returns how many were found."""
    found = 0
    for path, module in _experts_of(model):
        numbers = _LAYER.findall(path)
        if numbers:
            module._moelastic_layer = int(numbers[-1])  # type: ignore[assignment]
            found += 1
    return found


def layer_of(module: nn.Module) -> int:
    """The decoder layer index of an experts module. Raises ConfigError when nobody told it."""
    layer = getattr(module, "_moelastic_layer", None)
    if layer is None:
        message = "this model was built before register_cluster_experts was called, so its layers are not known; call router_service.hf.stamp_layers(model)"
        raise ConfigError(message)
    return int(layer)


def _experts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Experts modules by path: those with what transformers' decorator leaves on them."""
    for path, module in model.named_modules():
        if hasattr(module, "_is_expert_parallel") and hasattr(module, "is_concatenated"):
            yield path, module


def _leave_weights_out(model: PreTrainedModel) -> None:
    experts = dict(_experts_of(model))
    if not experts and _counts_experts(model.config):
        message = f"{type(model).__name__} does not take its experts from transformers' experts interface, so they cannot be replaced; serve another family"
        raise ConfigError(message)
    if experts:
        _refuse_quantised(model.config)
    for module in experts.values():
        module._parameters.clear()
        module._is_hf_initialized = True  # type: ignore[assignment]
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    # The experts' keys in the checkpoint are left out on purpose; any other unexpected key is still reported.
    model._keys_to_ignore_on_load_unexpected = [*ignored, *_key_patterns(experts)]


def _counts_experts(config: Any) -> bool:  # noqa: ANN401  (a transformers config)
    facts: dict[str, Any] = config.to_dict()
    nested = facts.get("ffn_config")
    facts |= nested if isinstance(nested, dict) else {}
    return any(_EXPERT_COUNT.fullmatch(key) and isinstance(value, int) and value > 1 for key, value in facts.items())


def _refuse_quantised(config: Any) -> None:  # noqa: ANN401
    given = getattr(config, "quantization_config", None)
    if given is None:
        return
    facts: dict[str, Any] = given if isinstance(given, dict) else vars(given)
    method = str(getattr(facts.get("quant_method"), "value", facts.get("quant_method")))
    if method in _QUANTISED_EXPERTS and not facts.get("dequantize"):
        message = (
            f"quantization_config: transformers would replace {method} experts by its own; pass quantization_config={_QUANTISED_EXPERTS[method]}"
            "(dequantize=True) to from_pretrained: the experts are not loaded here, so they are not expanded either"
        )
        raise ConfigError(message)


def _key_patterns(paths: dict[str, nn.Module]) -> list[str]:
    """Patterns of the checkpoint keys below these modules: one for all layers that differ in their number only."""
    numbers: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for path in paths:
        last = [*_LAYER.finditer(path)][-1:]
        start, stop = last[0].span(1) if last else (len(path), len(path))
        numbers[path[:start], path[stop:]].append(path[start:stop])
    return [rf"(?:^|\.){re.escape(head)}(?:{'|'.join(found)}){re.escape(tail)}\." for (head, tail), found in numbers.items()]
