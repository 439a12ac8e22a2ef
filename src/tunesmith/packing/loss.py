"""Cross-entropy over labelled places alone: logits are made for the hidden states that predict a label and no others.

Shapes: B rows, L tokens, H hidden size, V vocabulary, N labelled places.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from tunesmith.packing.attention import NAME as TREE_ATTENTION

#: Config entries of models that change their logits after the head; those go through the model's own forward.
_LOGIT_CHANGES = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")
_NOT_INPUTS = ("sources", "targets", "weights", "row_tokens")


def _causal(model: Any) -> Any:
    """The causal language model itself, out of PEFT's wrapper if it is in one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def labelled_logits(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Logits (N, V) at the places of `sources`, from the decoder's hidden states of the whole batch.

    `model` is a causal language model of transformers, with or without PEFT around it.
    """
    causal = _causal(model)
    inputs = {key: value for key, value in batch.items() if key not in _NOT_INPUTS}
    logits: torch.Tensor
    if any(getattr(causal.config, entry, None) for entry in _LOGIT_CHANGES):
        logits = causal(**inputs, use_cache=False).logits.flatten(0, 1)[batch["sources"]]
    else:
        hidden = causal.get_decoder()(**inputs, use_cache=False).last_hidden_state  # (B, L, H)
        logits = causal.get_output_embeddings()(hidden.flatten(0, 1)[batch["sources"]])
    return logits


def summed_loss(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Sum over the labelled tokens of all rows of -log p(token | tokens before it), in nats, a float32 scalar.

    A label that several rows share counts once for each, as if the rows had been computed one by one. In float64
    where the model is, so that tests can be exact.
    """
    logits = labelled_logits(model, batch)
    exact = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(exact, batch["targets"], reduction="none")
    loss: torch.Tensor = (losses * batch["weights"]).sum()
    return loss


def use_tree_attention(model: Any, *, on: bool) -> None:
    """Switch a model between attention along a tree, which needs batches with a layout, and SDPA."""
    _causal(model).set_attn_implementation(TREE_ATTENTION if on else "sdpa")


class LossModel(torch.nn.Module):
    """A causal language model whose forward is `summed_loss` in the compute dtype, so that wrappers (DDP) see it."""

    def __init__(self, model: Any, compute_dtype: str) -> None:
        super().__init__()
        self.model = model
        self.compute_dtype = compute_dtype

    def forward(self, **batch: Any) -> torch.Tensor:
        """The summed loss of one batch."""
        device = batch["input_ids"].device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.compute_dtype == "bfloat16"):
            return summed_loss(self.model, batch)
