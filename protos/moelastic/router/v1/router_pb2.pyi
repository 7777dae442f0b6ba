from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    D_TYPE_UNSPECIFIED: _ClassVar[DType]
    D_TYPE_BF16: _ClassVar[DType]
    D_TYPE_FP16: _ClassVar[DType]
    D_TYPE_FP32: _ClassVar[DType]
    D_TYPE_INT32: _ClassVar[DType]
    D_TYPE_UINT32: _ClassVar[DType]
    D_TYPE_UINT8: _ClassVar[DType]

class Fidelity(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FIDELITY_UNSPECIFIED: _ClassVar[Fidelity]
    FIDELITY_EXACT: _ClassVar[Fidelity]

class ReportLevel(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPORT_LEVEL_UNSPECIFIED: _ClassVar[ReportLevel]
    REPORT_LEVEL_COUNTS: _ClassVar[ReportLevel]
    REPORT_LEVEL_PLAN: _ClassVar[ReportLevel]

class Overflow(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OVERFLOW_UNSPECIFIED: _ClassVar[Overflow]
    OVERFLOW_DROP: _ClassVar[Overflow]
    OVERFLOW_NEXT_BEST: _ClassVar[Overflow]

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_EXACT: _ClassVar[Outcome]
    OUTCOME_SHADOW: _ClassVar[Outcome]
    OUTCOME_OMITTED: _ClassVar[Outcome]
    OUTCOME_GENERALIST: _ClassVar[Outcome]
    OUTCOME_DENSE: _ClassVar[Outcome]
    OUTCOME_DROPPED: _ClassVar[Outcome]
    OUTCOME_UNUSED: _ClassVar[Outcome]
D_TYPE_UNSPECIFIED: DType
D_TYPE_BF16: DType
D_TYPE_FP16: DType
D_TYPE_FP32: DType
D_TYPE_INT32: DType
D_TYPE_UINT32: DType
D_TYPE_UINT8: DType
FIDELITY_UNSPECIFIED: Fidelity
FIDELITY_EXACT: Fidelity
REPORT_LEVEL_UNSPECIFIED: ReportLevel
REPORT_LEVEL_COUNTS: ReportLevel
REPORT_LEVEL_PLAN: ReportLevel
OVERFLOW_UNSPECIFIED: Overflow
OVERFLOW_DROP: Overflow
OVERFLOW_NEXT_BEST: Overflow
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_EXACT: Outcome
OUTCOME_SHADOW: Outcome
OUTCOME_OMITTED: Outcome
OUTCOME_GENERALIST: Outcome
OUTCOME_DENSE: Outcome
OUTCOME_DROPPED: Outcome
OUTCOME_UNUSED: Outcome

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "data")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class GateRouting(_message.Message):
    __slots__ = ("positions", "overflow", "capacity_factor")
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    OVERFLOW_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FACTOR_FIELD_NUMBER: _ClassVar[int]
    positions: Tensor
    overflow: Overflow
    capacity_factor: float
    def __init__(self, positions: _Optional[_Union[Tensor, _Mapping]] = ..., overflow: _Optional[_Union[Overflow, str]] = ..., capacity_factor: _Optional[float] = ...) -> None: ...

class TopKRouting(_message.Message):
    __slots__ = ("expert_ids", "weights")
    EXPERT_IDS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    expert_ids: Tensor
    weights: Tensor
    def __init__(self, expert_ids: _Optional[_Union[Tensor, _Mapping]] = ..., weights: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class DispatchRequest(_message.Message):
    __slots__ = ("request_id", "model", "layer", "hidden_states", "gate", "top_k", "fidelity", "report")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    GATE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    layer: int
    hidden_states: Tensor
    gate: GateRouting
    top_k: TopKRouting
    fidelity: Fidelity
    report: ReportLevel
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., layer: _Optional[int] = ..., hidden_states: _Optional[_Union[Tensor, _Mapping]] = ..., gate: _Optional[_Union[GateRouting, _Mapping]] = ..., top_k: _Optional[_Union[TopKRouting, _Mapping]] = ..., fidelity: _Optional[_Union[Fidelity, str]] = ..., report: _Optional[_Union[ReportLevel, str]] = ...) -> None: ...

class RoutingReport(_message.Message):
    __slots__ = ("exact", "shadow", "omitted", "generalist", "dense", "dropped", "unused", "epoch", "degraded_tokens", "plan")
    EXACT_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    OMITTED_FIELD_NUMBER: _ClassVar[int]
    GENERALIST_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    UNUSED_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    exact: int
    shadow: int
    omitted: int
    generalist: int
    dense: int
    dropped: int
    unused: int
    epoch: int
    degraded_tokens: int
    plan: RoutingPlan
    def __init__(self, exact: _Optional[int] = ..., shadow: _Optional[int] = ..., omitted: _Optional[int] = ..., generalist: _Optional[int] = ..., dense: _Optional[int] = ..., dropped: _Optional[int] = ..., unused: _Optional[int] = ..., epoch: _Optional[int] = ..., degraded_tokens: _Optional[int] = ..., plan: _Optional[_Union[RoutingPlan, _Mapping]] = ...) -> None: ...

class RoutingPlan(_message.Message):
    __slots__ = ("expert_ids", "weights", "outcomes", "version_index", "generations", "attempts", "versions")
    EXPERT_IDS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    VERSION_INDEX_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    expert_ids: Tensor
    weights: Tensor
    outcomes: Tensor
    version_index: Tensor
    generations: Tensor
    attempts: Tensor
    versions: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, expert_ids: _Optional[_Union[Tensor, _Mapping]] = ..., weights: _Optional[_Union[Tensor, _Mapping]] = ..., outcomes: _Optional[_Union[Tensor, _Mapping]] = ..., version_index: _Optional[_Union[Tensor, _Mapping]] = ..., generations: _Optional[_Union[Tensor, _Mapping]] = ..., attempts: _Optional[_Union[Tensor, _Mapping]] = ..., versions: _Optional[_Iterable[bytes]] = ...) -> None: ...

class DispatchResponse(_message.Message):
    __slots__ = ("hidden_states", "report")
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    hidden_states: Tensor
    report: RoutingReport
    def __init__(self, hidden_states: _Optional[_Union[Tensor, _Mapping]] = ..., report: _Optional[_Union[RoutingReport, _Mapping]] = ...) -> None: ...

class DispatchStreamRequest(_message.Message):
    __slots__ = ("start", "chunk")
    START_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    start: DispatchRequest
    chunk: bytes
    def __init__(self, start: _Optional[_Union[DispatchRequest, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class DispatchStreamResponse(_message.Message):
    __slots__ = ("start", "chunk")
    START_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    start: DispatchResponse
    chunk: bytes
    def __init__(self, start: _Optional[_Union[DispatchResponse, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class MoeLayer(_message.Message):
    __slots__ = ("layer", "num_experts", "top_k", "hidden_size", "intermediate_size", "gate_kind", "gate_score", "activation")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    INTERMEDIATE_SIZE_FIELD_NUMBER: _ClassVar[int]
    GATE_KIND_FIELD_NUMBER: _ClassVar[int]
    GATE_SCORE_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    layer: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    gate_kind: str
    gate_score: str
    activation: str
    def __init__(self, layer: _Optional[int] = ..., num_experts: _Optional[int] = ..., top_k: _Optional[int] = ..., hidden_size: _Optional[int] = ..., intermediate_size: _Optional[int] = ..., gate_kind: _Optional[str] = ..., gate_score: _Optional[str] = ..., activation: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_message_bytes", "max_tokens_per_request", "max_timeout_s", "max_choices_per_request")
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MAX_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    MAX_CHOICES_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    max_message_bytes: int
    max_tokens_per_request: int
    max_timeout_s: float
    max_choices_per_request: int
    def __init__(self, max_message_bytes: _Optional[int] = ..., max_tokens_per_request: _Optional[int] = ..., max_timeout_s: _Optional[float] = ..., max_choices_per_request: _Optional[int] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("name", "family", "dtype", "layers", "dtypes", "limits", "manifest", "models")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    DTYPES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    name: str
    family: str
    dtype: DType
    layers: _containers.RepeatedCompositeFieldContainer[MoeLayer]
    dtypes: _containers.RepeatedScalarFieldContainer[DType]
    limits: Limits
    manifest: str
    models: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., family: _Optional[str] = ..., dtype: _Optional[_Union[DType, str]] = ..., layers: _Optional[_Iterable[_Union[MoeLayer, _Mapping]]] = ..., dtypes: _Optional[_Iterable[_Union[DType, str]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., manifest: _Optional[str] = ..., models: _Optional[_Iterable[str]] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ModelStatus(_message.Message):
    __slots__ = ("name", "num_experts", "num_missing")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    NUM_MISSING_FIELD_NUMBER: _ClassVar[int]
    name: str
    num_experts: int
    num_missing: int
    def __init__(self, name: _Optional[str] = ..., num_experts: _Optional[int] = ..., num_missing: _Optional[int] = ...) -> None: ...

class LinkStatus(_message.Message):
    __slots__ = ("actor_id", "generation", "node_id", "address", "state", "queued_tokens", "frames_in_flight", "last_heard_age_s")
    ACTOR_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FRAMES_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    LAST_HEARD_AGE_S_FIELD_NUMBER: _ClassVar[int]
    actor_id: str
    generation: int
    node_id: str
    address: str
    state: str
    queued_tokens: int
    frames_in_flight: int
    last_heard_age_s: float
    def __init__(self, actor_id: _Optional[str] = ..., generation: _Optional[int] = ..., node_id: _Optional[str] = ..., address: _Optional[str] = ..., state: _Optional[str] = ..., queued_tokens: _Optional[int] = ..., frames_in_flight: _Optional[int] = ..., last_heard_age_s: _Optional[float] = ...) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("state", "epoch", "table_age_s", "router_generation", "controller_connected", "models", "links", "requests_total", "tokens_total", "requests_failed", "uptime_s", "latency_s_p50", "latency_s_p99", "tokens_per_s", "outcomes")
    STATE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TABLE_AGE_S_FIELD_NUMBER: _ClassVar[int]
    ROUTER_GENERATION_FIELD_NUMBER: _ClassVar[int]
    CONTROLLER_CONNECTED_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FAILED_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    LATENCY_S_P50_FIELD_NUMBER: _ClassVar[int]
    LATENCY_S_P99_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    state: str
    epoch: int
    table_age_s: float
    router_generation: int
    controller_connected: bool
    models: _containers.RepeatedCompositeFieldContainer[ModelStatus]
    links: _containers.RepeatedCompositeFieldContainer[LinkStatus]
    requests_total: int
    tokens_total: int
    requests_failed: int
    uptime_s: float
    latency_s_p50: float
    latency_s_p99: float
    tokens_per_s: float
    outcomes: RoutingReport
    def __init__(self, state: _Optional[str] = ..., epoch: _Optional[int] = ..., table_age_s: _Optional[float] = ..., router_generation: _Optional[int] = ..., controller_connected: _Optional[bool] = ..., models: _Optional[_Iterable[_Union[ModelStatus, _Mapping]]] = ..., links: _Optional[_Iterable[_Union[LinkStatus, _Mapping]]] = ..., requests_total: _Optional[int] = ..., tokens_total: _Optional[int] = ..., requests_failed: _Optional[int] = ..., uptime_s: _Optional[float] = ..., latency_s_p50: _Optional[float] = ..., latency_s_p99: _Optional[float] = ..., tokens_per_s: _Optional[float] = ..., outcomes: _Optional[_Union[RoutingReport, _Mapping]] = ...) -> None: ...

class GetRoutingTableRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RoutingTableActor(_message.Message):
    __slots__ = ("actor_id", "generation", "node_id", "device")
    ACTOR_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    actor_id: str
    generation: int
    node_id: str
    device: str
    def __init__(self, actor_id: _Optional[str] = ..., generation: _Optional[int] = ..., node_id: _Optional[str] = ..., device: _Optional[str] = ...) -> None: ...

class RoutingTableExpert(_message.Message):
    __slots__ = ("model", "layer", "index", "replicas", "shadows", "version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    SHADOWS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    layer: int
    index: int
    replicas: _containers.RepeatedScalarFieldContainer[int]
    shadows: _containers.RepeatedScalarFieldContainer[int]
    version: bytes
    def __init__(self, model: _Optional[str] = ..., layer: _Optional[int] = ..., index: _Optional[int] = ..., replicas: _Optional[_Iterable[int]] = ..., shadows: _Optional[_Iterable[int]] = ..., version: _Optional[bytes] = ...) -> None: ...

class GetRoutingTableResponse(_message.Message):
    __slots__ = ("epoch", "actors", "experts")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ACTORS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    actors: _containers.RepeatedCompositeFieldContainer[RoutingTableActor]
    experts: _containers.RepeatedCompositeFieldContainer[RoutingTableExpert]
    def __init__(self, epoch: _Optional[int] = ..., actors: _Optional[_Iterable[_Union[RoutingTableActor, _Mapping]]] = ..., experts: _Optional[_Iterable[_Union[RoutingTableExpert, _Mapping]]] = ...) -> None: ...
