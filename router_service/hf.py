"""The transformers plug-in: `experts_implementation="moelastic"` runs a model's experts in the cluster; `"moelastic_reference"` is the twin in this process.

    experts = register_cluster_experts("127.0.0.1:50051", token=...)
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="moelastic")
    model.generate(...)

Importing this module makes the twin known; the cluster has to be registered, before a model is loaded.
A model that names moelastic loads without its expert weights; any other model in the process loads as always. Attention, norms, gates and shared
experts stay local, so the choices are the model's own. Inference only: a backward pass raises InferenceOnly.

Which served model answers: `model=` of the registration, else `config.moelastic_model`, else the one that is named like the last part of the path the
model was loaded from, else the only one that fits. One that is named must fit.

Shape legend: T rows (batch x sequence), D model width, K choices per row.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from cluster.core.descriptors import DType
from cluster.core.errors import ConfigError, InferenceOnly, InvalidRequest
from router_service.client import ModelInfo, RouterClient
from router_service.hf_loading import install, layer_of, stamp_layers
from router_service.hf_reference import reference_experts

__all__ = ["REFERENCE", "ClusterExperts", "Usage", "register_cluster_experts", "stamp_layers"]

logger = logging.getLogger(__name__)

REFERENCE: Final = "moelastic_reference"
_DTYPES: Final = {torch.bfloat16: DType.BF16, torch.float16: DType.FP16, torch.float32: DType.FP32}
_MESSAGE_SHARE: Final = 0.9
_remote: Final[dict[str | None, ClusterExperts]] = {}
ALL_EXPERTS_FUNCTIONS.register(REFERENCE, reference_experts)


@dataclass
class Usage:
    """What this process sent, counted here: a caller may know its own tokens' experts, nobody else may. `choices` by (layer, expert)."""

    requests: int = 0
    tokens: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    choices: Counter[tuple[int, int]] = field(default_factory=Counter)


class ClusterExperts:
    """The experts of one cluster as transformers calls them. Thread-safe; one instance may serve several models."""

    def __init__(self, client: RouterClient, *, model: str | None, fidelity: Literal["any", "exact"], timeout_s: float) -> None:
        self._client = client
        self._model = model
        self._fidelity = fidelity
        self._timeout_s = timeout_s
        self._resolving = threading.Lock()
        self._infos: weakref.WeakKeyDictionary[nn.Module, ModelInfo] = weakref.WeakKeyDictionary()
        self._usage_lock = threading.Lock()
        self._usage: Usage | None = None

    def __call__(self, module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """The experts contract: [T, D], [T, K], [T, K] -> [T, D] in the dtype of the rows, weights applied."""
        if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
            return self._run_without_gradient(module, hidden_states, top_k_index, top_k_weights)
        return self._run(module, hidden_states, top_k_index, top_k_weights)

    def _run_without_gradient(self, module: nn.Module, rows_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Forward as usual; a backward pass through the result raises InferenceOnly."""
        output: torch.Tensor = _Inference.apply(rows_TD, weights_TK, lambda rows, weights: self._run(module, rows, ids_TK, weights))  # type: ignore[no-untyped-call]
        return output

    def start_usage(self) -> None:
        """Count from zero what is sent from now on."""
        with self._usage_lock:
            self._usage = Usage()

    def usage(self) -> Usage:
        """What was counted since `start_usage`."""
        with self._usage_lock:
            counted = self._usage or Usage()
            return Usage(counted.requests, counted.tokens, Counter(counted.outcomes), Counter(counted.choices))

    def close(self) -> None:
        """Close the channel; models that use it can run no more."""
        self._client.close()

    def _run(self, module: nn.Module, rows_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        if rows_TD.shape[0] == 0:
            return rows_TD.clone()
        layer = layer_of(module)
        info = self._info_of(module, layer, rows_TD.shape[1])
        rows = rows_TD.detach().to("cpu")
        rows = rows if _DTYPES.get(rows.dtype) in info.dtypes else rows.float()
        ids = ids_TK.detach().to("cpu", torch.int32)
        ids = torch.where((ids >= 0) & (ids < int(module.num_experts)), ids, -1)  # type: ignore[arg-type]
        weights = weights_TK.detach().to("cpu", torch.float32)
        parts = []
        step = _rows_per_call(info, rows, ids.shape[1])
        for start in range(0, rows.shape[0], step):
            part = slice(start, start + step)
            reply = self._client.dispatch(
                rows[part], model=info.name, layer=layer, top_k=(ids[part], weights[part]), fidelity=self._fidelity, timeout_s=self._timeout_s
            )
            self._count(layer, ids[part], reply.report.outcomes)
            parts.append(reply.hidden_states)
        output = parts[0] if len(parts) == 1 else torch.cat(parts)
        return output.to(device=rows_TD.device, dtype=rows_TD.dtype)

    def _count(self, layer: int, ids: torch.Tensor, outcomes: dict[str, int]) -> None:
        with self._usage_lock:
            if self._usage is None:
                return
            self._usage.requests += 1
            self._usage.tokens += ids.shape[0]
            self._usage.outcomes.update(outcomes)
            chosen, counts = torch.unique(ids[ids >= 0], return_counts=True)
            self._usage.choices.update({(layer, int(expert)): int(count) for expert, count in zip(chosen, counts, strict=True)})

    def _info_of(self, module: nn.Module, layer: int, width: int) -> ModelInfo:
        info = self._infos.get(module)
        if info is None:
            with self._resolving:
                info = self._infos[module] = self._resolve(module, layer, width)
            logger.info("layer %d of %s is answered by the served model %s", layer, _path_of(module) or type(module).__name__, info.name)
        return info

    def _resolve(self, module: nn.Module, layer: int, width: int) -> ModelInfo:
        named = self._model or getattr(module.config, "moelastic_model", None)
        served = () if named else self._served_names()
        folder = _path_of(module).rsplit("/", 1)[-1]
        named = named or (folder if folder in served else None)
        if named:
            info = self._client.model(str(named))
            if problem := _misfit(info, module, layer, width):
                message = f"{problem}; load the checkpoint that is served, or pass model=NAME of another served model to register_cluster_experts"
                raise ConfigError(message)
            return info
        infos = [self._client.model(name) for name in served]
        fitting = [info for info in infos if not _misfit(info, module, layer, width)]
        if len(fitting) == 1:
            return fitting[0]
        found = f"several served models fit ({', '.join(info.name for info in fitting)})" if fitting else "no served model fits"
        message = (
            f"{found} layer {layer} of this model ({module.num_experts} experts, width {width}); pass model=NAME to register_cluster_experts, "
            f"or set `config.moelastic_model` before loading; served: {', '.join(served) or 'none'}"
        )
        raise ConfigError(message)

    def _served_names(self) -> tuple[str, ...]:
        try:
            return self._client.model("").models
        except InvalidRequest:
            return tuple(model.name for model in self._client.status().models)


def register_cluster_experts(
    endpoint: str | None = None,
    *,
    token: str | None = None,
    model: str | None = None,
    name: str = "moelastic",
    fidelity: Literal["any", "exact"] = "any",
    timeout_s: float = 60.0,
    connections: int = 1,
    client: RouterClient | None = None,
) -> ClusterExperts:
    """Make `experts_implementation=name` mean the cluster behind this router. Call it before loading a model.

    `client` is used when given, else one is made from `endpoint`, `token` and `connections`, which calls take turns over (see `RouterClient`).
    `timeout_s` bounds one call of one layer, retries included. `model` is the model's name in the cluster where it cannot be told from the folder name.
    Several clusters: one registration each, with different names. Raises ConfigError.
    """
    if name == REFERENCE or (name not in _remote and name in {"eager", *ALL_EXPERTS_FUNCTIONS.keys()}):
        message = f"register_cluster_experts: name {name!r} is an experts implementation already; choose another name"
        raise ConfigError(message)
    if client is None:
        if endpoint is None:
            message = "register_cluster_experts: endpoint is missing; pass HOST:PORT of the router, or client="
            raise ConfigError(message)
        client = RouterClient(endpoint, token=token, timeout_s=timeout_s, connections=connections)
    experts = ClusterExperts(client, model=model, fidelity=fidelity, timeout_s=timeout_s)
    _remote[name] = experts
    install(_remote.__contains__)
    ALL_EXPERTS_FUNCTIONS.register(name, torch.compiler.disable(_caller(name)))  # type: ignore[no-untyped-call]
    return experts


def _caller(name: str) -> Callable[..., torch.Tensor]:
    def moelastic_experts(module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        return _remote[name](module, hidden_states, top_k_index, top_k_weights)

    return moelastic_experts


class _Inference(torch.autograd.Function):
    """A forward that works with grad enabled and a backward that says why it cannot."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: torch.Tensor, run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:  # noqa: ANN401, ARG004
        return run(rows, weights)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # noqa: ANN401, ARG004
        message = "remote experts are inference only: they have no backward pass; train with the weights loaded in process"
        raise InferenceOnly(message, field="experts")


def _path_of(module: nn.Module) -> str:
    return str(getattr(module.config, "_name_or_path", "") or "").rstrip("/")


def _misfit(info: ModelInfo, module: nn.Module, layer: int, width: int) -> str:
    """Why a served model cannot answer for this layer; empty when it can."""
    entry = next((item for item in info.layers if item.layer == layer), None)
    if entry is None:
        return f"the served model {info.name} has no MoE layer {layer}; its MoE layers are {', '.join(str(item.layer) for item in info.layers)}"
    own, theirs = (int(module.num_experts), width), (entry.num_experts, entry.hidden_size)  # type: ignore[arg-type]
    if own == theirs:
        return ""
    return f"layer {layer} of the served model {info.name} has {theirs[0]} experts of width {theirs[1]}, this model's has {own[0]} of width {own[1]}"


def _rows_per_call(info: ModelInfo, rows: torch.Tensor, num_choices: int) -> int:
    """Rows of one message: below the receive limit with room for ids, weights and framing, and below the limits of tokens and of choices."""
    row_bytes = rows.shape[1] * rows.element_size() + num_choices * 8
    limits = info.limits
    by_bytes, by_choices = int(limits.max_message_bytes * _MESSAGE_SHARE) // row_bytes, limits.max_choices_per_request // num_choices
    return max(1, min(limits.max_tokens_per_request, by_bytes, by_choices))
