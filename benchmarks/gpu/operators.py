"""What a GPU reaches, operator by operator, at the sizes of a 7 B model's step: source of the plan's fractions of its peaks.

    benchmarks/gpu/run.sh operators --json benchmarks/results/gpu_NAME_operators.json    # on a machine with a GPU, 20 s
    benchmarks/gpu/run.sh operators --dry-run --json /tmp/dry.json                       # tiny ones, on a CPU too

Medians of triton.testing.do_bench on a GPU. A row has milliseconds, and TFLOP/s or GB/s if its FLOPs or bytes can be counted:
each tensor read and written once.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from cases import QWEN, TINY
from common import claim, parser, report
from torch.nn.attention import SDPBackend, sdpa_kernel

from tunesmith.engine.attention.tree import tree_attention
from tunesmith.engine.optim.adamw import AdamW
from tunesmith.engine.optim.sizes import STATE_BITS
from tunesmith.engine.packing.layout import Layout
from tunesmith.engine.packing.tree import Node
from tunesmith.kernels import triton
from tunesmith.kernels.dispatch import EAGER, OWN, Kernels, compiled
from tunesmith.kernels.liger import liger
from tunesmith.models.catalogue import known_models

DEVICE, BF16 = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"), torch.bfloat16

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model and a micro-batch; `row` is the length of each of several rows, `copied` the elements of a copy."""

    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    row: int
    copied: int


def sizes(*, dry: bool) -> Sizes:
    """The sizes of Qwen2-7B, or for a dry run of a tiny model of the same architecture."""
    values = {**known_models()[QWEN], **(TINY if dry else {})}
    names = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads")
    hidden, intermediate, vocabulary, heads, kv_heads = (values[name] for name in names)
    batch = (64, 32, 4096) if dry else (8192, 4096, 2**29)
    return Sizes(hidden, intermediate, vocabulary, heads, kv_heads, hidden // heads, *batch)


def timed(name: str, function: Callable[[], Any], flops: float = 0, moved: float = 0) -> Row:
    """The row of an operator."""
    if DEVICE.type == "cuda":
        from triton.testing import do_bench

        milliseconds = float(do_bench(function, warmup=10, rep=60, return_mode="median"))
    else:
        begun = time.perf_counter()
        function()
        milliseconds = 1000 * (time.perf_counter() - begun)
    row: Row = {"part": name, "milliseconds": milliseconds}
    row |= {"tflops": flops / milliseconds / 1e9} if flops else {}
    return row | ({"gigabytes_per_second": moved / milliseconds / 1e6} if moved else {})


def random(*shape: int, grad: bool = False) -> torch.Tensor:
    """A random bf16 tensor on the device; operators can be faster on zeros."""
    return torch.randn(shape, device=DEVICE, dtype=BF16, requires_grad=grad)


def products(size: Sizes) -> Iterator[Row]:
    """Linear layers, forward and input gradient, and what an adapter of rank 16 adds to one."""
    hidden, inner = size.hidden, size.intermediate
    for outs, ins in ((hidden, hidden), (size.kv_heads * size.head_dim, hidden), (inner, hidden), (hidden, inner)):
        weight, x, gradient = random(outs, ins), random(size.tokens, ins), random(size.tokens, outs)
        down, up = random(16, ins), random(outs, 16)
        low, out = x @ down.T, F.linear(x, weight)
        for tokens in (size.tokens, size.tokens // 4):
            given, flops = x[:tokens], 2 * tokens * outs * ins
            yield timed(
                f"linear {outs}x{ins}, {tokens} tokens", lambda given=given, weight=weight: F.linear(given, weight), flops
            )
        yield timed(
            f"into inputs {outs}x{ins}, {size.tokens} tokens", lambda g=gradient, w=weight: g @ w, 2 * size.tokens * outs * ins
        )
        yield timed(f"down {ins}", lambda x=x, down=down: x @ down.T, moved=2 * size.tokens * ins)
        yield timed(f"add up {outs}", lambda out=out, low=low, up=up: out.addmm_(low, up.T), moved=4 * size.tokens * outs)
        yield timed(f"gradient of up {outs}", lambda g=gradient, low=low: g.T @ low, moved=2 * size.tokens * outs)
    places, head = random(2048, hidden), random(size.vocabulary, hidden)
    for rows in (220, 512, 1024, 2048):
        given, flops = places[:rows], 2 * rows * size.vocabulary * hidden
        yield timed(f"logits of {rows}", lambda given=given: F.linear(given, head), flops)


def attention(size: Sizes) -> Iterator[Row]:
    """Causal attention over two rows and over one of half the length: SDPA's kernels, and flex attention if lengths differ."""
    kernels = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION) if DEVICE.type == "cuda" else (SDPBackend.MATH,)
    for rows, length in ((2, size.row), (1, size.row // 2)):
        q, k, v = (
            random(rows, heads, length, size.head_dim, grad=True) for heads in (size.heads, size.kv_heads, size.kv_heads)
        )
        flops = rows * size.heads * length * length / 2 * size.head_dim * 4
        for backend in kernels:

            def causal(q: Any = q, k: Any = k, v: Any = v, backend: Any = backend) -> torch.Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

            yield from both_ways(f"{backend.name.lower()} {rows} x {length}", causal, (q, k, v), flops)
    q, k, v = (random(1, heads, 2 * size.row, size.head_dim, grad=True) for heads in (size.heads, size.kv_heads, size.kv_heads))
    half, whole = size.row, 2 * size.row
    for name, cut in (("sdpa", half), ("flex", half - half // 32)):
        layout = Layout((Node(0, cut, cut), Node(cut, whole, whole)), whole)
        flops = size.heads * (cut**2 + (whole - cut) ** 2) / 2 * size.head_dim * 4

        def along(layout: Layout = layout) -> torch.Tensor:
            return tree_attention(None, q, k, v, None, tree_layout=layout)[0]

        yield from both_ways(f"two rows by {name}", along, (q, k, v), flops)


def both_ways(name: str, function: Callable[[], torch.Tensor], inputs: tuple[torch.Tensor, ...], flops: float) -> Iterator[Row]:
    """Forward, and forward with backward (Dao 2023, section 3.1: 2.5 times the FLOPs)."""
    upstream = torch.randn_like(function())
    yield timed(f"{name}, forward", function, flops)
    yield timed(f"{name}, both", lambda: torch.autograd.grad(function(), inputs, upstream), 3.5 * flops)


def elementwise(size: Sizes) -> Iterator[Row]:
    """The elementwise operators and norms of a block, by each kind of kernel."""
    x, weight, gate, up, gradient = (
        random(1, size.tokens, size.hidden),
        random(size.hidden),
        *(random(1, size.tokens, size.intermediate) for _ in range(3)),
    )
    cos, heads = random(1, 1, size.tokens, size.head_dim), random(1, size.tokens, size.heads, size.head_dim).transpose(1, 2)
    kinds: Mapping[str, Callable[[], Kernels]] = {
        "eager": lambda: EAGER,
        "own": lambda: OWN,
        "compiled": lambda: compiled(DEVICE),
        "liger": lambda: liger(DEVICE),
    }
    for kind, made in kinds.items():
        try:
            kernels = made()
        except RuntimeError as error:
            print(f"{kind}: {error}")
            continue
        _, root = kernels.norm(x, weight, 1e-6, 0.0)
        yield timed(f"norm, {kind}", lambda k=kernels: k.norm(x, weight, 1e-6, 0.0), moved=4 * x.numel())
        into = (x, x, root, weight, 0.0, False)
        yield timed(f"norm grads, {kind}", lambda k=kernels, into=into: k.norm_backward(*into), moved=6 * x.numel())
        yield timed(f"gated, {kind}", lambda k=kernels: k.gated(gate, up, "silu"), moved=6 * gate.numel())
        grads = (gradient, gate, up, "silu")
        yield timed(f"gated grads, {kind}", lambda k=kernels, s=grads: k.gated_backward(*s), moved=10 * gate.numel())
        yield timed(f"rotary, {kind}", lambda k=kernels: k.rotary(heads, cos, cos, False), moved=4 * heads.numel())


def weights(size: Sizes) -> Iterator[Row]:
    """Dequantising a 4-bit matrix, one update of as many weights with each state format, and a plain copy."""
    weight = random(size.intermediate, size.hidden)
    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    yield timed("dequantise", lambda: dequantize_4bit(packed, state), moved=2.5 * weight.numel())
    parameter = torch.nn.Parameter(weight)
    parameter.grad = random(size.intermediate, size.hidden)
    for optim, bits in STATE_BITS.items():
        optimizer = AdamW.named(optim, [parameter], lr=1e-5)
        optimizer.step()
        yield timed(f"update, {optim}", optimizer.step, moved=parameter.numel() * (6 + bits / 2))
        del optimizer
    source = random(size.copied)
    target = torch.empty_like(source)
    yield timed("copy", lambda: target.copy_(source), moved=4 * source.numel())


def main() -> None:
    """Time all operators."""
    options = parser(__doc__ or "")
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--dry-run", action="store_true", help="tiny sizes: that the script works, not how fast anything is")
    asked = options.parse_args()
    os.environ[triton.SWITCH] = "1"
    size, kind = sizes(dry=asked.dry_run), "dry run" if asked.dry_run else "measured"
    claims = []
    if DEVICE.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        claims.append(claim("context_gib", (total - free) / 2**30, "GiB"))
    rows: list[Row] = []
    for part in (products, attention, elementwise, weights):
        for row in part(size):
            print(row, flush=True)
            rows.append(row)
    report(asked.json, claims, rows, kind=kind, kernels_off=triton.unsupported_reason(DEVICE))


if __name__ == "__main__":
    main()
