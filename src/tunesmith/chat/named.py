"""Chat templates that a recipe can select by name, as published for their model families.

    chatml    OpenAI's ChatML; also SmolLM2, Yi, Hermes
    qwen      Qwen 2.5: ChatML with its default system turn and tool calls
    llama2    Llama 2 Chat; the system turn is placed inside the first question
    llama3    Llama 3
    chatglm   GLM-4; it has no end of turn, so the tokenizer's eos is added after the last answer
    mistral   Mistral 7B Instruct v0.3; the system turn is placed before the first question
    gemma     Gemma 1 to 3; same as mistral
    phi       Phi-3

Templates that merge the system turn into the first question require user and assistant turns to alternate.
"""

from __future__ import annotations

from importlib import resources


def named_template(name: str) -> str:
    """The Jinja source of one of `tunesmith.recipe.NAMED_TEMPLATES`."""
    return (resources.files("tunesmith.chat") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
