"""V4's special tokens, letter by letter. The bars are U+FF5C and the low blocks U+2581, not the ASCII look-alikes.

Ids of a tokenizer trained here follow this order: 0, 1, 2 and so on. The released tokenizer has the same first two and
puts the others above 128,000, so code asks a `Tokenizer` for ids and never counts on a number other than these two.
Source: the published chat encoder and tokenizer of DeepSeek-V4.
"""

from __future__ import annotations

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK_START = "<think>"
THINK_END = "</think>"
DSML = "｜DSML｜"
"""Stands inside the tags of tool calls, as in `<｜DSML｜invoke name="f">`."""
LATEST_REMINDER = "<｜latest_reminder｜>"

TASKS = {
    name: f"<｜{name}｜>" for name in ("action", "query", "authority", "domain", "title", "read_url", "extracted_url")
}
"""Quick Instructions: side tasks asked at the end of a live context."""

FIM_BEGIN = "<｜fim▁begin｜>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_END = "<｜fim▁end｜>"

SPECIAL_TOKENS: tuple[str, ...] = (
    BOS, EOS, USER, ASSISTANT, THINK_START, THINK_END, DSML, LATEST_REMINDER, *TASKS.values(), FIM_BEGIN, FIM_HOLE, FIM_END,
)  # fmt: skip


def placeholder(number: int) -> str:
    """The `number`-th token that stands for nothing; fills a vocabulary that the training text could not."""
    return f"<｜place▁holder▁no▁{number}｜>"
