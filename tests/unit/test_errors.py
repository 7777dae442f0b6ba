from __future__ import annotations

import asyncio
import inspect

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2
from grpc_status import rpc_status

from cluster.core import errors as tree
from cluster.core.errors import (
    DataLoss,
    DeadlineExceeded,
    ExpertUnavailable,
    InvalidRequest,
    InvariantBroken,
    MessageTooLarge,
    MoeError,
    NotFound,
    NotReady,
    Overloaded,
    ProtocolMismatch,
    Unauthenticated,
)
from router_service.client_errors import error_of, rows_of
from router_service.errors import MAX_FAILED_ROWS, PUSHBACK_KEY, abort, code_of, rows_text, status_of

KINDS = sorted((kind for kind in vars(tree).values() if inspect.isclass(kind) and issubclass(kind, MoeError)), key=lambda kind: kind.__name__)
SAMPLES: dict[type[MoeError], MoeError] = {
    InvalidRequest: InvalidRequest("hidden_states is missing; send it", field="hidden_states"),
    NotFound: NotFound("layer 9 is not an MoE layer; those are 0, 1", resource="layer", name="m/9"),
    Overloaded: Overloaded("a queue is full; try again later", retry_after_s=0.25),
    MessageTooLarge: MessageTooLarge("the message is over the limit of 7 bytes; use DispatchStream", limit_bytes=7),
    ExpertUnavailable: ExpertUnavailable("expert m:0/1 has no copies; retry", failed_rows=(0, 1, 2, 7), retry_after_s=0.75),
    DataLoss: DataLoss("a row came back with NaN; report it", failed_rows=(3,)),
}
CODES = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    MessageTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    ExpertUnavailable: grpc.StatusCode.UNAVAILABLE,
    NotReady: grpc.StatusCode.UNAVAILABLE,
    ProtocolMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    DataLoss: grpc.StatusCode.DATA_LOSS,
    InvariantBroken: grpc.StatusCode.INTERNAL,
}


class Aborted(Exception):
    pass


class RecordingContext:
    """Keeps what a call was ended with, in the shape of a failed call."""

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: tuple = ()) -> None:
        self.ended = (code, details, tuple(trailing_metadata))
        raise Aborted


class FailedCall(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str, trailing_metadata: tuple = ()) -> None:
        super().__init__()
        self._ended = (code, details, trailing_metadata)

    def code(self) -> grpc.StatusCode:
        return self._ended[0]

    def details(self) -> str:
        return self._ended[1]

    def trailing_metadata(self) -> tuple:
        return self._ended[2]


async def ended_with(error: BaseException, request_id: str = "r-1") -> FailedCall:
    context = RecordingContext()
    with pytest.raises(Aborted):
        await abort(context, error, request_id=request_id)
    return FailedCall(*context.ended)


def detail(call: FailedCall, kind: type) -> object | None:
    for packed in rpc_status.from_call(call).details:
        if packed.Is(kind.DESCRIPTOR):
            found = kind()
            packed.Unpack(found)
            return found
    return None


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
async def test_every_error_comes_back_as_what_it_was_raised_as(kind: type[MoeError]) -> None:
    sent = SAMPLES.get(kind, kind("what happened, to whom, and what to do"))
    back = error_of(await ended_with(sent), address="router:1")
    assert type(back) is kind
    assert str(back) == str(sent)
    assert back.retryable == sent.retryable
    assert vars(back) == vars(sent)


@pytest.mark.parametrize(("kind", "code"), CODES.items(), ids=lambda item: getattr(item, "__name__", ""))
async def test_every_row_of_the_code_map_has_its_code_and_its_reason(kind: type[MoeError], code: grpc.StatusCode) -> None:
    call = await ended_with(SAMPLES.get(kind, kind("a message that stands alone")))
    assert call.code() is code
    info = detail(call, error_details_pb2.ErrorInfo)
    assert info.domain == "moelastic"
    assert info.reason == kind("").reason
    assert info.metadata["request_id"] == "r-1"


async def test_a_bad_field_is_named_in_bad_request() -> None:
    violations = detail(await ended_with(SAMPLES[InvalidRequest]), error_details_pb2.BadRequest).field_violations
    assert [violation.field for violation in violations] == ["hidden_states"]


async def test_what_was_not_found_is_named_in_resource_info() -> None:
    found = detail(await ended_with(SAMPLES[NotFound]), error_details_pb2.ResourceInfo)
    assert (found.resource_type, found.resource_name) == ("layer", "m/9")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.retryable], ids=lambda kind: kind.__name__)
async def test_what_a_retry_can_cure_says_when(kind: type[MoeError]) -> None:
    call = await ended_with(SAMPLES.get(kind, kind("again, later")))
    pause_ms = detail(call, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds()
    assert pause_ms > 0
    assert dict(call.trailing_metadata())[PUSHBACK_KEY] == str(pause_ms)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.retryable], ids=lambda kind: kind.__name__)
async def test_what_no_retry_can_cure_does_not_invite_one(kind: type[MoeError]) -> None:
    call = await ended_with(SAMPLES.get(kind, kind("never")))
    assert detail(call, error_details_pb2.RetryInfo) is None
    assert PUSHBACK_KEY not in dict(call.trailing_metadata())


async def test_the_text_of_a_bug_is_not_told() -> None:
    call = await ended_with(ValueError("tensor([0.1234, 5.678])"))
    assert call.code() is grpc.StatusCode.INTERNAL
    assert "ValueError" in call.details()
    assert "0.1234" not in str(rpc_status.from_call(call))


def test_a_time_limit_is_deadline_exceeded_and_a_cancelled_task_is_cancelled() -> None:
    assert code_of(TimeoutError()) is grpc.StatusCode.DEADLINE_EXCEEDED
    assert code_of(asyncio.CancelledError()) is grpc.StatusCode.CANCELLED


@pytest.mark.parametrize("rows", [range(1_000_000), range(0, 1_000_000, 2), range(999_000_000, 999_999_999, 7)], ids=["dense", "alternating", "long"])
def test_a_status_fits_into_trailing_metadata_however_many_rows_failed(rows: range) -> None:
    status = status_of(ExpertUnavailable("x" * 5000, failed_rows=tuple(rows[:200_000])), request_id="r" * 4000)
    assert status.code == code_pb2.UNAVAILABLE
    # base64 by four thirds, beside the message itself: below the 8 KiB that stock clients take.
    assert len(status.SerializeToString()) * 4 / 3 + len(status.message) < 7 * 1024


def test_failed_rows_are_told_as_ranges_and_read_back() -> None:
    assert rows_text((5, 1, 2, 3, 3, 9)) == ("1-3,5,9", 5)
    assert rows_of("1-3,5,9") == (1, 2, 3, 5, 9)
    text, told = rows_text(range(5000))
    assert told == MAX_FAILED_ROWS
    assert rows_of(text) == tuple(range(MAX_FAILED_ROWS))


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1,,2", "1-x", "٣"])
def test_rows_in_another_form_are_read_as_none(text: str) -> None:
    assert rows_of(text) == ()


def test_rows_from_a_lying_server_are_bounded() -> None:
    assert len(rows_of("0-999999999999")) == 65_536


def test_an_oversized_message_names_the_limit_and_the_way_around_it() -> None:
    error = error_of(FailedCall(grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER: Received message larger than max (4097 vs. 4096)"), address="r:1")
    assert isinstance(error, MessageTooLarge)
    assert error.limit_bytes == 4096
    assert "4096" in str(error)
    assert "DispatchStream" in str(error)


@pytest.mark.parametrize("code", list(grpc.StatusCode), ids=lambda code: code.name)
def test_statuses_of_others_become_errors_of_the_tree_too(code: grpc.StatusCode) -> None:
    error = error_of(FailedCall(code, "from something in between"), address="router:1")
    assert isinstance(error, MoeError)
    assert "router:1" in str(error) or "from something in between" in str(error)


def test_a_foreign_error_info_is_not_taken_for_ours() -> None:
    status = status_of(SAMPLES[NotFound])
    info = error_details_pb2.ErrorInfo(reason="NOT_READY", domain="elsewhere")
    status.details[0].Pack(info)
    converted = rpc_status.to_status(status)
    error = error_of(FailedCall(converted.code, converted.details, converted.trailing_metadata), address="r:1")
    assert type(error) is NotFound
