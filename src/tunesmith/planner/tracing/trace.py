"""The exact tier: a training step of the real modules on FakeTensors, with every storage counted while it is alive.

It needs no weights and no memory: tensors have shapes and storages have sizes, but nothing is computed. The count is what an
allocator is asked for; its segments, fragmentation and a GPU's context come on top. Two steps run, because the first one
creates the optimizer states.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tunesmith.engine.modeling.loss import summed_loss
from tunesmith.engine.packing.batch import Batch
from tunesmith.engine.packing.layout import Layout
from tunesmith.engine.packing.tree import Node
from tunesmith.planner.scenario import Scenario
from tunesmith.planner.tracing.building import build_model, make_optimizer, quant_tensors

_ALONE = 2  # use count of a storage held by one tensor only: the tensor, and the handle that reads the count

BLOCK = 512  # bytes; CUDA's caching allocator rounds each request up to a multiple


def rounded(size: int) -> int:
    """`size` rounded up to whole blocks, in bytes."""
    return -(-size // BLOCK) * BLOCK


@dataclass(frozen=True)
class Held:
    """A storage alive at the peak: its bytes, the operator that created it, and the phase."""

    size: int
    operator: str
    phase: str


@dataclass(frozen=True)
class Peak:
    """The highest point of a trace: bytes, where it was reached, and what was alive there beyond `resident_bytes`.

    `resident_bytes` is the size of the model itself; `flops` are per step (two per multiply-add), by operator.
    """

    total_bytes: int
    resident_bytes: int
    phase: str
    operator: str
    held: tuple[Held, ...]
    flops: Mapping[str, int]

    def largest(self, count: int = 10) -> list[Held]:
        """The largest storages alive at the peak."""
        return sorted(self.held, key=lambda held: -held.size)[:count]


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of all storages that operators create, each once and until it is freed; also works on real tensors.

    While `paused`, new storages are not counted; this excludes FakeTensors used only for shape inference.
    """

    paused = False

    def __init__(self) -> None:
        base: Any = super()
        base.__init__()
        self.phase = "build"
        self.live = 0
        self.high = (0, 0, "build", "")  # bytes, moment, phase, operator
        self.flops: Counter[str] = Counter()
        self._moment = 0
        self._known: dict[int, tuple[int, Held]] = {}  # storage -> when it was created
        self._lives: list[tuple[int, int, Held]] = []  # of freed storages: created, freed

    def hold(self, tensor: torch.Tensor, operator: str = "") -> None:
        """Count the storage of `tensor` if it is new, until it is freed."""
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()  # for a DTensor, this device's shard
        key = storage._cdata
        size = rounded(storage.nbytes())
        if key in self._known or size == 0 or StorageMeter.paused:
            return
        self._begin(key, size, operator)
        weakref.finalize(storage, self._release, key)

    def _begin(self, key: int, size: int, operator: str) -> None:
        self._moment += 1
        self._known[key] = (self._moment, Held(size, operator, self.phase))
        self.live += size
        if self.live > self.high[0]:
            self.high = (self.live, self._moment, self.phase, operator)

    def _release(self, key: int) -> None:
        if key not in self._known:
            return  # already emptied by a resize
        made, held = self._known.pop(key)
        self.live -= held.size
        self._moment += 1
        self._lives.append((made, self._moment, held))

    def __enter__(self) -> StorageMeter:
        """Watch operators, and storages that are emptied and refilled, as FSDP does with gathered weights."""
        kind: Any = torch.UntypedStorage
        resize = kind.resize_

        def watched(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            known = self._known.get(storage._cdata)
            if size == 0:
                self._release(storage._cdata)
            elif known is None:
                self._begin(storage._cdata, rounded(size), "resize_")
                weakref.finalize(storage, self._release, storage._cdata)
            return result

        self._resize = resize
        kind.resize_ = watched
        base: Any = super()
        base.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop watching."""
        kind: Any = torch.UntypedStorage
        base: Any = super()
        kind.resize_ = self._resize
        base.__exit__(*error)

    def alive_at_peak(self) -> list[Held]:
        """Every storage that was alive at the peak."""
        moment = self.high[1]
        gone = [held for made, freed, held in self._lives if made <= moment < freed]
        return gone + [held for made, held in self._known.values() if made <= moment]

    def _added_in_place(self, func: Any, args: Any) -> int:
        """Bytes of a gradient to which autograd's engine would add in place without this dispatch mode.

        It does so if it is the only holder, but not under a dispatch mode (InputBuffer::accumulate, input_buffer.cpp).
        """
        if self.phase != "backward" or func is not torch.ops.aten.add.Tensor or not isinstance(args[1], torch.Tensor):
            return 0
        storage = args[0].untyped_storage()
        alone = torch._C._storage_Use_Count(storage._cdata) <= _ALONE
        return rounded(storage.nbytes()) if alone and args[0].shape == args[1].shape else 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count its storages and FLOPs; DTensor operators dispatch again on their local shards."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        replaced = self._added_in_place(func, args)
        result = func(*args, **(kwargs or {}))
        self.live -= replaced
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.hold(leaf, str(func))
        self.live += replaced  # until the engine releases it
        count = FLOPS.get(func.overloadpacket)
        if count is not None:
            self.flops[func.overloadpacket.__name__] += count(*args, **(kwargs or {}), out_val=result)
        return result


def _flash_flops(query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any) -> int:
    """Flash attention forward: two matmuls of (queries x keys x head size); a causal mask is not subtracted."""
    return 4 * query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] * query.shape[3]


def _flash_backward_flops(_: Any, query: torch.Tensor, key: torch.Tensor, *__: Any, **___: Any) -> int:
    """Flash attention backward: five matmuls, since the scores are recomputed."""
    return 10 * query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] * query.shape[3]


def _four_bit_flops(x: torch.Tensor, _: Any, shape: Sequence[int], *__: Any, **___: Any) -> int:
    """Bitsandbytes' matmul with a 4-bit weight."""
    return 2 * x.numel() * shape[0]


#: FLOPs of an operator from its arguments: torch's own counts, plus flash attention on CPU and bitsandbytes' 4-bit matmul.
FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward_flops,
    torch.ops.bitsandbytes.gemm_4bit: _four_bit_flops,
}


class _Faker:
    """Makes a FakeTensor for each meta tensor, always the same one, so that tied tensors stay tied."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self._made: dict[int, tuple[Any, torch.Tensor]] = {}  # holds the original, so that its id is not reused

    def tensor(self, original: torch.Tensor) -> torch.Tensor:
        """A FakeTensor on the CPU of the same shape and dtype; for a parameter, a parameter with the same attributes."""
        if id(original) not in self._made:
            with self.mode:
                twin = torch.empty(original.shape, dtype=original.dtype, device="cpu")
            if isinstance(original, torch.nn.Parameter):
                twin = torch.nn.Parameter(twin, original.requires_grad)
                vars(twin).update(vars(original))  # bitsandbytes' attributes of a weight
            self._made[id(original)] = (original, twin)
        return self._made[id(original)][1]


def as_fake(model: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Replace a meta model's parameters, buffers and quantisation constants with FakeTensors on the CPU."""
    faker = _Faker(mode)
    for module in model.modules():
        held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = faker.tensor(tensor)
        for holder, name in quant_tensors(module):
            setattr(holder, name, faker.tensor(getattr(holder, name)))


def trace_step(model: torch.nn.Module, batch: Batch, scenario: Scenario) -> Peak:
    """The peak of two training steps of `model` on `batch`; either both are fake or both are real."""
    meter = StorageMeter()
    for tensor in (*model.parameters(), *model.buffers()):
        meter.hold(tensor, "weights")
    for module in model.modules():
        for holder, name in quant_tensors(module):
            meter.hold(getattr(holder, name), "weights")
    resident = meter.live
    for value in batch.values():
        if isinstance(value, torch.Tensor):
            meter.hold(value, "batch")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with meter:
        optimizer = make_optimizer(trained, scenario)
        for _ in range(2):
            meter.flops.clear()
            for _ in range(2 if scenario.accumulating else 1):
                meter.phase = "forward"
                loss = _stock_loss(model, batch) if scenario.stock else summed_loss(model, batch)
                meter.phase = "backward"
                loss.backward()
                del loss
            meter.phase = "optimizer"
            optimizer.step()
            optimizer.zero_grad()
    total, _, phase, operator = meter.high
    return Peak(total, resident, phase, operator, tuple(meter.alive_at_peak()), dict(meter.flops))


def _stock_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Transformers' own loss: logits of all positions, in float32."""
    labels = torch.zeros_like(batch["input_ids"])
    inputs = {"input_ids": batch["input_ids"], "attention_mask": {"full_attention": None}}
    loss: torch.Tensor = model(**inputs, labels=labels, use_cache=False).loss
    return loss


def make_batch(config: Any, scenario: Scenario) -> Batch:
    """A batch of the scenario's shape; the last positions of its rows are labelled, several times if there are more labels."""
    if scenario.labelled < 1:
        raise ValueError(f"{scenario.labelled} labelled positions, but a step needs at least one")
    rows, length = scenario.rows, scenario.length
    each = -(-scenario.labelled // rows)
    places = [row * length + length - 1 - i % length for row in range(rows) for i in range(each)]
    places = places[: scenario.labelled]
    ids = torch.arange(scenario.tokens).reshape(scenario.rows, -1) % config.vocab_size
    batch: Batch = {
        "input_ids": ids,
        "position_ids": torch.arange(scenario.length).expand(scenario.rows, -1).contiguous(),
        "sources": torch.tensor(places),
        "targets": torch.zeros(len(places), dtype=torch.long),
        "weights": torch.ones(len(places)),
        "labelled": len(places),
        "row_tokens": scenario.tokens,
    }
    if scenario.attention == "tree":
        batch["tree_layout"] = Layout((Node(0, scenario.tokens, scenario.tokens),), scenario.tokens)
    return batch


def trace(config: Any, scenario: Scenario) -> Peak:
    """The peak of a scenario, on FakeTensors: needs no weights or memory, and takes seconds."""
    batch = make_batch(config, scenario)
    model = build_model(config, scenario, "meta")
    mode = FakeTensorMode()
    as_fake(model, mode)
    with mode:
        return trace_step(model, fake_batch(batch), scenario)


def fake_batch(batch: Batch) -> Batch:
    """The batch without its data; call it under a FakeTensorMode."""
    return {
        key: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }


def measure(config: Any, scenario: Scenario) -> Peak:
    """The peak of the same step on real tensors, with the same meter: the reference for `trace`."""
    return trace_step(build_model(config, scenario, "cpu"), make_batch(config, scenario), scenario)
