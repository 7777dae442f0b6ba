"""The limits of the expert link: what one side may make the other hold or wait for."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class LinkLimits:
    """Both ends' limits. The first three are the actor's and reach the router in the Welcome; the rest each end keeps for itself.

    `min_overlapping_tokens`: a router sends a frame beside another one only with so many rows; fewer wait and merge.
    An actor whose tether has ended is asked for its progress and heard within `tether_grace_s`, or its process has ended, too: something between the two
    may have cut a connection on which nothing is ever said.
    A link that heard nothing for `silence_timeout_s`, or whose peer took nothing for `stall_timeout_s`, is closed.
    """

    max_frame_bytes: int = 256 * MIB
    max_tokens_per_frame: int = 4096
    frames_in_flight: int = 2
    min_overlapping_tokens: int = 0
    max_links: int = 64
    max_handshakes: int = 64
    connect_timeout_s: float = 5.0
    heartbeat_s: float = 0.5
    tether_grace_s: float = 0.01
    silence_timeout_s: float = 5.0
    idle_timeout_s: float = 30.0
    stall_timeout_s: float = 10.0

    @property
    def max_pending_bytes(self) -> int:
        """Bytes that may wait to be sent on one link: a full window, and control frames."""
        return self.frames_in_flight * self.max_frame_bytes + MIB
