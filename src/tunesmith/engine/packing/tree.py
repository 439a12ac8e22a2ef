"""Rows of token ids as a prefix tree in one sequence: a prefix that rows share occurs once.

Nodes are in depth-first order, so a node's descendants directly follow it. The queries of a whole subtree are one contiguous
range, and so are the keys of each of its ancestors. No tensors here: lists of ids in, ranges out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

#: A shared stretch shorter than this is recomputed for each row: a node costs an attention call per layer.
MIN_SHARED = 8


#: The tokens of a sequence and its labelled positions are padded to a multiple of this. oneDNN compiles its GEMMs separately
#: for each number of rows (1 to 3 ms, 0.5 MB), so few distinct lengths need few compilations.
FILL = 16


#: Rows that go through the model in the same micro-batch.
Unit = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Node:
    """A stretch [start, end) of the sequence; its descendants fill [end, subtree_end)."""

    start: int
    end: int
    subtree_end: int


def as_numbers(nodes: Sequence[Node]) -> list[int]:
    """(start, end, subtree_end) of each node in one flat list: a tree as an operator's argument."""
    return [number for node in nodes for number in (node.start, node.end, node.subtree_end)]


@dataclass(frozen=True)
class Tree:
    """Packed rows: `ids` and `positions` (length T), nodes in depth-first order, and the indices of each row's tokens.

    `paths[i][j]` is the index in the sequence of token j of row i; `positions[paths[i][j]] == j`.
    """

    ids: list[int]
    positions: list[int]
    nodes: tuple[Node, ...]
    paths: list[list[int]]


def computed_length(loss_mask: Sequence[bool]) -> int:
    """Number of a row's leading tokens that go through the model: those before its last label, and at least one."""
    places = (place for place in range(len(loss_mask) - 1, 0, -1) if loss_mask[place])
    return next(places, 1)


def filled(count: int) -> int:
    """The next multiple of `FILL`."""
    return -(-count // FILL) * FILL


def fill(tree: Tree) -> Tree:
    """The tree with its last leaf padded to a multiple of `FILL`: the added tokens are at the end, and no row attends to them.

    They repeat the last token and its position.
    """
    end = len(tree.ids)
    more = filled(end) - end
    if more == 0:
        return tree
    nodes = tuple(
        Node(n.start, n.end + more if n.end == end else n.end, n.subtree_end + more if n.subtree_end == end else n.subtree_end)
        for n in tree.nodes
    )
    return Tree(tree.ids + tree.ids[-1:] * more, tree.positions + tree.positions[-1:] * more, nodes, tree.paths)


def shared_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Number of leading ids that two rows have in common."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))


def build_tree(rows: Sequence[Sequence[int]], min_shared: int = MIN_SHARED) -> Tree:
    """The tree of `rows`; `paths` has the order of `rows`. Equal rows share all their tokens."""
    order = sorted(range(len(rows)), key=lambda index: list(rows[index]))
    # shared[k]: the prefix length row order[k] shares with the one before it; in sorted order this fixes all common prefixes.
    shared = [0, *(shared_length(rows[a], rows[b]) for a, b in pairwise(order))]
    ids: list[int] = []
    positions: list[int] = []
    nodes: list[Node] = []
    paths: list[list[int]] = [[] for _ in rows]

    def emit(members: Sequence[int], begin: int, end: int) -> int:
        """Append tokens [begin, end) that `members` share; returns their start index."""
        start = len(ids)
        ids.extend(rows[members[0]][begin:end])
        positions.extend(range(begin, end))
        for member in members:
            paths[member].extend(range(start, start + end - begin))
        return start

    def grow(low: int, high: int, depth: int) -> None:
        """Pack the rest of the rows order[low:high] after the `depth` tokens that they share."""
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


@dataclass(frozen=True)
class Limits:
    """Limits of a micro-batch: computed tokens and rows; None means no limit. A single row always fits.

    `start` is the fixed cost of a micro-batch, in tokens. If it is given, micro-batches are the smallest ones whose step takes
    at most `SLACK` times as long as the fastest, since memory grows with their size; if not, they are the largest.
    """

    tokens: int | None = None
    rows: int | None = None
    start: int | None = None

    def hold(self, tokens: int, rows: int) -> bool:
        """Whether that many tokens and rows are within both limits."""
        return rows <= 1 or not (
            (self.tokens is not None and tokens > self.tokens) or (self.rows is not None and rows > self.rows)
        )


#: Micro-batch sizes in tokens that are tried when memory is traded for time, and the step time allowed relative to the fastest.
SIZES = (256, 512, 1024, 2048)
SLACK = 1.05


def _leanest(
    split: Callable[[Limits], list[list[int]]], cost: Callable[[Sequence[int]], int], limits: Limits
) -> list[list[int]]:
    """The groups of the smallest size whose step is nearly as fast as that of the best size."""
    if limits.start is None:
        raise AssertionError("there is nothing to weigh")
    sizes = [size for size in SIZES if limits.tokens is None or size < limits.tokens]
    tried = [split(Limits(size, limits.rows)) for size in (*sizes, limits.tokens)]
    costs = [sum(cost(group) + limits.start for group in groups) for groups in tried]
    return next(groups for groups, found in zip(tried, costs, strict=True) if found <= SLACK * min(costs))


def split_for_trees(rows: Sequence[Sequence[int]], limits: Limits) -> list[list[int]]:
    """Indices of `rows` in as few groups as possible whose trees are within the limits; rows that share a prefix are grouped.

    Rows are sorted, so rows that share a prefix form a run. A run that is too large for one tree is cut into as few parts as
    possible, about equal in rows (each part recomputes the prefix). Runs and parts are then put into groups, the largest
    first, each where it fits most tightly (best-fit decreasing).
    """
    return split_units_for_trees([(row,) for row in rows], limits)


def split_units_for_trees(units: Sequence[Unit], limits: Limits) -> list[list[int]]:
    """The same for units of rows that stay together, such as the two sides of a pair; `limits.rows` counts units.

    Units are sorted by their first row: the prefix that a unit's rows share is also what they share with other units.
    """
    if limits.start is not None:
        return _leanest(partial(split_units_for_trees, units), partial(_tree_tokens, units), limits)
    if limits.tokens is not None:
        limits = replace(limits, tokens=limits.tokens // FILL * FILL)  # trees are padded to a multiple of FILL
    order = sorted(range(len(units)), key=lambda index: list(units[index][0]))
    if limits.hold(_tree_tokens(units, order), len(units)):
        return [list(range(len(units)))]
    shared = [0, *(shared_length(units[a][0], units[b][0]) for a, b in pairwise(order))]
    runs: list[list[int]] = []
    for place, index in enumerate(order):
        if shared[place] < MIN_SHARED:
            runs.append([])
        runs[-1].append(index)
    tokens = partial(_tree_tokens, units)
    parts = [part for run in runs for part in _cut(run, limits, tokens, at_least=tokens(run))]
    return _best_fit([(tokens(part), part) for part in parts], limits)


def split_by_length(lengths: Sequence[int], limits: Limits, rows: int = 1) -> list[list[int]]:
    """Indices of padded units in groups of similar length, each padded to its longest row, within the limits.

    Each unit is `rows` rows of at most its length; `limits.rows` counts units.
    """

    def cost(some: Sequence[int]) -> int:
        return rows * len(some) * max((lengths[index] for index in some), default=0)

    if limits.start is not None:
        return _leanest(lambda tried: split_by_length(lengths, tried, rows), cost, limits)
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    if limits.hold(cost(order), len(order)):
        return [list(range(len(lengths)))]
    return _cut(order, limits, cost, at_least=rows * sum(lengths))


def _tree_tokens(units: Sequence[Unit], chosen: Sequence[int]) -> int:
    return len(build_tree([row for index in chosen for row in units[index]]).ids)


def _cut(run: list[int], limits: Limits, cost: Callable[[Sequence[int]], int], *, at_least: int) -> list[list[int]]:
    """The run in as few stretches within the limits as possible, about equal in rows.

    `at_least` is a lower bound on the stretches' total cost, so smaller counts are not tried.
    """
    fewest = min(len(run), -(-at_least // (limits.tokens or at_least or 1)) or 1)
    for count in range(fewest, len(run) + 1):
        edges = [round(len(run) * part / count) for part in range(count + 1)]
        stretches = [run[low:high] for low, high in pairwise(edges)]
        if all(limits.hold(cost(stretch), len(stretch)) for stretch in stretches):
            return stretches
    raise AssertionError("a single row is within any limits")


def _best_fit(parts: list[tuple[int, list[int]]], limits: Limits) -> list[list[int]]:
    """Parts combined into few groups, as far as their tokens and rows allow."""
    groups: list[tuple[int, list[int]]] = []
    for tokens, part in sorted(parts, key=lambda item: -item[0]):
        room = [place for place, (held, members) in enumerate(groups) if limits.hold(held + tokens, len(members) + len(part))]
        if room:
            place = max(room, key=lambda place: groups[place][0])
            groups[place] = (groups[place][0] + tokens, groups[place][1] + part)
        else:
            groups.append((tokens, part))
    return [members for _, members in groups]
