from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from cluster.core.errors import MoeError, Overloaded, ProtocolMismatch, ReplicaRejected, ReplicaUnavailable, Unauthenticated
from cluster.core.ids import Incarnation
from cluster.core.link_codec import MAX_HANDSHAKE_BYTES, encode
from cluster.core.link_frames import NONCE_BYTES, Challenge, Proof, Refusal, Tether, derive_link_key
from cluster.core.link_handshake import COOL_PROTOCOL, MAX_PROTOCOL, TETHER_PROTOCOL, ActorSide, RouterSide, error_of, refusal_of
from cluster.core.link_limits import LinkLimits

ME = Incarnation("actor-3", 7)
KEY = derive_link_key(b"secret", ME)
OTHER_KEY = derive_link_key(b"another secret", ME)


def actor(key: bytes = KEY, nonce: bytes = b"a" * NONCE_BYTES, who: Incarnation = ME, *, has_tethers: bool = False) -> ActorSide:
    limits = LinkLimits(max_frame_bytes=1000, max_tokens_per_frame=10, frames_in_flight=3)
    return ActorSide(who, key, nonce, limits, has_tethers=has_tethers)


def router(key: bytes = KEY, nonce: bytes = b"r" * NONCE_BYTES, who: Incarnation = ME) -> RouterSide:
    return RouterSide(who, key, nonce, "router-0")


def test_two_sides_with_one_key_agree_on_the_actors_limits() -> None:
    there, here = actor(), router()
    welcome = here.accept(there.welcome(here.prove(there.challenge)))
    assert (welcome.max_frame_bytes, welcome.max_tokens_per_frame, welcome.frames_in_flight) == (1000, 10, 3)


@pytest.mark.parametrize(("newest", "agreed"), [(1, 1), (2, 2), (9, MAX_PROTOCOL)])
def test_a_router_knows_what_an_older_or_newer_actor_may_be_told(newest: int, agreed: int) -> None:
    there, here = actor(), router()
    there.challenge = dataclasses.replace(there.challenge, max_protocol=newest)
    proof = here.prove(there.challenge)
    here.accept(there.welcome(proof))
    assert here.protocol == proof.protocol == agreed
    assert (here.protocol >= COOL_PROTOCOL) is (newest > 1)


def test_only_an_actor_that_holds_tethers_is_asked_for_one() -> None:
    for has_tethers in (False, True):
        here = router()
        here.prove(actor(has_tethers=has_tethers).challenge)
        assert (here.protocol >= TETHER_PROTOCOL) is has_tethers


def linked() -> tuple[ActorSide, RouterSide]:
    """Two sides of a link that is ready."""
    there, here = actor(has_tethers=True), router()
    here.accept(there.welcome(here.prove(there.challenge)))
    return there, here


def test_two_sides_with_one_key_agree_on_a_tether_that_names_its_link() -> None:
    _, here = linked()
    there = actor(nonce=b"b" * NONCE_BYTES)
    tether = here.tether(there.challenge)
    assert tether.nonce == b"r" * NONCE_BYTES
    here.accept(there.welcome_tether(tether))


def test_a_proof_does_not_pass_as_a_tether_nor_a_tether_as_a_proof() -> None:
    there, here = linked()
    proof = router().prove(there.challenge)
    with pytest.raises(Unauthenticated):
        there.welcome_tether(Tether(proof.protocol, proof.router_id, proof.nonce, proof.mac))
    tether = here.tether(there.challenge)
    with pytest.raises(Unauthenticated):
        there.welcome(Proof(tether.protocol, tether.router_id, tether.nonce, tether.mac))


def test_a_tether_cannot_be_replayed_to_another_challenge_or_made_without_the_key() -> None:
    there, here = linked()
    tether = here.tether(there.challenge)
    with pytest.raises(Unauthenticated):
        actor(nonce=b"b" * NONCE_BYTES).welcome_tether(tether)
    with pytest.raises(Unauthenticated):
        actor(OTHER_KEY).welcome_tether(tether)


def test_the_welcome_of_a_link_does_not_pass_for_that_of_its_tether() -> None:
    there, here = actor(has_tethers=True), router()
    welcome = there.welcome(here.prove(there.challenge))
    here.accept(welcome)
    here.tether(actor(nonce=b"b" * NONCE_BYTES).challenge)
    with pytest.raises(Unauthenticated):
        here.accept(welcome)


def test_another_life_gets_no_tether() -> None:
    _, here = linked()
    with pytest.raises(ReplicaRejected):
        here.tether(actor(who=Incarnation("actor-3", 8)).challenge)


def test_an_actor_refuses_a_router_without_the_key() -> None:
    there = actor()
    with pytest.raises(Unauthenticated):
        there.welcome(router(OTHER_KEY).prove(there.challenge))


def test_a_router_refuses_an_actor_without_the_key() -> None:
    here, there, impostor = router(), actor(), actor(OTHER_KEY)
    proof = here.prove(there.challenge)
    mac = dataclasses.replace(there.welcome(proof), mac=bytes(32))
    with pytest.raises(Unauthenticated):
        here.accept(mac)
    with pytest.raises(Unauthenticated):
        impostor.welcome(proof)


def test_a_router_refuses_a_welcome_that_it_did_not_ask_for() -> None:
    there = actor()
    welcome = there.welcome(router().prove(there.challenge))
    with pytest.raises(Unauthenticated):
        router().accept(welcome)


@pytest.mark.parametrize("found", [Incarnation("actor-3", 8), Incarnation("actor-3", 6), Incarnation("actor-4", 7)])
def test_another_life_at_the_endpoint_is_refused(found: Incarnation) -> None:
    with pytest.raises(ReplicaRejected, match="out of date"):
        router().prove(actor(who=found).challenge)


def test_a_proof_cannot_be_replayed_under_another_nonce() -> None:
    proof = router().prove(actor().challenge)
    with pytest.raises(Unauthenticated):
        actor(nonce=b"b" * NONCE_BYTES).welcome(proof)


def test_the_routers_own_proof_does_not_pass_as_the_actors() -> None:
    here, there = router(), actor()
    proof = here.prove(there.challenge)
    reflected = dataclasses.replace(there.welcome(proof), mac=proof.mac)
    with pytest.raises(Unauthenticated):
        here.accept(reflected)


@pytest.mark.parametrize("bounds", [(MAX_PROTOCOL + 1, MAX_PROTOCOL + 2), (9, 9)])
def test_protocols_that_do_not_overlap_are_refused(bounds: tuple[int, int]) -> None:
    challenge = dataclasses.replace(actor().challenge, min_protocol=bounds[0], max_protocol=bounds[1])
    with pytest.raises(ProtocolMismatch):
        router().prove(challenge)


@pytest.mark.parametrize("protocol", [0, MAX_PROTOCOL + 1, 99])
def test_an_actor_refuses_a_protocol_that_it_does_not_speak(protocol: int) -> None:
    there = actor()
    with pytest.raises(ProtocolMismatch):
        there.welcome(dataclasses.replace(router().prove(there.challenge), protocol=protocol))


@pytest.mark.parametrize(
    "change", [{"max_protocol": 5}, {"min_protocol": 0}, {"nonce": b"x" * NONCE_BYTES}], ids=["raised maximum", "lowered minimum", "other nonce"]
)
def test_a_challenge_that_was_changed_on_the_way_breaks_the_proof(change: dict[str, Any]) -> None:
    there = actor()
    with pytest.raises(Unauthenticated):
        there.welcome(router().prove(dataclasses.replace(there.challenge, **change)))


@pytest.mark.parametrize("change", [{"router_id": "router-1"}, {"nonce": b"y" * NONCE_BYTES}, {"mac": b""}])
def test_a_proof_that_was_changed_on_the_way_is_refused(change: dict[str, Any]) -> None:
    there = actor()
    with pytest.raises(Unauthenticated):
        there.welcome(dataclasses.replace(router().prove(there.challenge), **change))


def test_a_short_nonce_is_refused() -> None:
    with pytest.raises(ProtocolMismatch):
        router().prove(Challenge(1, 1, ME.actor_id, ME.generation, b"short"))


def test_limits_of_zero_are_refused() -> None:
    here, there = router(), actor()
    welcome = there.welcome(here.prove(there.challenge))
    with pytest.raises(ProtocolMismatch):
        here.accept(dataclasses.replace(welcome, frames_in_flight=0))


@pytest.mark.parametrize("error", [Unauthenticated("m"), ProtocolMismatch("m"), ReplicaRejected("m"), Overloaded("m")])
def test_a_refusal_arrives_as_the_error_that_it_was(error: MoeError) -> None:
    assert type(error_of(refusal_of(error))) is type(error)


def test_a_second_challenge_is_refused() -> None:
    here = router()
    here.prove(actor().challenge)
    with pytest.raises(ProtocolMismatch):
        here.prove(actor(nonce=b"b" * NONCE_BYTES).challenge)


def test_what_a_stranger_says_cannot_forge_log_lines() -> None:
    error = error_of(Refusal("UNAUTHENTICATED", "no\n2026-01-01 INFO all is well\x1b[2J" + "x" * 1000))
    assert str(error).isprintable()
    assert len(str(error)) < 400


def test_an_unknown_refusal_means_unavailable() -> None:
    assert type(error_of(Refusal("SOMETHING_NEW", "m"))) is ReplicaUnavailable


def test_no_handshake_frame_can_outgrow_its_limit() -> None:
    assert len(encode(refusal_of(Unauthenticated("\u20ac" * 10_000)))) < MAX_HANDSHAKE_BYTES
    longest = Proof(1, "r" * 1024, bytes(NONCE_BYTES), bytes(32))
    assert len(encode(longest)) < MAX_HANDSHAKE_BYTES
