"""The only attributes a span may carry. Sizes, counts, durations, places: never a token's experts, a payload, a tenant or a secret.

Expert ids alone let a reader recover the text (arXiv 2602.04105), so the list is closed: what is not on it is dropped, and raises in tests.
"""

from __future__ import annotations

from collections.abc import Mapping

AttributeValue = str | bool | int | float
MAX_TEXT_CHARACTERS = 128
# Which actor computed is which expert was chosen, where each actor holds one expert of a layer. Kept only with `telemetry.actor_spans`.
ACTOR_NAMES = frozenset({"actor_id", "generation"})

ALLOWED: dict[str, str] = {
    "rpc_system": "rpc.system.name",
    "rpc_method": "rpc.method",
    "rpc_status": "rpc.response.status_code",
    "error_type": "error.type",
    **{
        name: f"moe.{name}"
        for name in [
            "model",
            "layer",
            "epoch",
            "status",
            "code",
            "fidelity",
            "tokens",
            "segments",
            "choices",
            "bytes_sent",
            "bytes_received",
            "actor_id",
            "generation",
            "node_id",
            "peer_node_id",
            "device",
            "role",
            "attempt",
            "queue_s",
            "compute_s",
            "transfer_s",
            "merged_requests",
            "exact",
            "shadow",
            "omitted",
            "generalist",
            "dense",
            "dropped",
            "degraded_tokens",
            "reason",
            "retries",
            "frames",
            "overflow",
        ]
    },
}


class ForbiddenAttribute(ValueError):
    """A span attribute that is not on the allow-list."""


def permitted(attributes: Mapping[str, AttributeValue], *, strict: bool, with_actors: bool = False) -> dict[str, AttributeValue]:
    """The attributes under their full names; others are dropped, or raise ForbiddenAttribute when `strict`. An actor is named only `with_actors`."""
    kept: dict[str, AttributeValue] = {}
    for name, value in attributes.items():
        if name in ACTOR_NAMES and not with_actors:
            continue
        key = ALLOWED.get(name)
        is_plain = isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= MAX_TEXT_CHARACTERS)
        if key is not None and is_plain:
            kept[key] = value
        elif strict:
            message = f"span attribute {name!r} is not allowed: add it to ALLOWED if it is a size, a count, a duration or a place"
            raise ForbiddenAttribute(message)
    return kept
