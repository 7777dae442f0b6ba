from __future__ import annotations

import dataclasses
import random
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.core.descriptors import DType
from cluster.core.errors import InvalidRequest, MoeError, ProtocolMismatch
from cluster.core.ids import Incarnation, Role
from cluster.core.link_codec import MAGIC, MAX_HANDSHAKE_BYTES, MAX_HEADER_BYTES, MAX_ITEMS, PREFIX, PROTOCOL, Prefix, decode, decode_prefix, encode
from cluster.core.link_frames import (
    Cancel,
    Challenge,
    Cool,
    Forward,
    Frame,
    FrameStatus,
    Goodbye,
    Ping,
    Pong,
    Proof,
    Refusal,
    Result,
    Run,
    Segment,
    SegmentResult,
    SegmentStatus,
    Tether,
    Warm,
    Welcome,
    derive_link_key,
)

LIMIT = 1 << 40
COUNTS = st.integers(0, 2**32)
TEXT = st.text(max_size=40)
SECONDS = st.floats(0, 1e6)


def frames() -> st.SearchStrategy[Frame]:
    runs = st.builds(Run, st.integers(1, 50), COUNTS, st.booleans(), COUNTS)
    place = (COUNTS, COUNTS, TEXT, COUNTS, COUNTS, st.binary(max_size=32), st.sampled_from(Role), st.sampled_from(DType), st.integers(1, 64))
    segments = st.builds(Segment, *place, st.lists(runs, min_size=1, max_size=4).map(tuple))
    good = st.builds(
        SegmentResult, COUNTS, COUNTS, st.just(SegmentStatus.OK), st.sampled_from(DType), st.integers(1, 64), st.integers(0, 99), st.just(()), TEXT
    )
    bad = st.builds(
        SegmentResult,
        COUNTS,
        COUNTS,
        st.sampled_from([status for status in SegmentStatus if status is not SegmentStatus.OK]),
        st.sampled_from(DType),
        st.integers(1, 64),
        st.just(0),
        st.lists(st.integers(0, 9), max_size=3).map(tuple),
        TEXT,
    )
    forwards = st.builds(Forward, COUNTS, COUNTS, st.lists(TEXT, max_size=3).map(tuple), st.lists(segments, min_size=1, max_size=4).map(tuple))
    results = st.builds(Result, COUNTS, COUNTS, st.sampled_from(FrameStatus), SECONDS, SECONDS, st.lists(good | bad, max_size=4).map(tuple))
    return st.one_of(
        st.builds(Challenge, COUNTS, COUNTS, TEXT, COUNTS, st.binary(max_size=40)),
        st.builds(Proof, COUNTS, TEXT, st.binary(max_size=40), st.binary(max_size=40)),
        st.builds(Welcome, st.binary(max_size=40), COUNTS, COUNTS, COUNTS),
        st.builds(Refusal, TEXT, TEXT),
        st.builds(Tether, COUNTS, TEXT, st.binary(max_size=40), st.binary(max_size=40)),
        forwards,
        results,
        st.builds(Ping, COUNTS),
        st.builds(Pong, COUNTS, COUNTS, COUNTS, SECONDS, COUNTS, st.booleans()),
        st.builds(Cancel, COUNTS, st.lists(COUNTS, max_size=5).map(tuple)),
        st.builds(Goodbye, TEXT),
        st.builds(Warm, TEXT, COUNTS, COUNTS, st.binary(max_size=40)),
        st.builds(Cool, TEXT, COUNTS, COUNTS, st.binary(max_size=40)),
    )


def read(data: bytes, *, handshake: bool) -> Frame:
    prefix = decode_prefix(data[: PREFIX.size], max_body_bytes=LIMIT, handshake=handshake)
    return decode(prefix, data[PREFIX.size : PREFIX.size + prefix.header_bytes])


def is_handshake(frame: Frame) -> bool:
    return isinstance(frame, Challenge | Proof | Welcome | Refusal | Tether)


@given(frames())
def test_every_frame_survives_the_wire(frame: Frame) -> None:
    assert read(encode(frame), handshake=is_handshake(frame)) == frame


@given(frames())
def test_handshake_frames_and_others_never_pass_for_each_other(frame: Frame) -> None:
    with pytest.raises(ProtocolMismatch):
        read(encode(frame), handshake=not is_handshake(frame))


@settings(max_examples=600)
@given(frames(), st.randoms(use_true_random=False))
def test_mutated_bytes_end_in_a_typed_error_or_a_frame(frame: Frame, rng: random.Random) -> None:
    data = bytearray(encode(frame))
    for _ in range(rng.randint(1, 6)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    try:
        read(bytes(data), handshake=is_handshake(frame))
    except MoeError:
        return


@settings(max_examples=600)
@given(st.sampled_from([1, 2, 3, 4, 5, 10, 11, 20, 21, 22, 23, 24, 25]), st.binary(max_size=400), st.integers(0, 2**40))
def test_random_headers_end_in_a_typed_error_or_a_frame(kind: int, header: bytes, body_bytes: int) -> None:
    try:
        decode(Prefix(kind, len(header), body_bytes), header)
    except MoeError:
        return


nested = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=12) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=40,
)


@settings(max_examples=600)
@given(st.sampled_from([1, 2, 3, 4, 5, 10, 11, 20, 21, 22, 23, 24, 25]), nested, st.integers(0, 1000))
def test_wellformed_msgpack_of_any_shape_ends_in_a_typed_error_or_a_frame(kind: int, values: Any, body_bytes: int) -> None:
    header = msgpack.packb(values, use_bin_type=True)
    try:
        decode(Prefix(kind, len(header), body_bytes), header)
    except MoeError:
        return


def forward(**changes: Any) -> list[Any]:
    segment = {"id": 1, "attempt": 0, "model": "m", "layer": 0, "index": 0, "version": b"v", "role": 1, "dtype": "bf16", "dim": 4, "runs": [[2, 9, False, 1]]}
    return [1, 1, [], [list((segment | changes).values())]]


@pytest.mark.parametrize(
    "changes",
    [
        {"dim": 0},
        {"dim": 0, "runs": [[1 << 60, 9, False, 1]]},
        {"runs": [[0, 9, False, 1]]},
        {"runs": []},
        {"runs": [[-2, 9, False, 1], [4, 9, False, 1]]},
        {"runs": [[True, 9, False, 1]]},
        {"runs": [[2.0, 9, False, 1]]},
        {"runs": [[2, 9, 0, 1]]},
        {"runs": [[2, 9, False]]},
        {"dtype": "fp8"},
        {"role": 3},
        {"role": True},
        {"version": "v"},
        {"model": b"m"},
        {"model": "m" * 5000},
        {"attempt": -1},
    ],
)
def test_a_forward_that_lies_is_refused(changes: dict[str, Any]) -> None:
    header = msgpack.packb(forward(**changes))
    rows = sum(run[0] for run in changes.get("runs", [[2]]))
    with pytest.raises(InvalidRequest):
        decode(Prefix(Forward.KIND, len(header), int(rows) * changes.get("dim", 4) * 2), header)


def test_the_untouched_forward_of_the_lies_is_accepted() -> None:
    header = msgpack.packb(forward())
    assert decode(Prefix(Forward.KIND, len(header), 16), header).body_bytes == 16


@pytest.mark.parametrize("body_bytes", [0, 15, 17, 1 << 39])
def test_a_body_of_another_length_than_its_segments_is_refused(body_bytes: int) -> None:
    header = msgpack.packb(forward())
    with pytest.raises(InvalidRequest, match=str(body_bytes)):
        decode(Prefix(Forward.KIND, len(header), body_bytes), header)


def test_rows_of_a_segment_that_did_not_end_ok_are_refused() -> None:
    header = msgpack.packb([1, 1, 1, 0.0, 0.0, [[1, 0, int(SegmentStatus.FAULTED), "bf16", 4, 2, [], ""]]])
    with pytest.raises(InvalidRequest):
        decode(Prefix(Result.KIND, len(header), 16), header)


def test_deeply_nested_headers_are_refused() -> None:
    header = b"\x91" * 100_000 + b"\xc0"
    with pytest.raises(InvalidRequest):
        decode(Prefix(Forward.KIND, len(header), 0), header)


def test_arrays_of_more_items_than_allowed_are_refused() -> None:
    most = encode(Cancel(1, tuple(range(MAX_ITEMS))))
    assert read(most, handshake=False) == Cancel(1, tuple(range(MAX_ITEMS)))
    with pytest.raises(InvalidRequest):
        read(encode(Cancel(1, tuple(range(MAX_ITEMS + 1)))), handshake=False)


def test_a_pickle_in_every_bytes_field_stays_bytes() -> None:
    bomb = b"cos\nsystem\n(S'true'\ntR."
    frame = Proof(1, "router", bomb, bomb)
    assert read(encode(frame), handshake=True) == frame


@pytest.mark.parametrize(
    ("prefix", "error"),
    [
        ((b"HTTP", PROTOCOL, Ping.KIND, 10, 0), ProtocolMismatch),
        ((MAGIC, PROTOCOL + 1, Ping.KIND, 10, 0), ProtocolMismatch),
        ((MAGIC, PROTOCOL, 99, 10, 0), ProtocolMismatch),
        ((MAGIC, PROTOCOL, Ping.KIND, MAX_HEADER_BYTES + 1, 0), InvalidRequest),
        ((MAGIC, PROTOCOL, Ping.KIND, 10, 1), InvalidRequest),
        ((MAGIC, PROTOCOL, Forward.KIND, 10, 1001), InvalidRequest),
        ((MAGIC, PROTOCOL, Forward.KIND, 10, 2**64 - 1), InvalidRequest),
    ],
)
def test_a_bad_prefix_is_refused_before_what_follows_is_read(prefix: tuple[Any, ...], error: type[MoeError]) -> None:
    with pytest.raises(error):
        decode_prefix(PREFIX.pack(*prefix), max_body_bytes=1000)


def test_handshake_frames_are_small_and_of_any_protocol() -> None:
    passed = decode_prefix(PREFIX.pack(MAGIC, 77, Challenge.KIND, MAX_HANDSHAKE_BYTES, 0), max_body_bytes=1000, handshake=True)
    assert passed.header_bytes == MAX_HANDSHAKE_BYTES
    with pytest.raises(InvalidRequest):
        decode_prefix(PREFIX.pack(MAGIC, PROTOCOL, Challenge.KIND, MAX_HANDSHAKE_BYTES + 1, 0), max_body_bytes=1000, handshake=True)
    with pytest.raises(InvalidRequest):
        decode_prefix(PREFIX.pack(MAGIC, PROTOCOL, Challenge.KIND, 10, 1), max_body_bytes=1000, handshake=True)


def test_a_header_over_the_limit_is_refused_by_its_sender() -> None:
    run = Run(1, 1, exact=False, epoch=1)
    segment = Segment(1, 0, "m", 0, 0, b"v" * (MAX_HEADER_BYTES + 1), Role.REPLICA, DType.BF16, 4, (run,))
    with pytest.raises(InvalidRequest, match="over the limit"):
        encode(Forward(1, 1, (), (segment,)))


def test_link_keys_differ_by_generation_actor_and_secret() -> None:
    keys = {derive_link_key(secret, Incarnation(actor, generation)) for secret in (b"a", b"b") for actor in ("x", "y") for generation in (1, 2)}
    assert len(keys) == 8


@given(frames())
def test_frames_are_values(frame: Frame) -> None:
    copy = dataclasses.replace(frame)
    assert copy == frame
    assert encode(copy) == encode(frame)
