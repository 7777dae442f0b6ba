"""The plain forward computes what the served arithmetic computes, for every activation and form of expert."""

import numpy as np
import pytest
import torch

from actors.core.plain_forward import plain_forward
from actors.expert_layouts import ExpertWeights, expert_forward
from cluster.core.descriptors import DType, ExpertDescriptor

torch.set_num_threads(1)
N = 40
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
FORMS = [
    *({"activation": name, "gated": gated, "bias": bias} for name in ACTIVATIONS for gated in (True, False) for bias in (True, False)),
    {"swiglu_limit": 0.7, "bias": True},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_it_agrees_with_the_served_arithmetic_in_fp32(form: dict[str, object]) -> None:
    descriptor = ExpertDescriptor.model_validate({"hidden_size": 24, "intermediate_size": 36, "dtype": DType.FP32, **form})
    rng = np.random.default_rng(FORMS.index(form))
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in descriptor.tensor_shapes().items()}
    rows = rng.standard_normal((N, 24)).astype(np.float32)
    weights = ExpertWeights(descriptor, {name: torch.from_numpy(array) for name, array in tensors.items()}, 0, 0)
    expected = expert_forward(torch.from_numpy(rows), weights).numpy()
    found = plain_forward(descriptor, rows, tensors)
    assert found.dtype == np.float32
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
    assert np.linalg.norm(expected) > 0
