"""The head of a loaded causal language model: from hidden states to logits.

Shapes: H hidden size, V vocabulary, N positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Config entries of models that change their logits after the head; these use the model's own forward.
_LOGIT_CHANGES = ("logits_scaling", "logit_scale", "lm_head_multiplier")


def causal_of(model: Any) -> Any:
    """The causal language model itself, unwrapped from PEFT if necessary."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def own_logits(causal: Any) -> bool:
    """Whether the model changes its logits after the head, so that its own forward must compute them."""
    return any(getattr(causal.config, entry, None) for entry in _LOGIT_CHANGES)


def soft_cap(causal: Any) -> float | None:
    """The cap of logit soft-capping, cap x tanh(logits / cap) (Gemma 2, arXiv 2408.00118); None without soft-capping."""
    cap: float | None = getattr(causal.config, "final_logit_softcapping", None)
    return cap


def logits_of(causal: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (N, V) from hidden states (N, H), soft-capped if the model does so; not for models with `own_logits`."""
    logits: torch.Tensor = causal.get_output_embeddings()(hidden)
    cap = soft_cap(causal)
    return logits if cap is None else (logits / cap).tanh() * cap


def changes_logits(model: Any) -> bool:
    """Whether the model changes its logits after the head (Granite, Cohere, Falcon-H1), other than by soft-capping."""
    return own_logits(causal_of(model))
