"""The demo's input: a seeded support-desk data set (`supportdesk`) and its recipe (`write_input`)."""

from __future__ import annotations

from pathlib import Path

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
    """Write train.jsonl, test.jsonl, schema.json and recipe.yaml into `folder`; returns the recipe's path.

    Raises RunError if something else is already there.
    """
    from tunesmith.demo import supportdesk
    from tunesmith.io.atomic import commit_folder, write_json, write_jsonl, write_text

    train, test = supportdesk.generate(train_rows, test_rows, SEED)
    with commit_folder(folder, "demo-input") as target:
        write_jsonl(target / "train.jsonl", train)
        write_jsonl(target / "test.jsonl", test)
        write_json(target / "schema.json", supportdesk.SCHEMA)
        write_text(target / "recipe.yaml", RECIPE.format(max_rows=max_rows))
    return folder / "recipe.yaml"
