"""Score a language model on the held-out samples through the plain transformers interface.

Nothing here knows how the experts are computed, so the same call scores a local model, one whose experts are remote,
and one that is being served degraded; equal inputs give equal windows in equal order.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

DOMAINS = ("code", "prose", "markup")

PROMPTS: dict[str, str] = {
    "code": 'def read_lines(path):\n    """Return the lines of a file."""\n    ',
    "prose": "The morning was fine, and Elizabeth had no sooner entered the room than ",
    "markup": ".. function:: open(path, mode='r')\n\n   Open the file and return a ",
}
"""One short prompt for each domain, for demonstrations of generate()."""

_HELDOUT = Path(__file__).parent / "heldout"


def heldout_texts() -> dict[str, str]:
    """Return the committed held-out samples by domain."""
    return {domain: (_HELDOUT / f"{domain}.txt").read_bytes().decode("utf-8") for domain in DOMAINS}


def bits_per_byte(
    model: Any,  # noqa: ANN401 (any causal model of transformers, or a stand-in with the same call)
    tokenizer: Any,  # noqa: ANN401
    text: str,
    *,
    context: int = 256,
    stride: int | None = None,
    batch: int = 8,
) -> float:
    """Return the bits that ``model`` needs for each UTF-8 byte of ``text``, scoring every token once.

    Windows of ``context`` tokens advance by ``stride`` (default: half the context); a token is scored in the first
    window that holds it, so all but the first window's tokens see at least ``context - stride`` tokens before them.
    The text starts after one end-of-text token. Raises ValueError for an empty text or a stride outside 1..context.
    """
    stride = context // 2 if stride is None else stride
    if not text:
        message = "text is empty: there is no byte to score"
        raise ValueError(message)
    if not 1 <= stride <= context:
        message = f"stride must be from 1 to context ({context})"
        raise ValueError(message)
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    tokens = torch.tensor([tokenizer.bos_token_id, *ids], device=model.device)
    nats = 0.0
    windows = scored_windows(len(tokens) - 1, context, stride)
    with torch.inference_mode():
        for first in range(0, len(windows), batch):
            nats += _negative_log_likelihood(model, tokens, windows[first : first + batch])
    return nats / math.log(2.0) / len(text.encode())


def scored_windows(num_targets: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """Return (start, end, first scored target) for each window; all windows have the same length.

    The last window is moved left to end with the text instead of being padded.
    """
    length = min(context, num_targets)
    windows, scored = [(0, length, 0)], length
    while scored < num_targets:
        end = min(scored + stride, num_targets)
        windows.append((end - length, end, scored))
        scored = end
    return windows


def _negative_log_likelihood(model: Any, tokens: Tensor, windows: list[tuple[int, int, int]]) -> float:  # noqa: ANN401
    inputs = torch.stack([tokens[start:end] for start, end, _ in windows])
    targets = torch.stack([tokens[start + 1 : end + 1] for start, end, _ in windows])
    logits = model(input_ids=inputs).logits.float()
    nats = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return sum(float(row[first - start :].double().sum()) for row, (start, _, first) in zip(nats, windows, strict=True))
