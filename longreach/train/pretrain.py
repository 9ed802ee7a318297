"""Pretraining: `longreach pretrain --preset tiny --data stdlib --minutes 2 --out runs/quickstart`.

    loss = −log p(next token) + w_mtp (−log p(token after it)) + 1e-4 balance      to all weights but the indexers'
         + KL(attention ‖ indexer)                                                 to the indexers alone
    bias_e ← bias_e + 0.001 sign(mean load − load of expert e)                     after each step, every routed layer

The loop in `Trainer.train` is the whole algorithm: plan, batch, forward, losses, backward, spike check, step, balance, log.
What a step does depends on its number (`schedule`), the batch on the stream's position, and a checkpoint holds both, so a
run that was killed goes on exactly where it was. Source: DeepSeek-V4 report, sections 2.1, 4.2 and 5.2.1.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from longreach.checkpoint.save import save_model
from longreach.data.corpus import Corpus
from longreach.data.fim import FillInMiddle
from longreach.data.stream import Batch, MixtureStream, in_order
from longreach.errors import RequestError
from longreach.model.count import count_parameters
from longreach.model.features import Features
from longreach.model.recompute import recompute_layers
from longreach.model.transformer import Transformer
from longreach.optim.groups import describe
from longreach.optim.hybrid import HybridOptimizer, make_optimizers
from longreach.plan.flops import training_macs
from longreach.rundir import RunDirectory
from longreach.runtime import (
    choose_device,
    json_line,
    log,
    matmul_peak,
    seed_everything,
    set_threads,
    setup_logging,
)
from longreach.train.balance import balance_experts, expert_balance, indexer_figures, is_hashed
from longreach.train.losses import balance_loss, mean_loss, predicted, summed_loss
from longreach.train.metrics import TrainingProgress, duration, figures_line
from longreach.train.mirror import open_mirror
from longreach.train.plot import plot_losses
from longreach.train.recipe import PretrainOptions, Recipe, check_length, new_recipe, resumed_recipe
from longreach.train.schedule import StepPlan
from longreach.train.setup import check_memory, load_corpus, steps_in
from longreach.train.stability import Anticipation, Feed, SpikeDetector
from longreach.train.state import newest_state, read_state, save_state, state_files
from longreach.train.stopping import StopRequest, stop_signals
from longreach.train.working import clip_gradients, frozen_but_indexer, unfrozen, working_copy

RECALL_EVERY = 20
"""Steps between measurements of the indexer's recall in the sparse phase, where it costs a dense attention."""

SPIKE_MARGIN = 5
"""A checkpoint this few steps before a spike may already be in it."""

VALIDATION_TOKENS = 32_768


def main(options: PretrainOptions) -> int:
    """Run the command; returns the exit code (130 after Ctrl-C, 143 after SIGTERM, both with the run saved)."""
    setup_logging()
    check_length(options)
    run = RunDirectory(options.out)
    saved = run.read_config() if options.resume else {}
    recipe = resumed_recipe(options, saved) if options.resume else new_recipe(options)
    if not options.resume:
        run.check_new()
    device, threads = (
        choose_device(options.device),
        set_threads(saved.get("threads") if options.threads is None else options.threads, watch_s=2.0),
    )
    check_memory(recipe, device.value)
    corpus = load_corpus(recipe, run.tokenizer_path if options.resume else None)

    seed_everything(recipe.seed)
    trainer = Trainer(run, recipe, corpus, device.value)
    recompute_layers(trainer.model, options.recompute)
    if options.resume:
        trainer.restore(newest_state(run.state_dir))
        run.drop_metrics_after(trainer.step)
    trainer.plan(options, saved.get("steps"))
    if trainer.step >= trainer.steps:
        log.info("%s is finished: %d steps; give more --steps or --minutes to train on", run.path, trainer.step)
        return 0
    record = {"command": "pretrain", **dataclasses.asdict(recipe), "steps": trainer.steps, "minutes": options.minutes,
              "threads": threads.value}  # fmt: skip
    if options.resume:
        run.write_config(record)
    else:
        run.create(record)
        corpus.tokenizer.save(run.tokenizer_path)

    count = count_parameters(recipe.config)
    log.info("device     %s", device)
    log.info("threads    %s", threads)
    log.info("precision  %s, weights for %s files", recipe.precision, recipe.qat)
    log.info("model      %s: %s parameters, %s used per token", recipe.preset, f"{count.total:,}", f"{count.active:,}")
    log.info("data       %s: %s documents, %s tokens; %d documents held out", " ".join(recipe.data),
             f"{sum(map(len, corpus.training)):,}", f"{corpus.num_tokens:,}", len(corpus.validation))  # fmt: skip
    log.info("schedule   %d steps of %d tokens; rows %s; sparse from %.0f %% of the run", trainer.steps,
             recipe.batch_tokens, recipe.stages, 100 * recipe.sparse_at)  # fmt: skip
    log.info("optimizer  peak learning rate %g\n%s", recipe.lr, describe(trainer.optimizer.param_groups))

    trainer.mirror = open_mirror(options.mirror, run, record)
    try:
        with stop_signals() as stop:
            trainer.train(stop)
    finally:
        trainer.mirror.close()
    return _report(options, run, trainer, stop)


class Trainer:
    """One sitting of a run: what the loop needs, and what it knows at the end."""

    def __init__(self, run: RunDirectory, recipe: Recipe, corpus: Corpus, device: torch.device) -> None:
        self.run, self.recipe, self.corpus, self.device = run, recipe, corpus, device
        dtype = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
        self.master = Transformer(recipe.config, device=device, seed=recipe.seed)
        self.working = working_copy(self.master, dtype, recipe.qat)
        self.model = self.working.model if self.working else self.master
        """The one that computes."""
        self.optimizer: HybridOptimizer = make_optimizers(self.master, recipe.lr, kind=recipe.optimizer)  # pyright: ignore
        fim = FillInMiddle(corpus.tokenizer, recipe.fim_rate) if recipe.fim_rate else None
        stream = MixtureStream(corpus.training, corpus.weights, seed=recipe.seed, fim=fim)
        self.feed = Feed(stream, lambda step: self.schedule.at(step), 0)
        self.detector = SpikeDetector()
        self.anticipation = Anticipation(self.route)
        self.mirror: Any = None
        self.peak = 0.0
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        self.steps = 0
        self.losses: deque[float] = deque(maxlen=20)
        self.macs: dict[int, int] = {}
        """Of one row, by its length."""
        self.finished = False
        self.tokens_per_s = 0.0
        self.val_loss = self.val_bits_per_byte = math.nan

    # ---- the length ---------------------------------------------------------------------------------------------

    def plan(self, options: PretrainOptions, saved_steps: int | None) -> None:
        """Fix the number of steps: as asked, as time allows, or once through the data."""
        longest = max(stage.seq_len for stage in self.recipe.schedule(1).stages)
        if self.corpus.num_tokens < longest:
            raise RequestError(
                f"the training data has {self.corpus.num_tokens} tokens, fewer than one row of {longest}; "
                "give more text, or shorter rows with --seq-len"
            )
        if options.minutes is not None and self.step:
            self.steps = max(self.step, round(options.minutes * 60 / max(self.seconds / self.step, 1e-9)))
        elif options.minutes is not None:
            self.steps = steps_in(options.minutes, self.recipe.schedule, self.probe, self.device)
        else:
            whole = math.ceil(self.corpus.num_tokens / self.recipe.batch_tokens)
            self.steps = options.steps or saved_steps or max(1, whole)
        self.schedule = self.recipe.schedule(self.steps)

    def probe(self, plan: StepPlan) -> None:
        """All the work of a step on arbitrary tokens, leaving weights and optimizer as they were."""
        tokens = torch.randint(0, self.recipe.config.vocab_size, (plan.rows, plan.seq_len), device=self.device)
        self.begin_phase(plan)
        self.forward_backward(plan, tokens, torch.zeros_like(tokens), None)
        self.optimizer.scale_lr(0.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for optimizer in self.optimizer.optimizers.values():
            optimizer.state.clear()

    # ---- the loop -----------------------------------------------------------------------------------------------

    def train(self, stop: StopRequest) -> None:
        """Train until the steps are done or `stop` is asked for, then validate and save."""
        self.peak = matmul_peak(next(self.model.parameters()).dtype, self.device, budget_s=0.3)
        if self.recipe.anticipatory == "always" and not self.anticipation.until:
            self.anticipation.begin(0, self.steps)
        began = time.perf_counter() - self.seconds
        recent: deque[float] = deque(maxlen=20)
        phase = ""
        self.model.train()
        with TrainingProgress() as display:
            while self.step < self.steps and not stop.asked:
                start = time.perf_counter()
                plan = self.schedule.at(self.step)
                if plan.phase != phase:
                    phase = self.begin_phase(plan)
                    recent.clear()
                    if self.step == 0 or self.schedule.at(self.step - 1).phase != phase:
                        log.info("step %d: %s", self.step + 1, phase)
                        self.write({"step": self.step + 1, "event": "phase", "text": phase})
                routing = self.anticipation.indices(self.step, self.steps - 1)
                batch = self.feed.take()
                tokens, documents = (part.to(self.device) for part in batch)

                record, features = self.forward_backward(plan, tokens, documents, routing)
                if self.detector.is_spike(record["loss"], phase) and self.go_back(record["loss"]):
                    phase = ""
                    continue
                norm = clip_gradients(self.master)
                self.optimizer.scale_lr(plan.lr_factor)
                self.optimizer.step()
                self.optimizer.zero_grad()
                if plan.attention != "warmup":
                    balance_experts(self.master, features.routing, documents >= 0, self.recipe.bias_speed)

                self.step += 1
                self.tokens += tokens.numel()
                now = time.perf_counter()
                self.seconds = now - began
                recent.append(now - start)
                pace = fmean(list(recent)[1:] or recent)  # the first of a phase is slower
                self.tokens_per_s = tokens.numel() / pace
                self.losses.append(record["loss"])
                record = {
                    "step": self.step, **record, "lr": self.recipe.lr * plan.lr_factor, "grad_norm": norm,
                    "tokens": self.tokens, "tokens_per_s": self.tokens_per_s,
                    "mfu": self.useful_flops(plan) / pace / self.peak, "seconds": self.seconds,
                }  # fmt: skip
                self.write(record)
                shown = record | {"loss": fmean(self.losses)}
                display.show(self.step, self.steps, figures_line(shown), pace * (self.steps - self.step))
                if self.step % self.recipe.eval_every == 0 and self.step < self.steps:
                    self.validate()
                if self.step % self.recipe.checkpoint_every == 0 and self.step < self.steps:
                    self.save()
        self.finished = self.step >= self.steps
        if self.finished:
            self.validate()
        self.save()

    def begin_phase(self, plan: StepPlan) -> str:
        """Let learn what learns in this phase; returns its name."""
        if plan.attention == "warmup":
            frozen_but_indexer(self.master)
        else:
            unfrozen(self.master)
        if self.working:
            self.working.follow_frozen()
        return plan.phase

    def forward_backward(
        self, plan: StepPlan, tokens: Tensor, documents: Tensor, routing: dict[int, Tensor] | None
    ) -> tuple[dict[str, Any], Features]:
        """The losses of a batch and their gradients, in the master's `.grad`. Returns the figures of the record."""
        model, warmup = self.model, plan.attention == "warmup"
        if self.working:
            self.working.refresh()
        features = model.features(
            tokens, documents=documents, routing=routing, keep=self.keeps(plan),
            attention="sparse" if plan.attention == "sparse" else "dense",
        )  # fmt: skip
        loss = mean_loss(features.hidden, model.head.weight, tokens, documents)
        record: dict[str, Any] = {"loss": loss.item()}
        objective = loss.new_zeros(()) if warmup else loss
        if features.mtp is not None and not warmup:
            mtp = mean_loss(features.mtp, model.head.weight, tokens, documents, ahead=2)
            record["mtp_loss"] = mtp.item()
            objective = objective + plan.mtp_weight * mtp
        if features.router_scores and not warmup:
            real = documents >= 0
            balance = torch.stack([
                balance_loss(scores, features.routing[layer], real)
                for layer, scores in features.router_scores.items() if not is_hashed(model, layer)
            ] or [loss.new_zeros(())]).sum()  # fmt: skip
            record["balance_loss"] = balance.item()
            objective = objective + self.recipe.balance * balance
        if features.index_loss:
            record |= indexer_figures(features)
            objective = objective + torch.stack([part.mean for part in features.index_loss.values()]).sum()
        record["expert_balance"] = expert_balance(features.routing, self.recipe.config.n_routed_experts)
        objective.backward()
        if self.working:
            self.working.hand_gradients()
        return record, features

    def keeps(self, plan: StepPlan) -> tuple[str, ...]:
        """What a step wants back from the model."""
        keep = ["routing"]
        if self.recipe.balance and plan.attention != "warmup":
            keep.append("router_scores")
        if self.model.mtp:
            keep.append("mtp")
        if plan.attention != "dense" and self.recipe.has_indexer:
            measured = plan.attention == "sparse" and self.step % RECALL_EVERY == 0
            keep.append("index_recall" if measured else "index_loss")
        return tuple(keep)

    @torch.no_grad()
    def route(self, step: int) -> dict[int, Tensor]:
        """Expert indices of a later step's batch by the weights as they are."""
        plan, (tokens, documents) = self.schedule.at(step), self.feed.look(step)
        if self.working:
            self.working.refresh()
        return self.model.features(
            tokens.to(self.device), documents=documents.to(self.device),
            attention="sparse" if plan.attention == "sparse" else "dense",
            keep=("routing", "mtp") if self.model.mtp else ("routing",),
        ).routing  # fmt: skip

    def go_back(self, loss: float) -> bool:
        """After a spike: return to the last checkpoint safely before it and route ahead for a while. False: go on.

        Raises:
            RequestError: the loss is no number and there is nothing to go back to.
        """
        before = [path for at, path in state_files(self.run.state_dir)
                  if at % self.recipe.checkpoint_every == 0 and at <= self.step - SPIKE_MARGIN]  # fmt: skip
        possible = before and self.recipe.anticipatory == "auto" and self.step >= self.anticipation.until
        if not possible:
            if not math.isfinite(loss):
                kept = state_files(self.run.state_dir)
                last = f"; the checkpoint of step {kept[-1][0]} stays" if kept else ""
                raise RequestError(
                    f"the loss became {loss} at step {self.step + 1}{last}; start again with a --lr below {self.recipe.lr:g}"
                )
            return False
        spiked = self.step + 1
        self.optimizer.zero_grad()
        self.restore(read_state(before[-1]))
        self.run.drop_metrics_after(self.step)
        self.anticipation.begin(self.step)
        text = f"loss {loss:.3f} at step {spiked}: back to step {self.step}, anticipatory routing until {self.anticipation.until}"
        log.info("spike      %s", text)
        self.write({"step": spiked, "event": "rollback", "text": text})
        return True

    # ---- what is written ----------------------------------------------------------------------------------------

    def write(self, record: dict[str, Any]) -> None:
        """Add a record to metrics.jsonl and its mirror."""
        try:
            self.run.append_metrics(record)
        except OSError as error:
            kept = state_files(self.run.state_dir)
            last = f"the checkpoint of step {kept[-1][0]} stays" if kept else "there is no checkpoint yet"
            raise RequestError(
                f"{self.run.metrics_path} could not be written ({error.strerror}); {last}; free some space and go on with "
                "--resume"
            ) from error
        if self.mirror is not None:
            self.mirror.log(record)

    def save(self) -> None:
        """Save the state to go on from, and the model to use."""
        state = {
            "model": self.master.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "stream": self.feed.state_dict(),
            "detector": self.detector.state_dict(),
            "anticipation": self.anticipation.state_dict(),
            "progress": {
                "step": self.step,
                "seconds": self.seconds,
                "tokens": self.tokens,
                "losses": list(self.losses),
            },
        }
        save_state(self.run.state_dir, self.step, state, self.recipe.checkpoint_every)
        weight_format: Any = self.recipe.qat
        save_model(self.master, self.run.model_dir, weight_format=weight_format, tokenizer=self.corpus.tokenizer)

    def restore(self, state: dict[str, Any]) -> None:
        """Stand exactly where the state was saved.

        Raises:
            RequestError: it is of other data.
        """
        self.master.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        progress = state["progress"]
        self.step, self.seconds, self.tokens = progress["step"], progress["seconds"], progress["tokens"]
        self.losses = deque(progress["losses"], maxlen=20)
        try:
            self.feed.load_state_dict(state["stream"], self.step)
        except RequestError as error:
            raise RequestError(
                f"--data has changed since {self.run.path} began; a resumed run needs the same ({error})"
            ) from None
        self.detector.load_state_dict(state["detector"])
        self.anticipation.load_state_dict(state["anticipation"])

    @torch.no_grad()
    def validate(self) -> None:
        """Measure loss in nats per token, and bits per byte of text, on the held-out documents, as the model is used."""
        self.model.eval()
        if self.working:
            self.working.refresh()
        tokenizer = self.corpus.tokenizer
        bytes_of = torch.tensor(
            [0 if i in tokenizer.special_ids.values() else len(b) for i, b in enumerate(tokenizer.token_bytes)],
            device=self.device,
        )
        plan = self.schedule.at(max(0, self.step - 1))
        attention = "sparse" if plan.attention == "sparse" else "dense"
        nats, targets, text_bytes = 0.0, 0, 0
        for tokens, documents in in_order(self.corpus.validation, plan.seq_len, plan.rows, VALIDATION_TOKENS):
            batch = Batch(tokens.to(self.device), documents.to(self.device))
            hidden = self.model.features(batch.tokens, documents=batch.documents, attention=attention).hidden
            total, count = summed_loss(hidden, self.model.head.weight, batch.tokens, batch.documents)
            nats += total.item()
            targets += count
            text_bytes += int(bytes_of[batch.tokens[:, 1:][predicted(batch.documents, 1)]].sum())
        self.model.train()
        self.val_loss = nats / max(1, targets)
        self.val_bits_per_byte = nats / math.log(2) / max(1, text_bytes)
        self.write({"step": self.step, "val_loss": self.val_loss, "val_bits_per_byte": self.val_bits_per_byte})

    def useful_flops(self, plan: StepPlan) -> float:
        """Of a step: forward once, backward twice, on rows of one document."""
        if plan.seq_len not in self.macs:
            self.macs[plan.seq_len] = sum(training_macs(self.recipe.config, plan.seq_len).values())
        return 2 * self.macs[plan.seq_len] * plan.rows


# ---- after the loop -------------------------------------------------------------------------------------------------


def _report(options: PretrainOptions, run: RunDirectory, trainer: Trainer, stop: StopRequest) -> int:
    plot_losses(run.read_metrics(), run.path / "loss.png")
    figures = {
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "loss": fmean(trainer.losses) if trainer.losses else None,
        "val_loss": trainer.val_loss,
        "val_bits_per_byte": trainer.val_bits_per_byte,
        "seconds": round(trainer.seconds, 1),
        "tokens_per_s": round(trainer.tokens_per_s),
    }
    log.info("%d steps, %s tokens in %s; loss %.3f", trainer.step, f"{trainer.tokens:,}", duration(trainer.seconds),
             figures["loss"] or math.nan)  # fmt: skip
    if trainer.finished:
        log.info("validation %.3f nats per token, %.3f bits per byte", trainer.val_loss, trainer.val_bits_per_byte)
    follow_up = (
        f'longreach generate {run.path} "def "' if not stop.asked else f"longreach pretrain --out {run.path} --resume"
    )
    if options.json:
        print(json_line({"command": "pretrain", "run": str(run.path), "finished": trainer.finished, **figures,
                         "figures": figures}))  # fmt: skip
    else:
        print(f"{'stopped and saved' if stop.asked else 'model'}: {run.model_dir}")
        print(f"next: {follow_up}")
    return 128 + stop.signal if stop.asked else 0
