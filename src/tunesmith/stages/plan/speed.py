"""A step's time from what it computes and moves: a roofline with efficiencies, corrected by what was measured.

FLOPs for each token (N weights of linear layers that it goes through, N_A of adapters): forward 2 N; backward 4 N where
weights are trained, 2 N where they are frozen; adapters 6 N_A; recomputing 2 N more. Head: 4 h V for each labelled place, 6
where it is trained; the last block's layers behind its attention see the labelled places alone. Attention: 2 S q for each
token forward (causal, S tokens of context, q query width), 2.5 times that backward (Dao 2023, arXiv 2307.08691, section 3.1),
and forward once more where it is computed again. Bytes: what operators write (the tape's count), read twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.hardware.catalogue import Device
from tunesmith.methods.sizes import NF4_BYTES
from tunesmith.models.architecture import Architecture
from tunesmith.stages.plan.memory import Estimate
from tunesmith.stages.plan.scenario import Scenario


@dataclass(frozen=True)
class Efficiency:
    """Shares of a device's peaks that training reaches, and what starting an operator takes (seconds)."""

    products: float
    attention: float
    bandwidth: float
    operator_seconds: float


#: Bytes/s between a GPU and pinned memory of the machine, one way: what PCIe 4.0 x16 reaches in practice (32e9 at the most).
HOST_BANDWIDTH = 2.2e10

#: Before anything was measured. GPU: large products reach 55 to 65 % of the dense peak (torchtitan's and NeMo's figures).
EFFICIENCY = {"cuda": Efficiency(0.58, 0.35, 0.75, 6e-6), "cpu": Efficiency(0.8, 0.5, 0.5, 1.5e-5)}


@dataclass(frozen=True)
class Work:
    """What a micro-batch takes: FLOPs of products and of attention, bytes moved, operators started."""

    product_flops: float
    attention_flops: float
    moved_bytes: float
    operators: int

    @property
    def flops(self) -> float:
        """All of them."""
        return self.product_flops + self.attention_flops


def micro_batch_work(a: Architecture, s: Scenario, estimate: Estimate, context: float) -> Work:
    """The work of one forward and backward pass; `context` is the mean number of tokens in a row."""
    weights = a.active_parameters - a.embedding_parameters - a.head_parameters - a.other_parameters
    adapters = 0 if s.method == "full" else a.lora_parameters(s.r)
    again = 2 if s.gradient_checkpointing else 0
    each = (6 if s.method == "full" else 4) + again
    products = (weights * each + adapters * (6 + again)) * s.tokens
    less, adapted = _behind_the_last_attention(a, s)
    products -= (less * each + adapted * (6 + again)) * (s.tokens - s.labelled)
    places = s.tokens if s.stock else s.labelled
    head = a.hidden_size * a.vocab_size * places * ((6 if s.trains_head(a) else 4) + (2 if s.logits_twice else 0))
    query = a.num_attention_heads * a.head_dim
    scores_again = again / 2 if s.gradient_checkpointing is True else 0
    attention = 2 * context * query * a.num_hidden_layers * s.tokens * (3.5 + scores_again)
    moved = 3.0 * estimate.written_bytes + s.element * weights * (2 + again / 2)
    if s.method == "qlora":
        moved += a.linear_weights * (NF4_BYTES + 2 * s.element) * (2 + again / 2)
    return Work(products + head, attention, moved, estimate.operators)


def _behind_the_last_attention(a: Architecture, s: Scenario) -> tuple[int, int]:
    """Weights, and parameters of adapters, that only the labelled places go through beside the head."""
    if not s.ends_early(a):
        return 0, 0
    layers = [layer for layer in a.linears if layer.name not in {"q_proj", "k_proj", "v_proj"}]
    adapted = 0 if s.method == "full" else sum(s.r * (layer.in_features + layer.out_features) for layer in layers)
    return sum(layer.weights for layer in layers), adapted


def forward_work(a: Architecture, s: Scenario, estimate: Estimate, context: float) -> Work:
    """The work of a forward pass alone, without gradients, up to the loss: about a third of the step's operators and moves."""
    weights = a.active_parameters - a.embedding_parameters - a.head_parameters - a.other_parameters
    adapters = 0 if s.method == "full" else a.lora_parameters(s.r)
    products = 2.0 * (weights + adapters) * s.tokens + 2.0 * a.hidden_size * a.vocab_size * s.labelled
    products -= 2.0 * sum(_behind_the_last_attention(a, s)) * (s.tokens - s.labelled)
    attention = 2 * context * a.num_attention_heads * a.head_dim * a.num_hidden_layers * s.tokens
    moved = 1.0 * estimate.written_bytes + s.element * weights
    if s.method == "qlora":
        moved += a.linear_weights * (NF4_BYTES + 2 * s.element)
    return Work(products, attention, moved, estimate.operators // 3)


def optimizer_bytes(a: Architecture, s: Scenario) -> float:
    """Bytes that clipping and one update move: gradient, weight, master and states, read and written."""
    full = s.method == "full"
    trained = a.parameters if full else a.lora_parameters(s.r) + s.whole_parameters(a)
    slices = 0 if s.optim == "adamw" else 40  # float32 copies on the way, and random bits for rounding
    return trained * (34.0 + slices)


def seconds(work: Work, device: Device, dtype: str) -> float:
    """Time of a micro-batch by the roofline: products, attention and moves one after the other."""
    share = EFFICIENCY[device.kind]
    peak = device.flops[dtype]
    return (
        work.product_flops / (peak * share.products)
        + work.attention_flops / (peak * share.attention)
        + work.moved_bytes / (device.bandwidth * share.bandwidth)
        + work.operators * share.operator_seconds
    )


def optimizer_seconds(moved: float, device: Device) -> float:
    """Time of an update."""
    return moved / (device.bandwidth * EFFICIENCY[device.kind].bandwidth)
