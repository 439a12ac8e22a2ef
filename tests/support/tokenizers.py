"""Tokenizers of the tests' own."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

#: Words of two syllables.
VOCABULARY = [f"{a}{b}" for a in "bcdfghklmnprstvw" for b in ("ala", "eno", "iru", "oso", "uta", "aki", "ewi", "ofu")]


def small_tokenizer() -> Any:
    """Byte-level BPE trained on the words: it loads fast, and every stage loads it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    control = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=control, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([" ".join(VOCABULARY), "system user assistant answer question", '{"a":1}'] * 3, trainer)
    names = dict(zip(("bos_token", "eos_token"), control, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=control[1], chat_template=CHATML, **names)
