"""The words of chat and tool calls, shown to the tokenizer while it is trained so that they become cheap.

A tokenizer trained on code alone would spell `tool_calls` or `"parameters": {"type": "object"` in many pieces, in every
conversation, for ever. These lines hold the fixed vocabulary of the chat encoding: tags, headings, JSON Schema keys, and
the everyday words around them. Special tokens are left out; they are one token each anyway.
"""

from __future__ import annotations

import re

from longreach.tokenizer.special import SPECIAL_TOKENS

_CONVERSATION = """\
You are a helpful assistant. Answer the user's question. What is the answer? Why? How? Where? When? Who? Which?
Hello! How can I help you today? Please write a function. Thank you. Here is the result of the tool call.
Let me think about this step by step. First, then, so, therefore, because, however. The answer is therefore 42.
The user asks for the weather; I should call the tool, wait for its result and explain it. Done. I do not know.
"""

_TOOLS = """\
## Tools

To call tools, write one block like this:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="get_weather">
<｜DSML｜parameter name="location" string="true">Paris</｜DSML｜parameter>
<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>
</｜DSML｜invoke>
<｜DSML｜invoke name="search">
<｜DSML｜parameter name="query" string="true">text</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜tool_calls>

### Available Tool Schemas

{"name": "get_weather", "description": "The weather of a place", "parameters": {"type": "object", "properties": \
{"location": {"type": "string", "description": "A city"}, "unit": {"type": "string", "enum": ["celsius"]}, \
"days": {"type": "integer", "default": 1}, "exact": {"type": "boolean"}, "list": {"type": "array", "items": \
{"type": "number"}}}, "required": ["location"]}}

<tool_result>{"result": true, "error": null, "content": "text", "status": false}</tool_result>

## Response Format:

Answer with JSON that follows this schema: {"type": "object", "additionalProperties": false}
"""

SHARE = 0.02
"""Part of the tokenizer's training text that the framing makes up. On 12 MB of Python and 4,096 tokens this gives the
words of chat whole tokens and costs the code 0.2 % more of them."""


def framing_documents(corpus_characters: int) -> list[str]:
    """The framing text, repeated to about `SHARE` of a corpus of that size (at least 20 times), cut at special tokens."""
    at_specials = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    pieces = [piece for piece in at_specials.split(_CONVERSATION + _TOOLS) if piece]
    repeats = max(20, round(SHARE * corpus_characters / sum(map(len, pieces))))
    return pieces * repeats
