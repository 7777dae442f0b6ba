"""The expert link's handshake, both sides: each proves that it knows the incarnation's key before anything else is believed.

    actor -> router  Challenge     router -> actor  Proof     actor -> router  Welcome

Each proof is an HMAC over both nonces, both names, the generation and the protocol bounds and choice, so that nothing can be replayed,
reflected or talked down to an older protocol. Sans-io: nonces arrive from outside.

A link's tether is a second connection whose handshake has a Tether in the place of the Proof. A Welcome there says that it is held.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import replace

from cluster.core.errors import MoeError, NotReady, Overloaded, ProtocolMismatch, ReplicaRejected, ReplicaUnavailable, Unauthenticated
from cluster.core.ids import Incarnation
from cluster.core.link_frames import NONCE_BYTES, Challenge, Proof, Refusal, Tether, Welcome
from cluster.core.link_limits import LinkLimits
from cluster.core.link_values import MAX_TEXT_CHARS, printable

MIN_PROTOCOL, MAX_PROTOCOL = 1, 3
# From these on actors know Cool, and Tether; nothing else differs, so frames are laid out as in 1.
COOL_PROTOCOL, TETHER_PROTOCOL = 2, 3
_REFUSALS: dict[str, type[MoeError]] = {
    "UNAUTHENTICATED": Unauthenticated,
    "PROTOCOL_MISMATCH": ProtocolMismatch,
    "REPLICA_REJECTED": ReplicaRejected,
    "OVERLOADED": Overloaded,
    "NOT_READY": NotReady,
}


class ActorSide:
    """The actor's half: send `challenge`, answer the router's Proof with `welcome(proof)`. Only one that `has_tethers` is asked for any."""

    def __init__(self, incarnation: Incarnation, key: bytes, nonce: bytes, limits: LinkLimits, *, has_tethers: bool = False) -> None:
        self._key = key
        self._limits = limits
        newest = MAX_PROTOCOL if has_tethers else min(MAX_PROTOCOL, TETHER_PROTOCOL - 1)
        self.challenge = Challenge(MIN_PROTOCOL, newest, incarnation.actor_id, incarnation.generation, nonce)

    def welcome(self, proof: Proof) -> Welcome:
        """Check a router's proof. Raises ProtocolMismatch or Unauthenticated."""
        return self._welcome("router", proof)

    def welcome_tether(self, tether: Tether) -> Welcome:
        """What to answer once the tether is held. Raises ProtocolMismatch or Unauthenticated."""
        return self._welcome("tether", tether)

    def _welcome(self, side: str, proof: Proof | Tether) -> Welcome:
        if not MIN_PROTOCOL <= proof.protocol <= MAX_PROTOCOL:
            message = f"link protocol {proof.protocol} is not spoken by the actor (it speaks {MIN_PROTOCOL} to {MAX_PROTOCOL}); update the older side"
            raise ProtocolMismatch(message)
        if not hmac.compare_digest(handshake_mac(self._key, side, self.challenge, proof), proof.mac):
            message = "the router does not know the link key of this incarnation; check that both sides hold the deployment's link secret"
            raise Unauthenticated(message)
        limits = self._limits
        mac = handshake_mac(self._key, "actor", self.challenge, proof)
        return Welcome(mac, limits.max_frame_bytes, limits.max_tokens_per_frame, limits.frames_in_flight)


class RouterSide:
    """The router's half: answer the actor's Challenge with `prove(challenge)`, then `accept(welcome)`."""

    def __init__(self, incarnation: Incarnation, key: bytes, nonce: bytes, router_id: str) -> None:
        self._incarnation = incarnation
        self._key = key
        self._nonce = nonce
        self._router_id = router_id
        self._expected = b""
        self.protocol = MIN_PROTOCOL

    def prove(self, challenge: Challenge) -> Proof:
        """Check who answers at the endpoint, and prove the key. Raises ReplicaRejected (another life) or ProtocolMismatch."""
        if self._expected:
            message = "the actor sent a second challenge"
            raise ProtocolMismatch(message)
        self._check_identity(challenge)
        protocol = min(challenge.max_protocol, MAX_PROTOCOL)
        if protocol < max(challenge.min_protocol, MIN_PROTOCOL):
            spoken = f"{challenge.min_protocol} to {challenge.max_protocol}"
            message = f"the actor speaks link protocols {spoken}, this router {MIN_PROTOCOL} to {MAX_PROTOCOL}; update the older side"
            raise ProtocolMismatch(message)
        if len(challenge.nonce) != NONCE_BYTES:
            message = f"the actor's nonce has {len(challenge.nonce)} bytes where {NONCE_BYTES} are due"
            raise ProtocolMismatch(message)
        self.protocol = protocol
        unsigned = Proof(protocol, self._router_id, self._nonce, b"")
        self._expected = handshake_mac(self._key, "actor", challenge, unsigned)
        return Proof(protocol, self._router_id, self._nonce, handshake_mac(self._key, "router", challenge, unsigned))

    def tether(self, challenge: Challenge) -> Tether:
        """What to answer on a second connection, once the link is ready, to make that its tether; `accept` its Welcome. Raises ReplicaRejected."""
        self._check_identity(challenge)
        unsigned = Tether(self.protocol, self._router_id, self._nonce, b"")
        self._expected = handshake_mac(self._key, "actor", challenge, unsigned)
        return replace(unsigned, mac=handshake_mac(self._key, "tether", challenge, unsigned))

    def accept(self, welcome: Welcome) -> Welcome:
        """Check the actor's proof. Raises Unauthenticated; ProtocolMismatch for limits that nothing could be sent under."""
        if not self._expected or not hmac.compare_digest(self._expected, welcome.mac):
            message = f"{self._incarnation} does not know its link key; check that both sides hold the deployment's link secret"
            raise Unauthenticated(message)
        if min(welcome.max_frame_bytes, welcome.max_tokens_per_frame, welcome.frames_in_flight) < 1:
            message = f"{self._incarnation} offers a link limit of zero"
            raise ProtocolMismatch(message)
        return welcome

    def _check_identity(self, challenge: Challenge) -> None:
        found = Incarnation(challenge.actor_id, challenge.generation)
        if found != self._incarnation:
            message = f"{printable(str(found))} answers where {self._incarnation} was expected; the routing table is out of date"
            raise ReplicaRejected(message)


def refusal_of(error: MoeError) -> Refusal:
    """What to tell the other side about an error that ends the handshake."""
    return Refusal(error.reason, str(error)[:MAX_TEXT_CHARS])


def error_of(refusal: Refusal) -> MoeError:
    """The error that a refusal stands for. An unknown reason is a ReplicaUnavailable."""
    kind = _REFUSALS.get(refusal.reason, ReplicaUnavailable)
    return kind(f"the other side refused the link: {printable(refusal.message)}")


def handshake_mac(key: bytes, side: str, challenge: Challenge, proof: Proof | Tether) -> bytes:
    """What a side (`router` or `actor`) proves the key with, or a router on a `tether`; the proof's own `mac` does not enter."""
    numbers = struct.pack("<QQQQ", challenge.generation, challenge.min_protocol, challenge.max_protocol, proof.protocol)
    parts = (side.encode(), challenge.nonce, proof.nonce, challenge.actor_id.encode(), proof.router_id.encode(), numbers)
    framed = b"".join(struct.pack("<I", len(part)) + part for part in parts)
    mac: bytes = hmac.new(key, framed, hashlib.sha256).digest()
    return mac
