"""The training loop: transformers' `Trainer` with our loss, our metrics and nothing hidden.

Per optimizer step one line of `metrics.jsonl`: `step, loss, grad_norm, learning_rate, tokens, computed_tokens,
labelled_tokens, seconds`, and the objective's own figures. `loss` is the mean over what the objective counts in the whole
global batch (labelled tokens, or pairs), whatever the accumulation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from tunesmith.errors import Problem, TrainError
from tunesmith.io.atomic import append_jsonl, indented_json
from tunesmith.methods.offload import ActivationOffload
from tunesmith.methods.optimizers import AdamW, InBackward, gradient_norm
from tunesmith.methods.settings import Settings
from tunesmith.packing.batch import Batch, labelled_count
from tunesmith.recipe import Recipe, TrainSection
from tunesmith.stages.train.objective import Objective, StepBatches
from tunesmith.stages.train.savepoints import Savepoint, Savepoints, random_state, set_random_state


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step.

    `tokens` counts the tokens of all rows, `computed_tokens` those that went through the model: fewer where rows share
    prefixes, more where they are padded. `seconds` is wall time from the step before. `figures` are the objective's own.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    computed_tokens: int
    labelled_tokens: int
    seconds: float
    figures: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """A line of metrics.jsonl: the figures stand beside the other keys."""
        values = asdict(self)
        figures: dict[str, float] = values.pop("figures")
        return values | figures


def training_arguments(recipe: Recipe, settings: Settings, scratch: Path, *, cpu: bool) -> TrainingArguments:
    """Transformers' arguments for the settled settings; saving, logging and reporting are ours."""
    arguments = TrainingArguments(
        output_dir=str(scratch),
        # One batch of `Trainer` is all rows of an optimizer step; the collator makes micro-batches of them.
        per_device_train_batch_size=settings.effective_batch_size,
        gradient_accumulation_steps=1,
        max_steps=settings.max_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=recipe.train.lr_scheduler_type,
        warmup_steps=settings.warmup_steps,
        weight_decay=recipe.train.weight_decay,
        max_grad_norm=recipe.train.max_grad_norm,
        seed=recipe.seed,
        data_seed=recipe.seed,
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=not cpu,
        use_cpu=cpu,
    )
    # With several GPUs in one process Trainer would wrap the model in DataParallel, which cannot split a tree.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def make_adamw(trainer: Any, model: Any, asked: TrainSection) -> AdamW:
    """The optimizer of a `Trainer`'s model in the format that the recipe names; weight decay on matrices only."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = set(trainer.get_decay_parameter_names(model)) & trained.keys()
    groups = [
        {"params": [trained[name] for name in trained if name in decayed], "weight_decay": trainer.args.weight_decay},
        {"params": [trained[name] for name in trained if name not in decayed], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return AdamW.named(asked.optim, groups, lr=trainer.args.learning_rate, seed=trainer.args.seed)


class Engine(Trainer):  # type: ignore[misc] # transformers is untyped here
    """`Trainer` over an objective's loss: its mean over the global batch, metrics for each step, finite or stopped."""

    def __init__(
        self,
        objective: Objective,
        model: Any,
        arguments: TrainingArguments,
        asked: TrainSection,
        rows: Any,
        batches: StepBatches,
        *,
        metrics_path: Path,
        resumed: Savepoint | None = None,
        history: Sequence[StepMetrics] = (),
    ) -> None:
        super().__init__(model=objective.loss_model(model), args=arguments, train_dataset=rows, data_collator=batches)
        self.objective = objective
        # What Trainer reads off the signature of a transformers model: our loss divides by the global count.
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)
        self.metrics_path = metrics_path
        #: Called with each step once its line of metrics is written, and how many steps there will be.
        self.on_step: list[Callable[[StepMetrics, int], None]] = []
        self.history = list(history)
        self.resumed = resumed
        self.asked = asked
        self.adamw: AdamW | None = None
        self.in_backward: InBackward | None = None
        self.offload = ActivationOffload(self.model) if asked.activation_offloading else None
        self._tokens = 0
        self._computed = 0
        self._labelled = 0
        self._counted = 0
        self._sums: dict[str, torch.Tensor] = {}
        self._begun = time.perf_counter()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Run all steps, or those after the savepoint; the clock of the first one starts here."""
        self._begun = time.perf_counter()
        path = None if self.resumed is None else str(self.resumed.path)
        return super().train(*args, resume_from_checkpoint=path, **kwargs)

    def trained_parameters(self) -> dict[torch.Tensor, str]:
        """The parameters that are trained, with their names."""
        return {parameter: name for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def save_to(self, savepoints: Savepoints, more: Mapping[str, Any]) -> None:
        """Write all that the next steps depend on, as it is after a step's line of metrics was written; `more` is the caller's.

        Raises TrainError where a weight is not finite, or there is no room.
        """
        if self.adamw is None:
            raise AssertionError("there is nothing to save before training")
        names = self.trained_parameters()
        for parameter, name in names.items():
            if not bool(torch.isfinite(parameter.detach()).all()):
                raise not_finite_weight(self.state.global_step, name)
        generators, others = random_state()
        tensors = {
            "weights": {name: parameter for parameter, name in names.items()},
            "optimizer": self.adamw.kept(names),
            "random": generators,
        }
        state = {"step": self.state.global_step, "random": others, "schedule": self.lr_scheduler.state_dict(), **more}
        savepoints.write(tensors, {"trainer_state.json": _trainer_state(self.state)}, state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *_: Any) -> None:
        """The savepoint's weights into the model, in place of `Trainer`'s reader."""
        saved = self._savepoint(resume_from_checkpoint)
        found = saved.tensors("weights")
        names = self.trained_parameters()
        if set(found) != set(names.values()):
            raise AssertionError("the savepoint is of another model")
        with torch.no_grad():
            for parameter, name in names.items():
                parameter.copy_(found[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The savepoint's optimizer and schedule, in place of `Trainer`'s reader."""
        if checkpoint is None:
            return
        saved = self._savepoint(checkpoint)
        if self.adamw is None or self.lr_scheduler is None:
            raise AssertionError("Trainer makes both before it loads them")
        self.adamw.put_back(saved.tensors("optimizer"), self.trained_parameters())
        self.lr_scheduler.load_state_dict(dict(saved.state["schedule"]))
        for group, rate in zip(self.adamw.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The savepoint's random generators, in place of `Trainer`'s reader."""
        if checkpoint is not None:
            saved = self._savepoint(checkpoint)
            set_random_state(saved.tensors("random"), saved.state["random"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is none: nothing is computed in float16."""

    def _savepoint(self, path: str) -> Savepoint:
        if self.resumed is None or str(self.resumed.path) != path:
            raise AssertionError("only the savepoint that was checked is read")
        return self.resumed

    def as_trained(self) -> AbstractContextManager[None]:
        """In the block the model has the weights as they were trained, in float32, for saving."""
        if self.adamw is None:
            raise AssertionError("there is nothing to save before training")
        return self.adamw.unloaded()

    def leave_out(self, seconds: float) -> None:
        """Count so many seconds that have just gone by to no step."""
        self._begun += seconds

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, list[Batch]],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Forward and backward over the micro-batches of an optimizer step; the step's loss."""
        model.train()
        total = torch.zeros((), device=self.args.device)
        batches = inputs.pop("micro_batches")
        while batches:  # what a micro-batch made goes with it
            loss = self.compute_loss(model, self._prepare_inputs(batches.pop(0)), num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The micro-batch's share of the loss: a mean over the `num_items_in_batch` that are counted in the global batch."""
        if num_items_in_batch is None or return_outputs:
            raise AssertionError("the training loop always counts and asks for the loss alone")
        self._computed += inputs["input_ids"].numel()
        self._tokens += inputs.pop("row_tokens")
        self._labelled += labelled_count(inputs)
        self._counted += self.objective.count(inputs)
        with self.offload or nullcontext():
            summed, sums = self.objective.read(model(**inputs))
        self._sums = {name: value + self._sums.get(name, 0) for name, value in sums.items()}
        # Gradients are averaged over the ranks, so each gives its share times their number.
        loss: torch.Tensor = summed / num_items_in_batch * self.accelerator.num_processes
        if self.in_backward is not None and not math.isfinite(float(loss.detach())):
            # The weights would be updated before the norm is known.
            raise not_finite(self.state.global_step + 1, float(loss.detach()), math.nan)
        return loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW in the format that the recipe names; weight decay on matrices only."""
        self.adamw = make_adamw(self, model or self.model, self.asked)
        if self.asked.optimizer_in_backward:
            self.in_backward = InBackward(self.adamw, self.args.max_grad_norm)
        self.optimizer: torch.optim.Optimizer = self.adamw
        return self.optimizer

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        """Scale the gradients down to `max_grad_norm` and return their norm before; in float32, also where they are bf16."""
        if self.in_backward is not None:
            return self.in_backward.take_norm()
        norm = gradient_norm(model.parameters())
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), self.args.max_grad_norm, norm)
        return norm

    def _get_num_items_in_batch(self, batch_samples: Sequence[Mapping[str, Any]], device: torch.device) -> torch.Tensor:
        """What the objective counts in the global batch: in all micro-batches, on all ranks."""
        batches = [batch for sample in batch_samples for batch in sample["micro_batches"]]
        count = torch.tensor(sum(map(self.objective.count, batches)), device=device)
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> float:
        """The gradient norm before clipping; raises TrainError before the optimizer moves if anything is not finite."""
        norm = float(super()._get_grad_norm(model, grad_norm=grad_norm))
        check_finite(self.state.global_step + 1, float(self._tr_loss), norm)
        return norm

    def log(self, logs: dict[str, float], *_: Any, **__: Any) -> None:
        """Called by Trainer after each optimizer step; writes the step's line, and nothing else anywhere."""
        if "grad_norm" not in logs:
            return  # the summary at the end, which `train` makes itself
        now = time.perf_counter()
        metrics = StepMetrics(
            step=self.state.global_step,
            loss=logs["loss"],
            grad_norm=float(logs["grad_norm"]),
            learning_rate=float(logs["learning_rate"]),
            tokens=self._tokens,
            computed_tokens=self._computed,
            labelled_tokens=self._labelled,
            seconds=now - self._begun,
            figures={name: float(total) / self._counted for name, total in self._sums.items()},
        )
        self._begun, self._tokens, self._computed, self._labelled, self._counted = now, 0, 0, 0, 0
        self._sums = {}
        self.history.append(metrics)
        append_jsonl(self.metrics_path, metrics.as_dict())
        for call in self.on_step:
            call(metrics, self.state.max_steps)


def _trainer_state(state: Any) -> str:
    """`Trainer`'s counters as it reads them. Its history of logs stays out, which grows: metrics.jsonl has it."""
    values = {key: value for key, value in asdict(state).items() if key != "log_history"}
    return indented_json(values | {"log_history": [], "stateful_callbacks": {}})


def step_metrics(line: Mapping[str, Any]) -> StepMetrics:
    """A line of metrics.jsonl."""
    own = {each.name for each in fields(StepMetrics)} - {"figures"}
    figures = {key: value for key, value in line.items() if key not in own}
    return StepMetrics(**{key: value for key, value in line.items() if key in own}, figures=figures)


def not_finite_weight(step: int, name: str) -> TrainError:
    """The error of a weight that is no number."""
    why = "what would be saved could not be used, and would take the place of what can"
    fix = "lower train.learning_rate, or set train.compute_dtype: float32; the savepoint before is as it was"
    return TrainError(Problem("TS301", f"weights that are not finite after step {step}", name, why, fix))


def not_finite(step: int, loss: float, norm: float) -> TrainError:
    """The error of a step whose loss or gradient is no number."""
    what = f"loss {loss} and gradient norm {norm} at step {step}"
    why = "the weights would turn to NaN and every later step would be lost; the optimizer has not moved"
    fix = "lower train.learning_rate, look at the rows of this step, or set train.compute_dtype: float32"
    return TrainError(Problem("TS301", what, "train", why, fix))


def check_finite(step: int, loss: float, norm: float) -> None:
    """Raise TrainError before the optimizer moves where the loss or the gradient norm is no number."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise not_finite(step, loss, norm)
