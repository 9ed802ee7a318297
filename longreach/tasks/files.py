"""Problems from files on this machine: GSM8K, MATH, HumanEval, MBPP as they are published, and anybody's JSONL.

    --task gsm8k:path=gsm8k/test.jsonl             {"question", "answer": "… #### 18"} a line
    --task math:path=MATH/test:level=1-3           folders of {"problem", "solution": "… \\\\boxed{…}", "level"}, or JSONL
    --task humaneval:path=HumanEval.jsonl.gz       {"prompt", "canonical_solution", "test", "entry_point"}
    --task mbpp:path=mbpp.jsonl                    {"text" or "prompt", "code", "test_list", "test_setup_code"}
    --task jsonl:path=mine.jsonl:verifier=number   any fields; see below

    jsonl  verifier=NAME   a judge of `longreach.tasks.verifiers`
           prompt=FIELD    the question: text, or a list of {"role", "content"} (default: question)
           answer=FIELD    what the judge compares with (default: answer)
           solution=FIELD  worked solutions, for demonstrations (default: none)
           domain=WORD     whose teacher and score it belongs to (default: mathematics, code or instructions, by the judge)

Files may be compressed (`.gz`). A line that does not fit is an error with its number; nothing is skipped.
"""

from __future__ import annotations

import ast
import gzip
import json
import random
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from longreach.chat.messages import Conversation, Message
from longreach.chat.modes import Mode
from longreach.errors import RequestError
from longreach.tasks import verifiers
from longreach.tasks.base import Problem, Verdict, final_message, read_levels, wrong


class FileTask:
    """What tasks from files have in common: the file is read once, when the task is opened.

    A subclass sets `kind`, `domain`, `summary` and `verifier`, and defines `read` and, where it can, `solution`.
    """

    kind: str
    domain: str
    summary: str
    verifier: str

    def __init__(self, options: Mapping[str, str]) -> None:
        allowed = ["path", *self.more_options()]
        unknown = sorted(set(options) - set(allowed))
        if unknown:
            raise RequestError(f"task {self.kind} has no option {unknown[0]!r}; its options are {', '.join(allowed)}")
        if "path" not in options:
            raise RequestError(f"task {self.kind} reads a file; write {self.kind}:path=FILE")
        self.name = self.kind + "".join(f":{key}={value}" for key, value in sorted(options.items()))
        self.options = options
        self.path = Path(options["path"])
        self.set_up()
        self._problems = []
        for place, record in records(self.path):
            try:
                self._problems.append(self.read(record))
            except _Unfit as error:
                raise RequestError(f"{place}: {error}") from None
        if not self._problems:
            raise RequestError(f"{self.path} holds no problem; task {self.kind} needs at least one")
        self.levels: Sequence[int] = sorted({problem.level for problem in self._problems})
        if "level" in options:
            self.levels = read_levels(self.kind, options["level"], self.levels)
            self._problems = [problem for problem in self._problems if problem.level in self.levels]
        self.size: int | None = len(self._problems)
        verifiers.prepare(self.verifier)

    @classmethod
    def more_options(cls) -> Sequence[str]:
        """Names of options beside `path`."""
        return ()

    def set_up(self) -> None:
        """Look at the options, before the file is read."""

    def read(self, record: dict[str, Any]) -> Problem:
        """A problem from a record of the file.

        Raises:
            _Unfit: the record is not as it should be.
        """
        raise NotImplementedError

    def solution(self, problem: Problem) -> tuple[str | None, str]:
        """Reasoning (None: there is none) and answer of the file's own solution."""
        raise RequestError(f"task {self.name} has no worked solutions to learn from; use it for rewards and scores")

    def judge(self, problem: Problem, text: str) -> Verdict:
        return verifiers.VERIFIERS[self.verifier](text, problem.answer)

    @property
    def judged_apart(self) -> bool:
        """Whether a verdict takes long enough to be asked for in another process (`longreach.evaluate.judging`)."""
        return self.verifier in verifiers.IN_SANDBOX

    def problems(self) -> Sequence[Problem]:
        """All of them, in the file's order."""
        return self._problems

    def draw(self, rng: random.Random, level: int | None = None) -> Problem:
        chosen = [problem for problem in self._problems if level is None or problem.level == level]
        if not chosen:
            raise RequestError(f"task {self.name} has no problem of level {level}; its levels are {list(self.levels)}")
        return rng.choice(chosen)

    def verify(self, problem: Problem, reply: Sequence[Message]) -> Verdict:
        message = final_message(reply)
        return wrong("no answer") if message is None else self.judge(problem, message.content)

    def demonstrate(self, problem: Problem, mode: Mode, rng: random.Random) -> tuple[Message, ...]:
        """The file's solution; the two thinking modes do not differ in it."""
        reasoning, content = self.solution(problem)
        return (Message("assistant", content, reasoning=None if mode == "non-think" else reasoning or ""),)

    def environment(self, problem: Problem) -> None:
        return None


class _Unfit(Exception):
    """Why a record is no problem."""


def _text_of(record: Mapping[str, Any], *names: str) -> str:
    """The first of these fields that is there."""
    for name in names:
        if name in record:
            if not isinstance(record[name], str) or not record[name].strip():
                raise _Unfit(
                    f"field {name!r} is {json.dumps(record[name])[:60]}; it should be a text that is not empty"
                )
            return record[name]
    wanted = " or ".join(repr(name) for name in names)
    raise _Unfit(f"there is no field {wanted}; fields are {', '.join(map(repr, record)) or 'none'}")


def _asked(text: str) -> Conversation:
    return Conversation((Message("user", text),))


def records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a file or folder, each with its place for error messages.

    A folder gives its `.json` (one object each), `.jsonl` and `.gz` files, sorted by path.

    Raises:
        RequestError: it cannot be read, or a line is no JSON object; says which.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".json", ".jsonl", ".gz") and file.is_file())
        if not files:
            raise RequestError(f"{path} holds no .json, .jsonl or .gz file")
        for file in files:
            yield from records(file)
        return
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise RequestError(
            f"{path} cannot be read: {error}; give a JSONL file, UTF-8, perhaps compressed by gzip"
        ) from None
    if path.suffix == ".json":
        yield str(path), _object(text, str(path))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", _object(line, f"{path}, line {number}")


def _object(text: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{place}: no JSON ({error})") from None
    if not isinstance(value, dict):
        raise RequestError(f"{place}: {text.strip()[:40]} is no JSON object; each problem is one, with named fields")
    return value


class GSM8K(FileTask):
    """Word problems whose solution ends with `#### 18`. The last number of an answer counts."""

    kind = "gsm8k"
    domain = "mathematics"
    summary = "word problems of GSM8K, from its JSONL file"
    verifier = "number"

    def read(self, record: dict[str, Any]) -> Problem:
        question, solution = _text_of(record, "question"), _text_of(record, "answer")
        steps, mark, answer = solution.rpartition("####")
        answer = answer.strip()
        if not mark or len(verifiers.numbers_in(answer)) != 1:
            raise _Unfit(f"the answer ends with {solution[-30:]!r}; it should end with #### and a number")
        return Problem(self.kind, _asked(question), answer, extra={"solution": steps.strip()})

    def solution(self, problem: Problem) -> tuple[str | None, str]:
        # <<16-3-4=9>> are notes for a calculator.
        return re.sub(r"<<[^<>]*>>", "", problem.extra["solution"]), problem.answer


class Math(FileTask):
    r"""Problems in the manner of MATH: the answer is what the solution puts in its last \boxed{…}; judged by math-verify."""

    kind = "math"
    domain = "mathematics"
    summary = "competition problems in the manner of MATH, judged by math-verify"
    verifier = "math"

    @classmethod
    def more_options(cls) -> Sequence[str]:
        return ("level",)

    def read(self, record: dict[str, Any]) -> Problem:
        question = _text_of(record, "problem", "question")
        solution = record.get("solution")
        answer = verifiers.boxed(solution) if isinstance(solution, str) else None
        if answer is None:
            if "answer" not in record:
                raise _Unfit(r"the solution has no \boxed{…} and there is no field 'answer'")
            answer = str(record["answer"])
        if not answer.strip():
            raise _Unfit("the answer is empty")
        level = re.search(r"\d+", str(record.get("level", 1)))
        return Problem(
            self.kind, _asked(question + "\nPut the answer in \\boxed{}."), answer, int(level[0]) if level else 1,
            {"solution": solution if isinstance(solution, str) else ""},
        )  # fmt: skip

    def solution(self, problem: Problem) -> tuple[str | None, str]:
        return problem.extra["solution"] or None, f"\\boxed{{{problem.answer}}}"


class HumanEval(FileTask):
    """Functions to be completed. An answer may be the whole function or its body, in a Markdown block or not."""

    kind = "humaneval"
    domain = "code"
    summary = "functions of HumanEval, judged by its tests"
    verifier = "python"

    def read(self, record: dict[str, Any]) -> Problem:
        prompt, name = _text_of(record, "prompt"), _text_of(record, "entry_point")
        if not name.isidentifier() or f"def {name}(" not in prompt:
            raise _Unfit(f"the prompt defines no function {name!r}, which 'entry_point' names")
        tests = _text_of(record, "test")
        asked = "Complete this function. Answer with the whole function in a Markdown block."
        question = f"{asked}\n```python\n{prompt.rstrip()}\n```"
        return Problem(
            self.kind, _asked(question), f"{tests}\n\ncheck({name})\n",
            extra={"prompt": prompt, "name": name, "solution": record.get("canonical_solution") or ""},
        )  # fmt: skip

    def judge(self, problem: Problem, text: str) -> Verdict:
        return verifiers.run_tests(self.program(problem, text[-verifiers.MOST_TEXT :]), problem.answer)

    def program(self, problem: Problem, text: str) -> str:
        """The prompt with what an answer adds to it.

        A whole function comes behind the prompt, whose imports and helpers it may need, and replaces the one begun there.
        """
        prompt, head = problem.extra["prompt"], f"def {problem.extra['name']}("
        code = verifiers.code_of(text, containing=head)
        code = text if code is None else code
        return prompt + ("\n    pass\n\n" if head in code else "") + code

    def solution(self, problem: Problem) -> tuple[str | None, str]:
        if not problem.extra["solution"]:
            return super().solution(problem)
        return None, f"```python\n{problem.extra['prompt']}{problem.extra['solution'].rstrip()}\n```"


class MBPP(FileTask):
    """Functions from a sentence and the tests they have to pass, which the prompt shows, as is usual for this set."""

    kind = "mbpp"
    domain = "code"
    summary = "programs of MBPP, judged by its tests"
    verifier = "python"

    def read(self, record: dict[str, Any]) -> Problem:
        text = _text_of(record, "text", "prompt")
        tests = record.get("test_list")
        if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
            raise _Unfit(f"field 'test_list' is {json.dumps(tests)[:60]}; it should be a list of assertions")
        before = record.get("test_setup_code") or "\n".join(record.get("test_imports") or [])
        shown = "\n".join(tests)
        return Problem(
            self.kind,
            _asked(f"{text}\nAnswer with a function in a Markdown block that passes these tests:\n```python\n{shown}\n```"),
            "\n".join([before, *tests, *(record.get("challenge_test_list") or [])]) + "\n",
            extra={"solution": record.get("code") or ""},
        )  # fmt: skip

    def solution(self, problem: Problem) -> tuple[str | None, str]:
        if not problem.extra["solution"]:
            return super().solution(problem)
        code = problem.extra["solution"].replace("\r\n", "\n").strip()
        return None, f"```python\n{code}\n```"


_DOMAINS = {"number": "mathematics", "math": "mathematics", "python": "code"}
_DOMAIN = re.compile(r"[a-z][a-z0-9-]*")


class AnyJSONL(FileTask):
    """A user's own problems with a judge named by the user."""

    kind = "jsonl"
    summary = "problems of any JSONL file, judged by a named verifier"

    @classmethod
    def more_options(cls) -> Sequence[str]:
        return ("verifier", "prompt", "answer", "solution", "domain", "level")

    def set_up(self) -> None:
        names = ", ".join(verifiers.verifier_names())
        if "verifier" not in self.options:
            raise RequestError(
                f"task jsonl needs a judge; write jsonl:path={self.path}:verifier=NAME with one of {names}"
            )
        self.verifier = self.options["verifier"]
        if self.verifier not in verifiers.VERIFIERS:
            raise RequestError(f"verifier {self.verifier!r} is unknown; verifiers are {names}")
        self.domain = self.options.get("domain", _DOMAINS.get(self.verifier, "instructions"))
        if not _DOMAIN.fullmatch(self.domain):
            raise RequestError(f"domain={self.domain} is no name; use small letters, digits and hyphens")

    def read(self, record: dict[str, Any]) -> Problem:
        field = self.options.get("answer", "answer")
        if field not in record and self.verifier != "json":
            raise _Unfit(f"there is no field {field!r}; fields are {', '.join(map(repr, record)) or 'none'}")
        answer = record.get(field)
        if isinstance(answer, list) and self.verifier == "python":
            answer = "\n".join(map(str, answer))
        if why := verifiers.check_answer(self.verifier, answer):
            raise _Unfit(f"field {field!r} {why}")
        if self.verifier == "python":
            try:
                ast.parse(str(answer))
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                raise _Unfit(f"field {field!r} holds tests that are no Python: {error}") from None
        level = record.get("level", 1)
        if not isinstance(level, int) or isinstance(level, bool):
            raise _Unfit(f"field 'level' is {json.dumps(level)[:60]}; it should be a whole number")
        solution = None
        if "solution" in self.options:
            solution = _text_of(record, self.options["solution"])
        return Problem(self.kind, self._conversation(record), answer, level, {"solution": solution})

    def _conversation(self, record: Mapping[str, Any]) -> Conversation:
        field = self.options.get("prompt", "question")
        if not isinstance(record.get(field), list):
            return _asked(_text_of(record, field))
        messages = []
        for message in record[field]:
            is_known = isinstance(message, dict) and message.get("role") in ("system", "user", "assistant")
            if not is_known or not isinstance(message.get("content"), str):
                raise _Unfit(
                    f"field {field!r} holds {json.dumps(message)[:60]}; messages are objects with a role (system, user or "
                    f"assistant) and a content"
                )
            messages.append(Message(message["role"], message["content"]))
        if not messages or messages[-1].role != "user":
            raise _Unfit(f"field {field!r} should end with a user's message, which is to be answered")
        return Conversation(tuple(messages))

    def solution(self, problem: Problem) -> tuple[str | None, str]:
        """The solution is the reasoning and the answer follows it, where the answer is a text that can be given."""
        answer = problem.answer[0] if isinstance(problem.answer, list) and problem.answer else problem.answer
        if self.verifier in ("exact", "number", "choice"):
            return problem.extra["solution"], str(answer)
        if self.verifier == "math":
            return problem.extra["solution"], f"\\boxed{{{answer}}}"
        if problem.extra["solution"] is not None:
            return None, problem.extra["solution"]
        return super().solution(problem)
