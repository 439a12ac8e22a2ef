"""Heuristics for prompt injections and jailbreaks in English: weighted families of phrases; a sum of 1 is a finding.

The phrases were chosen on one part of a public collection of jailbreak prompts and measured on another (docs/data.md).
They find text worded like the attacks of 2023; new wordings, other languages and encodings are missed.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_LOOKED_AT = 20_000  # characters from the start, and the same number from the end


class _Family(NamedTuple):
    """Phrases of one kind with their joint weight, and stems: each phrase contains one (checking them first saves time)."""

    weight: float
    stems: tuple[str, ...]
    phrases: re.Pattern[str]

    def found(self, text: str, lower: str) -> bool:
        return any(stem in lower for stem in self.stems) and self.phrases.search(text) is not None


def _family(weight: float, stems: str, *phrases: str) -> _Family:
    return _Family(weight, tuple(stems.split("|")), re.compile("|".join(phrases), re.IGNORECASE))


_RULES = (
    r"(?:rules?|instructions?|prompts?|guidelines?|polic(?:y|ies)|restrictions?|limitations?|filters?|programming|directions?)"
)
#: Harmless texts match the last family most often; it is checked only if it decides the result.
_FAMILIES = (
    # Orders to forget earlier instructions.
    _family(
        1,
        "ignore|disregard|forget|override|bypass|drop|reveal|print|repeat|show|output",
        rf"\b(?:ignore|disregard|forget|override|bypass|drop)\b[^.!?\n]{{0,30}}\b(?:all|any|previous|prior|above"
        rf"|earlier|your|the)\b[^.!?\n]{{0,30}}\b{_RULES}\b",
        r"\b(?:reveal|print|repeat|show|output)\b[^.!?\n]{0,20}\b(?:your|the)\b[^.!?\n]{0,12}\b(?:system|initial|hidden)"
        r" (?:prompt|instructions?|message)",
    ),
    # Names and phrases of known jailbreaks.
    _family(
        1,
        "do anything now|jailbr|jail br| mode|stands for|acronym|short for|unfiltered|uncensored|amoral|"
        "unrestricted|ethical|moral|safety|legal|content|broken free|stay in character",
        r"\bdo anything now\b",
        r"\bDAN mode\b",
        r"\bjail ?br(?:eak|oken)\b",
        r"\b(?:developer|god|sudo|evil|opposite) mode\b",
        r"\b(?:AIM|STAN|DUDE|UCAR|BetterDAN|AntiGPT|NsfwGPT|ChadGPT)\b.{0,60}\b(?:stands for|acronym|short"
        r" for|unfiltered|amoral)",
        r"\b(?:unfiltered|uncensored|amoral|unrestricted|unethical)\b.{0,40}\b(?:AI|bot|chatbot|assistant"
        r"|model|character|response|answer)s?\b",
        r"\b(?:no|without|free (?:from|of)|none of)\b.{0,25}\b(?:ethical|moral|safety|legal|content)\b.{0,25}"
        r"\b(?:guidelines?|restrictions?|limitations?|constraints?|boundaries|rules?|filters?|polic(?:y|ies))\b",
        r"\bbroken free\b.{0,40}\bconfines\b",
        r"\bstay in character\b.{0,120}\b(?:token|stop|break|remind)",
    ),
    # Disregard of rules set by the model's developer.
    _family(
        0.6,
        "abid|adher|bound|follow|restrict|limit|comply|care about|concerned|openai|refuse|reject|decline|"
        "say no|legal|ethical|immoral|harmful|dangerous|offensive|explicit|nsfw|acceptable",
        rf"\b(?:not|never|without|don['\u2019]?t|no longer)\b.{{0,30}}\b(?:abide|adher|bound|follow|restrict"
        rf"|limit|comply|care about|concerned)\w*"
        rf".{{0,40}}\b(?:{_RULES}|openai|ethics|ethical|morals?|laws?|legal)\b",
        r"\bopenai(?:['\u2019]s)?\b.{0,25}\b(?:polic|guideline|rule|restrict|filter|content)",
        r"\b(?:never|must not|cannot|can['\u2019]t|not|don['\u2019]?t)\b.{0,20}\b(?:refuse|reject|decline|say no)\b",
        r"\b(?:illegal|unethical|immoral|harmful|dangerous|offensive|explicit|nsfw)\b.{0,60}\b(?:allowed|fine"
        r"|okay|acceptable|regardless|no matter)",
        r"\b(?:regardless|no matter how)\b.{0,40}\b(?:illegal|unethical|immoral|harmful|offensive|dangerous)",
    ),
    # Demands on the form of the answer: give it twice, start with a name, or do not mention being a machine.
    _family(
        0.5,
        "ways|responses|answers|paragraphs|[|(classic|(normal|(gpt|\U0001f513|\U0001f512|as an ai|never|"
        "disclaimer|warning|prompt|question|request|command|{|chatgpt|chat gpt|language model|openai",
        r"\b(?:two|2|both) (?:different )?(?:ways|responses|answers|paragraphs)\b",
        r"\[[A-Z][\w -]{1,24}\]:|\((?:classic|normal|gpt)\)|\U0001f513|\U0001f512",
        r"\bas an ai (?:language )?model\b",
        r"\bnever (?:say|mention|use|warn|apologi[sz]e|break)\b",
        r"\b(?:disclaimers?|warnings?)\b",
        r"\b(?:insert|my first) (?:prompt|question|request|command)\b|\bfirst (?:request|question|prompt"
        r"|command) is\b|\{\{?(?:prompt|query|question)\}?\}",
        r"\b(?:chat ?gpt|language model|openai)\b",
    ),
    # Role play.
    _family(
        0.5,
        "act |act\n|as|like|pretend|role|immerse|you are|from now on|henceforth|character|you will|you must|"
        "you should|you can|hypothetical|persona",
        r"\b(?:act|behave|respond|answer|reply|talk|speak|write) (?:only )?(?:as|like)\b",
        r"\bpretend\b",
        r"\brole[- ]?play",
        r"\bimmerse yourself\b",
        r"\byou are (?:now|going to|about to)\b",
        r"\b(?:from now on|henceforth)\b",
        r"\b(?:stay|remain|break) (?:in |out of )?character\b",
        r"\byou (?:will|must|should|can) (?:always|never|only)\b",
        r"\bhypothetical (?:story|response|scenario)\b",
        r"\bin the role of\b|\btake on the (?:role|persona)\b|\bpersona\b",
    ),
)


def injection_score(text: str) -> float:
    """Sum of the weights of the matching families, computed until it is decided: 1 or more is a finding."""
    if len(text) > 2 * _LOOKED_AT:
        text = text[:_LOOKED_AT] + "\n" + text[-_LOOKED_AT:]
    lower, score, left = text.lower(), 0.0, sum(family.weight for family in _FAMILIES)
    for family in _FAMILIES:
        left -= family.weight
        score += family.weight * family.found(text, lower)
        if score >= 1 or score + left < 1:
            break
    return score
