"""MMLU, to measure forgetting: how well a model still answers questions it was not trained on.

The questions come from Hendrycks et al. 2021 (arXiv 2009.03300), 57 subjects, in the files they were published in.
Prompts and choices match lm-evaluation-harness's task `mmlu` character by character: no chat template, the first questions of
the dev file as examples, and the model's choice is the likeliest of the answers " A" to " D".
"""

from __future__ import annotations

import csv
import difflib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.errors import EvaluateError, Problem
from tunesmith.inference.scoring import Likelihood, Request, log_likelihoods, reason_for_padding
from tunesmith.io.atomic import sha256_file, sha256_json
from tunesmith.recipe import EvaluateSection

LETTERS = "ABCD"

_CELLS = len(LETTERS) + 2  # the question, its choices, the answer
_DEV, _TEST = "dev/{}_dev.csv", "test/{}_test.csv"
_ENCODED = 64  # prompts that are tokenized together with their continuations
_WHY = "forgetting would be measured on less than the recipe asks for"


@dataclass(frozen=True)
class Question:
    """One question with four choices; `answer` is the index of the correct one."""

    text: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Subject:
    """A subject's examples and the questions to score."""

    name: str
    examples: tuple[Question, ...]
    questions: tuple[Question, ...]


def subject_names(settings: EvaluateSection) -> list[str]:
    """The subjects that the recipe asks for, sorted; without a list, all that have a test file.

    Raises EvaluateError if the folder holds none, or if some are unknown or lack a file.
    """
    folder = Path(settings.mmlu or "")
    known = sorted(path.name.removesuffix("_test.csv") for path in folder.glob(_TEST.format("*")))
    if not known:
        fix = "give a folder with dev/<subject>_dev.csv and test/<subject>_test.csv"
        what = "no files test/<subject>_test.csv" if folder.is_dir() else "the folder does not exist"
        raise EvaluateError(Problem("TS511", what, str(folder), "evaluate.mmlu points to it", fix))
    asked = known if settings.mmlu_subjects is None else sorted(set(settings.mmlu_subjects))
    problems = [_unknown(name, known, folder) for name in asked if name not in known]
    if settings.mmlu_shots:
        dev = [folder / _DEV.format(name) for name in asked if name in known]
        problems += [
            Problem("TS511", "the examples file does not exist", str(path), _WHY, "add it, or set evaluate.mmlu_shots to 0")
            for path in dev
            if not path.is_file()
        ]
    if problems or not asked:
        raise EvaluateError(
            problems or Problem("TS512", "an empty list of subjects", "evaluate.mmlu_subjects", _WHY, "name one")
        )
    return asked


def _unknown(name: str, known: Sequence[str], folder: Path) -> Problem:
    near = difflib.get_close_matches(name, known, 1, 0.5)
    fix = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}"
    return Problem("TS512", f"unknown subject {name!r}", f"evaluate.mmlu_subjects, {folder}", _WHY, fix)


def files_digest(settings: EvaluateSection) -> str:
    """sha256 over the files to read, `none` without `evaluate.mmlu`. Raises EvaluateError as `subject_names` does."""
    if settings.mmlu is None:
        return "none"
    patterns = (_DEV, _TEST) if settings.mmlu_shots else (_TEST,)
    names = [pattern.format(name) for name in subject_names(settings) for pattern in patterns]
    return sha256_json({name: sha256_file(Path(settings.mmlu) / name) for name in names})


def read_subjects(settings: EvaluateSection) -> list[Subject]:
    """Examples and questions of each requested subject. Raises EvaluateError with the problems of all subjects."""
    folder, shots = Path(settings.mmlu or ""), settings.mmlu_shots
    subjects: list[Subject] = []
    problems: list[Problem] = []
    for name in subject_names(settings):
        dev, test = folder / _DEV.format(name), folder / _TEST.format(name)
        try:
            examples = tuple(islice(_read(dev), shots)) if shots else ()
            questions = tuple(islice(_read(test), settings.mmlu_questions))
        except EvaluateError as error:
            problems += error.problems
            continue
        if len(examples) < shots:
            what = f"{len(examples)} examples, but {shots} were requested"
            problems.append(Problem("TS513", what, str(dev), _WHY, "lower evaluate.mmlu_shots"))
        if not questions:
            problems.append(Problem("TS513", "no questions", str(test), _WHY, "add some, or drop the subject"))
        subjects.append(Subject(name, examples, questions))
    if problems:
        raise EvaluateError(problems)
    return subjects


def _read(path: Path) -> Iterator[Question]:
    """Yields the questions of a file in order; the header line is optional, answers are A to D or 0 to 3.

    Raises EvaluateError at the first malformed row.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            rows = csv.reader(handle, strict=True)
            begin = 1
            for cells in rows:
                if cells and not (begin == 1 and cells[-1].strip().lower() == "answer"):
                    yield _question(cells, f"{path}:{begin}")
                begin = rows.line_num + 1  # a quoted cell may hold line breaks
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluateError(Problem("TS513", f"cannot read: {error}", str(path), _WHY, "check the file")) from error
    except csv.Error as error:
        fix = "quote cells that hold commas, quotes or line breaks"
        raise EvaluateError(Problem("TS513", f"not valid CSV: {error}", f"{path}:{rows.line_num}", _WHY, fix)) from error


def _question(cells: Sequence[str], where: str) -> Question:
    fix = "write each row as question, four choices, and the answer as A to D or 0 to 3"
    if len(cells) != _CELLS:
        raise EvaluateError(Problem("TS513", f"{len(cells)} cells, but a question has {_CELLS}", where, _WHY, fix))
    text, *choices, answer = cells
    index = next((i for i, letter in enumerate(LETTERS) if answer.strip() in {letter, str(i)}), None)
    if index is None:
        raise EvaluateError(Problem("TS513", f"the answer is {answer!r}", where, _WHY, fix))
    if not text.strip():
        raise EvaluateError(Problem("TS513", "the question is empty", where, _WHY, fix))
    return Question(text, tuple(choices), index)


def _asked(question: Question) -> str:
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True))
    return f"{question.text.strip()}{choices}\nAnswer:"


def prompts(subject: Subject) -> list[str]:
    """The subject's prompts, one per question; all begin with the same header."""
    head = f"The following are multiple choice questions (with answers) about {subject.name.replace('_', ' ')}.\n\n"
    head += "".join(f"{_asked(example)} {LETTERS[example.answer]}\n\n" for example in subject.examples)
    return [head + _asked(question) for question in subject.questions]


def encode_choices(tokenizer: Any, texts: Sequence[str], longest: int | None) -> tuple[list[Request], int]:
    """A request per prompt and letter, in order, and the number of prompts truncated from the left to `longest` tokens.

    A continuation is what tokenizing the prompt with " A" adds to the prompt's own ids, as in lm-evaluation-harness.
    """
    requests, cut = [], 0
    for start in range(0, len(texts), _ENCODED):
        some = texts[start : start + _ENCODED]
        wanted = [text + end for text in some for end in ("", *(f" {letter}" for letter in LETTERS))]
        encoded = tokenizer(wanted, return_attention_mask=False)["input_ids"]
        step = 1 + len(LETTERS)
        for first in range(0, len(encoded), step):
            context, wholes = encoded[first], encoded[first + 1 : first + step]
            ends = [whole[len(context) :] for whole in wholes]
            room = len(context) if longest is None else longest + 1 - max(map(len, ends))
            cut += room < len(context)
            requests += [Request(context[-room:], end) for end in ends]
    return requests, cut


def score_mmlu(
    model: Any, tokenizer: Any, subjects: Sequence[Subject], report: Callable[[str], None] = lambda _: None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The entries of results.json about MMLU, and a sample per question.

    `accuracy` is over all questions, as the harness weights its groups; `standard_error` is that of a mean over all of them.
    Subjects are scored one after the other, so memory does not grow with their number.
    """
    begun = time.perf_counter()
    longest = getattr(model.config, "max_position_embeddings", None)
    samples: list[dict[str, Any]] = []
    cut, padded = 0, None
    for subject in subjects:
        requests, shortened = encode_choices(tokenizer, prompts(subject), longest)
        cut += shortened
        padded = padded or reason_for_padding(model.config, requests)
        found = log_likelihoods(model, requests, pad_id=tokenizer.pad_token_id)
        samples += _samples(subject, found)
        report(f"mmlu {subject.name}: {len(subject.questions)} questions, {len(samples)} in all")
    summary = {
        **_accuracy(samples),
        "subjects": {s.name: _accuracy([x for x in samples if x["subject"] == s.name]) for s in subjects},
        "shots": len(subjects[0].examples),
        "cut_prompts": cut,
        "padded_because": padded,
        "questions_digest": sha256_json([[s.name, [(q.text, q.choices, q.answer) for q in s.questions]] for s in subjects]),
        "seconds": time.perf_counter() - begun,
    }
    return summary, samples


def _samples(subject: Subject, found: Sequence[Likelihood]) -> list[dict[str, Any]]:
    """One line of mmlu.jsonl per question; among equally likely choices the first one wins."""
    samples = []
    for number, question in enumerate(subject.questions):
        log_likelihoods = [
            likelihood.log_likelihood for likelihood in found[number * len(LETTERS) : (number + 1) * len(LETTERS)]
        ]
        chosen = log_likelihoods.index(max(log_likelihoods))
        samples.append(
            {
                "subject": subject.name,
                "question": number,
                "log_likelihoods": log_likelihoods,
                "answer": LETTERS[question.answer],
                "chosen": LETTERS[chosen],
            }
        )
    return samples


def _accuracy(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    count = len(samples)
    right = sum(sample["chosen"] == sample["answer"] for sample in samples) / count
    error = (right * (1 - right) / (count - 1)) ** 0.5 if count > 1 else None
    return {"accuracy": right, "standard_error": error, "questions": count}
