"""Private hooks of transformers, PEFT and TRL that we override: they exist and are called with the expected arguments.

`make test-all` runs these against the newest versions too. The forwards that are replaced (norm, MLP, attention, last block,
adapters) are compared with the libraries' own numerically: tests/invariant/test_blocks.py, tests/unit/test_adapter.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from tunesmith.stages.train.engine import Engine
from tunesmith.stages.train.loops.trl import Watched

#: Methods of Trainer that Engine and Watched override.
HOOKS = {
    "_clip_grad_norm",
    "_get_grad_norm",
    "_get_num_items_in_batch",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_load_rng_state",
    "_load_scaler",
}


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, **shape))


class Recorded(Trainer):  # type: ignore[misc] # transformers is untyped here
    """A plain Trainer that records each hook call and its arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        super().__init__(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        assert num_items_in_batch is not None
        self.calls.append(("training_step", ()))
        return super().training_step(model, inputs, num_items_in_batch)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        made = super().create_optimizer(model) if model is not None else super().create_optimizer()
        step = made.step

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(("optimizer.step", ()))
            return step(*args, **kwargs)

        made.step = counted
        return made

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self.calls.append(("log", (logs,)))
        super().log(logs, *args, **kwargs)


def _recording(name: str) -> Any:
    def hook(self: Recorded, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((name, (*args, *kwargs.values())))
        return getattr(Trainer, name)(self, *args, **kwargs)

    return hook


for _name in HOOKS:
    setattr(Recorded, _name, _recording(_name))


class SaveAtOne(TrainerCallback):  # type: ignore[misc] # transformers is untyped here
    def on_step_end(self, _arguments: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = state.global_step == 1


def recorded(folder: Path, resume: str | None = None) -> Recorded:
    rows = [{"input_ids": [1, 2, 3, i], "labels": [1, 2, 3, i]} for i in range(4)]
    made = TrainingArguments(folder, max_steps=2, per_device_train_batch_size=2, logging_steps=1, report_to=[], use_cpu=True)
    trainer = Recorded(tiny(), made, train_dataset=rows, callbacks=[SaveAtOne()])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_list_of_hooks_is_complete() -> None:
    """A method with an underscore is a library hook or our own, and none shadows a name by accident."""
    private = {name for each in (Engine, Watched) for name in vars(each) if name.startswith("_") and not name.startswith("__")}
    methods = {name for name in private if callable(getattr(Engine, name, None) or getattr(Watched, name, None))}
    assert {name for name in methods if hasattr(Trainer, name)} == HOOKS


def test_hooks_are_called_in_the_order_that_the_engine_relies_on(tmp_path: Path) -> None:
    """Each step: count, forward and backward, clip, norm, optimizer, log with `grad_norm`."""
    trainer = recorded(tmp_path)
    ours = {"_get_num_items_in_batch", "training_step", "_clip_grad_norm", "_get_grad_norm", "optimizer.step", "log"}
    order = [name for name, args in trainer.calls if name in ours and (name != "log" or "grad_norm" in args[0])]
    step = ["_get_num_items_in_batch", "training_step", "_clip_grad_norm", "_get_grad_norm", "optimizer.step", "log"]
    assert order == [*step, *step]


def test_hooks_get_what_the_engine_takes(tmp_path: Path) -> None:
    trainer = recorded(tmp_path)
    samples, device = next(args for name, args in trainer.calls if name == "_get_num_items_in_batch")
    assert isinstance(samples, list)
    assert isinstance(samples[0], Mapping)
    assert torch.device(device) == torch.device("cpu")
    model, norm = next(args for name, args in trainer.calls if name == "_get_grad_norm")
    assert isinstance(model, torch.nn.Module)
    assert float(norm) > 0
    assert torch.is_tensor(trainer._tr_loss)  # checked for NaN and Inf before the optimizer step


def test_a_resumed_training_loads_through_the_hooks(tmp_path: Path) -> None:
    recorded(tmp_path / "first")
    path = str(tmp_path / "first" / "checkpoint-1")
    trainer = recorded(tmp_path / "second", path)
    loads = [(name, args[0]) for name, args in trainer.calls if name.startswith("_load")]
    assert loads == [
        ("_load_from_checkpoint", path),
        ("_load_optimizer_and_scheduler", path),
        ("_load_scaler", path),
        ("_load_rng_state", path),
    ]
    assert trainer.state.global_step == 2


def test_an_adapter_layer_has_what_the_fused_forward_reads() -> None:
    model = get_peft_model(tiny(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 1
    (layer,) = layers
    assert layer.active_adapters == ["default"]
    assert layer.scaling == {"default": 2.0}
    assert layer.lora_A["default"].weight.shape == (4, 16)
    assert layer.lora_B["default"].weight.shape == (16, 4)
    assert layer.get_base_layer().weight.shape == (16, 16)
    assert not layer.merged
    assert not layer.disable_adapters
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, 16)
    low = x @ layer.lora_A["default"].weight.T
    expected = layer.get_base_layer()(x) + 2.0 * low @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(layer(x), expected)


def _calls(trainer_type: type, name: str) -> bool:
    """Whether the library's own code calls the hook."""
    return any(f"self.{name}(" in inspect.getsource(each) for each in trainer_type.__mro__ if each is not object)


def test_kto_prepares_its_rows_by_the_hook() -> None:
    trl = pytest.importorskip("trl")
    names = list(inspect.signature(trl.KTOTrainer._prepare_dataset).parameters)
    assert names[:4] == ["self", "dataset", "processing_class", "args"]
    assert _calls(trl.KTOTrainer, "_prepare_dataset")


def test_orpo_tokenizes_rows_by_the_hook() -> None:
    orpo = pytest.importorskip("trl.experimental.orpo")
    assert list(inspect.signature(orpo.ORPOTrainer.tokenize_row).parameters)[:2] == ["self", "feature"]
    assert "tokenize_row" in inspect.getsource(orpo.ORPOTrainer.__init__)


@pytest.mark.parametrize("name", ["GRPOTrainer", "RLOOTrainer"])
def test_prompts_are_tokenized_by_the_hook(name: str) -> None:
    trainer = getattr(pytest.importorskip("trl"), name)
    assert list(inspect.signature(trainer._tokenize_prompts).parameters) == ["self", "prompts"]
    assert _calls(trainer, "_tokenize_prompts")
    returned = inspect.getsource(trainer._tokenize_prompts).rstrip().rsplit("return ", 1)[1]
    assert returned.count(",") == 2, f"three values were returned, now it is: {returned}"
