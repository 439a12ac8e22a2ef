"""ORPO with TRL's trainer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tunesmith.recipe import OrpoSection
from tunesmith.stages.train.loops.trl import TrlLoop, Watched, labelled_span

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # it is in trl.experimental; the page on objectives says so
from trl.experimental.orpo import ORPOConfig, ORPOTrainer


class _Orpo(Watched, ORPOTrainer):  # type: ignore[misc] # TRL is untyped here
    def tokenize_row(self, feature: Mapping[str, Any], *_: Any) -> dict[str, Any]:
        """The unchanged row: it already holds token ids."""
        return dict(feature)


class Orpo(TrlLoop):
    """Pairs of answers, without a reference."""

    def trainer(self, arguments: Mapping[str, Any], **more: Any) -> Any:
        recipe = self.run.recipe
        length, beta = recipe.data.max_length, recipe.own(OrpoSection).beta
        config = ORPOConfig(**arguments, beta=beta, max_length=length, remove_unused_columns=False)
        return _Orpo(args=config, train_dataset=orpo_rows(self.rows), **more)


def orpo_rows(rows: Any) -> Any:
    """The columns that TRL's pair collator pads: ids, masks and labels of both sides."""

    def made(row: Mapping[str, Any]) -> dict[str, Any]:
        first = labelled_span(row["loss_mask"])[0]
        prompt = row["input_ids"][:first]
        found: dict[str, Any] = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side, prefix in (("chosen", ""), ("rejected", "rejected_")):
            begin, end = labelled_span(row[f"{prefix}loss_mask"])
            ids = row[f"{prefix}input_ids"][:end]
            found |= {f"{side}_input_ids": ids, f"{side}_attention_mask": [1] * end}
            found[f"{side}_labels"] = [-100] * begin + ids[begin:]
        return found

    return rows.map(made, remove_columns=rows.column_names)


LOOP = Orpo
