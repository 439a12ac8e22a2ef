"""The training loop: transformers' `Trainer` with our loss, our metrics and nothing hidden.

Each optimizer step writes one line of `metrics.jsonl`: `step, loss, grad_norm, learning_rate, tokens, computed_tokens,
labelled_tokens, seconds`, and the objective's own figures. `loss` is the mean over what the objective counts in the whole
global batch (labelled tokens, or pairs), regardless of accumulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer

from tunesmith.engine.modeling.offload import ActivationOffload
from tunesmith.engine.optim.adamw import AdamW, InBackward, gradient_norm
from tunesmith.engine.packing.batch import Batch, Rows
from tunesmith.engine.packing.tree import Limits
from tunesmith.io.atomic import indented_json
from tunesmith.methods.settings import Settings
from tunesmith.stages.train.finite import NotFiniteError, check_finite, check_weights
from tunesmith.stages.train.losses import Loss, StepBatches
from tunesmith.stages.train.out_of_memory import in_smaller_parts, is_out_of_memory, out_of_memory, release
from tunesmith.stages.train.ranks import Ranks
from tunesmith.stages.train.recorder import Recorder
from tunesmith.stages.train.savepoints import Savepoint, Savepoints, random_state, set_random_state
from tunesmith.stages.train.setup import make_adamw, training_arguments


@dataclass(frozen=True)
class StepRows:
    """An optimizer step's rows as one opaque value, so that nothing searches it for tensors."""

    rows: Rows
    blank: bool = False  # a process without a row in this step computes one that does not count


class Engine(Trainer):  # type: ignore[misc] # transformers is untyped here
    """`Trainer` over a loss: minimises its mean over the global batch, records every step, stops on NaN or Inf."""

    def __init__(
        self,
        loss: Loss,
        model: Any,
        rows: Any,
        batches: StepBatches,
        settings: Settings,
        recorder: Recorder,
        *,
        scratch: Path,
        tell: Callable[[str, str], None],
        ranks: Ranks = Ranks(),
        resumed: Savepoint | None = None,
    ) -> None:
        """`tell` writes an event: code and message. `Trainer` writes its own files into `scratch`."""
        arguments = training_arguments(settings, scratch, cpu=model.device.type == "cpu")
        super().__init__(model=loss.loss_model(model), args=arguments, train_dataset=rows, data_collator=self._collated)
        self.loss, self.base, self.settings, self.batches, self.tell = loss, model, settings, batches, tell
        self.recorder, self.ranks = recorder, ranks
        # Trainer would infer this from a transformers model's signature: our loss divides by the global count.
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)
        self.resumed = resumed
        #: The rows of the current or the last step.
        self.step_rows: Rows = ()
        self.adamw: AdamW | None = None
        self.in_backward: InBackward | None = None
        self.offload = ActivationOffload(self.model) if settings.activation_offloading else None
        self._tried, self._blank = False, False
        self._start_counting()

    def _collated(self, rows: Rows) -> dict[str, Any]:
        share = self.ranks.share(rows)
        return {**self.batches(share or rows[:1]), "rows": StepRows(share or rows[:1], blank=not share)}

    def get_train_dataloader(self) -> Any:
        """Every process gets the rows of every step, in the order of a single process, and takes its share in the collator."""
        if self.ranks.world == 1:
            return super().get_train_dataloader()
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            sampler=self._get_train_sampler(),
            collate_fn=self.data_collator,
        )
        return prepare_data_loader(
            loader, self.args.device, 1, 0, put_on_device=True, use_seedable_sampler=True, data_seed=self.args.data_seed
        )

    def _start_counting(self) -> None:
        """Reset the counters of the step's micro-batches."""
        self._tokens, self._computed, self._labelled, self._counted = 0, 0, 0, 0
        self._sums: dict[str, torch.Tensor] = {}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Run all steps, or those after the savepoint; the timer of the first one starts here."""
        self.recorder.start()
        if self.resumed is not None:
            self.batches.limits = Limits(*self.resumed.state["limits"])
        path = None if self.resumed is None else str(self.resumed.path)
        return super().train(*args, resume_from_checkpoint=path, **kwargs)

    def trained_parameters(self) -> dict[torch.Tensor, str]:
        """The trainable parameters, with their names."""
        return {parameter: name for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def save_to(self, savepoints: Savepoints, more: Mapping[str, Any]) -> None:
        """Write all state that the next steps depend on, once a step's line of metrics is written; `more` is the caller's.

        Raises TrainError if a weight is not finite, or there is no disk space.
        """
        if self.adamw is None:
            raise AssertionError("there is nothing to save before training")
        names = self.trained_parameters()
        weights = {name: parameter for parameter, name in names.items()}
        check_weights(self.state.global_step, weights)
        states = self.ranks.gathered(random_state())
        others = [state for _, state in states]
        tensors = {"weights": weights, "optimizer": self.adamw.kept(names)}
        tensors |= {f"random-{rank}": generators for rank, (generators, _) in enumerate(states)}
        limits = list(astuple(self.batches.limits))
        state = {"step": self.state.global_step, "random": others, "schedule": self.lr_scheduler.state_dict(), "limits": limits}
        state |= more
        if self.ranks.first:
            savepoints.write(tensors, {"trainer_state.json": _trainer_state(self.state)}, state)
        self.ranks.agreed(None)  # wait until it is written

    def roll_back(self, saved: Savepoint) -> None:
        """Restore weights and optimizer from a savepoint; steps, schedule and rows continue from where they are."""
        self._put_weights(saved)
        if self.adamw is None:
            raise AssertionError("there is nothing to put back before training")
        self.adamw.put_back(saved.tensors("optimizer"), self.trained_parameters())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *_: Any) -> None:
        """Load the savepoint's weights into the model; replaces `Trainer`'s reader."""
        self._put_weights(self._savepoint(resume_from_checkpoint))

    def _put_weights(self, saved: Savepoint) -> None:
        found = saved.tensors("weights")
        names = self.trained_parameters()
        if set(found) != set(names.values()):
            raise AssertionError("the savepoint is of another model")
        with torch.no_grad():
            for parameter, name in names.items():
                parameter.copy_(found[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the savepoint's optimizer and schedule; replaces `Trainer`'s reader."""
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
        """Restore the savepoint's random generators; replaces `Trainer`'s reader."""
        if checkpoint is not None:
            saved = self._savepoint(checkpoint)
            rank = self.ranks.rank
            set_random_state(saved.tensors(f"random-{rank}"), saved.state["random"][rank])

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is no scaler: nothing is computed in float16."""

    def _savepoint(self, path: str) -> Savepoint:
        if self.resumed is None or str(self.resumed.path) != path:
            raise AssertionError("only the savepoint that was checked is read")
        return self.resumed

    def as_trained(self) -> AbstractContextManager[None]:
        """A context in which the model has its trained weights in float32, for saving."""
        if self.adamw is None:
            raise AssertionError("there is nothing to save before training")
        return self.adamw.unloaded()

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Forward and backward over the micro-batches of an optimizer step; the step's loss."""
        if num_items_in_batch is None:
            raise AssertionError("the training loop always counts")
        model.train()
        batches, step = inputs.pop("micro_batches"), inputs.pop("rows")
        if not self._tried:
            self._try_longest(model)
        self._blank = step.blank
        return self._within_memory(model, step.rows, batches, num_items_in_batch)

    def _try_longest(self, model: torch.nn.Module) -> None:
        """Compute the largest micro-batch of the longest rows first, so that out of memory shows now, not hours later.

        The optimizer states are allocated before. No weight changes, and the random state is restored.
        """
        if self.adamw is None:
            raise AssertionError("Trainer makes the optimizer before the first step")
        self._tried = True
        try:
            self.adamw.allocate()
        except Exception as error:
            if is_out_of_memory(error):
                raise out_of_memory(self.settings, self.base, 0, str(error)) from error
            raise
        lengths = self.loss.lengths(self.train_dataset)
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        rows = [self.train_dataset[index] for index in order[: self.args.per_device_train_batch_size]]
        batches = self.batches(rows)["micro_batches"]
        before = random_state()
        if self.in_backward is not None:
            self.in_backward.only_tried = True
        largest = max(batches, key=lambda batch: int(batch["input_ids"].numel()))
        with getattr(model, "no_sync", nullcontext)():  # of DistributedDataParallel
            self._within_memory(model, rows, [largest], torch.tensor(max(1, self.loss.count(largest))), of=len(batches))
        if self.in_backward is not None:
            self.in_backward.only_tried = False
        model.zero_grad(set_to_none=True)
        set_random_state(*before)
        self._start_counting()

    def _within_memory(
        self, model: torch.nn.Module, rows: Rows, batches: list[Batch], count: torch.Tensor | int, of: int | None = None
    ) -> torch.Tensor:
        """The loss and gradients of a step's micro-batches; if memory runs out, in smaller ones of the same rows.

        `of` is the number of micro-batches that the rows make if `batches` are not all of them. Raises TrainError if rows do
        not fit one by one, or weights are updated in the backward pass.
        """
        self.step_rows = rows
        before = random_state()
        while True:
            made, tokens = of or len(batches), max(int(batch["input_ids"].numel()) for batch in batches)
            try:
                return self._accumulated(model, batches, count)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                message = str(error)
            model.zero_grad(set_to_none=True)  # partial gradients of the step
            self._start_counting()
            set_random_state(*before)
            batches = []
            release()
            whole = self.in_backward is not None or self.ranks.world > 1  # other processes are already past this
            smaller = None if whole else in_smaller_parts(self.batches, rows, made, tokens)
            if smaller is None:
                longest = max(self.loss.lengths(self.train_dataset))
                raise out_of_memory(self.settings, self.base, longest, message)
            limit = self.batches.limits.tokens
            text = f"micro-batches of {tokens:,} tokens do not fit: at most {limit:,} from now on, with the same rows per step"
            self.tell("out-of-memory", text)
            batches, of = smaller, None

    def _accumulated(self, model: torch.nn.Module, batches: list[Batch], count: torch.Tensor | int) -> torch.Tensor:
        total = torch.zeros((), device=self.args.device)
        while batches:  # popped, so that a micro-batch's tensors are freed after it
            batch = self._prepare_inputs(batches.pop(0))
            with nullcontext() if not batches else getattr(model, "no_sync", nullcontext)():  # one all-reduce per step
                loss = self.compute_loss(model, batch, num_items_in_batch=count)
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
        """The micro-batch's share of the loss: its sum divided by `num_items_in_batch`, the count of the global batch."""
        if num_items_in_batch is None or return_outputs:
            raise AssertionError("the training loop always counts and asks for the loss alone")
        tokens = inputs.pop("row_tokens")
        if not self._blank:
            self._computed += inputs["input_ids"].numel()
            self._tokens += tokens
            self._labelled += inputs["labelled"]
            self._counted += self.loss.count(inputs)
        with self.offload or nullcontext():
            summed, sums = self.loss.read(model(**inputs))
        if self._blank:
            return summed * 0.0
        self._sums = {name: value + self._sums.get(name, 0) for name, value in sums.items()}
        # Gradients are averaged over the ranks, so each rank multiplies its share by their number.
        loss: torch.Tensor = summed / num_items_in_batch * self.accelerator.num_processes
        if self.in_backward is not None and not math.isfinite(float(loss.detach())):
            # The weights would be updated before the norm is known.
            raise NotFiniteError(self.state.global_step + 1, float(loss.detach()), math.nan)
        return loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW in the format the recipe names; weight decay on matrices only."""
        self.adamw = make_adamw(self, model or self.model, self.settings)
        if self.settings.optimizer_in_backward:
            self.in_backward = InBackward(self.adamw, self.args.max_grad_norm)
        self.optimizer: torch.optim.Optimizer = self.adamw
        return self.optimizer

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        """Clip the gradients to `max_grad_norm` and return their norm before; in float32, even if they are bf16."""
        if self.in_backward is not None:
            return self.in_backward.take_norm()
        norm = gradient_norm(model.parameters())
        if not float(norm) + 1e-6 <= self.args.max_grad_norm:  # else torch would multiply them all by 1
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), self.args.max_grad_norm, norm)
        return norm

    def _get_num_items_in_batch(self, batch_samples: Sequence[Mapping[str, Any]], device: torch.device) -> torch.Tensor:
        """What the objective counts in the global batch: over all micro-batches and all ranks."""
        batches = [batch for sample in batch_samples if not sample["rows"].blank for batch in sample["micro_batches"]]
        count = torch.tensor(sum(map(self.loss.count, batches)), device=device)
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> float:
        """The gradient norm before clipping; raises TrainError before the optimizer step if anything is not finite."""
        norm = float(super()._get_grad_norm(model, grad_norm=grad_norm))
        check_finite(self.state.global_step + 1, float(self._tr_loss), norm)
        return norm

    def losses(self) -> list[float]:
        """The loss of each finished step, including the last one if its line is not written yet."""
        history = self.recorder.history
        losses = [step.loss for step in history]
        if self.state.global_step > len(history):
            losses.append(float(self.accelerator.gather(self._tr_loss.detach()).mean()))
        return losses

    def log(self, logs: dict[str, float], *_: Any, **__: Any) -> None:
        """Called by Trainer after each optimizer step; writes the step's line of metrics and nothing else."""
        if "grad_norm" not in logs:
            return  # Trainer's final summary; `train` makes its own
        seconds = self.recorder.elapsed
        sums = {name: float(total) for name, total in self._sums.items()}
        all_of_it = self.ranks.gathered((self._tokens, self._computed, self._labelled, self._counted, sums))
        tokens, computed, labelled, counted = (sum(each[place] for each in all_of_it) for place in range(4))
        names = dict.fromkeys(name for each in all_of_it for name in each[4])
        figures = {name: sum(each[4].get(name, 0.0) for each in all_of_it) / counted for name in names}
        self._start_counting()
        self.recorder.record(logs, (tokens, computed, labelled), figures, self.ranks.agreed(seconds))


def _trainer_state(state: Any) -> str:
    """`Trainer`'s counters as it reads them, without its log history, which grows: metrics.jsonl has it."""
    values = {key: value for key, value in asdict(state).items() if key != "log_history"}
    return indented_json(values | {"log_history": [], "stateful_callbacks": {}})
