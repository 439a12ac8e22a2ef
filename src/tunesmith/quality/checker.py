"""All checks of one row, in order: hidden text in the raw row, cleaning, screening, then the answers.

Documents (raw text) are only screened.
"""

from __future__ import annotations

from tunesmith.quality.clean import clean
from tunesmith.quality.findings import Finding, Message
from tunesmith.quality.rules import ROW_RULES, merged_turns
from tunesmith.quality.screening import BEFORE_CLEANING, SCREENED, screen
from tunesmith.recipe import QUALITY, SCREENING, DataSection, settled


class Checker:
    """Cleans and checks rows one by one. Cheap to build; each worker process builds one from the recipe's data section."""

    def __init__(self, data: DataSection) -> None:
        self._clean = data.clean
        self._screening = settled(data.screening, SCREENING)
        self._quality = settled(data.quality, QUALITY)

    def check(self, messages: list[Message]) -> tuple[list[Message], list[Finding]]:
        """The cleaned messages, and the findings for this row alone; the given messages are not modified.

        A finding with action `reject` asks the caller to drop the row; with `fix`, the returned messages contain the fix.
        """
        _, findings = screen(messages, self._screening, BEFORE_CLEANING)
        checked, cleaned = clean(messages, self._clean)
        checked, screened = screen(checked, self._screening, SCREENED)
        findings += cleaned + screened
        for rule, look in ROW_RULES.items():
            action = self._quality.get(rule)
            if action is not None and (detail := look(checked)) is not None:
                findings.append(Finding(rule, action, detail))
                if action == "fix":
                    checked = merged_turns(checked)
        return checked, findings

    def screen_text(self, text: str) -> tuple[str, list[Finding]]:
        """The screened text and its findings, for text outside conversations: no cleaning, no rules on answers."""
        (screened,), findings = screen([{"content": text}], self._screening, (*BEFORE_CLEANING, *SCREENED))
        return screened["content"], findings
