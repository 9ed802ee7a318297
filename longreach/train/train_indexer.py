"""Training of the lightning indexers alone: `longreach train-indexer CHECKPOINT --data stdlib --out runs/indexer`.

    dense steps     loss = Σ over CSA layers of mean KL( attention ‖ softmax of index scores )   over all visible entries
    sparse steps    the same over the entries the indexer selects, attention over those too

    model weight  ←  what the file will hold of the float32 weight that learns     before each step: BF16, FP8 or as it is
    float32 weight ←  gradient of the model weight                                  straight through the rounding

Any checkpoint will do: a run directory, either published layout, plain or FP8 and FP4. The frozen model leaves no graph, so
memory is the model, one layer's activations, and what each indexer keeps for its backward pass: linear in the tokens of a
step. Measured for `tiny` in float32, rows of 2,048 to 32,768: 26 to 30 KiB a token at the peak, in either stage.
Source: DeepSeek-V3.2 report (both stages); the teacher is that of `ops.index_loss`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections import deque
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from longreach.checkpoint.load import load_model
from longreach.checkpoint.reader import Checkpoint, StoredUnit
from longreach.checkpoint.replace import as_stored, replace_weights
from longreach.data.corpus import Corpus, is_prepared, open_corpus, read_corpus
from longreach.data.packing import too_short
from longreach.data.sources import parse_sources
from longreach.data.split import Split
from longreach.data.stream import MixtureStream, in_order
from longreach.errors import RequestError
from longreach.model.config import ModelConfig
from longreach.model.config_io import read_config
from longreach.model.count import count_parameters
from longreach.model.features import summed
from longreach.model.indexer import Indexer
from longreach.model.init import initialise
from longreach.model.transformer import Transformer
from longreach.ops.index_loss import IndexLoss
from longreach.optim.groups import describe
from longreach.optim.hybrid import HybridOptimizer, make_optimizers
from longreach.rundir import RunDirectory, find_model
from longreach.runtime import (
    choose_device,
    json_line,
    log,
    seed_everything,
    set_threads,
    setup_logging,
    total_memory_bytes,
)
from longreach.tokenizer.bpe import Tokenizer
from longreach.train.indexer_recipe import (
    IndexerRecipe,
    TrainIndexerOptions,
    has_indexer,
    new_recipe,
    resumed_recipe,
)
from longreach.train.metrics import TrainingProgress, duration
from longreach.train.state import newest_state, save_state, state_files
from longreach.train.stopping import StopRequest, stop_signals
from longreach.train.working import frozen_but_indexer

CLIP_NORM = 1.0
RECALL_EVERY = 20
"""Sparse steps between measurements of the recall, which costs a dense attention there."""

VALIDATION_TOKENS = 32_768
FINGERPRINT_VALUES = 1 << 14
"""Tensors up to this size tell one state of a checkpoint from another; training moves them all."""


def main(options: TrainIndexerOptions) -> int:
    """Run the command; returns the exit code (130 after Ctrl-C, 143 after SIGTERM, both with the run saved)."""
    setup_logging()
    if options.eval_every < 1:
        raise RequestError(f"--eval-every {options.eval_every} must be at least 1")
    run = RunDirectory(options.out)
    saved = run.read_config() if options.resume else {}
    if not options.resume:
        run.check_new()
    given = options.checkpoint or saved.get("checkpoint")
    if given is None:
        raise RequestError("CHECKPOINT is missing; give a run directory or a checkpoint directory")
    source = find_model(given)
    config = read_config(source)
    recipe = resumed_recipe(options, saved) if options.resume else new_recipe(options, config, str(given))
    fingerprint = fingerprint_of(source, config)
    if options.resume and fingerprint != saved.get("fingerprint"):
        raise RequestError(f"{given} is not the checkpoint {run.path} began with; a resumed run needs the same")
    if options.resume and any(r.get("event") == "finished" for r in run.read_metrics()):
        log.info("%s is finished: %d steps; to train its indexers further: longreach train-indexer %s --data … --out …",
                 run.path, recipe.steps, run.path)  # fmt: skip
        return 0
    device = choose_device(options.device)
    threads = set_threads(saved.get("threads") if options.threads is None else options.threads)
    check_memory(config, recipe, device.value)
    corpus = load_corpus(recipe, config, source, run.tokenizer_path)

    seed_everything(recipe.seed)
    trainer = IndexerTrainer(run, recipe, source, corpus, device.value, options.eval_every)
    recipe = trainer.recipe
    record = {"command": "train-indexer", "checkpoint": str(Path(given).resolve()), "fingerprint": fingerprint,
              **dataclasses.asdict(recipe), "threads": threads.value}  # fmt: skip
    if state_files(run.state_dir):  # else it was killed before the first state: begin again
        trainer.restore(newest_state(run.state_dir))
    else:
        trainer.measure_start()
    if options.resume:
        run.drop_metrics_after(trainer.step if state_files(run.state_dir) else -1)
        run.write_config(record)
    else:
        run.create(record)
    corpus.tokenizer.save(run.tokenizer_path)

    count = sum(p.numel() for _, p in trainer.learning)
    log.info("device     %s", device)
    log.info("threads    %s", threads)
    log.info("model      %s: %s of %s parameters learn, in %d layers; %s, frozen", source, f"{count:,}",
             f"{count_parameters(config).total:,}", len(trainer.layers), recipe.dtype)  # fmt: skip
    log.info("data       %s: %s tokens; %d documents held out", " ".join(recipe.data), f"{corpus.num_tokens:,}",
             len(corpus.validation))  # fmt: skip
    log.info("schedule   %d dense and %d sparse steps of %d x %d tokens; %d of up to %d entries selected",
             recipe.warmup_steps, recipe.sparse_steps, recipe.rows, recipe.seq_len, config.index_topk,
             recipe.seq_len // config.csa_ratio)  # fmt: skip
    log.info("optimizer  peak learning rate %g dense, %g sparse\n%s", recipe.lr, recipe.sparse_lr,
             describe(trainer.optimizer.param_groups))  # fmt: skip
    if math.isnan(trainer.before["index_recall"]):
        log.info("note       no held-out document is long enough to leave an entry out: recall cannot be measured")

    with stop_signals() as stop:
        trainer.train(stop)
    return _report(options, run, trainer, stop)


class IndexerTrainer:
    """One sitting of a run: what the loop needs, and what it knows at the end."""

    def __init__(
        self,
        run: RunDirectory,
        recipe: IndexerRecipe,
        source: Path,
        corpus: Corpus,
        device: torch.device,
        eval_every: int = 100,
    ) -> None:
        self.run, self.source, self.corpus, self.device = run, source, corpus, device
        self.eval_every = eval_every
        config = read_config(source)
        first_mtp = config.num_hidden_layers
        self.keeps_mtp = has_indexer(config, first_mtp)
        unread: dict[str, Any] = {}
        if config.num_nextn_predict_layers and not self.keeps_mtp:  # nothing to learn in it: it stays on disk
            unread = {"num_nextn_predict_layers": 0, "compress_ratios": config.compress_ratios[:first_mtp]}
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(recipe.dtype)
        self.model = load_model(source, dtype, device, **unread)
        self.recipe = dataclasses.replace(recipe, dtype=str(self.model.dtype).removeprefix("torch."))
        frozen_but_indexer(self.model)
        self.places = indexer_places(source, config)
        master = learning_copy(self.model, source, self.places)
        self.learning = [(name, p) for name, p in master.named_parameters() if p.requires_grad]
        self.layers = [name for name, module in self.model.named_modules() if isinstance(module, Indexer)]
        held = dict(self.model.named_parameters())
        self.pairs = [(held[name], p, self.places[name]) for name, p in self.learning]
        self.optimizer: HybridOptimizer = make_optimizers(master, recipe.lr, kind=recipe.optimizer)
        self.stream = MixtureStream(corpus.training, corpus.weights, seed=recipe.seed)
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        self.losses: deque[float] = deque(maxlen=20)
        self.recalls: deque[tuple[float, float]] = deque(maxlen=20)
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.finished = False
        self.master = master

    def measure_start(self) -> None:
        """Measure the checkpoint's own indexers, then make them random if the recipe says so.

        Raises:
            RequestError: the model computes no number.
        """
        self.before = self.validate()
        if not math.isfinite(self.before["index_loss"]):
            raise RequestError(f"{self.source}: the index loss of this checkpoint is {self.before['index_loss']}; its weights "
                               "compute no numbers")  # fmt: skip
        if self.recipe.reset_indexer:
            for number, name in enumerate(self.layers):
                initialise(self.master.get_submodule(name), self.recipe.seed * 1000 + number)

    # ---- the loop -----------------------------------------------------------------------------------------------

    def train(self, stop: StopRequest) -> None:
        """Train until the steps are done or `stop` is asked for, then validate and save."""
        recipe = self.recipe
        began = time.perf_counter() - self.seconds
        recent: deque[float] = deque(maxlen=20)
        if self.step == 0:
            self.write({"step": 0, **_named("val_", self.before)})
        with TrainingProgress() as display:
            while self.step < recipe.steps and not stop.asked:
                start = time.perf_counter()
                if self.step in (0, recipe.warmup_steps):
                    self.write({"step": self.step + 1, "event": "phase",
                                "text": f"{'dense' if recipe.is_dense(self.step) else 'sparse'} attention"})  # fmt: skip
                    recent.clear()
                tokens, documents = (t.to(self.device) for t in self.stream.next_batch(recipe.rows, recipe.seq_len))

                record = self.forward_backward(tokens, documents)
                rate = recipe.rate(self.step)
                norm = torch.nn.utils.clip_grad_norm_([p for _, p in self.learning], CLIP_NORM).item()
                self.optimizer.set_lr(rate)
                self.optimizer.step()
                self.optimizer.zero_grad()

                self.step += 1
                self.tokens += tokens.numel()
                self.seconds = time.perf_counter() - began
                recent.append(time.perf_counter() - start)
                self.losses.append(record["index_loss"])
                if "index_recall" in record:
                    self.recalls.append((record["index_recall"], record["index_chance"]))
                self.write({"step": self.step, **record, "lr": rate, "grad_norm": norm, "tokens": self.tokens,
                            "tokens_per_s": tokens.numel() / recent[-1], "seconds": self.seconds})  # fmt: skip
                left = fmean(recent) * (recipe.steps - self.step)
                display.show(self.step, recipe.steps, self.figures_line(tokens.numel() / fmean(recent)), left)
                if self.step % self.eval_every == 0 and self.step < recipe.steps:
                    self.refresh()
                    self.write({"step": self.step, **_named("val_", self.validate())})
                if self.step % recipe.checkpoint_every == 0 and self.step < recipe.steps:
                    self.save_state()
        self.save_state()
        self.refresh()
        self.finished = self.step >= recipe.steps
        if self.finished:
            self.after = self.validate()
            self.write({"step": self.step, **_named("val_", self.after)})
        # The float32 weights: writing them rounds as `refresh` does.
        replace_weights(self.source, self.run.model_dir, dict(self.learning), self.corpus.tokenizer, recipe.layout)
        if self.finished:
            self.write({"step": self.step, "event": "finished", "text": f"{self.step} steps"})

    def forward_backward(self, tokens: Tensor, documents: Tensor) -> dict[str, float]:
        """The loss of a batch and its gradients, in the `.grad` of the weights that learn. Returns the record's figures.

        Raises:
            RequestError: the loss is no number.
        """
        dense = self.recipe.is_dense(self.step)
        measured = dense or self.step % RECALL_EVERY == 0
        self.refresh()
        features = self.model.features(
            tokens, documents=documents, attention="dense" if dense else "sparse",
            keep=self.keep("index_recall" if measured else "index_loss"),
        )  # fmt: skip
        figures = index_figures(features.index_loss)
        if not math.isfinite(figures["index_loss"]):
            kept = state_files(self.run.state_dir)
            last = f"; the state of step {kept[-1][0]} stays" if kept else ""
            rate = "--lr" if dense else "--sparse-lr"
            raise RequestError(f"the index loss became {figures['index_loss']} at step {self.step + 1}{last}; start again with "
                               f"a {rate} below {self.recipe.lr if dense else self.recipe.sparse_lr:g}")  # fmt: skip
        torch.stack([part.mean for part in features.index_loss.values()]).sum().backward()
        with torch.no_grad():
            for working, master, _ in self.pairs:
                if working.grad is not None:
                    master.grad = working.grad.float()
                    working.grad = None
        return {name: value for name, value in figures.items() if not math.isnan(value)}

    @torch.no_grad()
    def refresh(self) -> None:
        """Give the model what the file will hold of the weights that learn."""
        for working, master, place in self.pairs:
            working.copy_(as_stored(master, place))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Index loss, recall and chance on held-out documents, with the indexers the model has now.

        Always with dense attention: then hidden states and attention are the same whatever the indexers are.
        """
        parts: list[dict[int, IndexLoss]] = []
        for batch in in_order(self.corpus.validation, self.recipe.seq_len, self.recipe.rows, VALIDATION_TOKENS):
            tokens, documents = (t.to(self.device) for t in batch)
            features = self.model.features(
                tokens, documents=documents, attention="dense", keep=self.keep("index_recall")
            )
            parts.append(features.index_loss)
        return index_figures(summed(parts))

    def keep(self, what: str) -> tuple[str, ...]:
        return (what, "mtp") if self.keeps_mtp else (what,)

    def figures_line(self, tokens_per_s: float) -> str:
        """Where training stands, averaged over the last steps."""
        parts = [f"KL {fmean(self.losses):.3f}"]
        if self.recalls:
            recall, chance = (fmean(column) for column in zip(*self.recalls, strict=True))
            parts.append(f"recall {recall:.0%} (chance {chance:.0%})")
        return "  ".join([*parts, f"{tokens_per_s:,.0f} tokens/s"])

    # ---- what is written ----------------------------------------------------------------------------------------

    def write(self, record: dict[str, Any]) -> None:
        """Add a record to metrics.jsonl."""
        try:
            self.run.append_metrics(record)
        except OSError as error:
            raise RequestError(f"{self.run.metrics_path} could not be written ({error.strerror}); free some space and go on "
                               "with --resume") from error  # fmt: skip

    def save_state(self) -> None:
        """Save what is needed to go on; the frozen model is not in it."""
        state = {
            "indexer": {name: p.detach() for name, p in self.learning},
            "optimizer": self.optimizer.state_dict(),
            "stream": self.stream.state_dict(),
            "before": self.before,
            "progress": {
                "step": self.step,
                "seconds": self.seconds,
                "tokens": self.tokens,
                "losses": list(self.losses),
                "recalls": [list(pair) for pair in self.recalls],
            },
        }
        save_state(self.run.state_dir, self.step, state, self.recipe.checkpoint_every)

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Stand exactly where the state was saved.

        Raises:
            RequestError: it is of other data.
        """
        for name, p in self.learning:
            p.copy_(state["indexer"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        progress = state["progress"]
        self.step, self.seconds, self.tokens = progress["step"], progress["seconds"], progress["tokens"]
        self.losses.extend(progress["losses"])
        self.recalls.extend((recall, chance) for recall, chance in progress["recalls"])
        self.before = state["before"]
        try:
            self.stream.load_state_dict(state["stream"])
        except RequestError as error:
            raise RequestError(
                f"--data has changed since {self.run.path} began; a resumed run needs the same ({error})"
            ) from None


# ---- parts ----------------------------------------------------------------------------------------------------------


def index_figures(losses: dict[int, IndexLoss]) -> dict[str, float]:
    """Index loss in nats per query, recall and chance from 0 to 1, each averaged over the layers.

    Recall and chance are nan where no query saw more entries than are selected, or nothing was measured.
    """
    measured = [part.recall for part in losses.values() if int(part.recall.queries)]
    return {
        "index_loss": fmean(part.mean.item() for part in losses.values()),
        "index_recall": fmean(recall.mean.item() for recall in measured) if measured else math.nan,
        "index_chance": fmean(recall.mean_chance.item() for recall in measured) if measured else math.nan,
    }


def indexer_places(source: Path, config: ModelConfig) -> dict[str, StoredUnit]:
    """State-dict name of every indexer weight → how this checkpoint keeps it."""
    with Checkpoint.open(source) as checkpoint:
        return {s.unit.parameter.name: s for s in checkpoint.match(config) if ".indexer." in s.unit.parameter.name}


@torch.no_grad()
def learning_copy(model: Transformer, source: Path, places: dict[str, StoredUnit]) -> Transformer:
    """The indexers' weights in float32, in a model that otherwise is not there: names and roles, no memory."""
    copy = Transformer(model.config, device="meta")
    for module in copy.modules():
        if isinstance(module, Indexer):
            module.to_empty(device=model.device)
    frozen_but_indexer(copy)
    with Checkpoint.open(source) as checkpoint:
        for name, p in copy.named_parameters():
            if p.requires_grad:
                p.copy_(checkpoint.read(places[name]))
    return copy


def fingerprint_of(source: Path, config: ModelConfig) -> str:
    """Equal for the same state of a checkpoint: a digest of its config and small tensors, which all training moves.

    Raises:
        CheckpointError: the weights do not fit the config, or cannot be read.
    """
    digest = hashlib.blake2b((source / "config.json").read_bytes(), digest_size=16)
    with Checkpoint.open(source) as checkpoint:
        for stored in checkpoint.match(config):
            if math.prod(stored.unit.shape) <= FINGERPRINT_VALUES and stored.encoding == "plain":
                codes, _ = checkpoint.read_raw(stored)
                digest.update(codes.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_corpus(recipe: IndexerRecipe, config: ModelConfig, source: Path, saved_tokenizer: Path) -> Corpus:
    """The documents to train and to validate on, encoded as the model knows them.

    Args:
        saved_tokenizer: of a run that is resumed, where it is there already.

    Raises:
        RequestError: no tokenizer or another vocabulary's, data that cannot be read or is too short.
    """
    own = source / "tokenizer.json"
    file = saved_tokenizer if saved_tokenizer.is_file() else Path(recipe.tokenizer or own)
    if file == own and not own.is_file():
        raise RequestError(f"{own} is missing; give the tokenizer.json this model was trained with: --tokenizer PATH")
    tokenizer = Tokenizer.load(file)
    if tokenizer.vocab_size > config.vocab_size:
        raise RequestError(f"{file} has {tokenizer.vocab_size} tokens, the model {source} has {config.vocab_size}")
    if (tokenizer.bos_id, tokenizer.eos_id) != (config.bos_token_id, config.eos_token_id):
        raise RequestError(
            f"{file} begins and ends texts with ids {tokenizer.bos_id} and {tokenizer.eos_id}; {source} was trained with "
            f"{config.bos_token_id} and {config.eos_token_id}"
        )
    if len(recipe.data) == 1 and is_prepared(recipe.data[0]):
        corpus = open_corpus(recipe.data[0], tokenizer)
    else:
        corpus = read_corpus(Split.of(parse_sources(recipe.data, recipe.text_field)), tokenizer)
    if corpus.num_tokens < recipe.seq_len:
        raise too_short(corpus.num_tokens, recipe.seq_len)
    return corpus


def check_memory(config: ModelConfig, recipe: IndexerRecipe, device: torch.device) -> None:
    """Refuse a model whose weights alone do not fit rather than be killed half-way."""
    width = 2 if recipe.dtype == "bfloat16" or (recipe.dtype == "auto" and device.type == "cuda") else 4
    needed, there = width * count_parameters(config).total, total_memory_bytes(device)
    if there is not None and needed > there:
        advice = "; --dtype bfloat16 halves that" if width == 4 else ""
        raise RequestError(
            f"this model's weights take {needed / 2**30:,.0f} GiB, {device} has {there / 2**30:,.0f} GiB{advice}"
        )


def _named(prefix: str, figures: dict[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in figures.items()}


# ---- after the loop -------------------------------------------------------------------------------------------------


def _report(options: TrainIndexerOptions, run: RunDirectory, trainer: IndexerTrainer, stop: StopRequest) -> int:
    before, after = trainer.before, trainer.after
    figures = {
        "recall_before": before["index_recall"],
        "recall_after": after.get("index_recall"),
        "chance": before["index_chance"],
        "index_loss_before": before["index_loss"],
        "index_loss_after": after.get("index_loss"),
        "tokens": trainer.tokens,
        "seconds": round(trainer.seconds, 1),
    }
    log.info("%d steps, %s tokens in %s", trainer.step, f"{trainer.tokens:,}", duration(trainer.seconds))
    if options.json:
        print(json_line({"command": "train-indexer", "run": str(run.path), "model": str(run.model_dir),
                         "finished": trainer.finished, "steps": trainer.step, "figures": figures}))  # fmt: skip
    else:
        if trainer.finished:
            print(table(before, after))
        print(f"{'stopped and saved' if stop.asked else 'model'}: {run.model_dir}")
        if stop.asked:
            print(f"next: longreach train-indexer --out {run.path} --resume")
        else:
            print(f'next: longreach generate {run.path} "def "')
    return 128 + stop.signal if stop.asked else 0


def table(before: dict[str, float], after: dict[str, float]) -> str:
    """Held-out figures of the untouched and the trained indexers, and of a random choice."""

    def share(value: float) -> str:
        return "-" if math.isnan(value) else f"{value:.1%}"

    rows = [
        ("held-out documents", "KL", "recall"),
        ("indexer before", f"{before['index_loss']:.3f}", share(before["index_recall"])),
        ("indexer after", f"{after['index_loss']:.3f}", share(after["index_recall"])),
        ("chance", "", share(before["index_chance"])),
    ]
    return "\n".join(f"{name:<20}{kl:>8}{recall:>10}" for name, kl, recall in rows)
