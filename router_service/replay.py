"""The exact-replay checker: recomputes a reply in process from the request's rows and the reply's PLAN, trusting neither gate nor cluster.

The plan says which version of which expert or fallback answered each choice and with what weight; the versions are digests of the weights themselves.
Rows that an actor merged with those of others may come out with another last bit (see `router_service.twin`).
Shape legend: T tokens, D model width, K choices of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actors.expert_store import ExpertStore
from cluster.core.errors import InvalidRequest
from router_service.core.combine import finish
from router_service.core.ladder import FALLBACK_OUTCOMES
from router_service.core.layer_call import TORCH_DTYPES
from router_service.core.outcomes import Outcome, Plan
from router_service.core.reference import experts_output
from router_service.fallbacks import FallbackWeights, forward, load_fallback

COMPUTED = (Outcome.EXACT, Outcome.SHADOW, Outcome.GENERALIST, Outcome.DENSE)
REPLAYABLE = (*COMPUTED, Outcome.OMITTED, Outcome.DROPPED, Outcome.UNUSED)


def replay(hidden_states: torch.Tensor, plan: Plan, weights: Callable[[str], FallbackWeights]) -> torch.Tensor:
    """The reply [T, D] that a plan describes, in the dtype of `hidden_states` [T, D]; `weights` loads a version by its digest in hex.

    Raises InvalidRequest when the plan does not belong to these rows, contradicts itself, or names outcomes that there are not.
    """
    _check(plan, hidden_states.shape[0])
    load = cache(lambda index: weights(plan.versions[index].hex()))
    dtype = TORCH_DTYPES[load(0).descriptor.dtype] if plan.versions else hidden_states.dtype
    x_TD = hidden_states.detach().to(dtype)
    weights_TK = torch.from_numpy(plan.weights.astype(np.float32))
    total_TD = experts_output(x_TD, plan.version_index, weights_TK, lambda index, rows_ND: forward(rows_ND, load(index)))
    return finish(total_TD, hidden_states.dtype)


def from_store(store: ExpertStore) -> Callable[[str], FallbackWeights]:
    """Load versions, of experts, shadows and fallbacks, from a node-local store."""
    return lambda digest: load_fallback(store.open(digest))


def _check(plan: Plan, num_tokens: int) -> None:
    shape = plan.expert_ids.shape
    arrays: dict[str, NDArray[Any]] = {"weights": plan.weights, "outcomes": plan.outcomes, "version_index": plan.version_index}
    if len(shape) != 2 or shape[0] != num_tokens:  # noqa: PLR2004  (a matrix)
        _refuse("expert_ids", f"has shape {list(shape)} for {num_tokens} rows; replay a plan with its own request")
    for name, array in arrays.items():
        if array.shape != shape:
            _refuse(name, f"has shape {list(array.shape)} where expert_ids has {list(shape)}")
    if not np.isin(plan.outcomes, REPLAYABLE).all():
        _refuse("outcomes", "has values that are no outcomes; the plan is damaged")
    computed_TK = np.isin(plan.outcomes, COMPUTED)
    if ((plan.version_index >= 0) != computed_TK).any() or (plan.version_index >= len(plan.versions)).any():
        _refuse("version_index", "contradicts the outcomes or the versions; the plan is damaged")
    for fallback in FALLBACK_OUTCOMES.values():
        if np.unique(plan.version_index[plan.outcomes == fallback]).size > 1:
            _refuse("outcomes", f"names several versions of the one {fallback.name.lower()} of a layer; the plan is damaged")


def _refuse(name: str, what: str) -> None:
    message = f"plan.{name} {what}"
    raise InvalidRequest(message, field=f"plan.{name}")
