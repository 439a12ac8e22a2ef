"""Whether a step of a policy objective moves probability to the rewarded answers: exact, without sampling noise."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from tunesmith.models.load import load_model
from tunesmith.runs import Run

#: A reward for short answers that records its calls.
REWARD = """\
import json


def short(prompts, completions, references):
    rewards = [-len(text) / 100 for text in completions]
    seen = [json.dumps([prompt[-1]["content"], *pair]) for prompt, pair in zip(prompts, zip(completions, rewards))]
    with open(__file__ + ".jsonl", "a", encoding="utf-8") as notes:
        notes.write("".join(line + "\\n" for line in seen))
    return rewards
"""


def share_towards_reward(run: Run, base: Path, notes: Path, tokenizer: Any, *, grouped: bool) -> float:
    """Sum over the sampled one-token answers of advantage x change of log-probability, divided by the sum of absolute values.

    The advantage is the reward minus the mean of its prompt's answers, or of all. 1 is a step straight up, noise is about 0.
    """
    rows = Dataset.from_file(str(run.path / "data" / "train.arrow"))
    asked = {json.loads(row["prompt"])[-1]["content"]: row["prompt_ids"] for row in rows}
    seen = [json.loads(line) for line in notes.read_text(encoding="utf-8").splitlines()]
    of_prompt = {prompt: [reward for other, _, reward in seen if other == prompt or not grouped] for prompt, _, _ in seen}
    before, after = (load_model(folder, dtype="float32").eval() for folder in (base, run.path / "export" / "merged"))
    terms = []
    for prompt, text, reward in seen:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1:
            with torch.no_grad():
                rose = [
                    float(model(torch.tensor([asked[prompt]])).logits[0, -1].log_softmax(-1)[ids[0]])
                    for model in (before, after)
                ]
            terms.append((reward - statistics.fmean(of_prompt[prompt])) * (rose[1] - rose[0]))
    assert len(terms) > len(seen) / 2
    return sum(terms) / sum(map(abs, terms))
