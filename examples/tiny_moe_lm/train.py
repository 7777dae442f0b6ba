"""Train the model for a fixed stretch of wall-clock time; checkpoint as it goes, so a good state always exists.

Run ``python -m examples.tiny_moe_lm.train --max-minutes 75``.

The learning rate follows the clock, not the step count: a machine that is shared or slow still anneals to the end.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_model
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from examples.tiny_moe_lm.data import DATA, DOCUMENT_SEPARATOR, DOMAINS
from examples.tiny_moe_lm.model import losses, new_model, use_training_experts
from examples.tiny_moe_lm.tokenizer import END_OF_TEXT, FOLDER

RUN = DATA / "run"
STATE = "state.safetensors"
DOMAIN_SHARE = {"code": 0.36, "prose": 0.30, "markup": 0.34}

_LOAD_BALANCE_WEIGHT = 0.02
_ROUTER_Z_WEIGHT = 1e-3
_WARMUP_FRACTION = 0.02
_FINAL_RATE_FRACTION = 0.04
_MAX_GRADIENT_NORM = 1.0
_LOG_EVERY_STEPS = 10
_CHECKPOINT_EVERY_S = 180.0


@dataclass(frozen=True)
class Settings:
    """What one run may change from the command line."""

    max_minutes: float
    batch: int
    sequence_tokens: int
    peak_rate: float
    threads: int
    seed: int
    folder: Path


class WindowStream:
    """Endless shuffled windows over one domain's tokens; every pass shifts where the windows begin."""

    def __init__(self, tokens: NDArray[np.uint16], window: int, generator: np.random.Generator) -> None:
        """Cut ``tokens`` into windows of ``window`` tokens, in an order drawn from ``generator``."""
        self._tokens, self._window, self._generator = tokens, window, generator
        self._starts = iter(self._passes())

    def take(self, count: int) -> NDArray[np.int64]:
        """Return the next ``count`` windows as [count, window]."""
        rows = [self._tokens[start : start + self._window] for start in (next(self._starts) for _ in range(count))]
        return np.stack(rows).astype(np.int64)

    def _passes(self) -> Iterator[int]:
        while True:
            shift = int(self._generator.integers(self._window))
            starts = np.arange(shift, len(self._tokens) - self._window, self._window)
            self._generator.shuffle(starts)
            yield from (int(start) for start in starts)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-minutes", type=float, default=75.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sequence-tokens", type=int, default=256)
    parser.add_argument("--peak-rate", type=float, default=2.5e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=RUN)
    settings = Settings(**vars(parser.parse_args()))
    torch.set_num_threads(settings.threads)
    settings.folder.mkdir(parents=True, exist_ok=True)
    model = new_model(settings.seed)
    use_training_experts(model)
    with (settings.folder / "log.jsonl").open("w", encoding="utf-8") as log:
        train(model, batches(settings), settings, log)


def train(model: Qwen3MoeForCausalLM, stream: Iterator[Tensor], settings: Settings, log: TextIO) -> None:
    """Run AdamW until the time is spent; write a log line every few steps and a checkpoint every few minutes."""
    optimizer = _optimizer(model)
    started_s = saved_s = time.monotonic()
    tokens_seen = 0
    model.train()
    for step, tokens in enumerate(stream):
        spent = (time.monotonic() - started_s) / (60.0 * settings.max_minutes)
        if spent >= 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = settings.peak_rate * rate_fraction(spent)
        result = losses(model, tokens)
        total = result.cross_entropy + _LOAD_BALANCE_WEIGHT * result.load_balance + _ROUTER_Z_WEIGHT * result.router_z
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens_seen += tokens.shape[0] * (tokens.shape[1] - 1)
        if step % _LOG_EVERY_STEPS == 0:
            record = {
                "step": step,
                "tokens": tokens_seen,
                "elapsed_s": round(time.monotonic() - started_s, 1),
                "rate": optimizer.param_groups[0]["lr"],
                "cross_entropy": round(result.cross_entropy.item(), 4),
                "load_balance": round(result.load_balance.item(), 4),
                "router_z": round(result.router_z.item(), 4),
                "utilisation": [[round(share, 4) for share in layer] for layer in result.utilisation_LE.tolist()],
            }
            log.write(json.dumps(record) + "\n")
            log.flush()
        if time.monotonic() - saved_s > _CHECKPOINT_EVERY_S:
            save_state(model, settings.folder, tokens_seen)
            saved_s = time.monotonic()
    save_state(model, settings.folder, tokens_seen)


def rate_fraction(spent: float) -> float:
    """Learning rate as a fraction of its peak after ``spent`` (0 to 1) of the time: linear warm-up, cosine decay."""
    if spent < _WARMUP_FRACTION:
        return max(spent, 1e-3) / _WARMUP_FRACTION
    progress = (spent - _WARMUP_FRACTION) / (1.0 - _WARMUP_FRACTION)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return _FINAL_RATE_FRACTION + (1.0 - _FINAL_RATE_FRACTION) * cosine


def batches(settings: Settings) -> Iterator[Tensor]:
    """Return [batch, sequence + 1] token tensors without end, each row's domain drawn by DOMAIN_SHARE.

    The text is read and encoded before this returns, so that it does not count against the training time.
    """
    generator = np.random.default_rng(settings.seed)
    streams = [WindowStream(encoded(domain), settings.sequence_tokens + 1, generator) for domain in DOMAINS]
    return _drawn(streams, settings.batch, generator)


def _drawn(streams: list[WindowStream], batch: int, generator: np.random.Generator) -> Iterator[Tensor]:
    shares = [DOMAIN_SHARE[domain] for domain in DOMAINS]
    while True:
        counts = generator.multinomial(batch, shares)
        rows = [stream.take(int(count)) for stream, count in zip(streams, counts, strict=True) if count]
        yield torch.from_numpy(np.concatenate(rows))


def encoded(domain: str) -> NDArray[np.uint16]:
    """Return a domain's training text as tokens, an end-of-text token after each document; cached on disk."""
    path = DATA / f"{domain}.tokens.npy"
    if not path.exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(FOLDER)
        documents = (DATA / f"{domain}.train.txt").read_text(encoding="utf-8").split(DOCUMENT_SEPARATOR)
        rows = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
        end = [tokenizer.convert_tokens_to_ids(END_OF_TEXT)]
        np.save(path, np.concatenate([np.asarray(row + end, dtype=np.uint16) for row in rows]))
    tokens: NDArray[np.uint16] = np.load(path)
    return tokens


def save_state(model: Qwen3MoeForCausalLM, folder: Path, tokens_seen: int) -> None:
    """Write the weights beside the old ones and swap them in, so that a killed run leaves a whole file."""
    scratch = folder / "state.tmp"
    save_model(model, str(scratch), metadata={"tokens_seen": str(tokens_seen)})
    scratch.replace(folder / STATE)


def _optimizer(model: Qwen3MoeForCausalLM) -> torch.optim.AdamW:
    """Weight decay on matrices only: norms and the router stay free."""
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith("mlp.gate.weight")]
    free = [p for name, p in model.named_parameters() if p.ndim < 2 or name.endswith("mlp.gate.weight")]  # noqa: PLR2004
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


if __name__ == "__main__":
    main()
