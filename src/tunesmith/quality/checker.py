"""All checks of one row, in their order: hidden text as it came, cleaning, then what is left."""

from __future__ import annotations

from tunesmith.quality.findings import Finding, Message
from tunesmith.recipe import DataSection


class Checker:
    """Cleans and checks rows one by one. Cheap to build; a worker process builds its own from the recipe's data section."""

    def __init__(self, data: DataSection) -> None:
        self.data = data

    def check(self, messages: list[Message]) -> tuple[list[Message], list[Finding]]:
        """The cleaned messages, and the findings of this row alone; the given messages stay as they are.

        A finding with action `reject` asks the caller to leave the row out; with `fix`, the mending is in what is returned.
        """
        return messages, []
