"""Small random models of every family, with exact arithmetic, and their loss and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from tests.support.shapes import SHAPE
from tunesmith.engine.attention.backends import use_tree_attention
from tunesmith.engine.modeling.blocks import fuse_blocks
from tunesmith.engine.modeling.loss import summed_loss

VOCABULARY = 61

SMALL: dict[str, Any] = {
    **SHAPE,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # so large that attention is far from uniform
}

CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
    "gemma": GemmaConfig(**SMALL),
}

ids = st.integers(1, 3)  # few ids, so that random rows share prefixes of all lengths


@st.composite
def random_rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows grown from shared stems: prefixes of prefixes, equal rows, rows that are a prefix of another."""
    stems = [draw(st.lists(ids, max_size=14))]
    for _ in range(draw(st.integers(0, 3))):
        stems.append(draw(st.sampled_from(stems)) + draw(st.lists(ids, max_size=14)))
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        tokens = draw(st.sampled_from(stems)) + draw(st.lists(st.integers(1, VOCABULARY - 1), max_size=12)) or [1]
        trained = draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
        rows.append({"input_ids": tokens, "loss_mask": trained})
    return rows


def exact_model(name: str) -> Any:
    """A model that computes in float64 throughout: transformers' RMS norms use float32, which hides 1e-8."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            offset = 1.0 if name == "gemma" else 0.0
            epsilon = getattr(module, "variance_epsilon", None) or module.eps

            def norm(x: torch.Tensor, own: Any = module, offset: float = offset, epsilon: float = epsilon) -> torch.Tensor:
                return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * (own.weight + offset)

            module.forward = norm
    return model


def fused_model(name: str) -> Any:
    """The same model as in training: fused norms, MLPs and attention."""
    model = exact_model(name)
    for module in model.modules():
        vars(module).pop("forward", None)
    fuse_blocks(model)
    return model


def loss_and_gradients(model: Any, batch: dict[str, Any], *, tree: bool) -> tuple[float, dict[str, torch.Tensor]]:
    use_tree_attention(model, on=tree)
    return with_gradients(model, lambda: summed_loss(model, batch) / max(batch["labelled"], 1))


def with_gradients(model: Any, loss_of: Callable[[], torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = loss_of()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def with_labels(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """transformers' inputs for whole rows: right-padded, with labels of -100 where the loss mask is 0."""
    length = max(len(row["input_ids"]) for row in rows)
    tokens, labels, mask = [torch.full((len(rows), length), filling) for filling in (0, -100, 0)]
    for number, row in enumerate(rows):
        own = torch.tensor(row["input_ids"])
        tokens[number, : len(own)], mask[number, : len(own)] = own, 1
        labels[number, : len(own)] = torch.where(torch.tensor(row["loss_mask"]), own, -100)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def results(model: Any) -> dict[str, torch.Tensor]:
    """Logits and every gradient, by name."""
    model.zero_grad()
    logits = model(input_ids=ROWS, use_cache=False).logits
    logits.square().mean().backward()
    return {"logits": logits.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


def transformers_loss(model: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """The mean loss over the labels from transformers' own forward over whole rows and torch's cross-entropy."""
    inputs = with_labels(rows)
    wanted = inputs.pop("labels")[:, 1:]
    logits = model(**inputs).logits[:, :-1]
    total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
    return total / max(int((wanted != -100).sum()), 1)


ROWS = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 1], [3, 4, 9, 9, 2, 1, 1, 5]])
