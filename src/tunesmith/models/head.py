"""A loaded causal language model and its head: what makes logits of hidden states.

Shapes: H hidden size, V vocabulary, N places.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Config entries of models that change their logits after the head; those go through the model's own forward.
_LOGIT_CHANGES = ("logits_scaling", "logit_scale", "lm_head_multiplier")


def causal_of(model: Any) -> Any:
    """The causal language model itself, out of PEFT's wrapper if it is in one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def own_logits(causal: Any) -> bool:
    """Whether the model changes its logits after the head, so that they must come out of its own forward."""
    return any(getattr(causal.config, entry, None) for entry in _LOGIT_CHANGES)


def soft_cap(causal: Any) -> float | None:
    """What the logits are bent towards, as cap x tanh(logits / cap) (Gemma 2, arXiv 2408.00118); None where they are not."""
    cap: float | None = getattr(causal.config, "final_logit_softcapping", None)
    return cap


def logits_of(causal: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (N, V) of hidden states (N, H), bent where the model bends them; not for one with `own_logits`."""
    logits: torch.Tensor = causal.get_output_embeddings()(hidden)
    cap = soft_cap(causal)
    return logits if cap is None else (logits / cap).tanh() * cap


def changes_logits(model: Any) -> bool:
    """Whether the model changes its logits after the head (Granite, Cohere, Falcon-H1), other than by soft-capping."""
    return own_logits(causal_of(model))
