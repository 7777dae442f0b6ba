"""`moelastic generate`: attention, norms and gates in this process, the experts in the cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.core.errors import ConfigError
from cluster.deploy.code_digest import PROJECT_ROOT
from cluster.deploy.connection import Connection, read_token

if TYPE_CHECKING:
    from router_service.hf import ClusterExperts

EXAMPLE_MODEL = PROJECT_ROOT / "examples" / "tiny_moe_lm" / "checkpoint"


def generate_text(connection: Connection, prompt: str, *, model: Path | None, max_new_tokens: int) -> None:
    """Print the prompt and what follows, token by token, then who answered. Raises ConfigError for a folder without a model."""
    folder = model or EXAMPLE_MODEL
    tokenizer, language_model, experts = load(connection, folder)
    from transformers import TextStreamer

    experts.start_usage()
    inputs = tokenizer(prompt, return_tensors="pt")
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    language_model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer, pad_token_id=tokenizer.eos_token_id)
    outcomes = {name: count for name, count in sorted(experts.usage().outcomes.items()) if count}
    sys.stderr.write(f"choices: {', '.join(f'{name} {count}' for name, count in outcomes.items())}\n")


def load(connection: Connection, folder: Path) -> tuple[Any, Any, ClusterExperts]:
    """Tokenizer, model without its experts, and the cluster's experts in their place."""
    if not (folder / "config.json").is_file():
        message = f"{folder}: no model here (config.json is missing); give its folder with --model"
        raise ConfigError(message)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from router_service.hf import register_cluster_experts

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    experts = register_cluster_experts(connection.router_address, token=read_token(connection.token_path))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer, AutoModelForCausalLM.from_pretrained(folder, dtype="auto", experts_implementation="moelastic").eval(), experts
