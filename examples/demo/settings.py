"""How large the demo is, and what it found."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveInt

from cluster.core.spec import ActorsSpec, AuthSpec, ClusterSpec, ModelSpec, RouterSpec, ShadowSpec, TelemetrySpec

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny_moe_lm" / "checkpoint"
EAGER_TOLERANCE_BITS = 1e-3


class DemoSettings(BaseModel):
    """Everything that may differ between `make demo` and the test that runs it small."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    out_dir: Path
    model: Path = MODEL
    num_nodes: PositiveInt = 4
    gpus_per_node: PositiveInt = 1
    num_actors: PositiveInt | None = None
    # Two actors on each of four nodes leave half of every GPU free: room for the actors of a node that is lost.
    gpus_per_actor: NonNegativeFloat = 0.25
    replicas: PositiveInt = 2
    free_slots: PositiveInt = 8
    heldout_bytes: PositiveInt = 24 << 10
    context: PositiveInt = 256
    max_new_tokens: PositiveInt = 40
    wait_s: float = 240.0
    loses_node: bool = True
    loss_tokens: PositiveInt = 160
    loss_limit_s: float = 45.0

    @property
    def trace_dir(self) -> Path:
        """Where spans are written."""
        return self.out_dir / "traces"

    @property
    def model_name(self) -> str:
        """The model as it is served for callers who accept full precision only."""
        return self.model.parent.name.replace("_", "-")

    @property
    def frugal_name(self) -> str:
        """The same weights once more, for callers who accept any copy: one replica of every expert, a shadow on another node, and the lower rungs."""
        return f"{self.model_name}-frugal"

    def models(self) -> tuple[ModelSpec, ...]:
        """What is served."""
        exact = ModelSpec(name=self.model_name, path=self.model, replicas=self.replicas)
        frugal = ModelSpec(name=self.frugal_name, path=self.model, shadow=ShadowSpec(), ladder=("shadow", "generalist", "dense", "fewer_experts"))
        return exact, frugal

    def spec(self) -> ClusterSpec:
        """The deployment: all requests are traced, and the demo's own trace context is joined."""
        return ClusterSpec(
            name="demo",
            models=self.models(),
            actors=ActorsSpec(count=self.num_actors, num_gpus=self.gpus_per_actor, free_slots=self.free_slots),
            router=RouterSpec(port=0),
            auth=AuthSpec(trusted_trace_tenants=frozenset({"default"})),
            # The demo's trace names the actors that computed; a service leaves that off, because it tells which experts a token chose.
            telemetry=TelemetrySpec(sampling_ratio=1.0, trace_dir=self.trace_dir, actor_spans=True),
        )


class DomainResult(BaseModel):
    """One domain of held-out text: bits per byte through the cluster, by the twin in this process, and by transformers itself."""

    num_tokens: int
    bits_per_byte: float
    twin_bits_per_byte: float
    eager_bits_per_byte: float
    prompt: str
    completion: str
    is_completion_equal: bool
    usage: dict[str, int]

    @property
    def is_equal(self) -> bool:
        """Whether the cluster computed what one process computes: the twin's numbers and text, and transformers' within the tolerance."""
        close = abs(self.bits_per_byte - self.eager_bits_per_byte) <= EAGER_TOLERANCE_BITS
        return self.bits_per_byte == self.twin_bits_per_byte and self.is_completion_equal and close


class LossText(BaseModel):
    """A text that was generated while a node was killed, and what its caller noticed. `None`: it did not happen, or not within the limit.

    `text_before`, `text_after`: what had been said when the node was killed, and what was said from then on. `num_same_tokens`: how far it is the twin's.
    """

    killed_at_token: int
    num_tokens: int
    error: str
    longest_stall_s: float
    usual_gap_s: float
    outcomes: dict[str, int]
    num_same_tokens: int
    text_before: str = ""
    text_after: str = ""
    num_degraded_tokens: int = 0
    first_degraded_s: float | None = None
    exact_again_s: float | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it was generated to its end, the node's death in the middle of it."""
        return not self.error and 0 < self.killed_at_token < self.num_tokens

    @property
    def is_text_equal(self) -> bool:
        """Whether one process says the same."""
        return self.num_same_tokens == self.num_tokens > 0


class NodeLoss(BaseModel):
    """A node that was killed while two texts were generated, and when everything was as before. `None`: not within the limit.

    `exact`: two replicas, nothing but full precision accepted. `frugal`: one replica and shadows, any copy accepted.
    """

    node: str
    num_killed: int
    num_failed: int
    exact: LossText
    frugal: LossText
    num_copies: int
    num_copies_wanted: int
    copies_again_s: float | None
    actors_again_s: float | None

    @property
    def is_good(self) -> bool:
        """Whether nobody noticed more than a pause and, who accepts it, a shadow's answer; and every expert has all its copies again."""
        is_exact = self.exact.is_text_equal and set(self.exact.outcomes) <= {"exact", "unused"}
        is_answered = self.num_failed == 0 and self.exact.is_whole and self.frugal.is_whole
        return is_answered and is_exact and self.copies_again_s is not None and self.frugal.exact_again_s is not None


class DemoReport(BaseModel):
    """What the demo measured; written to report.json."""

    model: str
    num_nodes: int
    num_actors: int
    outcomes: dict[str, int]
    domains: dict[str, DomainResult]
    scored_tokens_per_s: float
    generated_tokens_per_s: float
    num_spans: int
    num_traced_nodes: int
    trace_services: tuple[str, ...]
    node_loss: NodeLoss | None = None
    num_processes_left: int = 0
    seconds: dict[str, float]

    @property
    def is_good(self) -> bool:
        """Whether everything is as promised."""
        only_exact = all(count == 0 or name in {"exact", "unused"} for name, count in self.outcomes.items())
        is_whole = self.num_processes_left == 0 and self.num_spans > 0 and (self.node_loss is None or self.node_loss.is_good)
        return all(domain.is_equal for domain in self.domains.values()) and only_exact and is_whole
