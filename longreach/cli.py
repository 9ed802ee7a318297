"""The `longreach` command: a table of verbs, each loaded only when it is the one asked for.

    longreach                     the table
    longreach pretrain --help     one verb's options
    longreach bench model         a verb with a second word

A verb is a module with a frozen dataclass of options and a function taking it; tyro turns the dataclass into options
and help text, so each option is declared once. What a user or a file got wrong (`LongreachError`) becomes one line on
stderr and exit code 2, never a traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longreach import __version__
from longreach.errors import LongreachError


@dataclass(frozen=True)
class Command:
    """Where a verb lives. The module is imported when the verb is chosen, not before."""

    module: str
    options: str
    """Name of the options dataclass in `module`."""
    summary: str
    function: str = "main"
    extra: str = ""
    """The optional dependencies it needs."""


COMMANDS: dict[str, Command] = {
    "prepare": Command(
        "longreach.train.prepare", "PrepareOptions", "encode texts into token shards, once for many runs"
    ),
    "pretrain": Command("longreach.train.pretrain", "PretrainOptions", "train a model from nothing on text"),
    "train-indexer": Command(
        "longreach.train.train_indexer", "TrainIndexerOptions", "train the indexers of a checkpoint, nothing else"
    ),
    "sft": Command("longreach.train.sft", "SFTOptions", "teach a model by examples: conversations, or solved tasks"),
    "grpo": Command(
        "longreach.train.grpo", "GRPOOptions", "teach a model by rewards: its own attempts at tasks, judged"
    ),
    "distill": Command(
        "longreach.train.distill", "DistillOptions", "merge experts: a student learns on its own samples"
    ),
    "average": Command("longreach.train.average", "AverageOptions", "average the weights of several runs"),
    "merge": Command("longreach.train.merge", "MergeOptions", "make an ordinary model of a run with --lora"),
    "samples": Command("longreach.train.samples", "SamplesOptions", "read what a model wrote while it was trained"),
    "tasks list": Command("longreach.tasks.tasks_command", "TasksOptions", "the tasks there are"),
    "tasks show": Command("longreach.tasks.tasks_command", "ShowOptions", "problems of a task, solved", "show"),
    "evaluate": Command("longreach.evaluate.evaluate_command", "EvaluateOptions", "score a model on held-out problems"),
    "plot": Command("longreach.train.plot", "PlotOptions", "draw the curves of one or several runs"),
    "generate": Command("longreach.generate", "GenerateOptions", "continue a prompt, token by token"),
    "chat": Command("longreach.terminal", "ChatOptions", "talk with a model in the terminal"),
    "serve": Command(
        "longreach.server.serve", "ServeOptions", "serve models: the API, a page, metering", extra="server"
    ),
    "keys add": Command("longreach.server.keys_command", "AddOptions", "make an API key", "add", extra="server"),
    "keys list": Command(
        "longreach.server.keys_command", "ListOptions", "the API keys there are", "list_keys", extra="server"
    ),
    "keys topup": Command(
        "longreach.server.keys_command", "TopUpOptions", "add to a key's balance", "top_up", extra="server"
    ),
    "keys revoke": Command(
        "longreach.server.keys_command", "RevokeOptions", "end an API key", "revoke", extra="server"
    ),
    "usage": Command(
        "longreach.server.usage", "UsageOptions", "what was used, and what it costs at which prices", extra="server"
    ),
    "convert": Command("longreach.checkpoint.convert", "ConvertOptions", "rewrite a checkpoint in another layout"),
    "inspect": Command("longreach.checkpoint.inspect", "InspectOptions", "say what a checkpoint holds"),
    "compare": Command("longreach.checkpoint.compare", "CompareOptions", "say whether two checkpoints are the same"),
    "experiment muon": Command("longreach.journey.experiments.muon", "MuonOptions", "Muon against AdamW, both tuned"),
    "experiment indexer": Command(
        "longreach.journey.experiments.indexer", "IndexerOptions", "what a trained indexer keeps of dense attention"
    ),
    "experiment lookup": Command(
        "longreach.journey.experiments.lookup", "LookupOptions", "facts far away, with a trained and a frozen indexer"
    ),
    "bench model": Command("longreach.bench.model", "BenchOptions", "speed and memory of prefill and decode"),
    "bench train": Command(
        "longreach.bench.train", "TrainBenchOptions", "speed and memory of training, and Muon's cost"
    ),
    "bench engine": Command(
        "longreach.bench.engine", "EngineBenchOptions", "batches, prefix hits and speculation of the engine"
    ),
    "bench serve": Command(
        "longreach.bench.serve", "ServeBenchOptions", "the server under many clients, and whether it loses anything"
    ),
    "bench post-training": Command(
        "longreach.journey.post_training", "PostTrainingOptions", "what rewards and teachers are worth at laptop size"
    ),
    "bench lora": Command(
        "longreach.journey.lora_slice",
        "LoraBenchOptions",
        "adapters beside frozen FP8 and FP4 weights of Flash's width",
    ),
    "bench cache": Command("longreach.bench.cache", "CacheBenchOptions", "what each storage precision costs and saves"),
}

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # tyro colours the box when it writes to a terminal

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's) and return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # OpenMP threads that wait by spinning stop each other when another process takes a core: a training step on two cores
    # beside one busy process went from 0.45 s to 4 s, with short spins it stays at 0.5 s. Read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except LongreachError as error:
        return _fail("longreach", str(error))
    except KeyboardInterrupt:
        print("longreach: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has what it wanted. Python would complain once more when it closes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_table(COMMANDS))
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"longreach {__version__}")
        return 0

    name, rest = argv[0], argv[1:]
    group = {verb: command for verb, command in COMMANDS.items() if verb.startswith(name + " ")}
    if group:
        if not rest or rest[0] in ("-h", "--help"):
            print(_table(group))
            return 0
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name not in COMMANDS:
        return _unknown_command(name)

    command = COMMANDS[name]
    try:
        module = importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        if not command.extra or (error.name or "longreach").startswith("longreach"):
            raise
        return _fail(f"longreach {name}", f"{error.name} is not installed: pip install 'longreach[{command.extra}]'")
    options = _parse(f"longreach {name}", getattr(module, command.options), rest)
    if isinstance(options, int):
        return options
    return getattr(module, command.function)(options) or 0


def _parse(program: str, options_type: type, argv: list[str]) -> Any:
    """The filled dataclass, or the exit code when there is nothing to run: help was asked for, or an option is wrong."""
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                options_type,
                args=argv,
                prog=program,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
            )
    except SystemExit as stop:
        if not stop.code:
            return 0
        return _fail(program, f"{_one_line(said.getvalue())}; {program} --help lists the options")


def _one_line(box: str) -> str:
    """The message inside the box that tyro draws around an error, without its advice below the first rule.

    The suggestion after an unknown option is worth keeping; it stands between the first and the second rule.
    """
    sections: list[list[str]] = [[]]
    for line in _COLOUR.sub("", box).splitlines():
        text = line.strip("╭╮╰╯│ ")
        if not text.strip("─"):
            sections.append([])
        elif not line.startswith(("╭", "╰")):
            sections[-1].append(text)
    parts = [" ".join(section) for section in sections if section]
    message = parts[0] if parts else "the options cannot be read"
    if len(parts) > 1 and parts[1].startswith("Perhaps you meant"):
        message += f". {parts[1]}"
    return " ".join(message.split()).rstrip(".")


def _table(commands: dict[str, Command]) -> str:
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in commands.items()]
    head = f"longreach {__version__}: DeepSeek-V4 in one readable codebase\n\nusage: longreach COMMAND [options]\n"
    return "\n".join([head, *lines, "", "longreach COMMAND --help shows a command's options."])


def _unknown_command(name: str) -> int:
    near = difflib.get_close_matches(name, COMMANDS, n=2, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"commands are {', '.join(COMMANDS)}"
    return _fail("longreach", f"unknown command {name!r}; {hint}")


def _fail(program: str, message: str) -> int:
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_USER_ERROR
