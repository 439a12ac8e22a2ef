"""A tree's layout, as attention needs it: which query sees which key, as a mask, a bias or blocks.

Descendants of a node follow it directly, so a query q sees a key k where k <= q < last[k], `last` being the end of the subtree
of the key's node: one number a token says all of the tree. Shapes: T tokens of the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch.nn.attention.flex_attention import BlockMask

from tunesmith.engine.packing.tree import Node, as_numbers

#: Queries, and keys, of a block that is computed as a whole or not at all.
BLOCK = 128


@dataclass
class Layout:
    """What attention needs to know of a tree; travels with the batch through the model's keyword arguments."""

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
        """How many rows of one length the sequence consists of; 0 where lengths differ, or rows share something."""
        size = self.length // max(1, len(self.nodes))
        equal = all(
            (node.start, node.end, node.subtree_end) == (place * size, (place + 1) * size, (place + 1) * size)
            for place, node in enumerate(self.nodes)
        )
        return len(self.nodes) if equal and size * len(self.nodes) == self.length else 0

    def mask(self, device: torch.device) -> torch.Tensor:
        """(T, T) booleans: whether the query of a row sees the key of a column."""
        mask = torch.zeros((self.length, self.length), dtype=torch.bool)
        for node in self.nodes:
            mask[node.start : node.subtree_end, node.start : node.end] = True
        return mask.tril_().to(device)

    def bias(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """(T, T) numbers to add to scores, 0 or minus infinity; made once, so that all blocks keep the same tensor.

        Its rows lie a multiple of 16 numbers apart, as the memory-efficient kernel wants; else it copies them in each block.
        """
        if self._bias is None or self._bias.device != device or self._bias.dtype != dtype:
            padded = -(-self.length // 16) * 16
            bias = torch.full((self.length, padded), float("-inf"), dtype=dtype, device=device)[:, : self.length]
            self._bias = bias.masked_fill_(self.mask(device), 0)
        return self._bias

    def blocks(self, device: torch.device) -> BlockMask:
        """The same for flex attention; made once, as all blocks of the model use it."""
        if self._blocks is None:
            self._blocks = block_mask(self.nodes, self.length, device)
        return self._blocks


def subtree_ends(nodes: Sequence[Node], length: int) -> torch.Tensor:
    """(T,) int32: for each token the end of its node's subtree, the first query after it that does not see it."""
    last = torch.zeros(length, dtype=torch.int32)
    for node in nodes:
        last[node.start : node.end] = node.subtree_end
    return last


def block_mask(nodes: Sequence[Node], length: int, device: torch.device) -> BlockMask:
    """Which blocks of queries see which blocks of keys: all of it, some of it by `last`, or nothing."""
    last = subtree_ends(nodes, length)
    count = -(-length // BLOCK)
    by_block = torch.nn.functional.pad(last, (0, count * BLOCK - length)).view(count, BLOCK)  # behind the end nobody sees a key
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
    """For each block of queries the number of key blocks in `which`, and their numbers before all others'."""
    order = torch.argsort(which.int(), dim=-1, descending=True, stable=True).int()
    return which.sum(-1).int()[None, None].to(device), order[None, None].to(device)
