"""Queries an OpenAI-compatible endpoint: concurrent requests, within a budget, and none sent twice."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import AugmentError, Problem
from tunesmith.io.atomic import append_jsonl, foreign, sha256_json
from tunesmith.recipe import AugmentSection

_TIMEOUT = 120.0  # seconds for one answer
_ENTRY = '{"key": '  # start of every line of the cache
_REPLY = 1024  # maximum tokens per answer


@dataclass(frozen=True)
class Question:
    """One request: its messages, and a number that distinguishes otherwise equal requests."""

    messages: tuple[tuple[str, str], ...]
    number: int

    def key(self, settings: AugmentSection) -> str:
        """Digest of everything the answer depends on."""
        return sha256_json([settings.model, settings.temperature, self.messages, self.number])


class Cache:
    """Answers on disk, one per line, each written as soon as it arrives; a torn line is requested again.

    Raises RunError if the file is something else.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.answers, self.tokens = path, dict[str, str](), 0
        self._lock = threading.Lock()
        if path.exists() and not path.is_file():
            raise foreign(path, "it is not a file")
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                self.answers[entry["key"]] = entry["text"]
                self.tokens += entry["tokens"]
            except (ValueError, TypeError, KeyError) as error:
                if line and not (line.startswith(_ENTRY) or _ENTRY.startswith(line)):
                    raise foreign(path, f"line {number} is not a cached answer") from error
        if lines and lines[-1]:
            with path.open("ab") as handle:
                handle.write(b"\n")

    def put(self, key: str, text: str, tokens: int) -> None:
        """Store an answer."""
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_jsonl(self.path, {"key": key, "text": text, "tokens": tokens})
            self.answers[key] = text
            self.tokens += tokens


def make_client(settings: AugmentSection) -> Any:
    """The client of the endpoint. Raises AugmentError if none is configured or the package is not installed."""
    why = "paraphrases come from a model behind an endpoint"
    if settings.base_url is None or settings.model is None:
        fix = "set augment.base_url and augment.model"
        raise AugmentError(Problem("TS140", "no endpoint is configured", "augment", why, fix))
    try:
        import openai
    except ImportError as error:
        fix = "pip install 'tunesmith[augment]'"
        raise AugmentError(Problem("TS141", "the package openai is not installed", "augment", why, fix)) from error
    key = os.environ.get(settings.api_key_env) or "none"
    return openai.OpenAI(base_url=settings.base_url, api_key=key, timeout=_TIMEOUT, max_retries=settings.max_retries)


def ask_all(questions: Sequence[Question], settings: AugmentSection, cache: Cache) -> tuple[dict[Question, str], int]:
    """Answers by question, and the number of questions not sent because the budget was reached.

    Cached questions are not sent. Raises AugmentError as soon as a request fails for good; the cache keeps the answers so far.
    """
    by_key = {question.key(settings): question for question in questions}
    open_questions = [question for key, question in by_key.items() if key not in cache.answers]
    if open_questions:
        client = make_client(settings)
        waiting = iter(open_questions)
        with ThreadPoolExecutor(settings.concurrency) as pool:
            _work(pool, client, waiting, settings, cache)
    found = {question: cache.answers.get(question.key(settings)) for question in questions}
    answers = {question: text for question, text in found.items() if text is not None}
    return answers, len(questions) - len(answers)


def _work(
    pool: ThreadPoolExecutor,
    client: Any,
    waiting: Iterator[Question],
    settings: AugmentSection,
    cache: Cache,
) -> None:
    """Keep as many requests in flight as the settings allow, until all are answered or the budget is reached."""
    running: set[Future[None]] = set()
    try:
        while True:
            while len(running) < settings.concurrency and _within(settings, cache, len(running)):
                question = next(waiting, None)
                if question is None:
                    break
                running.add(pool.submit(_ask, client, question, settings, cache))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _within(settings: AugmentSection, cache: Cache, running: int) -> bool:
    return len(cache.answers) + running < settings.max_requests and cache.tokens < settings.max_tokens


def _ask(client: Any, question: Question, settings: AugmentSection, cache: Cache) -> None:
    import openai

    messages = [{"role": role, "content": content} for role, content in question.messages]
    try:
        reply = client.chat.completions.create(
            model=settings.model, messages=messages, temperature=settings.temperature, max_tokens=_REPLY
        )
    except openai.OpenAIError as error:
        why, fix = (
            "paraphrases cannot be made without it",
            "check augment.base_url, augment.model and the key, then run it again",
        )
        what = f"the endpoint failed: {str(error)[:300]}"
        raise AugmentError(Problem("TS142", what, str(settings.base_url), why, fix)) from error
    text = (reply.choices[0].message.content or "") if reply.choices else ""
    cache.put(question.key(settings), text, reply.usage.total_tokens if reply.usage else 0)
