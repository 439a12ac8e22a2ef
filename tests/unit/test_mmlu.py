"""MMLU's files, prompts and requests; no model except where the real files are scored."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.errors import EvaluateError
from tunesmith.inference.scoring import Request, log_likelihoods
from tunesmith.models.load import load_model
from tunesmith.recipe import EvaluateSection
from tunesmith.stages.evaluate.mmlu import LETTERS, encode_choices, files_digest, prompts, read_subjects, subject_names

TITLES = "question,choice0,choice1,choice2,choice3,answer\n"


@pytest.fixture
def mmlu(tmp_path: Path) -> Path:
    """Two subjects: one as published, with letters and no header; one with a header and numbers."""
    for part in ("dev", "test"):
        (tmp_path / part).mkdir()
    (tmp_path / "dev" / "us_law_dev.csv").write_text("One?,a,b,c,d,B\nTwo?,e,f,g,h,D\n", encoding="utf-8")
    (tmp_path / "test" / "us_law_test.csv").write_text('" Three, or\nmore? ",1,2,3,4,A\nFour?,5,6,7,8,C\n', encoding="utf-8")
    (tmp_path / "dev" / "maths_dev.csv").write_text(f"{TITLES}Five?,a,b,c,d,0\nSix?,e,f,g,h,3\n", encoding="utf-8")
    (tmp_path / "test" / "maths_test.csv").write_text(f"{TITLES}Seven?,1,2,3,4,2\n", encoding="utf-8")
    return tmp_path


def settings(folder: Path, **values: Any) -> EvaluateSection:
    return EvaluateSection.model_validate({"mmlu": str(folder), "mmlu_shots": 2, **values})


def problems(folder: Path, **values: Any) -> list[tuple[str, str, str, str]]:
    with pytest.raises(EvaluateError) as caught:
        read_subjects(settings(folder, **values))
    return [(p.code, p.what, p.where, p.fix) for p in caught.value.problems]


def test_both_ways_of_writing_the_files(mmlu: Path) -> None:
    maths, law = read_subjects(settings(mmlu))
    assert (maths.name, law.name) == ("maths", "us_law")
    assert [question.answer for question in (*maths.examples, *maths.questions)] == [0, 3, 2]
    assert [question.answer for question in (*law.examples, *law.questions)] == [1, 3, 0, 2]
    assert maths.questions[0].choices == ("1", "2", "3", "4")


def test_a_prompt_to_the_character(mmlu: Path) -> None:
    law = read_subjects(settings(mmlu, mmlu_subjects=["us_law"]))[0]
    assert prompts(law)[0] == (
        "The following are multiple choice questions (with answers) about us law.\n\n"
        "One?\nA. a\nB. b\nC. c\nD. d\nAnswer: B\n\n"
        "Two?\nA. e\nB. f\nC. g\nD. h\nAnswer: D\n\n"
        "Three, or\nmore?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )
    (bare,) = read_subjects(settings(mmlu, mmlu_subjects=["us_law"], mmlu_shots=0, mmlu_questions=1))
    assert prompts(bare) == [
        "The following are multiple choice questions (with answers) about us law.\n\n"
        "Three, or\nmore?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    ]


def test_what_is_missing_is_told(mmlu: Path) -> None:
    ((code, what, where, _),) = problems(mmlu / "nowhere")
    assert (code, what, where) == ("TS511", "the folder does not exist", str(mmlu / "nowhere"))
    ((code, what, _, _),) = problems(mmlu / "dev")
    assert (code, what) == ("TS511", "no files test/<subject>_test.csv")
    ((code, what, _, fix),) = problems(mmlu, mmlu_subjects=["math"])
    assert (code, what, fix) == ("TS512", "unknown subject 'math'", "did you mean 'maths'?")
    ((code, _, _, _),) = problems(mmlu, mmlu_subjects=[])
    assert code == "TS512"
    (mmlu / "dev" / "maths_dev.csv").unlink()
    ((code, _, where, _),) = problems(mmlu)
    assert (code, where) == ("TS511", str(mmlu / "dev" / "maths_dev.csv"))
    assert len(read_subjects(settings(mmlu, mmlu_shots=0))) == 2  # no examples, so no example file


def test_every_malformed_file_is_told_with_its_line(mmlu: Path) -> None:
    law, maths = mmlu / "test" / "us_law_test.csv", mmlu / "test" / "maths_test.csv"
    law.write_text('"Two\nlines?",1,2,3,4,A\nFour?,5,6,7,C\n', encoding="utf-8")
    maths.write_text(f"{TITLES}Seven?,1,2,3,4,E\n", encoding="utf-8")
    (first, second) = problems(mmlu)
    assert first[:3] == ("TS513", "the answer is 'E'", f"{maths}:2")
    assert second[:3] == ("TS513", "5 cells, but a question has 6", f"{law}:3")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('"open,1,2,3,4,A\n', "not valid CSV"),
        ('"a"b,1,2,3,4,A\n', "not valid CSV"),
        (" ,1,2,3,4,A\n", "the question is empty"),
        (TITLES, "no questions"),
        ("", "no questions"),
        ("\xff", "cannot read"),
    ],
)
def test_malformed_files(mmlu: Path, text: str, what: str) -> None:
    (mmlu / "test" / "maths_test.csv").write_text(text, encoding="latin-1")
    ((code, found, where, _),) = problems(mmlu, mmlu_subjects=["maths"])
    assert code == "TS513"
    assert what in found
    assert "maths_test.csv" in where


def test_too_few_examples_are_told(mmlu: Path) -> None:
    (first, second) = problems(mmlu, mmlu_shots=3)
    assert first[:2] == ("TS513", "2 examples, but 3 were requested")
    assert "us_law_dev.csv" in second[2]


def test_the_digest_follows_the_files_that_are_read(mmlu: Path) -> None:
    assert files_digest(EvaluateSection()) == "none"
    whole, one = files_digest(settings(mmlu)), files_digest(settings(mmlu, mmlu_subjects=["us_law"]))
    bare = files_digest(settings(mmlu, mmlu_shots=0))
    assert len({whole, one, bare}) == 3
    with (mmlu / "dev" / "maths_dev.csv").open("a", encoding="utf-8") as handle:
        handle.write("Eight?,a,b,c,d,1\n")
    assert files_digest(settings(mmlu)) != whole
    assert files_digest(settings(mmlu, mmlu_subjects=["us_law"])) == one
    assert files_digest(settings(mmlu, mmlu_shots=0)) == bare


def test_requests_are_the_ids_of_the_whole_text(tokenizer: Any) -> None:
    texts = ["What?\nAnswer:", "Which one of these, then?\nAnswer:"]
    requests, cut = encode_choices(tokenizer, texts, longest=None)
    assert cut == 0
    whole = [tokenizer(f"{text} {letter}")["input_ids"] for text in texts for letter in LETTERS]
    assert [[*request.context, *request.continuation] for request in requests] == whole
    assert all(len(request.continuation) == 1 for request in requests)
    shorter, cut = encode_choices(tokenizer, texts, longest=8)
    assert cut == 1
    assert shorter[:4] == requests[:4]
    for short, request in zip(shorter[4:], requests[4:], strict=True):
        assert short == Request(request.context[-8:], request.continuation)


def test_prompts_of_the_real_files_are_the_harness_s(shared_data: Path) -> None:
    """Digest of the texts that lm_eval 0.4.13's task makes from these files; `mmlu_side.py` compares them in each benchmark."""
    subjects = read_subjects(EvaluateSection(mmlu=str(shared_data / "mmlu"), mmlu_questions=12))
    assert len(subjects) == 57
    text = "\0".join(prompt for subject in subjects for prompt in prompts(subject))
    assert hashlib.sha256(text.encode()).hexdigest() == "756d57d0ae3447cbc0c8d31301bd67b798a23df1f7e242ccbbac75cc8ce96daa"


def test_all_real_questions_are_read(shared_data: Path) -> None:
    everything = EvaluateSection(mmlu=str(shared_data / "mmlu"))
    assert sum(len(subject.questions) for subject in read_subjects(everything)) == 14_042
    assert "abstract_algebra" in subject_names(everything)


@pytest.fixture(params=["small_data", "shared_data"])
def mmlu_folder(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param) / "mmlu")


def test_questions_score_as_row_by_row(mmlu_folder: str, tiny_model: Path, tokenizer: Any) -> None:
    asked = EvaluateSection(mmlu=mmlu_folder, mmlu_subjects=["abstract_algebra"], mmlu_questions=9)
    model = load_model(tiny_model, dtype="float32")
    requests, cut = encode_choices(tokenizer, prompts(read_subjects(asked)[0]), model.config.max_position_embeddings)
    assert cut == 0
    found = log_likelihoods(model, requests, max_tokens=600)
    for likelihood, request in zip(found, requests, strict=True):
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([request.context])).logits[0, -1].double().log_softmax(-1)
        assert likelihood.log_likelihood == pytest.approx(log_p[request.continuation[0]].item(), abs=1e-4)
