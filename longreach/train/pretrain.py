"""Pretraining: `longreach pretrain --preset tiny --data stdlib --minutes 2 --out runs/quickstart`.

    loss = −log p(next token) + 0.3 · (−log p(token after it), from the MTP block)
    bias_e ← bias_e + 0.001 · sign(mean load − load of expert e)          after each step, for every routed layer

The loop in `train` is the whole algorithm: batch, forward, loss, backward, step, balance, log. A batch is a function of
(data, seed, step) and the state file holds the rest, so a run that was stopped goes on exactly where it was.
Source: DeepSeek-V4 report, sections 2.1 and 4.2; AdamW for every weight is this build's choice for small models.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from longreach.checkpoint.save import save_model
from longreach.data.packing import encode_documents
from longreach.data.sources import read_documents, split_validation
from longreach.data.stream import TrainingStream, in_order
from longreach.errors import RequestError
from longreach.model.config import ModelConfig
from longreach.model.count import count_parameters
from longreach.model.transformer import Transformer
from longreach.rundir import RunDirectory
from longreach.runtime import (
    choose_device,
    choose_dtype,
    json_line,
    log,
    seed_everything,
    set_threads,
    setup_logging,
    total_memory_bytes,
)
from longreach.tokenizer.bpe import Tokenizer
from longreach.train.losses import mean_loss, predicted, summed_loss
from longreach.train.metrics import TrainingProgress, duration
from longreach.train.plot import plot_losses
from longreach.train.recipe import PretrainOptions, Recipe, budget_of, new_recipe, resumed_recipe
from longreach.train.schedule import Budget, learning_rate
from longreach.train.state import Progress, load_state, save_state

MTP_WEIGHT = 0.3
BIAS_STEP = 0.001
CLIP_NORM = 1.0
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
CHECKPOINT_EVERY_S = 300.0
VALIDATION_TOKENS = 32_768


def main(options: PretrainOptions) -> int:
    """Run the command; returns the exit code (130 after Ctrl-C, 143 after SIGTERM, both with the run saved)."""
    setup_logging()
    run = RunDirectory(options.out)
    budget = budget_of(options)
    if options.resume:
        saved = run.read_config()
        recipe = resumed_recipe(options, saved)
        budget = budget or Budget(steps=saved.get("steps"), minutes=saved.get("minutes"))
    else:
        run.check_new()
        recipe = new_recipe(options)
    config = recipe.config
    device, threads = choose_device(options.device), set_threads(options.threads, watch_s=2.0)
    dtype = choose_dtype("auto", device.value, training=True)
    _check_memory(recipe.preset, config, device.value)

    training_texts, validation_texts = split_validation(read_documents(recipe.data))
    tokenizer = Tokenizer.load(run.tokenizer_path) if options.resume else _tokenizer(recipe, training_texts, config)
    training, validation = encode_documents(training_texts, tokenizer), encode_documents(validation_texts, tokenizer)
    stream = TrainingStream(training, recipe.seq_len, recipe.rows_per_batch, recipe.seed)
    if budget is None:
        budget = Budget(steps=math.ceil(stream.rows_per_pass / recipe.rows_per_batch))

    seed_everything(recipe.seed)
    model = Transformer(config, dtype=dtype.value, device=device.value, seed=recipe.seed)
    optimizer = make_optimizer(model, recipe.lr)
    progress = Progress(data_digest=_digest(training))
    if options.resume:
        progress = load_state(run.state_path, model, optimizer)
        if progress.data_digest != _digest(training):
            raise RequestError(f"--data {recipe.data} has changed since {run.path} began; a resumed run needs the same")
        run.drop_metrics_after(progress.step)
        planned = budget.total_steps(progress.step, progress.seconds, None)
        if planned <= progress.step:
            log.info("%s is finished: %d steps; give more --steps or --minutes to train on", run.path, progress.step)
            return 0
    record = {"command": "pretrain", **dataclasses.asdict(recipe), **dataclasses.asdict(budget)}
    if options.resume:
        run.write_config(record)
    else:
        run.create(record)
        tokenizer.save(run.tokenizer_path)

    count = count_parameters(config)
    tokens = sum(map(len, training))
    log.info("device     %s", device)
    log.info("threads    %s", threads)
    log.info("dtype      %s", dtype)
    log.info("model      %s: %s parameters, %s used per token", recipe.preset, f"{count.total:,}", f"{count.active:,}")
    log.info("data       %s: %d documents, %s tokens; %d documents held out", recipe.data, len(training), f"{tokens:,}",
             len(validation))  # fmt: skip
    log.info("batch      %d rows of %d tokens; budget %s", recipe.rows_per_batch, recipe.seq_len, budget)

    trainer = Trainer(run, recipe, budget, model, optimizer, tokenizer, stream, validation, progress)
    with _stop_signals() as stop:
        trainer.train(stop)
    return _report(options, run, trainer, stop)


class Trainer:
    """One sitting of a run: what the loop needs, and what it knows at the end."""

    def __init__(
        self,
        run: RunDirectory,
        recipe: Recipe,
        budget: Budget,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        tokenizer: Tokenizer,
        stream: TrainingStream,
        validation: Sequence[np.ndarray],
        progress: Progress,
    ):
        self.run, self.recipe, self.budget = run, recipe, budget
        self.model, self.optimizer, self.tokenizer = model, optimizer, tokenizer
        self.stream, self.validation, self.progress = stream, validation, progress
        self.device = next(model.parameters()).device
        self.bytes_of = torch.tensor(
            [0 if i in tokenizer.special_ids.values() else len(b) for i, b in enumerate(tokenizer.token_bytes)],
            device=self.device,
        )
        self.losses: deque[float] = deque(maxlen=20)
        self.finished = False
        self.tokens_per_s = 0.0
        self.val_loss = self.val_bits_per_byte = math.nan

    def train(self, stop: StopRequest) -> None:
        """Train until the budget is used or `stop` is asked for, then validate and save."""
        progress, model, optimizer = self.progress, self.model, self.optimizer
        weights = [p for p in model.parameters() if p.requires_grad]
        began = time.perf_counter() - progress.seconds
        last_checkpoint = time.perf_counter()
        recent: deque[float] = deque(maxlen=20)
        first_step = progress.step
        total = self.budget.total_steps(progress.step, progress.seconds, None)
        keep = ("routing", "mtp") if model.mtp else ("routing",)
        model.train()
        with TrainingProgress() as display:
            while progress.step < total and not stop.asked:
                start = time.perf_counter()
                tokens, documents = (part.to(self.device) for part in self.stream.batch(progress.step))
                rate = learning_rate(progress.step, total, self.recipe.lr)
                for group in optimizer.param_groups:
                    group["lr"] = rate

                features = model.features(tokens, documents=documents, keep=keep)
                loss = mean_loss(features.hidden, model.head.weight, tokens, documents)
                objective, mtp_loss = loss, None
                if features.mtp is not None:
                    mtp_loss = mean_loss(features.mtp, model.head.weight, tokens, documents, ahead=2)
                    objective = loss + MTP_WEIGHT * mtp_loss
                objective.backward()
                norm = torch.nn.utils.clip_grad_norm_(weights, CLIP_NORM)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                balance_experts(model, features.routing)

                progress.step += 1
                value = loss.item()
                if not math.isfinite(value):
                    raise RequestError(
                        f"the loss became {value} at step {progress.step}; start again with a --lr below {self.recipe.lr:g}"
                    )
                now = time.perf_counter()
                progress.seconds = now - began
                if progress.step - first_step == 3:
                    recent.clear()  # the first two steps of a sitting are slower: memory is still being asked for
                recent.append(now - start)
                pace = fmean(recent)
                total = self.budget.total_steps(progress.step, progress.seconds, pace)
                self.losses.append(value)
                self.tokens_per_s = tokens.numel() / pace
                self.run.append_metrics(
                    {
                        "step": progress.step,
                        "loss": value,
                        "mtp_loss": None if mtp_loss is None else mtp_loss.item(),
                        "lr": rate,
                        "grad_norm": norm.item(),
                        "tokens_per_s": self.tokens_per_s,
                        "seconds": progress.seconds,
                    }
                )
                display.show(
                    progress.step, total, fmean(self.losses), self.tokens_per_s, pace * (total - progress.step)
                )
                if now - last_checkpoint > CHECKPOINT_EVERY_S:
                    self.validate()
                    self.save()
                    last_checkpoint = time.perf_counter()
        self.finished = progress.step >= total
        if not stop.asked:
            self.validate()
        self.save()

    def save(self) -> None:
        """Save the state to go on from, and the model to use."""
        save_state(self.run.state_path, self.model, self.optimizer, self.progress)
        save_model(self.model, self.run.model_dir, tokenizer=self.tokenizer)

    @torch.no_grad()
    def validate(self) -> None:
        """Measure loss in nats per token, and bits per byte of text, on the held-out documents."""
        self.model.eval()
        nats, targets, text_bytes = 0.0, 0, 0
        for batch in in_order(self.validation, self.recipe.seq_len, self.recipe.rows_per_batch, VALIDATION_TOKENS):
            tokens, documents = (part.to(self.device) for part in batch)
            hidden = self.model.features(tokens, documents=documents).hidden
            total, count = summed_loss(hidden, self.model.head.weight, tokens, documents)
            nats += total.item()
            targets += count
            text_bytes += int(self.bytes_of[tokens[:, 1:][predicted(documents, 1)]].sum())
        self.model.train()
        self.val_loss = nats / max(1, targets)
        self.val_bits_per_byte = nats / math.log(2) / max(1, text_bytes)
        self.run.append_metrics(
            {"step": self.progress.step, "val_loss": self.val_loss, "val_bits_per_byte": self.val_bits_per_byte}
        )


# ---- parts of a step ------------------------------------------------------------------------------------------------


def make_optimizer(model: torch.nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices; vectors, scalars and the compressors' position tables have none."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not name.endswith(".ape")
        (decayed if is_matrix else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=1e-8, fused=True)


@torch.no_grad()
def balance_experts(model: Transformer, routing: dict[int, Tensor]) -> None:
    """Raise the choosing bias of experts that got less than the mean load in this batch, lower it for the others.

    Args:
        routing: layer -> int64 (B, T, K) experts; layers from `num_hidden_layers` on are MTP blocks. Layers without a
            bias (hash-routed ones) are left alone.
    """
    first_mtp = model.config.num_hidden_layers
    for layer, chosen in routing.items():
        block = f"layers.{layer}" if layer < first_mtp else f"mtp.{layer - first_mtp}"
        bias = model.get_submodule(f"{block}.ffn.gate").bias
        if isinstance(bias, Tensor):
            load = torch.bincount(chosen.flatten(), minlength=len(bias)).float()
            bias += BIAS_STEP * (load.mean() - load).sign()


# ---- before and after the loop --------------------------------------------------------------------------------------


def _check_memory(preset: str, config: ModelConfig, device: torch.device) -> None:
    """Refuse a model that cannot fit rather than be killed half-way: weight, gradient and two moments, 4 bytes each."""
    if config.attention == "mla":
        raise RequestError(f"preset {preset} is the V3.2 baseline, for comparisons only; train tiny or small")
    needed, there = 16 * count_parameters(config).total, total_memory_bytes(device)
    if there is not None and needed > there:
        raise RequestError(
            f"training preset {preset} needs {needed / 2**30:,.0f} GiB for weights and optimizer, "
            f"{device} has {there / 2**30:,.0f} GiB; choose a smaller preset: tiny or small"
        )


def _tokenizer(recipe: Recipe, texts: Sequence[str], config: ModelConfig) -> Tokenizer:
    if recipe.tokenizer is None:
        return Tokenizer.train(texts, config.vocab_size)
    tokenizer = Tokenizer.load(recipe.tokenizer)
    if tokenizer.vocab_size > config.vocab_size:
        raise RequestError(
            f"{recipe.tokenizer} has {tokenizer.vocab_size} tokens, preset {recipe.preset} has room for {config.vocab_size}"
        )
    if (tokenizer.bos_id, tokenizer.eos_id) != (config.bos_token_id, config.eos_token_id):
        raise RequestError(
            f"{recipe.tokenizer} begins and ends texts with ids {tokenizer.bos_id} and {tokenizer.eos_id}; "
            f"this model needs {config.bos_token_id} and {config.eos_token_id}"
        )
    return tokenizer


def _digest(documents: Sequence[np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for document in documents:
        digest.update(document.tobytes())
    return digest.hexdigest()


class StopRequest:
    """Set by Ctrl-C or SIGTERM; the loop ends after the step it is in."""

    def __init__(self) -> None:
        self.signal = 0

    @property
    def asked(self) -> bool:
        return self.signal != 0


@contextmanager
def _stop_signals() -> Iterator[StopRequest]:
    """While inside, the first Ctrl-C or SIGTERM asks for a stop; a second Ctrl-C interrupts at once."""
    stop = StopRequest()

    def ask(number: int, frame: object) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.signal = number
        log.info("stopping after this step, then saving; once more to stop without saving")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _report(options: PretrainOptions, run: RunDirectory, trainer: Trainer, stop: StopRequest) -> int:
    progress = trainer.progress
    plot_losses(run.read_metrics(), run.path / "loss.png")
    result = {
        "run": str(run.path),
        "steps": progress.step,
        "tokens": progress.step * trainer.recipe.rows_per_batch * trainer.recipe.seq_len,
        "loss": fmean(trainer.losses) if trainer.losses else None,
        "val_loss": trainer.val_loss,
        "val_bits_per_byte": trainer.val_bits_per_byte,
        "seconds": round(progress.seconds, 1),
        "tokens_per_s": round(trainer.tokens_per_s),
        "finished": trainer.finished,
    }
    log.info("%d steps, %s tokens in %s; loss %.3f", progress.step, f"{result['tokens']:,}", duration(progress.seconds),
             result["loss"] or math.nan)  # fmt: skip
    if not stop.asked:
        log.info("validation %.3f nats per token, %.3f bits per byte", trainer.val_loss, trainer.val_bits_per_byte)
    follow_up = (
        f'longreach generate {run.path} "def "' if not stop.asked else f"longreach pretrain --out {run.path} --resume"
    )
    if options.json:
        print(json_line(result))
    else:
        print(f"{'stopped and saved' if stop.asked else 'model'}: {run.model_dir}")
        print(f"next: {follow_up}")
    return 128 + stop.signal if stop.asked else 0
