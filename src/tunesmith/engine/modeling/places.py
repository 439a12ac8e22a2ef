"""A decoder that computes its last block's output only at the labelled positions.

Shapes: B rows, L tokens, H hidden size, N positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tunesmith.engine.modeling.chunks import few_places

_TAKES = "_tunesmith_takes_places"


def at_places(hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(1, N, H) from (B, L, H) at indices into the flattened (B x L) tokens."""
    return hidden.flatten(0, 1)[places].unsqueeze(0)


def take_places(decoder: Any, last_block: Callable[..., torch.Tensor]) -> None:
    """Make `last_block(block, hidden, last_places=..., ...)` the last block's forward in `decoder`; it returns (1, N, H)."""
    layer = decoder.layers[-1]
    layer.forward = partial(last_block, layer)
    setattr(decoder, _TAKES, True)


def hidden_at(decoder: Any, inputs: dict[str, Any], places: torch.Tensor) -> torch.Tensor:
    """(N, H) final hidden states of a transformers decoder at indices into the flattened (B x L) tokens."""
    hidden: torch.Tensor
    if getattr(decoder, _TAKES, False) and few_places(len(places), inputs["input_ids"].numel()):
        hidden = decoder(**inputs, use_cache=False, last_places=places).last_hidden_state
    else:
        hidden = at_places(decoder(**inputs, use_cache=False).last_hidden_state, places)
    return hidden[0]
