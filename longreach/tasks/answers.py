"""Reading what a model gave as its answer: the answer alone, dressed in the few ways that models dress it.

    bare_answer("The answer is $\\boxed{1,776}$.")     "1,776"
    read_number("1,776")                               Fraction(1776)

Accepted around an answer: white space, `$…$`, `\\boxed{…}`, `\\text{…}`, `**…**`, backquotes, a leading `=`, a leading
"Answer:" or "The (final) answer is", a full stop at the end. Nothing else: a right number somewhere in a longer text is no
answer.
"""

from __future__ import annotations

import re
from fractions import Fraction

MOST_CHARACTERS = 200
"""An answer with more is not looked at: no task that uses these has one so long."""

_LEAD = re.compile(r"(?:(?:the\s+)?(?:final\s+)?answer\s*(?:is|:)\s*:?|=)\s*", re.IGNORECASE)
_WRAPPERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("\\boxed{", "}"), ("**", "**"), ("`", "`"))
_SPACES = " \u00a0\u2009\u202f"
_ROMAN = re.compile(r"\\(?:text|mathrm)\{([^{}]*)\}")
_NUMBER = re.compile(
    rf"([+-]?)([0-9]{{1,40}}|[0-9]{{1,3}}(?:,[0-9]{{3}}){{1,12}}|[0-9]{{1,3}}(?:[{_SPACES}][0-9]{{3}}){{1,12}})"
    r"(\.[0-9]{1,40})?"
)


def bare_answer(text: str) -> str:
    """The answer without what may stand around it; the text itself, stripped, where it is something else."""
    text = text.strip()
    if len(text) > MOST_CHARACTERS:
        return text
    text = _ROMAN.sub(r"\1", text)
    while True:
        before = text
        if lead := _LEAD.match(text):
            text = text[lead.end() :]
        for left, right in _WRAPPERS:
            inner = text[len(left) : -len(right)]
            if len(text) > len(left) + len(right) and text.startswith(left) and text.endswith(right):
                text = inner if left not in inner and right not in inner else text
        text = (text[:-1] if text.endswith(".") else text).strip()
        if text == before:
            return text


def read_number(text: str) -> Fraction | None:
    """A decimal number, perhaps with a sign and with thousands set apart by commas or spaces; None for anything else."""
    found = _NUMBER.fullmatch(text.strip().replace("\u2212", "-"))
    if found is None:
        return None
    sign, whole, decimals = found.groups()
    return Fraction(sign + re.sub(f"[,{_SPACES}]", "", whole) + (decimals or ""))


def shortened(text: str, limit: int = 60) -> str:
    """For a line that says what was answered."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
