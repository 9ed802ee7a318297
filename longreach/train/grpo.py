"""Group-relative policy optimisation: `longreach grpo runs/sft --task arithmetic:level=2 --out runs/rl`.

    attempts   G for each of P problems, drawn by the engine from the weights as they are
    reward     verdict − min(cap, k(mode) · tokens / window)
    advantage  reward − mean over the G
    loss       −min(r A, clip(r, 1 − 0.2, 1 + 0.28) A) + β KL(π ‖ π_RUN),    r = π / π_old of each written token

The loop in `GRPO.learn` is the whole algorithm: jobs, attempts, rewards, advantages, update, record, checkpoint. What a step
asks for is a function of its number, and what was drawn is on record before anything is learned from it, so a run that was
killed goes on with the very attempts it had begun and ends in the same weights. Attempts may also come from a server.
Source: DeepSeek-V4 report, section 5.1; DeepSeek-V3.2 report, section 3.1. Pure parts: losses, rewards, replay.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from longreach.chat.modes import Mode
from longreach.checkpoint.load import load_model
from longreach.engine.sampling import FinishReason
from longreach.errors import RequestError
from longreach.evaluate.engine_source import EngineSource
from longreach.evaluate.episode import Sample
from longreach.evaluate.judge import Judged, open_judge
from longreach.evaluate.judging import Judging, was_judged
from longreach.evaluate.score import Result, Score, paired, score
from longreach.evaluate.server_source import ServerSource
from longreach.model.transformer import Transformer
from longreach.runtime import json_line, log, setup_logging, write_atomic
from longreach.tasks.base import Task
from longreach.train.curves import read_runs
from longreach.train.grpo_options import KEY_VARIABLE, GRPOOptions, Plan, defaults, make_plan
from longreach.train.metrics import TrainingProgress, duration
from longreach.train.modes_option import open_weighted
from longreach.train.page import page
from longreach.train.policy import Policy
from longreach.train.rewards import group_advantages, length_penalties
from longreach.train.rollout import Roller, group_jobs, weights_mark
from longreach.train.stopping import StopRequest, stop_signals
from longreach.train.tuning import Tuning, saved_settings, settle

STEPS = 100
"""Where neither --steps nor --minutes is given."""

MOST_USELESS_STEPS = 20
"""Steps in a row without any group to learn from, after which a run ends."""

SMOOTHING = 0.8
"""Weight of the past in the curves of RUN/plot.html."""


def main(options: GRPOOptions) -> int:
    """Run the command; returns the exit code (130 after Ctrl-C, 143 after SIGTERM, both with the run saved)."""
    setup_logging()
    saved = saved_settings(options, "grpo")
    settings = settle(options, defaults(options, saved), saved)
    plan = make_plan(settings)
    tasks, weights = open_weighted(settings["task"] or ())
    tuning = Tuning.begin("grpo", options, settings, saved)
    check_windows(plan, tuning.master)
    steps = options.steps or (saved.get("steps") if options.minutes is None else None)
    if steps is None and options.minutes is None:
        steps = STEPS
    if steps is not None and tuning.step >= steps:
        log.info("%s is finished: %d steps; give more --steps or --minutes to train on", tuning.run.path, tuning.step)
        return 0
    with contextlib.ExitStack() as stack:
        stack.callback(tuning.mirror.close)
        grpo = GRPO.open(options, tuning, plan, tasks, weights, stack)
        stop = stack.enter_context(stop_signals())
        grpo.learn(steps, options.minutes, stop)
    return report(options, grpo, stop)


def check_windows(plan: Plan, model: Transformer) -> None:
    """Refuse a window beyond the model's context.

    Raises:
        RequestError: as said.
    """
    context = model.config.max_position_embeddings
    for mode, window in plan.windows.items():
        if window > context:
            raise RequestError(f"--windows {mode}={window} is beyond the model's context of {context}; give less")


class GRPO:
    """One sitting of a run: what the loop needs, and what it knows at the end.

    Attributes:
        source: supplies the attempts; local: this process's engine, which also answers the held-out problems.
        before, after: scores at the begin of the run and at its end; None where they are not wanted, or not there yet.
        useless_steps: in a row, until now.
    """

    def __init__(self, tuning: Tuning, plan: Plan, tasks: Sequence[Task], weights: Sequence[float], roller: Roller,
                 local: EngineSource, judging: Judging, policy: Policy) -> None:  # fmt: skip
        self.tuning, self.plan, self.tasks, self.weights = tuning, plan, tasks, weights
        self.roller, self.local, self.judging, self.policy = roller, local, judging, policy
        self.settings = tuning.settings
        self.useless_steps: int = tuning.extra.get("useless_steps", 0)
        self.samples: int = tuning.extra.get("samples", 0)
        self.tokens: int = tuning.extra.get("tokens", 0)
        self.before: list[Score] | None = restored(tuning.extra.get("before"))
        self.after: list[Score] | None = None
        self.recent: deque[dict[str, Any]] = deque(maxlen=10)
        self.finished = False

    @classmethod
    def open(cls, options: GRPOOptions, tuning: Tuning, plan: Plan, tasks: Sequence[Task], weights: Sequence[float],
             stack: contextlib.ExitStack) -> GRPO:  # fmt: skip
        """Engine or server, judges, the reference model; all are closed with `stack`.

        Raises:
            RequestError: the server or the judge cannot be used, or memory is too little.
        """
        settings, tokenizer = tuning.settings, tuning.tokenizer
        # Compiled rows make the invariant arithmetic free in float32 on a CPU. Elsewhere it costs most of the speed (bfloat16
        # on a CPU: 57 tokens/s instead of 790), so there an interrupted attempt goes on, but not to the very tokens that
        # it would have had.
        is_exact = tuning.device.type == "cpu" and tuning.model.dtype == torch.float32
        model = tuning.rollout_model() if is_exact else tuning.model
        local = EngineSource(model, tokenizer, max_running=options.max_running, memory_gib=options.memory_gib)
        stack.callback(local.close)
        server = None
        if settings["rollouts"] is not None:
            server = ServerSource(
                settings["rollouts"], settings["rollout_model"], tokenizer, key=os.environ.get(KEY_VARIABLE, ""),
                update=settings["rollout_update"], at_once=options.max_running,
            )  # fmt: skip
            stack.callback(server.close)
        judging = stack.enter_context(Judging(options.judge_workers, options.judge_timeout))
        if settings["judge"] is not None:
            judge = open_judge(
                settings["judge"], Path(settings["rubric"]) if settings["rubric"] else None,
                model=settings["judge_model"] or "", source=local, tokenizer=tokenizer, device=options.device,
            )  # fmt: skip
            tasks = [Judged(task, judge) for task in tasks]
        reference = None
        if settings["kl"] > 0:
            reference = load_model(tuning.source, dtype=tuning.model.dtype, device=tuning.device).requires_grad_(False)
        policy = Policy(tuning, plan.params, reference, is_elsewhere=server is not None)
        roller = stack.enter_context(Roller(tuning.run, server or local, tokenizer, judging))
        roller.cover(tuning.step)
        grpo = cls(tuning, plan, tasks, weights, roller, local, judging, policy)
        if server is not None:
            grpo.hand_over()  # it may have been started with other weights, or be steps ahead of the checkpoint
        for label, text in grpo.decided():
            log.info("%-10s %s", label, text)
        return grpo

    def decided(self) -> list[tuple[str, str]]:
        """What the run does, and why, in a few lines."""
        s = self.settings
        asked = ", ".join(f"{task.name}@{weight:g}" for task, weight in zip(self.tasks, self.weights, strict=True))
        windows = ", ".join(f"{mode} within {window}" for mode, window in self.plan.windows.items())
        updates = s["updates"] * s["minibatches"]
        scoring = self.policy.scoring
        replay = (f"experts, kept ids and log-probabilities of a scoring pass ({scoring})" if scoring else
                  "not needed: one update, by the weights and from the distribution that drew")  # fmt: skip
        return [
            ("tasks", asked),
            ("engine", f"{self.local.engine.model.config.arithmetic} arithmetic"),
            ("attempts", f"{s['problems']} problems x {s['group_size']} a step; {windows} tokens"),
            (
                "updates",
                f"{updates} a step; mean over {s['mean']}, ratio {1 - s['clip_low']:g} to {1 + s['clip_high']:g}",
            ),
            ("replay", replay),
            ("reference", f"KL to RUN, weight {s['kl']:g}" if s["kl"] else "none (--kl 0)"),
        ]

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def learn(self, steps: int | None, minutes: float | None, stop: StopRequest) -> None:
        """Train until the steps or the time are over, nothing is left to learn, or `stop` is asked for; then score and save."""
        tuning, settings, G = self.tuning, self.settings, self.settings["group_size"]
        if self.before is None:
            self.before = self.held_out()
            self.save()
        with TrainingProgress() as display:
            while not stop.asked and not self.is_over(steps, minutes):
                start, step = time.perf_counter(), tuning.step
                jobs = group_jobs(
                    self.tasks, self.weights, step=step, problems=settings["problems"], group_size=G,
                    seed=settings["seed"], modes=self.plan.modes, windows=self.plan.windows, params=self.plan.params,
                    most_turns=settings["most_turns"],
                )  # fmt: skip
                samples = self.roller.roll(step, jobs, mark=weights_mark(tuning.model))
                rewards_N = self.rewards(samples)
                advantages_PG, useless = group_advantages(rewards_N.view(-1, G), settings["normalise"])
                record = self.figures(samples, rewards_N.tolist(), useless)
                record |= self.policy.learn(samples, advantages_PG.flatten(), G)
                self.hand_over()

                self.samples += len(samples)
                self.tokens += record["written_tokens"]
                self.useless_steps = self.useless_steps + 1 if useless == len(advantages_PG) else 0
                record |= {"samples": self.samples, "tokens": self.tokens, "step_s": time.perf_counter() - start}
                tuning.write(record)
                self.recent.append(record)
                display.show(tuning.step, steps or tuning.step + 1, progress_line(list(self.recent)),
                             self.seconds_left(steps, minutes))  # fmt: skip
                over = self.is_over(steps, minutes)
                if settings["eval_every"] and tuning.step % settings["eval_every"] == 0 and not over:
                    self.held_out()
                if tuning.is_due and not over:
                    self.save()
        self.finished = not stop.asked
        if self.useless_steps >= MOST_USELESS_STEPS:
            log.warning("%s", self.why_nothing_is_left())
        if self.finished:
            self.after = self.held_out()
        self.save()

    def is_over(self, steps: int | None, minutes: float | None) -> bool:
        """Whether another step should not begin."""
        step, seconds = self.tuning.step, self.tuning.seconds
        if (steps is not None and step >= steps) or self.useless_steps >= MOST_USELESS_STEPS:
            return True
        # Half a step: so that runs are on average as long as was asked for.
        return minutes is not None and seconds + self.pace() / 2 >= 60 * minutes

    def pace(self) -> float:
        """Seconds per step of late; 0 before the first."""
        return fmean(record["step_s"] for record in self.recent) if self.recent else 0.0

    def seconds_left(self, steps: int | None, minutes: float | None) -> float:
        by_steps = self.pace() * (steps - self.tuning.step) if steps is not None else float("inf")
        by_time = 60 * minutes - self.tuning.seconds if minutes is not None else float("inf")
        return min(by_steps, by_time)

    def rewards(self, samples: Sequence[Sample]) -> torch.Tensor:
        """float64 `(N,)`: verdicts less the penalties for length."""
        penalties = length_penalties(
            [sample.num_written for sample in samples], [sample.job.window for sample in samples],
            [self.plan.penalties[sample.job.mode] for sample in samples], self.settings["penalty_cap"],
        )  # fmt: skip
        rewards = [sample.verdict.reward - p for sample, p in zip(samples, penalties, strict=True)]
        return torch.tensor(rewards, dtype=torch.float64)

    def figures(self, samples: Sequence[Sample], rewards: Sequence[float], useless: int) -> dict[str, Any]:
        """What a step's attempts were like."""
        written = sum(sample.num_written for sample in samples)
        record: dict[str, Any] = {
            "reward": fmean(rewards), "accuracy": fmean(sample.verdict.is_right for sample in samples),
            "length": written / len(samples),
            "truncated": fmean(sample.finish is FinishReason.LENGTH for sample in samples),
            "useless_groups": useless / (len(samples) / self.settings["group_size"]),
            "unjudged": sum(not was_judged(sample.verdict) for sample in samples), "written_tokens": written,
            "rollout_s": self.roller.seconds, "rollout_tokens_per_s": written / max(self.roller.seconds, 1e-9),
        }  # fmt: skip
        if self.roller.taken_up:
            record["taken_up"] = self.roller.taken_up
        if len(self.plan.modes) > 1:
            for mode in self.plan.modes:
                lengths = [sample.num_written for sample in samples if sample.job.mode == mode]
                if lengths:
                    record[f"length_{mode}"] = fmean(lengths)
        if len(self.tasks) > 1:
            for task in self.tasks:
                right = [sample.verdict.is_right for sample in samples if sample.job.task.name == task.name]
                if right:
                    record[f"accuracy_{task.name}"] = fmean(right)
        return record

    def hand_over(self) -> None:
        """Let the attempts that follow come from the new weights."""
        self.local.weights_changed()
        if isinstance(self.roller.source, ServerSource) and self.settings["rollout_update"] != "none":
            self.tuning.save_weights()
            self.roller.source.update_weights(self.tuning.run.model_dir)

    def held_out(self) -> list[Score]:
        """Score every task in every mode on problems that no training sees; none where --eval-count is 0."""
        if not self.settings["eval_count"]:
            return []
        start = time.perf_counter()
        scores = score(
            self.local, self.tuning.tokenizer, self.tasks, modes=self.plan.modes, count=self.settings["eval_count"],
            seed=self.settings["seed"], window=self.plan.windows, judging=self.judging,
            temperature=self.settings["temperature"],
        )  # fmt: skip
        for one in scores:
            log.info("%-10s step %d: %s", "held out", self.tuning.step, one)
        self.tuning.write({
            "eval_accuracy": fmean(one.accuracy for one in scores), "eval_length": fmean(one.mean_tokens for one in scores),
            "eval": [one.record() for one in scores], "eval_s": time.perf_counter() - start,
        })  # fmt: skip
        return scores

    def save(self) -> None:
        """Save the state to go on from and the model to use; attempts of the steps before it become samples to be read."""
        self.tuning.save({
            "useless_steps": self.useless_steps, "samples": self.samples, "tokens": self.tokens,
            "before": None if self.before is None else [dataclasses.asdict(one) for one in self.before],
        })  # fmt: skip
        self.roller.cover(self.tuning.step)

    def why_nothing_is_left(self) -> str:
        share = fmean(record["accuracy"] for record in self.recent)
        if share > 0.5:
            hint = "everything is right: the task is learned; choose a harder level"
        elif fmean(record["truncated"] for record in self.recent) > 0.9:
            hint = "nearly every attempt was cut off: give larger --windows"
        elif share == 0:
            hint = "nothing is right: let the model learn from worked solutions first (longreach sft), or choose an easier level"
        else:
            hint = "raise --group-size, or choose a task with partial rewards"
        return f"no group of the last {self.useless_steps} steps had different rewards, so there is nothing to learn; {hint}"


def restored(saved: list[dict[str, Any]] | None) -> list[Score] | None:
    """Scores out of a checkpoint."""
    if saved is None:
        return None
    return [Score(**{**one, "results": tuple(Result(**result) for result in one["results"])}) for one in saved]


def progress_line(records: Sequence[dict[str, Any]]) -> str:
    """The last steps in one line."""

    def mean(name: str) -> float | None:
        values = [record[name] for record in records if record.get(name) is not None]
        return fmean(values) if values else None

    parts = [
        f"{label} {form.format(value)}"
        for label, form, name in (
            ("reward", "{:.3f}", "reward"), ("right", "{:.0%}", "accuracy"), ("length", "{:.0f}", "length"),
            ("entropy", "{:.3f}", "entropy"), ("useless", "{:.0%}", "useless_groups"), ("cut off", "{:.0%}", "truncated"),
            ("drawn", "{:,.0f}/s", "rollout_tokens_per_s"), ("learned", "{:,.0f}/s", "update_tokens_per_s"),
        )
        if (value := mean(name)) is not None and (name != "truncated" or value)
    ]  # fmt: skip
    if unjudged := records[-1].get("unjudged"):
        parts.append(f"unjudged {unjudged}")
    return "  ".join(parts)


# ---- after the loop -------------------------------------------------------------------------------------------------


def table(before: Sequence[Score], after: Sequence[Score]) -> str:
    """Held-out scores before and after, with the difference on the same problems and its interval of 95 %."""
    lines = []
    rows: list[tuple[str, Mode, Score, Score]] = [(a.task, a.mode, b, a) for b, a in zip(before, after, strict=True)]
    width = max(len(task) for task, *_ in rows)
    for task, mode, b, a in rows:
        d = paired(b, a)
        lines.append(
            f"{task:<{width}}  {mode:<10}  {b.accuracy:6.1%} -> {a.accuracy:6.1%}  {100 * d.difference:+5.1f} points "
            f"({100 * d.low:+.1f} to {100 * d.high:+.1f})  {b.mean_tokens:.0f} -> {a.mean_tokens:.0f} tokens"
        )
    return "\n".join(lines)


def report(options: GRPOOptions, grpo: GRPO, stop: StopRequest) -> int:
    """Print what came of it; returns the exit code."""
    tuning, run = grpo.tuning, grpo.tuning.run
    records = list(grpo.recent)
    if records:
        write_atomic(run.path / "plot.html", page(read_runs([run.path], "step", SMOOTHING), "step", SMOOTHING))
    pairs = list(zip(grpo.before or [], grpo.after or [], strict=True)) if grpo.after else []
    figures: dict[str, Any] = {
        "steps": tuning.step, "samples": grpo.samples, "tokens": grpo.tokens, "seconds": round(tuning.seconds, 1),
        "reward": fmean(record["reward"] for record in records) if records else None,
        "accuracy": fmean(record["accuracy"] for record in records) if records else None,
        "rollout_tokens_per_s": round(fmean(record["rollout_tokens_per_s"] for record in records)) if records else None,
        "update_tokens_per_s": round(fmean(record["update_tokens_per_s"] for record in records)) if records else None,
        "held_out": [
            {"before": b.record(), "after": a.record(), "difference": paired(b, a)._asdict()} for b, a in pairs
        ],
    }  # fmt: skip
    log.info("%d steps, %s attempts, %s tokens drawn in %s", tuning.step, f"{grpo.samples:,}", f"{grpo.tokens:,}",
             duration(tuning.seconds))  # fmt: skip
    follow_up = f"longreach grpo --out {run.path} --resume" if stop.asked else f"longreach samples {run.path} --wrong"
    if options.json:
        print(json_line({"command": "grpo", "run": str(run.path), "finished": grpo.finished, **figures,
                         "figures": figures}))  # fmt: skip
    else:
        if pairs:
            print(table(grpo.before or [], grpo.after or []))
        print(f"{'stopped and saved' if stop.asked else 'model'}: {run.model_dir}")
        if records:
            print(f"curves: {run.path / 'plot.html'}")
        print(f"next: {follow_up}")
    return 128 + stop.signal if stop.asked else 0
