"""Step time from compute and memory traffic: a roofline with efficiencies, corrected by measurements.

FLOPs per token (N linear-layer weights it passes through, N_A adapter parameters): forward 2 N; backward 4 N if the weights
are trained, 2 N if they are frozen; adapters 6 N_A; recomputation 2 N more. Head: 4 h V per labelled position, 6 h V if it is
trained; in the last block, layers after attention see only the labelled positions. Attention: 2 S q per token forward (causal,
S tokens of context, q query width), 2.5 times that backward (Dao 2023, arXiv 2307.08691, section 3.1), and one more forward if
it is recomputed. Bytes: what operators write (the tape's count), read twice.

A CPU does everything in sequence, including operator overhead. A GPU computes while the host launches the next operators, and a
step takes the longer of the two: with only a few thousand tokens per micro-batch, a fast card waits for the host. The GPU
efficiencies come from an H100, from step profiles and single operators (benchmarks/gpu/operators.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.engine.optim.sizes import NF4_BYTES
from tunesmith.hardware.calibration import Bound
from tunesmith.hardware.catalogue import Device
from tunesmith.models.architecture import Architecture
from tunesmith.planner.bytes.step import Estimate
from tunesmith.planner.scenario import Scenario


@dataclass(frozen=True)
class Efficiency:
    """Fractions of a device's peaks that training reaches, and the launch time of an operator.

    With `half_tokens` per micro-batch, GEMMs reach half of their fraction; with a context of `half_context`, so does attention.
    """

    products: float
    half_tokens: int
    attention: float
    half_context: int
    bandwidth: float
    operator_seconds: float  # of a PyTorch operator
    function_seconds: float  # of an engine function, several kernels

    def of_products(self, tokens: int) -> float:
        """The fraction of peak that GEMMs over `tokens` rows reach."""
        return self.products * tokens / (tokens + self.half_tokens)

    def of_attention(self, context: float) -> float:
        """The fraction of peak that attention over a context of this many tokens reaches."""
        return self.attention * context / (context + self.half_context)


#: Bytes/s between a GPU and pinned host memory, one way: what PCIe 4.0 x16 reaches in practice (32e9 at most).
HOST_BANDWIDTH = 2.2e10

#: Defaults, used until the device has been measured.
EFFICIENCY = {
    "cuda": Efficiency(0.80, 150, 0.65, 1600, 1.0, 6e-5, 3.2e-4),
    "cpu": Efficiency(0.8, 0, 0.5, 0, 0.5, 1.5e-5, 1.5e-5),
}

#: Rate of flex attention relative to SDPA's kernels (234 of 452 TFLOP/s, forward and backward, on an H100).
FLEX_SHARE = 0.52


@dataclass(frozen=True)
class Work:
    """The work of a micro-batch: FLOPs of GEMMs and attention, bytes moved, bytes of weights read, operators launched."""

    scenario: Scenario
    context: float  # mean tokens of a row
    product_flops: float
    attention_flops: float
    moved_bytes: float
    weight_bytes: float
    operators: int

    @property
    def flops(self) -> float:
        """Total FLOPs."""
        return self.product_flops + self.attention_flops


@dataclass(frozen=True)
class Times:
    """Seconds of device compute and of host launches, which overlap on a GPU; on a CPU both are in `computing`."""

    computing: float
    starting: float = 0.0

    @property
    def seconds(self) -> float:
        """The longer of the two."""
        return max(self.computing, self.starting)

    @property
    def bound(self) -> Bound:
        """Which of the two is longer."""
        return "computing" if self.computing >= self.starting else "starting"


def micro_batch_work(a: Architecture, s: Scenario, estimate: Estimate, context: float) -> Work:
    """The work of one forward and backward pass; `context` is the mean row length in tokens."""
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
    moved, read = 3.0 * estimate.written_bytes, s.element * weights * (2 + again / 2)
    if s.method == "qlora":
        moved += a.linear_weights * (NF4_BYTES + 2 * s.element) * (2 + again / 2)
    return Work(s, context, products + head, attention, moved, read, estimate.operators)


def _behind_the_last_attention(a: Architecture, s: Scenario) -> tuple[int, int]:
    """Weights and adapter parameters, besides the head, that only the labelled positions pass through."""
    if not s.ends_early(a):
        return 0, 0
    layers = [layer for layer in a.linears if layer.name not in {"q_proj", "k_proj", "v_proj"}]
    adapted = 0 if s.method == "full" else sum(s.r * (layer.in_features + layer.out_features) for layer in layers)
    return sum(layer.weights for layer in layers), adapted


def forward_work(a: Architecture, s: Scenario, estimate: Estimate, context: float) -> Work:
    """The work of a forward pass up to the loss, without gradients: about a third of the step's operators and traffic."""
    weights = a.active_parameters - a.embedding_parameters - a.head_parameters - a.other_parameters
    adapters = 0 if s.method == "full" else a.lora_parameters(s.r)
    products = 2.0 * (weights + adapters) * s.tokens + 2.0 * a.hidden_size * a.vocab_size * s.labelled
    products -= 2.0 * sum(_behind_the_last_attention(a, s)) * (s.tokens - s.labelled)
    attention = 2 * context * a.num_attention_heads * a.head_dim * a.num_hidden_layers * s.tokens
    moved = 1.0 * estimate.written_bytes
    if s.method == "qlora":
        moved += a.linear_weights * (NF4_BYTES + 2 * s.element)
    return Work(s, context, products, attention, moved, s.element * weights, estimate.operators // 3)


def optimizer_bytes(a: Architecture, s: Scenario) -> float:
    """Bytes moved by clipping and one update: gradient, weight, master weight and states, read and written."""
    full = s.method == "full"
    trained = a.parameters if full else a.lora_parameters(s.r) + s.whole_parameters(a)
    slices = 0 if s.optim == "adamw" else 40  # temporary float32 copies, and random bits for rounding
    return trained * (34.0 + slices)


def times(work: Work, device: Device) -> Times:
    """Roofline times of a micro-batch: GEMMs, attention and memory traffic in sequence, and the launches."""
    share, scenario = EFFICIENCY[device.kind], work.scenario
    peak = device.flops[scenario.dtype]
    kernels = FLEX_SHARE if scenario.attention == "flex" else 1.0
    # A GPU reads weights while it multiplies: `of_products` includes that.
    moved = work.moved_bytes + (work.weight_bytes if device.kind == "cpu" else 0)
    computing = (
        work.product_flops / (peak * share.of_products(scenario.tokens))
        + work.attention_flops / (peak * share.of_attention(work.context) * kernels)
        + moved / (device.bandwidth * share.bandwidth)
    )
    starting = work.operators * (share.operator_seconds if scenario.stock else share.function_seconds)
    return Times(computing + starting) if device.kind == "cpu" else Times(computing, starting)


def optimizer_seconds(moved: float, device: Device) -> float:
    """Seconds of an update that moves `moved` bytes."""
    return moved / (device.bandwidth * EFFICIENCY[device.kind].bandwidth)
