"""What an actor's lane tells of its signs of life, and to whom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from cluster.core.link_frames import Pong

if TYPE_CHECKING:
    from router_service.actor_lane import ActorLane


class LaneWatch(Protocol):
    """Who is told of an actor's signs of life. All calls come from the lane's loop."""

    def joined(self, lane: ActorLane) -> None:
        """A fresh link is ready."""
        ...

    def may_send(self, lane: ActorLane) -> bool:
        """Whether another frame may go out now: one on trial gets one at a time."""
        ...

    def sent(self, lane: ActorLane, num_tokens: int, num_bytes: int) -> None:
        """A frame went out: the actor owes an answer. Bytes are those of its rows."""
        ...

    def answered(self, lane: ActorLane, num_tokens: int, num_bytes: int, took_s: float) -> None:
        """A frame's Result came, with so many bytes of rows."""
        ...

    def heard(self, lane: ActorLane, progress: Pong) -> None:
        """The actor told of its progress."""
        ...

    def lost(self, lane: ActorLane) -> None:
        """The link was lost."""
        ...

    def left(self, lane: ActorLane) -> None:
        """The router left the actor."""
        ...


class NoWatch:
    """Nobody is told: actors are trusted until their links are lost."""

    def joined(self, lane: ActorLane) -> None:
        """Ignored."""

    def may_send(self, lane: ActorLane) -> bool:  # noqa: ARG002  (as the others)
        """Always."""
        return True

    def sent(self, lane: ActorLane, num_tokens: int, num_bytes: int) -> None:
        """Ignored."""

    def answered(self, lane: ActorLane, num_tokens: int, num_bytes: int, took_s: float) -> None:
        """Ignored."""

    def heard(self, lane: ActorLane, progress: Pong) -> None:
        """Ignored."""

    def lost(self, lane: ActorLane) -> None:
        """Ignored."""

    def left(self, lane: ActorLane) -> None:
        """Ignored."""
