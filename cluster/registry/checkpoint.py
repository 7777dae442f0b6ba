"""A checkpoint folder, read expert by expert: Hugging Face safetensors (one file or a sharded index), or the custom layout of `examples/custom_moe`.

Opening reads headers only, and refuses by name what could not be served: a missing shard or expert, a wrong shape, a form of quantisation without a reader.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from pydantic import ValidationError

from cluster.core.descriptors import DType, Manifest, ModelDescriptor
from cluster.core.errors import CheckpointError, NotFound
from cluster.registry.convert import ExpertReader, as_dtype, check_gate, read_gate
from cluster.registry.describe import config_dtype, describe, family_of, gate_record, moe_layers
from cluster.registry.families import CUSTOM_LAYOUT, Layout
from cluster.registry.quantised import quant_method
from cluster.registry.tensor_files import Array, TensorFiles, read_json

CONFIG_FILE = "config.json"
MANIFEST_FILE = "moelastic.manifest.json"


class Checkpoint:
    """One opened checkpoint. Use it as a context manager; it holds its files open."""

    def __init__(self, folder: Path) -> None:
        """Open and check a folder. Raises CheckpointError, naming the file, field or tensor that keeps it from being served."""
        self.folder = folder
        self._config = read_json(folder / CONFIG_FILE)
        family = family_of(self._config)
        method = quant_method(self._config)
        moe_layers(self._config)
        self._files = TensorFiles(folder)
        try:
            self._layout = self._find_layout(family.layouts if family else (CUSTOM_LAYOUT,))
            if self._layout.mxfp4 and method != "mxfp4":
                message = f"{CONFIG_FILE}: the tensors are MXFP4, but quantization_config does not say so"
                raise CheckpointError(message)  # noqa: TRY301  # the handler below closes the files for every error
            self._reader = ExpertReader(self._files, self._layout, fp8=method == "fp8")
            self._model = self._describe("checkpoint", self._own_dtype())
            self._check_tensors()
        except BaseException:
            self._files.close()
            raise

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The same as the constructor, for reading aloud."""
        return cls(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        self._files.close()

    def descriptor(self, name: str, dtype: DType | Literal["checkpoint"] = "checkpoint") -> ModelDescriptor:
        """The model under a name, served in `dtype`; `checkpoint` keeps its own type (bf16 where it is quantised). Raises CheckpointError for a bad name."""
        return self._describe(name, self._dtype(dtype))

    def expert(self, layer: int, index: int, dtype: DType | Literal["checkpoint"] = "checkpoint") -> dict[str, Array]:
        """An expert in compute layout, named and shaped as `ExpertDescriptor.tensor_shapes()`, in `dtype` (rounded to nearest even).

        Raises NotFound for a place without an expert; CheckpointError when its bytes are no longer there or do not fit into `dtype`.
        """
        entry = self._model.layer(layer)
        if entry is None or not 0 <= index < entry.num_experts:
            message = f"the checkpoint has no expert {layer}/{index}"
            raise NotFound(message, resource="expert", name=f"{layer}/{index}")
        tensors = self._reader.read(layer, index, entry.expert)
        return {name: as_dtype(tensors[name], self._dtype(dtype), f"{name} of expert {layer}/{index}") for name in entry.expert.tensor_shapes()}

    def gate(self, layer: int, dtype: DType | Literal["checkpoint"] = "checkpoint") -> dict[str, Array]:
        """The tensors of a layer's gate in `dtype`; `correction_bias` always in fp32, as every family adds it.

        Whichever its kind has of weight [E, D], bias [E], correction_bias [E], fc1_weight [H, D], fc1_bias [H], fc2_weight [E, H], fc2_bias [E],
        position_embedding [P, D]. Raises NotFound for a layer without experts, CheckpointError as `expert` does.
        """
        entry = self._model.layer(layer)
        if entry is None:
            message = f"layer {layer} of the checkpoint has no gate"
            raise NotFound(message, resource="layer", name=str(layer))
        tensors = read_gate(self._files, self._layout, layer, entry.gate, entry.expert.hidden_size)
        own = dict.fromkeys(tensors, self._dtype(dtype)) | {"correction_bias": DType.FP32}
        return {name: as_dtype(tensor, own[name], f"{name} of the gate of layer {layer}") for name, tensor in tensors.items()}

    def shipped_manifest(self) -> Manifest | None:
        """The manifest that lies beside the weights, or None. Raises CheckpointError when it cannot be read."""
        path = self.folder / MANIFEST_FILE
        if not path.exists():
            return None
        try:
            return Manifest.model_validate(read_json(path))
        except ValidationError as error:
            message = f"{MANIFEST_FILE} is not a manifest: {error.error_count()} fields are wrong; write it again with `moelastic checkpoint manifest`"
            raise CheckpointError(message) from error

    def _dtype(self, dtype: DType | Literal["checkpoint"]) -> DType:
        return self._model.dtype if dtype == "checkpoint" else DType(dtype)

    def _describe(self, name: str, dtype: DType) -> ModelDescriptor:
        return describe(self._config, name=name, dtype=dtype, gated=self._is_gated())

    def _is_gated(self) -> bool:
        """Whether any expert has a gate projection: if one has, all must, and the first without is then named as missing."""
        gate, layers = self._layout.gate, moe_layers(self._config)
        num_experts = gate_record(self._config).num_experts
        return gate is None or any(gate.format(layer=layer, expert=index) in self._files for layer in layers for index in range(num_experts))

    def _own_dtype(self) -> DType:
        stored = self._reader.stored_dtype(moe_layers(self._config)[0])
        return stored if quant_method(self._config) else config_dtype(self._config) or stored

    def _find_layout(self, layouts: tuple[Layout, ...]) -> Layout:
        layer = moe_layers(self._config)[0]
        wanted = [layout.down.format(layer=layer, expert=0) + ("_blocks" if layout.mxfp4 else "") for layout in layouts]
        for layout, key in zip(layouts, wanted, strict=True):
            if key in self._files:
                return layout
        message = f"the checkpoint has no tensor {' or '.join(wanted)}: expert 0 of layer {layer} is missing, or its weights are in a form that is not served"
        raise CheckpointError(message)

    def _check_tensors(self) -> None:
        for entry in self._model.layers:
            check_gate(self._files, self._layout, entry.layer, entry.gate, entry.expert.hidden_size)
            for index in range(1 if self._layout.fused else entry.num_experts):
                self._reader.check(entry.layer, index, entry.num_experts, entry.expert)
