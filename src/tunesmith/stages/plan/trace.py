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
from bitsandbytes.functional import QuantState, quantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tunesmith.methods.base import enable_checkpointing
from tunesmith.packing.attention import repeat_heads
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


class StorageMeter(TorchDispatchMode):
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


class _Faker:
    """Makes a fake twin for each meta tensor, the same one each time, so that what was tied stays tied."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self._made: dict[int, tuple[Any, torch.Tensor]] = {}  # the original is kept, so that its id stays its own

    def tensor(self, original: torch.Tensor) -> torch.Tensor:
        """A fake tensor on the CPU of the same shape and dtype; for a parameter a parameter with all that it carries."""
        if id(original) not in self._made:
            with self.mode:
                twin = torch.empty(original.shape, dtype=original.dtype, device="cpu")
            if isinstance(original, torch.nn.Parameter):
                twin = torch.nn.Parameter(twin, original.requires_grad)
                vars(twin).update(vars(original))  # what bitsandbytes keeps on a weight
            self._made[id(original)] = (original, twin)
        return self._made[id(original)][1]


def as_fake(model: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Replace a meta model's parameters, buffers and quantisation constants by fake tensors on the CPU."""
    faker = _Faker(mode)
    for module in model.modules():
        held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = faker.tensor(tensor)
        for holder, name in quant_tensors(module):
            setattr(holder, name, faker.tensor(getattr(holder, name)))


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
    for module in model.modules():
        for holder, name in quant_tensors(module):
            meter.hold(getattr(holder, name))
    resident = meter.live
    stepper = optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])
    with meter:
        for _ in range(2):
            meter.phase = "forward"
            value = loss(model, batch)
            meter.phase = "backward"
            value.backward()
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
    key, value = repeat_heads(query, key), repeat_heads(query, value)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(PLAIN_ATTENTION, _plain_causal)


@dataclass(frozen=True)
class Scenario:
    """A training step over `rows` rows of `length` tokens, of which `labelled` in each row carry loss.

    Full fine-tuning where `r` is None, else LoRA of that rank on all linear layers, on a base in NF4 where `nf4` is set.
    `dtype` is that of the weights and products, `adapter_dtype` that of the adapter.
    """

    rows: int
    length: int
    labelled: int
    r: int | None = None
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype = torch.float32
    nf4: bool = False
    gradient_checkpointing: bool = False


def quantise(model: Any, dtype: torch.dtype) -> None:
    """Replace the linear layers of all blocks by bitsandbytes' 4-bit ones, on meta or on real weights.

    The weight is a plain parameter with a `quant_state`, as bitsandbytes' own `Params4bit` cannot be made of fake tensors.
    Double quantisation (QLoRA, section 3): blocks of 64 weights with 8-bit constants, those in blocks of 256.
    """
    for name, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or module is model.get_output_embeddings():
            continue
        with torch.device("meta"):
            new = Linear4bit(module.in_features, module.out_features, module.bias is not None, dtype, quant_type="nf4")
        if module.weight.is_meta:
            packed, state = _meta_state(module.weight)
        else:
            packed, state = quantize_4bit(module.weight.data, compress_statistics=True, quant_type="nf4")
        new.weight = torch.nn.Parameter(packed, requires_grad=False)
        new.weight.quant_state, new.weight.compress_statistics, new.weight.quant_type = state, True, "nf4"
        new.bias = module.bias
        model.set_submodule(name, new)
    model.is_loaded_in_4bit = True


def _meta_state(weight: torch.Tensor) -> tuple[torch.Tensor, QuantState]:
    """What `quantize_4bit` would return for a weight, without contents."""
    blocks = -(-weight.numel() // 64)

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    inner = QuantState(absmax=made(-(-blocks // 256)), code=made(256), blocksize=256, dtype=torch.float32)
    state = QuantState(
        absmax=made(blocks, dtype=torch.uint8),
        shape=weight.shape,
        code=made(16),
        blocksize=64,
        quant_type="nf4",
        dtype=weight.dtype,
        offset=made(),
        state2=inner,
    )
    return made(-(-weight.numel() // 2), 1, dtype=torch.uint8), state


def quant_tensors(module: torch.nn.Module) -> list[tuple[Any, str]]:
    """Where a module's quantisation constants stand: (holder, attribute) of each tensor."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if state is None:
        return []
    return [(state, "absmax"), (state, "code"), (state, "offset"), (state.state2, "absmax"), (state.state2, "code")]


def build_model(config: Any, scenario: Scenario, device: str) -> Any:
    """The real modules of transformers and PEFT for a scenario, with random weights on `device` ("meta" or "cpu")."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=scenario.dtype, attn_implementation=PLAIN_ATTENTION)
    if scenario.nf4:
        quantise(model, scenario.dtype)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if scenario.gradient_checkpointing:
        enable_checkpointing(model)
    with torch.device(device):
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
