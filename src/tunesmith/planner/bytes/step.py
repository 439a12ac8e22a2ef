"""The closed form: a step's peak memory from `config.json` alone, in a few milliseconds, by kind of bytes.

It computes the bytes requested from PyTorch's allocator at the peak: block.py says what each module saves, tape.py when it is
freed. tests/invariant/test_memory.py compares it with the trace of the real modules. Of identical blocks only four are
computed; the others count as the bytes that they save, because every peak is at the first or the last block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from tunesmith.engine.optim.sizes import NF4_BYTES, OPTIMIZER_SLICE, master_bytes, state_bytes
from tunesmith.models.architecture import Architecture
from tunesmith.planner.bytes.block import Modules
from tunesmith.planner.bytes.tape import Buffer, Kind, Tape, Value
from tunesmith.planner.scenario import Scenario

_SHOWN = 4  # blocks that are computed individually


@dataclass(frozen=True)
class Estimate:
    """A step's peak in bytes and its breakdown by kind; `resident_bytes` is the loaded model.

    `written_bytes` and `operators` count the forward and backward pass of one micro-batch, for the time estimate.
    """

    total_bytes: int
    resident_bytes: int
    breakdown: dict[str, int]
    written_bytes: int
    operators: int


@lru_cache(maxsize=4096)
def estimate(architecture: Architecture, scenario: Scenario) -> Estimate:
    """The peak of a training step."""
    return _Step(architecture, scenario).run()


def offloaded_bytes(architecture: Architecture, scenario: Scenario) -> int:
    """Bytes of optimizer state that host memory holds instead of the device."""
    return _Step(architecture, scenario).states_and_masters() if scenario.optimizer_offloading else 0


def weight_bytes(architecture: Architecture, scenario: Scenario) -> dict[Kind, int]:
    """Bytes of the loaded model: base weights, and the float32 adapter with copies of fully trained modules.

    QLoRA: NF4 in the blocks' linear layers; the rest stays in the model's dtype, or is float32 after PEFT's preparation.
    """
    e = scenario.element
    if scenario.method == "qlora":
        rest = architecture.parameters - architecture.linear_weights
        base = round(NF4_BYTES * architecture.linear_weights) + (4 if scenario.stock else e) * rest
    else:
        base = e * architecture.parameters
    adapter = 0 if scenario.method == "full" else 4 * architecture.lora_parameters(scenario.r)
    adapter += e * scenario.whole_parameters(architecture)
    return {"weights": base, "adapter": adapter}


@dataclass(frozen=True)
class Sharding:
    """`devices` that shard states by ZeRO stage (Rajbhandari et al. 2020, arXiv 1910.02054, section 5).

    Stage 1 shards the optimizer states, 2 also gradients, 3 also weights. Stages 2 and 3 follow FSDP2. Without resharding (2),
    gathered weights stay from the forward to the backward pass. With it (3), two blocks are unsharded at a time, because the
    next one is prefetched during compute. Embedding and head are unsharded throughout. A block's unsharded gradients exist
    twice: the gradients themselves and the communication buffer.
    """

    devices: int
    stage: int

    def share(self, size: int) -> int:
        """One device's shard of `size` bytes."""
        return -(-size // self.devices)


@lru_cache(maxsize=4096)
def sharded_bytes(architecture: Architecture, scenario: Scenario, devices: int, stage: int) -> int:
    """One device's peak if several shard the states and each computes the scenario's rows."""
    return _Step(architecture, scenario, Sharding(devices, stage)).run().total_bytes


class _Step:
    """One training step on a tape."""

    def __init__(self, architecture: Architecture, scenario: Scenario, sharding: Sharding | None = None) -> None:
        self.a, self.s, self.sharding = architecture, scenario, sharding
        self.tape = Tape()
        self.modules = Modules(self.tape, architecture, scenario)
        self.full = scenario.method == "full"
        self.trainable = architecture.parameters if self.full else architecture.lora_parameters(scenario.r)
        self.weight = scenario.element if self.full else 4  # bytes per trained element and per element of its gradient
        self.whole = scenario.whole_parameters(architecture)

    def run(self) -> Estimate:
        """Weights, states and batch; forward, loss, backward, optimizer."""
        tape, scenario = self.tape, self.s
        resident = weight_bytes(self.a, scenario)
        for kind, size in resident.items():
            tape.make(kind, self._held(size), moved=False)
        states = self.optimizer_bytes()
        tape.make("optimizer", self.sharding.share(states) if self.sharding else states, moved=False)
        if self.sharding is not None and self.sharding.stage >= 2:
            tape.in_backward = self._reduced
        elif scenario.optimizer_in_backward:
            tape.in_backward = self._update_scratch
        elif scenario.accumulating:
            tape.make("gradients", self.weight * self.trainable + scenario.element * self.whole, moved=False)
            tape.in_backward = lambda _: 0  # each gradient is added to the existing one, and freed
        tape.make("scratch", self._rounding(), moved=False)
        # Token ids and positions, sources and targets of labels (int64), their weights (float32).
        tape.make("batch", 16 * scenario.tokens + 20 * scenario.labelled)
        self._forward_and_backward()
        written, operators = tape.written, tape.operators
        if not scenario.optimizer_in_backward:
            tape.scratch(self._step_scratch())
        parts = {kind: size for kind, size in tape.at_peak.items() if size}
        return Estimate(tape.peak, sum(resident.values()), parts, written, operators)

    def _held(self, weights: int) -> int:
        """Bytes of weights on this device: all of them, or its shard plus what is gathered at a time."""
        sharding = self.sharding
        if sharding is None or sharding.stage < 2:
            return weights
        share = sharding.share(weights)
        if sharding.stage == 2:
            return weights + share
        blocks = weights - self.s.element * self._outside()
        return share + self.s.element * self._outside() + 2 * max(0, blocks) // self.a.num_hidden_layers

    def _whole_gradients(self) -> int:
        """Bytes of unsharded gradients in the backward pass of a sharded step: a block's twice, and the head's."""
        if self.sharding is None or self.sharding.stage < 2:
            return 0
        head = self.a.embedding_parameters if self.full else 0
        return self.weight * (2 * self.trained_in_a_block() + head)

    def _kept_gradients(self) -> int:
        """Bytes of a block's gradients that remain after its backward pass."""
        each = self.weight * self.trained_in_a_block()
        if self.sharding is not None and self.sharding.stage >= 2:
            return self.sharding.share(each)
        return each if self.tape.in_backward is None else 0

    def _outside(self) -> int:
        """Parameters outside the blocks."""
        return self.a.embedding_parameters + self.a.head_parameters + self.a.final_norm

    def _reduced(self, gradient: int) -> int:
        """Reduce-scatter a gradient: this device keeps its shard. Returns 0 scratch bytes."""
        if self.sharding is None:
            raise AssertionError("nothing is sharded")
        self.tape.make("gradients", self.sharding.share(gradient), moved=False)
        return 0

    def _rounding(self) -> int:
        """Bytes added by rounding up to 512-byte blocks: one block per persistent tensor, 64 KiB for others and constants."""
        linears = len(self.a.all_linears)
        quantised = 5 * linears if self.s.method == "qlora" else 0
        trained = 4 * (linears * 2 + 4) // 2  # weights or adapters, gradients, states: half a block on average
        experts = 32 if self.a.experts else 0  # the router's many small tensors
        return 512 * self.a.num_hidden_layers * (linears + 4 + quantised + trained + experts) + 2**16

    # --- the model ---

    def _forward_and_backward(self) -> None:
        tape, layers, element = self.tape, self.a.num_hidden_layers, self.s.element
        shown, recompute = min(layers, _SHOWN), self.s.gradient_checkpointing
        kinds = 2 if self.a.model_type == "gemma3_text" else 1  # rotary embeddings: for local and global blocks
        rotary = tape.make("activations", kinds * 2 * element * self.a.head_dim * self.s.tokens)
        first = hidden = self._embedding()
        starts: list[tuple[int, Value, list[Buffer]]] = []  # per block: nodes before it, input, attention
        ballast = tape.make("activations", 0)
        for number in range(shown):
            before = tape.total
            written, operators = tape.written, tape.operators
            self.modules.kept = []
            starts.append((len(tape.nodes), hidden, self.modules.kept))
            hidden = self._block_forward(hidden, last=number == shown - 1)
            if number == 1:
                # Its output has replaced the block's input, so the growth is what the block saves.
                ballast = tape.make("activations", (layers - shown) * (tape.total - before), moved=False)
                self._repeat(written, operators)
        mark = len(tape.nodes)
        normed = self.modules.norm(hidden, self.a.hidden_size)
        tape.free(hidden)
        self.modules.loss(normed)
        tape.backward(mark)
        whole = tape.make("gradients", self._whole_gradients(), moved=False)
        for number in reversed(range(shown)):
            if number == 1:
                tape.drop(ballast)
                tape.make("gradients", self._kept_gradients() * (layers - shown), moved=False)
            written, operators = tape.written, tape.operators
            since, start, self.modules.kept = starts[number]
            if recompute:
                self._recompute(start, hidden, last=number == shown - 1)
            tape.backward(since)
            if recompute and number > 0:
                tape.free(start)
            hidden = start
            if number == 1:
                self._repeat(written, operators)
        tape.drop(whole)
        self._embedding_backward(first)
        tape.drop(rotary)

    def _repeat(self, written: int, operators: int) -> None:
        """Count what was written since then once more for each block that is not computed individually."""
        hidden = max(0, self.a.num_hidden_layers - _SHOWN)
        self.tape.written += hidden * (self.tape.written - written)
        self.tape.operators += hidden * (self.tape.operators - operators)

    def _embedding(self) -> Value:
        """The embedding's output; it needs a gradient if the embedding is trained or blocks are recomputed."""
        size = self.s.element * self.a.hidden_size * self.s.tokens
        needs = self.s.trains("embed_tokens") or bool(self.s.gradient_checkpointing)
        value = Value(self.tape.make("activations", size), needs)
        if self.modules.style.scaled_embedding:
            self.tape.scratch(size)
        return value

    def _block_forward(self, x: Value, *, last: bool) -> Value:
        """A block; checkpointing saves only x (Chen et al. 2016, arXiv 1604.06174), plus attention if requested."""
        if not self.s.gradient_checkpointing:
            out = self.modules.block(x, last=last)
            self.tape.free(x)
            return out
        self.tape.recording = False
        out = self.modules.block(x, last=last)
        self.tape.recording = True
        out.needs = True
        return out

    def _recompute(self, x: Value, out: Value, *, last: bool) -> None:
        """Run the block again, now recorded; it takes over the gradient of the first run's output."""
        again = self.modules.block(x, last=last)
        self.tape.free(again)
        again.gradient, out.gradient = out.gradient, None

    def _embedding_backward(self, embedded: Value) -> None:
        """The embedding's gradient, as large as the embedding; it is added to the head's if they are tied."""
        tape = self.tape
        if self.s.trains("embed_tokens"):
            size = self.s.element * self.a.embedding_parameters
            made = tape.make("gradients", size)
            if tape.in_backward is not None:
                tape.scratch(tape.in_backward(size))
            if tape.in_backward is not None or self.a.tie_word_embeddings:
                tape.drop(made)
        if embedded.gradient is not None:
            tape.drop(embedded.gradient)

    # --- parameters and optimizer ---

    def trained_in_a_block(self) -> int:
        """Trained parameters of one block."""
        layers = self.a.num_hidden_layers
        if not self.full:
            return self.trainable // layers
        return (self.a.linear_weights + self.a.expert_parameters + self.a.other_parameters - self.a.final_norm) // layers

    def optimizer_bytes(self) -> int:
        """Device bytes of AdamW states and of master weights for bf16; torch's own states have the parameters' dtype."""
        return 0 if self.s.optimizer_offloading else self.states_and_masters()

    def states_and_masters(self) -> int:
        """The same bytes, on the device or in host memory."""
        if self.s.optim in {"adamw_torch_fused", "adamw_torch_foreach"}:
            return 2 * (self.weight * self.trainable + self.s.element * self.whole)
        parts = ((self.weight, self.trainable), (self.s.element, self.whole))
        masters = sum(master_bytes(self.s.optim) * count for weight, count in parts if weight == 2)
        return round(state_bytes(self.s.optim) * (self.trainable + self.whole)) + masters

    def _update_scratch(self, gradient: int, weight: int | None = None) -> int:
        """Bytes of float32 copies while one parameter is updated, a slice at a time (engine/optim/adamw.py)."""
        weight = weight or self.weight
        size = min(OPTIMIZER_SLICE, gradient // weight)
        if self.s.optimizer_offloading:
            return 32 * size  # the transferred slice, plus the copies below
        if self.s.optim == "adamw":
            return 0 if weight == 4 else 4 * size
        # 4 for the weight, 8 for the moments, the rest for rounding: noise, sum and masked sum.
        return 24 * size

    def _step_scratch(self) -> int:
        """The same for a step over all parameters: that of the largest one. torch's foreach copies all of them."""
        if self.s.optim == "adamw_torch_fused":
            return 0
        if self.s.optim == "adamw_torch_foreach":
            return self.weight * self.trainable
        linears = self.a.all_linears
        if self.full:
            largest = max(self.a.embedding_parameters, *(linear.weights for linear in linears))
        else:
            largest = self.s.r * max(max(linear.in_features, linear.out_features) for linear in linears)
        whole = self._update_scratch(self.s.element * self._largest_whole(), self.s.element)
        return max(self._update_scratch(self.weight * largest), whole)

    def _largest_whole(self) -> int:
        """Parameters of the largest fully trained module in addition to an adapter."""
        wide = self.s.trains("embed_tokens") or self.s.trains("lm_head")
        return min(self.whole, self.a.embedding_parameters if wide else self.a.hidden_size)
