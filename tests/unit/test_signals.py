"""Code that does not finish is stopped, and the process is left unchanged."""

from __future__ import annotations

import json
import pickle
import signal

import pytest

from tunesmith.errors import ModelError, Problem, StoppedError, TrainError, TunesmithError, error_as_json, error_of_json
from tunesmith.io.signals import TooLongError, cpu_limit
from tunesmith.stages.train.finite import NotFiniteError


def endless() -> None:
    while True:
        pass


def test_what_takes_too_long_is_ended() -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(TooLongError, match=r"more than 0\.05 s"), cpu_limit(0.05):
        endless()
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_what_ends_in_time_is_left_alone() -> None:
    with cpu_limit(0.2):
        total = sum(range(1000))
    assert total == 499500
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_errors_of_another_process_keep_their_problems() -> None:
    error = ModelError([Problem("TS202", "what", "where", "why", "fix"), Problem("TS203", "what", "where", "why", "fix")])
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - as between processes
    assert type(again) is ModelError
    assert again.problems == error.problems
    stopped = pickle.loads(pickle.dumps(StoppedError(143)))  # noqa: S301
    assert (type(stopped), stopped.exit_code, str(stopped)) == (StoppedError, 143, "stopped by SIGTERM")


@pytest.mark.parametrize("kind", [ModelError, NotFiniteError])
def test_errors_of_a_process_of_its_own_are_raised_again(kind: type[TunesmithError]) -> None:
    """Passed as JSON; an error class defined elsewhere is raised as its base class from this tree."""
    problem = Problem("TS301", "what", "where", "why", "fix")
    error = ModelError(problem) if kind is ModelError else NotFiniteError(3, 1.0, 2.0)
    again = error_of_json(json.loads(json.dumps(error_as_json(error))))
    assert type(again) is (ModelError if kind is ModelError else TrainError)
    assert again.problems == error.problems
