"""On-policy distillation: `longreach distill runs/sft --teacher mathematics=runs/math --teacher science=runs/science
--task arithmetic --task science --out runs/student`.

    loss = Σ over tokens the student wrote of  w(teacher) · KL(π_student ‖ π_teacher)  / tokens          --method full
         + 0.1 MTP + 1e-4 balance                                              to all weights but the indexers'
         + KL(attention ‖ indexer)                                             to the indexers alone
    --method token, for comparison:  A = sg[log π_teacher(y) − log π_student(y)],  loss = −A log π_student(y)

The student answers problems of all domains; each answer is read by the teacher of its task. A teacher says what it would
have written next at every position, the whole distribution and not just the one token that was drawn, so the gradient has
none of the drawing's variance at that position; the token-level form has the same mean and, as the report says, too much
of it. Divergence in this direction lets the student choose: what a teacher would never write costs much, what only the
student leaves out costs nothing.

`learn` is the whole algorithm: jobs, rollouts, teachers' hidden states, heads one after the other, step. Verdicts are
recorded and not used. A killed run goes on where it was: rollouts are journalled, and all else follows from the step.
Source: DeepSeek-V4 report, sections 5.1 and 5.2.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longreach.checkpoint.load import load_model
from longreach.data.examples import ExampleBatch, lay_out, make_example
from longreach.engine.sampling import FinishReason, SamplingParams
from longreach.errors import RequestError
from longreach.evaluate.engine_source import EngineSource
from longreach.evaluate.episode import Sample
from longreach.evaluate.judging import Judging
from longreach.evaluate.score import Score
from longreach.model.config_io import read_config
from longreach.model.features import Features
from longreach.ops.logprobs import head_logprobs
from longreach.ops.reverse_kl import head_reverse_kl
from longreach.rundir import find_model
from longreach.runtime import choose_device, json_line, log, setup_logging
from longreach.tokenizer.bpe import Tokenizer
from longreach.train.balance import expert_balance, indexer_figures, is_hashed
from longreach.train.distill_options import DistillOptions, Plan, check, defaults
from longreach.train.kept import Compared, Exam, load_scores, save_scores, table
from longreach.train.losses import balance_loss
from longreach.train.metrics import TrainingProgress, duration
from longreach.train.plot import plot_losses
from longreach.train.rollout import Roller, group_jobs, weights_mark
from longreach.train.schedule import learning_rate
from longreach.train.sft import BALANCE, MTP_WEIGHT, covered_tokens, in_batches, learned_loss, learned_targets
from longreach.train.stopping import StopRequest, stop_signals
from longreach.train.teachers import Teachers, by_teacher
from longreach.train.tuning import Tuning, saved_settings, settle

STEPS = 100
"""Where neither --steps nor --minutes is given."""

TIMED_STEPS = 4
"""Steps after which --minutes becomes a number of steps; the first of them, slower, does not count."""


def main(options: DistillOptions) -> int:
    """Run the command; returns the exit code (130 after Ctrl-C, 143 after SIGTERM, both with the run saved)."""
    setup_logging()
    saved = saved_settings(options, "distill")
    settings = settle(options, defaults(options, saved), saved)
    check(settings)
    plan = Plan.of(settings)
    student = Path(saved["source"]) if saved else find_model(options.run or "")
    config = read_config(student)
    teachers = Teachers(
        plan.runs, student=student, tokenizer=Tokenizer.load(student), vocab_size=config.vocab_size,
        resident=settings["resident"], device=choose_device(options.device).value,
        dtype=torch.bfloat16 if settings["precision"] == "bfloat16" else torch.float32,
    )  # fmt: skip
    for path, one in [(student, config), *((teachers.paths[name], teachers.configs[name]) for name in plan.runs)]:
        if (most := max(plan.windows.values())) > one.max_position_embeddings:
            raise RequestError(
                f"--windows: {most} tokens are more than the context of {path}, {one.max_position_embeddings}; give at most that"
            )
    tuning = Tuning.begin("distill", options, settings, saved)
    distillation = Distillation(tuning, plan, teachers)
    if tuning.step and 0 < planned_steps(options, tuning) <= tuning.step and distillation.is_scored:
        log.info("%s is finished: %d steps; give more --steps or --minutes to train on", tuning.run.path, tuning.step)
        return 0
    try:
        with stop_signals() as stop:
            distillation.learn(options, stop)
    finally:
        tuning.mirror.close()
    return _report(options, distillation, stop)


# ---- the loss -------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Samples of one teacher that go through the models together.

    Attributes:
        where_BT: bool `(B, T - 1)`: positions that predict a token the student wrote.
        states: the teacher's last hidden states there.
    """

    teacher: str
    batch: ExampleBatch
    where_BT: Tensor
    states: Tensor


def token_level_loss(student_logprobs_M: Tensor, teacher_logprobs_M: Tensor) -> Tensor:
    """−sg[log π_teacher − log π_student] · log π_student of each drawn token, `(M,)`.

    Over tokens drawn by the student, the mean of its gradient is the gradient of the divergence at that position.
    """
    return -(teacher_logprobs_M - student_logprobs_M).detach() * student_logprobs_M


class Distillation:
    """One sitting of a run: what the loop needs, and what it knows at the end.

    Attributes:
        steps: planned; 0 while --minutes has not been turned into a number of them.
        tokens: read so far, over all sittings. losses: of the last steps.
        scores: of the teachers by name, and under STUDENT the student's before it learned; after: at the end.
    """

    def __init__(self, tuning: Tuning, plan: Plan, teachers: Teachers) -> None:
        self.tuning, self.plan, self.teachers, self.settings = tuning, plan, teachers, tuning.settings
        self.steps = 0
        self.tokens = tuning.extra.get("tokens", 0)
        self.losses: list[float] = list(tuning.extra.get("losses", ()))
        self.scores: dict[str, list[Score]] = {}
        self.after: list[Score] | None = None
        self.finished = False
        self.covered = covered_tokens(tuning.master.config)

    def learn(self, options: DistillOptions, stop: StopRequest) -> None:
        """Train until the steps are done or `stop` is asked for, then save; scores before and after."""
        tuning, plan, settings, tokenizer = self.tuning, self.plan, self.settings, self.tuning.tokenizer
        paces: list[float] = []
        with self.source(tuning.rollout_model()) as source, Judging() as judging, Roller(
            tuning.run, source, tokenizer, judging
        ) as roller, TrainingProgress() as display:  # fmt: skip
            exam = Exam(plan.tasks, plan.modes, plan.windows, settings["eval_count"], settings["seed"], judging)
            roller.cover(tuning.step)
            self.scores = self.first_scores(exam)
            self.steps = planned_steps(options, tuning)
            while (not self.steps or tuning.step < self.steps) and not stop.asked:
                start = time.perf_counter()
                jobs = group_jobs(
                    plan.tasks, plan.shares, step=tuning.step, problems=settings["problems"],
                    group_size=settings["group_size"], seed=settings["seed"], modes=plan.modes, windows=plan.windows,
                    params=SamplingParams(), most_turns=settings["most_turns"],
                )  # fmt: skip
                samples = roller.roll(tuning.step, jobs, mark=weights_mark(tuning.model))
                rolled = time.perf_counter()
                parts = self.read_by_teachers(samples)
                read = time.perf_counter()

                record, routing = self.backward(parts)
                if not math.isfinite(record["loss"]):
                    raise RequestError(
                        f"the loss became {record['loss']} at step {tuning.step + 1}; the last checkpoint stays: start "
                        f"again with a --lr below {settings['lr']:g}"
                    )
                factor = learning_rate(tuning.step, self.steps or 10 * TIMED_STEPS, settings["decay"])
                norm = tuning.update(routing, lr_factor=factor)
                source.weights_changed()

                end = time.perf_counter()
                self.tokens += (num_tokens := sum(len(s.prompt) + len(s.tokens) for s in samples))
                self.losses = [*self.losses[-19:], record["loss"]]
                paces.append(end - start)
                record |= self.rollout_figures(samples) | {
                    "lr": settings["lr"] * factor, "grad_norm": norm, "tokens": self.tokens,
                    "tokens_per_s": num_tokens / paces[-1],
                    "rollout_tokens_per_s": record["written_tokens"] / (rolled - start),
                    "teacher_tokens_per_s": num_tokens / (read - rolled), "update_tokens_per_s": num_tokens / (end - read),
                }  # fmt: skip
                tuning.write(record)
                self.steps = self.steps or planned_steps(options, tuning, paces)
                total = self.steps or max(tuning.step + 1, 10 * TIMED_STEPS)
                display.show(tuning.step, total, _line(record), fmean(paces[-20:]) * (total - tuning.step))
                if tuning.is_due and tuning.step < total:
                    self.save()
                    roller.cover(tuning.step)
            self.save()
            roller.cover(tuning.step)
            self.finished = not stop.asked
            if self.finished and exam.count:
                log.info("%-10s the student on %d held-out problems of each task", "scores", exam.count)
                self.after = exam.take(source, tokenizer)
                save_scores(self.scores_path, self.scores | {self.scores_key: self.after})

    def read_by_teachers(self, samples: Sequence[Sample]) -> list[Part]:
        """The samples ordered by teacher, each with what its teacher makes of it: bodies are needed here and heads later.

        Raises:
            RequestError: not one sample has a token of the student's.
        """
        samples = [sample for sample in samples if sample.num_written]
        if not samples:
            raise RequestError("no prompt leaves room for an answer; --windows must be larger than the prompts")
        parts = []
        for name, places in by_teacher([self.plan.teacher_of[sample.job.task.name] for sample in samples]):
            examples = [
                make_example(samples[place].prompt + samples[place].tokens,
                             [False] * len(samples[place].prompt) + samples[place].written)
                for place in places
            ]  # fmt: skip
            for several in in_batches(examples, self.settings["micro_tokens"]):
                batch = lay_out(several).to(self.tuning.device)
                where_BT = learned_targets(batch)
                parts.append(Part(name, batch, where_BT, self.teachers.states(name, batch, where_BT)))
        return parts

    def backward(self, parts: Sequence[Part]) -> tuple[dict[str, Any], dict[int, Tensor]]:
        """Leave the gradients of a step; returns the figures of its record and the experts chosen, layer by layer."""
        total = sum(len(part.states) for part in parts)
        sums, counts = defaultdict(float), Counter[str]()
        figures: defaultdict[str, float] = defaultdict(float)
        routing: defaultdict[int, list[Tensor]] = defaultdict(list)
        before = self.teachers.heads_loaded
        for name, own in groupby(parts, key=lambda part: part.teacher):
            head = self.teachers.head(name)
            for part in own:
                share = len(part.states) / total
                features = self.read(part.batch)
                objective, divergence = self.compare(part, features, head)
                objective = objective * (self.plan.weights[name] / total)
                for key, weight, loss in self.beside(part.batch, features):
                    figures[key] += share * loss.item()
                    objective = objective + weight * share * loss
                if features.index_loss:
                    for key, value in indexer_figures(features).items():
                        figures[key] += share * value
                objective.backward()
                sums[name] += divergence
                counts[name] += len(part.states)
                for layer, chosen in features.routing.items():
                    routing[layer].append(chosen[part.batch.real])
        chosen = {layer: torch.cat(several) for layer, several in routing.items()}
        record: dict[str, Any] = {
            "loss": sum(self.plan.weights[name] * value for name, value in sums.items()) / total,
            "divergence": sum(sums.values()) / total,
            **{f"divergence_{name}": value / counts[name] for name, value in sums.items()},
            "written_tokens": total, **figures,
            "expert_balance": expert_balance(chosen, self.tuning.master.config.n_routed_experts),
            "heads_loaded": self.teachers.heads_loaded - before, "teachers": len(counts),
        }  # fmt: skip
        return record, chosen

    def compare(self, part: Part, features: Features, head_VE: Tensor) -> tuple[Tensor, float]:
        """What a part adds to the objective, summed over positions, and its divergence in nats (an estimate of it with
        `--method token`)."""
        hidden_MD = features.hidden[:, :-1][part.where_BT]
        own_VD = self.tuning.model.head.weight
        if self.settings["method"] == "full":
            out = head_reverse_kl(hidden_MD, own_VD, part.states, head_VE)
            return out.total, out.total.item()
        drawn_M = part.batch.tokens[:, 1:][part.where_BT]
        logprobs_M, _ = head_logprobs(hidden_MD, own_VD, drawn_M)
        with torch.no_grad():
            wanted_M, _ = head_logprobs(part.states, head_VE, drawn_M)
        return token_level_loss(logprobs_M, wanted_M).sum(), (logprobs_M.detach() - wanted_M).sum().item()

    def read(self, batch: ExampleBatch) -> Features:
        """The student's pass over its own samples."""
        model, keep = self.tuning.model, ["routing", "router_scores"]
        if model.mtp:
            keep.append("mtp")
        # Where every entry would be selected an indexer could neither help nor learn.
        is_sparse = batch.longest_slot > self.covered
        if is_sparse:
            keep.append("index_loss")
        return model.features(
            batch.tokens, documents=batch.slots, attention="sparse" if is_sparse else "dense", keep=keep
        )

    def beside(self, batch: ExampleBatch, features: Features) -> list[tuple[str, float, Tensor]]:
        """Losses that are no distillation, as in every other training here: (name, weight, mean)."""
        losses = []
        if features.mtp is not None:
            summed, count = learned_loss(features.mtp, self.tuning.model.head.weight, batch, ahead=2)
            losses.append(("mtp_loss", MTP_WEIGHT, summed / max(1, count)))
        balance = [
            balance_loss(scores, features.routing[layer], batch.real)
            for layer, scores in features.router_scores.items() if not is_hashed(self.tuning.model, layer)
        ]  # fmt: skip
        if balance:
            losses.append(("balance_loss", BALANCE, torch.stack(balance).sum()))
        if features.index_loss:
            index = torch.stack([part.mean for part in features.index_loss.values()]).sum()
            losses.append(("index_objective", 1.0, index))
        return losses

    def rollout_figures(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """What is recorded of the answers: none of it is learned from."""
        by_name: defaultdict[str, list[Sample]] = defaultdict(list)
        for sample in samples:
            by_name[self.plan.teacher_of[sample.job.task.name]].append(sample)
        by_mode = {mode: [s.num_written for s in samples if s.job.mode == mode] for mode in self.plan.modes}
        return {
            "accuracy": fmean(sample.verdict.is_right for sample in samples),
            **{f"accuracy_{name}": fmean(s.verdict.is_right for s in own) for name, own in by_name.items()},
            "length": fmean(sample.num_written for sample in samples),
            **{f"length_{mode}": fmean(lengths) for mode, lengths in by_mode.items() if lengths},
            "truncated": fmean(sample.finish is FinishReason.LENGTH for sample in samples),
            "samples": len(samples), "bodies_loaded": self.teachers.bodies_loaded,
        }  # fmt: skip

    def save(self) -> None:
        self.tuning.save({"tokens": self.tokens, "losses": self.losses})

    # ---- scores -----------------------------------------------------------------------------------------------------

    def source(self, model: Any) -> EngineSource:
        """An engine on a model in invariant arithmetic."""
        return EngineSource(
            model,
            self.tuning.tokenizer,
            max_running=self.settings["max_running"],
            memory_gib=self.settings["memory_gib"],
        )

    @property
    def scores_path(self) -> Path:
        return self.tuning.run.path / "scores.json"

    @property
    def scores_key(self) -> str:
        """Of the student's scores as it is."""
        return f"step {self.tuning.step}"

    @property
    def is_scored(self) -> bool:
        """Whether there is nothing left to ask: a run may have been killed behind its last step."""
        return not self.settings["eval_count"] or self.scores_key in load_scores(self.scores_path)

    def first_scores(self, exam: Exam) -> dict[str, list[Score]]:
        """The student's before it learns ("student") and the teachers', taken once a run and kept in RUN/scores.json."""
        if not exam.count:
            return {}
        found = load_scores(self.scores_path)
        if STUDENT in found:
            return found
        log.info("%-10s the teachers and the student on %d held-out problems of each task", "scores", exam.count)
        for name, where in [(STUDENT, self.tuning.source), *self.teachers.paths.items()]:
            names = [task for task, teacher in self.plan.teacher_of.items() if name in (STUDENT, teacher)]
            # The student as it began: a run may be resumed that was killed before its first scores were written.
            model = load_model(where, dtype=torch.float32, device=self.tuning.device, arithmetic="invariant").eval()
            with self.source(model) as source:
                found[name] = exam.take(source, self.tuning.tokenizer, names)
        save_scores(self.scores_path, found)
        return found

    def compared(self) -> list[Compared]:
        """Teacher against student, task by task and mode by mode."""
        if not self.scores:
            return []
        after = {(one.task, one.mode): one for one in self.after or ()}
        before = {(one.task, one.mode): one for one in self.scores[STUDENT]}
        rows = []
        for name in self.plan.runs:
            for one in self.scores[name]:
                place = one.task, one.mode
                rows.append(Compared(name, one, before[place], after.get(place)))
        return rows


STUDENT = "student"
"""Key of the student's scores beside the teachers'; no domain is called that."""


def planned_steps(options: DistillOptions, tuning: Tuning, paces: Sequence[float] = ()) -> int:
    """The number of steps: as asked, as many as --minutes has room for by the pace of the first ones, or STEPS; 0 while
    that pace is not known. A run is planned once and its config keeps the number, because learning rates depend on it."""
    config = tuning.run.read_config()
    steps = options.steps or 0
    if not steps and options.minutes is None:
        steps = config.get("planned_steps", STEPS)
    elif not steps and options.minutes is not None and options.resume and tuning.step:
        steps = max(tuning.step, round(options.minutes * 60 / (tuning.seconds / tuning.step)))
    elif not steps and options.minutes is not None and len(paces) >= TIMED_STEPS:
        steps = tuning.step + max(0, round((options.minutes * 60 - sum(paces)) / fmean(paces[1:])))
    if steps and steps != config.get("planned_steps"):
        tuning.run.write_config(config | {"planned_steps": steps})
    return steps


# ---- after the loop -------------------------------------------------------------------------------------------------


def _line(record: dict[str, Any]) -> str:
    """A step's record in one line."""
    parts = [
        f"divergence {record['divergence']:.4f}",
        f"right {record['accuracy']:.0%}",
        f"{record['tokens_per_s']:,.0f} tokens/s",
    ]
    return "  ".join(parts)


def _report(options: DistillOptions, distillation: Distillation, stop: StopRequest) -> int:
    tuning, run = distillation.tuning, distillation.tuning.run
    plot_losses(run.read_metrics(), run.path / "loss.png")
    rows = distillation.compared()
    loss = fmean(distillation.losses) if distillation.losses else None
    figures = {
        "steps": tuning.step, "tokens": distillation.tokens, "divergence": loss, "seconds": round(tuning.seconds, 1),
        "tokens_per_s": round(distillation.tokens / max(tuning.seconds, 1e-9)),
        "heads_loaded": distillation.teachers.heads_loaded, "bodies_loaded": distillation.teachers.bodies_loaded,
        "scores": [row.record() for row in rows],
    }  # fmt: skip
    log.info("%d steps, %s tokens in %s; divergence %.4f nats per token", tuning.step, f"{distillation.tokens:,}",
             duration(tuning.seconds), math.nan if loss is None else loss)  # fmt: skip
    if options.json:
        print(json_line({"command": "distill", "run": str(run.path), "finished": distillation.finished, **figures,
                         "figures": figures}))  # fmt: skip
    else:
        if rows:
            print(table(rows))
        print(f"{'stopped and saved' if stop.asked else 'model'}: {run.model_dir}")
        task = distillation.plan.tasks[0].name
        again = f"longreach distill --out {run.path} --resume"
        print(f"next: {again if stop.asked else f'longreach evaluate {run.path} --task {task}'}")
    return 128 + stop.signal if stop.asked else 0
