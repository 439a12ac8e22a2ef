"""Scores, losses and comparisons against independent references: scikit-learn, SciPy, plain PyTorch, all resamples, by hand."""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from rich.console import Console
from scipy import stats
from sklearn.metrics import f1_score
from transformers import LlamaConfig, LlamaForCausalLM

from tests.conftest import chat_row, random_llama
from tests.support.tokenizers import small_tokenizer
from tunesmith.chat.fields import canonical
from tunesmith.engine.attention.backends import use_tree_attention
from tunesmith.engine.modeling.loss import LossModel
from tunesmith.engine.packing.batch import PaddedCollator, StepCollator, choose_collator
from tunesmith.engine.packing.tree import Limits
from tunesmith.errors import RunError
from tunesmith.evaluation.metrics import (
    Answer,
    macro_f1,
    schema_validator,
    score_json,
    score_text,
    summarise_json,
)
from tunesmith.models.load import model_digest
from tunesmith.recipe import parse_recipe
from tunesmith.runs import Run, create_run, eval_folder, read_jsonl
from tunesmith.stages.compare import compare
from tunesmith.stages.compare.stage import bootstrap_ratio
from tunesmith.stages.compare.text import cells, verdict
from tunesmith.stages.evaluate import evaluate
from tunesmith.stages.evaluate.documents import score_documents
from tunesmith.stages.evaluate.mmlu import LETTERS, Question, Subject, prompts, score_mmlu
from tunesmith.stages.evaluate.stage import heldout_loss
from tunesmith.stages.prepare import prepare
from tunesmith.stages.train.evaluation import mean_loss
from tunesmith.stages.train.losses import TokenLoss

Row = dict[str, Any]
QUIET = Console(quiet=True)
VOCABULARY = 211  # of the smallest model

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string"}, "b": {"type": ["integer", "null"]}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The sums are small here: synchronising with a second thread takes longer than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("reference", "answer", "score"),
    [
        ("Paris", "Paris", 1.0),
        ("Paris", " Paris\n\n", 1.0),
        (" Paris\t", "Paris", 1.0),
        ("Paris", "", 0.0),
        ("Paris", "  \n", 0.0),
        ("Paris", "paris", 0.0),
        ("Paris", "Paris.", 0.0),
        ("Paris", "Paris is it", 0.0),
        ("Paris is it", "Paris", 0.0),
        ("a b", "a  b", 0.0),  # inner blanks count as text
        ("", "", 1.0),
        ("", "Paris", 0.0),
        (" \n", "", 1.0),
    ],
)
def test_score_of_a_text(reference: str, answer: str, score: float) -> None:
    assert score_text(Answer("f:1", reference, answer)) == {"score": score}


@pytest.mark.parametrize(
    ("answer", "parsed", "valid", "a", "b"),
    [
        ('{"a": "x", "b": 3}', True, True, True, True),
        (' \n{"b": 3, "a": "x"} ', True, True, True, True),
        ('{"a": "x"}', True, True, True, False),  # a missing field
        ('{"b": 3}', True, False, False, True),
        ('{"a": "x", "b": 3, "c": 1}', True, False, True, True),  # an extra field: the schema rejects it, the score ignores it
        ('{"a": "y", "b": null}', True, True, False, False),
        ('{"a": null, "b": 3}', True, False, False, True),
        ('{"a": "x ", "b": "3"}', True, False, False, False),
        ('{"A": "x", "B": 3}', True, False, False, False),
        ('{"a": ["x"], "b": {"b": 3}}', True, False, False, False),
        ("{}", True, False, False, False),
        ("[]", True, False, False, False),
        ("null", True, False, False, False),
        ('[{"a": "x", "b": 3}]', True, False, False, False),
        ('"{}"', True, False, False, False),
        ("", False, False, False, False),
        ("{", False, False, False, False),
        ("{'a': 'x', 'b': 3}", False, False, False, False),
        ('{"a": "x", "b": 3} and more', False, False, False, False),
        ('```json\n{"a": "x", "b": 3}\n```', False, False, False, False),
    ],
)
def test_score_of_a_json_answer(answer: str, parsed: bool, valid: bool, a: bool, b: bool) -> None:
    row = score_json(Answer("f:1", '{"a": "x", "b": 3}', answer), schema_validator(SCHEMA, "s"))
    assert (row["parsed"], row["valid"], row["fields"]) == (parsed, valid, {"a": a, "b": b})
    assert row["score"] == (a + b) / 2
    assert not score_json(Answer("f:1", '{"a": "x", "b": 3}', answer), None)["valid"]


@pytest.mark.parametrize(("wanted", "told"), [("1", "true"), ("false", "0"), ("[1]", "[true]"), ('{"x": 0}', '{"x": false}')])
def test_a_number_is_no_boolean(wanted: str, told: str) -> None:
    assert score_json(Answer("f:1", f'{{"a": {wanted}}}', f'{{"a": {told}}}'), None)["score"] == 0.0


@pytest.mark.parametrize(("answer", "score"), [("{}", 0), ("", 0), ("null", 0), ('{"b": 1}', 0.5), ('{"a": null, "b": 1}', 1)])
def test_an_absent_field_is_not_null(answer: str, score: float) -> None:
    assert score_json(Answer("f:1", '{"a": null, "b": 1}', answer), None)["score"] == score


def test_what_is_nested_without_end_equals_nothing() -> None:
    deep = "[" * 900 + "]" * 900
    assert score_json(Answer("f:1", '{"a": [], "b": 1}', f'{{"a": {deep}, "b": 1}}'), None)["score"] == 0.5
    value: Any = []
    for _ in range(200_000):
        value = [value]
    assert canonical(value) != canonical([value])


@pytest.mark.parametrize(("wanted", "told"), [("1", "1.0"), ('{"x": 1, "y": 2}', '{"y": 2, "x": 1}')])
def test_an_answer_that_scores_is_of_the_right_class(wanted: str, told: str) -> None:
    row = score_json(Answer("f:1", f'{{"a": {wanted}}}', f'{{"a": {told}}}'), None)
    assert row["score"] == macro_f1([row], "a") == 1.0


def mean_f1(pairs: Sequence[tuple[str, str | None]]) -> float:
    """The mean over the references' classes of 2 TP / (2 TP + FP + FN), with equal weights."""
    found = []
    for name in {truth for truth, _ in pairs}:
        right = sum(truth == guess == name for truth, guess in pairs)
        wrong = sum((truth == name) != (guess == name) for truth, guess in pairs)
        found.append(2 * right / (2 * right + wrong))
    return sum(found) / len(found)


def test_macro_f1_is_that_of_scikit_learn() -> None:
    """Random labels, some only in the references, some only in the answers, some answers without the field."""
    draw, plain = random.Random(1), 0
    for _ in range(80):
        truths = draw.sample("abcdef", k=draw.randint(1, 5))
        guesses: list[str | None] = [*draw.sample("abcdefgh", k=draw.randint(1, 6)), *draw.choice([[], [None]])]
        pairs: list[tuple[str, str | None]] = []
        for _ in range(draw.randint(1, 25)):
            truth = draw.choice(truths)
            pairs.append((truth, truth if draw.random() < 0.4 else draw.choice(guesses)))
        rows = [
            score_json(
                Answer("f:1", json.dumps({"k": truth, "n": 1}), "no" if guess is None else json.dumps({"k": guess})), None
            )
            for truth, guess in pairs
        ]
        wanted, told = [truth for truth, _ in pairs], [guess or "none" for _, guess in pairs]
        found = macro_f1(rows, "k")
        assert found == pytest.approx(mean_f1(pairs))
        assert found == pytest.approx(f1_score(wanted, told, average="macro", labels=sorted(set(wanted)), zero_division=0))
        if set(told) <= set(wanted):
            plain += 1
            assert found == pytest.approx(f1_score(wanted, told, average="macro"))
        assert summarise_json(rows, "k", has_schema=False)["macro_f1"] == found
    assert plain >= 5


def test_rates_of_a_set_by_brute_force() -> None:
    """Each field over the rows whose reference has it; the score over rows, independent of the number of fields."""
    draw, validator = random.Random(2), schema_validator(SCHEMA, "s")
    for _ in range(40):
        rows: list[tuple[Row, Row | None]] = []
        for _ in range(draw.randint(1, 12)):
            wanted = {name: draw.choice(["x", "y", 1, None, [1, "x"]]) for name in draw.sample("abcd", k=draw.randint(1, 4))}
            told = {name: draw.choice([value, "x", 1]) for name, value in wanted.items() if draw.random() < 0.7}
            told |= {"z": 1} if draw.random() < 0.3 else {}
            rows.append((wanted, None if draw.random() < 0.2 else told))
        scores = [
            score_json(Answer("f", json.dumps(wanted), "nothing" if told is None else json.dumps(told)), validator)
            for wanted, told in rows
        ]
        hits = [[(told or {}).get(name, "absent") == value for name, value in wanted.items()] for wanted, told in rows]
        summary = summarise_json(scores, None, has_schema=True)
        assert summary["task_score"] == pytest.approx(np.mean([np.mean(each) for each in hits]))
        assert summary["json_parse_rate"] == pytest.approx(np.mean([told is not None for _, told in rows]))
        valid = [
            told is not None
            and set(told) <= {"a", "b"}
            and isinstance(told.get("a"), str)
            and (told.get("b") is None or isinstance(told["b"], int))
            for _, told in rows
        ]
        assert summary["schema_valid_rate"] == pytest.approx(np.mean(valid))
        names = {name for wanted, _ in rows for name in wanted}
        expected = {
            name: np.mean([(told or {}).get(name, "absent") == wanted[name] for wanted, told in rows if name in wanted])
            for name in names
        }
        assert summary["field_accuracy"] == pytest.approx(expected)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return small_tokenizer()


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 1024}
    return random_llama(tmp_path_factory.mktemp("models") / "random", tokenizer, **sizes)


@pytest.fixture(scope="module")
def model(random_model: Path) -> Any:
    """The same model in float32, loaded with plain transformers."""
    return LlamaForCausalLM.from_pretrained(random_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def small() -> Any:
    """A random model with 211 tokens, so many rows run fast."""
    torch.manual_seed(1)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    made = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.3, attn_implementation="sdpa", **sizes, **heads)
    )
    return made.eval()


@torch.no_grad()
def told_one_by_one(model: Any, ids: Sequence[int], places: Sequence[int]) -> list[tuple[float, bool]]:
    """For each position its token's loss and whether it was the first choice, predicted from only the tokens before it.

    No row attends to another, and no token to a later one: the input contains none.
    """
    found = []
    for place in places:
        logits = model(input_ids=torch.tensor([list(ids[:place])]), logits_to_keep=1).logits[0, -1].double()
        found.append((float(logits.logsumexp(-1) - logits[ids[place]]), int(logits.argmax()) == ids[place]))
    return found


@torch.no_grad()
def told_at_once(model: Any, row: Row) -> list[float]:
    """The losses of a row's labelled tokens from the model's own forward on the row alone."""
    places = [i for i, flag in enumerate(row["loss_mask"]) if flag]
    ids = torch.tensor(row["input_ids"])
    logits = model(input_ids=ids[None], logits_to_keep=torch.tensor(places) - 1).logits[0]
    losses: list[float] = torch.nn.functional.cross_entropy(logits.double(), ids[places], reduction="none").tolist()
    return losses


Held = Callable[..., tuple[Run, list[Row]]]


@pytest.fixture
def held(tmp_path: Path, random_model: Path) -> Held:
    """A prepared run and its held-out rows."""

    def make(rows: Sequence[Row], share: float, more: str = "") -> tuple[Run, list[Row]]:
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data = f"data: {{train: train.jsonl, heldout: {share}, duplicates: {{threshold: null}}}}"
        run = create_run(parse_recipe(f"model: {random_model}\n{data}\n{more}\n", "recipe.yaml", tmp_path), tmp_path / "run")
        prepare(run)
        return run, list(Dataset.from_file(str(run.path / "data" / "heldout.arrow")))

    return make


def text_of(draw: random.Random, low: int, high: int) -> str:
    return " ".join(draw.choices(("amber", "birch", "cobalt", "dune", "ember", "fjord", "grove"), k=draw.randint(low, high)))


def test_held_out_loss_token_by_token(held: Held, model: Any, tokenizer: Any) -> None:
    """Long answers count more than short ones: the mean is over tokens. Some rows share a prefix, and some a whole prompt."""
    draw = random.Random(3)
    rows = [chat_row(f"{text_of(draw, 1, 3)} {i // 2}", text_of(draw, 1, 7), "") for i in range(10)]
    run, heldout = held(rows, 0.5)
    assert len(heldout) == 5
    losses = []
    for row in heldout:
        places = [i for i, flag in enumerate(row["loss_mask"]) if flag]
        losses.append([loss for loss, _ in told_one_by_one(model, row["input_ids"], places)])
    expected = sum(map(sum, losses)) / sum(map(len, losses))
    assert expected != pytest.approx(np.mean([np.mean(each) for each in losses]), rel=1e-5)
    assert heldout_loss(run, model, tokenizer) == pytest.approx(expected, rel=1e-6)


def test_held_out_loss_of_many_rows_and_in_training(tmp_path: Path, small: Any, tokenizer: Any) -> None:
    """More rows than are packed together, as a tree and padded, in evaluation and during training."""
    draw, stems = random.Random(4), [[draw_id(random.Random(i)) for _ in range(12)] for i in range(9)]
    rows: list[Row] = []
    for i in range(150):
        begin = stems[i % 9][: draw.randint(1, 12)]
        answer = [draw_id(draw) for _ in range(draw.randint(1, 1 + i % 20))]
        ids, trained = [*begin, *answer, 0], [*[False] * len(begin), *[True] * len(answer), False]
        rows.append({"where": f"t:{i}", "input_ids": ids, "loss_mask": trained, "length": len(ids)})
    run = Run(tmp_path, parse_recipe("model: m\ndata: {train: t}\n", "recipe.yaml", tmp_path).recipe)
    (tmp_path / "data").mkdir()
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(tmp_path / "data" / "heldout.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    losses = [loss for row in rows for loss in told_at_once(small, row)]
    expected = sum(losses) / len(losses)
    assert heldout_loss(run, small, tokenizer) == pytest.approx(expected, rel=1e-5)
    tree, reason = choose_collator(small.config, tokenizer.pad_token_id, max(row["length"] for row in rows))
    assert reason is None
    for collate in (tree, PaddedCollator(0)):
        use_tree_attention(small, on=collate is tree)
        watched = mean_loss(TokenLoss(), LossModel(small), rows, StepCollator(collate, Limits(256)))
        assert watched == pytest.approx(expected, rel=1e-5)
    use_tree_attention(small, on=False)
    small.eval()


def draw_id(draw: random.Random) -> int:
    return draw.randrange(1, VOCABULARY)


@pytest.mark.parametrize("objective", ["kto", "dpo", "grpo"])
def test_held_out_loss_is_over_answers_to_learn(held: Held, model: Any, tokenizer: Any, objective: str) -> None:
    """Desirable answers, chosen answers, references; nothing else, and None if there are none."""
    draw = random.Random(5)
    asked = [text_of(draw, 2, 6) + f" {i}" for i in range(12)]
    kinds: dict[str, list[Row]] = {
        "kto": [{"prompt": q, "completion": text_of(draw, 1, 9), "label": i % 3 > 0} for i, q in enumerate(asked)],
        "dpo": [{"prompt": q, "chosen": text_of(draw, 1, 9), "rejected": f"{text_of(draw, 1, 9)} {q}"} for q in asked],
        "grpo": [{"prompt": q, **({"answer": text_of(draw, 1, 9)} if i % 3 else {})} for i, q in enumerate(asked)],
    }
    rows = kinds[objective]
    more = f"objective: {objective}" + ("\ngrpo: {reward_funcs: ['length:1-9']}" if objective == "grpo" else "")
    run, heldout = held(rows, 0.6, more)
    losses = []
    for row in heldout:
        source = rows[int(row["where"].rpartition(":")[2]) - 1]
        answer = source.get("chosen") or (source.get("completion") if source.get("label") else source.get("answer"))
        if answer is not None:
            turns = chat_row(source["prompt"], answer)["messages"][1:]
            ids = tokenizer.apply_chat_template(turns, return_dict=False)
            start = len(tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False))
            losses += told_at_once(model, {"input_ids": ids, "loss_mask": [start <= i < len(ids) - 1 for i in range(len(ids))]})
    assert len(heldout) == 7
    assert heldout_loss(run, model, tokenizer) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_without_held_out_rows_there_is_no_held_out_loss(held: Held, model: Any, tokenizer: Any) -> None:
    run, heldout = held([chat_row(f"question {i}", f"answer {i}") for i in range(3)], 0.0)
    assert (heldout, heldout_loss(run, model, tokenizer)) == ([], None)


def test_perplexity_token_by_token(small: Any) -> None:
    """Perplexity is exp of the mean loss over all tokens, not of a mean over documents; the score is a mean over documents.

    Tokens that the model would have chosen are inserted, so the score is not 0.
    """
    draw, rows = random.Random(6), list[Row]()
    for number, length in enumerate((2, 5, 9, 30)):
        ids = [draw_id(draw) for _ in range(length)]
        for place in range(1, length):
            if draw.random() < 0.5:
                with torch.no_grad():
                    ids[place] = int(small(input_ids=torch.tensor([ids[:place]])).logits[0, -1].argmax())
        trained = [False] + [True] * (length - 1)
        rows.append({"where": f"d.txt:{number}", "input_ids": ids, "loss_mask": trained, "length": length})
    told = [told_one_by_one(small, row["input_ids"], range(1, row["length"])) for row in rows]
    results, samples = score_documents(small, rows)
    losses = [loss for each in told for loss, _ in each]
    assert results["told_tokens"] == len(losses) == 42
    assert results["test_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert results["perplexity"] == pytest.approx(math.prod(math.exp(loss / 42) for loss in losses), rel=1e-5)
    shares = [np.mean([right for _, right in each]) for each in told]
    assert 0 < np.mean(shares) < 1
    assert results["task_score"] == pytest.approx(np.mean(shares))
    assert [sample["score"] for sample in samples] == pytest.approx(shares)
    assert [sample["loss"] for sample in samples] == pytest.approx(
        [np.mean([loss for loss, _ in each]) for each in told], rel=1e-6
    )
    assert [(sample["where"], sample["tokens"]) for sample in samples] == [(row["where"], row["length"] - 1) for row in rows]


def test_mmlu_by_the_model_s_own_forward(model: Any, tokenizer: Any) -> None:
    """Likelihoods, choices, accuracies and standard errors, per subject and over all questions."""
    draw = random.Random(7)

    def question() -> Question:
        return Question(f"{text_of(draw, 2, 9)}?", tuple(text_of(draw, 1, 3) for _ in LETTERS), draw.randrange(4))

    subjects = [
        Subject(name, (question(),), tuple(question() for _ in range(count)))
        for name, count in (("a_b", 7), ("c", 4), ("d", 1))
    ]
    summary, samples = score_mmlu(model, tokenizer, subjects)
    right: dict[str, list[bool]] = {subject.name: [] for subject in subjects}
    left = iter(samples)
    for subject in subjects:
        for number, (prompt, asked) in enumerate(zip(prompts(subject), subject.questions, strict=True)):
            told = []
            for letter in LETTERS:
                ids, begin = tokenizer(f"{prompt} {letter}")["input_ids"], len(tokenizer(prompt)["input_ids"])
                told.append(-sum(loss for loss, _ in told_one_by_one(model, ids, range(begin, len(ids)))))
            sample = next(left)
            assert sample["log_likelihoods"] == pytest.approx(told, rel=1e-5)
            assert (sample["subject"], sample["question"]) == (subject.name, number)
            assert (sample["chosen"], sample["answer"]) == (LETTERS[int(np.argmax(told))], LETTERS[asked.answer])
            right[subject.name].append(int(np.argmax(told)) == asked.answer)
    everything = [each for found in right.values() for each in found]
    assert 0 < np.mean(everything) < 1
    for facts, found in ((summary, everything), *((summary["subjects"][name], each) for name, each in right.items())):
        assert facts["questions"] == len(found)
        assert facts["accuracy"] == pytest.approx(np.mean(found))
        # The standard error of a mean: the sample's standard deviation divided by the square root of its size.
        error = None if len(found) == 1 else pytest.approx(stats.sem(found))
        assert facts["standard_error"] == error
    assert summary["accuracy"] != pytest.approx(np.mean([np.mean(found) for found in right.values()]))


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A model that answers {"a":1} to any prompt: the head alone predicts each token from the previous one."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        tie_word_embeddings=False,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    made = LlamaForCausalLM(config)
    said = [*tokenizer('{"a":1}', add_special_tokens=False)["input_ids"], tokenizer.convert_tokens_to_ids("<|im_end|>")]
    before = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize("\n"))[0], *said[:-1]]
    assert len(set(said)) == len(said) == 6
    with torch.no_grad():
        for layer in made.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        made.lm_head.weight.zero_()
        for token, last in zip(said, before, strict=True):
            embedding = made.model.embed_tokens.weight[last]
            made.lm_head.weight[token] = embedding / embedding.norm()
    folder = tmp_path_factory.mktemp("models") / "parrot"
    made.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def evaluated(
    folder: Path, parrot: Path, references: Sequence[str], more: str = "", asked: str = "question"
) -> tuple[Row, list[Row]]:
    """The results of `evaluate` for the parrot, and its samples."""
    test = [chat_row(f"{asked} {i}", reference) for i, reference in enumerate(references)]
    train = [chat_row(f"another question {i}", '{"a":1}') for i in range(4)]
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = "data: {train: train.jsonl, test: test.jsonl, heldout: 0.5, duplicates: {threshold: null}}"
    text = f"model: {parrot}\n{data}\nevaluate: {{max_new_tokens: 7, {more}}}\n"
    run = create_run(parse_recipe(text, "recipe.yaml", folder), folder / "run")
    prepare(run)
    results = evaluate(run, parrot, QUIET)
    return results, read_jsonl(run.path / eval_folder(results["model_digest"]) / "samples.jsonl")


REFERENCES = ['{"a":1}', '{"a":2}', '{"a": 1, "b": 2}', '{"a":3}', '{"b":1,"c":1,"a":1,"d":1}']


@pytest.fixture(scope="module")
def by_fields(tmp_path_factory: pytest.TempPathFactory, parrot: Path) -> tuple[Row, list[Row]]:
    return evaluated(tmp_path_factory.mktemp("fields"), parrot, REFERENCES, "label: a")


def test_a_model_whose_answer_is_known_is_scored_by_hand(by_fields: tuple[Row, list[Row]], tokenizer: Any) -> None:
    (results, samples), vocabulary = by_fields, len(tokenizer)
    assert [(sample["reference"], sample["answer"]) for sample in samples] == [(each, '{"a":1}') for each in REFERENCES]
    assert [sample["score"] for sample in samples] == [1.0, 0.0, 0.5, 0.0, 0.25]
    assert results["task_score"] == pytest.approx(1.75 / 5)
    assert results["field_accuracy"] == {"a": 3 / 5, "b": 0.0, "c": 0.0, "d": 0.0}
    # Class 1: 3 right, 2 wrong predictions; classes 2 and 3 are never predicted.
    assert results["macro_f1"] == pytest.approx((2 * 3 / (2 * 3 + 2)) / 3)
    assert (results["json_parse_rate"], results["schema_valid_rate"]) == (1.0, None)
    assert (results["rows"], results["unfinished_answers"]) == (5, 0)
    assert (results["generated_tokens"], {sample["new_tokens"] for sample in samples}) == (25, {5})
    # Six tokens per answer, each with a logit of 8 (the square root of 64: RMSNorm of an embedding) among zeros.
    assert results["eval_loss"] == pytest.approx(math.log(math.exp(8) + vocabulary - 1) - 8, rel=0.05)


def test_texts_and_rows_are_told_apart_by_what_they_hold(
    tmp_path: Path, parrot: Path, by_fields: tuple[Row, list[Row]]
) -> None:
    """The same model and questions: the score depends on the text, and a single different reference makes another test set."""
    results, samples = evaluated(tmp_path, parrot, [*REFERENCES[:2], '{"a":1} ', *REFERENCES[3:]], "task: text, batch_size: 2")
    assert [sample["score"] for sample in samples] == [1.0, 0.0, 1.0, 0.0, 0.0]
    assert results["task_score"] == pytest.approx(2 / 5)
    assert results["rows"] == by_fields[0]["rows"]
    assert results["rows_digest"] != by_fields[0]["rows_digest"]


def test_test_rows_changed_in_place_are_others(tmp_path: Path, parrot: Path) -> None:
    """The same file names and lines, the same scores: the digest covers the questions and the references."""

    def digest(references: Sequence[str], asked: str) -> str:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return str(evaluated(tmp_path, parrot, references, asked=asked)[0]["rows_digest"])

    first, again = (digest(REFERENCES[:2], "question") for _ in range(2))
    assert first == again
    assert len({first, digest(REFERENCES[:2], "problem"), digest(REFERENCES[1::-1], "question")}) == 3


def all_resamples(scores: Sequence[float], reference: Sequence[float]) -> np.ndarray:
    """100 x mean / mean for every way to draw as many rows with replacement; all are equally likely."""
    count = len(scores)
    picks = np.array(list(itertools.product(range(count), repeat=count)))
    tops, bottoms = np.asarray(scores)[picks].sum(1), np.asarray(reference)[picks].sum(1)
    ratios: np.ndarray = 100 * tops[bottoms > 0] / bottoms[bottoms > 0]
    return ratios


def check_interval(found: Sequence[float], scores: Sequence[float], reference: Sequence[float]) -> None:
    """Check the 2.5 % and 97.5 % quantiles against all resamples, within four standard deviations of 10,000 draws."""
    ratios = all_resamples(scores, reference)
    for bound, share in zip(found, (0.025, 0.975), strict=True):
        low, high = np.quantile(ratios, [share - 0.0063, share + 0.0063], method="inverted_cdf")
        assert low - 1e-9 <= bound <= high + 1e-9


PAIRS = [
    ([1.0, 0.0, 1.0, 0.0, 0.5], [1.0, 1.0, 1.0, 0.0, 1.0]),
    ([1.0, 1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0, 0.5]),
    ([0.0, 1.0], [1.0, 0.0]),
    ([0.2, 0.9, 0.4, 0.4], [0.3, 0.8, 0.8, 0.1]),
    ([1.0, 1.0, 0.0], [0.0, 0.0, 1.0]),
]


@pytest.mark.parametrize(("scores", "reference"), PAIRS)
def test_bootstrap_against_all_resamples(scores: list[float], reference: list[float]) -> None:
    """Both scores of a row are drawn together, and draws with a reference score of zero give no ratio."""
    check_interval(bootstrap_ratio(scores, reference), scores, reference)


@pytest.mark.parametrize("seed", range(3))
def test_bootstrap_against_scipy(seed: int) -> None:
    generator = np.random.default_rng(seed)
    full = (generator.random(150) < 0.8).astype(float)
    other = np.where(generator.random(150) < 0.85, full, 1 - full) * generator.choice([1.0, 0.5], 150)

    def ratio(top: np.ndarray, bottom: np.ndarray, axis: int) -> np.ndarray:
        made: np.ndarray = 100 * top.mean(axis=axis) / bottom.mean(axis=axis)
        return made

    expected = stats.bootstrap(
        (other, full), ratio, paired=True, n_resamples=8000, method="percentile", vectorized=True, rng=np.random.default_rng(99)
    ).confidence_interval
    low, high = bootstrap_ratio(list(other), list(full))
    width = expected.high - expected.low
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.06 * width)
    unpaired = stats.bootstrap(
        (other, full), ratio, n_resamples=2000, method="percentile", vectorized=True, rng=np.random.default_rng(99)
    ).confidence_interval
    assert unpaired.high - unpaired.low > 1.15 * width  # so a mix-up of the two would show


#: The settings that the page shows for each run.
SHOWN = (
    *("learning_rate", "max_steps", "warmup_steps", "effective_batch_size", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "r", "lora_alpha", "compute_dtype"),
)

Finished = Callable[..., Run]


@pytest.fixture
def finished(tmp_path: Path, random_model: Path) -> Finished:
    """A run folder as the stages leave it, with hand-written scores: only what `compare` reads, without training."""

    def make(
        name: str, method: str, scores: Sequence[float], base: Sequence[float] | None = None, recipe: str = "", **results: Any
    ) -> Run:
        text = f"model: {random_model}\nmethod: {method}\ndata: {{train: train.jsonl}}\n{recipe}"
        run = create_run(parse_recipe(text, "recipe.yaml", tmp_path), tmp_path / name)
        export = run.path / "export" / run.recipe.export.name
        export.mkdir(parents=True)
        (export / "config.json").write_text(json.dumps({"name": name}), encoding="utf-8")
        figures = {"trainable_parameters": 7, "peak_memory_bytes": 2**30, "seconds_per_step": 1.0, "tokens_per_second": 2.0}
        files = {
            "train/summary.json": figures | {"seconds": 60.0, "checkpoint_bytes": 10},
            "train/settings.json": {"hardware": {"name": "none", "cores": 1}, "reasons": {}} | dict.fromkeys(SHOWN, 1),
            "data/ledger.json": dict.fromkeys(("rows_in", "rows_train", "rows_heldout", "rows_unused", "rows_rejected"), 1)
            | {"unused": {}, "reasons": {}},
        }
        for path, value in files.items():
            (run.path / path).parent.mkdir(exist_ok=True)
            (run.path / path).write_text(json.dumps(value), encoding="utf-8")
        (run.path / "train" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n', encoding="utf-8")
        _score(run, model_digest(export), scores, results)
        if base is not None:
            _score(run, model_digest(random_model), base, results)
        return run

    return make


def _score(run: Run, digest: str, scores: Sequence[float], results: Row) -> None:
    folder = eval_folder(digest)
    told = {"rows": len(scores), "rows_digest": "rows", "task_score": sum(scores) / len(scores), "eval_loss": 1.0, **results}
    with run.perform(folder, folder, {}) as target:
        (target / "results.json").write_text(json.dumps(told), encoding="utf-8")
        lines = (json.dumps({"score": score}) + "\n" for score in scores)
        (target / "samples.jsonl").write_text("".join(lines), encoding="utf-8")


def test_effectiveness_is_over_full_and_ties_are_over_the_best(finished: Finished, tmp_path: Path) -> None:
    """Uneven numbers and a best model other than full fine-tuning, so that swapping a ratio's sides would show."""
    scores = {"base": [1.0, 0.0, 0.0, 0.0, 0.0], "one": [1.0, 0.0, 1.0, 0.0, 0.5], "two": [1.0, 1.0, 1.0, 1.0, 0.5]}
    full, more = [1.0, 1.0, 1.0, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0, 0.0]
    runs = [
        finished("one", "lora", scores["one"], base=scores["base"]),
        finished("full", "full", full),
        finished("two", "qlora", scores["two"]),
        finished("again", "full", more),  # a second full fine-tune is not the reference
    ]
    table = compare(runs, tmp_path / "compare")
    rows = {row["model"]: row for row in table["rows"]}
    assert list(rows) == ["base", "one", "full", "two", "again"]
    scores |= {"full": full, "again": more}
    expected = {"base": 100 / 3, "one": 250 / 3, "full": 100.0, "two": 150.0, "again": 100 / 3}
    assert {name: row["effectiveness"] for name, row in rows.items()} == pytest.approx(expected)
    for name, row in rows.items():
        check_interval(row["effectiveness_interval"], scores[name], full)
        check_interval(row["of_best_interval"], scores[name], scores["two"])
    assert rows["two"]["of_best_interval"] == [100.0, 100.0] == rows["full"]["effectiveness_interval"]
    assert "scores" not in rows["one"]


def test_without_a_full_fine_tune_nothing_is_effective_and_without_a_score_nothing_ties(
    finished: Finished, tmp_path: Path
) -> None:
    runs = [finished("one", "lora", [1.0, 0.0, 1.0]), finished("two", "qlora", [1.0, 1.0, 1.0])]
    rows = compare(runs, tmp_path / "compare")["rows"]
    assert [row["model"] for row in rows] == ["one", "two"]
    assert {row["effectiveness"] for row in rows} == {None} == {row["effectiveness_interval"] for row in rows}
    assert rows[1]["of_best_interval"] == [100.0, 100.0]
    check_interval(rows[0]["of_best_interval"], [1.0, 0.0, 1.0], [1.0, 1.0, 1.0])
    none = [finished("three", "full", [0.0, 0.0], base=[0.5, 0.0]), finished("four", "lora", [0.0, 0.0])]
    rows = compare(none, tmp_path / "none")["rows"]
    assert {row["effectiveness"] for row in rows} == {None} == {row["of_best_interval"] for row in rows}
    assert verdict(rows).startswith("No method beats the base model's 25.0 %")


MMLU = {"accuracy": 0.5, "standard_error": 0.1, "questions": 0, "shots": 5, "questions_digest": "q"}


@pytest.mark.parametrize(
    ("first", "second", "base", "refused"),
    [
        ({}, {"rows_digest": "other"}, {}, "different test rows"),
        ({"rows_digest": "other"}, {}, {}, "different test rows"),
        ({}, {}, {"rows_digest": "other"}, "different test rows"),
        ({"mmlu": MMLU}, {"mmlu": MMLU | {"questions_digest": "other"}}, {}, "different MMLU questions"),
        ({"mmlu": MMLU}, {"mmlu": MMLU | {"shots": 0}}, {}, "different MMLU questions"),
        ({"mmlu": MMLU}, {}, {"mmlu": MMLU | {"questions_digest": "other"}}, "different MMLU questions"),
        ({}, {"mmlu": MMLU}, {}, None),
    ],
)
def test_runs_scored_on_different_rows_are_refused(
    finished: Finished, tmp_path: Path, random_model: Path, first: Row, second: Row, base: Row, refused: str | None
) -> None:
    """For any of the runs, and for the base model's evaluation. Equal row counts and scores do not prove equal rows."""
    runs = [finished("one", "full", [1.0, 0.0], **first), finished("two", "lora", [1.0, 0.0], **second)]
    _score(runs[1], model_digest(random_model), [1.0, 0.0], base)
    if refused is None:
        compare(runs, tmp_path / "compare")
        return
    with pytest.raises(RunError, match=rf"TS601.*{refused}"):
        compare(runs, tmp_path / "compare")
    assert not (tmp_path / "compare").exists()


@pytest.mark.parametrize("way", ["label: intent", "json_schema: s.json", "max_new_tokens: 7", "task: text"])
def test_runs_scored_in_different_ways_are_refused(finished: Finished, tmp_path: Path, way: str) -> None:
    (tmp_path / "s.json").write_text("{}", encoding="utf-8")
    asked, scores = f"evaluate: {{{way}}}\n", [1.0, 0.0]
    runs = [finished("one", "full", scores), finished("two", "lora", scores, recipe=asked)]
    with pytest.raises(RunError, match=r"TS601.*scored in different ways"):
        compare(runs, tmp_path / "compare")
    same = [runs[1], finished("three", "full", scores, recipe=asked.replace("}", ", mmlu_shots: 4}"))]
    compare(same, tmp_path / "compare")  # scores other than the task's are compared by their own digest


def test_where_nothing_scored_no_winner_is_named(finished: Finished, tmp_path: Path) -> None:
    runs = [finished("one", "full", [0.0, 0.0]), finished("two", "lora", [0.0, 0.0])]
    assert verdict(compare(runs, tmp_path / "compare")["rows"]).startswith("No model scored above 0 %")


def test_a_run_that_is_not_evaluated_is_refused(finished: Finished, tmp_path: Path) -> None:
    """The base model's evaluation is not mistaken for the run's."""
    run = finished("one", "full", [1.0, 0.0], base=[0.0, 0.0])
    (run.path / "export" / run.recipe.export.name / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(RunError, match=r"TS011.*not evaluated"):
        compare([run], tmp_path / "compare")


def tuned(model: str, score: float, of_best: list[float] | None = None, **more: Any) -> Row:
    """A row of the table with the columns that the verdict reads."""
    facts = {"trainable_parameters": 10, "peak_memory_bytes": 2**30, "train_seconds": 60.0, "effectiveness": None}
    return {"model": model, "method": model, "task_score": score, "of_best_interval": of_best, **facts, **more}


@pytest.mark.parametrize(
    ("bounds", "tie"),
    [([80.0, 99.9], False), ([80.0, 100.0], True), ([80.0, 120.0], True), ([100.0, 130.0], True), ([100.1, 130.0], False)],
)
def test_a_tie_is_an_interval_that_holds_equality(bounds: list[float], tie: bool) -> None:
    rows = [tuned("full", 0.9, [100.0, 100.0], peak_memory_bytes=2**31), tuned("lora", 0.8, bounds)]
    for order in (rows, rows[::-1]):
        told = verdict([tuned("base", 0.1, [5.0, 20.0]), *order])
        names = ", ".join(f"{row['model']} {100 * row['task_score']:.1f} %" for row in order)
        lean = "lora is the cheapest of them: 10 trainable parameters, 1.00 GiB at peak, 1.0 minutes of training."
        apart = "and the test rows do not distinguish them."
        expected = f"A tie: {names} of the task against 10.0 % for the base model, {apart} {lean}"
        alone = "full scored best: 90.0 % of the task against 10.0 % for the base model."
        assert told == (expected if tie else alone)


def test_who_is_close_to_full_fine_tuning() -> None:
    """At 95 % of its score or more; of those, the one with the least memory is named, with its own figures."""
    rows = [
        tuned("full", 0.8, [100.0, 100.0], effectiveness=100.0, peak_memory_bytes=8 * 2**30),
        tuned("lora", 0.76, [90.0, 99.0], effectiveness=95.0, effectiveness_interval=[91.0, 99.0], peak_memory_bytes=3 * 2**30),
        tuned("more", 0.78, [90.0, 99.0], effectiveness=97.5, effectiveness_interval=[92.0, 99.0], peak_memory_bytes=4 * 2**30),
        tuned("least", 0.759, [90.0, 98.0], effectiveness=94.9, effectiveness_interval=[90.0, 98.0]),
    ]
    assert verdict(rows) == (
        "full scored best: 80.0 % of the task. lora reaches 95.0 % of full fine-tuning's score "
        "(95 % interval 91-99) with 10 trainable parameters, 3.00 GiB at peak."
    )
    assert verdict([rows[0], rows[3]]) == "full scored best: 80.0 % of the task."


def test_the_base_model_is_no_winner_and_may_tie() -> None:
    assert verdict([tuned("base", 0.5, None), tuned("lora", 0.5, [100.0, 100.0])]).startswith(
        "No method beats the base model's 50"
    )
    assert verdict([tuned("base", 0.6, [99.0, 130.0]), tuned("lora", 0.5, [100.0, 100.0])]).startswith("No method beats")
    told = verdict([tuned("base", 0.5, [80.0, 100.0]), tuned("lora", 0.6, [100.0, 100.0])])
    assert told.startswith("The test rows do not distinguish lora (60.0 % of the task) from the base model (50.0 %)")
    told = verdict([tuned("base", 0.5, [80.0, 99.0]), tuned("lora", 0.6, [100.0, 100.0])])
    assert told == "lora scored best: 60.0 % of the task against 50.0 % for the base model."


def test_cells_show_the_ratio_and_its_interval() -> None:
    given = {"seconds_per_step": 1.5, "tokens_per_second": 20.0, "eval_loss": 0.25, "checkpoint_bytes": 2_500_000}
    lora = tuned("lora", 0.6, None, **given, effectiveness=75.0, effectiveness_interval=[61.4, 88.6])
    full = tuned("full", 0.8, None, **given, effectiveness=100.0, effectiveness_interval=[100.0, 100.0])
    assert [line[-3:] for line in cells([lora, full])] == [["60.0 %", "75.0 (61-89)", "2.5"], ["80.0 %", "100.0", "2.5"]]
