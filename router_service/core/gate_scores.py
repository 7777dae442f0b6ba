"""From logits to choices: score functions, group limits and the choice itself, by one rule: of equal scores the lower expert index wins.

torch.topk leaves the order of ties open, so equal rows could be served by other experts from one batch to the next; here they never are.
Shape legend: T tokens, E experts, K choices of a token, G groups of experts.
"""

from __future__ import annotations

import numpy as np
import torch

from cluster.core.descriptors import GateDescriptor

NEVER = float("-inf")


def score(logits_TE: torch.Tensor, gate: GateDescriptor) -> torch.Tensor:
    """Scores [T, E] that weights are gathered from: probabilities, or the logits themselves where a gate chooses on those."""
    match gate.score:
        case "softmax":
            return torch.softmax(logits_TE, dim=-1)
        case "sigmoid":
            return torch.sigmoid(logits_TE)
        case "topk_softmax" | "sparsemixer":
            return logits_TE


def choosable(scores_TE: torch.Tensor, correction_bias_E: torch.Tensor | None, gate: GateDescriptor) -> torch.Tensor:
    """Scores [T, E] that the choice is made on: with the correction bias, and -inf outside the best groups (DeepSeek-V2 section 2.1.2, V3 section 2.1.2)."""
    choice_TE = scores_TE if correction_bias_E is None else scores_TE + correction_bias_E
    if gate.top_groups >= gate.num_groups:
        return choice_TE
    grouped_TGe = choice_TE.view(len(choice_TE), gate.num_groups, -1)
    group_TG = grouped_TGe.amax(dim=-1) if gate.group_score == "max" else grouped_TGe.topk(2, dim=-1).values.sum(dim=-1)
    kept_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(1, top_k(group_TG, gate.top_groups), value=True)
    return grouped_TGe.masked_fill(~kept_TG.unsqueeze(-1), NEVER).flatten(-2)


def top_k(scores_TE: torch.Tensor, k: int) -> torch.Tensor:
    """Indices [T, k] of the k best, best first, ties by lower index."""
    count = min(k + 1, scores_TE.shape[-1])
    values, indices = torch.topk(scores_TE, count, dim=-1)
    best = values.float().numpy()
    tied = best[:, 1:] == best[:, :-1]
    if np.count_nonzero(tied):  # several times faster than `any` on few rows
        # A stable sort is several times slower than topk, and few rows need it.
        tied_T = torch.from_numpy(tied.any(axis=-1))
        indices[tied_T] = torch.sort(scores_TE[tied_T], dim=-1, descending=True, stable=True).indices[:, :count]
    return indices[:, :k]


def weigh(scores_TE: torch.Tensor, ids_TK: torch.Tensor, gate: GateDescriptor) -> torch.Tensor:
    """Weights [T, K] of the chosen experts in the score dtype: gathered from the unbiased scores, normalised and scaled as the gate says."""
    weights_TK = scores_TE.gather(1, ids_TK)
    if gate.score == "topk_softmax":
        weights_TK = torch.softmax(weights_TK, dim=-1)
    if gate.normalize:
        total_T1 = weights_TK.sum(dim=-1, keepdim=True)
        weights_TK = weights_TK / (total_T1 + gate.normalize_eps if gate.normalize_eps else total_T1)
    return weights_TK * gate.scale if gate.scale != 1.0 else weights_TK


def sparsemixer(logits_TE: torch.Tensor, jitter_eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """PhiMoE's two choices (ids [T, 2], weights [T, 2]): the best expert, then the best of the rest, each weighed among those near it.

    Source: arXiv 2409.12136, as in transformers `phimoe.sparsemixer` at inference. The two weights need not sum to one.
    """
    first_T1 = top_k(logits_TE, 1)
    first_weight_T1 = _weight_among_near(logits_TE, logits_TE, first_T1, jitter_eps)
    rest_TE = logits_TE.scatter(-1, first_T1, NEVER)
    second_T1 = top_k(rest_TE, 1)
    second_weight_T1 = _weight_among_near(logits_TE, rest_TE, second_T1, jitter_eps)
    return torch.cat((first_T1, second_T1), dim=-1), torch.cat((first_weight_T1, second_weight_T1), dim=-1)


def _weight_among_near(logits_TE: torch.Tensor, candidates_TE: torch.Tensor, chosen_T1: torch.Tensor, jitter_eps: float) -> torch.Tensor:
    best_T1 = candidates_TE.gather(-1, chosen_T1)
    scale_TE = torch.maximum(logits_TE.abs(), best_T1)
    is_far_TE = ((best_T1 - logits_TE) / scale_TE) > (2 * jitter_eps)
    return torch.softmax(candidates_TE.masked_fill(is_far_TE, NEVER), dim=-1).gather(-1, chosen_T1)
