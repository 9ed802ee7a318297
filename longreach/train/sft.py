"""Supervised fine-tuning: `longreach sft runs/base --data chats.jsonl --out runs/sft`.

    loss = mean over the tokens an assistant has to produce of −log p(token | all before it)
         + 0.1 × the same for the MTP block's token after the next + 1e-4 balance             to all weights but the indexers'
         + KL(attention ‖ indexer)                                                            to the indexers alone

Examples are conversations in the OpenAI messages format, or worked solutions of tasks, laid out by the one chat renderer in
the mode they were held in; system texts, questions and tool results are read and not learned. `learn` is the whole
algorithm. A step's batch follows from the position of the feed, which a checkpoint holds, so a run that was killed goes on
exactly where it was. With `--preset` the model and its tokenizer begin from nothing.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from longreach.data.chats import Chats
from longreach.data.examples import Example, ExampleBatch, ExampleFeed, Fitting, lay_out
from longreach.errors import RequestError
from longreach.model.config import ModelConfig
from longreach.model.config_io import read_config
from longreach.model.features import Features
from longreach.ops.cross_entropy import head_cross_entropy
from longreach.rundir import RunDirectory, find_model
from longreach.runtime import json_line, log, setup_logging
from longreach.tokenizer.bpe import Tokenizer
from longreach.train.balance import expert_balance, indexer_figures, is_hashed
from longreach.train.losses import balance_loss, predicted
from longreach.train.material import Material
from longreach.train.metrics import TrainingProgress, duration, figures_line
from longreach.train.plot import plot_losses
from longreach.train.recipe import PEAK_LR_AT_128
from longreach.train.schedule import learning_rate
from longreach.train.stopping import StopRequest, stop_signals
from longreach.train.tuning import ADAPTERS, COMMON, NewModel, Several, Tuning, TuningOptions, saved_settings, settle

MTP_WEIGHT = 0.1
BALANCE = 1e-4
SHARE_OF_PRETRAINING_LR = 0.5
"""A model that has learned something is moved less than one from nothing. Of the preset micro taught a mode it did not know,
in 50 steps: validation loss 1.19 nats at an eighth, 0.87 at a quarter, 0.70 at half of that rate."""

PROBES = 4
"""Steps timed for --minutes; the first is slower, because memory is still being asked for."""


@dataclass(frozen=True, kw_only=True)
class SFTOptions(TuningOptions):
    """Teach a model by examples: conversations of your own, or worked solutions of tasks.

    Learns what assistants say in them, in all three modes and with tool calls, and leaves a run directory like any other.
    """

    data: Several = ()
    """.jsonl files of conversations (OpenAI messages, ShareGPT, or prompt and completion). PATH@WEIGHT weighs several."""
    task: Several = ()
    """Tasks whose worked solutions are learned, as in arithmetic:level=1-2; SPEC@WEIGHT weighs several."""
    modes: Several = ()
    """Modes of the tasks' solutions, as in non-think think-high@2 (default: all three alike)."""
    epochs: int | None = None
    """Passes through --data (default 1 where neither --steps nor --minutes is given)."""
    preset: str | None = None
    """Begin with an untrained model of this shape instead of RUN, and a tokenizer learned from the examples."""
    vocab: int | None = None
    """Tokens of a new model's vocabulary (default: the preset's)."""
    tokenizer: Path | None = None
    """A tokenizer.json for a new model, instead of learning one."""
    batch_tokens: int | None = None
    """Tokens per step (default 2048)."""
    longest: int | None = None
    """Tokens of one example at most (default 4096, or the model's context where that is less)."""
    too_long: Literal["drop", "cut"] | None = None
    """What becomes of longer ones: left out (default), or cut at their end."""
    decay: float | None = None
    """Fraction of the run, at its end, over which the learning rate falls to a tenth (default 0.5)."""
    sparse_at: float | None = None
    """Fraction of the run from which long examples are read with sparse attention (default 0 with RUN, 0.5 with --preset,
    whose indexers have to learn first)."""
    bias_speed: float | None = None
    """What a step adds to or takes from the choosing bias of an expert with too little or too much load (default 0.001
    with RUN, 0.01 with --preset)."""
    validate: float | None = None
    """Share of the conversations that is held out (default 0.02). Tasks have a held-out part of their own."""
    eval_every: int | None = None
    """Steps between validations (default 100); there is always one at the end."""


def main(options: SFTOptions) -> int:
    """Run the command; returns the exit code (130 after Ctrl-C, 143 after SIGTERM, both with the run saved)."""
    setup_logging()
    saved = saved_settings(options, "sft", needs_run=options.preset is None)
    settings = settle(options, defaults(options, saved), saved)
    check(options, settings)
    material = Material.open(settings)
    new = new_model(options, settings, material) if settings["preset"] else None
    # All that can be wrong with the examples is found before anything is written.
    if new is not None:
        config, tokenizer = new.config, new.tokenizer
    else:
        source = Path(saved["source"]) if saved else find_model(options.run or "")
        config, tokenizer = read_config(source), Tokenizer.load(source)
    fitting = Fitting(min(settings["longest"], config.max_position_embeddings), settings["too_long"] == "cut")
    ends = settings["epochs"] is not None and options.steps is None and options.minutes is None
    feed = material.feed(tokenizer, fitting, settings["batch_tokens"], settings["epochs"] if ends else None)
    feed.check()
    validation = material.validation(tokenizer, fitting)

    tuning = Tuning.begin("sft", options, settings, saved, new=new)
    if tuning.extra:
        feed.load_state_dict(tuning.extra["feed"])
    steps = planned_steps(options, saved, tuning, feed)
    if tuning.step >= steps:
        log.info("%s is finished: %d steps; give more --steps or --minutes to train on", tuning.run.path, tuning.step)
        return 0
    tuning.run.write_config(tuning.run.read_config() | {"planned_steps": steps})

    for source in feed.sources:
        log.info("%-10s %s", "examples", described(source))
    log.info("%-10s %d steps of %d tokens; %d examples held out", "schedule", steps, settings["batch_tokens"],
             len(validation))  # fmt: skip
    sft = SFT(tuning, feed, validation, steps)
    try:
        with stop_signals() as stop:
            sft.learn(stop)
    finally:
        tuning.mirror.close()
    return _report(options, sft, stop)


# ---- what is asked for ----------------------------------------------------------------------------------------------


def defaults(options: SFTOptions, saved: dict[str, Any]) -> dict[str, Any]:
    """Every setting that decides what is learned, with what it is where nothing is given."""
    preset = saved.get("preset", options.preset)
    if not saved:
        config = ModelConfig.preset(preset) if preset else read_config(find_model(options.run or ""))
        if options.lora is None:
            lr = default_lr(options.optimizer or "muon", config.hidden_size, is_new=preset is not None)
        else:  # nothing in a new adapter can be unlearned
            lr = default_lr("adamw", config.hidden_size, is_new=True)
    else:
        lr = saved["lr"]
    passes = 1 if options.data and options.steps is None and options.minutes is None else None
    return COMMON | {
        "lr": lr, "checkpoint_every": 50,
        "data": None, "task": None, "modes": None, "epochs": passes, "preset": None, "vocab": None, "tokenizer": None,
        "batch_tokens": 2048, "longest": 4096, "too_long": "drop", "decay": 0.5, "sparse_at": 0.5 if preset else 0.0,
        "bias_speed": 0.01 if preset else 0.001, "validate": 0.02, "eval_every": 100,
    }  # fmt: skip


def default_lr(optimizer: str, width: int, is_new: bool) -> float:
    """Peak rate: of a model from nothing as in pretraining, of another a part of that.

    Of adapters of rank 8 at the preset micro that learn a mode it did not know, in 80 steps: validation loss 3.84 nats at 0.001,
    2.38 at 0.003, 1.41 at 0.01, 1.52 at 0.03; AdamW's rate of pretraining is 0.0092 there.
    """
    return round(PEAK_LR_AT_128[optimizer] * math.sqrt(128 / width) * (1 if is_new else SHARE_OF_PRETRAINING_LR), 6)


def check(options: SFTOptions, settings: dict[str, Any]) -> None:
    """Refuse what cannot work, as far as that goes without reading data or model.

    Raises:
        RequestError: the line names the option.
    """
    if settings["preset"] is None:
        for name in ("vocab", "tokenizer"):
            if settings[name] is not None:
                raise RequestError(f"--{name} is for a new model; with RUN the model has its own, leave it out")
    elif options.run is not None:
        raise RequestError(f"RUN {options.run} and --preset {settings['preset']} exclude each other; give one")
    elif settings["vocab"] is not None and settings["tokenizer"] is not None:
        raise RequestError("--vocab and --tokenizer exclude each other; a tokenizer has its vocabulary")
    if options.epochs is not None:
        if options.steps is not None or options.minutes is not None:
            raise RequestError("--epochs, --steps and --minutes exclude one another; give one")
        if not settings["data"]:
            raise RequestError("--epochs counts passes through --data; tasks have no end, give --steps or --minutes")
    for name in ("batch_tokens", "longest", "eval_every", "epochs"):
        least = 3 if name == "longest" else 1
        if settings[name] is not None and settings[name] < least:
            raise RequestError(f"--{name.replace('_', '-')} {settings[name]} must be at least {least}")
    for name in ("decay", "sparse_at", "validate"):
        if not 0 <= settings[name] <= 1:
            raise RequestError(f"--{name.replace('_', '-')} {settings[name]:g} is a fraction; give 0 to 1")
    if settings["lora"] is not None and options.bias_speed is not None:
        raise RequestError("--bias-speed moves routers, and with --lora they stay as they are; leave it out")
    if not 0 <= settings["bias_speed"] < math.inf:
        raise RequestError(f"--bias-speed {settings['bias_speed']:g} must be 0 or more")
    if settings["epochs"] is None and not options.resume and options.steps is None and options.minutes is None:
        raise RequestError("tasks have no end; say how long to learn with --steps or --minutes")


def new_model(options: SFTOptions, settings: dict[str, Any], material: Material) -> NewModel:
    """The untrained model of `--preset`, with a tokenizer learned from the examples or given.

    Raises:
        RequestError, ConfigError: a preset, vocabulary or tokenizer that cannot work.
    """
    config = ModelConfig.preset(settings["preset"])
    kept = RunDirectory(options.out).tokenizer_path  # of a run that is resumed
    if (given := kept if kept.is_file() else settings["tokenizer"]) is not None:
        tokenizer = Tokenizer.load(given)
    else:
        tokenizer = Tokenizer.train(material.texts(), settings["vocab"] or config.vocab_size)
    if (tokenizer.bos_id, tokenizer.eos_id) != (config.bos_token_id, config.eos_token_id):
        raise RequestError(
            f"--tokenizer {settings['tokenizer']} begins and ends texts with ids {tokenizer.bos_id} and "
            f"{tokenizer.eos_id}; this model needs {config.bos_token_id} and {config.eos_token_id}"
        )
    # The initial weights' scale is that of pretraining: train/recipe.py says why.
    shape = config.replace(vocab_size=tokenizer.vocab_size, initializer_range=round(config.hidden_size**-0.5, 4))
    return NewModel(settings["preset"], shape, tokenizer)


def planned_steps(options: SFTOptions, saved: dict[str, Any], tuning: Tuning, feed: ExampleFeed) -> int:
    """The number of steps: as asked, as time allows, or through the data. A run is planned once: what it learns then
    depends on no clock."""
    asked, minutes = options.steps, options.minutes
    if asked is None and minutes is None:  # of a resumed run: what it began with
        asked, minutes = saved.get("planned_steps") or saved.get("steps"), saved.get("minutes")
    if asked is not None:
        return asked
    if minutes is None:
        return tuning.step + feed.count_steps()
    seconds = minutes * 60
    if tuning.step:
        return max(tuning.step, round(seconds / max(tuning.seconds / tuning.step, 1e-9)))
    began = time.perf_counter()
    each = SFT(tuning, feed, [], 1000).seconds_per_step()
    left = max(0.1 * seconds, seconds - (time.perf_counter() - began))
    return max(1, round(left / each))


def described(source: Any) -> str:
    """A line about a source of examples."""
    if not isinstance(source, Chats):
        return f"{source.name}, in {', '.join(f'{mode}@{weight:g}' for mode, weight in source.modes.items())}"
    line = f"{source.name}: {source.size:,} examples, {source.num_tokens:,} tokens"
    if source.too_long:
        line += f"; {source.too_long:,} longer than {source.longest} tokens left out"
    if source.cut:
        line += f"; {source.cut:,} cut to {source.longest} tokens"
    return line


# ---- the loss -------------------------------------------------------------------------------------------------------


def learned_loss(hidden_BTD: Tensor, head_weight_VD: Tensor, batch: ExampleBatch, ahead: int = 1) -> tuple[Tensor, int]:
    """Negative log-likelihood of the tokens that have to be produced, from `ahead` tokens before each, summed, in nats.

    Returns:
        (scalar, number of targets).
    """
    mask = learned_targets(batch, ahead)
    targets_M = batch.tokens[:, ahead:][mask]
    return head_cross_entropy(hidden_BTD[:, :-ahead][mask], head_weight_VD, targets_M), len(targets_M)


def learned_targets(batch: ExampleBatch, ahead: int = 1) -> Tensor:
    """Which positions predict a learned token of their own example `ahead` tokens later; bool `(B, T - ahead)`."""
    return predicted(batch.slots, ahead) & batch.learned[:, ahead:]


def covered_tokens(config: ModelConfig) -> int:
    """How long an example may be for its CSA layers to select every entry there is: after T tokens there are T // ratio."""
    csa = [config.compress_ratios[i] for i in range(config.num_hidden_layers) if config.layer_kind(i) == "csa"]
    return (config.index_topk + 1) * min(csa) - 1 if csa else config.max_position_embeddings


# ---- the run --------------------------------------------------------------------------------------------------------


class SFT:
    """One sitting of a run: what the loop needs, and what it knows at the end.

    Attributes:
        validation: examples that are never learned.
        val_loss: nats per learned token of them; val_accuracy: share of their learned tokens that are the likeliest one.
    """

    def __init__(self, tuning: Tuning, feed: ExampleFeed, validation: list[Example], steps: int) -> None:
        self.tuning, self.feed, self.validation, self.steps = tuning, feed, validation, steps
        self.settings = tuning.settings
        self.tokens, self.examples = tuning.extra.get("tokens", 0), tuning.extra.get("examples", 0)
        self.losses: deque[float] = deque(tuning.extra.get("losses", ()), maxlen=20)
        self.tokens_per_s = 0.0
        self.val_loss = self.val_accuracy = math.nan
        self.finished = False
        self.covered = covered_tokens(tuning.master.config)

    def learn(self, stop: StopRequest) -> None:
        """Train until the steps are done or `stop` is asked for, then validate and save."""
        tuning, settings = self.tuning, self.settings
        recent: deque[float] = deque(maxlen=20)
        with TrainingProgress() as display:
            while tuning.step < self.steps and not stop.asked:
                start = time.perf_counter()
                examples = self.feed.take()
                if not examples:
                    break
                batch = lay_out(examples).to(tuning.device)
                factor = learning_rate(tuning.step, self.steps, settings["decay"])

                objective, record, features = self.objective(batch)
                if not math.isfinite(record["loss"]):
                    raise RequestError(
                        f"the loss became {record['loss']} at step {tuning.step + 1}; the last checkpoint stays: start "
                        f"again with a --lr below {settings['lr']:g}"
                    )
                objective.backward()
                norm = tuning.update(features.routing, batch.real, lr_factor=factor, bias_speed=settings["bias_speed"])

                num_tokens = sum(len(example.tokens) for example in examples)
                self.tokens += num_tokens
                self.examples += len(examples)
                self.losses.append(record["loss"])
                recent.append(time.perf_counter() - start)
                pace = fmean(recent)
                self.tokens_per_s = num_tokens / recent[-1]
                record |= {
                    "lr": settings["lr"] * factor, "grad_norm": norm, "tokens": self.tokens, "examples": self.examples,
                    "padding": 1 - num_tokens / batch.tokens.numel(), "tokens_per_s": self.tokens_per_s,
                }  # fmt: skip
                tuning.write(record)
                display.show(tuning.step, self.steps, figures_line(record | {"loss": fmean(self.losses)}),
                             pace * (self.steps - tuning.step))  # fmt: skip
                if tuning.step % settings["eval_every"] == 0 and tuning.step < self.steps:
                    self.validate()
                if tuning.is_due and tuning.step < self.steps:
                    self.save()
        self.finished = not stop.asked
        if self.finished:
            self.validate()
        self.save()

    def objective(self, batch: ExampleBatch) -> tuple[Tensor, dict[str, Any], Features]:
        """What a step lowers, the figures of its record, and the features they came from."""
        model = self.tuning.model
        sparse, keep = self.attention(batch), ["routing", "router_scores"]
        if model.mtp:
            keep.append("mtp")
        if sparse is not None:
            keep.append("index_loss")
        features = model.features(
            batch.tokens, documents=batch.slots, attention="sparse" if sparse else "dense", keep=keep
        )
        total, count = learned_loss(features.hidden, model.head.weight, batch)
        loss = total / max(1, count)
        record: dict[str, Any] = {"loss": loss.item(), "learned_tokens": count}
        objective = loss
        if features.mtp is not None:
            total, count = learned_loss(features.mtp, model.head.weight, batch, ahead=2)
            mtp = total / max(1, count)
            record["mtp_loss"] = mtp.item()
            objective = objective + MTP_WEIGHT * mtp
        balance = [
            balance_loss(scores, features.routing[layer], batch.real)
            for layer, scores in features.router_scores.items() if not is_hashed(model, layer)
        ]  # fmt: skip
        if balance:
            record["balance_loss"] = torch.stack(balance).sum().item()
            objective = objective + BALANCE * torch.stack(balance).sum()
        if features.index_loss:
            record |= indexer_figures(features)
            objective = objective + torch.stack([part.mean for part in features.index_loss.values()]).sum()
        record["expert_balance"] = expert_balance(features.routing, model.config.n_routed_experts)
        return objective, record, features

    def attention(self, batch: ExampleBatch) -> bool | None:
        """Whether this batch is read with sparse attention; None where there is nothing to choose among: every entry
        would be selected, so an indexer could neither help nor learn, and dense attention gives the same for less."""
        if batch.longest_slot <= self.covered:
            return None
        return self.tuning.step >= round(self.settings["sparse_at"] * self.steps)

    @torch.no_grad()
    def validate(self) -> None:
        """Measure on examples that were never learned."""
        if not self.validation:
            return
        model = self.tuning.model
        nats, right, count = 0.0, 0, 0
        for examples in in_batches(self.validation, self.settings["batch_tokens"]):
            batch = lay_out(examples).to(self.tuning.device)
            attention = "sparse" if self.attention(batch) else "dense"
            hidden = model.features(batch.tokens, documents=batch.slots, attention=attention, keep=()).hidden
            mask = learned_targets(batch)
            targets_M, states_MD = batch.tokens[:, 1:][mask], hidden[:, :-1][mask]
            nats += head_cross_entropy(states_MD, model.head.weight, targets_M).item()
            right += sum(int((model.head(part).argmax(-1) == wanted).sum())
                         for part, wanted in zip(states_MD.split(512), targets_M.split(512), strict=True))  # fmt: skip
            count += len(targets_M)
        self.val_loss, self.val_accuracy = nats / max(1, count), right / max(1, count)
        self.tuning.write({"val_loss": self.val_loss, "val_accuracy": self.val_accuracy})

    def save(self) -> None:
        """Save the state to go on from, and the model to use."""
        self.tuning.save({"feed": self.feed.state_dict(), "tokens": self.tokens, "examples": self.examples,
                          "losses": list(self.losses)})  # fmt: skip

    def seconds_per_step(self) -> float:
        """From doing all the work of a few steps on the first examples, leaving weights and feed as they were."""
        tuning, before, times = self.tuning, self.feed.state_dict(), []
        for _ in range(PROBES):
            start = time.perf_counter()
            batch = lay_out(self.feed.take()).to(tuning.device)
            objective, _, _ = self.objective(batch)
            objective.backward()
            if tuning.working:
                tuning.working.hand_gradients()
            tuning.optimizer.scale_lr(0.0)
            tuning.optimizer.step()
            tuning.optimizer.zero_grad()
            for optimizer in tuning.optimizer.optimizers.values():
                optimizer.state.clear()
            tuning.refresh()
            times.append(time.perf_counter() - start)
        self.feed.load_state_dict(before)
        return fmean(times[1:])


def in_batches(examples: list[Example], batch_tokens: int) -> list[list[Example]]:
    """Examples of similar length together, so that little is padding."""
    batches: list[list[Example]] = []
    room = 0
    for example in sorted(examples, key=lambda example: -len(example.tokens)):
        if not batches or len(example.tokens) > room:
            batches.append([])
            room = batch_tokens
        batches[-1].append(example)
        room -= len(example.tokens)
    return batches


# ---- after the loop -------------------------------------------------------------------------------------------------


def _report(options: SFTOptions, sft: SFT, stop: StopRequest) -> int:
    tuning, run = sft.tuning, sft.tuning.run
    plot_losses(run.read_metrics(), run.path / "loss.png")
    figures = {
        "steps": tuning.step,
        "examples": sft.examples,
        "tokens": sft.tokens,
        "left_out": sft.feed.left_out,
        "loss": fmean(sft.losses) if sft.losses else None,
        "val_loss": sft.val_loss,
        "val_accuracy": sft.val_accuracy,
        "seconds": round(tuning.seconds, 1),
        "tokens_per_s": round(sft.tokens / max(tuning.seconds, 1e-9)),
    }
    log.info("%d steps, %s examples, %s tokens in %s; loss %.3f", tuning.step, f"{sft.examples:,}", f"{sft.tokens:,}",
             duration(tuning.seconds), figures["loss"] or math.nan)  # fmt: skip
    if sft.feed.left_out:
        log.info("%s demonstrations were too long and left out", f"{sft.feed.left_out:,}")
    if sft.finished and sft.validation:
        log.info("validation %.3f nats per learned token, %.1f %% of them right", sft.val_loss, 100 * sft.val_accuracy)
    then = "chat" if tuning.has_model else "merge"
    follow_up = f"longreach sft --out {run.path} --resume" if stop.asked else f"longreach {then} {run.path}"
    if options.json:
        print(json_line({"command": "sft", "run": str(run.path), "finished": sft.finished, **figures,
                         "figures": figures}))  # fmt: skip
    else:
        made, place = ("model", run.model_dir) if tuning.has_model else ("adapters", run.path / ADAPTERS)
        print(f"{'stopped and saved' if stop.asked else made}: {place}")
        print(f"next: {follow_up}")
    return 128 + stop.signal if stop.asked else 0
