"""What does this small program print? Assignments, conditions, loops and lists of Python, followed by hand.

    --task programs:level=1-2

    level 1    a=3;b=a*2;print(b+1)                        three statements in a row
    level 2    a=17;b=5                                    divisions, remainders, conditions, variables that change
               if a%b>1:a-=b
               print(a*2)
    level 3    s=1                                         a loop over numbers, a list, or a condition
               for i in range(4):s+=i*2
               print(s)
    level 4    x=[4,7,2]                                   loops with conditions or lists that change within
               for i in range(3):
                if x[i]>3:x[i]-=2
                else:x.append(i)
               print(sum(x),len(x))

The prompt is the program and nothing else. The worked solution writes down every statement as it is executed, with values in
place of names and one operation at a time; a condition shows whether it holds:

    a=17;b=5;17%5>1=2>1:yes;a=17-5=12;12*2=24

think-max goes through the program a second time, with results only. The answer is computed by following the syntax tree here,
without Python's own execution, which the tests compare with.
"""

from __future__ import annotations

import ast
import operator
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from longreach.chat.messages import Conversation, Message
from longreach.chat.modes import Mode
from longreach.tasks.answers import shortened
from longreach.tasks.base import RIGHT, GeneratedTask, Problem, Verdict, final_message, wrong
from longreach.tasks.verifiers import code_of

MOST_VALUE = 999
"""No value on the way of a program is further from zero."""

MOST_STEPS = 40
"""Statements that a program executes at most, loop heads counted."""


class Programs(GeneratedTask):
    """Programs of at most seven lines. The answer is the text printed, without the line break at its end."""

    kind = "programs"
    domain = "code"
    summary = "what a small Python program prints"
    all_levels = (1, 2, 3, 4)

    def make(self, rng: random.Random, level: int) -> Problem:
        while True:
            source = _WRITERS[level](rng)
            try:
                _, printed = follow(source)
            except _Unsuitable:
                continue
            return Problem(self.kind, Conversation((Message("user", source),)), printed, level)

    def verify(self, problem: Problem, reply: Sequence[Message]) -> Verdict:
        message = final_message(reply)
        if message is None:
            return wrong("no answer")
        given = code_of(message.content) or message.content.strip().strip("`")
        if given.split() == problem.answer.split():
            return RIGHT
        return wrong(f"expected {problem.answer!r}, got {shortened(given)!r}")

    def demonstrate(self, problem: Problem, mode: Mode, rng: random.Random) -> tuple[Message, ...]:
        reasoning = None
        if mode != "non-think":
            steps, _ = follow(problem.conversation.messages[-1].content)
            reasoning = ";".join(step.text for step in steps)
            if mode == "think-max":
                reasoning += "\ncheck:" + ";".join(step.result for step in steps if step.result) + ";ok"
        return (Message("assistant", problem.answer, reasoning=reasoning),)


class Step(NamedTuple):
    """A statement as it is executed.

    Attributes:
        text: with values and one operation at a time: `b=3*2+1=6+1=7`.
        result: what it comes to: `b=7`. Empty for a part of a statement.
    """

    text: str
    result: str


# ---- following a program --------------------------------------------------------------------------------------------


class _Unsuitable(Exception):
    """A program that was drawn and is not to be used: too long, too large values, an error on the way."""


_OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Gt: operator.gt,
    ast.Lt: operator.lt,
    ast.Eq: operator.eq,
}
_FUNCTIONS: dict[str, Callable[[Any], Any]] = {"sum": sum, "max": max, "min": min, "len": len, "sorted": sorted}


def follow(source: str) -> tuple[list[Step], str]:
    """Every step of a program, and what it prints.

    Raises:
        _Unsuitable: it is not one of the programs that this task writes.
    """
    follower = _Follower()
    follower.block(ast.parse(source).body)
    return follower.steps, "\n".join(follower.printed)


class _Follower:
    """Executes a syntax tree, writing down what it does. Values are integers and lists of them."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.steps: list[Step] = []
        self.printed: list[str] = []

    def block(self, statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            self.statement(statement)

    def statement(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assign(targets=[target], value=value):
                self.assign(target, value)
            case ast.AugAssign(target=target, op=op, value=value):
                current = ast.parse(ast.unparse(target), mode="eval").body
                self.assign(target, ast.BinOp(current, op, value))
            case ast.If(test=test, body=body, orelse=orelse):
                self.block(body if self.holds(test) else orelse)
            case ast.While(test=test, body=body):
                while self.holds(test):
                    self.block(body)
            case ast.For(target=ast.Name(id=name), iter=over, body=body):
                for value in self.over(over):
                    self.values[name] = value
                    self.step(f"{name}={_text(value)}", f"{name}={_text(value)}")
                    self.block(body)
            case ast.Expr(ast.Call(func=ast.Name(id="print"), args=arguments)):
                shown = []
                for argument in arguments:
                    forms = self.reduced(argument)
                    self.step("=".join(forms), forms[-1])
                    shown.append(str(ast.literal_eval(forms[-1])))
                self.printed.append(" ".join(shown))
            case ast.Expr(ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="append"), args=[value])):
                forms = self.reduced(value)
                if len(forms) > 1:
                    self.step("=".join(forms), "")
                longer = _bounded([*self.values[name], ast.literal_eval(forms[-1])])
                self.assign(ast.Name(name), _node(longer))
            case _:
                raise _Unsuitable(ast.dump(statement))

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        forms = self.reduced(value)
        result = ast.literal_eval(forms[-1])
        match target:
            case ast.Name(id=name):
                self.values[name] = result
                self.step("=".join([name, *forms]), f"{name}={forms[-1]}")
            case ast.Subscript(value=ast.Name(id=name), slice=place):
                index = ast.literal_eval(self.reduced(place)[-1])
                if not 0 <= index < len(self.values[name]):
                    raise _Unsuitable("index")
                self.values[name] = [*self.values[name][:index], result, *self.values[name][index + 1 :]]
                self.step("=".join([f"{name}[{index}]", *forms]), f"{name}[{index}]={forms[-1]}")
            case _:
                raise _Unsuitable(ast.dump(target))

    def over(self, node: ast.expr) -> list[int]:
        match node:
            case ast.Call(func=ast.Name(id="range"), args=arguments):
                return list(range(*(ast.literal_eval(self.reduced(argument)[-1]) for argument in arguments)))
            case _:
                return ast.literal_eval(self.reduced(node)[-1])

    def holds(self, test: ast.expr) -> bool:
        forms = self.reduced(test)
        is_true = forms.pop() == "True"
        word = "yes" if is_true else "no"
        self.step("=".join(forms) + ":" + word, word)
        return is_true

    def step(self, text: str, result: str) -> None:
        self.steps.append(Step(text, result))
        if len(self.steps) > MOST_STEPS:
            raise _Unsuitable("too long")

    def reduced(self, node: ast.expr) -> list[str]:
        """The expression with values in place of names, then after every operation; the last form is its value."""
        node = _Values(self.values).visit(ast.parse(ast.unparse(node), mode="eval").body)
        forms = [_text(node)]
        while (smaller := _reduce(node)) is not None:
            node = smaller
            if _text(node) != forms[-1]:
                forms.append(_text(node))
        return forms


class _Values(ast.NodeTransformer):
    """Puts values in place of names, and items in place of `x[1]`."""

    def __init__(self, values: dict[str, Any]):
        self.values = values

    def visit_Call(self, node: ast.Call) -> ast.AST:
        node.args = [self.visit(argument) for argument in node.args]
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        node.slice, node.value = self.visit(node.slice), self.visit(node.value)
        return _node(_item(node)) if _is_value(node.value) else node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id not in self.values:
            raise _Unsuitable(node.id)
        return _node(self.values[node.id])


def _node(value: Any) -> ast.expr:
    return ast.List([_node(item) for item in value]) if isinstance(value, list) else ast.Constant(value)


def _text(value: Any) -> str:
    return ast.unparse(value if isinstance(value, ast.AST) else _node(value)).replace(" ", "")


def _is_value(node: ast.AST) -> bool:
    if isinstance(node, ast.List):
        return all(_is_value(item) for item in node.elts)
    return isinstance(node, ast.Constant)


def _parts(node: ast.AST) -> Iterator[tuple[str, int | None]]:
    """Where the operands of a node are: field, and place in it."""
    for name in ("left", "value", "slice", "operand"):
        if isinstance(getattr(node, name, None), ast.expr):
            yield name, None
    for name in ("comparators", "args", "elts"):
        for place in range(len(getattr(node, name, []))):
            yield name, place
    if isinstance(getattr(node, "right", None), ast.expr):
        yield "right", None


def _reduce(node: ast.expr) -> ast.expr | None:
    """The expression after its next operation; None if it is a value."""
    if _is_value(node):
        return None
    for name, place in _parts(node):
        part = getattr(node, name) if place is None else getattr(node, name)[place]
        if not _is_value(part):
            smaller = _reduce(part)
            if place is None:
                setattr(node, name, smaller)
            else:
                getattr(node, name)[place] = smaller
            return node
    return _node(_bounded(_computed(node)))


def _computed(node: ast.expr) -> Any:
    """The value of one operation on values."""
    match node:
        case ast.BinOp(left=left, op=op, right=right):
            first, second = ast.literal_eval(left), ast.literal_eval(right)
            if isinstance(op, (ast.FloorDiv, ast.Mod)) and (second <= 0 or first < 0):
                raise _Unsuitable("division")  # of negative numbers: too rarely known
            return _OPERATIONS[type(op)](first, second)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -ast.literal_eval(operand)
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return _COMPARISONS[type(op)](ast.literal_eval(left), ast.literal_eval(right))
        case ast.Call(func=ast.Name(id=name), args=[argument]):
            return _FUNCTIONS[name](ast.literal_eval(argument))
        case ast.Subscript():
            return _item(node)
        case _:
            raise _Unsuitable(ast.dump(node))


def _item(node: ast.Subscript) -> Any:
    items, index = ast.literal_eval(node.value), ast.literal_eval(node.slice)
    if not -len(items) <= index < len(items):
        raise _Unsuitable("index")
    return items[index]


def _bounded(value: Any) -> Any:
    for number in value if isinstance(value, list) else [value]:
        if abs(number) > MOST_VALUE:
            raise _Unsuitable("too large")
    if isinstance(value, list) and len(value) > 8:
        raise _Unsuitable("too long")
    return value


# ---- writing programs -----------------------------------------------------------------------------------------------


def _names(rng: random.Random, number: int) -> list[str]:
    return rng.sample(["a", "b", "c", "d", "k", "n", "x", "y"], number)


def _row(rng: random.Random) -> str:
    """Two assignments and a print."""
    a, b = _names(rng, 2)
    second = rng.choice([f"{a}*{_digit(rng)}", f"{a}+{_digit(rng)}", f"{rng.randint(9, 20)}-{a}", f"{a}*{a}"])
    shown = rng.choice([f"{b}+{_digit(rng)}", f"{b}-{_digit(rng)}", f"{b}*{rng.randint(2, 5)}", f"{a}+{b}", f"{b}-{a}"])
    return f"{a}={_digit(rng)};{b}={second};print({shown})"


def _digit(rng: random.Random) -> int:
    return rng.randint(2, 9)


def _branch(rng: random.Random) -> str:
    """Two variables, a condition that changes one of them, perhaps another change, a print."""
    a, b = _names(rng, 2)
    test = rng.choice([f"{a}>{b}", f"{a}%{b}>{rng.randint(0, 2)}", f"{a}//{b}<{rng.randint(2, 4)}", f"{a}%2==0"])
    change = rng.choice([f"{a}-={b}", f"{a}+={b}*{rng.randint(2, 4)}", f"{b}*={rng.randint(2, 5)}", f"{a}={a}//2"])
    lines = [f"{a}={rng.randint(4, 30)};{b}={_digit(rng)}", f"if {test}:{change}"]
    if rng.random() < 0.5:
        lines.append(f"else:{rng.choice([f'{b}+={_digit(rng)}', f'{a}*=2', f'{a}+={_digit(rng)}'])}")
    if rng.random() < 0.5:
        lines.append(rng.choice([f"{b}+={a}", f"{a}={a}%{_digit(rng)}", f"{b}={a}-{b}"]))
    lines.append(f"print({rng.choice([f'{a}+{b}', f'{a}*{rng.randint(2, 4)}', f'{a}*{b}', f'{b}-{a}'])})")
    return "\n".join(lines)


def _list(rng: random.Random, number: int) -> str:
    return "[" + ",".join(str(rng.randint(1, 9)) for _ in range(number)) + "]"


def _loop(rng: random.Random) -> str:
    """One loop with a body of one line, or a few operations on a list."""
    s, n, x = _names(rng, 3)
    kind = rng.randrange(4)
    if kind == 0:
        change = rng.choice(["{s}+=i*{d}", "{s}+=i+{d}", "{s}={s}*2-i", "{s}+=i*i"]).format(s=s, d=_digit(rng))
        start = rng.choice(["", f"{rng.randint(1, 4)},"])
        stop = rng.randint(2, 4) + int(start[:-1] or 0)
        return f"{s}={_digit(rng)}\nfor i in range({start}{stop}):{change}\nprint({s})"
    if kind == 1:
        change = rng.choice(["{s}+=i*{d}", "{s}={s}*2+i", "{s}={d}*i-{s}"]).format(s=s, d=rng.randint(2, 4))
        return f"{s}={rng.randint(0, 9)}\nfor i in {_list(rng, rng.randint(2, 4))}:{change}\nprint({s})"
    if kind == 2:
        shrink = rng.choice([f"{n}//=2", f"{n}-={_digit(rng)}", f"{n}=({n}-1)//2"])
        return f"{n}={rng.randint(12, 40)};{s}=0\nwhile {n}>{rng.randint(2, 8)}:{shrink};{s}+=1\nprint({s},{n})"
    first, second = rng.choice(["max", "min", "len", "sum"]), rng.choice(["max", "min", "sum"])
    grow = rng.choice([f"{x}[{rng.randint(0, 2)}]*{rng.randint(2, 4)}", f"{first}({x})+{_digit(rng)}"])
    shown = rng.choice([f"{second}({x})-{x}[1]", f"sorted({x})[{rng.randint(0, 3)}]", f"{x}[-1]*{first}({x})"])
    return f"{x}={_list(rng, 3)}\n{x}.append({grow})\nprint({shown})"


def _nested(rng: random.Random) -> str:
    """A loop with a condition in it, a loop in a loop, or a loop that changes a list."""
    s, n, x = _names(rng, 3)
    kind = rng.randrange(4)
    yes = rng.choice([f"{s}+=i", f"{s}+=i*{rng.randint(2, 4)}", f"{s}={s}*2"])
    no = rng.choice([f"{s}-={rng.randint(1, 4)}", f"{s}+={rng.randint(1, 9)}", f"{s}={s}//2"])
    if kind == 0:
        divisor = rng.randint(2, 3)
        test = rng.choice([f"i%{divisor}==0", f"i>{rng.randint(1, 3)}", f"{s}>{rng.randint(6, 15)}"])
        head = f"{s}={rng.randint(1, 12)}\nfor i in range({rng.randint(3, 5)}):"
        return f"{head}\n if {test}:{yes}\n else:{no}\nprint({s})"
    if kind == 1:
        test = rng.choice(["i%2==0", f"i>{rng.randint(3, 6)}", f"i<{rng.randint(4, 7)}"])
        head = f"{s}={rng.randint(0, 9)};{n}=0\nfor i in {_list(rng, rng.randint(3, 5))}:"
        return f"{head}\n if {test}:{yes}\n else:{n}+=i\nprint({s},{n})"
    if kind == 2:
        inner = rng.choice([f"{s}+=i*j", f"{s}+=i+j", f"{s}={s}+j-i"])
        head = f"{s}={rng.randint(0, 9)}\nfor i in range({rng.randint(2, 3)}):"
        return f"{head}\n for j in range({rng.randint(1, 3)},{rng.randint(4, 5)}):{inner}\nprint({s})"
    change = rng.choice([f"{x}[i]-={rng.randint(1, 3)}", f"{x}[i]*=2", f"{x}[i]+={x}[0]"])
    other = rng.choice([f"{x}.append(i)", f"{x}[0]+=i", f"{x}[2]+=1"])
    shown = rng.choice([f"sum({x}),len({x})", f"max({x})-min({x})", f"{x}[0],{x}[-1]"])
    head = f"{x}={_list(rng, 3)}\nfor i in range(3):"
    return f"{head}\n if {x}[i]>{rng.randint(2, 6)}:{change}\n else:{other}\nprint({shown})"


_WRITERS: dict[int, Callable[[random.Random], str]] = {1: _row, 2: _branch, 3: _loop, 4: _nested}
