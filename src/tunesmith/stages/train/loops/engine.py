"""The engine's loop: SFT, continued pre-training and DPO on prefix trees, resumable after an interruption."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.errors import Problem, RecipeError
from tunesmith.runs import Run, prepared_rows
from tunesmith.stages.train.batches import step_batches
from tunesmith.stages.train.checkpoints import Checkpoints
from tunesmith.stages.train.engine import Engine
from tunesmith.stages.train.evaluation import NOTHING_SEEN, EvaluationCallback, mean_loss
from tunesmith.stages.train.finite import NotFiniteError, incident
from tunesmith.stages.train.loops.base import Loop, Work
from tunesmith.stages.train.losses import StepBatches, loss_of
from tunesmith.stages.train.recorder import Recorder
from tunesmith.stages.train.resume import Saver
from tunesmith.stages.train.signals import StopSignals
from tunesmith.stages.train.spikes import SpikeDetector


class EngineLoop(Loop):
    """Our own losses over rows that share prefixes."""

    batches: StepBatches
    checkpoints: Checkpoints
    evaluation: EvaluationCallback | None = None

    def __init__(self, run: Run, rows: Any, tokenizer: Any) -> None:
        super().__init__(run, rows, tokenizer)
        self.loss = loss_of(run.recipe)
        self.heldout = prepared_rows(run, "heldout")
        if run.recipe.train.eval_steps is not None and len(self.heldout) == 0:
            what, fix = "eval_steps, but no rows are held out", "raise data.heldout"
            raise RecipeError(Problem("TS008", what, "train", "there would be no held-out loss to compute", fix))

    def before(self, work: Work) -> float:
        longest = max(self.loss.lengths(self.rows))
        pad_id = self.tokenizer.pad_token_id
        self.batches = step_batches(self.loss, work.model, pad_id, longest, work.settings, work.tell)
        self.rows, seconds = self.loss.before(work.model, self.rows, self.batches, work.folder, work.console)
        if work.settings.eval_steps is not None:
            target = work.folder / "heldout"
            self.heldout, more = self.loss.before(work.model, self.heldout, self.batches, target, work.console)
            seconds += more
        work.ranks.agreed(None)  # all have found the savepoint
        return super().before(work) + seconds

    def train(self, recorder: Recorder) -> None:
        """Raises StoppedError if a signal stops it."""
        work, settings, earlier = self.work, self.work.settings, self.work.earlier
        with StopSignals() as signals:
            engine = Engine(
                self.loss,
                work.model,
                self.rows,
                self.batches,
                settings,
                recorder,
                scratch=work.scratch,
                tell=work.tell,
                ranks=work.ranks,
                resumed=earlier.saved,
            )
            self.checkpoints = Checkpoints(work.folder / "checkpoints", work.method, work.model, engine)
            self.checkpoints.go_on(earlier.of("checkpoint"))
            self.evaluation = self._evaluation(work, engine, earlier.of("evaluation"))
            spikes = SpikeDetector(settings, earlier, work.tell)
            spikes.go_on(earlier.of("spikes"))
            saver = Saver(settings, earlier, signals, work.ranks, lambda: self._state(spikes))
            recorder.on_step += [
                lambda step, _: spikes.after_step(engine, step),
                lambda step, steps: saver.after_step(engine, step.step, steps),
            ]
            try:
                engine.train()
            except NotFiniteError as error:
                raise incident_of(engine, error, work.folder) from error
            if saver.stopped_training:
                raise saver.stopped(engine.state.global_step, work.console)
        self._last_step = recorder.history[-1].step

    def save(self) -> Path:
        if self.evaluation is None:
            self.checkpoints.save(self._last_step)
        return self.checkpoints.kept()

    def facts(self) -> dict[str, Any]:
        """The figures about the held-out loss; empty if there was no evaluation."""
        if self.evaluation is None or self.evaluation.best is None:
            return {}
        return {
            "best_step": self.evaluation.best.step,
            "best_eval_loss": self.evaluation.best.eval_loss,
            "last_eval_loss": self.evaluation.history[-1].eval_loss,
            "stopped_early": self.evaluation.stopped,
            "seconds_evaluating": self.evaluation.seconds,
        }

    def _state(self, spikes: SpikeDetector) -> dict[str, Any]:
        """What a savepoint holds besides the engine's own state."""
        seen = self.evaluation and self.evaluation.as_dict()
        return {"checkpoint": self.checkpoints.name, "evaluation": seen, "spikes": spikes.as_dict()}

    def _evaluation(self, work: Work, engine: Engine, seen: Mapping[str, Any] | None) -> EvaluationCallback | None:
        """Evaluates the held-out rows every `eval_steps` steps, if set; this is excluded from the step timing.

        `seen` is the state from an earlier part of the training.
        """
        if work.settings.eval_steps is None:
            return None
        rows = list(self.heldout)

        def evaluate() -> float:
            begun = time.perf_counter()
            loss = mean_loss(self.loss, engine.model, rows, self.batches)
            engine.recorder.exclude_from_timing(time.perf_counter() - begun)
            return loss

        def save(step: int) -> None:
            begun = time.perf_counter()
            self.checkpoints.save(step)
            engine.recorder.exclude_from_timing(time.perf_counter() - begun)

        callback = EvaluationCallback(
            every=work.settings.eval_steps,
            patience=work.settings.early_stopping_patience,
            path=work.folder / "evals.jsonl",
            evaluate=evaluate,
            save=save,
            losses=engine.losses,
            tell=work.tell,
        )
        callback.go_on(seen or NOTHING_SEEN)
        engine.add_callback(callback)
        return callback


def incident_of(engine: Engine, error: NotFiniteError, folder: Path) -> NotFiniteError:
    """The error with an incident folder, which has the rows of the step that give a non-finite loss on their own."""
    own = [
        (row["where"], len(row["input_ids"]), mean_loss(engine.loss, engine.model, [row], engine.batches))
        for row in engine.step_rows
    ]
    return incident(
        folder,
        error,
        parameters=dict(engine.base.named_parameters()),
        rows=[row for each in engine.ranks.gathered(own) for row in each],
        steps=[step.as_dict() for step in engine.recorder.history],
        dtype=engine.settings.compute_dtype,
    )


LOOP = EngineLoop
