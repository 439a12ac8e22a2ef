"""Cleaning repairs damaged text and does not touch meaningful text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.quality.clean import clean
from tunesmith.recipe import CleanSection

ALL = CleanSection()


def cleaned(text: str, switches: CleanSection = ALL) -> tuple[str, dict[str, str]]:
    messages, findings = clean([{"role": "user", "content": text}], switches)
    assert all(finding.action == "fix" for finding in findings)
    return messages[0]["content"], {finding.rule: finding.detail for finding in findings}


@pytest.mark.parametrize(
    ("rule", "before", "after"),
    [
        ("html", "<p>Hello <b>you</b></p><p>Bye &amp; out</p>", "Hello you\n\nBye & out"),
        ("html", "<p>Do</p><pre><code>if a &lt; 1:\n    b()</code></pre>", "Do\n\n```\nif a < 1:\n    b()\n```"),
        ("html", "<ul><li>one</li><li>call <code>f()</code></li></ul>", "- one\n- call `f()`"),
        ("mojibake", "schÃ¶n â€” sâ€™il", "schön — s’il"),
        ("control", "a\x00b \x1b[31mred\x1b[0m\x0cnext", "ab red\nnext"),
        ("zero_width", "pass\u200bword \ufeffx\u00ady z\u200db", "password xy zb"),
        ("zero_width", "left\u202eright", "leftright"),
        ("unicode", "cafe\u0301", "caf\u00e9"),
        ("whitespace", "\n a \r\nb\n\n\n\n\nc  \n", " a\nb\n\n\nc"),
    ],
)
def test_each_rule_mends_is_counted_and_can_be_switched_off(rule: str, before: str, after: str) -> None:
    assert cleaned(before)[0] == after
    assert f"clean-{rule.replace('_', '-')}" in cleaned(before)[1]
    assert cleaned(before, ALL.model_copy(update={rule: False}))[0] != after


KEPT = {
    "fenced code": "See:\n```py\nx = 'Ã©'\u200b   \n\n\n\n\n\nprint('cafe\u0301\x07')\n```",
    "an open fence": "```\na \u200b \n\n\n\n\n\nb\x00",
    "code beside prose": "Write `a\u200bb` and ``c`\u200bd`` here, or `e`.",
    "JSON": '{"a": "x\u200b\u202e", "b":   [1,  2], "html": "<p>x</p>"}',
    "maths": "$a\u2061b = cafe\u0301$ and \\[ x \\quad y\u200b \\] or $$e^{i\\pi}$$",
    "invisible operators": "f\u2061(x) = 2\u2062x",
    "an emoji family": "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \u2764\ufe0f\u200d\U0001f525",
    "a flag of tags": "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
    "Persian": "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 PDF\u200c\u0647\u0627",
    "Hindi and Sinhala": "\u0915\u094d\u200d\u0937 \u0dc1\u0dca\u200d\u0dbb\u0dd3",
    "Hebrew with marks of direction": "\u05e9\u05dc\u05d5\u05dd \u200f(abc)\u200e \u2067x\u2069",
    "Thai and Khmer breaks": "\u0e20\u0e32\u0e29\u0e32\u200b\u0e44\u0e17\u0e22 \u1797\u17b6\u179f\u17b6\u200b\u1781",
    "compatibility forms": "x\u00b2 \ufb01 \u2460 \uff21 \u00bd\u00a0\u20ac",
    "a Markdown line break": "one  \ntwo",
    "indentation and tabs": "  a\n\tb\tc\n    d   e",
    "tags that are not HTML": "<think>a</think><p>x</p>",
    "a page of code": "<html><body><p>x</p></body></html>",
    "a word in brackets": "Use <p> for paragraphs, a < b > c",
    "entities": "AT&amp;T",
}


@pytest.mark.parametrize("name", KEPT)
def test_what_has_a_meaning_is_not_touched(name: str) -> None:
    assert cleaned(KEPT[name]) == (KEPT[name], {})


def test_rows_about_html_keep_their_markup() -> None:
    row = [{"role": "user", "content": "Write this as HTML."}, {"role": "assistant", "content": "<p>Hello</p>"}]
    assert clean(row, ALL) == (row, [])


def test_given_messages_stay_and_other_keys_are_kept() -> None:
    row = [{"role": "user", "content": "a\u200bb", "name": "x"}, {"role": "assistant", "content": None}]
    messages, findings = clean(row, ALL)
    assert row[0]["content"] == "a\u200bb"
    assert messages == [{"role": "user", "content": "ab", "name": "x"}, {"role": "assistant", "content": None}]
    assert [finding.detail for finding in findings] == ["1 in turn 1"]


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters() | st.sampled_from("`$\\[]()<>p/\n \u200b\u200d\x00"), max_size=60))
def test_anything_is_cleaned_once_and_for_all(text: str) -> None:
    once = cleaned(text, ALL.model_copy(update={"html": False, "mojibake": False}))[0]
    assert cleaned(once, ALL.model_copy(update={"html": False, "mojibake": False}))[0].strip() == once.strip()
    cleaned(text)
