"""A process that holds the shipped language model and generates when told: one JSON command per line on stdin, one JSON answer per line on stdout.

With a router's address its experts are the cluster's; without one they are transformers' own, in this process.
{"do": "generate", "experts": "eager", "batch": 16, "new_tokens": 32}    {"wall_s": ..., "tokens": ...}
{"do": "logits", "experts": "eager", "path": "logits.npy"}               the next-token logits of a fixed text, to be compared
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from cluster.cli.generate import EXAMPLE_MODEL
from router_service.hf import register_cluster_experts

PROMPT = "The old house at the end of the road had been empty for years, and"


class Language:
    """The model, with its experts computed in one way or several, and its tokenizer."""

    def __init__(self, threads: int, experts: list[str]) -> None:
        torch.set_num_threads(threads)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self._tokenizer = AutoTokenizer.from_pretrained(EXAMPLE_MODEL)
        self._models = {name: AutoModelForCausalLM.from_pretrained(EXAMPLE_MODEL, dtype="auto", experts_implementation=name).eval() for name in experts}

    def generate(self, experts: str, batch: int, new_tokens: int) -> dict[str, Any]:
        """Greedily, exactly so many tokens for every text of the batch."""
        inputs = self._tokenizer([PROMPT] * batch, return_tensors="pt")
        begun_s = time.perf_counter()
        with torch.inference_mode():
            limits = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
            made = self._models[experts].generate(**inputs, **limits, do_sample=False, pad_token_id=self._tokenizer.eos_token_id)
        return {"wall_s": time.perf_counter() - begun_s, "tokens": int(made.shape[1] - inputs["input_ids"].shape[1]) * batch}

    def logits(self, experts: str, path: str) -> dict[str, Any]:
        """Logits [T, V] of the prompt, in fp32."""
        with torch.inference_mode():
            found = self._models[experts](**self._tokenizer(PROMPT, return_tensors="pt")).logits[0].float()
        np.save(path, found.numpy())
        return {}


def main() -> None:
    """Load the model, say so, obey until stdin ends."""
    address, token_file, threads, experts = sys.argv[1:5]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if address:
        register_cluster_experts(address, token=Path(token_file).read_text().strip())
    language = Language(int(threads), experts.split(","))
    sys.stdout.flush()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        reply = {"generate": language.generate, "logits": language.logits}[command.pop("do")](**command)
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
