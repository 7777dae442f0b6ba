"""`moelastic.control.v1` over grpc.aio: the routers' table feed and health reports, and the operators' goal and status. Decides nothing.

Every call brings the deployment's control token; it is compared in constant time and never printed.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import grpc
import pydantic

from cluster.cluster_view import status_message
from cluster.controller import Controller
from cluster.core.errors import FleetError, InvalidRequest, MoeError, Unauthenticated
from cluster.core.health import LinkReport, Wrong
from cluster.core.ids import CopyId, ExpertId, Incarnation, Role
from cluster.core.spec import ClusterSpec
from cluster.core.table_codec import to_proto
from protos.moelastic.control.v1 import control_pb2 as pb
from protos.moelastic.control.v1 import control_pb2_grpc as pb_grpc

MAX_MESSAGE_BYTES = 16 << 20
MAX_ROUTERS = 64
MAX_SPEC_BYTES = 1 << 20
MAX_ENTRIES = 1 << 18
MAX_NAME_CHARACTERS = 256
MAX_KIND_CHARACTERS = 32
WATCH_LIMIT_S = 3600.0
STOP_GRACE_S = 1.0

Reply = TypeVar("Reply")
if TYPE_CHECKING:
    Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


def bearer(token: bytes) -> str:
    """The value of `authorization` metadata for a control token."""
    return f"Bearer {token.hex()}"


class ControlService(pb_grpc.ControlServiceServicer):
    """The controller's servicer; one per controller process."""

    def __init__(self, controller: Controller, token: bytes) -> None:
        self._controller = controller
        self._offers = (bearer(token).encode(), b"Bearer " + token)
        self._watchers = 0

    async def WatchTable(self, request: pb.WatchTableRequest, context: Context) -> AsyncIterator[pb.WatchTableResponse]:  # noqa: N802 - the proto's name
        """The table at once, then each newer one, until the caller leaves. A stream ends after WATCH_LIMIT_S; routers then connect anew."""
        await self._authenticate(context)
        if self._watchers >= MAX_ROUTERS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_ROUTERS} routers watch already; end one first")
        self._watchers += 1
        try:
            generation = self._controller.register_router(request.router_generation, request.last_epoch)
            loop = asyncio.get_running_loop()
            until_s, epoch = loop.time() + WATCH_LIMIT_S, 0
            while (left_s := until_s - loop.time()) > 0:
                table = await self._controller.wait_until_newer(epoch, timeout_s=left_s)
                if table is None:
                    return
                epoch = table.epoch
                yield to_proto(table, router_generation=generation, controller_generation=self._controller.generation)
        finally:
            self._watchers -= 1

    async def ReportHealth(self, request: pb.ReportHealthRequest, context: Context) -> pb.ReportHealthResponse:  # noqa: N802 - the proto's name
        """Take what a router sees; lost links make the controller look at once."""
        await self._authenticate(context)
        return await _guarded(context, self._report_health(request))

    async def _report_health(self, request: pb.ReportHealthRequest) -> pb.ReportHealthResponse:
        if not request.router_id or max(len(request.links), len(request.loads), len(request.wrong_numbers)) > MAX_ENTRIES:
            message = f"router_id: must be given; links, loads and wrong_numbers: at most {MAX_ENTRIES} each"
            raise InvalidRequest(message, field="router_id")
        tokens = {ExpertId(load.model, load.layer, load.index): load.tokens for load in request.loads}
        links, wrong = [_link(link) for link in request.links], [_wrong(entry) for entry in request.wrong_numbers]
        epoch = self._controller.report_health(request.router_id, request.epoch, links, tokens, request.window_s, wrong)
        return pb.ReportHealthResponse(epoch=epoch)

    async def ReleaseDevice(self, request: pb.ReleaseDeviceRequest, context: Context) -> pb.ReleaseDeviceResponse:  # noqa: N802 - the proto's name
        """Trust a quarantined device again."""
        await self._authenticate(context)
        return await _guarded(context, self._release_device(request))

    async def _release_device(self, request: pb.ReleaseDeviceRequest) -> pb.ReleaseDeviceResponse:
        if not self._controller.release_device(request.device):
            known = ", ".join(self._controller.snapshot().memory.quarantined) or "none"
            message = f"device: {request.device[:MAX_NAME_CHARACTERS]!r} is not one quarantined NODE/DEVICE; quarantined: {known}"
            raise InvalidRequest(message, field="device")
        return pb.ReleaseDeviceResponse(left=sorted(self._controller.snapshot().memory.quarantined))

    async def Apply(self, request: pb.ApplyRequest, context: Context) -> pb.ApplyResponse:  # noqa: N802 - the proto's name
        """Record a new goal."""
        await self._authenticate(context)
        return await _guarded(context, self._apply(request))

    async def _apply(self, request: pb.ApplyRequest) -> pb.ApplyResponse:
        spec = parse_spec(request.spec_json)
        revision, differences = await self._controller.apply(spec, replace_differing=request.replace)
        return pb.ApplyResponse(spec_revision=revision, differences=differences)

    async def GetClusterStatus(self, request: pb.GetClusterStatusRequest, context: Context) -> pb.GetClusterStatusResponse:  # noqa: N802, ARG002 - proto
        """One coherent view."""
        await self._authenticate(context)
        return status_message(self._controller)

    async def _authenticate(self, context: Context) -> None:
        offered = dict(context.invocation_metadata() or ()).get("authorization", "")
        value = offered.encode() if isinstance(offered, str) else offered
        matches = [hmac.compare_digest(value, known) for known in self._offers]
        if not any(matches):
            message = "missing or wrong control token: send metadata `authorization: Bearer TOKEN` with the token of this deployment"
            await context.abort(grpc.StatusCode[Unauthenticated.status], message)


def _link(link: pb.LinkHealth) -> LinkReport:
    return LinkReport(
        Incarnation(link.actor_id, link.generation),
        is_connected=link.connected,
        is_ejected=link.ejected,
        is_suspected=link.suspected,
        evidence=link.evidence[:MAX_NAME_CHARACTERS],
        oldest_age_s=link.oldest_age_s,
        queued_tokens=link.queued_tokens,
    )


def _wrong(entry: pb.WrongNumbers) -> Wrong:
    copy = CopyId(ExpertId(entry.model, entry.layer, entry.index), entry.version.hex(), Role.SHADOW if entry.role == pb.ROLE_SHADOW else Role.REPLICA)
    return Wrong(Incarnation(entry.actor_id, entry.generation), copy, entry.kind[:MAX_KIND_CHARACTERS], entry.count)


def parse_spec(spec_json: str) -> ClusterSpec:
    """A spec from JSON. Raises InvalidRequest that names each wrong field by its path, without its value."""
    if len(spec_json) > MAX_SPEC_BYTES:
        message = f"spec_json: {len(spec_json)} characters, at most {MAX_SPEC_BYTES} are read"
        raise InvalidRequest(message, field="spec_json")
    try:
        return ClusterSpec.model_validate_json(spec_json)
    except pydantic.ValidationError as error:
        problems = [f"{'.'.join(str(part) for part in item['loc']) or 'spec'}: {item['msg']}" for item in error.errors()[:8]]
        raise InvalidRequest("; ".join(problems), field="spec_json") from error


async def _guarded(context: Context, work: Awaitable[Reply]) -> Reply:
    try:
        return await work
    except MoeError as error:
        await context.abort(grpc.StatusCode[error.status], f"{error.reason}: {error}")
        raise


class ControlServer:
    """The gRPC server. It has its port before there is a controller, because the controller tells routers where to find it."""

    def __init__(self, host: str, preferred_port: int, *, fixed: bool = False) -> None:
        """Bind. A preferred port that is taken is given up for a free one, unless it is `fixed`: then FleetError."""
        self._server = grpc.aio.server(options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.so_reuseport", 0)])
        try:
            self.port = self._server.add_insecure_port(f"{host}:{preferred_port}")
        except RuntimeError as error:
            if fixed:
                message = f"control.port {preferred_port} on {host} is taken; set control.port to 0 for a free one, or end what holds it"
                raise FleetError(message) from error
            self.port = self._server.add_insecure_port(f"{host}:0")
        self.address = f"{host}:{self.port}"
        self._is_started = False

    async def start(self, controller: Controller, token: bytes) -> None:
        """Answer for a controller."""
        pb_grpc.add_ControlServiceServicer_to_server(ControlService(controller, token), self._server)  # type: ignore[no-untyped-call]
        await self._server.start()
        self._is_started = True

    async def stop(self) -> None:
        """End all streams after a moment, and give the port back."""
        if not self._is_started:
            await self._server.start()  # gRPC gives back only the port of a server that was started
        await self._server.stop(STOP_GRACE_S if self._is_started else 0.0)
