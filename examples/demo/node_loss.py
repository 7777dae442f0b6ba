"""The worst five minutes: a whole node is killed while text is being generated, and the text goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.cli.status_facts import StatusFacts, gather
from cluster.core.errors import FleetError, MoeError
from cluster.deploy.connection import Connection
from cluster.local.cluster import LocalCluster
from examples.demo.settings import DemoSettings, LossText, NodeLoss

if TYPE_CHECKING:
    from examples.demo.models import Models
    from router_service.client import RouterClient
    from router_service.hf import ClusterExperts

PROMPT = "prose"
POLL_S = 0.25
GENERATION_LIMIT_S = 120.0


@dataclass
class TokenClock:
    """When each token came, and how many choices were degraded by then; transformers hands tokens to it as to any streamer.

    `is_under_way` is set once `mark` of them are there.
    """

    mark: int
    count_degraded: Callable[[], int] = int
    is_under_way: threading.Event = field(default_factory=threading.Event)
    times_s: list[float] = field(default_factory=list)
    degraded: list[int] = field(default_factory=list)
    _prompt_is_over: bool = False

    def put(self, _ids: Any) -> None:  # noqa: ANN401  # transformers' own signature; the prompt comes first
        """One more token."""
        if not self._prompt_is_over:
            self._prompt_is_over = True
            return
        self.times_s.append(time.monotonic())
        self.degraded.append(self.count_degraded())
        if len(self.times_s) == self.mark:
            self.is_under_way.set()

    def end(self) -> None:
        """The text is complete."""

    def gaps_s(self) -> list[float]:
        """Seconds between each token and the next."""
        return [later - earlier for earlier, later in zip(self.times_s, self.times_s[1:], strict=False)]

    def degraded_s(self, since_s: float) -> list[float]:
        """When tokens came of which a choice was degraded, as seconds after `since_s`."""
        grown = [now > before for before, now in zip([0, *self.degraded], self.degraded, strict=False)]
        return [moment - since_s for moment, is_degraded in zip(self.times_s, grown, strict=True) if is_degraded and moment > since_s]


class Writer:
    """Generates one text, like any caller."""

    def __init__(self, models: Models, model: Any, experts: ClusterExperts, num_tokens: int) -> None:  # noqa: ANN401
        from examples.demo.models import num_degraded

        self._models, self._model, self._experts, self._num_tokens = models, model, experts, num_tokens
        self.clock = TokenClock(num_tokens // 4, lambda: num_degraded(experts.usage().outcomes))
        self._ids: list[int] = []
        self._outcomes: dict[str, int] = {}
        self.error = ""

    def run(self) -> None:
        """Until the text is complete; a request that fails ends it, and is told."""
        self._experts.start_usage()
        try:
            self._ids = self._models.continue_exactly(self._model, PROMPT, self._num_tokens, streamer=self.clock)
        except MoeError as caught:
            self.error = f"{type(caught).__name__}: {caught}"
        self._outcomes = {name: count for name, count in self._experts.usage().outcomes.items() if count}

    def told(self, killed_s: float, twin: Sequence[int]) -> LossText:
        """What its caller noticed. `twin` are the tokens that one process says."""
        gaps, degraded_s = self.clock.gaps_s() or [0.0], self.clock.degraded_s(killed_s)
        killed_at = sum(moment < killed_s for moment in self.clock.times_s)
        decode = self._models.tokenizer.decode
        return LossText(
            killed_at_token=killed_at,
            num_tokens=len(self._ids),
            error=self.error,
            longest_stall_s=max(gaps),
            usual_gap_s=sorted(gaps)[len(gaps) // 2],
            outcomes=self._outcomes,
            num_same_tokens=num_same(self._ids, twin),
            text_before=decode(self._ids[:killed_at], skip_special_tokens=True),
            text_after=decode(self._ids[killed_at:], skip_special_tokens=True),
            num_degraded_tokens=len(degraded_s),
            first_degraded_s=degraded_s[0] if degraded_s else None,
            exact_again_s=degraded_s[-1] if degraded_s else 0.0,
        )


def lose_a_node(settings: DemoSettings, cluster: LocalCluster, connection: Connection, models: Models, client: RouterClient) -> NodeLoss:
    """Generate two texts, one exactly and one from any copy, SIGKILL a node in the middle of both, and watch until all is as before.

    Raises FleetError when there is no node to lose. A generation that fails is in the result.
    """
    before = gather(connection)
    exact = Writer(models, models.remote, models.experts, settings.loss_tokens)
    frugal = Writer(models, models.frugal, models.frugal_experts, settings.loss_tokens)
    loss = _Loss(settings, cluster, connection, client, before, (exact.clock, frugal.clock))
    loss.start()
    with ThreadPoolExecutor(2) as threads:
        for future in [threads.submit(writer.run) for writer in (exact, frugal)]:
            future.result()
    if not loss.has_killed.wait(GENERATION_LIMIT_S):
        message = f"{loss.node} was not killed: {loss.error or exact.error or frugal.error or 'the text ended too early'}"
        raise FleetError(message)
    again_s = _exact_again_s(settings, models, loss.killed_s)
    failed = int(gather(connection).router.get("requests_failed", 0)) - int(before.router.get("requests_failed", 0))
    twin = models.continue_exactly(models.twin, PROMPT, settings.loss_tokens)
    told = frugal.told(loss.killed_s, twin)
    if again_s != 0.0:
        told = told.model_copy(update={"exact_again_s": again_s})
    loss.join(2 * settings.loss_limit_s)
    return NodeLoss(
        node=loss.node,
        num_killed=loss.num_killed,
        num_failed=failed + bool(exact.error) + bool(frugal.error),
        exact=exact.told(loss.killed_s, twin),
        frugal=told,
        num_copies=loss.num_copies,
        num_copies_wanted=loss.num_copies_wanted,
        copies_again_s=loss.copies_again_s,
        actors_again_s=loss.actors_again_s,
    )


def num_same(ids: Sequence[int], twin: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next((number for number, (ours, theirs) in enumerate(zip(ids, twin, strict=False)) if ours != theirs), min(len(ids), len(twin)))


def choose_victim(facts: StatusFacts) -> dict[str, Any]:
    """The node to lose: the last one that hosts expert actors and no router. Raises FleetError when there is none."""
    routers = {router["node_id"] for router in facts.control.get("routers", ())}
    hosting = {actor["node_id"] for actor in facts.control.get("actors", ())} - routers
    nodes = [node for node in facts.control.get("nodes", ()) if node["alive"] and node["node_id"] in hosting]
    if len(nodes) < 2:  # noqa: PLR2004  # one to lose and one to go on
        message = "no node can be lost: at least two must host expert actors and no router"
        raise FleetError(message)
    return dict(max(nodes, key=lambda node: str(node["name"])))


def count_copies(client: RouterClient, dead_node: str, replicas: Mapping[str, int]) -> int:
    """Full-precision copies in the router's table that are not on the dead node; of each expert no more than its model's `replicas`."""
    experts = client.routing_table().experts
    return sum(min(replicas[place.model], sum(actor.node_id != dead_node for actor in place.replicas)) for place in experts)


class _Loss(threading.Thread):
    """Kills the node once every text is under way, and watches until all is as before; what is not within the limit stays None."""

    def __init__(
        self,
        settings: DemoSettings,
        cluster: LocalCluster,
        connection: Connection,
        client: RouterClient,
        before: StatusFacts,
        clocks: Sequence[TokenClock],
    ) -> None:
        super().__init__(name="lose-node", daemon=True)
        self._settings, self._cluster, self._connection, self._client, self._clocks = settings, cluster, connection, client, clocks
        self._replicas = {model.name: model.replicas for model in settings.models()}
        self._num_actors = len(before.control["actors"])
        victim = choose_victim(before)
        self.node, self._node_id = str(victim["name"]), str(victim["node_id"])
        self.num_copies_wanted = self.num_copies = count_copies(client, "", self._replicas)
        self.has_killed = threading.Event()
        self.killed_s = 0.0
        self.num_killed = 0
        self.copies_again_s: float | None = None
        self.actors_again_s: float | None = None
        self.error = ""

    def run(self) -> None:
        if not all(clock.is_under_way.wait(GENERATION_LIMIT_S) for clock in self._clocks):
            return
        self.killed_s = time.monotonic()
        try:
            self.num_killed = len(self._cluster.kill_node(self.node))
            self.has_killed.set()
            self._watch()
        except MoeError as error:
            self.error = str(error)

    def _watch(self) -> None:
        """Every expert has its copies again; then, every actor is replaced."""
        while (elapsed_s := time.monotonic() - self.killed_s) < self._settings.loss_limit_s:
            self.num_copies = count_copies(self._client, self._node_id, self._replicas)
            if self.copies_again_s is None and self.num_copies == self.num_copies_wanted:
                self.copies_again_s = elapsed_s
            if self.copies_again_s is not None and self._num_ready() >= self._num_actors:
                self.actors_again_s = elapsed_s
                return
            time.sleep(POLL_S)

    def _num_ready(self) -> int:
        """Actors that answer, on any other node."""
        actors = gather(self._connection).control.get("actors", ())
        return sum(actor["state"] == "ready" and actor["node_id"] != self._node_id for actor in actors)


def _exact_again_s(settings: DemoSettings, models: Models, killed_s: float) -> float | None:
    """When the frugal model's answers were exact again, if its text ended before that; 0.0: they were by then. None: not within the limit."""
    again_s = 0.0
    while models.count_degraded():
        again_s = time.monotonic() - killed_s
        if again_s > settings.loss_limit_s:
            return None
        time.sleep(POLL_S)
    return again_s
