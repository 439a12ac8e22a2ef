"""A tree's layout for attention: which query attends to which key, as a mask, a bias or blocks.

A node's descendants directly follow it, so query q attends to key k if k <= q < last[k], where `last[k]` is the end of the
subtree of the key's node. One integer per token describes the whole tree. Shapes: T tokens of the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch.nn.attention.flex_attention import BlockMask

from tunesmith.engine.packing.tree import Node, as_numbers

#: Block size of the block mask, in queries and in keys.
BLOCK = 128


@dataclass
class Layout:
    """The tree's layout for attention; passed with the batch through the model's keyword arguments."""

    nodes: Sequence[Node]
    length: int
    _bias: torch.Tensor | None = field(default=None, repr=False)
    _blocks: BlockMask | None = field(default=None, repr=False)

    @cached_property
    def numbers(self) -> list[int]:
        """The nodes as an operator's argument."""
        return as_numbers(self.nodes)

    @cached_property
    def equal_rows(self) -> int:
        """Number of rows if all rows have the same length and share nothing, else 0."""
        size = self.length // max(1, len(self.nodes))
        equal = all(
            (node.start, node.end, node.subtree_end) == (place * size, (place + 1) * size, (place + 1) * size)
            for place, node in enumerate(self.nodes)
        )
        return len(self.nodes) if equal and size * len(self.nodes) == self.length else 0

    def mask(self, device: torch.device) -> torch.Tensor:
        """(T, T) booleans: whether the query (row) attends to the key (column)."""
        mask = torch.zeros((self.length, self.length), dtype=torch.bool)
        for node in self.nodes:
            mask[node.start : node.subtree_end, node.start : node.end] = True
        return mask.tril_().to(device)

    def bias(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """(T, T) attention bias, 0 or minus infinity; made once, so all decoder blocks save the same tensor.

        Its row stride is a multiple of 16 elements, as the memory-efficient kernel requires; else it copies it in each block.
        """
        if self._bias is None or self._bias.device != device or self._bias.dtype != dtype:
            padded = -(-self.length // 16) * 16
            bias = torch.full((self.length, padded), float("-inf"), dtype=dtype, device=device)[:, : self.length]
            self._bias = bias.masked_fill_(self.mask(device), 0)
        return self._bias

    def blocks(self, device: torch.device) -> BlockMask:
        """The same as a block mask for flex attention; made once, since all decoder blocks use it."""
        if self._blocks is None:
            self._blocks = block_mask(self.nodes, self.length, device)
        return self._blocks


def subtree_ends(nodes: Sequence[Node], length: int) -> torch.Tensor:
    """(T,) int32: for each token the end of its node's subtree, the first later query that does not attend to it."""
    last = torch.zeros(length, dtype=torch.int32)
    for node in nodes:
        last[node.start : node.end] = node.subtree_end
    return last


def block_mask(nodes: Sequence[Node], length: int, device: torch.device) -> BlockMask:
    """Which query blocks attend to which key blocks: fully, partly (decided by `last`), or not at all."""
    last = subtree_ends(nodes, length)
    count = -(-length // BLOCK)
    by_block = torch.nn.functional.pad(last, (0, count * BLOCK - length)).view(count, BLOCK)  # no query attends past the end
    first_query = torch.arange(0, count * BLOCK, BLOCK).unsqueeze(1)
    below = first_query > first_query.T
    whole = below & (first_query + BLOCK - 1 < by_block.amin(1))
    partly = (below & (first_query < by_block.amax(1)) & ~whole) | torch.eye(count, dtype=torch.bool)
    ends = last.to(device)

    def sees(_batch: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query >= key) & (query < ends[key])

    made: BlockMask = BlockMask.from_kv_blocks(
        *_ordered(partly, device), *_ordered(whole, device), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )
    return made


def _ordered(which: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For each query block the number of key blocks in `which`, and the key block indices with those in `which` first."""
    order = torch.argsort(which.int(), dim=-1, descending=True, stable=True).int()
    return which.sum(-1).int()[None, None].to(device), order[None, None].to(device)
