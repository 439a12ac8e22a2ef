"""TRL's trainers for KTO, ORPO, reward models, GRPO and RLOO, fed with the token ids that `prepare` made.

TRL's losses, samplers and batches are taken as they are. Ours are the ids (its own tokenizing is passed over), the optimizer,
the metrics of each step, and that a loss that is no number stops the run. Importing this module imports TRL.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback
from trl import (
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
)

from tunesmith.errors import Problem, TrainError
from tunesmith.methods.optimizers import AdamW
from tunesmith.recipe import TrainSection
from tunesmith.stages.train.beside import Recorder, Work
from tunesmith.stages.train.finite import check_finite
from tunesmith.stages.train.rewards import Reward
from tunesmith.stages.train.setup import make_adamw

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # ORPO lives in trl.experimental; the page on objectives says so
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

_MASKS = ("attention_mask", "KL_attention_mask", "chosen_attention_mask", "rejected_attention_mask", "prompt_mask")
_BASE = {"loss", "grad_norm", "learning_rate", "epoch", "step", "num_tokens"}


class _Watched(Trainer):  # type: ignore[misc] # transformers is untyped here
    """A mixin for TRL's trainers: our optimizer, counted tokens, and no step on what is not finite."""

    asked: TrainSection
    adamw: AdamW | None = None
    counted: tuple[int, int, int] = (0, 0, 0)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW in the format that the recipe names."""
        made = make_adamw(self, model or self.model, self.asked)
        self.adamw = self.optimizer = made
        return made

    def compute_loss(self, model: Any, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss; the batch's tokens are counted on the way."""
        before, (real, computed, labelled) = self.counted, _tokens(inputs)
        self.counted = (before[0] + real, before[1] + computed, before[2] + labelled)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        norm = float(super()._get_grad_norm(model, grad_norm=grad_norm))
        check_finite(self.state.global_step + 1, float(self._tr_loss), norm)
        return norm


def _tokens(inputs: Mapping[str, Any]) -> tuple[int, int, int]:
    """Real, computed and labelled tokens of a batch, by its masks."""
    masks = [inputs[name] for name in _MASKS if name in inputs]
    labelled = [inputs["completion_mask"]] if "completion_mask" in inputs else []
    if "prompt_mask" in inputs:
        masks += labelled
    labelled += [inputs[name] != -100 for name in ("chosen_labels", "rejected_labels") if name in inputs]
    return sum(int(m.sum()) for m in masks), sum(m.numel() for m in masks), sum(int(m.sum()) for m in labelled)


class _Kto(_Watched, KTOTrainer):  # type: ignore[misc] # TRL is untyped here
    def _prepare_dataset(self, dataset: Any, _processing_class: Any, args: Any, *_: Any) -> Any:
        """The rows as they are, each with the answer of its neighbour in the micro-batch, as TRL pairs them for the KL term."""

        def paired(rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
            answers = rows["completion_ids"]
            return {"KL_completion_ids": [answers[-1], *answers[:-1]]}

        return dataset.map(paired, batched=True, batch_size=args.per_device_train_batch_size)


class _Orpo(_Watched, ORPOTrainer):  # type: ignore[misc] # TRL is untyped here
    def tokenize_row(self, feature: Mapping[str, Any], *_: Any) -> dict[str, Any]:
        """The row as it is: it holds token ids."""
        return dict(feature)


class _Reward(_Watched, RewardTrainer):  # type: ignore[misc] # TRL is untyped here
    pass


class _OwnPrompts:
    """A mixin for trainers that sample: prompts are asked with the ids that `prepare` made."""

    prompts_ids: Mapping[tuple[tuple[str, str], ...], list[int]]

    def _tokenize_prompts(self, prompts: Sequence[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [list(self.prompts_ids[_key(prompt)]) for prompt in prompts], None, {}


class _Grpo(_OwnPrompts, _Watched, GRPOTrainer):  # type: ignore[misc] # TRL is untyped here
    pass


class _Rloo(_OwnPrompts, _Watched, RLOOTrainer):  # type: ignore[misc] # TRL is untyped here
    pass


def _key(messages: Sequence[Mapping[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((message["role"], message["content"]) for message in messages)


class _Steps(TrainerCallback):  # type: ignore[misc] # transformers is untyped here
    """Hands each step's figures to the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.trainer: Any = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.recorder.start()

    def on_log(self, _arguments: Any, _state: Any, _control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Record a step; the summary at the end has no gradient norm and is passed over."""
        if logs is None or "grad_norm" not in logs:
            return
        figures = {name: float(value) for name, value in logs.items() if name not in _BASE and isinstance(value, int | float)}
        self.recorder.record(logs, self.trainer.counted, figures)
        self.trainer.counted = (0, 0, 0)


def arguments(work: Work) -> dict[str, Any]:
    """What all of TRL's configs get of the settled settings; saving, logging and reporting are ours."""
    asked, settings, cpu = work.run.recipe.train, work.settings, work.hardware.device == "cpu"
    return {
        "output_dir": str(work.scratch),
        "per_device_train_batch_size": settings.per_device_train_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "max_steps": settings.max_steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": asked.lr_scheduler_type,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": asked.weight_decay,
        "max_grad_norm": asked.max_grad_norm,
        "seed": work.run.recipe.seed,
        "data_seed": work.run.recipe.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": not cpu,
        "use_cpu": cpu,
        "bf16": False,  # the method has put the model into its compute dtype
        "gradient_checkpointing": False,  # the method has switched it on where it was asked for
    }


def judged_rows(rows: Any, seed: int) -> Any:
    """Prompt and completion ids with labels, in a seeded order: KTO's trainer takes rows in the order that they are in."""

    def split(row: Mapping[str, Any]) -> dict[str, Any]:
        first, end = trained_span(row["trained"])
        return {"prompt_ids": row["input_ids"][:first], "completion_ids": row["input_ids"][first:end]}

    return rows.map(split, remove_columns=[name for name in rows.column_names if name != "label"]).shuffle(seed=seed)


def trained_span(trained: Sequence[bool]) -> tuple[int, int]:
    """Where the trained stretch begins, and the place after its end; what a template puts after the answer is left out."""
    first = trained.index(True)
    return first, len(trained) - list(reversed(trained)).index(True)


def orpo_rows(rows: Any) -> Any:
    """The columns that TRL's collator of pairs pads: ids, masks and labels of both sides."""

    def made(row: Mapping[str, Any]) -> dict[str, Any]:
        first = trained_span(row["trained"])[0]
        prompt = row["input_ids"][:first]
        found: dict[str, Any] = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side, prefix in (("chosen", ""), ("rejected", "rejected_")):
            begin, end = trained_span(row[f"{prefix}trained"])
            ids = row[f"{prefix}input_ids"][:end]
            found |= {f"{side}_input_ids": ids, f"{side}_attention_mask": [1] * end}
            found[f"{side}_labels"] = [-100] * begin + ids[begin:]
        return found

    return rows.map(made, remove_columns=rows.column_names)


def _kto(work: Work) -> AbstractContextManager[None]:
    asked = work.run.recipe.kto
    weights = {"desirable_weight": asked.desirable_weight, "undesirable_weight": asked.undesirable_weight}
    config = KTOConfig(**arguments(work), beta=asked.beta, **weights, max_length=None)
    rows = judged_rows(work.rows, work.run.recipe.seed)
    reference = work.method.reference()
    return _trained(work, lambda **more: _Kto(args=config, train_dataset=rows, ref_model=reference, **more))


def _orpo(work: Work) -> AbstractContextManager[None]:
    length = work.run.recipe.data.max_length
    config = ORPOConfig(**arguments(work), beta=work.run.recipe.orpo.beta, max_length=length, remove_unused_columns=False)
    return _trained(work, lambda **more: _Orpo(args=config, train_dataset=orpo_rows(work.rows), **more))


def _reward(work: Work) -> AbstractContextManager[None]:
    asked = work.run.recipe.reward
    config = RewardConfig(**arguments(work), center_rewards_coefficient=asked.center_rewards_coefficient, max_length=None)
    names = {"input_ids": "chosen_ids", "rejected_input_ids": "rejected_ids"}
    rows = work.rows.select_columns(list(names)).rename_columns(names)
    return _trained(work, lambda **more: _Reward(args=config, train_dataset=rows, **more))


def _sampled(config_type: Any, trainer_type: Any) -> Callable[[Work], AbstractContextManager[None]]:
    def loop(work: Work) -> AbstractContextManager[None]:
        asked = getattr(work.run.recipe, work.run.recipe.objective)
        names = ("num_generations", "num_iterations", "beta", "epsilon", "max_completion_length", "temperature")
        own = {name: getattr(asked, name) for name in names}
        config = config_type(**arguments(work), **own, reward_weights=work.weights, disable_dropout=True)
        rows, ids = prompt_rows(work.rows)
        functions = [_as_trl(name, reward) for name, reward in zip(asked.reward_funcs, work.rewards, strict=True)]

        def make(**more: Any) -> Any:
            trainer = trainer_type(args=config, train_dataset=rows, reward_funcs=functions, **more)
            trainer.prompts_ids = ids
            return trainer

        return _trained(work, make)

    return loop


def prompt_rows(rows: Any) -> tuple[Any, dict[tuple[tuple[str, str], ...], list[int]]]:
    """The prompts as messages with their references, and the ids that each is asked with."""
    prompts = [json.loads(text) for text in rows["prompt"]]
    ids = {_key(prompt): list(found) for prompt, found in zip(prompts, rows["prompt_ids"], strict=True)}
    return Dataset.from_dict({"prompt": prompts, "reference": list(rows["reference"])}), ids


def _as_trl(name: str, reward: Reward) -> Callable[..., list[float]]:
    """The reward as TRL calls it."""

    def call(prompts: Any, completions: Any, reference: Sequence[str | None], **_: Any) -> list[float]:
        answers = ["".join(turn["content"] for turn in completion) for completion in completions]
        return list(reward(prompts, answers, reference))

    call.__name__ = name.rpartition("/")[2]
    return call


def _trained(work: Work, make: Callable[..., Any]) -> AbstractContextManager[None]:
    """Run the trainer that `make` makes; then the context in which the model can be saved."""
    steps = _Steps(work.recorder)
    try:
        trainer = make(model=work.model, processing_class=work.tokenizer, callbacks=[steps])
    except ValueError as error:
        why, fix = "TRL would train something else than was asked for", "change the key that it names"
        raise TrainError(Problem("TS304", f"TRL refuses the settings: {error}", "train", why, fix)) from error
    trainer.remove_callback(PrinterCallback)
    steps.trainer, trainer.asked = trainer, work.run.recipe.train
    dtype = getattr(torch, work.method.compute_dtype)
    for name, parameter in work.model.named_parameters():
        if parameter.requires_grad and work.method.name != "full":
            # TRL puts what is trained on a 4-bit base into bfloat16; adapters stay in float32, a head in the compute dtype.
            parameter.data = parameter.data.to(torch.float32 if "lora_" in name else dtype)
    trainer.train()
    return _as_trained(trainer, work.model)


@contextmanager
def _as_trained(trainer: Any, model: Any) -> Iterator[None]:
    """In the block the weights are as they were trained, and TRL's copy of the adapter, its reference, is gone."""
    if trainer.adamw is None:
        raise AssertionError("there is nothing to save before training")
    if "ref" in getattr(model, "peft_config", {}):
        model.delete_adapter("ref")
    with trainer.adamw.unloaded():
        yield


LOOPS: dict[str, Callable[[Work], AbstractContextManager[None]]] = {
    "kto": _kto,
    "orpo": _orpo,
    "reward": _reward,
    "grpo": _sampled(GRPOConfig, _Grpo),
    "rloo": _sampled(RLOOConfig, _Rloo),
}
