"""Which parameter is trained by what: the table, and the groups it makes of a model.

Muon takes what is a matrix between two hidden states. AdamW keeps what is a table (a row per token or position, of which
a batch touches some), what is a vector, and the head. Source: DeepSeek-V4 report, sections 2.4 and 4.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from longreach.errors import RequestError

Kind = Literal["muon", "adamw"]


class Role(NamedTuple):
    """What a parameter is for, and what trains it."""

    name: str
    optimizer: Kind
    pattern: str
    """Of the whole parameter name; `#` stands for a layer, main or MTP."""


ROLES = (
    Role("embedding", "adamw", r"embed\.weight"),
    Role("head", "adamw", r"head\.weight"),
    Role("norms", "adamw", r"(.*\.)?\w*norm\.(weight|bias)"),
    Role("mHC biases", "adamw", r"(#\.)?(attn_hc|ffn_hc|collapse)\.base"),
    Role("mHC gates", "adamw", r"(#\.)?(attn_hc|ffn_hc|collapse)\.scale"),
    # The report does not name the next two. They are a vector and a table of positions, so AdamW's by its own logic.
    Role("attention sinks", "adamw", r"#\.attn\.attn_sink"),
    Role("position biases", "adamw", r"#\.attn\.(indexer\.)?compressor\.ape"),
    Role("attention", "muon", r"#\.attn\.w\w+\.weight"),
    Role("compressor", "muon", r"#\.attn\.compressor\.w\w+\.weight"),
    Role("indexer", "muon", r"#\.attn\.indexer\.(compressor\.)?w\w+\.weight"),
    Role("router", "muon", r"#\.ffn\.gate\.weight"),
    Role("experts", "muon", r"#\.ffn\.experts\.w[123]"),
    Role("shared experts", "muon", r"#\.ffn\.shared_experts\.w[123]\.weight"),
    Role("feed-forward", "muon", r"#\.ffn\.w[123]\.weight"),
    Role("mHC matrices", "muon", r"(#\.)?(attn_hc|ffn_hc|collapse)\.fn"),
    Role("MTP projections", "muon", r"#\.[eh]_proj\.weight"),
    # Of low rank by design: Muon would even out the few directions that an adapter has.
    Role("adapters", "adamw", r"(.*\.)?(w\d_)?lora_[AB]"),
)
"""Every parameter of a Longreach model matches exactly one. The router's balancing bias is a buffer, moved by the trainer."""

# One weight decay for all. The report gives AdamW a single one and lists norms, mHC biases and gates under it, although
# many recipes spare vectors. Sinks and position biases follow: both start at 0, which is where decay pulls them.


def role_of(name: str) -> Role:
    """The role of a Longreach model's parameter.

    Raises:
        RequestError: it has none.
    """
    for role in ROLES:
        if re.fullmatch(role.pattern.replace("#", r"(layers|mtp)\.\d+"), name):
            return role
    raise RequestError(f"parameter {name} has no role; add a row for it to ROLES in longreach/optim/groups.py")


def parameter_groups(model: nn.Module, adamw: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The trainable parameters of a model by role, each in exactly one group.

    A Longreach model goes by `ROLES`. Of any other model, 2-D weights go to Muon, except those of `nn.Embedding` and the
    head, which is taken to be the last 2-D weight in order of registration; everything else goes to AdamW.

    Args:
        model: may be compiled or wrapped by DistributedDataParallel.
        adamw: name patterns (`*` matches anything) of parameters that AdamW is to have as well: learned positions, a head
            registered early, or an experiment.

    Returns:
        Groups with `role`, `optimizer` ("muon" or "adamw") and `params`, a list of (name, parameter); in the order of
        `ROLES`.

    Raises:
        RequestError: a parameter without a role, a pattern that matches nothing, or nothing to train.
    """
    model = _unwrapped(model)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise RequestError(f"{type(model).__name__} has no trainable parameters")
    for pattern in adamw:
        if not any(fnmatchcase(name, pattern) for name, _ in trainable):
            raise RequestError(f"adamw={pattern!r} matches no parameter; the first is named {trainable[0][0]}")
    generic = None if _is_longreach(model) else _generic_roles(model)
    groups: dict[tuple[str, Kind], dict[str, Any]] = {}
    for name, p in trainable:
        role, optimizer = role_of(name)[:2] if generic is None else generic[name]
        if any(fnmatchcase(name, pattern) for pattern in adamw):
            optimizer = "adamw"
        group = groups.setdefault((role, optimizer), {"role": role, "optimizer": optimizer, "params": []})
        group["params"].append((name, p))
    order = {role.name: position for position, role in enumerate(ROLES)}
    return sorted(groups.values(), key=lambda group: order.get(group["role"], len(order)))


def describe(groups: Iterable[dict[str, Any]]) -> str:
    """A table of groups (of `parameter_groups` or of an optimizer made from them), one line each and a total."""
    rows = [["role", "optimizer", "tensors", "matrices", "parameters"]]
    total = [0, 0, 0]
    for group in groups:
        params = [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]
        matrices = sum(_matrices(p) for p in params) if group["optimizer"] == "muon" else 0
        counts = [len(params), matrices, sum(p.numel() for p in params)]
        total = [a + b for a, b in zip(total, counts, strict=True)]
        rows.append([group["role"], group["optimizer"], *(f"{n:,}" if n else "-" for n in counts)])
    rows.append(["total", "", *(f"{n:,}" for n in total)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _matrices(p: Tensor) -> int:
    return p.shape[0] if p.dim() == 3 else 1


def _unwrapped(model: nn.Module) -> nn.Module:
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = cast(nn.Module, model.module if isinstance(model, DistributedDataParallel) else model._orig_mod)
    return model


def _is_longreach(model: nn.Module) -> bool:
    # by name: the optimizers know torch only, and stay usable without the model
    return any(base.__module__ == "longreach.model.transformer" for base in type(model).__mro__)


def _generic_roles(model: nn.Module) -> dict[str, tuple[str, Kind]]:
    tables = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    # with duplicates: a head tied to the embedding is the last matrix too, and then no other is taken for it
    matrices = [p for _, p in model.named_parameters(remove_duplicate=False) if p.dim() == 2]
    head = id(matrices[-1]) if matrices else None
    roles: dict[str, tuple[str, Kind]] = {}
    for name, p in model.named_parameters():
        if id(p) in tables:
            roles[name] = "embedding", "adamw"
        elif id(p) == head:
            roles[name] = "head", "adamw"
        elif p.dim() == 2:
            roles[name] = "matrices", "muon"
        else:
            roles[name] = "vectors and others", "adamw"
    return roles
