"""The shape of a model: exact parameter counts by kind, without torch and without weights.

Names of linear layers are those of transformers, which PEFT's `target_modules` matches.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block: (out_features, in_features) weights, and a bias of out_features if it has one."""

    name: str
    in_features: int
    out_features: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Number of weights, without the bias."""
        return self.in_features * self.out_features


@dataclass(frozen=True)
class Experts:
    """The experts of a block: kept as 3-D parameters, so neither a linear layer for PEFT nor for 4-bit quantisation."""

    count: int
    per_token: int
    intermediate_size: int
    router: int  # parameters of the router, all experts together
    shared: tuple[Linear, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """The shape of a decoder-only model; every block is the same. Counts are numbers of parameters."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    linears: tuple[Linear, ...]
    norms_per_block: int
    final_norm: int
    head_bias: bool = False
    experts: Experts | None = None
    max_position_embeddings: int | None = None
    sliding_window: int | None = None

    @property
    def embedding_parameters(self) -> int:
        """The input embedding; the head shares it where it is tied."""
        return self.vocab_size * self.hidden_size

    @property
    def head_parameters(self) -> int:
        """The head's own parameters: none where it is tied, but for a bias."""
        own = 0 if self.tie_word_embeddings else self.embedding_parameters
        return own + (self.vocab_size if self.head_bias else 0)

    @property
    def all_linears(self) -> tuple[Linear, ...]:
        """The linear layers of a block, those of a shared expert included: what `all-linear` adapts and NF4 quantises."""
        return self.linears + (self.experts.shared if self.experts else ())

    @property
    def linear_weights(self) -> int:
        """Weights of the linear layers of all blocks."""
        return self.num_hidden_layers * sum(linear.weights for linear in self.all_linears)

    @property
    def expert_parameters(self) -> int:
        """Experts and routers of all blocks."""
        if self.experts is None:
            return 0
        each = 3 * self.hidden_size * self.experts.intermediate_size
        return self.num_hidden_layers * (self.experts.count * each + self.experts.router)

    @property
    def norm_parameters(self) -> int:
        """Norms of all blocks and behind them."""
        return self.num_hidden_layers * self.norms_per_block + self.final_norm

    @property
    def other_parameters(self) -> int:
        """Norms and biases."""
        biases = sum(linear.out_features for linear in self.all_linears if linear.bias)
        return self.norm_parameters + self.num_hidden_layers * biases

    @property
    def parameters(self) -> int:
        """All parameters, tied ones once."""
        parts = (self.embedding_parameters, self.head_parameters, self.linear_weights, self.expert_parameters)
        return sum(parts) + self.other_parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that one token goes through: of the experts, those that it is routed to."""
        if self.experts is None:
            return self.parameters
        idle = self.experts.count - self.experts.per_token
        return self.parameters - self.num_hidden_layers * idle * 3 * self.hidden_size * self.experts.intermediate_size

    def lora_parameters(self, r: int) -> int:
        """Parameters of an adapter of rank `r` on all linear layers."""
        return self.num_hidden_layers * sum(r * (linear.in_features + linear.out_features) for linear in self.all_linears)
