"""`moelastic gpu`: what an operator tells the controller about devices."""

from __future__ import annotations

import grpc

from cluster.cli.status_facts import CONNECT_OPTIONS
from cluster.core.errors import FleetError, InvalidRequest
from cluster.deploy.connection import Connection, read_token
from protos.moelastic.control.v1 import control_pb2 as pb

TIMEOUT_S = 10.0


def release(connection: Connection, device: str) -> list[str]:
    """End a device's quarantine. Returns those that are left. Raises InvalidRequest for one that is not quarantined, FleetError without an answer."""
    token = read_token(connection.control_token_path)
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(connection.control_address, options=CONNECT_OPTIONS) as channel:
        method = channel.unary_unary(
            "/moelastic.control.v1.ControlService/ReleaseDevice", pb.ReleaseDeviceRequest.SerializeToString, pb.ReleaseDeviceResponse.FromString
        )
        try:
            reply = method(pb.ReleaseDeviceRequest(device=device), timeout=TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            message = f"the controller at {connection.control_address}: {error.details()}"
            raise (InvalidRequest(message) if error.code() is grpc.StatusCode.INVALID_ARGUMENT else FleetError(message)) from error
    return list(reply.left)
