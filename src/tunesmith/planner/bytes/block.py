"""A decoder block, the head and the loss on a tape: what transformers' modelling code and the engine save per operator.

For a block of the llama family in bf16 the tape holds, in bytes per token,

    full       20 h + 8 f + 4 kv + 4 a + 8
    adapters   16 h + 8 f + 4 kv + 4 a + 8 + 14 r

with h hidden size, f intermediate size, kv key-value heads x head size, a attention heads, r rank. What an operator saves
is listed in torch's derivatives.yaml. In the methods below T is the number of tokens, e the bytes per element.
"""

from __future__ import annotations

from tunesmith.engine.modeling.chunks import HEAD_ROWS, chunk_rows
from tunesmith.models.architecture import Architecture, Linear
from tunesmith.models.families import FAMILIES
from tunesmith.planner.bytes.tape import Buffer, Give, Kind, Tape, Value
from tunesmith.planner.scenario import Scenario


class Modules:
    """The parts of a model; each method records a forward pass on the tape and returns its result.

    A method frees its own values; the caller frees the input.
    """

    def __init__(self, tape: Tape, architecture: Architecture, scenario: Scenario) -> None:
        self.tape, self.a, self.s = tape, architecture, scenario
        self.style = FAMILIES[architecture.model_type].style
        self.full = scenario.method == "full"
        self.norms, self.head = scenario.trains("norm"), scenario.trains_head(architecture)
        self.t = scenario.tokens  # computed tokens; only the labelled positions after the last block's attention
        # PEFT's k-bit preparation casts norms and embeddings to float32, and with them everything between 4-bit matmuls.
        self.e = 4 if scenario.stock and scenario.method == "qlora" else scenario.element
        #: Attention's output, saved for the backward pass even if the block is recomputed (engine/modeling/checkpointing.py).
        self.kept: list[Buffer] = []
        self.fused, self.early = scenario.fused(architecture), scenario.ends_early(architecture)

    # --- linear layers ---

    def linear(self, x: Value, layer: Linear) -> Value:
        """A linear layer under the scenario's method."""
        if self.full:
            return self._trained(x, layer)
        return self._stock_adapter(x, layer) if self.s.stock else self._adapter(x, layer)

    def _trained(self, x: Value, layer: Linear) -> Value:
        """A trained linear layer; saves x for the weight's gradient."""
        keeps: list[tuple[Kind, int]] = [("gradients", self.e * layer.weights)]
        if layer.bias:
            keeps.append(("gradients", self.e * layer.out_features))
        gives = [Give(x, self.e * layer.in_features * self.t)]
        return self.tape.apply(self.e * layer.out_features * self.t, [x], saves=[x.buffer], gives=gives, keeps=keeps)

    def _dequantised(self, layer: Linear) -> int:
        """Bytes of a 4-bit weight while it is multiplied: dequantised to the model's dtype, scales in float32."""
        return layer.weights * self.s.element + layer.weights // 16 if self.s.method == "qlora" else 0

    def _adapter(self, x: Value, layer: Linear) -> Value:
        """engine/modeling/adapter.py: saves x and a (T, r) product; float32 weights are copied if the model is bf16."""
        r, e, into, out = self.s.r, self.e, layer.in_features, layer.out_features
        low = self.tape.make("activations", e * r * self.t)
        copies = 0 if e == 4 else e * r * max(into, out)
        moment = max(self._dequantised(layer), copies)
        result = self.tape.apply(
            e * out * self.t,
            [x],
            saves=[x.buffer, low],
            gives=[Give(x, e * into * self.t)],
            scratch=moment,
            back_scratch=e * r * self.t + moment,
            keeps=[("gradients", 4 * r * (into + out))],
        )
        self.tape.drop(low)
        return result

    def _stock_adapter(self, x: Value, layer: Linear) -> Value:
        """PEFT's forward: a float32 copy of x per layer, and the adapter's result in float32 before it is added."""
        tape, r, t, e = self.tape, self.s.r, self.t, self.e
        into, out, four_bit = layer.in_features, layer.out_features, self.s.method == "qlora"
        moment = self._dequantised(layer) + (self.s.element * out * t if four_bit else 0)
        base = tape.apply(e * out * t, [x], gives=[Give(x, e * into * t)], scratch=moment, back_scratch=moment)
        if four_bit:
            base = self._then_free(tape.apply(e * out * t, [base], gives=[Give(base, None)]), base)
        wide = self._cast(x, into, e, 4)
        low_keeps: list[tuple[Kind, int]] = [("gradients", 4 * r * into)]
        low = tape.apply(4 * r * t, [wide], saves=[wide.buffer], gives=[Give(wide, 4 * into * t)], keeps=low_keeps)
        high_keeps: list[tuple[Kind, int]] = [("gradients", 4 * r * out)]
        high = tape.apply(4 * out * t, [low], saves=[low.buffer], gives=[Give(low, 4 * r * t)], keeps=high_keeps)
        tape.free(low)
        scaled = self._then_free(tape.apply(4 * out * t, [high], gives=[Give(high, 4 * out * t)]), high)
        if four_bit:
            scaled = self._then_free(self._cast(scaled, out, 4, e), scaled)
            total = tape.apply(e * out * t, [base, scaled], gives=[Give(base, None), Give(scaled, None)])
        else:
            grad_base = None if e == 4 else e * out * t
            total = tape.apply(4 * out * t, [base, scaled], gives=[Give(base, grad_base), Give(scaled, None)])
        tape.free(base, scaled, wide)
        return total if four_bit else self._then_free(self._cast(total, out, 4, e), total)

    def _then_free(self, result: Value, used: Value) -> Value:
        self.tape.free(used)
        return result

    def _cast(self, x: Value, width: int, before: int, after: int) -> Value:
        """The value in another dtype, or a view of it if the dtype is the same."""
        if before == after:
            return self.tape.apply(None, [x], gives=[Give(x, None)])
        return self.tape.apply(after * width * self.t, [x], gives=[Give(x, before * width * self.t)])

    # --- norms and activations ---

    def norm(self, x: Value, width: int, groups: int = 1) -> Value:
        """A norm over `width` elements, `groups` times per token."""
        if self.style.norm == "layer":
            return self._layer_norm(x, width)
        if self.fused:
            return self._fused_norm(x, width, groups)
        tape, numbers, small = self.tape, width * groups, 4 * self.t * groups
        exact, narrow = 4 * numbers * self.t, self.e * numbers * self.t
        weight: list[tuple[Kind, int]] = [("gradients", self.e * width)] if self.norms else []
        wide = self._cast(x, numbers, self.e, 4)
        square = tape.apply(exact, [wide], saves=[wide.buffer], gives=[Give(wide, exact)], back_scratch=2 * exact)
        mean = self._then_free(tape.apply(small, [square], gives=[Give(square, exact)]), square)
        root = tape.apply(small, [mean], gives=[Give(mean, small)], back_scratch=small, saves_result=True)
        tape.free(mean)
        saves, gives = [wide.buffer, root.buffer], [Give(wide, exact), Give(root, small)]
        scaled = tape.apply(exact, [wide, root], saves=saves, gives=gives, back_scratch=exact)
        tape.free(wide, root)
        if self.style.norm == "gemma":  # weight in float32, then the cast
            kept = [scaled.buffer] if self.norms else []
            moment = exact if self.norms else 0
            out = tape.apply(exact, [scaled], saves=kept, gives=[Give(scaled, exact)], back_scratch=moment, keeps=weight)
            tape.free(scaled)
            return self._then_free(self._cast(out, numbers, 4, self.e), out)
        scaled = self._then_free(self._cast(scaled, numbers, 4, self.e), scaled)
        kept = [scaled.buffer] if self.norms else []
        moment = narrow if self.norms else 0
        out = tape.apply(narrow, [scaled], saves=kept, gives=[Give(scaled, narrow)], back_scratch=moment, keeps=weight)
        return self._then_free(out, scaled)

    def _fused_norm(self, x: Value, width: int, groups: int) -> Value:
        """Saves x and rstd in float32; float32 copies of x and of gradients are temporary."""
        tape, numbers = self.tape, width * groups * self.t
        exact, size = 4 * numbers, self.e * numbers
        copy = 0 if self.e == 4 else exact
        root = tape.make("activations", 4 * groups * self.t)
        keeps: list[tuple[Kind, int]] = [("gradients", self.e * width)] if self.norms else []
        back = 2 * copy if self.e == 2 else 0
        out = tape.apply(
            size, [x], saves=[x.buffer, root], gives=[Give(x, size)], scratch=2 * copy, back_scratch=back, keeps=keeps
        )
        tape.drop(root)
        return out

    def _layer_norm(self, x: Value, width: int) -> Value:
        """Layer norm of torch: saves x, mean and rstd."""
        statistics = self.tape.make("activations", 8 * self.t)
        keeps: list[tuple[Kind, int]] = [("gradients", 2 * self.e * width)] if self.norms else []
        size = self.e * width * self.t
        out = self.tape.apply(size, [x], saves=[x.buffer, statistics], gives=[Give(x, size)], keeps=keeps)
        self.tape.drop(statistics)
        return out

    def _activation(self, x: Value, width: int) -> Value:
        """SiLU or GELU as one operator saves its input; GELU written out (NewGELUActivation) saves four tensors."""
        tape, size = self.tape, self.e * width * self.t
        if not self.style.written_out_gelu:
            return tape.apply(size, [x], saves=[x.buffer], gives=[Give(x, size)])
        half = tape.apply(size, [x], gives=[Give(x, size)])
        cube = tape.apply(size, [x], saves=[x.buffer], gives=[Give(x, size)], back_scratch=2 * size)
        inner = self._then_free(tape.apply(size, [cube], gives=[Give(cube, size)]), cube)
        total = self._then_free(tape.apply(size, [x, inner], gives=[Give(x, None), Give(inner, None)]), inner)
        scaled = self._then_free(tape.apply(size, [total], gives=[Give(total, size)]), total)
        tanh = self._then_free(tape.apply(size, [scaled], gives=[Give(scaled, size)], saves_result=True), scaled)
        plus = self._then_free(tape.apply(size, [tanh], gives=[Give(tanh, None)]), tanh)
        saves, gives = [half.buffer, plus.buffer], [Give(half, size), Give(plus, size)]
        out = tape.apply(size, [half, plus], saves=saves, gives=gives)
        tape.free(half, plus)
        return out

    # --- attention ---

    def attention(self, z: Value, *, last: bool = False) -> Value:
        """QKV projections, rotary embedding, attention, output projection (in the `last` block, at labelled positions)."""
        tape, a = self.tape, self.a
        layers = {layer.name: layer for layer in a.linears}
        q_width, kv_width = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
        if "qkv_proj" in layers:
            joint = self.linear(z, layers["qkv_proj"])
            size = self.e * (q_width + 2 * kv_width) * self.t
            # Slices: their gradients are tensors of the full width.
            q, k, v = (tape.apply(None, [joint], gives=[Give(joint, size)]) for _ in range(3))
            tape.free(joint)
        else:
            q, k, v = (self.linear(z, layers[name]) for name in ("q_proj", "k_proj", "v_proj"))
        if self.style.qk_norm:
            q = self._then_free(self.norm(q, a.head_dim, a.num_attention_heads), q)
            k = self._then_free(self.norm(k, a.head_dim, a.num_key_value_heads), k)
        q = self._then_free(self._rotate(q, q_width), q)
        k = self._then_free(self._rotate(k, kv_width), k)
        if self.style.own_rotary:
            own = tape.make("activations", self.e * a.head_dim * self.t)
            q = self._then_free(tape.apply(None, [q], saves=[own], gives=[Give(q, None)]), q)
            tape.drop(own)
        mixed = self._mix(q, k, v, q_width, kv_width)
        tape.free(q, k, v)
        if self.style.copied_result:
            size = self.e * q_width * self.t
            mixed = self._then_free(tape.apply(size, [mixed], gives=[Give(mixed, size)]), mixed)
        out = layers["o_proj" if "o_proj" in layers else "dense"]
        early, eager = last and self.early, self.s.attention == "eager"  # eager: transformers' own, o_proj included
        if early and not eager:
            mixed = self._then_free(self._at_places(mixed, q_width), mixed)
            self.t = self.s.labelled
        mixed = self._then_free(self.linear(mixed, out), mixed)
        if early and eager:
            mixed = self._then_free(self._at_places(mixed, self.a.hidden_size), mixed)
            self.t = self.s.labelled
        return mixed

    def _rotate(self, x: Value, width: int) -> Value:
        """Rotary embedding, x cos + rotate_half(x) sin: saves only cosines and sines, which all blocks share."""
        size = self.e * width * self.t
        scratch, back = (0, 0) if self.fused else (2 * size, 3 * size)
        return self.tape.apply(size, [x], gives=[Give(x, size)], scratch=scratch, back_scratch=back)

    def _mix(self, q: Value, k: Value, v: Value, q_width: int, kv_width: int) -> Value:
        """softmax(q k^T) v. Flash: saves q, k, v, the result, and a log-sum-exp per head (arXiv 2205.14135, section 3.1)."""
        tape, t, e, heads = self.tape, self.t, self.e, self.a.num_attention_heads
        gives = [Give(q, e * q_width * t), Give(k, e * kv_width * t), Give(v, e * kv_width * t)]
        if self.s.attention == "eager":
            scores = heads * self.s.length * t  # elements of the score matrix
            repeated = tape.make("activations", 2 * e * q_width * t)
            softmax = tape.make("activations", (4 + e) * scores if e == 2 else 4 * scores)
            saves = [q.buffer, repeated, softmax]
            moment = (4 + e) * scores
            out = tape.apply(e * q_width * t, [q, k, v], saves=saves, gives=gives, scratch=moment, back_scratch=2 * moment)
            tape.drop(repeated, softmax)
            return out
        tape.drop(*self.kept)  # of the forward pass, if the block is recomputed: still alive, but created again below
        self.kept.clear()
        sums = tape.make("activations", 4 * heads * t)
        moment, back = 0, 0
        if self.s.attention == "tree":
            # engine/attention/tree.py: all in float32, copied if the model is bf16, plus keys, values and results of one
            # stretch; in the backward pass, gradients plus those of one stretch.
            copies = 0 if e == 4 else 4 * (q_width + 2 * kv_width) * t
            made = e * (q_width + 2 * kv_width) * t  # gradients in the model's dtype, created last
            moment = copies + (16 - e) * q_width * t
            back = copies + (0 if e == 4 else 8 * q_width * t) + 4 * (6 * q_width + 2 * kv_width) * t - made
        saves = [q.buffer, k.buffer, v.buffer, sums]
        out = tape.apply(
            e * q_width * t, [q, k, v], saves=saves, gives=gives, scratch=moment, back_scratch=back, saves_result=True
        )
        if self.s.gradient_checkpointing == "keep_attention" and not tape.recording:
            given = [each.buffer for each in (q, k, v)] if self.s.attention == "flex" else []
            self.kept += [out.buffer, sums, *given]
            for buffer in self.kept:
                buffer.holders += 1
        tape.drop(sums)
        return out

    # --- MLP and block ---

    def mlp(self, z: Value) -> Value:
        """The MLP, gated or plain, or the mixture of experts."""
        if self.a.experts is not None:
            return self._experts(z)
        layers = {layer.name: layer for layer in self.a.linears}
        if "fc1" in layers:
            inner = self.linear(z, layers["fc1"])
            active = self._then_free(self._activation(inner, layers["fc1"].out_features), inner)
            return self._then_free(self.linear(active, layers["fc2"]), active)
        return self._gated(z, layers)

    def _gated(self, z: Value, layers: dict[str, Linear], prefix: str = "") -> Value:
        """down(activation(gate) * up): saves gate, activation, up and their product."""
        tape, down = self.tape, layers[f"{prefix}down_proj"]
        width = down.in_features
        size = self.e * width * self.t
        if f"{prefix}gate_up_proj" in layers:
            joint = self.linear(z, layers[f"{prefix}gate_up_proj"])
            gate, up = (tape.apply(None, [joint], gives=[Give(joint, 2 * size)]) for _ in range(2))
            tape.free(joint)
            active = self._activation(gate, width)
        else:
            gate = self.linear(z, layers[f"{prefix}gate_proj"])
            if self.fused:
                return self._fused_gated(z, gate, layers)
            active = self._activation(gate, width)
            up = self.linear(z, layers[f"{prefix}up_proj"])
        tape.free(gate)
        saves, gives = [active.buffer, up.buffer], [Give(active, size), Give(up, size)]
        product = tape.apply(size, [active, up], saves=saves, gives=gives)
        tape.free(active, up)
        return self._then_free(self.linear(product, down), product)

    def _fused_gated(self, z: Value, gate: Value, layers: dict[str, Linear]) -> Value:
        """The same as one operator: saves gate and up, and their product for the next layer."""
        tape, down = self.tape, layers["down_proj"]
        size = self.e * down.in_features * self.t
        up = self.linear(z, layers["up_proj"])
        product = tape.apply(size, [gate, up], saves=[gate.buffer, up.buffer], gives=[Give(gate, size), Give(up, size)])
        tape.free(gate, up)
        return self._then_free(self.linear(product, down), product)

    def _experts(self, z: Value) -> Value:
        """Experts as grouped GEMMs over tokens sorted by expert, plus a shared expert if there is one."""
        experts = self.a.experts
        if experts is None:
            raise AssertionError("the caller looked")
        tape, e, h = self.tape, self.e, self.a.hidden_size
        routed, width = self.t * experts.per_token, experts.intermediate_size
        each = 3 * h * width * experts.count
        logits = tape.make("activations", 12 * experts.count * self.t)
        keeps: list[tuple[Kind, int]] = [("gradients", e * (each + experts.router))] if self.full else []
        # Gate and up, activation and results; if the weights are trained, also their inputs.
        kept = tape.make("activations", e * routed * (3 * width + h + (width + h if self.full else 0)))
        out = tape.apply(
            e * h * self.t,
            [z],
            saves=[z.buffer, logits, kept],
            gives=[Give(z, e * h * self.t)],
            scratch=e * routed * h,
            back_scratch=e * routed * (2 * h + 4 * width),
            keeps=keeps,
        )
        tape.drop(logits, kept)
        if not experts.shared:
            return out
        layers = {layer.name: layer for layer in experts.shared}
        shared = self._gated(z, layers, "shared_expert.")
        gate = self.linear(z, layers["shared_expert_gate"])
        size = e * h * self.t
        saves, gives = [shared.buffer, gate.buffer], [Give(shared, size), Give(gate, e * self.t)]
        weighted = tape.apply(size, [shared, gate], saves=saves, gives=gives)
        tape.free(shared, gate)
        total = tape.apply(size, [out, weighted], gives=[Give(out, None), Give(weighted, None)])
        tape.free(out, weighted)
        return total

    def _at_places(self, x: Value, width: int) -> Value:
        """engine/modeling/places.py: selects the labelled tokens; backward scatters their gradients into zeros for all."""
        size = self.e * width
        return self.tape.apply(size * self.s.labelled, [x], gives=[Give(x, size * self.s.tokens)])

    def _add(self, one: Value, other: Value) -> Value:
        size = self.e * self.a.hidden_size * self.t
        return self.tape.apply(size, [one, other], gives=[Give(one, None), Give(other, None)])

    def block(self, x: Value, *, last: bool = False) -> Value:
        """A decoder block; the caller frees x. The `last` one may end at the labelled positions."""
        tape, h = self.tape, self.a.hidden_size
        self.t = self.s.tokens
        z = self.norm(x, h)
        if self.style.parallel:
            mixed, mapped = self.attention(z), self.mlp(z)
            both = self._add(mixed, mapped)
            tape.free(z, mixed, mapped)
            return self._then_free(self._add(both, x), both)
        mixed = self._then_free(self.attention(z, last=last), z)
        if self.style.post_norms:
            mixed = self._then_free(self.norm(mixed, h), mixed)
        if last and self.early:
            x = self._at_places(x, h)
            middle = self._then_free(self._add(x, mixed), mixed)
            tape.free(x)
        else:
            middle = self._then_free(self._add(x, mixed), mixed)
        z = self.norm(middle, h)
        mapped = self._then_free(self.mlp(z), z)
        if self.style.post_norms:
            mapped = self._then_free(self.norm(mapped, h), mapped)
        out = self._add(middle, mapped)
        tape.free(middle, mapped)
        return out

    # --- head and loss ---

    def loss(self, hidden: Value) -> None:
        """The loss of the labelled positions; stores its gradient in `hidden.gradient` and frees `hidden`."""
        if self.s.stock:
            self._stock_loss(hidden)
        else:
            self._chunked_loss(hidden)

    def _chunked_loss(self, hidden: Value) -> None:
        """engine/modeling/loss.py: gradients of hidden states and head, and one chunk of logits, never all of them."""
        tape, e, h, n, vocabulary = self.tape, self.e, self.a.hidden_size, self.s.labelled, self.a.vocab_size
        picked = hidden.buffer
        if not self.early:
            picked = tape.make("activations", e * h * n)
            tape.free(hidden)
        grad_hidden = tape.make("activations", e * h * n)
        rows = min(n, chunk_rows(vocabulary))
        head = tape.make("gradients", 4 * vocabulary * h) if self.head else None
        exact = 8 if self.style.capped_logits else 4
        tape.scratch((exact + (e if e == 2 else 0)) * rows * vocabulary, "logits")
        products = e * h * max(rows, min(HEAD_ROWS, vocabulary) if head else 0)
        grad_logits = tape.make("logits", e * rows * vocabulary)
        tape.scratch(products)
        tape.drop(grad_logits, picked)
        if head is not None:
            narrow = tape.make("gradients", e * vocabulary * h) if e == 2 else head
            if narrow is not head:
                tape.drop(head)
            self._keep_head(narrow)
        if self.early:
            hidden.gradient = grad_hidden
            return
        # From the labelled positions back to all.
        hidden.gradient = tape.make("activations", e * h * self.t)
        tape.drop(grad_hidden)

    def _stock_loss(self, hidden: Value) -> None:
        """The loss of transformers: logits of all positions, in float32 for the loss; 12 V T bytes at the peak."""
        tape, e, h, t, vocabulary = self.tape, self.e, self.a.hidden_size, self.t, self.a.vocab_size
        logits = tape.make("logits", e * vocabulary * t)
        wide = tape.make("logits", 4 * vocabulary * t) if e == 2 else None
        softmax = tape.make("logits", 4 * vocabulary * t)
        tape.drop(logits)
        if wide is not None:
            tape.drop(wide)
        grad_softmax = tape.make("logits", 4 * vocabulary * t)
        grad_logits = tape.make("logits", 4 * vocabulary * t)
        tape.drop(softmax, grad_softmax)
        if e == 2:
            narrow = tape.make("logits", e * vocabulary * t)
            tape.drop(grad_logits)
            grad_logits = narrow
        hidden.gradient = tape.make("activations", e * h * t)
        if self.head:
            self._keep_head(tape.make("gradients", e * vocabulary * h))
        tape.free(hidden)
        tape.drop(grad_logits)

    def _keep_head(self, gradient: Buffer) -> None:
        """The head's gradient stays, or is consumed immediately if the optimizer runs in the backward pass."""
        if self.tape.in_backward is not None and not self.a.tie_word_embeddings:
            self.tape.scratch(self.tape.in_backward(gradient.size))
            self.tape.drop(gradient)
