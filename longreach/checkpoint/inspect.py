"""`longreach inspect PATH`: what a checkpoint holds, from config.json and file headers; no weight is read.

    longreach inspect runs/base                              config, parameters by part, storage
    longreach inspect models/flash --against flash           is this, tensor by tensor, the released shape?
    longreach inspect flash                                  a preset, without any file

Exit code 1 when `--against` finds a difference, in the tensors or in the config.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from longreach.checkpoint.names import Layout
from longreach.checkpoint.reader import INDEX_NAME, Checkpoint, dtype_census, layout_of, read_index
from longreach.checkpoint.table import TensorSpec, tensor_table
from longreach.errors import RequestError
from longreach.model.config import PRESETS, ModelConfig
from longreach.model.config_io import model_directory, read_config
from longreach.model.count import count_parameters
from longreach.runtime import json_line

_SHOWN = 20


@dataclass(frozen=True)
class InspectOptions:
    """Say what a checkpoint (or a preset) holds, from its config and file headers."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")]
    """Run directory, checkpoint directory, a directory with just config.json and a shard index, or a preset's name."""
    against: Literal["flash", "pro"] | None = None
    """Check the config and every tensor's name, shape and storage dtype against the released model; exit code 1 if
    anything differs."""
    json: bool = False
    """Print one JSON object instead of the report."""


@dataclass(frozen=True)
class Difference:
    """One tensor that is not as expected."""

    name: str
    what: str


def main(options: InspectOptions) -> int:
    """Print the report; 1 if `--against` found a difference, else 0."""
    report = inspect(options)
    print(json_line(report) if options.json else _text(report))
    against = report.get("against", {})
    return 1 if against.get("differences") or against.get("config") else 0


def inspect(options: InspectOptions) -> dict[str, Any]:
    """The report as plain JSON values.

    Raises:
        ConfigError, CheckpointError, RequestError: nothing readable at the path.
    """
    path = Path(options.path)
    if not path.exists() and options.path in PRESETS:
        config = ModelConfig.preset(options.path)
        tensors: dict[str, TensorSpec] | None = {spec.name: spec for spec in tensor_table(config)}
        names, layout, where, stored = list(tensors), "official", f"preset {options.path}", False
    else:
        if not path.is_dir():
            raise RequestError(f"{path} is neither a checkpoint directory nor a preset ({', '.join(PRESETS)})")
        directory = model_directory(path)
        config = read_config(directory)
        tensors, names = _read_headers(directory)
        layout, where, stored = layout_of(dict.fromkeys(names, "")), str(directory), True
    report: dict[str, Any] = {"path": where, "layout": layout, "config": config.to_dict()}
    report["parameters"] = dataclasses.asdict(count_parameters(config))
    report["tensors"] = len(names)
    if tensors is not None:
        census = dtype_census(tensors)
        report["bytes"] = sum(nbytes for _, nbytes in census.values())
        report["storage"] = {dtype: {"tensors": count, "bytes": nbytes} for dtype, (count, nbytes) in census.items()}
    else:
        report["bytes"] = _total_size(Path(where))
        report["note"] = "only the index is here: names are checked, shapes and dtypes cannot be"
    report["expected_only"] = not stored
    if options.against:
        reference = ModelConfig.preset(options.against)
        report["against"] = {
            "preset": options.against,
            "config": _config_differences(config, reference),
            "differences": [
                dataclasses.asdict(d) for d in compare_headers(names, tensors, reference, layout or "official")
            ],
        }
    return report


def compare_headers(
    names: list[str], tensors: dict[str, TensorSpec] | None, reference: ModelConfig, layout: Layout
) -> list[Difference]:
    """Every tensor that is missing, unexpected, or of another shape or storage dtype than `reference`'s checkpoint.

    `tensors` None (only an index is at hand) compares names alone.
    """
    expected = {spec.name: spec for spec in tensor_table(reference, layout)}
    present = set(names)
    differences = []
    for name, spec in expected.items():
        if name not in present:
            differences.append(Difference(name, "missing"))
        elif tensors is not None:
            found = tensors[name]
            if found.shape != spec.shape:
                differences.append(Difference(name, f"shape {list(found.shape)}, expected {list(spec.shape)}"))
            if found.dtype != spec.dtype:
                differences.append(Difference(name, f"dtype {found.dtype}, expected {spec.dtype}"))
    differences += [Difference(name, "unexpected") for name in names if name not in expected]
    return differences


def _config_differences(config: ModelConfig, reference: ModelConfig) -> list[str]:
    """Fields whose value is another than the reference's, except the two that say how this program computes."""
    found, wanted = config.to_dict(), reference.to_dict()
    names = [name for name in found if name not in ("numerics", "arithmetic") and found[name] != wanted[name]]
    return [f"{name}={found[name]!r}, expected {wanted[name]!r}" for name in names]


def _read_headers(directory: Path) -> tuple[dict[str, TensorSpec] | None, list[str]]:
    indexed = read_index(directory)
    if indexed is not None and not any((directory / file).exists() for file in indexed.values()):
        return None, list(indexed)
    with Checkpoint.open(directory) as checkpoint:
        return checkpoint.tensors, list(checkpoint.tensors)


def _total_size(directory: Path) -> int | None:
    try:
        return int(json.loads((directory / INDEX_NAME).read_text(encoding="utf-8"))["metadata"]["total_size"])
    except (KeyError, TypeError, ValueError):
        return None


def _text(report: dict[str, Any]) -> str:
    config, parameters = report["config"], report["parameters"]
    layout = {None: "unknown", "saved": "transformers' own"}.get(report["layout"], report["layout"])
    lines = [f"{report['path']}: {layout} layout, weights {config['weight_format']}"]
    lines += ["", *_config_lines(config), ""]
    lines.append(f"{'parameters':<22}{'total':>20}{'active per token':>22}")
    for part, count in parameters["by_part"].items():
        active = parameters["active_by_part"].get(part)
        lines.append(f"  {part:<20}{count:>20,}" + (f"{active:>22,}" if active is not None else f"{'one row':>22}"))
    lines.append(f"  {'all':<20}{parameters['total']:>20,}{parameters['active']:>22,}")
    if parameters["mtp"]:
        lines.append(f"  {'MTP block, besides':<20}{parameters['mtp']:>20,}")
    kind = "storage, if written" if report["expected_only"] else "storage"
    lines += ["", f"{kind:<22}{'tensors':>20}{'bytes':>22}"]
    for dtype, entry in report.get("storage", {}).items():
        lines.append(f"  {dtype:<20}{entry['tensors']:>20,}{entry['bytes']:>22,}")
    nbytes = f"{report['bytes']:>22,}" if report["bytes"] is not None else f"{'unknown':>22}"
    lines.append(f"  {'all':<20}{report['tensors']:>20,}{nbytes}")
    if "note" in report:
        lines += ["", report["note"]]
    if "against" in report:
        lines += ["", *_against_lines(report["against"], report["tensors"], "note" in report)]
    return "\n".join(lines)


def _config_lines(config: dict[str, Any]) -> list[str]:
    c = ModelConfig(**config)
    kinds = [c.layer_kind(i) for i in range(c.num_hidden_layers)]
    schedule = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    rows = [
        f"{c.num_hidden_layers} layers of width {c.hidden_size} ({schedule}), vocabulary {c.vocab_size:,}",
        f"{c.num_attention_heads} heads of {c.head_dim} ({c.qk_rope_head_dim} rotary), window {c.sliding_window}, "
        f"context {c.max_position_embeddings:,}",
    ]
    if c.index_topk:
        rows.append(f"indexer: {c.index_n_heads} heads of {c.index_head_dim}, top {c.index_topk}")
    if c.feed_forward == "moe":
        rows.append(
            f"{c.n_routed_experts} experts of width {c.moe_intermediate_size}, {c.num_experts_per_tok} per token and "
            f"{c.n_shared_experts} shared; {c.num_hash_layers} hash-routed layers"
        )
    streams = f"{c.hc_mult} streams" if c.has_streams else "one stream"
    rows.append(f"residual {c.residual} ({streams}), attention {c.attention}, numerics {c.numerics}")
    return [f"  {row}" for row in rows]


def _against_lines(against: dict[str, Any], tensors: int, names_only: bool) -> list[str]:
    lines = [f"config differs: {line}" for line in against["config"]]
    differences = against["differences"]
    if not differences:
        what = "names are" if names_only else "names, shapes and dtypes are"
        return [*lines, f"{tensors:,} tensors, all {what} those of {against['preset']}"]
    lines.append(f"{len(differences):,} differences from {against['preset']}:")
    lines += [f"  {d['name']}: {d['what']}" for d in differences[:_SHOWN]]
    if len(differences) > _SHOWN:
        lines.append(f"  and {len(differences) - _SHOWN:,} more; --json lists all")
    return lines
