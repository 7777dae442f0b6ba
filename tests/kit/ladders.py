"""Ladder files without a calibration: fallbacks and shadows of random weights, fitting a checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from actors.core.codecs import CODECS, decode, encode
from actors.expert_blob import digest_of
from actors.expert_blob import encode as encode_blob
from cluster.core.descriptors import DType, ExpertDescriptor
from cluster.core.ladder_record import SHIPPED, WITHOUT, LadderRecord, LadderShadow
from cluster.registry.checkpoint import Checkpoint
from cluster.registry.convert import NUMPY_DTYPES
from cluster.registry.ladder_file import write_ladder
from router_service.calibration.shadows import inputs_of

INNER = 4


def add_ladder(folder: Path, *, rungs: tuple[str, ...] = ("generalist", "dense"), codec: str | None = "int2", seed: int = 0) -> LadderRecord:
    """Write a ladder beside a checkpoint; its shadows, of the first expert of every layer, are compensated for random rows. Returns the record."""
    rng = np.random.default_rng(seed)
    tensors, generalists, experts, shadows, damage = {}, {}, {}, {}, {}
    with Checkpoint.open(folder) as checkpoint:
        model = checkpoint.descriptor("m")
        dtype = NUMPY_DTYPES[model.dtype]
        for entry in model.layers:
            width = entry.expert.hidden_size
            narrow = ExpertDescriptor(hidden_size=width, intermediate_size=INNER, dtype=model.dtype)
            shapes = {"generalist": narrow.tensor_shapes(), "dense": {"weight": (width, width)}}
            for rung in rungs:
                tensors |= {
                    f"{rung}.{entry.layer}.{name}": (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(dtype) for name, shape in shapes[rung].items()
                }
            generalists[str(entry.layer)] = narrow
            for index in range(entry.num_experts):
                primary = checkpoint.expert(entry.layer, index, model.dtype)
                key = f"{entry.layer}/{index}"
                experts[key] = digest_of(encode_blob(entry.expert, primary))
                if codec is not None and index == 0:
                    rows = rng.standard_normal((256, width)).astype(np.float32) * np.geomspace(1.0, 0.05, width, dtype=np.float32)
                    packed = encode(entry.expert, primary, CODECS[codec], inputs_of(entry.expert, rows))
                    assert any((decode(packed)[name] != decode(encode(entry.expert, primary, CODECS[codec]))[name]).any() for name in primary)
                    tensors |= {f"shadow.{entry.layer}.{index}.{name}": array for name, array in packed.tensors.items()}
                    shadows[key] = LadderShadow(codec=CODECS[codec], relative_error=0.25, cosine=0.96)
                    damage[key] = {WITHOUT: 1.0, "int2": 0.1, "int3": 0.05, "int4": 0.01, SHIPPED: 0.06}
    record = LadderRecord(
        dtype=DType(model.dtype),
        experts=experts,
        generalists=generalists if "generalist" in rungs else {},
        dense=tuple(entry.layer for entry in model.layers) if "dense" in rungs else (),
        shadows=shadows,
        damage=damage,
    )
    write_ladder(folder, record, tensors)
    return record
