"""AdamW for weights of any dtype, with 32-, 16- or 8-bit states. It computes in float32, slice by slice.

Bytes per parameter of a bf16 model, in addition to the weight (2) and its gradient (2):

    adamw        12      float32 master 4, states 4 + 4
    adamw_kahan   6      states 2 + 2, and the 16 bits that rounding the weight to bf16 cuts off, so nothing is lost
    adamw_8bit    2.03   states 1 + 1 in blocks of 256 with a float32 scale each, the weight rounded stochastically

A float32 parameter (an adapter, or a float32 model) is its own master in all three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import create_dynamic_map
from torch.optim.adamw import adamw

from tunesmith.engine.optim.rounding import join_halves, round_bits, split_halves
from tunesmith.engine.optim.sizes import COMPENSATED, OPTIMIZER_SLICE, STATE_BITS, STATE_BLOCK
from tunesmith.kernels import triton

#: The 256 values between -1 (or 0, unsigned) and 1 that a byte encodes: bitsandbytes' dynamic map.
_VALUES: dict[bool, tuple[float, ...]] = {signed: tuple(create_dynamic_map(signed=signed).tolist()) for signed in (False, True)}

_MOMENTS = ("exp_avg", "exp_avg_sq")
_EXACT = (torch.float32, torch.float64)


def store_of(*, offloading: bool) -> torch.device | None:
    """Where an optimizer keeps its states; None means on the weights' device."""
    return torch.device("cpu") if offloading else None


@dataclass(frozen=True)
class _Home:
    """Where the optimizer's tensors live: on the weight's device, or in `store` and fetched slice by slice for an update."""

    store: torch.device | None

    def zeros(self, count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A flat tensor to keep, for a parameter on `device`; pinned memory if it is copied to a GPU."""
        if self.store is None:
            return torch.zeros(count, dtype=dtype, device=device)
        return torch.zeros(count, dtype=dtype, device=self.store, pin_memory=device.type == "cuda")

    def hold(self, values: torch.Tensor) -> torch.Tensor:
        """The values, stored here in their shape."""
        if self.store is None:
            return values
        return self.zeros(values.numel(), values.dtype, values.device).view(values.shape).copy_(values)

    def read(self, kept: torch.Tensor, part: slice, device: torch.device) -> torch.Tensor:
        """A slice on the parameter's device; a view if the tensor is kept there."""
        values = _slice(kept.view(-1), part)
        return values if self.store is None else values.to(device, copy=True)

    def write(self, kept: torch.Tensor, part: slice, values: torch.Tensor) -> None:
        """Overwrite the slice with new values."""
        kept.view(-1)[part].copy_(values)

    def put_back(self, kept: torch.Tensor, part: slice, values: torch.Tensor) -> None:
        """Write back a slice from `read` that was changed in place; a view needs no copy."""
        if self.store is not None:
            self.write(kept, part, values)


def _slice(values: torch.Tensor, part: slice) -> torch.Tensor:
    """A slice of flat values; the same tensor, not a view, if the slice covers all of it."""
    return values if part.start == 0 and part.stop >= values.shape[0] else values[part]


class _State:
    """A moment of one parameter, flat, in the optimizer's format; read and written in slices of float32."""

    def __init__(self, parameter: torch.Tensor, bits: int, home: _Home, code: torch.Tensor | None) -> None:
        self.device, count = parameter.device, parameter.numel()
        exact = torch.promote_types(parameter.dtype, torch.float32)
        self.bits, self.home = bits, home
        dtype = {32: exact, 16: torch.bfloat16, 8: torch.uint8}[bits]
        self.values = home.zeros(count, dtype, self.device)
        self.scales = home.zeros(-(-count // STATE_BLOCK), torch.float32, self.device) if bits == 8 else None
        self.code = code

    def _blocks(self, part: slice) -> slice:
        return slice(part.start // STATE_BLOCK, -(-part.stop // STATE_BLOCK))

    def read(self, part: slice) -> torch.Tensor:
        """The slice in float32."""
        values = self.home.read(self.values, part, self.device)
        if self.scales is None:
            return values if self.bits == 32 else values.float()
        scales = self.home.read(self.scales, self._blocks(part), self.device)
        made: torch.Tensor = torch.ops.bitsandbytes.dequantize_blockwise(values, scales, self.code, STATE_BLOCK, torch.float32)
        return made

    def write(self, part: slice, values: torch.Tensor, generator: torch.Generator) -> None:
        """Put float32 `values` back."""
        if self.scales is None and self.bits == 32:
            self.home.put_back(self.values, part, values)
        elif self.scales is None:
            self.home.write(self.values, part, round_bits(values, generator))
        else:
            quantised, scales = torch.ops.bitsandbytes.quantize_blockwise(values, self.code, STATE_BLOCK)
            self.home.write(self.values, part, quantised)
            self.home.write(self.scales, self._blocks(part), scales)

    def fetch(self, part: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The slice in its stored format, on the parameter's device, with its blocks' scales."""
        scales = None if self.scales is None else self.home.read(self.scales, self._blocks(part), self.device)
        return self.home.read(self.values, part, self.device), scales

    def put(self, part: slice, values: torch.Tensor, scales: torch.Tensor | None) -> None:
        """Write back what `fetch` returned, unless that was a view."""
        self.home.put_back(self.values, part, values)
        if self.scales is not None and scales is not None:
            self.home.put_back(self.scales, self._blocks(part), scales)

    def tensors(self) -> list[torch.Tensor]:
        """The stored tensors: values, and scales if there are any."""
        return [self.values] if self.scales is None else [self.values, self.scales]


def _put(found: dict[str, torch.Tensor], name: str, kept: torch.Tensor) -> None:
    """Pop the tensor of this name from `found` and copy it into `kept`. Raises ValueError if shape or dtype differ."""
    loaded = found.pop(name)
    if loaded.shape != kept.shape or loaded.dtype != kept.dtype:
        raise ValueError(f"{name} is {loaded.dtype} {tuple(loaded.shape)}, not {kept.dtype} {tuple(kept.shape)}")
    kept.copy_(loaded)


def _adamw(
    weights: list[torch.Tensor],
    gradients: list[torch.Tensor],
    means: list[torch.Tensor],
    squares: list[torch.Tensor],
    steps: list[torch.Tensor],
    group: Mapping[str, Any],
) -> None:
    """One in-place update of the weights with their group's settings, using torch's fused kernel."""
    beta1, beta2 = group["betas"]
    adamw(
        weights,
        gradients,
        means,
        squares,
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with torch's fused kernel, over slices of a parameter.

    On a GPU a custom kernel, if available, updates 16- and 8-bit states in one pass over a parameter (kernels/triton/adamw.py).

    A bf16 weight keeps 8 bits of precision: an update below 1/256 of the weight would be rounded away. So the update goes
    to a float32 master (Micikevicius et al. 2018, arXiv 1710.03740, section 3.1), or is rounded stochastically, which keeps
    it in expectation. `bits` is the size of each state: 32 (with masters), 16 or 8. `compensated` stores next to a bf16 weight
    the bits that rounding cut off and adds them before the next update (Kahan summation; with all 16 bits the sum is exact
    float32). `seed` seeds the rounding. With a `store`, states and masters live on that device (such as the CPU for weights on
    a GPU) and are copied over slice by slice: the results are the same, and a step also takes the time of both copies.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bits: int = 32,
        compensated: bool = False,
        seed: int = 0,
        store: torch.device | None = None,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.bits, self.compensated, self.home, self.seed = bits, compensated, _Home(store), seed
        ordered = [parameter for group in self.param_groups for parameter in group["params"]]
        self._places = {parameter: place for place, parameter in enumerate(ordered)}
        self._codes: dict[tuple[torch.device, bool], torch.Tensor] = {}
        device = ordered[0].device
        self.generator = torch.Generator(device).manual_seed(seed)

    @classmethod
    def named(cls, optim: str, parameters: Iterable[Any], **more: Any) -> AdamW:
        """The optimizer that the recipe's `train.optim` names."""
        return cls(parameters, bits=STATE_BITS[optim], compensated=optim in COMPENSATED, **more)

    def _state_of(self, parameter: torch.Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            exact = parameter.dtype in _EXACT
            state["step"] = 0
            masters = self.bits == 32 and not self.compensated
            state["master"] = self.home.hold(parameter.detach().float()) if masters and not exact else None
            if self.compensated and not exact:
                state["compensation"] = self.home.zeros(parameter.numel(), torch.int16, parameter.device)
            state["exp_avg"] = _State(parameter, self.bits, self.home, self._code(parameter.device, signed=True))
            state["exp_avg_sq"] = _State(parameter, self.bits, self.home, self._code(parameter.device, signed=False))
        return state

    def _code(self, device: torch.device, *, signed: bool) -> torch.Tensor | None:
        """The 8-bit code's values if states are 8-bit, else None: one tensor for all states of a device."""
        if self.bits != 8:
            return None
        if (device, signed) not in self._codes:
            self._codes[device, signed] = torch.tensor(_VALUES[signed], device=device)
        return self._codes[device, signed]

    def allocate(self) -> None:
        """Allocate the state of every parameter now, so that memory use includes it from the first step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._state_of(parameter)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("a closure is not supported")
        for group in self.param_groups:
            plain = []
            for parameter in group["params"]:
                if parameter.grad is not None and self._plain(parameter):
                    plain.append(parameter)
                elif parameter.grad is not None:
                    self.update(parameter, group)
            if plain:
                self._update_plain(plain, group)

    def _plain(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter is its own master, with 32-bit states on the same device."""
        return self.bits == 32 and self.home.store is None and parameter.dtype in _EXACT

    def _update_plain(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        """One update of plain parameters with gradients, all in one call: adapters are hundreds of small tensors."""
        states = [self._state_of(parameter) for parameter in parameters]
        steps = torch.tensor([float(state["step"]) for state in states], device=parameters[0].device)
        means, squares = (
            [state[name].values.view_as(parameter) for state, parameter in zip(states, parameters, strict=True)]
            for name in _MOMENTS
        )
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        _adamw([parameter.detach() for parameter in parameters], gradients, means, squares, list(steps.unbind()), group)
        for state in states:
            state["step"] += 1

    @torch.no_grad()
    def update(self, parameter: torch.Tensor, group: dict[str, Any], clip: tuple[torch.Tensor, float] | None = None) -> None:
        """One update of one parameter from its gradient, with its group's settings.

        `clip` is the gradient's norm and the maximum norm; the gradient is clipped to that first.
        """
        if parameter.grad is None:
            raise ValueError("the parameter has no gradient")
        small = self.bits != 32 and parameter.dtype != torch.float16
        if small and triton.computes(parameter, parameter.grad):
            self._update_in_one_pass(parameter, parameter.grad.reshape(-1), group, clip)
            return
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_([parameter], clip[1], clip[0])
        self._update_in_slices(parameter, parameter.grad.reshape(-1), group)

    def _update_in_slices(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        """One update from a flat gradient, in float32 slice by slice."""
        state, home = self._state_of(parameter), self.home
        weight = parameter.detach().view(-1)
        exact, device = parameter.dtype in _EXACT, parameter.device
        master, compensation = state["master"], state.get("compensation")
        for begin in range(0, len(weight), OPTIMIZER_SLICE):
            part = slice(begin, min(begin + OPTIMIZER_SLICE, len(weight)))
            if compensation is not None:
                target = join_halves(weight[part], home.read(compensation, part, device))
            elif master is not None:
                target = home.read(master, part, device)
            else:
                target = weight[part] if exact else weight[part].float()
            moments = [state[name].read(part) for name in _MOMENTS]
            step = torch.tensor(float(state["step"]), device=device)
            _adamw([target], [gradient[part].to(target.dtype)], [moments[0]], [moments[1]], [step], group)
            for name, values in zip(_MOMENTS, moments, strict=True):
                state[name].write(part, values, self.generator)
            if compensation is not None:
                weight[part], low = split_halves(target)
                home.write(compensation, part, low)
            elif master is not None:
                home.put_back(master, part, target)
                weight[part] = target.to(weight.dtype)
            elif not exact:
                weight[part] = round_bits(target, self.generator)
        state["step"] += 1

    def _update_in_one_pass(
        self,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        group: dict[str, Any],
        clip: tuple[torch.Tensor, float] | None,
    ) -> None:
        """One update by kernels/triton/adamw.py; the parameter's index and its step seed the stochastic rounding."""
        from tunesmith.kernels.triton.adamw import Moment, Step, update  # needs Triton

        state, home, device = self._state_of(parameter), self.home, parameter.device
        state["step"] += 1
        place = self._places.setdefault(parameter, len(self._places))
        seed = (self.seed * 1_000_003 + place * 10_007 + state["step"] * 7_919) % 2**31
        step = Step(group["lr"], group["betas"], group["eps"], group["weight_decay"], state["step"], seed)
        weight, kept, compensation = parameter.detach().view(-1), [state[name] for name in _MOMENTS], state.get("compensation")
        count = weight.shape[0]
        size = count if home.store is None else OPTIMIZER_SLICE
        for begin in range(0, count, size):
            part = slice(begin, min(begin + size, count))
            fetched = [each.fetch(part) for each in kept]
            low = None if compensation is None else home.read(compensation, part, device)
            mean, square = (Moment(each[0], each[1], moment.code) for each, moment in zip(fetched, kept, strict=True))
            update(_slice(weight, part), _slice(gradient, part), (mean, square), step, low, clip, first=begin)
            for moment, each in zip(kept, fetched, strict=True):
                moment.put(part, *each)
            if compensation is not None and low is not None:
                home.put_back(compensation, part, low)

    def kept(self, names: Mapping[torch.Tensor, str]) -> dict[str, torch.Tensor]:
        """Everything the next update depends on except weights and gradients, by parameter name; for saving.

        The tensors are the live ones, not copies. A float32 parameter is its own master and is not included.
        """
        found = {"generator": self.generator.get_state()}
        for parameter, state in self.state.items():
            found |= {f"{names[parameter]}.{key}": value for key, value in self._kept_of(parameter).items()}
            found[f"{names[parameter]}.step"] = torch.tensor([state["step"]])
        return found

    def _kept_of(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self._state_of(parameter)
        found: dict[str, torch.Tensor] = {}
        for moment in _MOMENTS:
            tensors = state[moment].tensors()
            found |= dict(zip((moment, f"{moment}.scales")[: len(tensors)], tensors, strict=True))
        if "compensation" in state:
            found["compensation"] = state["compensation"]
        if state["master"] is not None:
            found["master"] = state["master"]
        return found

    @torch.no_grad()
    def put_back(self, found: Mapping[str, torch.Tensor], names: Mapping[torch.Tensor, str]) -> None:
        """Load what `kept` returned, after the weights are loaded. Raises ValueError if the model or the format differs."""
        left = dict(found)
        if "generator" not in left:
            raise ValueError("no state of the generator")
        self.generator.set_state(left.pop("generator").cpu())
        for group in self.param_groups:
            for parameter in group["params"]:
                name = names[parameter]
                if f"{name}.step" not in left:
                    continue  # the parameter had no gradient yet
                kept = self._kept_of(parameter)
                if missing := [key for key in kept if f"{name}.{key}" not in left]:
                    raise ValueError(f"{name}.{missing[0]} is missing")
                for key, tensor in kept.items():
                    _put(left, f"{name}.{key}", tensor)
                self.state[parameter]["step"] = int(left.pop(f"{name}.step"))
        if left:
            raise ValueError(f"{min(left)} belongs to no parameter")

    @contextmanager
    def unloaded(self) -> Iterator[None]:
        """A context in which the model has its float32 weights, as after `unload`; on exit the rounded ones return."""
        kept = [(parameter, parameter.data) for parameter in self.state]
        self.unload()
        try:
            yield
        finally:
            for parameter, data in kept:
                parameter.data = data

    def unload(self) -> None:
        """Replace rounded parameters by their trained float32 weights, where those were kept."""
        for parameter, state in self.state.items():
            if "compensation" in state:
                compensation = state["compensation"].to(parameter.device)
                parameter.data = join_halves(parameter.detach().view(-1), compensation).view(parameter.shape)
            elif state["master"] is not None:
                parameter.data = state["master"]


class InBackward:
    """Updates each parameter as soon as its gradient is ready and frees the gradient, so only a few are alive at a time.

    (Lv et al. 2023, arXiv 2306.09782.) The global gradient norm is known too late to clip by it, so each parameter's gradient
    is clipped to `max_grad_norm` on its own. `norms` holds the step's norms before clipping.
    """

    def __init__(self, optimizer: AdamW, max_grad_norm: float) -> None:
        self.optimizer, self.max_grad_norm = optimizer, max_grad_norm
        self.norms: list[torch.Tensor] = []
        self.only_tried = False  # if True, gradients are freed and no weight is updated
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self._hook(number))

    def _hook(self, number: int) -> Callable[[torch.Tensor], None]:
        """The update hook for a parameter of that group. It looks the group up each time: `load_state_dict` replaces groups."""

        def update(parameter: torch.Tensor) -> None:
            if self.only_tried:
                parameter.grad = None
                return
            norm = gradient_norm([parameter])
            self.norms.append(norm)
            self.optimizer.update(parameter, self.optimizer.param_groups[number], clip=(norm, self.max_grad_norm))
            parameter.grad = None

        return update

    def take_norm(self) -> torch.Tensor:
        """The norm over all gradients since the last call."""
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(self.norms))
        self.norms = []
        return norm


def gradient_norm(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """The 2-norm over the gradients of all parameters, accumulated in float32 even for bf16 gradients."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if len(gradients) == 1:
        return _norm(gradients[0])
    exact = [gradient for gradient in gradients if gradient.dtype in _EXACT]
    norms = [_norm(gradient) for gradient in gradients if gradient.dtype not in _EXACT]
    norms += [torch.nn.utils.get_total_norm(exact)] if exact else []  # one call for hundreds
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def _norm(values: torch.Tensor) -> torch.Tensor:
    made: torch.Tensor = torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float32))
    return made
