"""Whether the kernels give on a device what PyTorch's operators give, at sizes that are no multiple of a block's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tunesmith.gpu import adamw, blocks, cross_entropy
from tunesmith.native.library import own_graph


def wrong(device: torch.device) -> str | None:
    """Why the kernels are not to be used on the device, or None."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((5, 1037), (5, 1037), (5, 1037), (1037,), (2, 5, 3, 22), (1, 1, 3, 22), (1, 1, 3, 22))
    given = [torch.randn(shape, generator=draw).to(device) for shape in shapes]
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.03)):
        pairs = _pairs([each.to(dtype) for each in given])
        if not all(torch.allclose(one.float(), two, rtol=tolerance, atol=tolerance) for one, two in pairs):
            return "the kernels' results are not those of the formulas"
    if not _updates(device):
        return "the optimizer's kernel does not give what its formula gives"
    return None


def _updates(device: torch.device) -> bool:
    """Whether a first update with bytes for states goes where AdamW goes: against the gradient's sign, by the learning rate."""
    weight, gradient = torch.linspace(-3, 3, 1037, device=device), torch.linspace(2, -5, 1037, device=device)
    code = torch.linspace(-1, 1, 256, device=device)
    values, found = tuple(code.tolist()), weight.clone()
    scales = torch.zeros((2, 5), device=device)
    mean, square = (adamw.Moment(torch.full_like(found, 127, dtype=torch.uint8), each, code) for each in scales)
    step = adamw.Step(lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.5, number=1, seed=0)
    adamw.update(found, gradient, (mean, square), step, (values, values))
    expected = weight * 0.95 - 0.1 * gradient / (gradient.abs() + 1e-8)
    return torch.allclose(found, expected, atol=1e-5) and bool((scales > 0).all())


def _pairs(given: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the kernels give, each with what the formulas give in float32."""
    x, up, gradient, weight, heads, cos, sin = given
    targets = torch.arange(0, 1000, 200, device=x.device)
    exact = [each.float() for each in given]
    with own_graph():
        leaves = [exact[place].clone().requires_grad_() for place in (0, 1, 3, 4)]
        root = (leaves[0].square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        normed, active = leaves[0] * root * (leaves[2] + 1), F.silu(leaves[0]) * leaves[1]
        turned = leaves[3] * exact[5] + torch.cat([-leaves[3][..., 11:], leaves[3][..., :11]], -1) * exact[6]
        expected = [
            *(each.detach() for each in (normed, root, active, turned)),
            *torch.autograd.grad(normed, (leaves[0], leaves[2]), exact[2], retain_graph=True),
            *torch.autograd.grad(active, leaves[:2], exact[2]),
            *torch.autograd.grad(turned, leaves[3], exact[4]),
            F.cross_entropy(exact[1], targets, reduction="none"),
        ]
    with torch.no_grad():
        out, own_root = blocks.norm(x, weight, 1e-5, 1.0)
        found = [
            *(out, own_root, blocks.gated(x, up), blocks.rotary(heads, cos, sin, backwards=False)),
            *blocks.norm_slopes(gradient, x, own_root, weight, 1.0, of_weight=True),
            *(*blocks.gated_slopes(gradient, x, up), blocks.rotary(heads, cos, sin, backwards=True)),
            cross_entropy.from_logits(up, targets, None),
        ]
    return [(one, two) for one, two in zip(found, expected, strict=True) if one is not None]
