"""What every command that goes on from a trained model shares: options, run directory, weights that learn, checkpoints.

    settings = settle(options, DEFAULTS, saved)                  what was given, what the run began with, or the default
    tuning = Tuning.begin("sft", options, settings, saved)       model and tokenizer of RUN, optimizer, a new run directory
    while tuning.step < steps and not stop.asked:
        loss.backward()
        norm = tuning.update(features.routing, real_BT)          clip, step, balance the router, count
        tuning.write({"loss": …})
        if tuning.is_due: tuning.save({"feed": …})               weights, optimizer, random state, and what the loop adds

A run that was killed goes on from its last checkpoint: `Tuning.begin` with `--resume` puts everything back, and `extra` is
what the loop had given to `save`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from torch import Tensor

from longreach.checkpoint.frozen import load_frozen
from longreach.checkpoint.load import load_model
from longreach.checkpoint.merge import write_merged
from longreach.checkpoint.save import save_model
from longreach.errors import RequestError
from longreach.model.config import ModelConfig
from longreach.model.count import count_parameters
from longreach.model.transformer import Transformer
from longreach.optim.hybrid import HybridOptimizer, make_optimizers
from longreach.rundir import RunDirectory, find_model
from longreach.runtime import choose_device, log, seed_everything, set_threads
from longreach.tokenizer.bpe import Tokenizer
from longreach.train.balance import balance_experts
from longreach.train.lora import (
    DEFAULT_TARGETS,
    Adaptation,
    adapt,
    adapter_state,
    deltas,
    follow,
    load_adapters,
    save_adapters,
)
from longreach.train.mirror import Mirror, open_mirror
from longreach.train.state import newest_state, save_state, state_files
from longreach.train.working import clip_gradients, sharing, working_copy

ADAPTERS = "adapters"
"""Folder of a run with --lora that holds what learned."""

MERGED_BY_DEFAULT = 1 << 30
"""Bytes of a base below which every checkpoint also holds the merged model, so that the run is one like any other."""

LARGEST_MERGED = 2 << 30
"""Bytes of a merged copy that attempts may be drawn from."""

Several = Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction]
"""Of an option that takes one or several texts and may be repeated: `--task a b` and `--task a --task b` are the same. The
default is (), which `settle` takes as not given."""


EFFORT_TEXTS = "preview"
"""Whose words for the thinking effort models learn here: only think-max has any. Recorded, so that servers say the same."""


@dataclass(frozen=True, kw_only=True)
class TuningOptions:
    """Options of every command that trains on from a run. None means: not given; `settle` fills it in."""

    run: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="RUN")] = None
    """Run or checkpoint directory to start from. With --resume it may be left out."""
    out: Path
    """Run directory to make, or with --resume to go on with."""
    steps: int | None = None
    """Stop after this many steps."""
    minutes: float | None = None
    """Stop after about this long."""
    lr: float | None = None
    """Peak learning rate."""
    optimizer: Literal["muon", "adamw"] | None = None
    """muon (default; AdamW keeps embedding, head and vectors) or adamw for everything."""
    precision: Literal["float32", "bfloat16"] | None = None
    """Arithmetic of forward and backward (default float32); the weights that learn are float32 in either."""
    qat: Literal["plain", "fp8", "fp8-fp4"] | None = None
    """Train for weights stored in FP8, or FP8 with FP4 experts."""
    lora: int | None = None
    """Train adapters of this rank and nothing else; the weights of RUN stay as they are stored, in FP8 or FP4 too."""
    lora_alpha: float | None = None
    """What adapters count for: their product is multiplied by this over the rank (default: twice the rank)."""
    lora_targets: Several = ()
    """What gets adapters: attention, shared (the experts every token visits), experts (the routed ones, one adapter each),
    head (default: attention shared)."""
    lora_merge: Literal["always", "never"] | None = None
    """Whether checkpoints also write the model with its adapters merged (default: always where RUN's weights are below 1 GiB,
    else never; `longreach merge` does it later)."""
    seed: int | None = None
    """Decides the order of the data and every draw (default 0)."""
    resume: bool = False
    """Go on with the run in --out from its last checkpoint, with its own options."""
    checkpoint_every: int | None = None
    """Steps between checkpoints."""
    mirror: Literal["none", "tensorboard", "wandb"] = "none"
    """Send the metrics there as well."""
    threads: int | None = None
    """CPU threads (default: one per core that others leave free; a resumed run keeps its number)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: bool = False
    """End with one JSON object on stdout."""


COMMON: dict[str, Any] = {
    "lr": None, "optimizer": "muon", "precision": "float32", "qat": "plain", "seed": 0, "checkpoint_every": 20,
    "lora": None, "lora_alpha": None, "lora_targets": None, "lora_merge": None,
}  # fmt: skip
"""Defaults that commands share; each adds its own and gives `lr`."""


def saved_settings(options: TuningOptions, command: str, needs_run: bool = True) -> dict[str, Any]:
    """What RUN/config.json of a run to be resumed says; empty for a new one.

    Args:
        needs_run: a new run starts from RUN; otherwise it may be left out.

    Raises:
        RequestError: --resume and there is no such run, or --out holds something already.
    """
    run = RunDirectory(options.out)
    if not options.resume:
        run.check_new()
        if options.run is None and needs_run:
            raise RequestError("RUN is missing; give the run or checkpoint directory to start from, or --resume")
        return {}
    saved = run.read_config()
    if saved.get("command") != command:
        raise RequestError(
            f"{options.out} is a run of {saved.get('command', 'another command')}, not of {command}; give another --out"
        )
    return saved


def settle(options: TuningOptions, defaults: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting that decides what is learned: the saved one, the one given, or the default.

    Raises:
        RequestError: an option given to a resumed run differs from what it began with.
    """
    settings = {}
    for name, default in defaults.items():
        given = _given(getattr(options, name))
        if saved and name in saved:
            if given is not None and given != saved[name]:
                flag = "--" + name.replace("_", "-")
                raise RequestError(
                    f"{flag} {given} differs from this run's {saved[name]}; leave it out, a resumed run keeps its own"
                )
            settings[name] = saved[name]
        else:
            settings[name] = default if given is None else given
    return settings


def _given(value: Any) -> Any:
    """What was given, as JSON gives it back; None for nothing. The parts of a `Several` stand in one list."""
    plain = _plain(value)
    if isinstance(plain, list):
        return [one for part in plain for one in (part if isinstance(part, list) else [part])] or None
    return plain


def _plain(value: Any) -> Any:
    """As JSON gives it back, so that given and saved can be compared."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    return value


class NewModel(NamedTuple):
    """A model from nothing, for studies that need no pretraining."""

    name: str
    """Of the preset."""
    config: ModelConfig
    tokenizer: Tokenizer


class Tuning:
    """One sitting of a run that trains on.

    Attributes:
        run: its directory.
        source: directory of the weights it began with.
        master: the float32 weights that learn; `model`: the one that computes with them (the same, or a rounded copy).
        adaptation: with --lora, which adapters the master has; it is then a frozen model of which they alone learn.
        step, seconds: done so far, over all sittings.
        extra: what the loop had saved, in a resumed run; else empty.
    """

    def __init__(self, run: RunDirectory, source: Path, master: Transformer, tokenizer: Tokenizer,
                 settings: Mapping[str, Any], device: torch.device) -> None:  # fmt: skip
        self.run, self.source, self.master, self.tokenizer, self.device = run, source, master, tokenizer, device
        self.settings = settings
        self.adaptation = adaptation_of(settings)
        self.working = None
        if self.adaptation is None:  # else the master computes itself: adapters are float32 in any arithmetic
            self.working = working_copy(master, arithmetic(settings), settings["qat"])
        self.merged: MergedModel | None = None
        self.model = self.working.model if self.working else master
        self.optimizer: HybridOptimizer = make_optimizers(master, settings["lr"], kind=settings["optimizer"])
        self.step, self.seconds = 0, 0.0
        self.extra: dict[str, Any] = {}
        self.mirror: Mirror = Mirror()
        self._clock = time.perf_counter()
        self.refresh()

    @classmethod
    def begin(cls, command: str, options: TuningOptions, settings: dict[str, Any], saved: dict[str, Any],
              record: Mapping[str, Any] | None = None, new: NewModel | None = None) -> Tuning:  # fmt: skip
        """Open the run: a new one from RUN's model, or one to be gone on with, exactly where it was saved.

        Args:
            settings: of `settle`; they stand in RUN/config.json.
            record: what else is to stand there.
            new: begin with this untrained model instead of RUN's; the same one when the run is resumed.

        Raises:
            RequestError, CheckpointError: no model, no tokenizer, a setting that makes no sense.
        """
        if not 0 <= settings["lr"] < 1:
            raise RequestError(f"--lr {settings['lr']:g} must be from 0 to below 1")
        if settings["checkpoint_every"] < 1:
            raise RequestError(f"--checkpoint-every {settings['checkpoint_every']} must be at least 1")
        check_length(options)
        adaptation = settle_lora(options, settings, is_new=new is not None)
        run, device = RunDirectory(options.out), choose_device(options.device)
        threads = set_threads(saved.get("threads") if options.threads is None else options.threads, watch_s=1.0)
        seed_everything(settings["seed"])
        # A run killed before its first checkpoint has none, and perhaps no tokenizer of its own: it begins again.
        state = newest_state(run.state_dir) if saved and state_files(run.state_dir) else None
        if new is not None:
            source, tokenizer = Path(f"preset {new.name}"), new.tokenizer
            master = Transformer(new.config, device=device.value, seed=settings["seed"])
        else:
            source = Path(saved["source"]) if saved else find_model(options.run or "")
            tokenizer = Tokenizer.load(run.tokenizer_path if run.tokenizer_path.is_file() else source)
            if adaptation is None:
                master = load_model(source, dtype=torch.float32, device=device.value)
            else:
                if settings["lora_merge"] is None:
                    settings["lora_merge"] = "always" if weight_bytes(source) < MERGED_BY_DEFAULT else "never"
                frozen = load_frozen(source, dtype=arithmetic(settings), device=device.value)
                master = adapt(frozen, adaptation, settings["seed"])
        tuning = cls(run, source, master, tokenizer, settings, device.value)
        if saved:
            if state is not None:
                tuning.restore(state)
            run.drop_metrics_after(tuning.step)
        config = {"command": command, "effort_texts": EFFORT_TEXTS, **settings, **(record or {}), "source": str(source),
                  "steps": options.steps, "minutes": options.minutes, "threads": threads.value}  # fmt: skip
        if saved:
            is_new_length = options.steps is not None or options.minutes is not None
            changed = ("threads", "steps", "minutes") if is_new_length else ("threads",)
            run.write_config({**saved, **{name: config[name] for name in changed}})
        else:
            run.create(config)
        if state is None:
            run.state_dir.mkdir(exist_ok=True)
            tokenizer.save(run.tokenizer_path)
            tuning.save({})
        tuning.mirror = open_mirror(options.mirror, run, config)
        for label, choice in (("device", device), ("threads", threads)):
            log.info("%-10s %s", label, choice)
        log.info("%-10s %s, %s weights learn at %g with %s", "model", source,
                 f"{sum(p.numel() for p in master.parameters() if p.requires_grad):,}", settings["lr"],
                 settings["optimizer"])  # fmt: skip
        if adaptation is not None:
            log.info("%-10s rank %d, scale %g, at %s; all else stays as it is stored", "adapters", adaptation.rank,
                     adaptation.scale, ", ".join(adaptation.targets))  # fmt: skip
        if tuning.step:
            log.info("%-10s from step %d", "resumed", tuning.step)
        tuning._clock = time.perf_counter()
        return tuning

    # ---- a step -------------------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Of the weights: steps done."""
        return self.step

    def refresh(self) -> None:
        """Make the computing weights follow the learning ones."""
        if self.working:
            self.working.refresh()
        if self.merged:
            self.merged.refresh()

    def rollout_model(self) -> Transformer:
        """The computing weights in invariant arithmetic, for an engine: what it draws depends on no company. Call the
        engine's `weights_changed()` after each update. Adapters are merged into a model of its own, which follows them.

        Raises:
            RequestError: that model would be too large.
        """
        if self.adaptation is not None:
            if self.merged is None:
                self.merged = MergedModel(self.source, self.master)
            return self.merged.model
        return sharing(self.model, arithmetic="invariant").eval()

    def update(self, routing: Mapping[int, Tensor] | None = None, real_BT: Tensor | None = None, *,
               lr_factor: float = 1.0, bias_speed: float = 0.001, ends_step: bool = True) -> float:  # fmt: skip
        """Take the gradients that are there as one step; returns their norm before clipping.

        Args:
            routing: experts chosen in this step's batch, for the router's balance; None leaves the biases as they are.
            real_BT: which positions count.
            ends_step: False where more updates follow that belong to the same step.
        """
        if self.working:
            self.working.hand_gradients()
        norm = clip_gradients(self.master)
        self.optimizer.scale_lr(lr_factor)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if routing and self.adaptation is None:  # a router that stays as it is keeps its biases too
            balance_experts(self.master, dict(routing), real_BT, bias_speed)
        self.refresh()
        if ends_step:
            self.end_step()
        return norm

    def end_step(self) -> None:
        """Count a step and its time. `update` does, so this is for steps that had nothing to learn from."""
        self.step += 1
        now = time.perf_counter()
        self.seconds += now - self._clock
        self._clock = now

    def write(self, record: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, with step and seconds."""
        line = {"step": self.step, **record, "seconds": self.seconds}
        self.run.append_metrics(line)
        self.mirror.log(line)

    # ---- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def is_due(self) -> bool:
        """Whether this step is one of the regular checkpoints."""
        return self.step % self.settings["checkpoint_every"] == 0

    def save(self, extra: Mapping[str, Any]) -> None:
        """Save all there is to go on from, and the model to use."""
        weights = self.master.state_dict() if self.adaptation is None else adapter_state(self.master)
        state = {
            "model": weights, "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(), "step": self.step, "seconds": self.seconds, "extra": dict(extra),
        }  # fmt: skip
        save_state(self.run.state_dir, self.step, state, self.settings["checkpoint_every"])
        if self.adaptation is not None:
            save_adapters(self.master, self.run.path / ADAPTERS, self.adaptation, self.source)
        if self.has_model:
            self.save_weights()

    @property
    def has_model(self) -> bool:
        """Whether checkpoints write RUN/model; else there are adapters, which `longreach merge` makes a model of."""
        return self.adaptation is None or self.settings["lora_merge"] == "always"

    def save_weights(self) -> None:
        """Write RUN/model: the weights there are now, adapters merged."""
        folder = self.run.model_dir
        if self.adaptation is None:
            save_model(self.master, folder, weight_format=self.settings["qat"], tokenizer=self.tokenizer)
        else:
            write_merged(self.source, folder, deltas(self.master), self.tokenizer)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand exactly where the state was saved."""
        if self.adaptation is None:
            self.master.load_state_dict(state["model"])
        else:
            load_adapters(self.master, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.step, self.seconds, self.extra = state["step"], state["seconds"], dict(state["extra"])
        self.refresh()


def check_length(options: TuningOptions) -> None:
    """Refuse a length that is none.

    Raises:
        RequestError: --steps or --minutes that make no sense, or both.
    """
    if options.steps is not None and options.minutes is not None:
        raise RequestError("--steps and --minutes exclude each other; give one")
    if options.steps is not None and options.steps < 1:
        raise RequestError(f"--steps {options.steps} must be at least 1")
    if options.minutes is not None and not options.minutes > 0:
        raise RequestError(f"--minutes {options.minutes:g} must be above 0")


# ---- adapters -------------------------------------------------------------------------------------------------------


class MergedModel:
    """An ordinary model, in invariant arithmetic, whose weights follow a frozen base and the adapters of `master`.

    Raises:
        RequestError: it would take more memory than `LARGEST_MERGED`.
    """

    def __init__(self, source: Path, master: Transformer) -> None:
        count = count_parameters(master.config)
        needed = (count.total + count.mtp) * master.dtype.itemsize
        if needed > LARGEST_MERGED:
            raise RequestError(
                f"attempts of a model with adapters are drawn from a merged copy in {str(master.dtype)[6:]}, which would take "
                f"{needed / 2**30:.1f} GiB; up to {LARGEST_MERGED / 2**30:g} are offered: train such a model by sft"
            )
        self.master = master
        self.model = load_model(source, dtype=master.dtype, device=master.device, arithmetic="invariant").eval()
        self.model.requires_grad_(False)
        self.base = {name: self.model.get_parameter(name).clone() for name in deltas(master)}
        self.refresh()

    def refresh(self) -> None:
        """Take over what the adapters have become."""
        follow(self.model, self.base, self.master)


def adaptation_of(settings: Mapping[str, Any]) -> Adaptation | None:
    """What --lora asks for; None without it.

    Raises:
        RequestError: a rank, alpha or target that makes no sense.
    """
    if settings.get("lora") is None:
        return None
    return Adaptation(settings["lora"], settings["lora_alpha"], tuple(settings["lora_targets"] or DEFAULT_TARGETS))


def settle_lora(options: TuningOptions, settings: dict[str, Any], is_new: bool) -> Adaptation | None:
    """Check --lora against the options beside it; it decides the optimizer.

    Raises:
        RequestError: the line names the option.
    """
    if settings["lora"] is None:
        for name in ("lora_alpha", "lora_targets", "lora_merge"):
            if settings[name] is not None:
                raise RequestError(f"--{name.replace('_', '-')} is about adapters; give --lora RANK, or leave it out")
        return None
    if options.optimizer == "muon":
        raise RequestError(
            "--optimizer muon: adapters are trained by AdamW, as Muon would even out their few directions"
        )
    settings["optimizer"] = "adamw"
    if is_new:
        raise RequestError("--lora trains beside weights that have learned something; with --preset there are none")
    if settings["qat"] != "plain":
        raise RequestError(
            f"--qat {settings['qat']} trains the weights that are stored; with --lora they stay, leave it out"
        )
    return adaptation_of(settings)


def arithmetic(settings: Mapping[str, Any]) -> torch.dtype:
    """Of forward and backward."""
    return torch.bfloat16 if settings["precision"] == "bfloat16" else torch.float32


def weight_bytes(directory: Path) -> int:
    """Of a checkpoint's files."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def settings_of(instance: Any) -> dict[str, Any]:
    """The fields of a dataclass as plain JSON values."""
    return {f.name: _plain(getattr(instance, f.name)) for f in dataclasses.fields(instance)}
