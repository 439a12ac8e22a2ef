"""What the TRL loops share: TRL's trainers get the token ids that `prepare` made.

TRL's losses, samplers and batches are used unchanged. We supply the ids (TRL's own tokenization is bypassed), the optimizer,
the metrics of each step, and the stop on a non-finite loss. Each objective has its own module next to this one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback

from tunesmith.engine.optim.adamw import AdamW
from tunesmith.errors import Problem, TrainError
from tunesmith.methods.settings import Settings
from tunesmith.stages.train.finite import check_finite
from tunesmith.stages.train.loops.padded import PaddedLoop
from tunesmith.stages.train.recorder import Recorder
from tunesmith.stages.train.setup import common_arguments, make_adamw

_MASKS = ("attention_mask", "KL_attention_mask", "chosen_attention_mask", "rejected_attention_mask", "prompt_mask")
_BASE = {"loss", "grad_norm", "learning_rate", "epoch", "step", "num_tokens"}


class Watched(Trainer):  # type: ignore[misc] # transformers is untyped here
    """A mixin for TRL's trainers: our optimizer, token counts, and no optimizer step on NaN or Inf."""

    settings: Settings
    adamw: AdamW | None = None
    counted: tuple[int, int, int] = (0, 0, 0)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW in the format the recipe names."""
        made = make_adamw(self, model or self.model, self.settings)
        self.adamw = self.optimizer = made
        return made

    def compute_loss(self, model: Any, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss; also counts the batch's tokens."""
        before, (real, computed, labelled) = self.counted, _tokens(inputs)
        self.counted = (before[0] + real, before[1] + computed, before[2] + labelled)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        norm = float(super()._get_grad_norm(model, grad_norm=grad_norm))
        check_finite(self.state.global_step + 1, float(self._tr_loss), norm)
        return norm


def watched(trainer_type: Any, *mixins: type) -> Any:
    """A TRL trainer class with `Watched`, and further mixins before it."""
    return type(trainer_type.__name__, (*mixins, Watched, trainer_type), {})


def _tokens(inputs: Mapping[str, Any]) -> tuple[int, int, int]:
    """Real, computed and labelled tokens of a batch, from its masks."""
    masks = [inputs[name] for name in _MASKS if name in inputs]
    labelled = [inputs["completion_mask"]] if "completion_mask" in inputs else []
    if "prompt_mask" in inputs:
        masks += labelled
    labelled += [inputs[name] != -100 for name in ("chosen_labels", "rejected_labels") if name in inputs]
    return sum(int(m.sum()) for m in masks), sum(m.numel() for m in masks), sum(int(m.sum()) for m in labelled)


class _Steps(TrainerCallback):  # type: ignore[misc] # transformers is untyped here
    """Passes each step's figures to the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.trainer: Any = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the timer."""
        self.recorder.start()

    def on_log(self, _arguments: Any, _state: Any, _control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Record a step; the final summary has no gradient norm and is skipped."""
        if logs is None or "grad_norm" not in logs:
            return
        figures = {name: float(value) for name, value in logs.items() if name not in _BASE and isinstance(value, int | float)}
        self.recorder.record(logs, self.trainer.counted, figures)
        self.trainer.counted = (0, 0, 0)


class TrlLoop(PaddedLoop):
    """A loop over one of TRL's trainers."""

    @abstractmethod
    def trainer(self, arguments: Mapping[str, Any], **more: Any) -> Any:
        """The trainer: a `Watched` one whose config gets `arguments` and which itself gets `more`."""

    def steps(self, recorder: Recorder) -> AbstractContextManager[None]:
        """Run the trainer. Raises TrainError where TRL refuses the settings."""
        watch, work, settings = _Steps(recorder), self.work, self.work.settings
        arguments = trl_arguments(settings, work.scratch, cpu=work.model.device.type == "cpu")
        try:
            more = {"model": work.model, "processing_class": self.tokenizer, "callbacks": [watch]}
            trainer = self.trainer(arguments, **more)
        except ValueError as error:
            why, fix = "TRL would train something other than requested", "change the key that it names"
            raise TrainError(Problem("TS304", f"TRL refuses the settings: {error}", "train", why, fix)) from error
        trainer.remove_callback(PrinterCallback)
        watch.trainer, trainer.settings = trainer, settings
        dtype = getattr(torch, work.method.compute_dtype)
        for name, parameter in work.model.named_parameters():
            if parameter.requires_grad and work.method.name != "full":
                # TRL casts what is trained on a 4-bit base to bfloat16; here adapters are float32, a head the compute dtype.
                parameter.data = parameter.data.to(torch.float32 if "lora_" in name else dtype)
        trainer.train()
        return _as_trained(trainer, work.model)


def trl_arguments(settings: Settings, scratch: Path, *, cpu: bool) -> dict[str, Any]:
    """The arguments of all of TRL's configs."""
    return {
        **common_arguments(settings, scratch, cpu=cpu),
        "per_device_train_batch_size": settings.per_device_train_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "bf16": False,  # the method has put the model into its compute dtype
        "gradient_checkpointing": False,  # the method has enabled it if requested
    }


@contextmanager
def _as_trained(trainer: Any, model: Any) -> Iterator[None]:
    """A context with the trained weights, from which TRL's copy of the adapter, its reference, is removed."""
    if trainer.adamw is None:
        raise AssertionError("there is nothing to save before training")
    if "ref" in getattr(model, "peft_config", {}):
        model.delete_adapter("ref")
    with trainer.adamw.unloaded():
        yield


def labelled_span(loss_mask: Sequence[bool]) -> tuple[int, int]:
    """The start of the labelled span, and the position after its end; excludes what a template puts after the answer."""
    first = loss_mask.index(True)
    return first, len(loss_mask) - list(reversed(loss_mask)).index(True)
