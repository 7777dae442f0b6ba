"""Quantised checkpoints, expanded to bf16: MXFP4 as GPT-OSS ships it, FP8 in 128x128 blocks as DeepSeek-V3 ships it. Any other form is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cluster.core.errors import CheckpointError

MXFP4_BLOCK = 32
FP8_BLOCK = 128
BF16 = np.dtype(ml_dtypes.bfloat16)

# E2M1: sign, two exponent bits, one mantissa bit (OCP Microscaling Formats 1.0, section 5.3.3); the index is the nibble.
_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0], np.float32)
_E2M1_PAIRS = np.stack([np.tile(_E2M1, 16), np.repeat(_E2M1, 16)], axis=-1)
_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_E8M0_BIAS = 127
# The largest value is 6 = 1.5 * 2**2, so a scale of 2**125 is the last that stays finite in bf16; 255 is NaN.
_E8M0_MAX = 252


def quant_method(config: Mapping[str, Any]) -> str | None:
    """`mxfp4`, `fp8` or None for a checkpoint that is not quantised. Raises CheckpointError for every other form."""
    section = config.get("quantization_config")
    if section is None:
        return None
    method = section.get("quant_method") if isinstance(section, dict) else None
    if method == "mxfp4":
        return "mxfp4"
    if method == "fp8" and section.get("weight_block_size") == [FP8_BLOCK, FP8_BLOCK] and section.get("fmt", "e4m3") == "e4m3":
        return "fp8"
    message = f"config.json: quant_method {method!r} is not served; use mxfp4, fp8 (e4m3 in {FP8_BLOCK}x{FP8_BLOCK} blocks), or weights that are not quantised"
    raise CheckpointError(message)


def expand_mxfp4(blocks: NDArray[np.uint8], scales: NDArray[np.uint8], key: str) -> NDArray[Any]:
    """Blocks [out, in/32, 16] of two E2M1 nibbles a byte, low one first, and E8M0 scales [out, in/32], to bf16 [out, in]: exact.

    Raises CheckpointError when a scale is NaN or beyond bf16.
    """
    if (scales > _E8M0_MAX).any():
        message = f"{key}_scales holds a scale that is NaN or larger than bf16 can express"
        raise CheckpointError(message)
    out, groups, _ = blocks.shape
    places = (scales.astype(np.uint16) << 8)[:, :, None] | blocks
    values: NDArray[Any] = _mxfp4_pairs().take(places).view(BF16)
    return values.reshape(out, groups * MXFP4_BLOCK)


@cache
def _mxfp4_pairs() -> NDArray[np.uint32]:
    """For each scale and byte, at scale * 256 + byte, the two bf16 values that they stand for, side by side."""
    exponents = np.arange(_E8M0_MAX + 1) - _E8M0_BIAS
    return np.ldexp(_E2M1_PAIRS, exponents[:, None, None]).astype(BF16).view(np.uint32).reshape(-1)


def expand_fp8(weight: NDArray[Any], scale_inv: NDArray[np.float32]) -> NDArray[Any]:
    """Weight [out, in] in E4M3 times its 128x128 block's scale [ceil(out/128), ceil(in/128)], to bf16 [out, in].

    The product is taken in fp32 and rounded once, to nearest even.
    """
    out, width = weight.shape
    rows = np.repeat(scale_inv, FP8_BLOCK, axis=0)[:out]
    expanded = np.empty((out, width), BF16)
    # One band of blocks at a time: the fp32 copies stay small beside the expert.
    for begin in range(0, out, FP8_BLOCK):
        band = slice(begin, begin + FP8_BLOCK)
        expanded[band] = _E4M3[weight[band].view(np.uint8)] * np.repeat(rows[band], FP8_BLOCK, axis=1)[:, :width]
    return expanded
