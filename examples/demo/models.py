"""The demo's three models of one checkpoint: experts in the cluster, experts of the twin, experts of transformers; and what is asked of each."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from cluster.telemetry.tracing import Tracing
from examples.demo.settings import DemoSettings, DomainResult
from examples.tiny_moe_lm.scoring import PROMPTS, bits_per_byte, heldout_texts
from router_service.client import RouterClient
from router_service.hf import ClusterExperts, register_cluster_experts

SAMPLE_SEED = 7
REPETITION_PENALTY = 1.2  # greedy, so small a model would say one thing for ever
FRUGAL = "moelastic_frugal"


@dataclass
class Clock:
    """Tokens and seconds of the cluster's share of the work."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """The rate so far."""
        return self.tokens / self.seconds if self.seconds else 0.0


def num_degraded(outcomes: Mapping[str, int]) -> int:
    """Choices that were answered, but not by a full-precision copy."""
    return sum(count for name, count in outcomes.items() if name not in {"exact", "unused"})


@dataclass
class Models:
    """One tokenizer and three models that must agree; and `frugal`, whose experts have one replica and shadows in the cluster."""

    tokenizer: Any
    remote: Any
    twin: Any
    eager: Any
    frugal: Any
    experts: ClusterExperts
    frugal_experts: ClusterExperts
    client: RouterClient
    name: str
    outcomes: Counter[str] = field(default_factory=Counter)
    scored: Clock = field(default_factory=Clock)
    generated: Clock = field(default_factory=Clock)

    @classmethod
    def load(cls, settings: DemoSettings, *, client: RouterClient) -> Models:
        """Load them all; those with remote experts load without any."""
        torch.set_num_threads(1)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        experts = register_cluster_experts(client=client, model=settings.model_name)
        frugal_experts = register_cluster_experts(client=client, model=settings.frugal_name, name=FRUGAL)

        def load(implementation: str) -> Any:  # noqa: ANN401  # transformers' models have no common type with generate()
            return AutoModelForCausalLM.from_pretrained(settings.model, dtype="auto", experts_implementation=implementation).eval()

        return cls(
            tokenizer=AutoTokenizer.from_pretrained(settings.model),
            remote=load("moelastic"),
            twin=load("moelastic_reference"),
            eager=load("eager"),
            frugal=load(FRUGAL),
            experts=experts,
            frugal_experts=frugal_experts,
            client=client,
            name=settings.model_name,
        )

    def examine(self, domain: str, settings: DemoSettings) -> DomainResult:
        """Score the domain's held-out text with all three and continue its prompt with two; the usage is the text's, by `layer/expert`."""
        text = heldout_texts()[domain].encode()[: settings.heldout_bytes].decode(errors="ignore")
        num_tokens = len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        self.experts.start_usage()
        begin_s = time.perf_counter()
        score = self._bits(self.remote, text, settings)
        self.scored.seconds += time.perf_counter() - begin_s
        self.scored.tokens += num_tokens
        usage = self.experts.usage()
        begin_s = time.perf_counter()
        ids = self._continue(self.remote, domain, settings)
        self.generated.seconds += time.perf_counter() - begin_s
        self.generated.tokens += len(ids)
        self.outcomes.update(self.experts.usage().outcomes)
        return DomainResult(
            num_tokens=num_tokens,
            bits_per_byte=score,
            twin_bits_per_byte=self._bits(self.twin, text, settings),
            eager_bits_per_byte=self._bits(self.eager, text, settings),
            prompt=PROMPTS[domain],
            completion=self.tokenizer.decode(ids, skip_special_tokens=True),
            is_completion_equal=ids == self._continue(self.twin, domain, settings),
            usage={f"{layer}/{expert}": count for (layer, expert), count in sorted(usage.choices.items())},
        )

    def accept_exact_only(self) -> None:
        """From here on the remote model takes full-precision answers only: fidelity `exact`."""
        self.experts = register_cluster_experts(client=self.client, model=self.name, fidelity="exact")

    def continue_exactly(self, model: Any, domain: str, num_tokens: int, *, streamer: Any = None) -> list[int]:  # noqa: ANN401
        """The ids of exactly this many tokens after the domain's prompt, whether the text would have ended before or not; equal logits give equal text."""
        inputs = self.tokenizer(PROMPTS[domain], return_tensors="pt")
        limits = {"min_new_tokens": num_tokens, "max_new_tokens": num_tokens}
        limits |= {"do_sample": False, "repetition_penalty": REPETITION_PENALTY}
        made = model.generate(**inputs, **limits, pad_token_id=self.tokenizer.eos_token_id, streamer=streamer)
        return [int(token) for token in made[0, inputs["input_ids"].shape[1] :]]

    def count_degraded(self) -> int:
        """Choices of one short forward pass of the frugal model that were not exact."""
        self.frugal_experts.start_usage()
        with torch.inference_mode():
            self.frugal(**self.tokenizer(PROMPTS["code"], return_tensors="pt"))
        return num_degraded(self.frugal_experts.usage().outcomes)

    def trace_one_pass(self, tracing: Tracing) -> None:
        """One short forward pass as one trace."""
        inputs = self.tokenizer(PROMPTS["code"], return_tensors="pt")
        with torch.inference_mode(), tracing.span("moe.forward", kind="client"):
            self.remote(**inputs)

    def _bits(self, model: Any, text: str, settings: DemoSettings) -> float:  # noqa: ANN401
        return bits_per_byte(model, self.tokenizer, text, context=settings.context, stride=settings.context)

    def _continue(self, model: Any, domain: str, settings: DemoSettings) -> list[int]:  # noqa: ANN401
        inputs = self.tokenizer(PROMPTS[domain], return_tensors="pt")
        # Sampled, because so small a model repeats itself when it is greedy; with the same seed equal logits give equal text.
        torch.manual_seed(SAMPLE_SEED)
        sampling = {"do_sample": True, "temperature": 0.7, "top_k": 40}
        made = model.generate(**inputs, max_new_tokens=settings.max_new_tokens, pad_token_id=self.tokenizer.eos_token_id, **sampling)
        return [int(token) for token in made[0, inputs["input_ids"].shape[1] :]]
