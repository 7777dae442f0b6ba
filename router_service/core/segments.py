"""What the data path asks of one copy of an expert, and what it gets back. Rows travel as bytes: uint8 [n, row_bytes] in the segment's dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.core.descriptors import DType
from cluster.core.errors import MoeError
from cluster.core.ids import ExpertId, Incarnation, Role
from cluster.core.routing_table import TableCopy

Rows = npt.NDArray[np.uint8]


# Not frozen, since many are made for each call and a frozen one takes three times as long to make; nobody changes them all the same.
@dataclass(slots=True, eq=False)
class SegmentRequest:
    """Rows of one request for one copy. `rows` is [n, dim * itemsize], C-contiguous, and must not change until the reply.

    `deadline_s` is in the clock of the event loop. `flow` says whose turn the rows take when actors are busy (a request, a tenant);
    None: this segment alone. `is_hedge`: it is asked because another copy is late. `is_again`: its rows were sent before, for a dispatch that failed or was
    not believed.
    """

    expert: ExpertId
    copy: TableCopy
    dtype: DType
    dim: int
    rows: Rows | memoryview
    deadline_s: float
    exact: bool
    epoch: int
    attempt: int
    traceparent: str | None = None
    flow: Any = None
    is_hedge: bool = False
    is_again: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dim * self.dtype.itemsize


@dataclass(slots=True, eq=False)
class SegmentReply:
    """The expert's output for each row, in order, and where the time went.

    `queue_s` is the wait for a frame here and for the compute thread there; `transfer_s` what is left of the round trip. Bytes are those of the rows.
    """

    rows: Rows
    incarnation: Incarnation
    version: str
    role: Role
    attempt: int
    queue_s: float
    compute_s: float
    transfer_s: float
    node_id: str
    bytes_sent: int
    bytes_received: int


OnEnd = Callable[[SegmentReply | MoeError], None]
Withdraw = Callable[[], None]
