"""The exact tier: a training step of the real modules on fake tensors, with every storage counted while it lives.

No weights and no memory are needed: tensors have shapes and storages have sizes, but nothing is computed. What is counted is
what an allocator is asked for; its own rounding to segments, fragmentation, and a GPU's context come on top. Two steps are
run, since the optimizer's states are made in the first.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tunesmith.packing.batch import Batch, PaddedCollator
from tunesmith.packing.loss import summed_loss

BLOCK = 512  # bytes: what CUDA's caching allocator rounds a request up to


def rounded(size: int) -> int:
    """`size` bytes rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


@dataclass(frozen=True)
class Peak:
    """The highest point of a trace: bytes, the phase (`forward`, `backward`, `optimizer`) and the operator there."""

    total_bytes: int
    resident_bytes: int
    phase: str
    operator: str


class StorageMeter(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch leaves its constructor untyped
    """Counts the bytes of all storages that operators make, each once and until it is freed; works on real tensors too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = "build"
        self.live = 0
        self.peak = Peak(0, 0, "build", "")
        self._known: set[int] = set()

    def hold(self, tensor: torch.Tensor, operator: str = "") -> None:
        """Count the storage of `tensor` if it is new, until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = rounded(storage.nbytes())
        if key in self._known or size == 0:
            return
        self._known.add(key)
        self.live += size
        weakref.finalize(storage, self._release, key, size)
        if self.live > self.peak.total_bytes:
            self.peak = Peak(self.live, 0, self.phase, operator)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.hold(leaf, str(func))
        return result


def as_fake(model: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Replace a meta model's parameters and buffers by fake tensors on the CPU; ties and `requires_grad` stay."""
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            with mode:
                made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        return made[id(tensor)]

    parameters: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in parameters:
                    parameters[id(parameter)] = torch.nn.Parameter(fake(parameter), parameter.requires_grad)
                module._parameters[name] = parameters[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = fake(buffer)


def trace_step(
    model: torch.nn.Module,
    batch: Mapping[str, Any],
    loss: Callable[[Any, Mapping[str, Any]], torch.Tensor],
    optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
) -> Peak:
    """The peak of two training steps of `model` on `batch`; both fake, or both real."""
    meter = StorageMeter()
    for tensor in (*model.parameters(), *model.buffers()):
        meter.hold(tensor)
    resident = meter.live
    stepper = optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])
    with meter:
        for _ in range(2):
            meter.phase = "forward"
            value = loss(model, batch)
            meter.phase = "backward"
            value.backward()  # type: ignore[no-untyped-call]
            meter.phase = "optimizer"
            stepper.step()
            stepper.zero_grad()
            del value
    return Peak(meter.peak.total_bytes, resident, meter.peak.phase, meter.peak.operator)


PLAIN_ATTENTION = "tunesmith_plain_causal"


def _plain_causal(
    _module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: Any,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal SDPA without a mask: what rows of one length run. While tracing, transformers' own path builds a dense mask."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(PLAIN_ATTENTION, _plain_causal)


@dataclass(frozen=True)
class Scenario:
    """A training step: full fine-tuning, or LoRA of rank `r` on all linear layers, over `rows` rows of `length` tokens.

    `labelled` tokens of each row carry loss. `dtype` is that of the weights, `adapter_dtype` that of the adapter.
    """

    rows: int
    length: int
    labelled: int
    r: int | None = None
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype = torch.float32
    gradient_checkpointing: bool = False


def build_model(config: Any, scenario: Scenario, device: str) -> Any:
    """The real modules of transformers and PEFT for a scenario, with random weights on `device` ("meta" or "cpu")."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=scenario.dtype, attn_implementation=PLAIN_ATTENTION)
        if scenario.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        if scenario.r is not None:
            model = get_peft_model(model, LoraConfig(r=scenario.r, target_modules="all-linear"), autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if scenario.r is not None and parameter.requires_grad:
            parameter.data = parameter.data.to(scenario.adapter_dtype)
    return model.train()


def make_batch(config: Any, scenario: Scenario) -> Batch:
    """A batch of the scenario's shape; its last tokens carry the loss."""
    row = {
        "input_ids": [1 + index % (config.vocab_size - 1) for index in range(scenario.length)],
        "trained": [index >= scenario.length - scenario.labelled for index in range(scenario.length)],
    }
    return PaddedCollator(pad_id=0)([row] * scenario.rows)


def fused_adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of the engine."""
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def trace(config: Any, scenario: Scenario) -> Peak:
    """The peak of a scenario, on fake tensors: no weights, no memory, seconds."""
    batch = make_batch(config, scenario)
    model = build_model(config, scenario, "meta")
    mode = FakeTensorMode()
    as_fake(model, mode)
    with mode:
        fake_batch = {
            key: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()
        }
        return trace_step(model, fake_batch, summed_loss, fused_adamw)


def measure(config: Any, scenario: Scenario) -> Peak:
    """The peak of the same step on real tensors, by the same meter: what `trace` is checked against."""
    return trace_step(build_model(config, scenario, "cpu"), make_batch(config, scenario), summed_loss, fused_adamw)
