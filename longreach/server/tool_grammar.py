"""What an answer with tools may look like, as a grammar: V4's block of calls, each with arguments its schema accepts.

    grammar = answer_grammar(tokenizer, None, tools, choice="required")

    \\n\\n<｜DSML｜tool_calls>
    <｜DSML｜invoke name="get_weather">
    <｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>
    <｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>

｜DSML｜ is one special token, so a tag cannot be mistaken for text. Its spelling in ordinary tokens is kept out of free text
and of arguments, since whoever reads the answer as text could not tell the two apart.

A string is written as it is, every other value as JSON. Where a schema allows both, either form may come. A strict tool's
parameters come in the order of its schema; a tool that is not strict may be given any parameters.
Layout: DeepSeek-V4's chat encoder. The rules of strict schemas: DeepSeek's API documentation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal
from urllib.parse import unquote

from longreach.chat.messages import AnswerFormat, Tool
from longreach.engine.grammar import SEPARATORS, Grammar, check_nesting, compile_grammar, literals
from longreach.errors import RequestError
from longreach.tokenizer.bpe import Tokenizer
from longreach.tokenizer.special import DSML

HOSTED_FORMATS = ("email", "hostname", "ipv4", "ipv6", "uuid")
"""Formats of strings that the hosted service knows."""

HOSTED_DROPS = ("minLength", "maxLength", "minItems", "maxItems")
"""Constraints that the hosted service leaves unenforced."""

_OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_LABEL = "[a-zA-Z0-9]([a-zA-Z0-9\\-]{0,61}[a-zA-Z0-9])?"
_H16 = "[0-9a-fA-F]{1,4}"
_DATE = "[0-9]{4}-(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|[0-9]{4}-(0[469]|11)-(0[1-9]|[12][0-9]|30)"
_DATE = f"({_DATE}|[0-9]{{4}}-02-(0[1-9]|1[0-9]|2[0-8]))"
_TIME = "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,9})?(Z|[+\\-]([01][0-9]|2[0-3]):[0-5][0-9])"
FORMATS = {
    "email": f"[a-zA-Z0-9_+\\-]+(\\.[a-zA-Z0-9_+\\-]+)*@{_LABEL}(\\.{_LABEL})+",
    "hostname": f"{_LABEL}(\\.{_LABEL})*",
    "ipv4": f"{_OCTET}(\\.{_OCTET}){{3}}",
    "ipv6": f"({_H16}:){{7}}{_H16}|({_H16}:){{1,6}}:{_H16}|{_H16}::|::({_H16}:){{0,5}}{_H16}|::",
    "uuid": "[0-9a-fA-F]{8}-([0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}",
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
}
"""What a string that is written as it is looks like; a part of each format, none of it wrong. February has 28 days."""

LONGEST_PATTERN = 4096
"""Of a string that is written as it is."""

ANNOTATIONS = {
    "$comment", "$id", "$schema", "$defs", "contentEncoding", "contentMediaType", "default", "definitions", "deprecated",
    "description", "example", "examples", "readOnly", "title", "writeOnly", "x-guidance",
}  # fmt: skip
STRING_KEYS = {"type", "enum", "const", "pattern", "format", "minLength", "maxLength"}
NOT_STRINGS = ["object", "array", "number", "boolean", "null"]

Choice = Literal["none", "auto", "required", "named"]


def answer_grammar(
    tokenizer: Tokenizer,
    answer: AnswerFormat | None,
    tools: Sequence[Tool],
    *,
    choice: Choice,
    name: str | None = None,
    parallel: bool = True,
    is_open: bool = False,
    hosted: bool = False,
) -> Grammar | None:
    """The grammar of an answer, from behind its reasoning on; None where any text is right.

    Args:
        tokenizer: has the special token ｜DSML｜.
        answer: the form of an answer that is not calls; None leaves it free.
        choice: under `auto` the answer is text (of the form `answer`, if that is given) or calls; text may come before the
            calls where no form is given. Under `required` it is calls; under `named` one call of the tool `name`; under
            `none` the tools do not count.
        parallel: whether there may be more than one call.
        is_open: the prompt ends with the opened block, so the answer begins with a call.
        hosted: read strict schemas exactly as the hosted service does.

    Raises:
        RequestError: a schema that cannot be enforced, or a name that no tool has.
    """
    tools = () if choice == "none" else tuple(tools)
    if choice == "named":
        tools = tuple(tool for tool in tools if tool.name == name)
        if not tools:
            raise RequestError(
                f"Invalid value for 'tool_call': no function named '{name}' was specified in the 'tools' parameter."
            )
    must_call = is_open or choice in ("required", "named")
    if not tools or not (must_call or answer is not None or not parallel or any(tool.strict for tool in tools)):
        return _answer_alone(tokenizer, answer)
    rules = _Rules(tokenizer.special_id(DSML))
    calls = " | ".join(_call(rules, tool, hosted) for tool in tools)
    many = "+" if parallel and choice != "named" else ""
    block = f"({calls}){many} {rules.tag('</', 'tool_calls>')}"
    opened = rules.tag("<", "tool_calls>\n")[len('"<" ') :]  # behind whatever ends with the bracket
    if is_open:
        start = block
    elif must_call:
        start = f'"\\n\\n<" {opened} {block}'
    elif answer is not None:
        start = f'"\\n\\n<" {opened} {block} | {_answer_rule(rules, answer)}'
    else:
        text, opening = rules.terminal(rules.free("")), rules.terminal(rules.free("\\n\\n<"))
        start = f"{text} | {opening} {opened} {block}"
    return compile_grammar(tokenizer, lark=f"start: {start}\n{rules.text()}", ends=("</", *rules.ends))


def strict_schema(parameters: Mapping[str, Any] | None, *, hosted: bool = False) -> dict[str, Any]:
    """The schema that the arguments of a strict tool are held to.

    Every property of an object must be required, and an object has no others.

    Args:
        parameters: JSON Schema of an object; None for no parameters.
        hosted: as the hosted service does: only the keywords it knows, and lengths of strings and arrays do not count.
            Otherwise all keywords count, and one that cannot be enforced is refused when the grammar is made.

    Raises:
        RequestError: in the words of the hosted service where it has any.
    """
    if parameters is None:
        return {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
    if not isinstance(parameters, Mapping) or parameters.get("type") != "object":
        kind = parameters.get("type") if isinstance(parameters, Mapping) else parameters
        raise RequestError(f"a strict tool's parameters must be a JSON Schema of type 'object', not of type {kind!r}")
    check_nesting(parameters)
    return _strict(parameters, hosted)


def _strict(schema: Any, hosted: bool) -> Any:
    if not isinstance(schema, Mapping):
        if hosted or not isinstance(schema, bool):
            raise RequestError("Invalid tool parameters schema : one of `type`, `anyOf`, `$ref` field is required")
        return schema
    out = dict(schema)
    if hosted:
        if "oneOf" in schema or not schema.keys() & {"type", "anyOf", "$ref"}:
            raise RequestError("Invalid tool parameters schema : one of `type`, `anyOf`, `$ref` field is required")
        if "format" in schema and schema["format"] not in HOSTED_FORMATS:
            allowed = ", ".join(f"`{name}`" for name in HOSTED_FORMATS)
            raise RequestError(
                f"Invalid tool parameters schema : unknown variant `{schema['format']}`, expected one of {allowed}"
            )
        for key in HOSTED_DROPS:
            out.pop(key, None)
    types = schema.get("type")
    if types == "object" or (isinstance(types, list) and "object" in types) or "properties" in schema:
        properties = _mapping(schema, "properties")
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
            raise RequestError(f"required must be a list of property names, not {required!r}")
        if set(required) != set(properties):
            raise RequestError("Required properties must match all properties in the object")
        out["properties"] = {key: _strict(value, hosted) for key, value in properties.items()}
        out["required"], out["additionalProperties"] = list(properties), False
    for key in ("$defs", "definitions"):
        if key in schema:
            out[key] = {name: _strict(value, hosted) for name, value in _mapping(schema, key).items()}
    for key in ("anyOf", "allOf", "oneOf", "prefixItems"):
        if key in schema:
            if not isinstance(schema[key], list):
                raise RequestError(f"{key} must be a list of schemas, not {schema[key]!r}")
            out[key] = [_strict(value, hosted) for value in schema[key]]
    if "items" in schema:
        out["items"] = _strict(schema["items"], hosted)
    return out


def _mapping(schema: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = schema.get(key, {})
    if not isinstance(value, Mapping):
        raise RequestError(f"{key} must be an object, not {value!r}")
    return value


# ---- rules -----------------------------------------------------------------------------------------------------------


class _Rules:
    """The rules and terminals of one Lark grammar, named as they come.

    Attributes:
        ends: what may end a free text besides the tag behind it.
    """

    def __init__(self, dsml_id: int) -> None:
        self._special = f"<[{dsml_id}]>"
        self._lines: dict[str, str] = {}
        self.ends: list[str] = []

    def tag(self, bracket: str, rest: str) -> str:
        return f"{_quoted(bracket)} {self._special} {_quoted(rest)}"

    def closing_tag(self, name: str) -> str:
        """The rest of a closing tag whose bracket and slash belong to the terminal before it."""
        return f"{self._special} {_quoted(name)}"

    def terminal(self, expression: str) -> str:
        return self._named(expression, "T{}")

    def rule(self, expression: str) -> str:
        return self._named(expression, "r{}")

    def _named(self, expression: str, form: str) -> str:
        return self._lines.setdefault(f"{form[0]}: {expression}", form.format(len(self._lines)))

    def free(self, end: str) -> str:
        """A terminal: any text that ends so (a regular expression), without the spelling of the special token."""
        return f"/(?s:.*){end}/ & ~/(?s:.*){DSML}(?s:.*)/"

    def text(self) -> str:
        return "".join(f"{name}: {line[3:]}\n" for line, name in self._lines.items())


def _quoted(text: str) -> str:
    """Lark spells a string as JSON does."""
    return json.dumps(text, ensure_ascii=False)


def _call(rules: _Rules, tool: Tool, hosted: bool) -> str:
    parts = [rules.tag("<", f'invoke name="{_plain_name(tool.name)}">\n')]
    if tool.strict:
        schema = strict_schema(tool.parameters, hosted=hosted)
        parts += [_parameter(rules, key, value, schema) for key, value in schema["properties"].items()]
    else:
        parts.append(f"{_free_parameter(rules)}*")
    return rules.rule(" ".join([*parts, rules.tag("</", "invoke>\n")]))


def _parameter(rules: _Rules, name: str, schema: Any, root: Mapping[str, Any]) -> str:
    """A line of a call: text, or JSON."""
    strings, rest = _split(schema, root)
    head = f'parameter name="{_plain_name(name)}" string='
    ways = [
        f"{rules.tag('<', head + _flagged(True))} {rules.terminal(_string(rules, part))} {rules.closing_tag('parameter>')}"
        for part in strings
    ]
    if rest is not None:
        value = rules.rule(_json(_with_root(rest, root)))
        ways.append(f"{rules.tag('<', head + _flagged(False))} {value} {rules.tag('</', 'parameter>')}")
    if not ways:
        raise RequestError(f"the parameter {name!r} can have no value at all; loosen its schema")
    return f'({" | ".join(ways)}) "\\n"'


def _free_parameter(rules: _Rules) -> str:
    name, text = rules.terminal('/[^"<>\\n｜]{1,64}/'), rules.terminal(rules.free("<\\/"))
    value = rules.rule(_json({"type": NOT_STRINGS}))
    head, middle = rules.tag("<", 'parameter name="'), '" string='
    ways = (
        f"{_quoted(middle + _flagged(True))} {text} {rules.closing_tag('parameter>')}",
        f"{_quoted(middle + _flagged(False))} {value} {rules.tag('</', 'parameter>')}",
    )
    return rules.rule(f'{head} {name} ({" | ".join(ways)}) "\\n"')


def _flagged(is_string: bool) -> str:
    return f'"{str(is_string).lower()}">'


def _plain_name(name: str) -> str:
    if not name or re.search(r'["<>\n｜]', name):
        raise RequestError(
            f'the name {name!r} cannot be written in a tool call; use a name without ", <, >, ｜ and line ends'
        )
    return name


def _answer_rule(rules: _Rules, answer: AnswerFormat) -> str:
    if answer.kind == "regex":
        return rules.terminal(f"/{_lark_regex(answer.regex or '')}/")
    return rules.rule(_json({"type": "object"} if answer.kind == "json_object" else answer.schema or {}))


def _answer_alone(tokenizer: Tokenizer, answer: AnswerFormat | None) -> Grammar | None:
    if answer is None:
        return None
    if answer.kind == "regex":
        return compile_grammar(tokenizer, regex=answer.regex or "")
    return compile_grammar(
        tokenizer, json_schema={"type": "object"} if answer.kind == "json_object" else answer.schema or {}
    )


def _json(schema: Any) -> str:
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise RequestError(f"a schema must be an object, not {schema!r}")
    check_nesting(schema)
    return "%json " + json.dumps({**schema, "x-guidance": {**SEPARATORS, **schema.get("x-guidance", {})}})


# ---- strings as they are ---------------------------------------------------------------------------------------------


def _split(schema: Any, root: Mapping[str, Any], depth: int = 0) -> tuple[list[dict[str, Any]], Any]:
    """The schemas of the strings it accepts, and a schema of all else (None for nothing).

    A schema that cannot be taken apart is left whole as "all else": its strings are then written as JSON.
    """
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping) or depth > 16:
        return [], schema
    keys = schema.keys() - ANNOTATIONS
    if keys == {"$ref"}:
        return _split(_resolve(schema["$ref"], root), root, depth + 1)
    if keys == {"anyOf"}:
        parts = [_split(value, root, depth + 1) for value in schema["anyOf"]]
        rests = [rest for _, rest in parts if rest is not None]
        return [part for strings, _ in parts for part in strings], {"anyOf": rests} if rests else None
    types = schema.get("type", ["string", *NOT_STRINGS])
    types = [types] if isinstance(types, str) else types
    if keys & {"$ref", "anyOf", "allOf", "oneOf", "not", "if"} or not isinstance(types, list):
        return [], schema
    others = [kind for kind in types if kind != "string"]
    if "string" not in types:
        return [], schema
    text = {key: schema[key] for key in keys & STRING_KEYS} | {"type": "string"}
    if others:
        rest = {
            key: value for key, value in schema.items() if key not in ("pattern", "format", "minLength", "maxLength")
        }
        rest["type"] = others
    elif unknown := keys - STRING_KEYS:
        raise RequestError(f"a strict tool's string has {sorted(unknown)[0]!r}, which cannot be enforced; leave it out")
    else:
        rest = None
    for key, values in (("enum", schema.get("enum")), ("const", [schema.get("const")])):
        if key not in schema:
            continue
        if not isinstance(values, list):
            raise RequestError(f"enum must be a list, not {values!r}")
        chosen = [value for value in values if isinstance(value, str)]
        text["enum"] = [value for value in chosen if value in text.get("enum", chosen)]
        left = [value for value in values if not isinstance(value, str)]
        if rest is not None:
            rest = {"enum": left, "type": others} if left else None
        if not text["enum"]:
            return [], rest
    return [text], rest


def _string(rules: _Rules, schema: Mapping[str, Any]) -> str:
    """A terminal: such a string as it is, and the `</` of the tag that closes it."""
    terms = [rules.free("<\\/")]
    if "enum" in schema:
        terms = [f"({' | '.join(_quoted(text + '</') for text in schema['enum'])})"]
    if "pattern" in schema:
        terms.append(f"/{_lark_regex(_searched(schema['pattern']))}<\\//")
        rules.ends += [piece.decode() for piece in literals(schema["pattern"]) if piece.decode() not in rules.ends]
    if "format" in schema:
        if schema["format"] not in FORMATS:
            raise RequestError(
                f"format {schema['format']!r} cannot be enforced in a strict tool; use one of {', '.join(FORMATS)}"
            )
        terms.append(f"/({_lark_regex(FORMATS[schema['format']])})<\\//")
    if "minLength" in schema or "maxLength" in schema:
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        for value in (least, most or 0):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 10**6:
                raise RequestError(f"minLength and maxLength must be whole numbers from 0 to 1000000, not {value!r}")
        terms.append(f"/(?s:.{{{least},{most}}})<\\//")
    return " & ".join(terms)


def _searched(pattern: Any) -> str:
    """A pattern of JSON Schema, which may match anywhere, as one that matches the whole string."""
    if not isinstance(pattern, str):
        raise RequestError(f"pattern must be a string, not {pattern!r}")
    if len(pattern) > LONGEST_PATTERN:
        raise RequestError(f"a pattern of {len(pattern)} characters is too long, at most {LONGEST_PATTERN} are allowed")
    bare = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", pattern, flags=re.DOTALL)  # neither escapes nor classes
    begins, ends = bare.startswith("^"), bare.endswith("$")
    inside = bare[begins : len(bare) - ends]
    depth, is_split = 0, False
    for character in inside:
        depth += (character == "(") - (character == ")")
        is_split = is_split or (character == "|" and depth == 0)
    if re.search(r"[$^]", inside.replace("(?^", "")) or (is_split and (begins or ends)):
        raise RequestError(
            f"pattern {pattern!r} cannot be enforced: ^ and $ may stand only at its ends, around all alternatives"
        )
    body = pattern[begins : len(pattern) - ends]
    return ("" if begins else "(?s:.*)") + f"({body})" + ("" if ends else "(?s:.*)")


def _lark_regex(pattern: str) -> str:
    """A regular expression as it may stand between slashes, with \\d and \\w as JSON Schema means them."""
    try:
        from llguidance import regex_to_lark
    except ImportError:
        raise RequestError("tool grammars need the library llguidance: pip install 'longreach[grammar]'") from None
    return regex_to_lark(pattern, "dw").replace("\n", "\\n").replace("\r", "\\r")


# ---- references ------------------------------------------------------------------------------------------------------


def _resolve(reference: Any, root: Mapping[str, Any]) -> Any:
    """What a `$ref` within the schema points to."""
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        raise RequestError(
            f"$ref {reference!r} cannot be followed; it must point into the same schema, as '#/$defs/name'"
        )
    value: Any = root
    for step in reference[2:].split("/") if reference != "#" else []:
        step = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            raise RequestError(f"$ref {reference!r} points to nothing in the schema")
    return value


def _with_root(schema: Any, root: Mapping[str, Any]) -> Any:
    """A part of a schema as one of its own: what it refers to comes along."""
    if not isinstance(schema, Mapping) or not any(_references(schema)):
        return schema
    moved = _moved(schema, lambda reference: "#/$defs/whole" + reference[1:])
    return {**moved, "$defs": {"whole": _moved(root, lambda reference: "#/$defs/whole" + reference[1:])}}


def _references(value: Any) -> Iterable[str]:
    if isinstance(value, Mapping):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for part in value.values():
            yield from _references(part)
    elif isinstance(value, list):
        for part in value:
            yield from _references(part)


def _moved(value: Any, rename: Callable[[str], str]) -> Any:
    if isinstance(value, Mapping):
        return {
            key: rename(part)
            if key == "$ref" and isinstance(part, str) and part.startswith("#")
            else _moved(part, rename)
            for key, part in value.items()
        }
    return [_moved(part, rename) for part in value] if isinstance(value, list) else value
