"""A wave: calls for one layer that share a dispatch. Their rows are sorted, sent and combined together; each keeps its own choices, account and fate.

What belongs together: one tenant, one layer, one fidelity, one element type, deadlines close to each other. A call's choices are made from its own rows
alone, so that nobody's gate depends on who else came.
Shape legend: T tokens of a call, D model width, K choices of a token.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from router_service.core.choose import Chosen
from router_service.core.layer_call import LayerCall

# A deadline may be later for this share of the time left: rows of the earlier call are computed so much longer than they are waited for.
DEADLINE_SLACK = 0.1


@dataclass(frozen=True, slots=True)
class WaveLimits:
    """What one wave may hold, how many calls of a kind are under way before others wait for each other, and how long they wait at most.

    Calls with more hidden states than `max_call_bytes` travel alone: joining them would copy more than it saves.
    """

    max_calls: int = 64
    max_bytes: int = 512 << 10
    max_call_bytes: int = 64 << 10
    max_overlapping_calls: int = 2
    max_hold_s: float = 0.05


@dataclass(slots=True, eq=False)
class Share:
    """One call, checked, with its choices: x [T, D] in the model's dtype. `layer` is the loaded layer that they were made with.

    `is_again`: its rows were sent before, in a wave that failed.
    """

    call: LayerCall
    layer: object
    x_TD: torch.Tensor
    chosen: Chosen
    is_again: bool = False

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.x_TD.shape[0]

    def key(self, tenant: str) -> Hashable:
        """What calls of one wave have in common."""
        call = self.call
        return (tenant, call.model, call.layer, id(self.layer), call.fidelity_exact, call.hidden_states.dtype, self.chosen.ids_TK.shape[1])


@dataclass(slots=True, eq=False)
class WaveDraft:
    """A wave that still takes calls."""

    limits: WaveLimits
    now_s: float
    earliest_s: float
    latest_s: float
    num_calls: int = 0
    num_bytes: int = 0

    @classmethod
    def around(cls, call: LayerCall, limits: WaveLimits, now_s: float) -> WaveDraft:
        """An empty wave that this call, at least, fits."""
        return cls(limits, now_s, call.deadline_s, call.deadline_s)

    def take(self, call: LayerCall) -> bool:
        """Whether the call fits; if so it counts."""
        earliest_s, latest_s = min(self.earliest_s, call.deadline_s), max(self.latest_s, call.deadline_s)
        is_close = latest_s - earliest_s <= DEADLINE_SLACK * (earliest_s - self.now_s)
        num_bytes = self.num_bytes + call.hidden_states.nbytes
        if self.num_calls and (not is_close or self.num_calls >= self.limits.max_calls or num_bytes > self.limits.max_bytes):
            return False
        self.earliest_s, self.latest_s = earliest_s, latest_s
        self.num_calls += 1
        self.num_bytes = num_bytes
        return True


def joined(shares: Sequence[Share]) -> Share:
    """The shares of a wave one after the other; its call is the first one's."""
    if len(shares) == 1:
        return shares[0]
    chosen = [share.chosen for share in shares]
    together = Chosen(
        np.concatenate([part.ids_TK for part in chosen]), torch.cat([part.weights_TK for part in chosen]), np.concatenate([part.dropped_TK for part in chosen])
    )
    return Share(shares[0].call, shares[0].layer, torch.cat([share.x_TD for share in shares]), together)


class Patience:
    """How long an open wave may wait for those before it: twice what a wave took of late, so that one whose actor hangs holds nobody up for long."""

    def __init__(self, limits: WaveLimits) -> None:
        self._limits = limits
        self._usual_s = 0.0

    @property
    def hold_s(self) -> float:
        """At most so long from the first call's coming."""
        return min(self._limits.max_hold_s, _HOLD_FACTOR * self._usual_s) if self._usual_s else self._limits.max_hold_s

    def learn(self, took_s: float) -> None:
        """A wave has ended."""
        self._usual_s += _WEIGHT * (took_s - self._usual_s) if self._usual_s else took_s


_HOLD_FACTOR = 2.0
_WEIGHT = 0.1
