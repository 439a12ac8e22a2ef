"""Noise on the embeddings in training (NEFTune, Jain et al. 2023, arXiv 2310.05914), for rows in a tree and padded rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tunesmith.engine.packing.layout import Layout
from tunesmith.models.head import causal_of


def row_lengths(inputs: Mapping[str, Any]) -> torch.Tensor:
    """(B, L) for each token its row's number of computed tokens, without padding; the longest row's if rows share the token."""
    positions: torch.Tensor = inputs["position_ids"]
    layout: Layout | None = inputs.get("tree_layout")
    if layout is not None:
        lengths = torch.empty_like(positions)
        for node in layout.nodes:
            lengths[0, node.start : node.end] = positions[0, node.start : node.subtree_end].max() + 1
        return lengths
    mask: torch.Tensor | None = inputs.get("attention_mask")
    if mask is None:
        return torch.full_like(positions, positions.shape[1])
    return mask.sum(1, keepdim=True).expand_as(positions)


class EmbeddingNoise:
    """Adds uniform noise of up to alpha / sqrt(row length x hidden size) to each embedding of a model in training mode.

    A token that rows share is computed once, so those rows share its noise; each row on its own sees the noise it would have
    seen unshared. Nothing is added in eval mode. `remove` removes the hooks.
    """

    def __init__(self, model: Any, alpha: float) -> None:
        self.alpha = alpha
        self._lengths: torch.Tensor | None = None
        causal = causal_of(model)
        self._handles = [
            causal.get_decoder().register_forward_pre_hook(self._before, with_kwargs=True),
            causal.get_input_embeddings().register_forward_hook(self._after),
        ]

    def _before(self, module: torch.nn.Module, _: Any, inputs: dict[str, Any]) -> None:
        self._lengths = row_lengths(inputs) if module.training else None

    def _after(self, _module: torch.nn.Module, _inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        if self._lengths is None:
            return embedded
        reach = self.alpha / (self._lengths * embedded.shape[-1]).sqrt().unsqueeze(-1)
        noise = torch.empty_like(embedded, dtype=reach.dtype).uniform_(-1, 1) * reach
        return embedded + noise.to(embedded.dtype)

    def remove(self) -> None:
        """Remove the hooks: training continues without noise."""
        for handle in self._handles:
            handle.remove()
