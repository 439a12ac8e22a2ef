"""Rows per second of `prepare` with all its rules against TRL's preparation (`datasets.map`), and memory for a large file.

Both sides read the same conversations (gsm8k's rows, with the words of the questions shuffled once the file is exhausted) with
as many processes as there are cores. TRL's side does what SFTTrainer does to a data set before training: chat template,
tokenization and the mask of answers. For both, the time of the same command with 16 rows is subtracted: imports, the model,
process startup. Memory is the sum of PSS over the process and its children, sampled twice a second.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from common import claim, merged, parser, report

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"
FEW = 16
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
)


def rows(count: int) -> Iterator[dict[str, Any]]:
    """Seeded conversations: gsm8k's rows, with the words reordered each time the file is exhausted."""
    lines = [json.loads(line) for line in DATA.read_text(encoding="utf-8").split("\n") if line]
    draw = random.Random(42)
    for number in range(count):
        row = lines[number % len(lines)]
        question = row["question"].split(" ")
        if number >= len(lines):
            draw.shuffle(question)
        turns = (("user", f"{number}: {' '.join(question)}"), ("assistant", row["answer"]))
        yield {"messages": [{"role": role, "content": content} for role, content in turns]}


def write(path: Path, count: int | None = None, size: int | None = None) -> int:
    """Write `count` rows, or rows totalling `size` bytes; returns the number of rows."""
    written, made = 0, 0
    with path.open("w", encoding="utf-8") as handle:
        for row in rows(count if count is not None else sys.maxsize):
            written += handle.write(json.dumps(row) + "\n")
            made += 1
            if size is not None and written >= size:
                break
    return made


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds of a command, and its peak memory in bytes, including children."""
    begun, peak = time.perf_counter(), 0
    process = subprocess.Popen(command)
    while process.poll() is None:
        peak = max(peak, _memory(psutil.Process(process.pid)))
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return time.perf_counter() - begun, peak


def _memory(process: psutil.Process) -> int:
    total = 0
    try:
        for each in (process, *process.children(recursive=True)):
            total += each.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return total
    return total


def ours(folder: Path, name: str) -> list[str]:
    recipe = folder / f"{name}.yaml"
    data = f"{{train: {name}.jsonl, on_bad_row: reject, workers: {os.cpu_count()}}}"
    recipe.write_text(f"model: smollm2-135m-instruct\ndata: {data}\n", encoding="utf-8")
    return [sys.executable, "-m", "tunesmith", "prepare", str(recipe), "--run", str(folder / f"run-{name}")]


def theirs(folder: Path, name: str) -> list[str]:
    return [sys.executable, __file__, "--side", str(folder / f"{name}.jsonl")]


def side(path: Path) -> None:
    """TRL's preparation of a file, with a tiny random model."""
    os.environ["HF_DATASETS_CACHE"] = str(path.parent / f"cache-{path.stem}")
    import torch
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from tunesmith.models.load import load_tokenizer, locate

    tokenizer = load_tokenizer(locate("smollm2-135m-instruct"))
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
    )
    torch.manual_seed(0)
    data = load_dataset("json", data_files=str(path), split="train")
    asked = SFTConfig(
        output_dir=str(path.parent / "out"),
        assistant_only_loss=True,
        max_length=2048,
        dataset_num_proc=os.cpu_count(),
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    made = SFTTrainer(LlamaForCausalLM(config), asked, train_dataset=data, processing_class=tokenizer)
    labels = made.train_dataset[0]["labels"]
    if not any(label == -100 for label in labels) or all(label == -100 for label in labels):
        raise SystemExit("TRL did not mask all but the answers: not the same work")


def compared(folder: Path, rows: int, turns: int) -> dict[str, list[float]]:
    """Rows per second of both sides, in turns, on the same file."""
    rates: dict[str, list[float]] = {"tunesmith": [], "trl": []}
    for _ in range(turns):
        for who, command in (("tunesmith", ours), ("trl", theirs)):
            few, many = timed(command(folder, "few"))[0], timed(command(folder, "many"))[0]
            rates[who].append((rows - FEW) / (many - few))
            for old in folder.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
    return rates


def main() -> None:
    asked = parser(__doc__ or "")
    asked.add_argument("--rows", type=int, default=100_000, help="rows for the speed")
    asked.add_argument("--turns", type=int, default=2, help="how often each side is timed")
    asked.add_argument("--stream-bytes", type=int, default=200_000_000, help="size of the file for the memory")
    asked.add_argument("--only", choices=("speed", "stream"), help="one of the two parts; the others' figures stay in the file")
    asked.add_argument("--side", type=Path, help="run TRL's side on this file alone")
    options = asked.parse_args()
    if options.side is not None:
        side(options.side)
        return
    claims: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.only != "stream":
            for part, count in (("few", FEW), ("many", options.rows)):
                write(folder / f"{part}.jsonl", count)
            rates = compared(folder, options.rows, options.turns)
            ratios = [one / other for one, other in zip(rates["tunesmith"], rates["trl"], strict=True)]
            claims.append(claim("rows_per_second_ratio_to_trl", statistics.median(ratios), "ratio"))
            found.append({"part": "speed", "rows": options.rows, "rows_per_second": rates})
        if options.only != "speed":
            size = options.stream_bytes
            count = write(folder / "stream.jsonl", size=size)
            took, peak = timed(ours(folder, "stream"))
            two = "peak_rss_bytes_2gb_stream" if size >= 2_000_000_000 else "peak_rss_bytes_smaller_stream"
            claims.append(claim(two, peak, "bytes"))
            found.append({"part": "stream", "bytes": size, "rows": count, "seconds": took, "peak_rss_bytes": peak})
    report(options.json, *merged(options.json, claims, found))


if __name__ == "__main__":
    main()
