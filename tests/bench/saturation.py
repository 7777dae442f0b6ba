"""Where one router is full, from its CPU time for each request, and what a cluster of 64 GPUs would ask of routers and links: arithmetic, not measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.settings import Sizes
from bench.tables import Section, Table

NUM_GPUS = 64
BF16_BYTES = 2


@dataclass(frozen=True, slots=True)
class Load:
    """What one GPU's experts can take, as rows (a token's choice of one expert) per second, and the width of a row."""

    name: str
    rows_per_s: float
    hidden_size: int
    top_k: int


# A Mixtral-sized expert: 4096 x 14336 gated bf16 is 352 MFLOP for each row and 352 MB to read; an H100 has 989 TFLOP/s and 3.35 TB/s.
_FLOP_PER_ROW, _BYTES_OF_EXPERT = 6 * 4096 * 14336, 3 * 2 * 4096 * 14336
LOADS = (
    Load("H100, large batches, 40 % of its peak", 0.4 * 989e12 / _FLOP_PER_ROW, 4096, 2),
    Load("H100, decoding, 64 rows for each read of an expert", 64 * 3.35e12 / _BYTES_OF_EXPERT, 4096, 2),
    Load("H100, decoding, 4 rows for each read of an expert", 4 * 3.35e12 / _BYTES_OF_EXPERT, 4096, 2),
)


def wire_bytes(hidden_size: int, top_k: int) -> int:
    """Bytes of one token through a router: in and out at the caller's side, K times out and in at the experts' side."""
    return BF16_BYTES * hidden_size * 2 * (1 + top_k)


def saturation_tables(measured: Mapping[str, tuple[int, float, float]], sizes: Sizes) -> Section:
    """From (tokens of a request, tokens/s, router CPU seconds of a request) by case."""
    per_token = wire_bytes(sizes.hidden_size, sizes.top_k)
    rows, data = [], {}
    full_bytes_per_s = 0.0
    for name, (tokens, tokens_per_s, cpu_s) in measured.items():
        busy = cpu_s * tokens_per_s / tokens
        full_tokens_per_s = tokens / cpu_s if cpu_s else float("inf")
        full_bytes_per_s = max(full_bytes_per_s, full_tokens_per_s * per_token)
        data[name] = {"tokens_per_s": tokens_per_s, "router_cores": busy, "tokens_per_s_of_a_full_core": full_tokens_per_s}
        rows.append((name, f"{tokens_per_s:,.0f}", f"{busy:.2f}", f"{full_tokens_per_s:,.0f}", f"{full_tokens_per_s * per_token / 1e6:,.0f}"))
    note = f"Callers and actors share the cores, so a router gets less than one; the last two columns are tokens and {per_token} bytes of each by its CPU time."
    columns = ("callers x tokens", "tokens/s", "router cores", "tokens/s of a full core", "MB/s of a full core")
    needs = [_need(load, full_bytes_per_s) for load in LOADS]
    text = "Arithmetic from the largest MB/s above; every layer's rows pass a router twice on each side. A raw-bytes or RDMA data path would lift this limit."
    needed = Table(
        f"what {NUM_GPUS} GPUs would ask for",
        ("each GPU", "token-layers/s in all", "GB/s through routers", "full router cores", "Gbit/s of each GPU's link"),
        needs,
        text,
    )
    return Section([Table("one router at its limit", columns, rows, note), needed], data | {"bytes_per_s_of_a_full_core": full_bytes_per_s})


def _need(load: Load, router_bytes_per_s: float) -> tuple[str, ...]:
    tokens_per_s = NUM_GPUS * load.rows_per_s / load.top_k
    all_bytes_per_s = tokens_per_s * wire_bytes(load.hidden_size, load.top_k)
    link_bits_per_s = load.rows_per_s * load.hidden_size * BF16_BYTES * 8
    routers = all_bytes_per_s / router_bytes_per_s
    return (load.name, f"{tokens_per_s:,.0f}", f"{all_bytes_per_s / 1e9:,.1f}", f"{routers:,.0f}", f"{link_bits_per_s / 1e9:,.1f} each way")
