"""A segment as a lane takes it: rows that are what they say, and the offer that goes with them."""

from __future__ import annotations

import numpy as np

from cluster.core.errors import InvalidRequest
from router_service.core.fair_queue import SegmentKey
from router_service.core.runs import RunOffer
from router_service.core.segments import Rows, SegmentRequest

_BYTES = np.dtype(np.uint8)


def offer_of(request: SegmentRequest) -> tuple[Rows, RunOffer]:
    """Check the rows. Raises InvalidRequest."""
    rows = np.asarray(request.rows)
    if rows.dtype != _BYTES or rows.ndim != 2 or rows.shape[1] != request.row_bytes or not rows.flags.c_contiguous:  # noqa: PLR2004  (rows, columns)
        message = f"rows must be contiguous uint8 [n, {request.row_bytes}] for dim {request.dim} of {request.dtype}"
        raise InvalidRequest(message, field="rows")
    try:
        version = bytes.fromhex(request.copy.version)
    except ValueError:
        message = "the version of a copy must be a digest in hex"
        raise InvalidRequest(message, field="copy.version") from None
    offer = RunOffer(
        SegmentKey(request.expert, version, request.copy.role, request.dtype, request.dim, request.attempt),
        num_rows=len(rows),
        deadline_s=request.deadline_s,
        flow=request.flow,
        exact=request.exact,
        epoch=request.epoch,
        traceparent=request.traceparent,
    )
    return rows, offer
