"""Low-rank adapters: a model that stays as it is, and a small sum beside some of its matrices that learns.

    y = W x + alpha / rank · B A x          A [rank, in] begins at random, B [out, rank] at zero: nothing changes at first

    model = load_frozen("runs/base")                       W may stay in FP8 or FP4 codes (model.frozen)
    adapt(model, Adaptation(rank=8))                       attention and shared experts; 1 to 2 parameters in 100 learn
    save_adapters(model, folder, adaptation, base)         PEFT's file format, names of transformers' modules
    write_merged(base, "out", model)                       W + alpha / rank · B A as an ordinary checkpoint

Adapters are float32 whatever the model computes in, and read the input that the frozen product reads: where the released
numerics round it to FP8, the rounded one. So the merged matrix gives what both give together. Source: LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longreach.checkpoint.frozen import put
from longreach.checkpoint.names import locate
from longreach.errors import CheckpointError, RequestError
from longreach.model.config import ModelConfig
from longreach.model.frozen import FrozenExperts, FrozenLinear, FrozenMixture, Stack, frozen_product
from longreach.model.layers import FP8_ACTIVATION_BLOCK, Linear
from longreach.model.passing import Pass
from longreach.model.transformer import Head, Transformer
from longreach.ops.moe import clamped_swiglu, mixture_reference, parts_by_expert
from longreach.ops.quant import fp8_roundtrip
from longreach.runtime import write_atomic

TARGETS = {
    "attention": r"(layers|mtp)\.\d+\.attn\.w\w+",
    "shared": r"(layers|mtp)\.\d+\.ffn\.(shared_experts\.)?w[123]",
    "experts": r"(layers|mtp)\.\d+\.ffn",
    "head": "head",
}
"""What can be adapted, with the modules that belong to it: projections of attention, the experts that every token visits (or
the dense layer in their place), the routed ones (each has an adapter of its own), the head."""
DEFAULT_TARGETS = ("attention", "shared")

MATRICES = ("w1", "w3", "w2")

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
"""PEFT's names."""

Delta = Callable[[int | None], Tensor]
"""What is added to a parameter, float32 on the CPU or where the model is; of one expert for a stacked parameter."""


@dataclass(frozen=True)
class Adaptation:
    """Which adapters a model gets.

    Raises:
        RequestError: a rank or alpha that makes no sense, or an unknown target.
    """

    rank: int
    alpha: float | None = None
    """None: twice the rank."""
    targets: tuple[str, ...] = DEFAULT_TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RequestError(
                f"--lora {self.rank}: the rank must be at least 1; leave --lora out to train all weights"
            )
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise RequestError(f"--lora-alpha {self.alpha:g} must be above 0")
        for target in self.targets:
            if target not in TARGETS:
                raise RequestError(f"--lora-targets {target!r} is none of {', '.join(TARGETS)}")
        if not self.targets:
            raise RequestError(f"--lora-targets is empty; choose among {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return (2 * self.rank if self.alpha is None else self.alpha) / self.rank


# ---- adapted modules ------------------------------------------------------------------------------------------------


class AdaptedLinear(nn.Module):
    """A `Linear` or `FrozenLinear` with an adapter beside it. It takes over the rounding of the input."""

    stands_in = True

    def __init__(self, base: Linear | FrozenLinear, rank: int, scale: float) -> None:
        super().__init__()
        out_features, in_features = base.codes.shape if isinstance(base, FrozenLinear) else base.weight.shape
        self.base, self.scale, self.rounds_input = base, scale, base.rounds_input
        base.rounds_input = False
        device = base.codes.codes.device if isinstance(base, FrozenLinear) else base.weight.device
        self.lora_A = nn.Parameter(torch.zeros(rank, in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=device))

    def delta(self) -> Tensor:
        """The matrix that the adapter adds, float32 `[out, in]`."""
        return self.scale * (self.lora_B @ self.lora_A)

    @property
    def weight(self) -> Tensor:
        """The merged matrix, for whoever needs it itself; differentiable."""
        weight = self.base.weight
        return weight + self.delta().to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.rounds_input:
            x = fp8_roundtrip(x, FP8_ACTIVATION_BLOCK)
        return self.base(x) + beside(x, self.lora_A, self.lora_B, self.scale)

    def grouped(self, x_GMI: Tensor) -> Tensor:
        """As of `Linear`; the groups share A, and have each their rows of B."""
        low = x_GMI @ self.lora_A.to(x_GMI.dtype).t()
        groups = self.lora_B.to(x_GMI.dtype).view(len(x_GMI), -1, self.lora_B.shape[1])
        return self.base.grouped(x_GMI) + self.scale * torch.bmm(low, groups.transpose(1, 2))


class AdaptedHead(Head):
    """A head with an adapter. Losses read its `weight`, so that is merged whenever they do: a gradient of the whole head's
    size, large for a large vocabulary."""

    stands_in = True

    def __init__(self, base: Head, rank: int, scale: float) -> None:
        nn.Module.__init__(self)
        self.base, self.scale, self.invariant = base, scale, base.invariant
        vocabulary, width = base.weight.shape
        self.lora_A = nn.Parameter(torch.zeros(rank, width, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(vocabulary, rank, device=base.weight.device))

    def delta(self) -> Tensor:
        """As of `AdaptedLinear`."""
        return self.scale * (self.lora_B @ self.lora_A)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The merged matrix; float32, or float64 over a wider base."""
        delta = self.delta()
        return self.base.weight.to(torch.promote_types(self.base.weight.dtype, delta.dtype)) + delta


class AdaptedExperts(FrozenExperts):
    """Frozen experts with adapters: of each matrix one per expert, stacked, A `[E, rank, in]` and B `[E, out, rank]`."""

    def __init__(self, base: FrozenExperts, rank: int, scale: float) -> None:
        super().__init__(base.w1, base.w3, base.w2)
        self.scale = scale
        for name in MATRICES:
            stack: Stack = getattr(base, name)
            experts, out_features, in_features = stack.shape
            device = stack.experts[0].codes.device
            for leaf, shape in (("A", (experts, rank, in_features)), ("B", (experts, out_features, rank))):
                self.register_parameter(f"{name}_lora_{leaf}", nn.Parameter(torch.zeros(shape, device=device)))

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(A, B) of w1, w3 or w2, stacked."""
        return cast(Tensor, getattr(self, f"{name}_lora_A")), cast(Tensor, getattr(self, f"{name}_lora_B"))

    def delta(self, name: str, expert: int | None) -> Tensor:
        """The matrix that an expert's adapter adds, float32 `[out, in]`."""
        assert expert is not None
        a, b = self.factors(name)
        return self.scale * (b[expert] @ a[expert])


class AdaptedMixture(FrozenMixture):
    """A `FrozenMixture` over adapted experts."""

    def mix(self, x_MD: Tensor, chosen_MK: Tensor, weight_MK: Tensor, pass_: Pass) -> Tensor:
        experts = cast(AdaptedExperts, self.experts)
        if pass_.invariant:
            w1, w3, w2 = (cast(Any, _MergedStack(experts, name)) for name in MATRICES)
            return mixture_reference(
                x_MD, chosen_MK, weight_MK, w1, w3, w2, self.limit, self.fp8_block, pass_.real_rows
            )
        M, K = chosen_MK.shape
        wide = torch.float64 if x_MD.dtype == torch.float64 else torch.float32
        order = chosen_MK.reshape(-1).argsort(stable=True)
        counts = torch.bincount(chosen_MK.reshape(-1), minlength=experts.w1.shape[0]).tolist()
        read = fp8_roundtrip(x_MD, self.fp8_block) if self.fp8_block else x_MD
        # Taken apart once: the gradient of one expert's slice would be a tensor as large as all of them.
        factors = {name: [stacked.unbind() for stacked in experts.factors(name)] for name in MATRICES}

        def product(name: str, expert: int, x: Tensor) -> Tensor:
            stack, (a, b) = cast(Stack, getattr(experts, name)), factors[name]
            return frozen_product(x, stack.experts[expert], stack.dtype) + beside(
                x, a[expert], b[expert], experts.scale
            )

        outputs = []
        for e, part in parts_by_expert(counts):
            rows = read.index_select(0, order[part] // K)
            hidden = clamped_swiglu(product("w1", e, rows), product("w3", e, rows), self.limit)
            hidden = (hidden * weight_MK.reshape(-1, 1).index_select(0, order[part])).to(x_MD.dtype)
            outputs.append(product("w2", e, fp8_roundtrip(hidden, self.fp8_block) if self.fp8_block else hidden))
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        return torch.cat(outputs).index_select(0, back).view(M, K, -1).sum(dim=1, dtype=wide)


class _MergedStack:
    def __init__(self, experts: AdaptedExperts, name: str) -> None:
        self.experts, self.name = experts, name

    def __getitem__(self, expert: int) -> Tensor:
        weight = cast(Stack, getattr(self.experts, self.name))[expert]
        return weight + self.experts.delta(self.name, expert).to(weight.dtype)


def beside(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale · B A x, in the dtype of `x`."""
    return (x @ a.to(x.dtype).t()) @ b.to(x.dtype).t() * scale


# ---- a model's adapters ---------------------------------------------------------------------------------------------


def adapt(model: Transformer, adaptation: Adaptation, seed: int = 0) -> Transformer:
    """Put adapters into a model of `load_frozen`, in place; they alone learn. A is normal with variance 1 / in.

    Raises:
        RequestError: the model has nothing of a target.
    """
    rank, scale = adaptation.rank, adaptation.scale
    places = {name: module for name, module in model.named_modules() if name}
    for target in adaptation.targets:
        found = False
        for name, module in places.items():
            if re.fullmatch(TARGETS[target], name) is None:
                continue
            if isinstance(module, FrozenMixture):
                if target != "experts":
                    continue
                put(
                    model,
                    name,
                    AdaptedMixture(module, AdaptedExperts(cast(FrozenExperts, module.experts), rank, scale)),
                )
            elif isinstance(module, Head):
                put(model, name, AdaptedHead(module, rank, scale))
            elif isinstance(module, (Linear, FrozenLinear)):
                put(model, name, AdaptedLinear(module, rank, scale))
            else:
                continue
            found = True
        if not found:
            raise RequestError(f"--lora-targets {target}: this model has none; leave it out")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_A"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return model


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters by name: all that learned."""
    return {name: p.detach() for name, p in model.named_parameters() if name.endswith(("lora_A", "lora_B"))}


@torch.no_grad()
def load_adapters(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put an `adapter_state` back.

    Raises:
        CheckpointError: it is of other adapters.
    """
    mine = adapter_state(model)
    wrong = sorted(mine.keys() ^ state.keys()) or sorted(n for n, p in mine.items() if p.shape != state[n].shape)
    if wrong:
        raise CheckpointError(f"the saved adapters do not fit this model and these options; they differ in {wrong[0]}")
    for name, parameter in mine.items():
        parameter.copy_(state[name])


def deltas(model: nn.Module) -> dict[str, Delta]:
    """What adapters add, by the name of the parameter that they add it to."""
    found: dict[str, Delta] = {}
    for name, module in model.named_modules():
        if isinstance(module, (AdaptedLinear, AdaptedHead)):
            found[f"{name}.weight"] = lambda _, module=module: module.delta().detach()
        elif isinstance(module, AdaptedExperts):
            for leaf in MATRICES:
                found[f"{name}.{leaf}"] = lambda expert, module=module, leaf=leaf: module.delta(leaf, expert).detach()
    return found


@torch.no_grad()
def follow(merged: Transformer, base: Mapping[str, Tensor], model: Transformer) -> None:
    """Make the weights of an ordinary model those of its base and the adapters of `model`.

    Args:
        base: the weights that are adapted, as the ordinary model had them when it was loaded.
    """
    for name, delta in deltas(model).items():
        weight = merged.get_parameter(name)
        if weight.dim() == 3:
            for expert in range(len(weight)):
                weight[expert].copy_(base[name][expert] + delta(expert))
        else:
            weight.copy_(base[name] + delta(None))


# ---- files ----------------------------------------------------------------------------------------------------------


def save_adapters(model: Transformer, folder: Path, adaptation: Adaptation, base: str | Path) -> None:
    """Write the adapters as PEFT does: tensors by the names of transformers' modules, and how they are meant.

    PEFT applies those of attention, shared experts and head to transformers' model, `o_a_proj` excepted: its groups of heads
    need a product of their own. Adapters of routed experts and of the MTP block keep the names of this project's modules.

    Raises:
        RequestError: they could not be written.
    """
    tensors, modules = {}, set()
    for name, value in adapter_state(model).items():
        modules.add(peft_module(name, model.config))
        tensors[peft_name(name, model.config)] = value.cpu().contiguous()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": adaptation.rank,
        "lora_alpha": adaptation.scale * adaptation.rank, "lora_dropout": 0.0, "bias": "none", "use_rslora": False,
        "fan_in_fan_out": False, "inference_mode": True, "target_modules": sorted(modules),
    }  # fmt: skip
    temporary = folder / f".{WEIGHTS_FILE}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary)
        os.replace(temporary, folder / WEIGHTS_FILE)
        write_atomic(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RequestError(f"{folder} could not be written ({error.strerror or error}); free some space") from None


def read_adapters(model: Transformer, folder: Path) -> None:
    """Put what `save_adapters` wrote into a model that has such adapters.

    Raises:
        CheckpointError: there is nothing, it is damaged, or it is of other adapters.
    """
    path = folder / WEIGHTS_FILE
    try:
        held = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); it is written with every checkpoint of the run"
        ) from None
    names = {peft_name(name, model.config): name for name in adapter_state(model)}
    load_adapters(model, {names.get(name, name): value for name, value in held.items()})


def peft_module(name: str, config: ModelConfig) -> str:
    """transformers' name of the module at which an adapter of ours stands; our own for what it has no module for."""
    owner = name.rpartition(".")[0]
    if owner.startswith("mtp.") or owner.endswith(".experts"):
        return owner
    return locate(f"{owner}.weight", None, config.attention == "mla", "transformers").name.removesuffix(".weight")


def peft_name(name: str, config: ModelConfig) -> str:
    """PEFT's name of an adapter's tensor."""
    return f"base_model.model.{peft_module(name, config)}.{name.rpartition('.')[2]}.weight"
