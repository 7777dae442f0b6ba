from __future__ import annotations

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.core.descriptors import DType
from cluster.core.errors import InvalidRequest, MoeError, ProtocolMismatch
from cluster.core.ids import Role
from cluster.core.link_codec import MAGIC, PREFIX, PROTOCOL, encode
from cluster.core.link_frames import Challenge, Forward, Frame, Goodbye, Ping, Run, Segment
from cluster.core.link_reader import FrameReader


def forward(frame_id: int, num_rows: int, dim: int = 8) -> Forward:
    run = Run(num_rows, 1000, exact=False, epoch=1)
    return Forward(frame_id, 1, (), (Segment(1, 0, "m", 0, 0, b"v", Role.REPLICA, DType.BF16, dim, (run,)),))


def reader(allocated: list[int] | None = None, max_body_bytes: int = 1 << 30) -> FrameReader:
    def allocate(num_bytes: int) -> memoryview:
        if allocated is not None:
            allocated.append(num_bytes)
        return memoryview(bytearray(num_bytes))

    made = FrameReader(max_body_bytes=max_body_bytes, allocate=allocate)
    made.handshake = False
    return made


def feed(target: FrameReader, data: bytes, sizes: list[int]) -> list[tuple[Frame, bytes]]:
    """Hand over the data in pieces of these sizes, again and again, as a socket would."""
    got, place, turn = [], 0, 0
    while place < len(data):
        room = target.buffer()
        assert room.nbytes
        count = min(sizes[turn % len(sizes)], room.nbytes, len(data) - place)
        room[:count] = data[place : place + count]
        target.received(count)
        place, turn = place + count, turn + 1
        while (item := target.next()) is not None:
            got.append((item[0], bytes(item[1])))
    return got


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.lists(st.integers(1, 700), min_size=1, max_size=5), st.randoms(use_true_random=False))
@example([0, 20_000, 0, 9000, 1], [65_536, 1, 100_000, 7000], random.Random(1))
@example([5000, 5000, 0, 5000], [90_000], random.Random(1))
def test_frames_do_not_depend_on_how_the_bytes_arrive(rows: list[int], sizes: list[int], rng: random.Random) -> None:
    sent: list[tuple[Frame, bytes]] = []
    for number, count in enumerate(rows):
        frame = forward(number, count) if count else Ping(number)
        sent.append((frame, rng.randbytes(count * 16)))
    data = b"".join(encode(frame) + body for frame, body in sent)
    assert feed(reader(), data, sizes) == sent


def test_a_header_larger_than_the_staging_buffer_arrives() -> None:
    run = Run(1, 1, exact=False, epoch=1)
    frame = Forward(1, 1, (), (Segment(1, 0, "m", 0, 0, b"v" * 200_000, Role.REPLICA, DType.BF16, 1, (run,)),))
    sent = [(Ping(1), b""), (frame, b"ab"), (Ping(2), b"")]
    assert feed(reader(), b"".join(encode(frame) + body for frame, body in sent), [70_000]) == sent


def test_a_large_body_is_received_in_place() -> None:
    bodies: list[memoryview] = []

    def allocate(num_bytes: int) -> memoryview:
        bodies.append(memoryview(bytearray(num_bytes)))
        return bodies[-1]

    target, frame = FrameReader(max_body_bytes=1 << 30, allocate=allocate), forward(1, 100_000)
    target.handshake = False
    feed(target, encode(frame) + bytes(1000), [1 << 20])
    assert target.buffer().obj is bodies[0].obj
    assert target.buffer().nbytes == frame.body_bytes - 1000


@pytest.mark.parametrize(
    "prefix",
    [
        (MAGIC, PROTOCOL, Forward.KIND, 10, 1 << 20),
        (MAGIC, PROTOCOL, Forward.KIND, 1 << 21, 10),
        (MAGIC, PROTOCOL, Goodbye.KIND, 10, 10),
        (b"\0\0\0\0", PROTOCOL, Forward.KIND, 10, 10),
    ],
)
def test_lengths_over_the_limits_allocate_nothing(prefix: tuple[bytes, int, int, int, int]) -> None:
    allocated: list[int] = []
    with pytest.raises((InvalidRequest, ProtocolMismatch)):
        feed(reader(allocated, max_body_bytes=1000), PREFIX.pack(*prefix) + bytes(4096), [4096])
    assert allocated == []


def test_a_header_that_disagrees_with_its_body_length_allocates_nothing() -> None:
    data = bytearray(encode(forward(1, 10)))
    data[: PREFIX.size] = PREFIX.pack(MAGIC, PROTOCOL, Forward.KIND, len(data) - PREFIX.size, 1 << 29)
    allocated: list[int] = []
    with pytest.raises(InvalidRequest):
        feed(reader(allocated), bytes(data), [100])
    assert allocated == []


def test_nothing_but_the_handshake_passes_before_the_gate_is_open() -> None:
    closed = reader()
    closed.handshake = True
    with pytest.raises(ProtocolMismatch):
        feed(closed, encode(Ping(1)), [100])


def test_the_gate_opens_between_two_frames_of_one_piece() -> None:
    target = reader()
    target.handshake = True
    data = encode(Challenge(1, 1, "a", 1, b"n")) + encode(Ping(5))
    room = target.buffer()
    room[: len(data)] = data
    target.received(len(data))
    assert target.next() == (Challenge(1, 1, "a", 1, b"n"), b"")
    target.handshake = False
    assert target.next() == (Ping(5), b"")
    assert target.next() is None


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=300), st.lists(st.integers(1, 400), min_size=1, max_size=3), st.booleans(), st.randoms(use_true_random=False))
def test_noise_ends_in_a_typed_error_or_waits_for_more(noise: bytes, sizes: list[int], keep_prefix: bool, rng: random.Random) -> None:
    data = bytearray(encode(forward(1, 3)) + bytes(48) + encode(Ping(2)) + noise)
    if not keep_prefix:
        data = bytearray(noise)
    for _ in range(min(3, len(data))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    try:
        feed(reader(max_body_bytes=1 << 20), bytes(data), sizes)
    except MoeError:
        return
