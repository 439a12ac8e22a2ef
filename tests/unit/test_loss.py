"""The labelled-only loss equals the model's own, value and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.support.models import with_labels
from tests.support.shapes import SHAPE
from tunesmith.engine.modeling import chunks, loss
from tunesmith.engine.modeling.loss import summed_loss
from tunesmith.engine.packing.batch import PaddedCollator, collate_tree
from tunesmith.kernels import cpu

SMALL: dict[str, Any] = {
    **SHAPE,
    "vocab_size": 97,
    "max_position_embeddings": 64,
}
# Granite divides its logits: the loss must go through the model's own forward.
CONFIGS = [
    LlamaConfig(**SMALL),
    Qwen2Config(**SMALL),
    Qwen3Config(**SMALL),
    MistralConfig(**SMALL),
    GemmaConfig(**SMALL),
    Gemma2Config(**SMALL, final_logit_softcapping=2.0),
    GraniteConfig(**SMALL, logits_scaling=4.0),
]


def rows(lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in lengths:
        ids = torch.randint(1, 97, (length,), generator=generator).tolist()
        trained = [bool(flag) for flag in torch.rand(length, generator=generator) < 0.5]
        made.append({"input_ids": ids, "loss_mask": [*trained[:-1], True]})
    return made


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_type)
@pytest.mark.parametrize("lengths", [(7, 12, 5), (9, 9)], ids=["padded", "even"])
def test_equal_to_the_models_own_loss_and_gradients(config: Any, lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double()
    made = rows(lengths)
    batch = PaddedCollator(pad_id=0)(made)
    assert ("attention_mask" in batch) == (len(set(lengths)) > 1)
    mine = summed_loss(model, batch) / batch["labelled"]
    mine.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    theirs = model(**with_labels(made)).loss
    theirs.backward()
    # transformers computes its loss in float32.
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("trained", [("head", "bias"), ("bias",), ()], ids=["head", "bias", "frozen"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("kernels", [True, False], ids=["own", "torch"])
def test_loss_in_chunks_equals_cross_entropy(
    trained: tuple[str, ...], biased: bool, cap: float | None, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """150 positions in chunks of 64, weighted; value and gradients to the last digits, in float64, or float32 with kernels."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    if not kernels:
        for module in cpu.KERNELS:
            monkeypatch.setattr(module, "unsupported_reason", lambda: "not here")
    torch.manual_seed(0)
    hidden = torch.randn(150, 16, dtype=torch.float64, requires_grad=True)
    head = torch.randn(40, 16, dtype=torch.float64, requires_grad="head" in trained)
    bias = torch.randn(40, dtype=torch.float64, requires_grad="bias" in trained) if biased else None
    targets, weights = torch.randint(40, (150,)), torch.randint(1, 4, (150,)).float()
    mine = loss._LinearCrossEntropy.apply(hidden, head, bias, targets, weights, cap, True)
    logits = hidden @ head.T if bias is None else hidden @ head.T + bias
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    whole = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    theirs = (whole * weights).sum()
    torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=0)
    leaves = [leaf for leaf in (hidden, head, bias) if leaf is not None and leaf.requires_grad]
    expected = torch.autograd.grad(theirs / 7, leaves)
    for one, other in zip(torch.autograd.grad(mine / 7, leaves), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)
    narrow = [
        None if each is None else each.detach().float().requires_grad_(each.requires_grad) for each in (hidden, head, bias)
    ]
    mine = loss._LinearCrossEntropy.apply(*narrow, targets, weights, cap, True)
    torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=0)
    found = torch.autograd.grad(mine / 7, [leaf for leaf in narrow if leaf is not None and leaf.requires_grad])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_padding_goes_by_length_and_not_by_pad_id() -> None:
    """Pad equals the end-of-turn token (2), which must be labelled where it is real."""
    batch = PaddedCollator(pad_id=2)(
        [{"input_ids": [5, 2], "loss_mask": [False, True]}, {"input_ids": [5, 6, 2], "loss_mask": [False, False, True]}]
    )
    assert batch["input_ids"].tolist() == [[5, 2], [5, 6]]  # the last label of a row never goes through the model
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert batch["sources"].tolist() == [0, 3]
    assert batch["targets"].tolist() == [2, 2]
    assert (batch["labelled"], batch["row_tokens"]) == (2, 5)


@pytest.mark.parametrize("collate", [PaddedCollator(pad_id=0), collate_tree], ids=["padded", "tree"])
def test_first_token_is_never_counted(collate: Any) -> None:
    assert collate([{"input_ids": [5, 6], "loss_mask": [True, True]}])["labelled"] == 1


def test_padding_does_not_change_the_loss(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    made = rows((6, 20))
    collate = PaddedCollator(pad_id=2)
    with torch.no_grad():
        together = summed_loss(model, collate(made)).item()
        apart = sum(summed_loss(model, collate([row])).item() for row in made)
    assert together == pytest.approx(apart, rel=1e-6)
