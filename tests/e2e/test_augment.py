"""Paraphrases, requested from a real HTTP server that implements the chat-completions protocol."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tunesmith.errors import AugmentError, DataError
from tunesmith.recipe import Recipe, parse_recipe
from tunesmith.stages.augment import augment
from tunesmith.stages.augment.stage import refusal

pytest.importorskip("openai", reason="the extra `augment` is not installed")


class Endpoint:
    """A server that answers with `reply` and counts requests; the first `failures` requests get status 503."""

    def __init__(self, reply: Callable[[str], str]) -> None:
        self.reply, self.failures, self.requests, self.at_once, self.most_at_once = reply, 0, 0, 0, 0
        self.bodies: list[dict[str, Any]] = []
        self.lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests += 1
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                    fails = outer.requests <= outer.failures
                    outer.bodies.append({**body, "path": self.path})
                barrier.wait(0.02)
                self._send(503 if fails else 200, body)
                with outer.lock:
                    outer.at_once -= 1

            def _send(self, status: int, body: dict[str, Any]) -> None:
                text = outer.reply(body["messages"][-1]["content"])
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
                usage = {"prompt_tokens": 60, "completion_tokens": 40, "total_tokens": 100}
                value = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
                data = json.dumps({**value, "usage": usage}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                """No logging."""

        barrier = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"


def reworded(question: str) -> str:
    """Other words, the same numbers."""
    number = "".join(filter(str.isdigit, question))
    return f"Could somebody please tell me what the hue of the object with label {number} happens to be today?"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint(reworded)
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def recipe(tmp_path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    monkeypatch.setenv("NO_PROXY", "*")

    def make(**settings: Any) -> Recipe:
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"Which colour is thing number {i}?"},
                    {"role": "assistant", "content": "red"},
                ]
            }
            for i in range(12)
        ]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        section = {"base_url": endpoint.url, "model": "some-model", **settings}
        text = f"model: m\ndata: {{train: train.jsonl, duplicates: {{threshold: 0.95}}}}\naugment: {json.dumps(section)}\n"
        return parse_recipe(text, "recipe.yaml", tmp_path).recipe

    return make


def run(recipe: Recipe) -> dict[str, Any]:
    return augment(recipe, Console(file=io.StringIO()))


def rows_of(recipe: Recipe) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(recipe.augment.out).read_text(encoding="utf-8").split("\n") if line]


def test_rows_are_made_marked_and_not_asked_for_twice(
    recipe: Callable[..., Recipe], endpoint: Endpoint, tmp_path: Path
) -> None:
    made = run(recipe())
    assert (made["parents"], made["requests"], made["rows"], made["not_asked"]) == (12, 12, 12, 0)
    rows = rows_of(recipe())
    assert [row["augmented_from"] for row in rows] == [f"{tmp_path / 'train.jsonl'}:{i}" for i in range(1, 13)]
    assert [turn["content"] for turn in rows[3]["messages"]] == [reworded("3"), "red"]
    assert {body["path"] for body in endpoint.bodies} == {"/v1/chat/completions"}
    assert {body["model"] for body in endpoint.bodies} == {"some-model"}
    before = endpoint.requests
    again = run(recipe())
    assert endpoint.requests == before == 12
    assert (again["requests"], again["from_cache"], rows_of(recipe())) == (0, 12, rows)
    assert run(recipe(temperature=0.5))["requests"] == 12


def test_requests_go_out_together_and_failures_are_tried_again(recipe: Callable[..., Recipe], endpoint: Endpoint) -> None:
    endpoint.failures = 3
    assert run(recipe(concurrency=4))["rows"] == 12
    assert endpoint.requests == 15
    assert 2 <= endpoint.most_at_once <= 4


@pytest.mark.parametrize(("limits", "expected"), [({"max_requests": 5}, 5), ({"max_tokens": 300, "concurrency": 1}, 3)])
def test_the_budget_holds_over_all_runs(recipe: Callable[..., Recipe], endpoint: Endpoint, limits: Any, expected: int) -> None:
    made = run(recipe(**limits))
    assert (endpoint.requests, made["requests"], made["not_asked"]) == (expected, expected, 12 - expected)
    assert run(recipe(**limits))["requests"] == 0
    assert endpoint.requests == expected
    assert run(recipe())["requests"] == 12 - expected


def test_bad_candidates_are_refused(recipe: Callable[..., Recipe], endpoint: Endpoint) -> None:
    endpoint.reply = lambda question: question
    assert run(recipe())["refused"] == {"duplicate": 12}
    endpoint.reply = lambda question: question[:0]
    assert run(recipe(temperature=0.1))["refused"] == {"empty": 12}


def test_what_a_question_must_keep() -> None:
    question, answer = "Please book a table for 4 people in Berlin on 12.5. for me.", '{"city": "Berlin", "people": 4}'
    assert refusal(question, answer, "I want a table in Berlin for 4 persons on 12.5., please do that.") is None
    assert refusal(question, answer, "I want a table in Berlin for four persons on 12.5., please.") == "lost-number"
    assert refusal(question, answer, "I want a table in the capital for 4 persons on 12.5., please.") == "lost-value"
    assert (
        refusal(question, answer, "Bitte einen Tisch in Berlin f\u00fcr 4 Leute am 12.5. f\u00fcr mich buchen.")
        == "other-language"
    )


def test_a_missing_endpoint_is_told(recipe: Callable[..., Recipe], endpoint: Endpoint) -> None:
    with pytest.raises(AugmentError, match=r"no endpoint is configured"):
        run(recipe(model=None))
    endpoint.failures = 99
    with pytest.raises(AugmentError, match=r"the endpoint failed"):
        run(recipe(max_retries=0))
    with pytest.raises(AugmentError, match=r"the endpoint failed"):
        run(recipe(base_url="http://127.0.0.1:9/v1", max_retries=0))
    assert not Path(recipe().augment.out).exists()


def test_rows_without_a_question_are_no_parents(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    made = recipe()
    (tmp_path / "train.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    with pytest.raises(DataError, match="no row has a question"):
        run(made)


def test_a_torn_line_of_the_cache_is_asked_again(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    run(recipe())
    cache = tmp_path / "augmented.jsonl.cache"
    cache.write_text(cache.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    assert run(recipe())["requests"] == 1
    assert run(recipe())["requests"] == 0
