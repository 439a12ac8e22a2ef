"""One side of mmlu_scoring.py: scores the same MMLU questions once per input line.

All lines are JSON. The first input line has keys of the recipe's evaluate section. Each further line is a turn, with its
`parameter` (the batch size for lm_eval, the token budget for tunesmith) and its number of `questions`, null for all. The
first answer is `ready`; the answer to a turn has its `seconds` and `log_likelihoods`, in the order of questions and letters.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tunesmith.models import builtin
from tunesmith.recipe import EvaluateSection
from tunesmith.stages.evaluate.mmlu import LETTERS, Subject, encode_choices, prompts, read_subjects

Turn = Callable[[int, int | None], list[float]]


def own_side(subject: Subject) -> Turn:
    """Tokenisation and scoring as in `evaluate`."""
    from tunesmith.engine.modeling.gemm import use_onednn
    from tunesmith.inference.scoring import log_likelihoods
    from tunesmith.models.load import load_model, load_tokenizer

    folder = builtin.ensure()
    model, tokenizer = load_model(folder, dtype="float32"), load_tokenizer(folder)
    use_onednn(model)

    def turn(max_tokens: int, questions: int | None) -> list[float]:
        requests, _ = encode_choices(tokenizer, prompts(subject)[:questions], model.config.max_position_embeddings)
        found = log_likelihoods(model, requests, pad_id=tokenizer.pad_token_id, max_tokens=max_tokens)
        return [each.log_likelihood for each in found]

    return turn


def peer_side(subject: Subject) -> Turn:
    """`HFLM.loglikelihood` on the Instances that the harness's own task builds from the same files."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=str(builtin.ensure()), dtype="float32", device="cpu")
    pairs = list(harness_pairs(subject))
    own = [(text, f" {letter}") for text in prompts(subject) for letter in LETTERS]
    if pairs != own:
        raise SystemExit("the harness's prompts are others than ours")
    instances = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=number) for number, pair in enumerate(pairs)
    ]

    def turn(batch_size: int, questions: int | None) -> list[float]:
        harness.batch_size_per_gpu = batch_size
        chosen = instances if questions is None else instances[: questions * len(LETTERS)]
        return [total for total, _ in harness.loglikelihood(chosen, disable_tqdm=True)]

    return turn


def harness_pairs(subject: Subject) -> Iterator[tuple[str, str]]:
    """Contexts and continuations from lm_eval's ConfigurableTask with its own MMLU settings and our rows as data."""
    import datasets
    import yaml
    from lm_eval import tasks
    from lm_eval.api.task import ConfigurableTask

    folder = os.path.join(os.path.dirname(tasks.__file__), "mmlu", "default")  # noqa: PTH118, PTH120
    config: dict[str, Any] = {}
    for name in ("_default_template_yaml", f"mmlu_{subject.name}.yaml"):
        with open(os.path.join(folder, name), encoding="utf-8") as handle:  # noqa: PTH118, PTH123
            config |= yaml.safe_load(handle)
    for key in ("include", "tag", "dataset_path", "dataset_name"):
        config.pop(key, None)
    rows = {
        name: datasets.Dataset.from_list([{"question": q.text, "choices": list(q.choices), "answer": q.answer} for q in some])
        for name, some in (("dev", subject.examples), ("test", subject.questions))
    }
    task = ConfigurableTask(config={**config, "custom_dataset": lambda **_: rows, "num_fewshot": len(subject.examples)})
    for row in rows["test"]:
        context = task.fewshot_context(row, len(subject.examples))
        for request in task.construct_requests(row, context):
            yield request.args


def main() -> None:
    """Load the model, then run one turn per line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("side", choices=["tunesmith", "lm_eval"])
    side = options.parse_args().side
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print; only answers go to the original stdout
    settings = json.loads(sys.stdin.readline())
    (subject,) = read_subjects(EvaluateSection.model_validate(settings))
    turn = own_side(subject) if side == "tunesmith" else peer_side(subject)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in iter(sys.stdin.readline, ""):
        asked = json.loads(line)
        begun = time.perf_counter()
        found = turn(asked["parameter"], asked["questions"])
        answer = {"seconds": time.perf_counter() - begun, "log_likelihoods": found}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
