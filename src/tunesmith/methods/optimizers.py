"""AdamW for weights of any dtype: the arithmetic is in float32, whatever the model computes in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw


class MasterAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) on float32 copies of the parameters, fused.

    A bf16 weight keeps 8 bits of precision: an update below 1/256 of the weight would be rounded away, so updates go to a
    float32 master and the weight is its rounding (mixed precision: Micikevicius et al. 2018, arXiv 1710.03740, section 3.1).
    A parameter that is float32 already is its own master. Bytes for each bf16 parameter: 4 master, 8 states; while it
    steps, 4 more for the gradient of the largest parameter.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _state_of(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[parameter]
        if not state:
            own = parameter.dtype in {torch.float32, torch.float64}
            master = parameter.detach() if own else parameter.detach().float()
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["master"] = master
            state["exp_avg"] = torch.zeros_like(master)
            state["exp_avg_sq"] = torch.zeros_like(master)
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override] # no closure is needed
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("a closure is not supported")
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self._state_of(parameter)
                master = state["master"]
                adamw(
                    [master],
                    [parameter.grad.to(master.dtype)],
                    [state["exp_avg"]],
                    [state["exp_avg_sq"]],
                    [],
                    [state["step"]],
                    fused=True,
                    amsgrad=False,
                    beta1=beta1,
                    beta2=beta2,
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
                if master.dtype != parameter.dtype:
                    parameter.copy_(master)

    def unload(self) -> None:
        """Put the masters in the place of the rounded parameters: the model is then what was trained, in float32."""
        for parameter, state in self.state.items():
            parameter.data = state["master"]


def gradient_norm(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """The 2-norm over the gradients of all parameters, summed in float32 also where they are bf16."""
    norms = [torch.linalg.vector_norm(p.grad, dtype=_exact(p.grad)) for p in parameters if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def _exact(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
