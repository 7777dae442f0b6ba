"""Score the checkpoint on held-out text beside xz, and count how evenly its experts are used.

Run ``python -m examples.tiny_moe_lm.evaluate``; it needs no download and takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import lzma
import time
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from examples.tiny_moe_lm.data import HERE
from examples.tiny_moe_lm.export import CHECKPOINT
from examples.tiny_moe_lm.scoring import PROMPTS, bits_per_byte, heldout_texts

REPORT = HERE.parent.parent / "docs" / "tiny_moe_lm" / "report.json"

_UTILISATION_WINDOW = 256
_UTILISATION_BATCH = 16


def main() -> None:
    """Print the report and write it to docs/tiny_moe_lm/report.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--report", type=Path, default=REPORT)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.checkpoint)
    model = Qwen3MoeForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    samples = heldout_texts()
    shares = utilisation(model, tokenizer, "".join(samples.values()))
    report: dict[str, object] = {
        "parameters": model.num_parameters(),
        "weights_bytes": (arguments.checkpoint / "model.safetensors").stat().st_size,
        "sample": score(model, tokenizer, samples),
        "utilisation": {domain: utilisation(model, tokenizer, text) for domain, text in samples.items()},
        "utilisation_all": shares,
        "completions": {domain: completion(model, tokenizer, prompt) for domain, prompt in PROMPTS.items()},
    }
    report["utilisation_min"] = min(min(layer) for layer in shares)
    rendered = json.dumps(report, indent=2) + "\n"
    print(rendered)
    arguments.report.write_text(rendered, encoding="utf-8")


def score(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: dict[str, str]) -> dict[str, object]:
    """Return bytes, tokens and bits per byte of the model and of xz for each domain."""
    rows: dict[str, object] = {}
    for domain, text in texts.items():
        started_s = time.monotonic()
        num_bytes = len(text.encode())
        rows[domain] = {
            "bytes": num_bytes,
            "tokens": len(tokenizer(text, verbose=False)["input_ids"]),
            "model_bits_per_byte": round(bits_per_byte(model, tokenizer, text), 4),
            "xz_bits_per_byte": round(xz_bits_per_byte(text), 4),
            "scoring_s": round(time.monotonic() - started_s, 1),
        }
        print(domain, rows[domain], flush=True)
    return rows


def xz_bits_per_byte(text: str) -> float:
    """Return what ``xz -9e`` needs: the same format, filters and preset through Python's lzma."""
    raw = text.encode()
    return 8.0 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME, check=lzma.CHECK_CRC64)) / len(raw)


def utilisation(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str) -> list[list[float]]:
    """Return, for each layer, each expert's share of the (token, choice) pairs over ``text``."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    windows = ids[: len(ids) // _UTILISATION_WINDOW * _UTILISATION_WINDOW].view(-1, _UTILISATION_WINDOW)
    num_chosen, num_experts = model.config.num_experts_per_tok, model.config.num_experts
    counts = torch.zeros(model.config.num_hidden_layers, num_experts)
    with torch.inference_mode():
        for part in torch.split(windows, _UTILISATION_BATCH):
            routers = model.model(input_ids=part, output_router_logits=True, use_cache=False).router_logits
            for layer, logits in enumerate(routers):
                chosen = logits.topk(num_chosen, dim=-1).indices
                counts[layer] += torch.bincount(chosen.flatten(), minlength=num_experts)
    shares = counts / counts.sum(dim=1, keepdim=True)
    return [[round(float(share), 4) for share in layer] for layer in shares]


def completion(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """Return the prompt continued by 48 tokens, sampled with a fixed seed."""
    torch.manual_seed(0)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=48, do_sample=True, temperature=0.7, top_k=40)
    text: str = tokenizer.decode(output[0])
    return text


if __name__ == "__main__":
    main()
