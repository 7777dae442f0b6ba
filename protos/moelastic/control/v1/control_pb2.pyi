from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_REPLICA: _ClassVar[Role]
    ROLE_SHADOW: _ClassVar[Role]
ROLE_UNSPECIFIED: Role
ROLE_REPLICA: Role
ROLE_SHADOW: Role

class WatchTableRequest(_message.Message):
    __slots__ = ("router_id", "router_generation", "last_epoch")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    ROUTER_GENERATION_FIELD_NUMBER: _ClassVar[int]
    LAST_EPOCH_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    router_generation: int
    last_epoch: int
    def __init__(self, router_id: _Optional[str] = ..., router_generation: _Optional[int] = ..., last_epoch: _Optional[int] = ...) -> None: ...

class Endpoint(_message.Message):
    __slots__ = ("actor_id", "generation", "host", "port", "node_id", "device")
    ACTOR_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    actor_id: str
    generation: int
    host: str
    port: int
    node_id: str
    device: str
    def __init__(self, actor_id: _Optional[str] = ..., generation: _Optional[int] = ..., host: _Optional[str] = ..., port: _Optional[int] = ..., node_id: _Optional[str] = ..., device: _Optional[str] = ...) -> None: ...

class Copy(_message.Message):
    __slots__ = ("actor", "version", "role")
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    actor: int
    version: bytes
    role: Role
    def __init__(self, actor: _Optional[int] = ..., version: _Optional[bytes] = ..., role: _Optional[_Union[Role, str]] = ...) -> None: ...

class Expert(_message.Message):
    __slots__ = ("model", "layer", "index", "copies")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    model: str
    layer: int
    index: int
    copies: _containers.RepeatedCompositeFieldContainer[Copy]
    def __init__(self, model: _Optional[str] = ..., layer: _Optional[int] = ..., index: _Optional[int] = ..., copies: _Optional[_Iterable[_Union[Copy, _Mapping]]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "manifest", "num_experts", "num_missing", "ladder")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    NUM_MISSING_FIELD_NUMBER: _ClassVar[int]
    LADDER_FIELD_NUMBER: _ClassVar[int]
    name: str
    manifest: str
    num_experts: int
    num_missing: int
    ladder: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., manifest: _Optional[str] = ..., num_experts: _Optional[int] = ..., num_missing: _Optional[int] = ..., ladder: _Optional[_Iterable[str]] = ...) -> None: ...

class WatchTableResponse(_message.Message):
    __slots__ = ("epoch", "actors", "experts", "models", "router_generation", "controller_generation")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ACTORS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    ROUTER_GENERATION_FIELD_NUMBER: _ClassVar[int]
    CONTROLLER_GENERATION_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    actors: _containers.RepeatedCompositeFieldContainer[Endpoint]
    experts: _containers.RepeatedCompositeFieldContainer[Expert]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    router_generation: int
    controller_generation: int
    def __init__(self, epoch: _Optional[int] = ..., actors: _Optional[_Iterable[_Union[Endpoint, _Mapping]]] = ..., experts: _Optional[_Iterable[_Union[Expert, _Mapping]]] = ..., models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., router_generation: _Optional[int] = ..., controller_generation: _Optional[int] = ...) -> None: ...

class ExpertLoad(_message.Message):
    __slots__ = ("model", "layer", "index", "tokens")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: str
    layer: int
    index: int
    tokens: int
    def __init__(self, model: _Optional[str] = ..., layer: _Optional[int] = ..., index: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class LinkHealth(_message.Message):
    __slots__ = ("actor_id", "generation", "connected", "evidence", "oldest_age_s", "ejected", "suspected", "queued_tokens")
    ACTOR_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    OLDEST_AGE_S_FIELD_NUMBER: _ClassVar[int]
    EJECTED_FIELD_NUMBER: _ClassVar[int]
    SUSPECTED_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    actor_id: str
    generation: int
    connected: bool
    evidence: str
    oldest_age_s: float
    ejected: bool
    suspected: bool
    queued_tokens: int
    def __init__(self, actor_id: _Optional[str] = ..., generation: _Optional[int] = ..., connected: _Optional[bool] = ..., evidence: _Optional[str] = ..., oldest_age_s: _Optional[float] = ..., ejected: _Optional[bool] = ..., suspected: _Optional[bool] = ..., queued_tokens: _Optional[int] = ...) -> None: ...

class WrongNumbers(_message.Message):
    __slots__ = ("actor_id", "generation", "model", "layer", "index", "version", "role", "kind", "count")
    ACTOR_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    actor_id: str
    generation: int
    model: str
    layer: int
    index: int
    version: bytes
    role: Role
    kind: str
    count: int
    def __init__(self, actor_id: _Optional[str] = ..., generation: _Optional[int] = ..., model: _Optional[str] = ..., layer: _Optional[int] = ..., index: _Optional[int] = ..., version: _Optional[bytes] = ..., role: _Optional[_Union[Role, str]] = ..., kind: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class ReportHealthRequest(_message.Message):
    __slots__ = ("router_id", "router_generation", "epoch", "links", "loads", "window_s", "wrong_numbers")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    ROUTER_GENERATION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_S_FIELD_NUMBER: _ClassVar[int]
    WRONG_NUMBERS_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    router_generation: int
    epoch: int
    links: _containers.RepeatedCompositeFieldContainer[LinkHealth]
    loads: _containers.RepeatedCompositeFieldContainer[ExpertLoad]
    window_s: float
    wrong_numbers: _containers.RepeatedCompositeFieldContainer[WrongNumbers]
    def __init__(self, router_id: _Optional[str] = ..., router_generation: _Optional[int] = ..., epoch: _Optional[int] = ..., links: _Optional[_Iterable[_Union[LinkHealth, _Mapping]]] = ..., loads: _Optional[_Iterable[_Union[ExpertLoad, _Mapping]]] = ..., window_s: _Optional[float] = ..., wrong_numbers: _Optional[_Iterable[_Union[WrongNumbers, _Mapping]]] = ...) -> None: ...

class ReportHealthResponse(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class ApplyRequest(_message.Message):
    __slots__ = ("spec_json", "replace")
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    spec_json: str
    replace: bool
    def __init__(self, spec_json: _Optional[str] = ..., replace: _Optional[bool] = ...) -> None: ...

class ApplyResponse(_message.Message):
    __slots__ = ("spec_revision", "differences")
    SPEC_REVISION_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCES_FIELD_NUMBER: _ClassVar[int]
    spec_revision: int
    differences: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, spec_revision: _Optional[int] = ..., differences: _Optional[_Iterable[str]] = ...) -> None: ...

class ReleaseDeviceRequest(_message.Message):
    __slots__ = ("device",)
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    device: str
    def __init__(self, device: _Optional[str] = ...) -> None: ...

class ReleaseDeviceResponse(_message.Message):
    __slots__ = ("left",)
    LEFT_FIELD_NUMBER: _ClassVar[int]
    left: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, left: _Optional[_Iterable[str]] = ...) -> None: ...

class GetClusterStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SlotStatus(_message.Message):
    __slots__ = ("model", "layer", "index", "version", "role", "state", "bytes")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    model: str
    layer: int
    index: int
    version: str
    role: Role
    state: str
    bytes: int
    def __init__(self, model: _Optional[str] = ..., layer: _Optional[int] = ..., index: _Optional[int] = ..., version: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., state: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class ActorStatus(_message.Message):
    __slots__ = ("actor_id", "generation", "state", "node_id", "address", "device", "num_slots", "capacity_bytes", "used_bytes", "slots", "reason", "since_s", "pid", "expanded_bytes", "doubt", "expanded_max_bytes", "num_unexpanded")
    ACTOR_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SINCE_S_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    EXPANDED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DOUBT_FIELD_NUMBER: _ClassVar[int]
    EXPANDED_MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_UNEXPANDED_FIELD_NUMBER: _ClassVar[int]
    actor_id: str
    generation: int
    state: str
    node_id: str
    address: str
    device: str
    num_slots: int
    capacity_bytes: int
    used_bytes: int
    slots: _containers.RepeatedCompositeFieldContainer[SlotStatus]
    reason: str
    since_s: float
    pid: int
    expanded_bytes: int
    doubt: str
    expanded_max_bytes: int
    num_unexpanded: int
    def __init__(self, actor_id: _Optional[str] = ..., generation: _Optional[int] = ..., state: _Optional[str] = ..., node_id: _Optional[str] = ..., address: _Optional[str] = ..., device: _Optional[str] = ..., num_slots: _Optional[int] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., slots: _Optional[_Iterable[_Union[SlotStatus, _Mapping]]] = ..., reason: _Optional[str] = ..., since_s: _Optional[float] = ..., pid: _Optional[int] = ..., expanded_bytes: _Optional[int] = ..., doubt: _Optional[str] = ..., expanded_max_bytes: _Optional[int] = ..., num_unexpanded: _Optional[int] = ...) -> None: ...

class ShadowMemory(_message.Message):
    __slots__ = ("model", "packed_bytes", "packed_max_bytes", "experts_bytes")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PACKED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PACKED_MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    model: str
    packed_bytes: int
    packed_max_bytes: int
    experts_bytes: int
    def __init__(self, model: _Optional[str] = ..., packed_bytes: _Optional[int] = ..., packed_max_bytes: _Optional[int] = ..., experts_bytes: _Optional[int] = ...) -> None: ...

class QuarantinedDevice(_message.Message):
    __slots__ = ("device", "reason")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    device: str
    reason: str
    def __init__(self, device: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class HotReplica(_message.Message):
    __slots__ = ("model", "layer", "index", "actor_id", "reason")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ACTOR_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    model: str
    layer: int
    index: int
    actor_id: str
    reason: str
    def __init__(self, model: _Optional[str] = ..., layer: _Optional[int] = ..., index: _Optional[int] = ..., actor_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class NodeStatus(_message.Message):
    __slots__ = ("node_id", "name", "address", "alive", "num_gpus", "since_s", "gpus")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    NUM_GPUS_FIELD_NUMBER: _ClassVar[int]
    SINCE_S_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    name: str
    address: str
    alive: bool
    num_gpus: float
    since_s: float
    gpus: _containers.RepeatedCompositeFieldContainer[GpuStatus]
    def __init__(self, node_id: _Optional[str] = ..., name: _Optional[str] = ..., address: _Optional[str] = ..., alive: _Optional[bool] = ..., num_gpus: _Optional[float] = ..., since_s: _Optional[float] = ..., gpus: _Optional[_Iterable[_Union[GpuStatus, _Mapping]]] = ...) -> None: ...

class GpuStatus(_message.Message):
    __slots__ = ("index", "device", "uuid", "name", "total_bytes", "problem", "last_xid", "last_xid_unix_s", "quarantine")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    UUID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    LAST_XID_FIELD_NUMBER: _ClassVar[int]
    LAST_XID_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    QUARANTINE_FIELD_NUMBER: _ClassVar[int]
    index: int
    device: str
    uuid: str
    name: str
    total_bytes: int
    problem: str
    last_xid: int
    last_xid_unix_s: float
    quarantine: str
    def __init__(self, index: _Optional[int] = ..., device: _Optional[str] = ..., uuid: _Optional[str] = ..., name: _Optional[str] = ..., total_bytes: _Optional[int] = ..., problem: _Optional[str] = ..., last_xid: _Optional[int] = ..., last_xid_unix_s: _Optional[float] = ..., quarantine: _Optional[str] = ...) -> None: ...

class DecisionRecord(_message.Message):
    __slots__ = ("sequence", "unix_time_s", "action", "target", "reason", "epoch")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    UNIX_TIME_S_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    unix_time_s: float
    action: str
    target: str
    reason: str
    epoch: int
    def __init__(self, sequence: _Optional[int] = ..., unix_time_s: _Optional[float] = ..., action: _Optional[str] = ..., target: _Optional[str] = ..., reason: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class RouterStatus(_message.Message):
    __slots__ = ("router_id", "generation", "address", "metrics_address", "state", "node_id", "pid")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    generation: int
    address: str
    metrics_address: str
    state: str
    node_id: str
    pid: int
    def __init__(self, router_id: _Optional[str] = ..., generation: _Optional[int] = ..., address: _Optional[str] = ..., metrics_address: _Optional[str] = ..., state: _Optional[str] = ..., node_id: _Optional[str] = ..., pid: _Optional[int] = ...) -> None: ...

class ImportProgress(_message.Message):
    __slots__ = ("model", "node_id", "num_done", "num_wanted")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_DONE_FIELD_NUMBER: _ClassVar[int]
    NUM_WANTED_FIELD_NUMBER: _ClassVar[int]
    model: str
    node_id: str
    num_done: int
    num_wanted: int
    def __init__(self, model: _Optional[str] = ..., node_id: _Optional[str] = ..., num_done: _Optional[int] = ..., num_wanted: _Optional[int] = ...) -> None: ...

class ExpertRate(_message.Message):
    __slots__ = ("model", "layer", "index", "tokens_per_s")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    model: str
    layer: int
    index: int
    tokens_per_s: float
    def __init__(self, model: _Optional[str] = ..., layer: _Optional[int] = ..., index: _Optional[int] = ..., tokens_per_s: _Optional[float] = ...) -> None: ...

class GetClusterStatusResponse(_message.Message):
    __slots__ = ("name", "state", "epoch", "spec_revision", "controller_generation", "observed_age_s", "models", "actors", "nodes", "routers", "decisions", "num_copies_wanted", "num_copies_ready", "message", "imports", "differences", "rates", "quarantined", "hot", "shadows")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SPEC_REVISION_FIELD_NUMBER: _ClassVar[int]
    CONTROLLER_GENERATION_FIELD_NUMBER: _ClassVar[int]
    OBSERVED_AGE_S_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    ACTORS_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_COPIES_WANTED_FIELD_NUMBER: _ClassVar[int]
    NUM_COPIES_READY_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    IMPORTS_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCES_FIELD_NUMBER: _ClassVar[int]
    RATES_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    HOT_FIELD_NUMBER: _ClassVar[int]
    SHADOWS_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: str
    epoch: int
    spec_revision: int
    controller_generation: int
    observed_age_s: float
    models: _containers.RepeatedCompositeFieldContainer[Model]
    actors: _containers.RepeatedCompositeFieldContainer[ActorStatus]
    nodes: _containers.RepeatedCompositeFieldContainer[NodeStatus]
    routers: _containers.RepeatedCompositeFieldContainer[RouterStatus]
    decisions: _containers.RepeatedCompositeFieldContainer[DecisionRecord]
    num_copies_wanted: int
    num_copies_ready: int
    message: str
    imports: _containers.RepeatedCompositeFieldContainer[ImportProgress]
    differences: _containers.RepeatedScalarFieldContainer[str]
    rates: _containers.RepeatedCompositeFieldContainer[ExpertRate]
    quarantined: _containers.RepeatedCompositeFieldContainer[QuarantinedDevice]
    hot: _containers.RepeatedCompositeFieldContainer[HotReplica]
    shadows: _containers.RepeatedCompositeFieldContainer[ShadowMemory]
    def __init__(self, name: _Optional[str] = ..., state: _Optional[str] = ..., epoch: _Optional[int] = ..., spec_revision: _Optional[int] = ..., controller_generation: _Optional[int] = ..., observed_age_s: _Optional[float] = ..., models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., actors: _Optional[_Iterable[_Union[ActorStatus, _Mapping]]] = ..., nodes: _Optional[_Iterable[_Union[NodeStatus, _Mapping]]] = ..., routers: _Optional[_Iterable[_Union[RouterStatus, _Mapping]]] = ..., decisions: _Optional[_Iterable[_Union[DecisionRecord, _Mapping]]] = ..., num_copies_wanted: _Optional[int] = ..., num_copies_ready: _Optional[int] = ..., message: _Optional[str] = ..., imports: _Optional[_Iterable[_Union[ImportProgress, _Mapping]]] = ..., differences: _Optional[_Iterable[str]] = ..., rates: _Optional[_Iterable[_Union[ExpertRate, _Mapping]]] = ..., quarantined: _Optional[_Iterable[_Union[QuarantinedDevice, _Mapping]]] = ..., hot: _Optional[_Iterable[_Union[HotReplica, _Mapping]]] = ..., shadows: _Optional[_Iterable[_Union[ShadowMemory, _Mapping]]] = ...) -> None: ...
