"""Rows of token ids as a prefix tree in one sequence: a prefix that rows share stands in it once.

The nodes stand in depth-first order, so a node's descendants follow it directly: the queries of a whole subtree are one
range, and so are the keys of each of its ancestors. No tensor here: lists of ids in, ranges out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

#: A shared stretch shorter than this is computed for each row again: a node costs an attention call for each layer.
MIN_SHARED = 8


#: Tokens of a sequence, and labelled places, are filled up to a multiple of this. oneDNN compiles its products for each
#: number of rows anew (1 to 3 ms, 0.5 MB): steps of few lengths need few of them.
FILL = 16


#: Rows that go through the model together.
Unit = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Node:
    """A stretch [start, end) of the sequence; its descendants fill [end, subtree_end)."""

    start: int
    end: int
    subtree_end: int


def as_numbers(nodes: Sequence[Node]) -> list[int]:
    """(start, end, subtree_end) of each node after the other: a tree as an operator's argument."""
    return [number for node in nodes for number in (node.start, node.end, node.subtree_end)]


@dataclass(frozen=True)
class Tree:
    """Rows laid out: `ids` and `positions` (length T), nodes in depth-first order, and where each row's tokens stand.

    `paths[i][j]` is the place in the sequence of token j of row i; `positions[paths[i][j]] == j`.
    """

    ids: list[int]
    positions: list[int]
    nodes: tuple[Node, ...]
    paths: list[list[int]]


def computed_length(loss_mask: Sequence[bool]) -> int:
    """How many of a row's leading tokens go through the model: those before its last label, and at least one."""
    places = (place for place in range(len(loss_mask) - 1, 0, -1) if loss_mask[place])
    return next(places, 1)


def filled(count: int) -> int:
    """The next multiple of `FILL`."""
    return -(-count // FILL) * FILL


def fill(tree: Tree) -> Tree:
    """The tree with its last leaf longer, up to a multiple of `FILL`: tokens at the end, which no row's token sees.

    They repeat the last one, position and all.
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


@dataclass(frozen=True)
class Limits:
    """What goes through the model at once at most: computed tokens and rows; None is no limit. A single row always goes.

    `start` is how many tokens' time a micro-batch takes beside its tokens. Where it is given, micro-batches are the smallest
    whose step takes little longer than the fastest's (`SLACK`), as memory grows with them; where not, the largest.
    """

    tokens: int | None = None
    rows: int | None = None
    start: int | None = None

    def hold(self, tokens: int, rows: int) -> bool:
        """Whether that many are within both."""
        return rows <= 1 or not (
            (self.tokens is not None and tokens > self.tokens) or (self.rows is not None and rows > self.rows)
        )


#: Sizes of micro-batches in tokens that are tried where memory is weighed against time, and how much more of it they may take.
SIZES = (256, 512, 1024, 2048)
SLACK = 1.05


def _leanest(
    split: Callable[[Limits], list[list[int]]], cost: Callable[[Sequence[int]], int], limits: Limits
) -> list[list[int]]:
    """The groups of the smallest size that a step is nearly as fast with as with the best one."""
    if limits.start is None:
        raise AssertionError("there is nothing to weigh")
    sizes = [size for size in SIZES if limits.tokens is None or size < limits.tokens]
    tried = [split(Limits(size, limits.rows)) for size in (*sizes, limits.tokens)]
    costs = [sum(cost(group) + limits.start for group in groups) for groups in tried]
    return next(groups for groups, found in zip(tried, costs, strict=True) if found <= SLACK * min(costs))


def split_for_trees(rows: Sequence[Sequence[int]], limits: Limits) -> list[list[int]]:
    """Indices of `rows` in as few groups as it goes whose trees are within the limits, rows that share side by side.

    Rows are sorted, so that what shares a prefix is a run. A run that is too large for one tree is cut into parts whose largest
    is as small as their number allows (each pays for the prefix again); runs and parts are then put into groups, the largest
    first, each where it fits most tightly (best-fit decreasing).
    """
    return split_units_for_trees([(row,) for row in rows], limits)


def split_units_for_trees(units: Sequence[Unit], limits: Limits) -> list[list[int]]:
    """The same for units of rows that stay together, as the two sides of a pair; `limits.rows` counts units.

    Units are sorted by their first row: what the rows of a unit share among themselves, they have in common with others too.
    """
    if limits.start is not None:
        return _leanest(partial(split_units_for_trees, units), partial(_tree_tokens, units), limits)
    if limits.tokens is not None:
        limits = replace(limits, tokens=limits.tokens // FILL * FILL)  # trees are filled up
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
    """Indices of padded units in groups of like length, each padded to its longest row within the limits.

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
    """The run in as few stretches within the limits as it goes, near each other in rows.

    `at_least` is what all stretches together cost whatever their number, so that fewer are not tried.
    """
    fewest = min(len(run), -(-at_least // (limits.tokens or at_least or 1)) or 1)
    for count in range(fewest, len(run) + 1):
        edges = [round(len(run) * part / count) for part in range(count + 1)]
        stretches = [run[low:high] for low, high in pairwise(edges)]
        if all(limits.hold(cost(stretch), len(stretch)) for stretch in stretches):
            return stretches
    raise AssertionError("a single row is within any limits")


def _best_fit(parts: list[tuple[int, list[int]]], limits: Limits) -> list[list[int]]:
    """Parts put together where their tokens and rows allow, so that groups are few."""
    groups: list[tuple[int, list[int]]] = []
    for tokens, part in sorted(parts, key=lambda item: -item[0]):
        room = [place for place, (held, members) in enumerate(groups) if limits.hold(held + tokens, len(members) + len(part))]
        if room:
            place = max(room, key=lambda place: groups[place][0])
            groups[place] = (groups[place][0] + tokens, groups[place][1] + part)
        else:
            groups.append((tokens, part))
    return [members for _, members in groups]
