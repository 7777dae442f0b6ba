"""The architecture and its training losses: a Qwen3-MoE small enough to be trained on two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from examples.tiny_moe_lm.tokenizer import CONTEXT_TOKENS, VOCAB_SIZE

NUM_LAYERS = 4
NUM_EXPERTS = 8
NUM_EXPERTS_PER_TOKEN = 2

_SORTED_LOOP = "tiny_moe_sorted_loop"


@dataclass(frozen=True)
class Losses:
    """Means over a batch; ``utilisation_LE`` is the share of each layer's (token, choice) pairs by expert."""

    cross_entropy: Tensor
    load_balance: Tensor
    router_z: Tensor
    utilisation_LE: Tensor


def new_model(seed: int) -> Qwen3MoeForCausalLM:
    """Build the model with fresh weights; every layer is sparse."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=256,
        moe_intermediate_size=256,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=NUM_EXPERTS_PER_TOKEN,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        tie_word_embeddings=True,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return Qwen3MoeForCausalLM(config)


def use_training_experts(model: Qwen3MoeForCausalLM) -> None:
    """Switch the expert blocks to the sorted loop below, whose backward pass does little besides the matrix products."""
    ALL_EXPERTS_FUNCTIONS.register(_SORTED_LOOP, _sorted_loop)
    model.set_experts_implementation(_SORTED_LOOP)


def losses(model: Qwen3MoeForCausalLM, tokens_BT: Tensor) -> Losses:
    """Score the batch and its routers.

    Load balance is Switch Transformer's E * sum(f * P) (Fedus et al. 2021, section 2.2) for each layer by itself, then
    averaged: transformers' own loss pools the layers, which lets an expert idle in one layer and make up in another.
    Router z is the mean squared logsumexp of the router logits (Zoph et al. 2022, ST-MoE, section 3).
    """
    output = model(input_ids=tokens_BT[:, :-1], output_router_logits=True, use_cache=False)
    cross_entropy = functional.cross_entropy(output.logits.flatten(0, 1).float(), tokens_BT[:, 1:].flatten())
    balances, zs, shares = list[Tensor](), list[Tensor](), list[Tensor]()
    for logits_TE in output.router_logits:
        wide = logits_TE.float()
        probabilities = wide.softmax(dim=-1)
        chosen = probabilities.topk(NUM_EXPERTS_PER_TOKEN, dim=-1).indices
        share = torch.bincount(chosen.flatten(), minlength=NUM_EXPERTS) / chosen.numel()
        shares.append(share)
        balances.append(NUM_EXPERTS * (share * probabilities.mean(dim=0)).sum())
        zs.append(wide.logsumexp(dim=-1).square().mean())
    return Losses(cross_entropy, torch.stack(balances).mean(), torch.stack(zs).mean(), torch.stack(shares))


def _sorted_loop(self: Qwen3MoeExperts, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Sort the (token, choice) rows by expert, run each expert once, add the rows back up.

    The stacked weights are unbound once, not indexed per expert: the gradient of an index is a zero tensor of the
    whole stack for every expert.
    """
    num_tokens, num_choices = index_TK.shape
    order = index_TK.flatten().argsort()
    counts = torch.bincount(index_TK.flatten(), minlength=NUM_EXPERTS).tolist()
    rows = x_TD.index_select(0, order // num_choices)
    outputs = [
        functional.linear(functional.silu(gate) * up, down)
        for part, gate_up_weight, down in zip(torch.split(rows, counts), self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True)
        for gate, up in [functional.linear(part, gate_up_weight).chunk(2, dim=-1)]
    ]
    weighted = torch.cat(outputs) * weights_TK.flatten()[order].unsqueeze(-1)
    original = torch.empty_like(order)
    original[order] = torch.arange(order.numel())
    return weighted.index_select(0, original).view(num_tokens, num_choices, -1).sum(dim=1)
