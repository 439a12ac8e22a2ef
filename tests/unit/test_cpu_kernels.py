"""Kernels in C++: compiled once and atomically, refused with a reason, and equal to the formulas at awkward sizes."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.shapes import SHAPE
from tunesmith.engine.attention.backends import use_tree_attention
from tunesmith.engine.attention.tree_torch import blocks_backward, blocks_forward
from tunesmith.engine.modeling.blocks import fuse_blocks
from tunesmith.engine.modeling.checkpointing import enable_checkpointing
from tunesmith.engine.modeling.loss import summed_loss
from tunesmith.engine.packing.batch import collate_tree
from tunesmith.engine.packing.tree import Node, as_numbers
from tunesmith.kernels import cpu
from tunesmith.kernels.cpu import adapters, blocks, cross_entropy, library, tree_attention
from tunesmith.kernels.dispatch import EAGER, OWN

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="kernels need Linux and a C++ compiler"
)

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small kernel's source, and an empty cache."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(library.SWITCH, raising=False)
    path = tmp_path / "small.cpp"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads for the duration of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def kept(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "cache" / "native").iterdir()]


def test_kernels_are_had_here() -> None:
    assert cpu.unsupported_reason() is None


def test_a_library_is_compiled_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = library._compiled(source)
    assert kept(tmp_path) == [first.name]
    made = first.stat().st_mtime_ns
    assert library._compiled(source) == first
    assert first.stat().st_mtime_ns == made
    (tmp_path / "more.h").write_text("// a header beside it\n")
    second = library._compiled(source)
    source.write_text(SOURCE.replace("42", "43"))
    third = library._compiled(source)
    monkeypatch.setattr(library, "_processor", lambda: b"another")
    assert len({first, second, third, library._compiled(source)}) == 4


def test_a_source_that_does_not_compile_leaves_nothing(source: Path, tmp_path: Path) -> None:
    source.write_text("no C++ at all")
    with pytest.raises(library.NoKernelError, match=r"g\+\+ failed: .*small.cpp"):
        library._compiled(source)
    assert kept(tmp_path) == []


def test_reasons(source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as changed:
        changed.setenv("PATH", str(tmp_path))
        changed.delenv("CXX", raising=False)
        with pytest.raises(library.NoKernelError, match="no C\\+\\+ compiler"):
            library._compiled(source)
    with monkeypatch.context() as changed:
        changed.setattr(sys, "platform", "win32")
        with pytest.raises(library.NoKernelError, match="win32"):
            library._compiled(source)
    with monkeypatch.context() as changed:
        changed.setenv(library.SWITCH, "0")
        with pytest.raises(library.NoKernelError, match="TUNESMITH_NATIVE is 0"):
            library._compiled(source)
    with monkeypatch.context() as changed:
        changed.setenv("TUNESMITH_CACHE", str(source / "below-a-file"))
        with pytest.raises(OSError, match=r"small\.cpp"):
            library._compiled(source)


def test_what_others_may_write_is_not_run(source: Path) -> None:
    made = library._compiled(source)
    for path in (made, made.parent):
        before = path.stat().st_mode
        path.chmod(before | 0o002)
        with pytest.raises(library.NoKernelError, match="can be written by others"):
            library._compiled(source)
        path.chmod(before)
    assert library._compiled(source) == made


def test_a_reason_is_told_again_and_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library.library.cache_clear()
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    for _ in range(2):
        with pytest.raises(library.NoKernelError, match="no C\\+\\+ compiler"):
            library.library("blocks")


@pytest.mark.parametrize("module", cpu.KERNELS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_a_kernel_that_computes_nonsense_is_refused(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel whose functions do nothing, as a miscompiled one might."""
    monkeypatch.setattr(module, "call", lambda *_: 0)
    reason = module.unsupported_reason.__wrapped__()
    assert "do not match the reference formula" in reason


def test_the_first_call_may_come_from_a_block_that_is_recomputed() -> None:
    """Tensors of the kernel's test must not be counted among those that the block saves."""
    for module in cpu.KERNELS:
        module.unsupported_reason.cache_clear()
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).train()
    fuse_blocks(model)
    enable_checkpointing(model, True)
    use_tree_attention(model, on=True)
    batch = collate_tree([{"input_ids": list(range(1, 90)), "loss_mask": [True] * 89}])
    summed_loss(model, batch).backward()
    assert cpu.unsupported_reason() is None


# --- attention ---


def chain(*lengths: int) -> list[Node]:
    """Each node is the child of the previous one."""
    ends = [sum(lengths[: n + 1]) for n in range(len(lengths))]
    return [Node(end - length, end, ends[-1]) for length, end in zip(lengths, ends, strict=True)]


TREES = {
    "one token": [Node(0, 1, 1)],
    "several roots": [
        Node(0, 5, 40),
        Node(5, 22, 30),
        Node(22, 30, 30),
        Node(30, 40, 40),
        Node(40, 41, 41),
        Node(41, 100, 100),
    ],
    "longer than a chunk": [Node(0, 300, 620), Node(300, 301, 301), Node(301, 620, 620)],
    "deeper than a stretch": chain(*[2] * 70, 9),
}


def inputs(nodes: list[Node], heads: int, shared: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key, value and a gradient in the model's memory layout: (H, T, D) views of (T, H, D)."""
    draw = torch.Generator().manual_seed(0)
    tokens = max(node.end for node in nodes)
    return [
        torch.randn((tokens, count, size), generator=draw, dtype=torch.float64).to(dtype).transpose(0, 1)
        for count in (heads, shared, shared, heads)
    ]


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize(("heads", "shared", "size"), [(1, 1, 8), (6, 2, 24), (7, 1, 64), (2, 2, 80), (50, 1, 5)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5), (torch.bfloat16, 0.02)])
def test_attention_is_that_of_torchs_kernel(
    name: str, heads: int, shared: int, size: int, dtype: torch.dtype, tolerance: float
) -> None:
    nodes, scale = TREES[name], size**-0.5
    tensors = inputs(nodes, heads, shared, size, dtype)
    exact = [each.double() for each in tensors]
    out, weight = blocks_forward(*exact[:3], nodes, scale)
    grads = blocks_backward(*exact, out, weight, nodes, scale)
    table = tree_attention.table(as_numbers(nodes))
    found, sums = tree_attention.forward(*tensors[:3], table, scale)
    made = tree_attention.backward(*tensors, found, sums, table, scale)
    for one, other in zip((found, sums, *made), (out, weight, *grads), strict=True):
        assert_close(one.double(), other, rtol=tolerance, atol=tolerance)
    again = tree_attention.backward(*tensors, found, sums, table, scale)
    assert all(torch.equal(one, other) for one, other in zip(made, again, strict=True))


@pytest.mark.parametrize("count", [1, 3, 5])
def test_attention_with_other_numbers_of_threads(threads: Callable[[int], None], count: int) -> None:
    nodes = TREES["longer than a chunk"]
    tensors = inputs(nodes, 4, 2, 16, torch.float64)
    table = tree_attention.table(as_numbers(nodes))
    out, weight = blocks_forward(*tensors[:3], nodes, 0.3)
    grads = blocks_backward(*tensors, out, weight, nodes, 0.3)
    threads(count)
    found, sums = tree_attention.forward(*tensors[:3], table, 0.3)
    for one, other in zip(tree_attention.backward(*tensors, found, sums, table, 0.3), grads, strict=True):
        assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_attention_reads_what_lies_otherwise_in_memory() -> None:
    nodes = TREES["several roots"]
    tensors = inputs(nodes, 4, 2, 16, torch.float32)
    table = tree_attention.table(as_numbers(nodes))
    out, weight = tree_attention.forward(*tensors[:3], table, 0.3)
    grads = tree_attention.backward(*tensors, out, weight, table, 0.3)
    for lie in (torch.Tensor.contiguous, lambda each: each.transpose(1, 2).contiguous().transpose(1, 2)):
        others = [lie(each) for each in tensors]
        assert torch.equal(tree_attention.forward(*others[:3], table, 0.3)[0], out)
        made = tree_attention.backward(*others, out, weight, table, 0.3)
        assert all(torch.equal(one, other) for one, other in zip(made, grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_attention_does_not_hide_what_is_no_number(dtype: torch.dtype, what: float) -> None:
    """A non-finite key reaches its node's later tokens and its descendants, and no others."""
    nodes = TREES["several roots"]
    query, key, value, gradient = inputs(nodes, 2, 1, 16, dtype)
    key[0, 7] = what
    table = tree_attention.table(as_numbers(nodes))
    out, weight = tree_attention.forward(query, key, value, table, 0.3)
    seen = torch.zeros(len(out), dtype=torch.bool)
    seen[7:30] = True
    spoilt = out.isnan().all(-1).any(-1)
    assert not spoilt[~seen].any()
    assert spoilt[7:30].all() if math.isnan(what) else spoilt[7:30].any()
    grad_query = tree_attention.backward(query, key, value, gradient, out, weight, table, 0.3)[0]
    assert grad_query[7:30].isnan().any()
    assert not grad_query[40:].isnan().any()


# --- GEMMs ---


@pytest.mark.parametrize("tokens", [0, 1, 50, 203])
@pytest.mark.parametrize("columns", [1, 40, 193])
@pytest.mark.parametrize("numbers", [1, 37, 3300])  # the last exceeds the depth after which sums are stored
@pytest.mark.parametrize("rank", [1, 16, 70])
def test_a_layer_with_its_adapter(threads: Callable[[int], None], tokens: int, columns: int, numbers: int, rank: int) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn((tokens, numbers + 3), generator=draw)[:, 1 : numbers + 1]
    m = torch.randn((columns, numbers), generator=draw).T
    p, q = torch.randn((rank, numbers), generator=draw).T, torch.randn((rank, columns), generator=draw)
    before = torch.randn((tokens, columns), generator=draw)
    low = 0.5 * x.double() @ p.double()
    expected = x.double() @ m.double() + 3 * low @ q.double()
    near = {"rtol": 1e-5, "atol": 1e-5 * max(expected.abs().max().item(), 1) if tokens else 0}
    made = []
    for count in (1, 2, 3):
        threads(count)
        made.append(adapters.adapted(x, m, p, q, p_scale=0.5, q_scale=3))
        assert_close(made[-1][0].double(), low, **near)
        assert_close(made[-1][1].double(), expected, **near)
        assert torch.equal(made[-1][1], made[0][1])
    added = adapters.adapted(x, m.contiguous(), p.contiguous(), q, p_scale=0.5, q_scale=3, total=before.clone())
    assert torch.equal(added[0], made[0][0])
    assert_close(added[1].double(), before + expected, **near)


def test_panels_that_do_not_fit_the_cache_at_once() -> None:
    """A weight with more elements than fit into the panels at a time: it is processed block by block."""
    x, weight, down, up = torch.randn(30, 1500), torch.randn(1601, 1500), torch.randn(4, 1500), torch.randn(1601, 4)
    exact = [each.double() for each in (x, weight, down, up)]
    _, out = adapters.adapted(x, weight.T, down.T, up.T)
    assert_close(out.double(), exact[0] @ exact[1].T + exact[0] @ exact[2].T @ exact[3].T, rtol=1e-4, atol=1e-2)


# --- the loss ---


@pytest.mark.parametrize(("places", "size", "vocabulary"), [(0, 8, 9), (1, 1, 1), (7, 37, 300), (205, 64, 513), (50, 70, 256)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_cross_entropy(
    threads: Callable[[int], None], places: int, size: int, vocabulary: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Scores grow with the token, so each block of the vocabulary has a new maximum."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn((places, size + 2), generator=draw, dtype=torch.float64)
    head = torch.randn((vocabulary, size), generator=draw, dtype=torch.float64)
    head *= torch.linspace(0.1, 2, vocabulary).unsqueeze(-1)
    targets = torch.randint(vocabulary, (places,), generator=draw)
    weights = torch.rand(places, generator=draw, dtype=torch.float64)
    leaf = hidden[:, 1 : size + 1].clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf @ head.T, targets, reduction="none")
    (gradients,) = torch.autograd.grad((expected * weights).sum(), leaf)
    given = (hidden.to(dtype)[:, 1 : size + 1], head.to(dtype), targets)
    made = []
    for count in (1, 2, 3):
        threads(count)
        made.append(cross_entropy.with_gradient(*given, weights.to(dtype)))
        near = {"rtol": tolerance, "atol": tolerance * max(1.0, head.abs().max().item())}
        assert_close(made[-1][0].double(), expected.detach(), **near)
        assert_close(made[-1][1].double(), gradients, **near)
        assert all(torch.equal(one, other) for one, other in zip(made[-1], made[0], strict=True))
    assert torch.equal(cross_entropy.cross_entropy(*given), made[0][0])


@pytest.mark.parametrize(("places", "vocabulary"), [(0, 9), (1, 1), (7, 300), (16, 3), (53, 257)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_cross_entropy_of_logits_that_are_kept(
    threads: Callable[[int], None], places: int, vocabulary: int, dtype: torch.dtype, tolerance: float
) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn((vocabulary, places), generator=draw, dtype=torch.float64)
    logits *= torch.linspace(1, 30, vocabulary).unsqueeze(-1)  # increasing scores
    logits[: vocabulary // 2, places // 2 :] = float("-inf")
    targets = torch.randint(vocabulary // 2, vocabulary, (places,), generator=draw)
    weights = torch.rand(places, generator=draw, dtype=torch.float64)
    leaf = logits.to(dtype).double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf.T, targets, reduction="none")
    (gradients,) = torch.autograd.grad((expected * weights).sum(), leaf)
    for count in (1, 2, 5):
        threads(count)
        kept = logits.to(dtype, copy=True)
        losses = cross_entropy.from_logits(kept, targets, None)
        assert_close(losses.double(), expected.detach(), rtol=tolerance, atol=tolerance)
        assert torch.equal(kept, logits.to(dtype))
        assert torch.equal(cross_entropy.from_logits(kept, targets, weights.to(dtype)), losses)
        assert_close(kept.double(), gradients, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("first", [True, False])
def test_tokens_that_are_hardly_likely_add_up(threads: Callable[[int], None], first: bool) -> None:
    """Each of them is below the rounding error of a sum that contains the likely token; together they are 2 % of it."""
    threads(1)
    logits = torch.full((2**19, 1), -17.0)
    likely = 0 if first else 2**19 - 1
    logits[likely] = 0
    expected = torch.logsumexp(logits.double(), 0)
    targets = torch.tensor([likely])
    assert_close(cross_entropy.from_logits(logits.clone(), targets, None).double(), expected, rtol=0, atol=2e-6)
    found = cross_entropy.cross_entropy(torch.ones(1, 1), logits, targets)
    assert_close(found.double(), expected, rtol=0, atol=2e-6)


def test_more_places_than_pass_over_the_head_at_once() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, head = torch.randn((9000, 3), generator=draw), torch.randn((20, 3), generator=draw)
    targets = torch.randint(20, (9000,), generator=draw)
    found = cross_entropy.cross_entropy(hidden, head, targets)
    assert_close(found, torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="none"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", [-1, 5])
def test_a_target_that_is_no_token_is_refused(target: int) -> None:
    with pytest.raises(IndexError, match="vocabulary of 5"):
        cross_entropy.cross_entropy(torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, target]))
    with pytest.raises(IndexError, match="vocabulary of 5"):
        cross_entropy.from_logits(torch.ones(5, 2), torch.tensor([0, target]), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_the_loss_does_not_hide_what_is_no_number(dtype: torch.dtype, what: float) -> None:
    hidden, head = torch.ones((3, 4), dtype=dtype), torch.ones((300, 4), dtype=dtype)
    hidden[1, 2] = what
    losses, gradients = cross_entropy.with_gradient(hidden, head, torch.tensor([0, 1, 299]), torch.ones(3, dtype=dtype))
    assert losses.isnan().tolist() == [False, True, False]
    assert gradients.isnan().any(-1).tolist() == [False, True, False]
    logits = torch.ones((300, 3), dtype=dtype)
    logits[150, 1] = what
    losses = cross_entropy.from_logits(logits, torch.tensor([0, 1, 299]), torch.ones(3, dtype=dtype))
    assert losses.isnan().tolist() == logits.isnan().any(0).tolist() == [False, True, False]


# --- elementwise operators of blocks ---


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 16), (1, 7, 100), (3, 5, 577)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.005)])
def test_norms_and_gates(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    """In bfloat16 the formula's values, rounded once: 0.005 is slightly more than half of its last digit."""
    draw = torch.Generator().manual_seed(0)
    x, up, gradient = (5 * torch.randn(shape, generator=draw).to(dtype) for _ in range(3))
    weight = torch.randn(shape[-1], generator=draw).to(dtype)
    x.view(-1)[0] = -150.0
    exact = [each.double() for each in (x, up, gradient, weight)]
    out, rstd = EAGER.norm(exact[0], exact[3], 1e-5, 1.0)
    found, own_rstd = OWN.norm(x, weight, 1e-5, 1.0)
    pairs = [
        (found, out),
        (own_rstd, rstd),
        *zip(
            OWN.norm_backward(gradient, x, own_rstd, weight, 1.0, True),
            EAGER.norm_backward(exact[2], exact[0], rstd, exact[3], 1.0, True),
            strict=True,
        ),
        (OWN.gated(x, up, "silu"), EAGER.gated(exact[0], exact[1], "silu")),
        *zip(
            OWN.gated_backward(gradient, x, up, "silu"), EAGER.gated_backward(exact[2], exact[0], exact[1], "silu"), strict=True
        ),
    ]
    for one, other in pairs:
        assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_norms_weight_with_other_numbers_of_threads(threads: Callable[[int], None], count: int) -> None:
    x, gradient, weight = torch.randn(1000, 21), torch.randn(1000, 21).abs(), torch.randn(21)
    threads(count)
    rstd = OWN.norm(x, weight, 1e-5, 0.0)[1]
    alone, nothing = OWN.norm_backward(gradient, x, rstd, weight, 0.0, False)
    grad_x, grad_weight = OWN.norm_backward(gradient, x, rstd, weight, 0.0, True)
    assert nothing is None
    assert torch.equal(grad_x, alone)
    assert grad_weight is not None
    expected = (gradient.double() * x.double() * rstd.double()).sum(0)
    assert_close(grad_weight.double(), expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_and_norms_do_not_hide_what_is_no_number(dtype: torch.dtype) -> None:
    x, one = torch.full((2, 40), 0.5, dtype=dtype), torch.ones((2, 40), dtype=dtype)
    x[1, 3], x[1, 39] = float("nan"), float("nan")
    wanted = x.isnan()
    assert torch.equal(OWN.gated(x, one, "silu").isnan(), wanted)
    assert torch.equal(OWN.gated_backward(one, x, one, "silu")[0].isnan(), wanted)
    assert torch.equal(OWN.norm(x, one[0], 1e-5, 0.0)[0].isnan().any(-1), wanted.any(-1))
    assert not OWN.gated(torch.full((2, 40), float("-inf"), dtype=dtype), one, "silu").isfinite().any()


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    """To nearest, ties to even, which products of two values often hit; too large values become infinite."""
    draw = torch.Generator().manual_seed(0)
    x, cos = (torch.randn((1, 1, 50, 128), generator=draw).mul(3).exp().bfloat16() for _ in range(2))
    x[..., 0] = 3e38
    made = OWN.rotary(x, cos, torch.zeros_like(x), False)
    expected = (x.float() * cos.float()).bfloat16()
    assert expected.isinf().any()
    assert torch.equal(made[expected.isfinite()], expected[expected.isfinite()])
    assert not made[expected.isinf()].isfinite().any()  # infinity, or NaN from infinity times 0


@pytest.mark.parametrize("size", [2, 8, 34, 128])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.005)])
def test_rotations(size: int, rows: int, backwards: bool, dtype: torch.dtype, tolerance: float) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn((2, 5, 3, size), generator=draw).to(dtype).transpose(1, 2)
    cos, sin = (torch.randn((rows, 1, 5, size), generator=draw).to(dtype) for _ in range(2))
    found = OWN.rotary(x, cos, sin, backwards)
    assert found.stride() == x.stride()
    expected = EAGER.rotary(x.double(), cos.double(), sin.double(), backwards)
    assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_what_has_no_kernel_goes_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another dtype, another activation, a FakeTensor: the library is not called."""
    monkeypatch.setattr(blocks, "call", lambda *_: pytest.fail("the kernel was asked"))
    x = torch.randn(2, 3, 8)
    assert_close(OWN.gated(x, x, "gelu"), EAGER.gated(x, x, "gelu"))
    for dtype in (torch.float16, torch.float64):
        cast = x.to(dtype)
        assert_close(OWN.norm(cast, cast[0, 0], 1e-5, 0.0), EAGER.norm(cast, cast[0, 0], 1e-5, 0.0))
        assert_close(OWN.rotary(cast[None], cast, cast, False), EAGER.rotary(cast[None], cast, cast, False))
    with torch._subclasses.FakeTensorMode():
        fake = torch.ones(2, 3, 8)
        assert OWN.gated_backward(fake, fake, fake, "silu")[0].shape == fake.shape
