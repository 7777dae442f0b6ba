"""Device memory for experts of equal shape, several to an allocation, so that one grouped matmul reaches all of them without copying weights.

A slab holds P places; tensor `name` of all of them is one tensor [P, ...]. A place is free again when the weights that used it are gone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.core.memory import IDLE_PLACES_BYTES
from cluster.core.descriptors import ExpertDescriptor

# Fewer of large experts: what lies idle in a slab is bounded, too. Their products take long enough to need no grouping.
PLACES_PER_SLAB = 8
# Slabs that are looked through for a free place; more than any actor has.
_MAX_SLABS = 4096


class Slab:
    """One allocation for `num_places` experts of one descriptor."""

    def __init__(self, descriptor: ExpertDescriptor, dtype: torch.dtype, device: torch.device, num_places: int) -> None:
        self.descriptor = descriptor
        self.device = device
        # What is allocated in inference mode may be written to in that mode only, and places are written to by whoever takes them.
        with torch.inference_mode(mode=False):
            self.tensors: dict[str, Tensor] = {
                name: torch.empty((num_places, *shape), dtype=dtype, device=device) for name, shape in descriptor.tensor_shapes().items()
            }
        self.free = list(reversed(range(num_places)))
        self.num_places = num_places


@dataclass(frozen=True, slots=True)
class SlabPlace:
    """Where an expert lies in a slab."""

    slab: Slab
    index: int

    def tensors(self) -> dict[str, Tensor]:
        """The place's own tensors, views of the slab's."""
        return {name: tensor[self.index] for name, tensor in self.slab.tensors.items()}


class Slabs:
    """The slabs of a process. Safe to call from any thread."""

    def __init__(self) -> None:
        # Reentrant: a garbage collection inside `take` may give places back.
        self._lock = threading.RLock()
        self._slabs: list[Slab] = []

    def take(self, descriptor: ExpertDescriptor, dtype: torch.dtype, device: torch.device) -> SlabPlace:
        """A place for an expert. A full slab that does not fit on the device becomes one of a single place; raises torch.OutOfMemoryError after that."""
        with self._lock:
            for slab in tuple(self._slabs):
                if slab.free and slab.descriptor == descriptor and slab.device == device:
                    return SlabPlace(slab, slab.free.pop())
            if len(self._slabs) >= _MAX_SLABS:
                message = f"{_MAX_SLABS} slabs are in use"
                raise torch.OutOfMemoryError(message)
            slab = self._new(descriptor, dtype, device)
            self._slabs.append(slab)
            return SlabPlace(slab, slab.free.pop())

    def giver(self, place: SlabPlace) -> Callable[[], None]:
        """What gives a place back; it may run during garbage collection in any thread."""
        return lambda: self._give_back(place)

    def _give_back(self, place: SlabPlace) -> None:
        with self._lock:
            place.slab.free.append(place.index)
            if len(place.slab.free) == place.slab.num_places and place.slab in self._slabs:
                self._slabs.remove(place.slab)

    @staticmethod
    def _new(descriptor: ExpertDescriptor, dtype: torch.dtype, device: torch.device) -> Slab:
        num_places = min(PLACES_PER_SLAB, 1 + IDLE_PLACES_BYTES // descriptor.num_bytes)
        slab = _fitting(descriptor, dtype, device, num_places) or Slab(descriptor, dtype, device, 1)
        if device.type == "cuda":
            # Other threads write to its places, on their streams: what this thread's stream still does in that memory must be over.
            torch.cuda.current_stream(device).synchronize()
        return slab


def _fitting(descriptor: ExpertDescriptor, dtype: torch.dtype, device: torch.device, num_places: int) -> Slab | None:
    """None when the device has no room; the part that it had room for is free again then, as it is not while the error is handled."""
    try:
        return Slab(descriptor, dtype, device, num_places)
    except torch.OutOfMemoryError:
        return None
