"""The worst five minutes: a whole node is killed while text is being generated, and the text goes on."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.cli.status_facts import StatusFacts, gather
from cluster.core.errors import FleetError, MoeError
from cluster.deploy.connection import Connection
from cluster.local.cluster import LocalCluster
from examples.demo.settings import DemoSettings, NodeLoss

if TYPE_CHECKING:
    from examples.demo.models import Models
    from router_service.client import RouterClient

PROMPT = "code"
POLL_S = 0.25
GENERATION_LIMIT_S = 120.0


@dataclass
class TokenClock:
    """When each token came; transformers hands tokens to it as to any streamer. `is_under_way` is set once `mark` of them are there."""

    mark: int
    is_under_way: threading.Event = field(default_factory=threading.Event)
    times_s: list[float] = field(default_factory=list)
    _prompt_is_over: bool = False

    def put(self, _ids: Any) -> None:  # noqa: ANN401  # transformers' own signature; the prompt comes first
        """One more token."""
        if not self._prompt_is_over:
            self._prompt_is_over = True
            return
        self.times_s.append(time.monotonic())
        if len(self.times_s) == self.mark:
            self.is_under_way.set()

    def end(self) -> None:
        """The text is complete."""

    def gaps_s(self) -> list[float]:
        """Seconds between each token and the next."""
        return [later - earlier for earlier, later in zip(self.times_s, self.times_s[1:], strict=False)]


def lose_a_node(settings: DemoSettings, cluster: LocalCluster, connection: Connection, models: Models, client: RouterClient) -> NodeLoss:
    """Generate with fidelity `exact`, SIGKILL a node in the middle of it, and watch until every expert has all its copies again.

    Raises FleetError when there is no node to lose. A generation that fails is in the result.
    """
    before = gather(connection)
    victim = choose_victim(before)
    clock = TokenClock(settings.loss_tokens // 4)
    killer = _Killer(cluster, victim["name"], clock)
    killer.start()
    error, ids = "", list[int]()
    models.experts.start_usage()
    try:
        ids = models.continue_exactly(models.remote, PROMPT, settings.loss_tokens, streamer=clock)
    except MoeError as caught:
        error = f"{type(caught).__name__}: {caught}"
    outcomes = {name: count for name, count in models.experts.usage().outcomes.items() if count}
    killer.join(GENERATION_LIMIT_S)
    if not killer.killed_s:
        message = f"{victim['name']} was not killed: {killer.error or error or 'the text ended too early'}"
        raise FleetError(message)
    failed = int(gather(connection).router.get("requests_failed", 0)) - int(before.router.get("requests_failed", 0))
    num_actors = len(before.control["actors"])
    copies, again_s, whole_s = _watch(settings, connection, client, victim["node_id"], killer.killed_s, num_actors)
    gaps = clock.gaps_s() or [0.0]
    killed_at = sum(moment < killer.killed_s for moment in clock.times_s)
    return NodeLoss(
        node=victim["name"],
        num_killed=killer.num_killed,
        killed_at_token=killed_at,
        num_tokens=len(ids),
        num_failed=failed + bool(error),
        error=error,
        longest_stall_s=max(gaps),
        usual_gap_s=sorted(gaps)[len(gaps) // 2],
        outcomes=outcomes,
        is_text_equal=ids == models.continue_exactly(models.twin, PROMPT, settings.loss_tokens),
        text_before=models.tokenizer.decode(ids[:killed_at], skip_special_tokens=True),
        text_after=models.tokenizer.decode(ids[killed_at:], skip_special_tokens=True),
        num_copies=copies,
        num_copies_wanted=int(before.control["num_copies_wanted"]),
        copies_again_s=again_s,
        actors_again_s=whole_s,
    )


def choose_victim(facts: StatusFacts) -> dict[str, Any]:
    """The node to lose: the last one that hosts expert actors and no router. Raises FleetError when there is none."""
    routers = {router["node_id"] for router in facts.control.get("routers", ())}
    hosting = {actor["node_id"] for actor in facts.control.get("actors", ())} - routers
    nodes = [node for node in facts.control.get("nodes", ()) if node["alive"] and node["node_id"] in hosting]
    if len(nodes) < 2:  # noqa: PLR2004  # one to lose and one to go on
        message = "no node can be lost: at least two must host expert actors and no router"
        raise FleetError(message)
    return dict(max(nodes, key=lambda node: str(node["name"])))


def count_copies(client: RouterClient, dead_node: str, wanted: int) -> tuple[int, bool]:
    """Copies in the router's table that are not on the dead node, and whether every expert has as many as wanted."""
    numbers: dict[tuple[int, int], int] = defaultdict(int)
    for place in client.routing_table().experts:
        numbers[place.layer, place.index] = sum(actor.node_id != dead_node for actor in place.replicas)
    return sum(numbers.values()), all(number >= wanted for number in numbers.values())


class _Killer(threading.Thread):
    """Kills the node once the text is under way."""

    def __init__(self, cluster: LocalCluster, node: str, clock: TokenClock) -> None:
        super().__init__(name="kill-node", daemon=True)
        self._cluster, self._node, self._clock = cluster, node, clock
        self.killed_s = 0.0
        self.num_killed = 0
        self.error = ""

    def run(self) -> None:
        if not self._clock.is_under_way.wait(GENERATION_LIMIT_S):
            return
        moment = time.monotonic()
        try:
            self.num_killed = len(self._cluster.kill_node(self._node))
        except FleetError as error:
            self.error = str(error)
        else:
            self.killed_s = moment


def _watch(
    settings: DemoSettings, connection: Connection, client: RouterClient, dead_node: str, killed_s: float, num_actors: int
) -> tuple[int, float | None, float | None]:
    """Copies that are left, and the seconds until all were there again, and until as many actors as before were; None: not within the limit."""
    copies, again_s = 0, None
    while (elapsed_s := time.monotonic() - killed_s) < settings.loss_limit_s:
        copies, all_there = count_copies(client, dead_node, settings.replicas)
        if all_there and again_s is None:
            again_s = elapsed_s
        if again_s is not None and _num_ready(connection, dead_node) >= num_actors:
            return copies, again_s, elapsed_s
        time.sleep(POLL_S)
    return copies, again_s, None


def _num_ready(connection: Connection, dead_node: str) -> int:
    """Actors that answer, on any other node."""
    return sum(actor["state"] == "ready" and actor["node_id"] != dead_node for actor in gather(connection).control.get("actors", ()))
