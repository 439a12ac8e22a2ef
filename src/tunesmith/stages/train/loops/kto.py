"""KTO with TRL's trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl import KTOConfig, KTOTrainer

from tunesmith.recipe import KtoSection
from tunesmith.stages.train.loops.trl import TrlLoop, Watched, labelled_span


class _Kto(Watched, KTOTrainer):  # type: ignore[misc] # TRL is untyped here
    def _prepare_dataset(self, dataset: Any, _processing_class: Any, args: Any, *_: Any) -> Any:
        """The unchanged rows, each with its neighbour's answer in the micro-batch, as TRL pairs them for the KL term."""

        def paired(rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
            answers = rows["completion_ids"]
            return {"KL_completion_ids": [answers[-1], *answers[:-1]]}

        return dataset.map(paired, batched=True, batch_size=args.per_device_train_batch_size)


class Kto(TrlLoop):
    """Answers judged one by one."""

    def trainer(self, arguments: Mapping[str, Any], **more: Any) -> Any:
        asked = self.run.recipe.own(KtoSection)
        weights = {"desirable_weight": asked.desirable_weight, "undesirable_weight": asked.undesirable_weight}
        config = KTOConfig(**arguments, beta=asked.beta, **weights, max_length=None)
        rows = judged_rows(self.rows, self.work.settings.seed)
        return _Kto(args=config, train_dataset=rows, ref_model=self.work.method.reference(), **more)


def judged_rows(rows: Any, seed: int) -> Any:
    """Prompt and completion ids with labels, in a seeded order: KTO's trainer takes rows in the order given."""

    def split(row: Mapping[str, Any]) -> dict[str, Any]:
        first, end = labelled_span(row["loss_mask"])
        return {"prompt_ids": row["input_ids"][:first], "completion_ids": row["input_ids"][first:end]}

    return rows.map(split, remove_columns=[name for name in rows.column_names if name != "label"]).shuffle(seed=seed)


LOOP = Kto
