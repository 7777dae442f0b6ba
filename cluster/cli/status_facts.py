"""What `status` knows: the router's view and the controller's, asked at the same time, each with the age of its facts or the reason why it is missing."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from cluster.deploy.connection import Connection, read_token

ASK_TIMEOUT_S = 1.0
CONNECT_OPTIONS = (("grpc.enable_http_proxy", 0),)


_Answer = Future[dict[str, Any]]


@dataclass(frozen=True)
class Source:
    """One place that was asked: where, whether it answered, how old what it said is."""

    address: str
    is_answering: bool = False
    age_s: float = 0.0
    problem: str = ""


@dataclass(frozen=True)
class StatusFacts:
    """Both views as plain data with the proto's field names; empty where the source did not answer."""

    name: str
    router_source: Source
    control_source: Source
    router: dict[str, Any] = field(default_factory=dict)
    table: dict[str, Any] = field(default_factory=dict)
    control: dict[str, Any] = field(default_factory=dict)
    asked_unix_s: float = 0.0

    @property
    def is_serving(self) -> bool:
        """Whether requests are answered now."""
        return bool(self.router) and self.router["state"] in {"SERVING", "DEGRADED"}

    @property
    def state(self) -> str:
        """The router's word when it answers, else the controller's, else UNREACHABLE."""
        return str(self.router.get("state") or self.control.get("state") or "UNREACHABLE")

    @property
    def epoch(self) -> int:
        """Of the table that requests are answered with."""
        return int(self.router.get("epoch") or self.control.get("epoch") or 0)


def gather(connection: Connection) -> StatusFacts:
    """Ask the router and the controller, each within ASK_TIMEOUT_S; never raises for one that is gone. A router that has moved is found by the controller."""
    with ThreadPoolExecutor(3) as pool:
        router, table, control = _ask_all(pool, connection)
        (control_facts, control_problem), address = _outcome(control), connection.router_address
        if not _outcome(router)[0] and (moved := _router_address(control_facts, address)):
            address = moved
            router, table, _ = _ask_all(pool, connection.model_copy(update={"router_address": moved}))
        (router_facts, router_problem), (table_facts, _) = _outcome(router), _outcome(table)
    return StatusFacts(
        name=connection.name,
        router_source=Source(address, bool(router_facts), float(router_facts.get("table_age_s", 0.0)), router_problem),
        control_source=Source(connection.control_address, bool(control_facts), float(control_facts.get("observed_age_s", 0.0)), control_problem),
        router=router_facts,
        table=table_facts,
        control=control_facts,
        asked_unix_s=time.time(),
    )


def _ask_all(pool: ThreadPoolExecutor, connection: Connection) -> tuple[_Answer, _Answer, _Answer]:
    return (
        pool.submit(_ask_router, connection, "GetStatus"),
        pool.submit(_ask_router, connection, "GetRoutingTable"),
        pool.submit(_ask_control, connection),
    )


def _router_address(control: dict[str, Any], known: str) -> str:
    """Another address of a router than the known one, by the controller; empty when there is none."""
    return next((str(router["address"]) for router in control.get("routers", ()) if router["address"] not in {"", known}), "")


def _outcome(future: Future[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    try:
        return future.result(), ""
    except Exception as error:  # noqa: BLE001  # whatever it is, the status is shown without this source, and says why
        return {}, _reason(error)


def _reason(error: Exception) -> str:
    code = getattr(error, "code", None)
    if callable(code):  # grpc's error is its call
        name = code().name
        return f"no answer within {ASK_TIMEOUT_S:g} s" if name in {"UNAVAILABLE", "DEADLINE_EXCEEDED"} else f"{name}: {getattr(error, 'details', str)()}"
    return str(error) or type(error).__name__


def _ask_router(connection: Connection, method: str) -> dict[str, Any]:
    from protos.moelastic.router.v1 import router_pb2

    request, reply = getattr(router_pb2, f"{method}Request")(), getattr(router_pb2, f"{method}Response")
    return _call(connection.router_address, read_token(connection.token_path), f"/moelastic.router.v1.RouterService/{method}", request, reply)


def _ask_control(connection: Connection) -> dict[str, Any]:
    from protos.moelastic.control.v1 import control_pb2 as pb

    path, token = "/moelastic.control.v1.ControlService/GetClusterStatus", read_token(connection.control_token_path)
    return _call(connection.control_address, token, path, pb.GetClusterStatusRequest(), pb.GetClusterStatusResponse)


def _call(address: str, token: str | None, path: str, request: Any, reply: Any) -> dict[str, Any]:  # noqa: ANN401  # protobuf messages and classes
    import grpc

    if not address:
        message = "its address is not known yet"
        raise ValueError(message)
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(address, options=CONNECT_OPTIONS) as channel:
        method = channel.unary_unary(path, type(request).SerializeToString, reply.FromString)
        return plain(method(request, timeout=ASK_TIMEOUT_S, metadata=metadata, wait_for_ready=True))


def plain(message: Any) -> dict[str, Any]:  # noqa: ANN401  # any protobuf message
    """A message as plain data, every field present, numbers as numbers (proto's own JSON writes 64-bit ones as strings), bytes as hex."""
    facts: dict[str, Any] = {}
    for descriptor in message.DESCRIPTOR.fields:
        value = getattr(message, descriptor.name)
        facts[descriptor.name] = [_plain_value(item) for item in value] if descriptor.is_repeated else _plain_value(value)
    return facts


def _plain_value(value: Any) -> Any:  # noqa: ANN401
    if hasattr(value, "DESCRIPTOR"):
        return plain(value)
    return value.hex() if isinstance(value, bytes) else value
