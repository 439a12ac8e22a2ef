"""Named chat templates: their text, their loss mask, and the probe's result for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.chat.named import named_template
from tunesmith.chat.probe import probe
from tunesmith.chat.template import ChatTemplate, Encoded
from tunesmith.recipe import NAMED_TEMPLATES

TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
]

#: According to each family's model cards.
RENDERED = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
    "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n",
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST] A2 </s>",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n"
    "Q1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "Q2<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA2<|eot_id|>",
    "chatglm": "[gMASK]<sop><|system|>\nS<|user|>\nQ1<|assistant|>\nA1<|user|>\nQ2<|assistant|>\nA2",
    "mistral": "<s>[INST] S\n\nQ1[/INST] A1</s>[INST] Q2[/INST] A2</s>",
    "gemma": "<bos><start_of_turn>user\nS\n\nQ1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n"
    "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\nA2<end_of_turn>\n",
    "phi": "<|system|>\nS<|end|>\n<|user|>\nQ1<|end|>\n<|assistant|>\nA1<|end|>\n"
    "<|user|>\nQ2<|end|>\n<|assistant|>\nA2<|end|>\n",
}
DROPPING = "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
RENDERED["qwen"] = RENDERED["chatml"]


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_rendering_and_mask(tokenizer: Any, name: str) -> None:
    template = ChatTemplate(tokenizer, named_template(name), name)
    assert template.render(TALK) == RENDERED[name]
    (row,) = template.encode([TALK])
    assert isinstance(row, Encoded)
    trained = tokenizer.decode([i for i, flag in zip(row.input_ids, row.loss_mask, strict=True) if flag])
    assert "A1" in trained
    assert "A2" in trained
    assert "Q" not in trained
    assert template.render(TALK[:-1], add_generation_prompt=True) == RENDERED[name][
        : len(RENDERED[name].rpartition("A2")[0])
    ].rstrip(" ")


def test_qwen_renders_as_its_own_template(shared_data: Path, tokenizer: Any) -> None:
    own = (shared_data / "templates" / "llamacpp" / "Qwen-Qwen2.5-7B-Instruct.jinja").read_text(encoding="utf-8")
    theirs, ours = ChatTemplate(tokenizer, own), ChatTemplate(tokenizer, named_template("qwen"))
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    asked = [
        {"role": "user", "content": "Rain?", "tools": tools},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "sun"},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Both."},
    ]
    for messages in (TALK, TALK[1:], asked):
        assert ours.render(messages) == theirs.render(messages)
    (row,) = ours.encode([asked])
    assert isinstance(row, Encoded)
    assert tokenizer.decode(row.input_ids) == theirs.render(asked)


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        (named_template("llama3"), "template-token-mismatch"),
        (named_template("chatglm"), "missing-end-of-turn"),
        (
            "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
            "system-dropped",
        ),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}",
            "system-refused",
        ),
    ],
)
def test_what_is_wrong_is_found(tokenizer: Any, source: str, rule: str) -> None:
    assert rule in {finding["rule"] for finding in probe(ChatTemplate(tokenizer, source))["findings"]}


def test_double_bos_is_found(tokenizer: Any) -> None:
    import copy

    from tokenizers.processors import TemplateProcessing

    theirs = copy.deepcopy(tokenizer)
    bos = theirs.bos_token
    theirs.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, theirs.bos_token_id)]
    )
    found = [
        {each["rule"] for each in probe(ChatTemplate(each, named_template("chatml")))["findings"]}
        for each in (tokenizer, theirs)
    ]
    assert ["double-bos" in rules for rules in found] == [False, True]


def test_digest_follows_the_template(tokenizer: Any) -> None:
    digests = {probe(ChatTemplate(tokenizer, named_template(name)))["digest"] for name in NAMED_TEMPLATES}
    assert len(digests) == len(NAMED_TEMPLATES)
    assert probe(ChatTemplate(tokenizer, named_template("phi")))["digest"] in digests
