"""A step's memory as a tape of byte counts: what each operator allocates, what autograd saves, and when it is freed.

It follows torch's engine: a node's gradients are created, then its saved tensors and its incoming gradient are freed.
Gradients for the same tensor are added, in place if nothing else holds the first. Only sizes and lifetimes are computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

#: What bytes are used for. `scratch` lives within one operator.
Kind = Literal["weights", "adapter", "gradients", "optimizer", "batch", "activations", "logits", "scratch"]


@dataclass(eq=False)
class Buffer:
    """Bytes with a reference count."""

    kind: Kind
    size: int
    holders: int = 1


@dataclass(eq=False)
class Value:
    """A tensor of the forward pass: its buffer, whether it needs a gradient, and the gradient accumulated so far."""

    buffer: Buffer
    needs: bool
    gradient: Buffer | None = None


@dataclass(frozen=True)
class Give:
    """A gradient that a node passes to the value `to`: `size` new bytes, or the incoming gradient shared if `size` is None."""

    to: Value
    size: int | None


@dataclass(frozen=True)
class _Node:
    output: Value
    saved: tuple[Buffer, ...]
    gives: tuple[Give, ...]
    scratch: int
    keeps: tuple[tuple[Kind, int], ...]


@dataclass
class Tape:
    """Counts live bytes by kind and records the peak. `in_backward` is called for each parameter gradient."""

    recording: bool = True
    in_backward: Callable[[int], int] | None = None
    live: Counter[str] = field(default_factory=Counter)
    total: int = 0
    peak: int = 0
    at_peak: dict[str, int] = field(default_factory=dict)
    nodes: list[_Node] = field(default_factory=list)
    written: int = 0  # bytes written by operators
    operators: int = 0

    def make(self, kind: Kind, size: int, *, moved: bool = True) -> Buffer:
        """New bytes with one holder; not `moved` if they are not written by an operator."""
        self.written += size if moved else 0
        self.live[kind] += size
        self.total += size
        if self.total > self.peak:
            self.peak = self.total
            self.at_peak = dict(self.live)
        return Buffer(kind, size)

    def drop(self, *buffers: Buffer) -> None:
        """Remove one holder of each buffer; buffers without holders are freed."""
        for buffer in buffers:
            buffer.holders -= 1
            if buffer.holders == 0:
                self.live[buffer.kind] -= buffer.size
                self.total -= buffer.size

    def free(self, *values: Value) -> None:
        """Drop the forward pass's hold on these values."""
        self.drop(*(value.buffer for value in values))

    def scratch(self, size: int, kind: Kind = "scratch") -> None:
        """Temporary bytes on top of all live ones."""
        self.drop(self.make(kind, size))

    def apply(
        self,
        size: int | None,
        inputs: Sequence[Value],
        *,
        saves: Sequence[Buffer] = (),
        gives: Sequence[Give] = (),
        scratch: int = 0,
        back_scratch: int = 0,
        keeps: Sequence[tuple[Kind, int]] = (),
        kind: Kind = "activations",
        saves_result: bool = False,
    ) -> Value:
        """The result of an operator: `size` new bytes, or a view of the first input if `size` is None.

        Its backward creates `gives` and `keeps` (parameter gradients), with `back_scratch` temporary bytes.
        """
        if size is None:
            buffer = inputs[0].buffer
            buffer.holders += 1
        else:
            buffer = self.make(kind, size)
        if scratch:
            self.scratch(scratch)
        self.operators += size is not None
        needs = any(value.needs for value in inputs) or bool(keeps)
        output = Value(buffer, needs)
        if needs and self.recording:
            saved = (*saves, buffer) if saves_result else tuple(saves)
            for held in saved:
                held.holders += 1
            wanted = tuple(give for give in gives if give.to.needs)
            self.nodes.append(_Node(output, saved, wanted, back_scratch, tuple(keeps)))
        return output

    def backward(self, since: int = 0) -> None:
        """Run the nodes after the first `since`, in reverse order."""
        while len(self.nodes) > since:
            self._run(self.nodes.pop())

    def _run(self, node: _Node) -> None:
        incoming = node.output.gradient
        if incoming is None:
            raise AssertionError("a node without a gradient")
        node.output.gradient = None
        self.operators += 1
        made: list[tuple[Value, Buffer]] = []
        for give in node.gives:
            if give.size is None:
                incoming.holders += 1
                made.append((give.to, incoming))
            else:
                made.append((give.to, self.make("activations", give.size)))
        kept = [self.make(kind, size) for kind, size in node.keeps]
        if node.scratch:
            self.scratch(node.scratch)
        self.drop(*node.saved, incoming)
        for to, buffer in made:
            self._accumulate(to, buffer)
        if self.in_backward is not None:
            for buffer in kept:
                self.scratch(self.in_backward(buffer.size))
                self.drop(buffer)

    def _accumulate(self, to: Value, buffer: Buffer) -> None:
        if to.gradient is None:
            to.gradient = buffer
        elif to.gradient.holders == 1:
            self.drop(buffer)
        else:
            total = self.make("activations", buffer.size)
            self.drop(to.gradient, buffer)
            to.gradient = total
