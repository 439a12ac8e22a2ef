"""Rows of token ids as a prefix tree in one sequence: a prefix that rows share stands in it once.

The nodes stand in depth-first order, so a node's descendants follow it directly: the queries of a whole subtree are one
range, and so are the keys of each of its ancestors. No tensor here: lists of ids in, ranges out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

#: A shared stretch shorter than this is computed for each row again: a node costs an attention call for each layer.
MIN_SHARED = 8


#: Architectures whose attention a tree reproduces exactly: causal, rotary positions, no sinks, no soft-capping.
#: tests/invariant/test_packing.py proves each.
TREE_ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma")


@dataclass(frozen=True)
class Node:
    """A stretch [start, end) of the sequence; its descendants fill [end, subtree_end)."""

    start: int
    end: int
    subtree_end: int


@dataclass(frozen=True)
class Tree:
    """Rows laid out: `ids` and `positions` (length T), nodes in depth-first order, and where each row's tokens stand.

    `paths[i][j]` is the place in the sequence of token j of row i; `positions[paths[i][j]] == j`.
    """

    ids: list[int]
    positions: list[int]
    nodes: tuple[Node, ...]
    paths: list[list[int]]


def shared_length(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading ids two rows have in common."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))


def build_tree(rows: Sequence[Sequence[int]], min_shared: int = MIN_SHARED) -> Tree:
    """The tree of `rows`; the order of `paths` is that of `rows`. Equal rows share all their tokens."""
    order = sorted(range(len(rows)), key=lambda index: list(rows[index]))
    # shared[k]: what row order[k] shares with the one before it; in sorted order that decides all common prefixes.
    shared = [0, *(shared_length(rows[a], rows[b]) for a, b in pairwise(order))]
    ids: list[int] = []
    positions: list[int] = []
    nodes: list[Node] = []
    paths: list[list[int]] = [[] for _ in rows]

    def emit(members: Sequence[int], begin: int, end: int) -> int:
        """Append tokens [begin, end) that `members` share; returns where they start."""
        start = len(ids)
        ids.extend(rows[members[0]][begin:end])
        positions.extend(range(begin, end))
        for member in members:
            paths[member].extend(range(start, start + end - begin))
        return start

    def grow(low: int, high: int, depth: int) -> None:
        """Lay out what the rows order[low:high], which share `depth` tokens, have after those."""
        while low < high:
            stop = low + 1
            while stop < high and shared[stop] >= depth + min_shared:
                stop += 1
            common = len(rows[order[low]]) if stop == low + 1 else min(shared[low + 1 : stop])
            if common > depth:
                place = len(nodes)
                start = emit(order[low:stop], depth, common)
                nodes.append(Node(start, len(ids), 0))
                if stop > low + 1:
                    grow(low, stop, common)
                nodes[place] = Node(start, nodes[place].end, len(ids))
            low = stop

    grow(0, len(rows), 0)
    return Tree(ids, positions, tuple(nodes), paths)
