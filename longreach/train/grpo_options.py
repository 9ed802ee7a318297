"""The options of `longreach grpo`, their defaults, and the checks that need no model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longreach.chat.modes import Mode
from longreach.engine.sampling import SamplingParams
from longreach.errors import RequestError
from longreach.evaluate.server_source import Update
from longreach.train.losses import Mean
from longreach.train.modes_option import read_by_mode, read_modes
from longreach.train.rewards import Normalise
from longreach.train.tuning import COMMON, Several, TuningOptions

KEY_VARIABLE = "LONGREACH_ROLLOUT_KEY"
"""Environment variable with the key of the server that `--rollouts` names."""

WINDOWS: dict[Mode, int] = {"non-think": 64, "think-high": 256, "think-max": 384}
"""Tokens of an episode at most: the announcement's 8K, 128K and 384K are for models a million times as large."""

LEARNING_RATES = {"muon": 1e-3, "adamw": 3e-4}
"""About a twentieth of the rates of pretraining. Preset micro on products of 2 x 1 digits, 24 steps of 128 attempts: attempts
right went from 44 % to 55 % at 0.0005 and at 0.001, to 53 % at 0.002, and nowhere at 0.004."""


ADAPTERS_RATE = 1e-3
"""Of a policy that had 73 % of the products of two digits right, the mean over steps 21 to 25 was 75 % at 0.0002, 78 % at 0.001
and 75 % at 0.004, and with all weights by Muon 79 %; one run each, so these are hardly apart."""


@dataclass(frozen=True, kw_only=True)
class GRPOOptions(TuningOptions):
    """Learn from rewards: attempts at problems, compared with other attempts at the same problem.

    RUN should have between a tenth and nine tenths of the problems right: where all attempts at a problem are right, or all
    wrong, there is nothing to compare.
    """

    task: Several = ()
    """Tasks to learn, as in arithmetic:level=1-2; SPEC@WEIGHT weighs several."""
    modes: Several = ()
    """Modes to answer in, which a task's problems take in turn: non-think, think-high (default), think-max."""
    problems: int | None = None
    """Problems per step (default 32)."""
    group_size: int | None = None
    """Attempts at each (default 8)."""
    updates: int | None = None
    """Times the samples of a step are learned from (default 1)."""
    minibatches: int | None = None
    """Parts a step's samples are split into, each an optimizer step (default 1)."""
    mean: Mean | None = None
    """How terms are averaged: over all tokens (default), over sequences of their means, or sums per window."""
    normalise: Normalise | None = None
    """Divide a group's advantages by their standard deviation (std) or not (default none)."""
    clip_low: float | None = None
    """The ratio of the policies counts down to 1 minus this (default 0.2)."""
    clip_high: float | None = None
    """The ratio of the policies counts up to 1 plus this (default 0.28)."""
    delta: float | None = None
    """A bad sample is left out where the mean of log(old / new) over its tokens is above this (default 0.5)."""
    kl: float | None = None
    """Weight of the KL to the model of RUN (default 0: that model is not even loaded)."""
    temperature: float | None = None
    """Of the attempts (default 1)."""
    top_p: float | None = None
    """Draw among the likeliest tokens that together have this probability (default 1)."""
    top_k: int | None = None
    """Draw among so many likeliest tokens (default 0: all)."""
    min_p: float | None = None
    """Leave out tokens with less than this fraction of the likeliest one's probability (default 0)."""
    windows: str | None = None
    """Tokens of an episode at most, prompt included, by mode: non-think=64,think-high=256,think-max=384 (default), or one
    number for all."""
    penalties: str | None = None
    """What an answer that fills its window loses, by mode; shorter ones lose their share (default 0)."""
    penalty_cap: float | None = None
    """No answer loses more (default 0.5)."""
    most_turns: int | None = None
    """Answers of the model in an episode, tool calls included (default 8)."""
    row_tokens: int | None = None
    """Tokens in one forward pass of an update (default 4096 on a CPU, 65536 on a GPU)."""
    judge: str | None = None
    """Who judges in place of the tasks' verifiers: a run directory, the URL of an OpenAI-compatible server, or self."""
    judge_model: str | None = None
    """The model's name on that server."""
    rubric: Path | None = None
    """File that says what --judge is to look for (default: whether the answer is correct, complete and to the point)."""
    rollouts: str | None = None
    """URL of a server (vLLM, SGLang) that makes the attempts instead of this process. Its key: $LONGREACH_ROLLOUT_KEY."""
    rollout_model: str | None = None
    """The model's name on that server."""
    rollout_update: Update | None = None
    """How that server gets new weights after a step: none (default; it keeps its own), vllm or sglang."""
    eval_every: int | None = None
    """Steps between scores on held-out problems (default 0: only at begin and end)."""
    eval_count: int | None = None
    """Held-out problems of each task and mode (default 200; 0: no scores)."""
    max_running: int = 64
    """Attempts that decode beside each other."""
    memory_gib: float = 1.0
    """For the engine's caches."""
    judge_workers: int | None = None
    """Processes for verifiers that run code (default: one per core, at most 4)."""
    judge_timeout: float = 10.0
    """Seconds for one answer in such a process."""


DEFAULTS: dict[str, Any] = COMMON | {
    "task": None, "modes": ["think-high"], "problems": 32, "group_size": 8, "updates": 1, "minibatches": 1,
    "mean": "tokens", "normalise": "none", "clip_low": 0.2, "clip_high": 0.28, "delta": 0.5, "kl": 0.0,
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "windows": None, "penalties": None, "penalty_cap": 0.5,
    "most_turns": 8, "row_tokens": None, "judge": None, "judge_model": None, "rubric": None, "rollouts": None,
    "rollout_model": None, "rollout_update": "none", "eval_every": 0, "eval_count": 200,
}  # fmt: skip


def defaults(options: GRPOOptions, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting that decides what is learned, with what it is where nothing is given."""
    kind = saved.get("optimizer", options.optimizer) or "muon"
    return DEFAULTS | {"lr": ADAPTERS_RATE if options.lora is not None else LEARNING_RATES[kind]}


@dataclass(frozen=True)
class Plan:
    """What the settings of text form mean.

    Attributes:
        windows: tokens of an episode at most. penalties: k of the length penalty.
    """

    modes: tuple[Mode, ...]
    windows: dict[Mode, int]
    penalties: dict[Mode, float]
    params: SamplingParams


def make_plan(settings: Mapping[str, Any]) -> Plan:
    """Check the settings, as far as that goes without a model.

    Raises:
        RequestError: the line names the option.
    """
    for name, least in (("problems", 1), ("group_size", 2), ("updates", 1), ("minibatches", 1), ("most_turns", 1),
                        ("row_tokens", 1), ("eval_every", 0), ("eval_count", 0)):  # fmt: skip
        value = settings[name]
        if value is not None and value < least:
            why = "; a group of one has nothing to be compared with" if name == "group_size" else ""
            raise RequestError(f"{_flag(name)} {value} must be at least {least}{why}")
    if settings["minibatches"] > settings["problems"]:
        raise RequestError(
            f"--minibatches {settings['minibatches']} is more than --problems {settings['problems']}; groups stay whole"
        )
    for name in ("clip_low", "clip_high", "delta", "kl", "penalty_cap"):
        if not 0 <= settings[name] < math.inf:
            raise RequestError(f"{_flag(name)} {settings[name]:g} must be 0 or more")
    if not settings["clip_low"] < 1:
        raise RequestError(f"--clip-low {settings['clip_low']:g} must be below 1")
    if settings["temperature"] == 0:
        raise RequestError("--temperature 0 makes all attempts at a problem the same; give 1, or a little less")
    params = SamplingParams(**{name: settings[name] for name in ("temperature", "top_p", "top_k", "min_p")})
    params.check(1)
    if settings["judge"] is None and (settings["rubric"] is not None or settings["judge_model"] is not None):
        raise RequestError("--rubric and --judge-model are for a judge; say with --judge who it is")
    if settings["rollouts"] is not None and settings["rollout_model"] is None:
        raise RequestError("--rollouts needs --rollout-model, the model's name on that server")
    if settings["rollouts"] is None and (settings["rollout_model"] is not None or settings["rollout_update"] != "none"):
        raise RequestError("--rollout-model and --rollout-update are for a server; name it with --rollouts URL")
    modes = read_modes(settings["modes"])
    text = settings["windows"]
    windows = read_by_mode(text, modes, "--windows", default=WINDOWS, least=2) if text else WINDOWS
    for mode in modes:
        if windows[mode] != int(windows[mode]):
            raise RequestError(f"--windows {mode}={windows[mode]:g}: a token is not divided; give a whole number")
    text, none = settings["penalties"], dict.fromkeys(modes, 0.0)
    penalties = read_by_mode(text, modes, "--penalties", default=none) if text else none
    return Plan(modes, {mode: int(windows[mode]) for mode in modes}, penalties, params)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
