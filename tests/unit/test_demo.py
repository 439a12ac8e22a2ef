"""The demo's data: the same for the same seed, correct labels, no test row in the train rows."""

from __future__ import annotations

import json

from jsonschema import Draft202012Validator

from tunesmith.demo import supportdesk


def message(row: supportdesk.Row) -> str:
    return str(row["messages"][1]["content"])


def test_same_seed_same_rows() -> None:
    assert supportdesk.generate(50, 10, 1) == supportdesk.generate(50, 10, 1)
    assert supportdesk.generate(50, 10, 1) != supportdesk.generate(50, 10, 2)


def test_labels_can_be_read_off_the_message() -> None:
    _, rows = supportdesk.generate(4, 300, 3)
    validator = Draft202012Validator(supportdesk.SCHEMA)
    for row in rows:
        fields = json.loads(row["messages"][2]["content"])
        assert validator.is_valid(fields)
        text = message(row)
        assert any(name in text for name in supportdesk.PRODUCTS[fields["product"]])
        assert fields["order_id"] is None or fields["order_id"] in text
        cues = supportdesk.URGENCY[fields["urgency"]]
        assert any(cue in text for cue in cues)
        assert any(phrase.split("{p}")[0] in text for phrase in supportdesk.INTENTS[fields["intent"]])


def test_train_and_test_do_not_meet() -> None:
    train, test = supportdesk.generate(400, 100, 5)
    assert not {message(row) for row in test} & {message(row) for row in train}


def test_some_train_rows_are_dirty_and_test_rows_are_not() -> None:
    train, test = supportdesk.generate(400, 100, 5)
    assert sum("<p>" in message(row) for row in train) == 5
    assert sum(supportdesk.INJECTION in message(row) for row in train) == 5
    assert sum(row["messages"][2]["content"] == "" for row in train) == 5
    assert len(train) - len({json.dumps(row) for row in train}) == 5
    assert not any("<" in message(row) or supportdesk.INJECTION in message(row) for row in test)
