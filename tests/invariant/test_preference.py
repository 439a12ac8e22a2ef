"""DPO on prefix trees: equal to padded rows, to the formula, and to TRL's trainer; and invariants of its training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GraniteConfig

from tests.support.models import CONFIGS, SMALL, VOCABULARY, exact_model, ids
from tests.support.pairs import PAIRS, sides
from tests.support.training import METHODS, QUIET, metrics, weights
from tunesmith.engine.attention.backends import use_tree_attention
from tunesmith.engine.modeling import chunks
from tunesmith.engine.modeling.dpo_loss import PairCollator, PreferenceModel, label_logprobs, reference_logprobs, row_logprobs
from tunesmith.engine.packing.batch import PaddedCollator, collate_tree
from tunesmith.engine.packing.tree import Limits, filled
from tunesmith.errors import RunError, TrainError
from tunesmith.recipe import ResolvedRecipe
from tunesmith.runs import Run, create_run, read_jsonl
from tunesmith.stages.prepare import prepare
from tunesmith.stages.train import train

Pairs = list[dict[str, Any]]
MakePairs = Callable[..., ResolvedRecipe]
WHOLE = Limits()


@st.composite
def random_pairs(draw: st.DrawFn) -> Pairs:
    """Pairs grown from shared prompts; answers may share a prefix, differ in length, or one may be a prefix of the other."""
    prompts = [draw(st.lists(ids, min_size=1, max_size=14))]
    for _ in range(draw(st.integers(0, 2))):
        prompts.append(draw(st.sampled_from(prompts)) + draw(st.lists(ids, max_size=12)))
    pairs = []
    for _ in range(draw(st.integers(1, 4))):
        prompt, begun = draw(st.sampled_from(prompts)), draw(st.lists(ids, max_size=10))
        pair: dict[str, Any] = {"reference": [draw(st.floats(-30, 0)), draw(st.floats(-30, 0))]}
        for prefix in ("", "rejected_"):
            answer = begun + draw(st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=12))
            pair[f"{prefix}input_ids"] = prompt + answer
            pair[f"{prefix}loss_mask"] = [False] * len(prompt) + [True] * len(answer)
        pairs.append(pair)
    return pairs


def loss_and_gradients(model: Any, batch: dict[str, Any], *, tree: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    use_tree_attention(model, on=tree)
    model.zero_grad()
    made = PreferenceModel(model, 0.3, 0.1)(**batch)
    made.loss.backward()
    return [value.item() for value in made], {name: p.grad.clone() for name, p in model.named_parameters()}


def plain_loss(model: Any, pairs: Pairs) -> torch.Tensor:
    """The same loss by the paper's formula, row by row, over whole logits."""
    use_tree_attention(model, on=False)
    sums = []
    for row in sides(pairs):
        tokens, trained = torch.tensor([row["input_ids"]]), torch.tensor(row["loss_mask"])[1:]
        logprobs = model(input_ids=tokens).logits.log_softmax(-1)[0, :-1].gather(-1, tokens[0, 1:, None])[:, 0]
        sums.append(logprobs[trained].sum())
    total = torch.zeros((), dtype=sums[0].dtype)
    for number, pair in enumerate(pairs):
        chosen = sums[number] - pair["reference"][0]
        rejected = sums[number + len(pairs)] - pair["reference"][1]
        odds = torch.sigmoid(0.3 * (chosen - rejected))
        total = total - 0.9 * odds.log() - 0.1 * (1 - odds).log()
    return total


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=20, deadline=None)
@given(pairs=random_pairs())
def test_tree_equals_padded_rows_to_1e_10(name: str, pairs: Pairs) -> None:
    assume(all(pair["input_ids"] != pair["rejected_input_ids"] for pair in pairs))  # rounding decides which of two equals wins
    model = exact_model(name)
    packed = PairCollator(collate_tree, WHOLE).collate(pairs)
    padded = PairCollator(PaddedCollator(pad_id=0), WHOLE).collate(pairs)
    expected_loss, expected = loss_and_gradients(model, padded, tree=False)
    found_loss, found = loss_and_gradients(model, packed, tree=True)
    assert found_loss == pytest.approx(expected_loss, rel=1e-10, abs=1e-10)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-10, atol=1e-10, msg=parameter)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("name", [*CONFIGS, "granite"])
def test_equal_to_the_formula_over_whole_logits(name: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and every gradient, the head's too, with labels in one chunk and in many; Granite scales its own logits."""
    if chunk is not None:
        monkeypatch.setattr("tunesmith.engine.modeling.dpo_loss.chunk_rows", lambda _: chunk)
        monkeypatch.setattr("tunesmith.engine.modeling.loss.chunk_rows", lambda _: chunk)
    torch.manual_seed(0)
    granite = AutoModelForCausalLM.from_config(GraniteConfig(**SMALL, logits_scaling=4.0)).double()
    model = granite if name == "granite" else exact_model(name)
    pairs = random_pair_list(5)
    collate: Any = PaddedCollator(pad_id=0) if name == "granite" else collate_tree
    (loss, right, margin), found = loss_and_gradients(
        model, PairCollator(collate, WHOLE).collate(pairs), tree=name != "granite"
    )
    assert 0 <= right <= 5
    assert math.isfinite(margin)
    model.zero_grad()
    expected = plain_loss(model, pairs)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-9)
    for parameter, value in model.named_parameters():
        torch.testing.assert_close(found[parameter], value.grad, rtol=1e-8, atol=1e-9, msg=parameter)


def random_pair_list(count: int) -> Pairs:
    generator = torch.Generator().manual_seed(3)

    def draw(length: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()

    prompt, pairs = draw(12), []
    for number in range(count):
        asked = prompt + draw(10 + number)
        answers = [draw(3 + number), draw(9)]
        pair: dict[str, Any] = {"reference": [-20.0 - number, -21.0]}
        for prefix, answer in zip(("", "rejected_"), answers, strict=True):
            pair[f"{prefix}input_ids"] = asked + answer
            pair[f"{prefix}loss_mask"] = [False] * len(asked) + [True] * len(answer)
            pair[f"{prefix}length"] = len(asked + answer)
        pairs.append(pair)
    return pairs


def test_soft_caps_and_biases_have_exact_gradients() -> None:
    """The log-probabilities' custom backward pass against finite differences: cap, bias, head, hidden states."""
    from tunesmith.engine.modeling.dpo_loss import _LabelLogProbs

    torch.manual_seed(0)
    hidden, head = torch.randn(7, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    bias, targets = torch.randn(11, dtype=torch.float64), torch.randint(0, 11, (7,))
    inputs = [each.requires_grad_() for each in (hidden, head, bias)]
    assert torch.autograd.gradcheck(lambda h, w, b: _LabelLogProbs.apply(h, w, b, targets, 2.0), inputs)
    assert torch.autograd.gradcheck(lambda h, w: _LabelLogProbs.apply(h, w, None, targets, None), inputs[:2])


def test_no_tensor_of_places_by_vocabulary_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 0)  # 64 positions per chunk
    monkeypatch.setattr("tunesmith.engine.modeling.dpo_loss.chunk_rows", chunks.chunk_rows)
    model = exact_model("llama").float()
    batch = PairCollator(PaddedCollator(pad_id=0), WHOLE).collate(random_pair_list(20))
    assert len(batch["targets"]) > 200
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        use_tree_attention(model, on=False)
        label_logprobs(model, batch)
    assert (len(batch["targets"]), SMALL["hidden_size"]) in kept
    assert not [shape for shape in kept if len(shape) > 1 and shape[-1] == VOCABULARY]


@given(pairs=random_pairs(), tokens=st.integers(1, 120), most=st.integers(1, 4))
def test_both_sides_of_a_pair_come_in_one_micro_batch(pairs: Pairs, tokens: int, most: int) -> None:
    for collate in (collate_tree, PaddedCollator(pad_id=0)):
        collator = PairCollator(collate, Limits(tokens, most))
        groups = collator.split(pairs)
        assert sorted(index for group in groups for index in group) == list(range(len(pairs)))
        batches = collator(pairs)["micro_batches"]
        assert [batch["reference"].shape[1] for batch in batches] == [len(group) for group in groups]
        for group, batch in zip(groups, batches, strict=True):
            assert len(group) == 1 or (len(group) <= most and batch["input_ids"].numel() <= tokens)
            mine = [pairs[index] for index in group]
            assert batch["row_tokens"] == sum(len(row["input_ids"]) for row in sides(mine))
            labels = [sum(row["loss_mask"][1:]) for row in sides(mine)]
            assert torch.bincount(batch["owner_rows"], minlength=len(labels)).tolist() == labels
            counts = torch.bincount(batch["owner_labels"], minlength=len(batch["weights"]))
            assert batch["weights"].tolist() == counts.tolist()


def test_a_prompt_is_computed_once_for_both_sides() -> None:
    """A system prompt of 10 for all, questions of 9, answers of 3 and 4, whose last token is only a target."""
    pairs = []
    for number in range(5):
        prompt = [*range(10), *range(100 * number + 20, 100 * number + 29)]
        chosen, rejected = [11, 12, 13], [14, 15, 16, 17]
        flags = {"loss_mask": [False] * 19 + [True] * 3, "rejected_loss_mask": [False] * 19 + [True] * 4}
        pairs.append({"input_ids": prompt + chosen, "rejected_input_ids": prompt + rejected, **flags})
    assert PairCollator(collate_tree, WHOLE).collate(pairs)["input_ids"].numel() == filled(10 + 5 * (9 + 2 + 3))


@pytest.mark.parametrize("padded", [False, True])
def test_reference_is_each_rows_own_whatever_the_order(padded: bool) -> None:
    model = exact_model("llama")
    use_tree_attention(model, on=not padded)
    pairs = random_pair_list(12)
    for pair in pairs:
        del pair["reference"]
    collator = PairCollator(PaddedCollator(pad_id=0) if padded else collate_tree, Limits(90))
    assert len(collator.split(pairs)) > 2
    found = reference_logprobs(model, Dataset.from_list(pairs), collator)
    apart = [row_logprobs(model, collator.collate([pair]), 1)[:, 0].tolist() for pair in pairs]
    assert found.tolist() == [pytest.approx(one, rel=1e-10) for one in apart]


# --- training ---


@pytest.fixture
def make_pairs(tmp_path: Path, write_rows: Any, make_recipe: Any) -> MakePairs:
    """A small recipe over 40 pairs on the tiny model."""

    def make(**overrides: Any) -> ResolvedRecipe:
        path = write_rows(PAIRS, "pairs.jsonl")
        made: ResolvedRecipe = make_recipe(objective="dpo", data__train=str(path), **overrides)
        return made

    return make


def trained(make_pairs: MakePairs, path: Path, **overrides: Any) -> Run:
    run = create_run(make_pairs(**overrides), path)
    prepare(run)
    train(run, QUIET)
    return run


NAMES = ("loss", "grad_norm", "reward_accuracy", "reward_margin")
COMMON = {"train__compute_dtype": "float32", "train__learning_rate": 1e-3, "train__warmup_ratio": 0.0}


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_bits(make_pairs: MakePairs, tmp_path: Path, method: str) -> None:
    one, two = (trained(make_pairs, tmp_path / name, method=method) for name in ("one", "two"))
    assert metrics(one, *NAMES) == metrics(two, *NAMES)
    first, second = weights(one), weights(two)
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = trained(make_pairs, tmp_path / "three", method=method, seed=43)
    assert metrics(one, "grad_norm") != metrics(other, "grad_norm")


def test_eight_pairs_at_once_equal_four_times_two(make_pairs: MakePairs, tmp_path: Path) -> None:
    common = COMMON | {"method": "lora", "train__effective_batch_size": 36, "train__max_steps": 4}
    whole = trained(make_pairs, tmp_path / "whole", train__per_device_train_batch_size=36, **common)
    parts = trained(make_pairs, tmp_path / "parts", train__per_device_train_batch_size=4, **common)
    for one, two in zip(metrics(whole, *NAMES), metrics(parts, *NAMES), strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-6)
    assert metrics(whole, "tokens", "labelled_tokens") == metrics(parts, "tokens", "labelled_tokens")


@pytest.mark.parametrize("method", METHODS)
def test_tree_trains_as_padded_rows_do(make_pairs: MakePairs, tmp_path: Path, method: str) -> None:
    common = COMMON | {"method": method, "train__max_steps": 4, "train__effective_batch_size": 12}
    tree = trained(make_pairs, tmp_path / "tree", **common)
    padded = trained(make_pairs, tmp_path / "padded", train__packing=False, **common)
    for one, two in zip(metrics(tree, "loss", "grad_norm"), metrics(padded, "loss", "grad_norm"), strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    assert metrics(tree, "tokens", "labelled_tokens") == metrics(padded, "tokens", "labelled_tokens")
    computed = [sum(count for (count,) in metrics(run, "computed_tokens")) for run in (tree, padded)]
    assert computed[0] < 0.7 * computed[1]


@pytest.mark.parametrize("method", METHODS)
def test_margin_grows_and_starts_at_nothing(make_pairs: MakePairs, tmp_path: Path, method: str) -> None:
    """The first loss is log 2, since the model is its own reference; then the chosen answers win."""
    rate = 2e-3 if method == "full" else 2e-2
    more = COMMON | {"train__learning_rate": rate, "train__max_steps": 20, "train__effective_batch_size": 12}
    run = trained(make_pairs, tmp_path / "run", method=method, **more)
    lines = read_jsonl(run.path / "train" / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert lines[0]["reward_margin"] == pytest.approx(0, abs=1e-3)
    assert lines[-1]["reward_margin"] > 0.3
    assert lines[-1]["reward_accuracy"] > 0.9
    assert lines[-1]["loss"] < 0.6
    assert set(lines[0]) - {"reward_accuracy", "reward_margin"} == {
        "step",
        "loss",
        "grad_norm",
        "learning_rate",
        "tokens",
        "computed_tokens",
        "labelled_tokens",
        "seconds",
    }


def test_beta_and_smoothing_are_used(make_pairs: MakePairs, tmp_path: Path) -> None:
    common = COMMON | {"method": "lora", "train__learning_rate": 2e-2}
    plain = trained(make_pairs, tmp_path / "plain", **common)
    hard = trained(make_pairs, tmp_path / "hard", dpo__beta=1.0, **common)
    smooth = trained(make_pairs, tmp_path / "smooth", dpo__label_smoothing=0.4, **common)
    first = [metrics(run, "grad_norm")[0][0] for run in (plain, hard, smooth)]
    # At zero margin the gradient is beta (1 - 2 e) / 2.
    assert first[1] == pytest.approx(10 * first[0], rel=1e-3)
    assert first[2] == pytest.approx(0.2 * first[0], rel=1e-3)


def test_reference_is_stored_and_is_of_the_untrained_model(make_pairs: MakePairs, tmp_path: Path) -> None:
    run = trained(make_pairs, tmp_path / "run", method="full", **COMMON)
    stored = load_file(run.path / "train" / "reference.safetensors")
    rows = list(Dataset.from_file(str(run.path / "data" / "train.arrow")))
    model = AutoModelForCausalLM.from_pretrained(run.recipe.model, dtype=torch.float32)
    batch = PairCollator(PaddedCollator(pad_id=0), WHOLE).collate(rows)
    with torch.no_grad():
        expected = row_logprobs(model, batch, len(rows))
    torch.testing.assert_close(stored["chosen"], expected[0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(stored["rejected"], expected[1], rtol=1e-4, atol=1e-3)
    summary = json.loads((run.path / "train" / "summary.json").read_text(encoding="utf-8"))
    assert 0 < summary["seconds_before_first_step"] < summary["seconds"]


def test_reference_that_is_not_finite_stops_before_training(make_pairs: MakePairs, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import save_file

    poisoned = tmp_path / "poisoned"
    shutil.copytree(make_pairs().recipe.model, poisoned)
    tensors = load_file(poisoned / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, poisoned / "model.safetensors", metadata={"format": "pt"})
    run = create_run(make_pairs(method="lora", model=str(poisoned)), tmp_path / "run")
    prepare(run)
    with pytest.raises(TrainError, match="untrained model") as caught:
        train(run, QUIET)
    assert "pairs.jsonl:" in caught.value.problems[0].where
    assert not (run.path / "train" / "metrics.jsonl").exists()


@pytest.mark.parametrize("prepared", ["sft", "dpo"])
def test_rows_prepared_for_another_objective_are_refused(
    make_pairs: MakePairs, make_recipe: Any, tmp_path: Path, prepared: str
) -> None:
    recipes = {"sft": make_recipe, "dpo": make_pairs}
    other = "dpo" if prepared == "sft" else "sft"
    prepare(create_run(recipes[prepared](), tmp_path / "run"))
    with pytest.raises(RunError, match=r"TS012.*recipe has changed since 'prepare'"):
        train(create_run(recipes[other](), tmp_path / "run"), QUIET)


def test_bf16_and_update_in_backward_learn(make_pairs: MakePairs, tmp_path: Path) -> None:
    more = {"train__optimizer_in_backward": True, "train__compute_dtype": "bfloat16", "train__learning_rate": 2e-3}
    run = trained(make_pairs, tmp_path / "run", method="full", train__max_steps=20, train__max_grad_norm=100.0, **more)
    assert metrics(run, "reward_margin")[-1][0] > 0.3


# --- compared with TRL ---


@pytest.mark.parametrize("method", ["full", "lora"])
def test_losses_are_those_of_trls_trainer(make_pairs: MakePairs, tmp_path: Path, method: str) -> None:
    """Five steps of both from the same start over the same 8 pairs in float32: losses and margins to 1e-5."""
    pytest.importorskip("trl")
    rate = 1e-4 if method == "full" else 1e-3
    more = {"data__max_rows": 9, "train__effective_batch_size": 8, "train__max_steps": 5, "train__learning_rate": rate}
    run = trained(make_pairs, tmp_path / "run", method=method, **(COMMON | more), train__lr_scheduler_type="constant")
    history = trl_history(run, tmp_path, rate)
    ours = read_jsonl(run.path / "train" / "metrics.jsonl")
    assert len(history) == len(ours) == 5
    for mine, theirs in zip(ours, history, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert mine["reward_margin"] == pytest.approx(theirs["rewards/margins"], abs=2e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert ours[-1]["loss"] < ours[0]["loss"] - 1e-3


def trl_history(run: Run, tmp_path: Path, rate: float) -> list[dict[str, float]]:
    """The log of TRL's DPOTrainer over the run's rows, all of them in one batch per step."""
    from trl import DPOConfig, DPOTrainer

    from tunesmith.models.load import load_tokenizer

    class Prepared(DPOTrainer):  # the rows are token ids already
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        names = {"prompt_ids": row["input_ids"][: row["loss_mask"].index(True)]}
        for name, prefix in (("chosen_ids", ""), ("rejected_ids", "rejected_")):
            flags = zip(row[f"{prefix}input_ids"], row[f"{prefix}loss_mask"], strict=True)
            names[name] = [token for token, flag in flags if flag]  # without the text that the template adds after the turn
        return names

    rows = [cut(row) for row in Dataset.from_file(str(run.path / "data" / "train.arrow"))]
    model = trl_model(run)
    config = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=len(rows),
        max_steps=5,
        learning_rate=rate,
        lr_scheduler_type="constant",
        logging_steps=1,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    tokenizer = load_tokenizer(Path(run.recipe.model))
    trainer = Prepared(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def trl_model(run: Run) -> Any:
    """The model from which our run started: the adapter is initialised from the same seed."""
    from tunesmith.methods import make_method

    model = AutoModelForCausalLM.from_pretrained(run.recipe.model, dtype=torch.float32)
    if run.recipe.method == "full":
        return model
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    settings_of = json.loads((run.path / "train" / "settings.json").read_text(encoding="utf-8"))
    chosen = {name: settings_of[name] for name in ("compute_dtype", "r", "lora_alpha")}
    start = make_method(run.recipe, Path(run.recipe.model), **chosen).build()
    config = LoraConfig(task_type="CAUSAL_LM", r=chosen["r"], lora_alpha=chosen["lora_alpha"], target_modules="all-linear")
    made = get_peft_model(model, config)
    state = {name: value for name, value in start.state_dict().items() if "lora_" in name}
    set_peft_model_state_dict(made, {name.replace(".default", ""): value for name, value in state.items()})
    return made
