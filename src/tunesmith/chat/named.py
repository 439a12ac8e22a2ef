"""Chat templates that a recipe may name, in the published forms of their models' families.

    chatml    OpenAI's ChatML; also SmolLM2, Yi, Hermes
    qwen      Qwen 2.5: ChatML with its default system turn and tool calls
    llama2    Llama 2 Chat; the system turn stands inside the first question
    llama3    Llama 3
    chatglm   GLM-4; it ends no turns, so the tokenizer's eos is put after the last answer
    mistral   Mistral 7B Instruct v0.3; the system turn stands before the first question
    gemma     Gemma 1 to 3, likewise
    phi       Phi-3

Those that put the system turn into the first question want user and assistant to take turns.
"""

from __future__ import annotations

from importlib import resources


def named_template(name: str) -> str:
    """The Jinja source of one of `tunesmith.recipe.NAMED_TEMPLATES`."""
    return (resources.files("tunesmith.chat") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
