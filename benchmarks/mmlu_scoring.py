"""Scoring of one MMLU subject, 5-shot, SmolLM2-135M in float32 on CPU: tunesmith against lm-evaluation-harness.

Both score the same questions from their text: the harness's own task builds its requests from the same files, and they must
match ours character for character. Each side runs in its own process; turns alternate (A B A B), and the claim is the median
of their ratios. The harness uses the fastest of several batch sizes, found in a short trial, and its default cache of one-token
continuations. It is installed into a cache folder on first use and uses this environment's torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import claim, parser, report

from tunesmith.inference.scoring import MAX_TOKENS
from tunesmith.io.cache import cache_folder

#: The harness, and the packages that its Hugging Face backend and its task class import and this environment lacks.
#: Installed without their own dependencies, which would bring a second numpy and datasets.
PEER = (
    "lm_eval==0.4.13",
    "evaluate==0.4.6",
    "sacrebleu==2.6.0",
    "portalocker==4.4.2",
    "tabulate==0.10.0",
    "colorama==0.4.6",
    "lxml==6.1.3",
)
BATCH_SIZES = (1, 4, 8, 16)
BUDGETS = (4096, 8192, 16384)

_SIDE = Path(__file__).with_name("mmlu_side.py")


def peer_folder() -> Path:
    """The folder of the harness, which is installed on first use."""
    folder = cache_folder() / "peers" / PEER[0].replace("==", "-")
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{partial}/made", *PEER]
            subprocess.run(command, check=True)
            Path(partial, "made").rename(folder)
    return folder


class Side:
    """A process that scores on request."""

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        if name == "lm_eval":
            paths = [str(peer_folder()), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self.process: Any = subprocess.Popen(
            [sys.executable, str(_SIDE), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ask(json.dumps(settings))

    def ask(self, line: str) -> dict[str, Any]:
        """The answer to one line."""
        print(line, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.process.args} ended with {self.process.wait()}")
        value: dict[str, Any] = json.loads(answer)
        return value

    def turn(self, parameter: int, questions: int | None = None) -> dict[str, Any]:
        """Score the first `questions` questions (all of them if None)."""
        return self.ask(json.dumps({"parameter": parameter, "questions": questions}))

    def end(self) -> None:
        """Let the process end."""
        self.process.stdin.close()
        self.process.wait()


def fastest(side: Side, parameters: Sequence[int], questions: int) -> tuple[int, dict[int, float]]:
    """The parameter with the fastest turn over a few questions, after one warm-up turn, and the seconds of each."""
    side.turn(parameters[0], 2)
    seconds = {parameter: side.turn(parameter, questions)["seconds"] for parameter in parameters}
    return min(seconds, key=lambda parameter: seconds[parameter]), seconds


def measure(subject: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Turns of both sides over one subject, and their results."""
    settings = {"mmlu": str(asked.mmlu), "mmlu_subjects": [subject], "mmlu_questions": asked.questions}
    own, peer = Side("tunesmith", settings), Side("lm_eval", settings)
    batch_size, trial = fastest(peer, BATCH_SIZES, asked.trial_questions)
    own.turn(asked.max_tokens, 2)
    turns, largest = [], 0.0
    for _ in range(asked.turns):
        ours, theirs = own.turn(asked.max_tokens), peer.turn(batch_size)
        pairs = zip(ours["log_likelihoods"], theirs["log_likelihoods"], strict=True)
        largest = max(largest, *(abs(one - other) for one, other in pairs))
        turns.append({"tunesmith_seconds": ours["seconds"], "lm_eval_seconds": theirs["seconds"]})
        print(f"{subject}: {ours['seconds']:.2f} s against {theirs['seconds']:.2f} s", flush=True)
    own.end()
    peer.end()
    return {
        "subject": subject,
        "requests": len(ours["log_likelihoods"]),
        "max_tokens": asked.max_tokens,
        "lm_eval": PEER[0],
        "lm_eval_batch_size": batch_size,
        "lm_eval_trial_seconds": trial,
        "turns": turns,
        "ratio": statistics.median(turn["lm_eval_seconds"] / turn["tunesmith_seconds"] for turn in turns),
        "max_abs_diff": largest,
    }


def measure_budgets(subject: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Our seconds by token budget: medians over alternating turns."""
    own = Side("tunesmith", {"mmlu": str(asked.mmlu), "mmlu_subjects": [subject], "mmlu_questions": asked.questions})
    own.turn(BUDGETS[0], 2)
    rounds = [{budget: own.turn(budget)["seconds"] for budget in BUDGETS} for _ in range(asked.turns)]
    own.end()
    seconds = {budget: statistics.median(each[budget] for each in rounds) for budget in BUDGETS}
    print(f"{subject}: " + ", ".join(f"{budget} tokens {value:.2f} s" for budget, value in seconds.items()), flush=True)
    return {"subject": subject, "seconds_by_budget": seconds}


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--mmlu", type=Path, required=True, help="a folder with dev/ and test/ of MMLU")
    options.add_argument("--subjects", default="abstract_algebra", help="separated by commas; the claims are of the first")
    options.add_argument("--questions", type=int, help="at most so many of each subject")
    options.add_argument("--trial-questions", type=int, default=16, help="questions of the trial of batch sizes")
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help="our budget of tokens")
    options.add_argument("--budgets", action="store_true", help="measure our side alone, with several budgets")
    asked = options.parse_args()
    subjects = asked.subjects.split(",")
    if asked.budgets:
        report(asked.json, [], [measure_budgets(subject, asked) for subject in subjects])
        return
    rows = [measure(subject, asked) for subject in subjects]
    claims = [
        claim("mmlu_scoring_ratio_to_lm_eval", rows[0]["ratio"], "times as fast"),
        claim("mmlu_scoring_max_abs_diff", max(row["max_abs_diff"] for row in rows), "nats"),
    ]
    report(asked.json, claims, rows)


if __name__ == "__main__":
    main()
