"""The architecture of a model: exact parameter counts by kind, without torch and without weights.

Linear layers have the names used in transformers, which PEFT's `target_modules` matches.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block: (out_features, in_features) weights, and optionally a bias of out_features."""

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
    """The experts of a block, stored as 3-D parameters: neither PEFT nor 4-bit quantisation treats them as linear layers."""

    count: int
    per_token: int
    intermediate_size: int
    router: int  # parameters of the router for all experts
    shared: tuple[Linear, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """The shape of a decoder-only model whose blocks are all equal. Counts are numbers of parameters."""

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
        """The input embedding; a tied head shares it."""
        return self.vocab_size * self.hidden_size

    @property
    def head_parameters(self) -> int:
        """The head's own parameters: if it is tied, only its bias."""
        own = 0 if self.tie_word_embeddings else self.embedding_parameters
        return own + (self.vocab_size if self.head_bias else 0)

    @property
    def all_linears(self) -> tuple[Linear, ...]:
        """The linear layers of a block, including a shared expert's: the layers that `all-linear` adapts and NF4 quantises."""
        return self.linears + (self.experts.shared if self.experts else ())

    @property
    def linear_weights(self) -> int:
        """Weights of all linear layers in all blocks."""
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
        """The norms of all blocks and the final norm."""
        return self.num_hidden_layers * self.norms_per_block + self.final_norm

    @property
    def other_parameters(self) -> int:
        """Norms and biases."""
        biases = sum(linear.out_features for linear in self.all_linears if linear.bias)
        return self.norm_parameters + self.num_hidden_layers * biases

    @property
    def parameters(self) -> int:
        """All parameters; tied ones count once."""
        parts = (self.embedding_parameters, self.head_parameters, self.linear_weights, self.expert_parameters)
        return sum(parts) + self.other_parameters

    @property
    def active_parameters(self) -> int:
        """Parameters used per token: only the experts that it is routed to count."""
        if self.experts is None:
            return self.parameters
        idle = self.experts.count - self.experts.per_token
        return self.parameters - self.num_hidden_layers * idle * 3 * self.hidden_size * self.experts.intermediate_size

    def lora_parameters(self, r: int) -> int:
        """Parameters of a rank-`r` adapter on all linear layers."""
        return self.num_hidden_layers * sum(r * (linear.in_features + linear.out_features) for linear in self.all_linears)
