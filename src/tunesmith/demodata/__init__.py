"""The demo's input: a support-desk data set made from a seed (`supportdesk`), and its recipe (`write_input`)."""

from __future__ import annotations

from pathlib import Path

from tunesmith.demodata import supportdesk
from tunesmith.io.atomic import write_json, write_jsonl, write_text

TRAIN_ROWS = 1_000
TEST_ROWS = 100
SEED = 7

RECIPE = """\
model: smollm2-135m-instruct
data:
  train: train.jsonl
  test: test.jsonl
  on_bad_row: reject
  max_rows: {max_rows}
lora:
  r: 16
train:
  num_train_epochs: 1
evaluate:
  json_schema: schema.json
  label: intent
  max_new_tokens: 48
  batch_size: 50
"""
MAX_ROWS = 384


def write_input(folder: Path, *, train_rows: int = TRAIN_ROWS, test_rows: int = TEST_ROWS, max_rows: int = MAX_ROWS) -> Path:
    """Write train.jsonl, test.jsonl, schema.json and recipe.yaml into `folder`; returns the recipe's path."""
    train, test = supportdesk.generate(train_rows, test_rows, SEED)
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "test.jsonl", test)
    write_json(folder / "schema.json", supportdesk.SCHEMA)
    write_text(folder / "recipe.yaml", RECIPE.format(max_rows=max_rows))
    return folder / "recipe.yaml"
