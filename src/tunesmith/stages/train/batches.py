"""How a step's rows become micro-batches: prefix trees where possible, else padded rows; an event says which and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tunesmith.engine.attention import flex
from tunesmith.engine.attention.backends import use_attention, use_tree_attention
from tunesmith.engine.attention.shifted import ShiftedCollator, use_shifted_attention
from tunesmith.engine.modeling.noise import EmbeddingNoise
from tunesmith.engine.packing.batch import Collator, PaddedCollator, choose_collator, tree_unsupported_reason
from tunesmith.engine.packing.tree import Limits
from tunesmith.errors import Problem, RecipeError
from tunesmith.methods.settings import Settings
from tunesmith.stages.train.losses import Loss, StepBatches

Tell = Callable[..., None]


def step_batches(loss: Loss, model: Any, pad_id: int | None, longest: int, settings: Settings, tell: Tell) -> StepBatches:
    """Returns what makes a step's micro-batches; switches the model to the attention they need, and noise on if requested.

    `longest` is the longest row in tokens. Raises RecipeError if shifted sparse attention would not be exact.
    """
    collator = _collator(model, pad_id, longest, settings, tell)
    asked = settings.attn_implementation
    if isinstance(collator, ShiftedCollator):
        use_shifted_attention(model)
    elif isinstance(collator, PaddedCollator):
        use_attention(model, "sdpa" if asked == "auto" else asked, lambda text: tell("attention-fallback", text))
    else:
        use_tree_attention(model, on=True)
        reason = None if model.device.type == "cpu" else flex.unsupported_reason(model.device, model.dtype)
        if reason is not None:
            tell("attention-fallback", f"a dense mask instead of flex attention: {reason}", reason=reason)
    if settings.neftune_noise_alpha is not None:
        EmbeddingNoise(model, settings.neftune_noise_alpha)
    limits = Limits(settings.per_device_max_tokens, settings.per_device_train_batch_size, settings.micro_batch_start)
    return loss.batches(collator, limits)


def _collator(model: Any, pad_id: int | None, longest: int, settings: Settings, tell: Tell) -> Collator:
    """The collator of a step's rows; an event if trees were requested and are not possible."""
    if settings.shifted_sparse_attention is not None:
        return _shifted(model, pad_id, longest, settings.shifted_sparse_attention, packing=settings.packing, tell=tell)
    if not settings.packing:
        return PaddedCollator(pad_id)
    collator, reason = choose_collator(model.config, pad_id, longest)
    if settings.attn_implementation != "auto":
        reason = f"attn_implementation is {settings.attn_implementation}, and trees use their own"
        collator = PaddedCollator(pad_id)
    if reason is not None:
        _tell_padded(tell, reason)
    return collator


def _shifted(model: Any, pad_id: int | None, longest: int, group: int, *, packing: bool, tell: Tell) -> ShiftedCollator:
    """Padded rows for shifted sparse attention; an event says so."""
    reason = tree_unsupported_reason(model.config, longest)  # same requirement as trees: plain causal attention
    if reason is not None:
        what, why = f"shifted_sparse_attention: {reason}", "the loss would not match the requested attention"
        raise RecipeError(Problem("TS006", what, "train", why, "remove train.shifted_sparse_attention"))
    if packing:
        _tell_padded(tell, "shifted sparse attention works on rows, not on trees")
    return ShiftedCollator(pad_id, group)


def _tell_padded(tell: Tell, reason: str) -> None:
    tell("packing-off", f"rows are padded, batched by similar length: {reason}", reason=reason)
