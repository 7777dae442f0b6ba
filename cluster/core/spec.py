"""The one schema of a deployment: read from YAML, checked here, printed by `moelastic config schema`. Unknown keys are errors with their path."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from cluster.core.descriptors import DType

MIB = 1 << 20
Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
MAX_PORT = 65_535
Port = Annotated[int, Field(ge=0, le=MAX_PORT)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShadowSpec(_Section):
    """Shadows of a model's experts: smaller, packed copies on other nodes, which answer while an expert has no replica and a request allows it."""

    memory_fraction: float = Field(0.15, gt=0.0, le=1.0, description="packed bytes of all shadows, as a share of the bytes of one replica of every expert")
    cover: Literal["all", "useful"] = Field("all", description="all: a shadow for every expert if the share allows it; useful: where they avoid most damage")
    codecs: tuple[Literal["int2", "int3", "int4", "int8", "int2-lowrank", "lowrank", "narrow4"], ...] = Field(
        ("int2", "int3", "int4", "int2-lowrank", "lowrank", "narrow4"),
        min_length=1,
        max_length=7,
        description="how they may be packed; which expert gets which follows from the measured damage; those beyond int8 lie in a calibrated ladder file",
    )
    expanded_max: PositiveInt = Field(8, description="shadows that an actor keeps expanded to full size at once; rows for others wait for their unpacking")
    expanded_idle_s: PositiveFloat = Field(
        10.0, description="an expanded shadow makes no room for others until its replica is back, or nobody has asked for it for so long"
    )


Rung = Literal["shadow", "fewer_experts", "generalist", "dense"]


class ModelSpec(_Section):
    """One model to serve: a Hugging Face safetensors folder, or a folder in the custom layout."""

    name: Name
    path: Path
    dtype: DType | Literal["checkpoint"] = Field("checkpoint", description="element type to serve in; `checkpoint` keeps the checkpoint's own")
    replicas: PositiveInt = Field(1, description="full-precision copies of every expert, each on an actor of its own")
    shadow: ShadowSpec | None = Field(None, description="shadows of its experts; null: none are made")
    ladder: tuple[Rung, ...] = Field(
        ("shadow",),
        max_length=4,
        description="what may answer for an expert without a full-precision copy, unless a request wants EXACT; each once, tried in this order, none after"
        " the last; `shadow`, if any, comes first",
    )

    @field_validator("ladder")
    @classmethod
    def _rungs_are_in_order(cls, ladder: tuple[Rung, ...]) -> tuple[Rung, ...]:
        twice = next((rung for rung in ladder if ladder.count(rung) > 1), None)
        if twice is not None:
            message = f"{twice} stands there twice; name each rung once"
            raise ValueError(message)
        if "shadow" in ladder[1:]:
            message = "shadow must come first, if at all: copies in actors are asked before anything that a router holds; move it to the front"
            raise ValueError(message)
        return ladder


class ActorsSpec(_Section):
    """The expert actors: how many, how large, on what."""

    count: PositiveInt | None = Field(None, description="expert actors; default: one for each expert index of the widest layer")
    standby: NonNegativeInt = Field(0, description="further actors that start with free slots only")
    slots_per_actor: PositiveInt | None = Field(None, description="slots of one actor; default: what the layout needs, plus `free_slots`")
    free_slots: NonNegativeInt = Field(2, description="slots kept free in each actor, so that a lost or hot expert can be assumed at once")
    num_gpus: NonNegativeFloat = Field(0.5, description="Ray GPUs an actor asks for; fractions share one GPU")
    num_cpus: NonNegativeFloat = 0.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = Field(default=False, description="make a row's output bits independent of what shares its segment: fixed tiles of rows, slower")
    layout: Literal["mapped", "packed", "widened", "auto"] = Field(
        "mapped",
        description="mapped: as stored; packed: also reordered for the CPU's bf16 kernels, which takes less time for few rows and twice the memory,"
        " with the same bits; widened: bf16 rows by the hundred are summed in fp32 on the CPU, and their last bit may depend on how many they are;"
        " auto: whichever is faster in a trial at the start. `deterministic` goes before",
    )
    memory_bytes: PositiveInt | None = Field(None, description="device memory an actor may fill; default: its share of what is free")
    max_tokens_per_frame: PositiveInt = 4096
    frames_in_flight: PositiveInt = Field(2, description="frames a router may have under way in one actor; more rows wait and merge")
    min_overlapping_tokens: NonNegativeInt = Field(
        96,
        description="a router sends a frame beside another one only with so many rows; fewer wait and merge: experts read their weights once",
    )
    start_parallelism: PositiveInt = Field(2, description="actor processes started at a time")
    sentinel: bool = Field(
        default=True,
        description="a small process beside each actor ends its links the moment it is killed, and a thread of its own their tethers when both are;"
        " the kernel does so only when its memory is freed (Linux)",
    )
    start_timeout_s: PositiveFloat = 120.0
    drain_timeout_s: PositiveFloat = 10.0


class LinkSpec(_Section):
    """The framed stream between routers and expert actors."""

    host: str | None = Field(None, description="address to listen on; default: the node's own")
    max_frame_bytes: PositiveInt = 256 * MIB
    connect_timeout_s: PositiveFloat = 5.0
    heartbeat_s: PositiveFloat = 0.5
    tether_grace_s: PositiveFloat = Field(
        0.01, description="an actor whose tether has ended is asked at once, and given up when it says nothing for so long: its process has ended"
    )


class LivenessSpec(_Section):
    """When a router stops trusting an actor that owes it an answer: by silence and by lack of progress of its compute thread, never by idleness."""

    probe_s: PositiveFloat = Field(0.04, description="an actor that owes rows and has said nothing for so long is asked for its progress")
    suspect_s: PositiveFloat = Field(0.1, description="silent, or without progress beyond what its rows usually take, for so long: suspected")
    eject_s: PositiveFloat = Field(
        0.27, description="and for so long: ejected, and its rows are sent elsewhere; later where silences nearly as long have ended well of late"
    )
    node_window_s: PositiveFloat = Field(0.2, description="two actors of one node lost within this time: the whole node is ejected")
    first_readmit_s: PositiveFloat = Field(
        0.25, description="after a first ejection it is tried again on real rows after so long, then after twice that, and so on"
    )
    max_readmit_s: PositiveFloat = 30.0


class HedgingSpec(_Section):
    """When rows that are late are sent to another copy as well; the first success wins."""

    enabled: bool = True
    quantile: float = Field(0.99, gt=0.5, lt=1.0, description="rows later than this share of rows like them are hedged")
    min_delay_s: PositiveFloat = 0.01
    min_shadow_delay_s: PositiveFloat = Field(
        0.075,
        description="a shadow's answer is not exact: it is asked as well only when the actor that has the late rows has not advanced for so long, or they are"
        " late by four times as much",
    )
    budget_fraction: float = Field(0.05, ge=0.0, le=1.0, description="rows that may be sent a second time because they are late, as a share of all rows sent")


class AbftSpec(_Section):
    """Checksums of the experts' matrix products (algorithm-based fault tolerance), which catch flipped bits in weights and outputs."""

    fraction: float = Field(0.0625, ge=0.0, le=1.0, description="share of frames that are checked; above 0 every frame's outputs are also held against a bound")
    redigest_s: PositiveFloat = Field(300.0, description="every resident weight is digested again once in so long, in the background")


class RepairSpec(_Section):
    """What the controller does about actors that routers send nothing, about wrong numbers, and about devices that fail again and again."""

    replace_after_s: PositiveFloat = Field(1.5, description="an actor that routers have ejected and that does not answer the controller for so long is killed")
    stuck_after_s: PositiveFloat = Field(5.0, description="one that answers the controller, but is ejected and without progress for so long, is killed, too")
    give_up_after_s: PositiveFloat = Field(60.0, description="one that stays ejected for so long is killed whatever it says")
    settle_s: PositiveFloat = Field(5.0, description="further copies of an actor's experts are kept for so long after routers trust it again")
    max_replacements_per_minute: PositiveInt = Field(8, description="actors that are killed because routers ejected them, per minute")
    quarantine_failures: NonNegativeInt = Field(
        3, description="failures of a device (deaths, hangs, wrong numbers) within the window that quarantine it until `moelastic gpu release`; 0: never"
    )
    quarantine_window_s: PositiveFloat = 600.0
    stock: bool = Field(
        default=True, description="each expert also lies in the store of one further node, so that a free slot there can take it without an import"
    )


class ReplicationSpec(_Section):
    """Further replicas of hot experts in free slots, taken back when cold."""

    enabled: bool = True
    max_replicas: PositiveInt = Field(4, description="full-precision copies of one expert, those of `models[].replicas` counted")
    window_s: PositiveFloat = 1.0
    hot_share: float = Field(2.0, gt=1.0, description="an expert is hot from so many times an even share of its layer's rows, per copy ...")
    hot_queue_s: PositiveFloat = Field(0.02, description="... if rows wait so long at every actor that holds it ...")
    hot_windows: PositiveInt = Field(3, description="... for so many windows in a row")
    cold_share: float = Field(1.25, gt=0.0, description="its last further copy is taken back when the others would have less than so many even shares each ...")
    cold_windows: PositiveInt = Field(30, description="... for so many windows in a row")
    min_tokens_per_s: PositiveFloat = Field(50.0, description="experts with fewer rows than this are never hot")
    reserve_actors: NonNegativeInt = Field(1, description="free slots are left for the copies of so many lost actors")


class SchedulingSpec(_Section):
    """What the kernel is told where processes share cores: threads that answer go before those that compute. Linux; elsewhere nothing is said."""

    short_slices: bool = Field(default=True, description="routers and links run sooner when they wake, for no more of a core (Linux 6.12 and later)")
    niceness: int = Field(
        0,
        ge=0,
        le=19,
        description="processes that serve come forward to it, where the system lets them (root, CAP_SYS_NICE, RLIMIT_NICE); before, they have what Ray starts"
        " workers with, RAY_worker_niceness, so that a process that starts takes little from those that answer",
    )
    answering_niceness: int = Field(
        -5,
        ge=-20,
        le=19,
        description="of routers and of the threads of actors that answer, where the system lets them go there and this is less than `niceness`: what they do"
        " is short, and whatever waits for it, refusals too, waits for threads that compute",
    )
    compute_niceness: int = Field(
        0,
        ge=0,
        le=19,
        description="of the threads that compute experts on a CPU: more throughput while nothing else wants the cores, less for experts when something does,"
        " as processes that start",
    )


class RouterSpec(_Section):
    """The gRPC service."""

    host: str = "127.0.0.1"
    port: Port = Field(50051, description="0 picks a free port; `moelastic status` prints it")
    count: PositiveInt = Field(
        1,
        le=16,
        description="router processes behind this one address, for more cores, on Linux only: the kernel gives each new connection to one of them. Every"
        " limit of this section holds for each process",
    )
    max_message_bytes: PositiveInt = 64 * MIB
    max_inflight_bytes: PositiveInt = Field(256 * MIB, description="bytes of request messages held at once")
    max_tokens_per_request: PositiveInt = 65_536
    max_concurrent_requests: PositiveInt = 1024
    max_queued_tokens: PositiveInt = Field(262_144, description="rows waiting for a frame, over all actors; one request may have no more choices")
    max_dispatch_bytes: PositiveInt = Field(2048 * MIB, description="bytes of rows on their way to experts, over all requests; one may have a quarter")
    max_wave_calls: PositiveInt = Field(
        64, description="small calls for one layer that come while two are under way share a dispatch, traced ones apart; 1: never"
    )
    default_timeout_s: PositiveFloat = Field(30.0, description="deadline of a request that brings none")
    max_timeout_s: PositiveFloat = 600.0
    drain_timeout_s: PositiveFloat = 10.0
    reflection: Literal["auto", "on", "off"] = Field("auto", description="auto: on when `host` is a loopback address")
    metrics_port: Port = Field(0, description="Prometheus port on 127.0.0.1, further routers have the ones after it; 0 picks a free one for each")
    tls_cert: Path | None = None
    tls_key: Path | None = None

    @property
    def shares_address(self) -> bool:
        """Whether several processes listen on the one address."""
        return self.count > 1

    @model_validator(mode="after")
    def _metrics_ports_exist(self) -> Self:
        if self.metrics_port and self.metrics_port + self.count - 1 > MAX_PORT:
            message = f"metrics_port: {self.count} routers need as many ports from {self.metrics_port} on, and the last port is {MAX_PORT}; lower it, or set 0"
            raise ValueError(message)
        return self


class ControlSpec(_Section):
    """The controller: where it listens, where it keeps its records, how often it looks."""

    host: str | None = Field(None, description="address of the control service; default: the node's own")
    port: Port = 0
    state_dir: Path | None = Field(None, description="durable records; default: below Ray's session folder on the head node")
    reconcile_s: PositiveFloat = 0.25
    observe_timeout_s: PositiveFloat = 5.0


class AuthSpec(_Section):
    """Who may call. Each token lies in a file of its own; a file's content is never printed."""

    enabled: bool = True
    tokens: dict[Name, Path] = Field(default_factory=dict, description="tenant: token file; none: one tenant `default`, its token made on first start")
    trusted_trace_tenants: frozenset[Name] = Field(frozenset(), description="tenants whose trace context is joined; others' is linked")
    operators: frozenset[Name] | None = Field(None, description="tenants that see each link's queue in GetStatus; default: `default`, if it is the only one")


class TelemetrySpec(_Section):
    """Traces and metrics; nothing in them names a token's experts or holds a payload."""

    sampling_ratio: float = Field(0.01, ge=0.0, le=1.0)
    trace_dir: Path | None = Field(None, description="folder for OTLP/JSON files; none: no files are written")
    otlp_endpoint: str | None = Field(None, description="OTLP gRPC endpoint; none: nothing is exported")
    expert_load_series: bool = Field(default=False, description="per-expert load in the metrics, for operators")
    actor_spans: bool = Field(
        default=False,
        description="spans of expert actors, by name, for demos and debugging: where an actor holds one expert of a layer, they tell each token's experts",
    )


class StoreSpec(_Section):
    """The node-local expert store."""

    dir: Path | None = Field(None, description="folder on every node; default: below Ray's session folder")
    max_bytes: PositiveInt | None = None


class ClusterSpec(_Section):
    """A deployment."""

    name: Name = Field("moelastic", description="the Ray namespace; two deployments of one Ray cluster need two names")
    models: tuple[ModelSpec, ...] = Field(min_length=1, max_length=64)
    actors: ActorsSpec = ActorsSpec()
    link: LinkSpec = LinkSpec()
    liveness: LivenessSpec = LivenessSpec()
    hedging: HedgingSpec = HedgingSpec()
    abft: AbftSpec = AbftSpec()
    repair: RepairSpec = RepairSpec()
    replication: ReplicationSpec = ReplicationSpec()
    chaos: Literal["refused", "allowed"] = Field(
        "refused", description="allowed: holders of the fault token may inject faults with `moelastic chaos`; never in production"
    )
    router: RouterSpec = RouterSpec()
    scheduling: SchedulingSpec = SchedulingSpec()
    control: ControlSpec = ControlSpec()
    auth: AuthSpec = AuthSpec()
    telemetry: TelemetrySpec = TelemetrySpec()
    store: StoreSpec = StoreSpec()

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [model.name for model in self.models]
        if len(set(names)) != len(names):
            message = "models: two models have the same name; every model needs its own"
            raise ValueError(message)
        return self

    def model(self, name: str) -> ModelSpec | None:
        """The model of this name, or None."""
        return next((model for model in self.models if model.name == name), None)
