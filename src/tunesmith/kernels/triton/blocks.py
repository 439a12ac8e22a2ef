"""A decoder block's elementwise operators, in Triton. Importing it requires Triton.

Shapes: rows of H or F elements, or (B, A, L, D) for rotary embeddings. Computes in float32, rounds once at the end; rstd is
float32.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

#: Elements of a gated activation per program.
_BLOCK = 1024

#: Programs that share a norm's rows if its weight's gradient is needed: about two per streaming multiprocessor of a large GPU.
_PROGRAMS = 256

#: Cached, since Triton's own takes longer than allocating a tensor.
_power_of_2 = cache(triton.next_power_of_2)


@triton.jit
def _norm(x, weight, out, rstd, size, epsilon, offset, width: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, width)
    inside = at < size
    values = tl.load(x + row * size + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / size + epsilon)
    factors = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) + offset
    tl.store(out + row * size + at, (values * scale * factors).to(out.dtype.element_ty), mask=inside)
    tl.store(rstd + row, scale)


@triton.jit
def _norm_backward(
    gradient, x, rstd, weight, grad_x, parts, rows, size, offset, programs, width: tl.constexpr, of_weight: tl.constexpr
):
    program = tl.program_id(0)
    at = tl.arange(0, width)
    inside = at < size
    factors = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) + offset
    total = tl.zeros((width,), tl.float32)
    row = program
    while row < rows:  # Triton's interpreter does not support `range` over these with NumPy 2.5
        place = row.to(tl.int64) * size + at
        upstream = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row)
        normed = values * scale
        if of_weight:
            total += upstream * normed
        upstream *= factors
        along = tl.sum(upstream * normed, 0) / size
        tl.store(grad_x + place, ((upstream - normed * along) * scale).to(grad_x.dtype.element_ty), mask=inside)
        row += programs
    if of_weight:
        tl.store(parts + program * size + at, total, mask=inside)


@triton.jit
def _gated(gate, up, out, count, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    opening = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    values = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (opening * tl.sigmoid(opening) * values).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_backward(gradient, gate, up, grad_gate, grad_up, count, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    upstream = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    opening = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    values = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(opening)
    active = opening * share
    tl.store(grad_up + at, (upstream * active).to(grad_up.dtype.element_ty), mask=inside)
    grad = upstream * values * (share + active * (1 - share))
    tl.store(grad_gate + at, grad.to(grad_gate.dtype.element_ty), mask=inside)


@triton.jit
def _rotary(
    x,
    cos,
    sin,
    out,
    length,
    heads,
    x_batch,
    x_head,
    x_token,
    out_batch,
    out_head,
    out_token,
    turn_batch,
    turn_token,
    half,
    most_heads: tl.constexpr,
    most_half: tl.constexpr,
    backwards: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    batch, token = program // length, program % length
    head, at = tl.arange(0, most_heads)[:, None], tl.arange(0, most_half)[None, :]
    inside = (head < heads) & (at < half)
    turn = batch * turn_batch + token * turn_token + at
    first_cos = tl.load(cos + turn, mask=at < half, other=0.0).to(tl.float32)
    second_cos = tl.load(cos + turn + half, mask=at < half, other=0.0).to(tl.float32)
    first_sin = tl.load(sin + turn, mask=at < half, other=0.0).to(tl.float32)
    second_sin = tl.load(sin + turn + half, mask=at < half, other=0.0).to(tl.float32)
    place = x + batch * x_batch + token * x_token + head * x_head + at
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    if backwards:
        left, right = first * first_cos + second * second_sin, second * second_cos - first * first_sin
    else:
        left, right = first * first_cos - second * first_sin, second * second_cos + first * second_sin
    goal = out + batch * out_batch + token * out_token + head * out_head + at
    tl.store(goal, left.to(out.dtype.element_ty), mask=inside)
    tl.store(goal + half, right.to(out.dtype.element_ty), mask=inside)


def _warps(width: int) -> int:
    """Warps of a program that holds `width` elements."""
    return min(16, max(1, width // 512))


def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The normed x / sqrt(mean(x^2) + epsilon) (weight + offset), and rstd (..., 1), the reciprocal of the square root."""
    x, size = x.contiguous(), x.shape[-1]
    out, rstd = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    width = _power_of_2(size)
    if rstd.numel():
        _norm[(rstd.numel(),)](x, weight.contiguous(), out, rstd, size, epsilon, offset, width=width, num_warps=_warps(width))
    return out, rstd


def norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, offset: float, of_weight: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of x, and of weight in float32 if `of_weight`."""
    gradient, x, size, rows = gradient.contiguous(), x.contiguous(), x.shape[-1], rstd.numel()
    grad_x, programs = torch.empty_like(x), min(rows, _PROGRAMS) if of_weight else rows
    parts = rstd.new_empty((programs, size)) if of_weight else rstd
    width = _power_of_2(size)
    if rows:
        _norm_backward[(programs,)](
            gradient,
            x,
            rstd.contiguous(),
            weight.contiguous(),
            grad_x,
            parts,
            rows,
            size,
            offset,
            programs,
            width=width,
            of_weight=of_weight,
            num_warps=_warps(width),
        )
    return grad_x, parts.sum(0) if of_weight else None


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The product silu(gate) up."""
    gate, up = gate.contiguous(), up.contiguous()
    out, count = torch.empty_like(gate), gate.numel()
    if count:
        _gated[(-(-count // _BLOCK),)](gate, up, out, count, block=_BLOCK)
    return out


def gated_backward(gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up."""
    gradient, gate, up = gradient.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up, count = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    if count:
        _gated_backward[(-(-count // _BLOCK),)](gradient, gate, up, grad_gate, grad_up, count, block=_BLOCK)
    return grad_gate, grad_up


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backwards: bool) -> torch.Tensor:
    """The sum x cos + rotate_half(x) sin, or its gradient for x; x is (B, A, L, D), `cos` and `sin` (B or 1, 1, L, D)."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, length, size = x.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    out, half = torch.empty_like(x), size // 2
    turn_batch = cos.stride(0) if cos.shape[0] > 1 else 0
    if x.numel():
        _rotary[(batch * length,)](
            x,
            cos,
            sin,
            out,
            length,
            heads,
            *x.stride()[:3],
            *out.stride()[:3],
            turn_batch,
            cos.stride(2),
            half,
            most_heads=_power_of_2(heads),
            most_half=_power_of_2(half),
            backwards=backwards,
        )
    return out
