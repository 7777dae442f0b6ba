"""One call of the plug-in: what it sends and what it gives back, over a client that only notes and answers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from cluster.core.descriptors import DType
from cluster.core.errors import ConfigError, InferenceOnly, InvalidRequest, NotFound
from router_service.client_types import LayerInfo, ModelInfo, Reply, RoutingReport, ServiceLimits
from router_service.hf import ClusterExperts, register_cluster_experts, stamp_layers

D, E, LAYER = 8, 4, 3
BF16 = (DType.BF16, DType.FP32)


@use_experts_implementation
class Experts(nn.Module):
    """An experts module as transformers' classes are: decorated, and told its config."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts = config.num_experts

    def forward(self, *_: torch.Tensor) -> torch.Tensor:
        raise AssertionError


@dataclass
class NotingClient:
    """Serves what it is told to, answers twice the rows, and keeps what it was sent."""

    served: dict[str, ModelInfo]
    sent: list[dict[str, Any]] = field(default_factory=list)

    def model(self, name: str = "") -> ModelInfo:
        if not name and len(self.served) != 1:
            message = "several models are served"
            raise InvalidRequest(message)
        if name and name not in self.served:
            message = f"model {name!r} is not served here"
            raise NotFound(message)
        return self.served[name or next(iter(self.served))]

    def status(self) -> Any:
        return SimpleNamespace(models=[SimpleNamespace(name=name) for name in self.served])

    def dispatch(self, rows: torch.Tensor, **options: Any) -> Reply:
        self.sent.append({"rows": rows, **options})
        return Reply(rows * 2, RoutingReport({"exact": rows.shape[0]}, 1, 0), "r")

    def close(self) -> None:
        return


def info(name: str, *, layers: tuple[int, ...] = (LAYER,), experts: int = E, width: int = D, **fields: Any) -> ModelInfo:
    entries = tuple(LayerInfo(layer, experts, 2, width, 4, "linear", "softmax", "silu") for layer in layers)
    values = {"family": "x", "dtype": DType.BF16, "dtypes": BF16, "limits": ServiceLimits(1 << 20, 1000, 60.0), "manifest": "", "models": (name,)}
    return ModelInfo(name=name, layers=entries, **{**values, **fields})


@dataclass
class Rig:
    client: NotingClient
    remote: ClusterExperts
    module: Experts

    def __call__(self, num_rows: int = 3, *, ids: torch.Tensor | None = None, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> torch.Tensor:
        rows = torch.randn(num_rows, D, dtype=dtype).requires_grad_(grad)
        chosen = torch.tensor([[0, 2]] * num_rows) if ids is None else ids
        return self.module(rows, chosen, torch.full(chosen.shape, 0.5))


@pytest.fixture
def rig() -> Iterator[Callable[..., Rig]]:
    """Makes a registration over some served models, and one experts module of a model loaded from `path`."""

    def make(*served: ModelInfo, path: str = "", model: str | None = None, name: str = "moelastic-noting", **config: Any) -> Rig:
        client = NotingClient({item.name: item for item in served or (info("only"),)})
        remote = register_cluster_experts(client=client, model=model, name=name)
        facts = SimpleNamespace(num_experts=E, _experts_implementation=name, _name_or_path=path, **config)
        holder = nn.ModuleDict({"layers": nn.ModuleList([nn.Identity()] * LAYER + [Experts(facts)])})
        assert stamp_layers(holder) == 1
        return Rig(client, remote, holder["layers"][LAYER])

    return make


def test_a_call_sends_rows_choices_and_fp32_weights_and_returns_the_rows_type(rig: Callable[..., Rig]) -> None:
    made = rig()
    output = made(5)
    (sent,) = made.client.sent
    assert (sent["model"], sent["layer"], sent["fidelity"]) == ("only", LAYER, "any")
    ids, weights = sent["top_k"]
    assert (ids.dtype, weights.dtype, output.dtype, output.shape) == (torch.int32, torch.float32, torch.bfloat16, (5, D))
    assert torch.equal(output, sent["rows"] * 2)


def test_ids_of_no_expert_are_sent_as_unused(rig: Callable[..., Rig]) -> None:
    made = rig()
    made(2, ids=torch.tensor([[E, 1], [3, -5]]))
    assert made.client.sent[0]["top_k"][0].tolist() == [[-1, 1], [3, -1]]


def test_no_rows_are_answered_without_a_call(rig: Callable[..., Rig]) -> None:
    made = rig()
    assert made(0).shape == (0, D)
    assert made.client.sent == []


def test_rows_of_a_type_that_is_not_served_travel_in_fp32(rig: Callable[..., Rig]) -> None:
    made = rig()
    output = made(3, dtype=torch.float16)
    assert made.client.sent[0]["rows"].dtype == torch.float32
    assert output.dtype == torch.float16
    assert torch.equal(output, (made.client.sent[0]["rows"] * 2).half())


def test_calls_are_cut_below_the_limits_of_bytes_tokens_and_choices(rig: Callable[..., Rig]) -> None:
    row_bytes = D * 2 + 2 * 8
    by_bytes = rig(info("m", limits=ServiceLimits(40 * row_bytes, 1000, 60.0)))
    whole = by_bytes(100)
    assert [len(sent["rows"]) for sent in by_bytes.client.sent] == [36, 36, 28]
    assert torch.equal(whole, torch.cat([sent["rows"] for sent in by_bytes.client.sent]) * 2)
    by_tokens = rig(info("m", limits=ServiceLimits(1 << 20, 60, 60.0)))
    by_tokens(100)
    assert [len(sent["rows"]) for sent in by_tokens.client.sent] == [60, 40]
    by_choices = rig(info("m", limits=ServiceLimits(1 << 20, 1000, 60.0, 80)))
    by_choices(100)
    assert [len(sent["rows"]) for sent in by_choices.client.sent] == [40, 40, 20]
    one_by_one = rig(info("m", limits=ServiceLimits(1, 1000, 60.0)))
    one_by_one(2)
    assert len(one_by_one.client.sent) == 2


def test_usage_counts_requests_tokens_and_choices_once_started(rig: Callable[..., Rig]) -> None:
    made = rig(info("m", limits=ServiceLimits(1 << 20, 2, 60.0)))
    made(3)
    assert made.remote.usage().requests == 0
    made.remote.start_usage()
    made(3, ids=torch.tensor([[0, 1], [0, E], [2, 0]]))
    usage = made.remote.usage()
    assert (usage.requests, usage.tokens, usage.outcomes["exact"]) == (2, 3, 3)
    assert usage.choices == {(LAYER, 0): 3, (LAYER, 1): 1, (LAYER, 2): 1}
    usage.choices.clear()
    assert made.remote.usage().choices


def test_a_forward_works_with_gradients_on_and_a_backward_says_inference_only(rig: Callable[..., Rig]) -> None:
    made = rig()
    output = made(3, grad=True)
    assert output.requires_grad
    with pytest.raises(InferenceOnly, match="no backward pass"):
        output.sum().backward()
    with torch.no_grad():
        assert not made(3, grad=True).requires_grad


def test_a_model_is_found_by_the_last_part_of_its_path(rig: Callable[..., Rig]) -> None:
    made = rig(info("a"), info("b"), path="/models/b/")
    made()
    assert made.client.sent[0]["model"] == "b"


def test_the_only_served_model_that_fits_needs_no_name(rig: Callable[..., Rig]) -> None:
    served = [info("other-layers", layers=(0, 1)), info("more-experts", experts=8), info("wider", width=16), info("right")]
    made = rig(*served, path="/models/mine")
    made()
    assert made.client.sent[0]["model"] == "right"


def test_config_and_registration_name_the_model_the_registration_first(rig: Callable[..., Rig]) -> None:
    by_config = rig(info("a"), info("b"), path="/models/a", moelastic_model="b")
    by_config()
    assert by_config.client.sent[0]["model"] == "b"
    by_registration = rig(info("a"), info("b"), path="/models/b", moelastic_model="b", model="a")
    by_registration()
    assert by_registration.client.sent[0]["model"] == "a"


def test_a_model_that_cannot_be_told_is_refused_with_the_names_there_are(rig: Callable[..., Rig]) -> None:
    with pytest.raises(ConfigError, match=r"several served models fit \(a, b\).*pass model=NAME.*served: a, b, c"):
        rig(info("a"), info("b"), info("c", width=16))()
    with pytest.raises(ConfigError, match=r"no served model fits layer 3 of this model \(4 experts, width 8\).*served: c"):
        rig(info("c", width=16))()


@pytest.mark.parametrize(
    ("served", "match"),
    [
        (info("mine", width=16), "has 4 experts of width 16, this model's has 4 of width 8"),
        (info("mine", experts=8), "has 8 experts of width 8, this model's has 4"),
        (info("mine", layers=(0, 5)), "has no MoE layer 3; its MoE layers are 0, 5"),
    ],
)
def test_a_named_model_that_does_not_fit_is_refused_even_where_another_fits(rig: Callable[..., Rig], served: ModelInfo, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        rig(served, info("right"), path="/models/mine")()
    with pytest.raises(ConfigError, match=match):
        rig(served, info("right"), model="mine")()


def test_a_named_model_that_is_not_served_is_not_found(rig: Callable[..., Rig]) -> None:
    with pytest.raises(NotFound, match="'gone' is not served"):
        rig(model="gone")()


def test_a_model_may_move_between_two_registrations(rig: Callable[..., Rig]) -> None:
    first = rig(info("a"), name="moelastic-first")
    second = rig(info("b"), name="moelastic-second")
    first()
    first.module.config._experts_implementation = "moelastic-second"
    first()
    assert [sent["model"] for sent in first.client.sent] == ["a"]
    assert [sent["model"] for sent in second.client.sent] == ["b"]
