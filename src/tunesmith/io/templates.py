"""The environment for a user's templates and expressions: sandboxed, and operators cannot exhaust memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

LARGEST_BITS = 1 << 16  # bits of a number
LONGEST = 10_000_000  # length of a text or a list


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Raises jinja2's SecurityError if a product or a power is larger than any template needs.

    A power is a single call into C, which no time limit interrupts: `9 ** (9 ** 9)` runs for minutes.
    """

    intercepted_binops = frozenset({"**", "*"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Run an intercepted operation if its result is small enough."""
        if (_power_bits(left, right) if operator == "**" else _product_bits(left, right)) > LARGEST_BITS:
            raise SecurityError(f"the result of {operator} is too large")
        if operator == "*" and max(_length(left, right), _length(right, left)) > LONGEST:
            raise SecurityError(f"the result of {operator} is too long")
        return super().call_binop(context, operator, left, right)


def _power_bits(base: Any, exponent: Any) -> int:
    """An upper bound on the bits of a power of integers; 0 for other numbers, which have a fixed size."""
    if not isinstance(base, int) or not isinstance(exponent, int) or abs(base) <= 1:
        return 0
    return base.bit_length() * max(exponent, 0)


def _product_bits(left: Any, right: Any) -> int:
    return left.bit_length() + right.bit_length() if isinstance(left, int) and isinstance(right, int) else 0


def _length(repeated: Any, times: Any) -> int:
    """The length of a repeated text or list; 0 if the operands do not repeat a sequence."""
    return len(repeated) * max(times, 0) if isinstance(repeated, Sequence) and isinstance(times, int) else 0
