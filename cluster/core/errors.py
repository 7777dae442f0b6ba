"""The one error tree.

    MoeError
      InvalidRequest        the caller's fault; names the field              INVALID_ARGUMENT
        InferenceOnly       a backward pass reached remote experts           FAILED_PRECONDITION
      NotFound              unknown model, layer or expert                   NOT_FOUND
      Unauthenticated       missing or wrong token                           UNAUTHENTICATED
      Overloaded            a queue, quota or byte budget is full            RESOURCE_EXHAUSTED
        MessageTooLarge     one message above the receive limit              RESOURCE_EXHAUSTED
      DeadlineExceeded      the caller's time ran out                        DEADLINE_EXCEEDED
      Cancelled             the caller went away                             CANCELLED
      ReplicaError          one copy did not answer; another may
        ReplicaRejected     it refused: wrong generation, copy not held      ABORTED
        ReplicaUnavailable  no connection, or the connection was lost        UNAVAILABLE
        ReplicaFaulted      its forward raised                               INTERNAL
        ReplicaCorrupt      its numbers are wrong                            INTERNAL
      ExpertUnavailable     no copy of an expert answered                    UNAVAILABLE
      NotReady              starting, loading or draining                    UNAVAILABLE
      StaleTable            an older epoch than the one already seen         FAILED_PRECONDITION
      ProtocolMismatch      protocol versions do not overlap                 FAILED_PRECONDITION
      DataLoss              finite input, non-finite output                  DATA_LOSS
      ConfigError           a spec that cannot be served                     INVALID_ARGUMENT
      CheckpointError       a checkpoint that must not be served             DATA_LOSS
      SlotsExhausted        a copy does not fit into an actor                RESOURCE_EXHAUSTED
      FleetError            the fleet refused or failed a command            UNAVAILABLE
      InvariantBroken       a bug in moelastic                               INTERNAL

A message stands alone: it names the field, the limit and the remedy, never a value from the caller's tensors.
The status codes are names (`grpc.StatusCode[...]`), so that this module needs no grpc; the only translation tables are in `router_service.errors`,
`cluster.ray_fleet` and `router_service.client`.
"""

from __future__ import annotations

from typing import ClassVar


class MoeError(Exception):
    """Base of everything moelastic raises on purpose."""

    status: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False

    @property
    def reason(self) -> str:
        """A stable machine-readable name, as in google.rpc.ErrorInfo: INVALID_REQUEST, NOT_FOUND, ..."""
        name = type(self).__name__
        return "".join(f"_{c}" if c.isupper() and i else c for i, c in enumerate(name)).upper()


class InvalidRequest(MoeError):
    """The request can never succeed as it is; `field` is its path in the request."""

    status = "INVALID_ARGUMENT"

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class InferenceOnly(InvalidRequest):
    """Remote experts have no backward pass."""

    status = "FAILED_PRECONDITION"


class NotFound(MoeError):
    """An unknown model, layer or expert; `resource` names its kind, `name` what was asked for."""

    status = "NOT_FOUND"

    def __init__(self, message: str, *, resource: str = "", name: str = "") -> None:
        super().__init__(message)
        self.resource = resource
        self.name = name


class Unauthenticated(MoeError):
    """A missing or wrong token."""

    status = "UNAUTHENTICATED"


class Overloaded(MoeError):
    """Nothing was done; the same request may succeed after `retry_after_s`."""

    status = "RESOURCE_EXHAUSTED"
    retryable = True

    def __init__(self, message: str, *, retry_after_s: float = 0.1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class MessageTooLarge(Overloaded):
    """One message above the receive limit: retrying it unchanged cannot help. `limit_bytes` is 0 where it is not known."""

    retryable = False

    def __init__(self, message: str, *, limit_bytes: int = 0) -> None:
        super().__init__(message, retry_after_s=0.0)
        self.limit_bytes = limit_bytes


class DeadlineExceeded(MoeError):
    """The caller's time ran out; expired work is dropped, not computed."""

    status = "DEADLINE_EXCEEDED"


class Cancelled(MoeError):
    """The caller went away."""

    status = "CANCELLED"


class ReplicaError(MoeError):
    """One copy did not answer a segment; another copy may."""

    status = "UNAVAILABLE"
    retryable = True


class ReplicaRejected(ReplicaError):
    """The actor refused the segment: another generation, or a copy it does not hold."""

    status = "ABORTED"


class ReplicaUnavailable(ReplicaError):
    """No link to the actor, or the link was lost before it answered."""


class ReplicaFaulted(ReplicaError):
    """The expert's forward raised."""

    status = "INTERNAL"


class ReplicaCorrupt(ReplicaError):
    """Its numbers are wrong: not finite where the input is, or not what its own checksums say. They were not used."""

    status = "INTERNAL"


class ExpertUnavailable(MoeError):
    """No copy of an expert answered; `failed_rows` are the caller's own rows that it would have served."""

    status = "UNAVAILABLE"
    retryable = True

    def __init__(self, message: str, *, failed_rows: tuple[int, ...] = (), retry_after_s: float = 0.5) -> None:
        super().__init__(message)
        self.failed_rows = failed_rows
        self.retry_after_s = retry_after_s


class NotReady(MoeError):
    """Starting, loading or draining."""

    status = "UNAVAILABLE"
    retryable = True


class StaleTable(MoeError):
    """An older epoch than the one already seen."""

    status = "FAILED_PRECONDITION"


class ProtocolMismatch(MoeError):
    """Protocol versions do not overlap."""

    status = "FAILED_PRECONDITION"


class DataLoss(MoeError):
    """Finite input gave a non-finite output; `failed_rows` are the caller's own rows."""

    status = "DATA_LOSS"

    def __init__(self, message: str, *, failed_rows: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.failed_rows = failed_rows


class ConfigError(MoeError):
    """A spec that cannot be served as written."""

    status = "INVALID_ARGUMENT"


class CheckpointError(MoeError):
    """A checkpoint that must not be served: incomplete, corrupt, or in a form that is not supported."""

    status = "DATA_LOSS"


class SlotsExhausted(MoeError):
    """A copy does not fit: no free slot, or not enough bytes; the message has both numbers."""

    status = "RESOURCE_EXHAUSTED"


class FleetError(MoeError):
    """The fleet refused or failed a command; reconciling again may succeed."""

    status = "UNAVAILABLE"
    retryable = True


class InvariantBroken(MoeError):
    """A bug in moelastic: please report it."""
