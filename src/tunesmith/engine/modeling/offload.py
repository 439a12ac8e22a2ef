"""Activations kept in host memory between forward and backward pass, so the GPU holds those of only one or two blocks.

(Rhu et al. 2016, arXiv 1602.08124.) They are copied on the compute stream, in order, through pinned memory.
"""

from __future__ import annotations

from typing import Any

import torch

#: Smaller tensors stay on the device: the memory is not worth the copy.
SMALLEST = 1 << 20


class ActivationOffload(torch.autograd.graph.saved_tensors_hooks):
    """A context in which autograd's saved tensors are moved to `store`, and copied back when the backward pass uses them.

    Parameters stay where they are (autograd saves them too), as do tensors of less than `smallest` bytes. Tensors already on
    `store` stay as well, unless `always` is set, for tests on one device. `offloaded_bytes` counts the bytes moved.
    """

    def __init__(self, model: torch.nn.Module, *, store: str = "cpu", smallest: int = SMALLEST, always: bool = False) -> None:
        self.store, self.smallest, self.always = torch.device(store), smallest, always
        self.offloaded_bytes = 0
        self._held = {_place(tensor) for tensor in (*model.parameters(), *model.buffers())}
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | tuple[torch.device, torch.Tensor]:
        size = tensor.numel() * tensor.element_size()
        here = tensor.device.type == self.store.type and not self.always
        if here or size < self.smallest or _place(tensor) in self._held:
            return tensor
        self.offloaded_bytes += size
        pinned = tensor.device.type == "cuda"
        kept = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.store, pin_memory=pinned)
        return tensor.device, kept.copy_(tensor.detach(), non_blocking=pinned)

    def _unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        device, kept = packed
        back: torch.Tensor = kept.to(device, non_blocking=True)
        return back


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
