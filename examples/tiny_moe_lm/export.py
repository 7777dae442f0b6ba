"""Export the newest training state as a standard Hugging Face folder with a model card.

Run ``python -m examples.tiny_moe_lm.export``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_model
from transformers import GenerationConfig, PreTrainedTokenizerFast

from examples.tiny_moe_lm.data import HERE
from examples.tiny_moe_lm.model import new_model
from examples.tiny_moe_lm.tokenizer import FOLDER
from examples.tiny_moe_lm.train import RUN, STATE

CHECKPOINT = HERE / "checkpoint"

_CARD = """---
language: en
library_name: transformers
tags: [moe, qwen3_moe, tiny]
---
# tiny_moe_lm

A {parameters:,}-parameter Qwen3-MoE language model (4 layers, 8 experts each, 2 per token, context {context} tokens,
byte-level BPE of {vocabulary} tokens), trained from scratch on two CPU cores to have something real to serve. It saw
{tokens_seen:,} tokens. It writes text in the shape of its three domains and knows nothing; do not use it for facts.

Held-out bits per byte, the comparison with xz and the commands are in `docs/tiny_moe_lm/README.md`.

## Training text

Python {python}'s standard library and these Debian packages (hashes and splits in `manifest.json` beside the code):

| domain | package | version | licence |
|---|---|---|---|
{sources}

The prose is old novels, the King James Bible and dictionaries of computing; the model repeats their words and views.
"""


def main() -> None:
    """Write the checkpoint folder, replacing what was there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=RUN, help="folder of the training run")
    parser.add_argument("--to", type=Path, default=CHECKPOINT)
    arguments = parser.parse_args()
    export(arguments.run / STATE, arguments.to)


def export(state: Path, folder: Path) -> None:
    """Save weights in bf16, tokenizer, generation settings and card; whole or not at all."""
    model = new_model(seed=0)
    load_model(model, state)
    with safe_open(state, framework="pt") as file:
        tokens_seen = int(file.metadata()["tokens_seen"])
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(FOLDER)
    tokenizer.model_max_length = model.config.max_position_embeddings
    scratch = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    card = _CARD.format(
        parameters=model.num_parameters(),
        context=model.config.max_position_embeddings,
        vocabulary=model.config.vocab_size,
        tokens_seen=tokens_seen,
        **_provenance(),
    )
    (scratch / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def _provenance() -> dict[str, str]:
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    rows = ["| {domain} | {package} | {version} | {licence} |".format(**source) for source in manifest["sources"]]
    return {"python": manifest["python"], "sources": "\n".join(rows)}


if __name__ == "__main__":
    main()
