"""The three reasoning modes, and the text by which a prompt asks for them.

    without thinking    the answer follows `</think>` at once
    thinking, high      `<think>`, and for some weights a paragraph before the system text
    thinking, max       `<think>`, and a stronger paragraph

Which paragraph an effort means has changed with the weights, so it is chosen by their revision and not by a model's name:

    effort    preview (April 2026)    0731 (Flash-0731, Pro-0813)    none
    low       -                       -                              -
    high      -                       ABSOLUTE                       -
    max       ABSOLUTE                BEYOND                         -

`none` is for models trained here, which know no such text. The paragraphs are data: they are spelled as in the published
encoder and in the renderings of deepseek-recipe.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from longreach.chat.messages import Conversation, Effort
from longreach.errors import RequestError

EffortTexts = Literal["preview", "0731", "none"]
"""Revision of the weights whose paragraphs are used."""

Mode = Literal["non-think", "think-high", "think-max"]
"""The announcement's names for them."""

MODES: tuple[Mode, ...] = get_args(Mode)

ABSOLUTE = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, "
    "rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, "
    "and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)
BEYOND = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the "
    "problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying cause "
    "rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles and are certain that no "
    "assumption remains unchecked and no error remains undiscovered.\n\n"
)

_PARAGRAPHS: dict[tuple[EffortTexts, Effort], str] = {
    ("preview", "max"): ABSOLUTE,
    ("0731", "high"): ABSOLUTE,
    ("0731", "max"): BEYOND,
}


def effort_text(effort: Effort, texts: EffortTexts) -> str:
    """The paragraph that a thinking prompt begins with, blank line included; empty where there is none.

    Raises:
        RequestError: an unknown effort or revision.
    """
    if effort not in get_args(Effort):
        raise RequestError(f"effort {effort!r} is unknown; there are {', '.join(get_args(Effort))}")
    if texts not in get_args(EffortTexts):
        raise RequestError(f"effort texts {texts!r} are unknown; there are {', '.join(get_args(EffortTexts))}")
    return _PARAGRAPHS.get((texts, effort), "")


def in_mode(conversation: Conversation, mode: Mode) -> Conversation:
    """The conversation, asking for an answer in this mode.

    Raises:
        RequestError: an unknown mode.
    """
    if mode not in MODES:
        raise RequestError(f"mode {mode!r} is unknown; modes are {', '.join(MODES)}")
    effort: Effort = "max" if mode == "think-max" else "high"
    return dataclasses.replace(conversation, thinking=mode != "non-think", effort=effort)
