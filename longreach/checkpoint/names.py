"""Where a tensor of ours is found in a checkpoint: the names of every published layout, both directions.

| spelling       | an attention weight                        | an expert                                       |
| ours           | layers.0.attn.wq_a.weight                  | layers.0.ffn.experts.w1 [E, f, D], slice e      |
| official       | layers.0.attn.wq_a.weight                  | layers.0.ffn.experts.{e}.w1.weight              |
| transformers   | model.layers.0.self_attn.q_a_proj.weight   | model.layers.0.mlp.experts.gate_up_proj [e, :f] |
| saved          | model.layers.0.attn.wq_a.weight            | model.layers.0.ffn.experts.{e}.w1.weight        |

"transformers" is what the modules of transformers 5.23 are called; "saved" is what its `save_pretrained` writes for a
model it made or loaded from an official checkpoint. Loaded from its own names it writes a mixture of both, so a
reader brings every name to the official form, component by component (`canonical`), and does not ask which layout it
is in. Nothing is transposed or permuted in any of them. A quantised weight `X.weight` has its scales in `X.scale`
(official, saved) or `X.weight_scale_inv` (transformers); despite the suffix the value multiplies in both. MTP tensors
keep their official names everywhere, since transformers skips what starts with `mtp.`.

transformers 5.23 pairs codes with scales expert by expert while loading, so a stacked quantised tensor would be
refused there. Quantised checkpoints in its layout therefore have `mlp.experts.{e}.w1.weight` and so on
("transformers-per-expert").

For V3.2 "official" is the published per-expert spelling of transformers' names; the names of the official inference
code, which our state dict has, are read too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Layout = Literal["official", "transformers", "transformers-per-expert", "saved"]

_V4_TRANSFORMERS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_hc.fn": "attn_hc.fn",
    "attn_hc.base": "attn_hc.base",
    "attn_hc.scale": "attn_hc.scale",
    "ffn_hc.fn": "ffn_hc.fn",
    "ffn_hc.base": "ffn_hc.base",
    "ffn_hc.scale": "ffn_hc.scale",
    "attn.wq_a": "self_attn.q_a_proj",
    "attn.q_norm": "self_attn.q_a_norm",
    "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv": "self_attn.kv_proj",
    "attn.kv_norm": "self_attn.kv_norm",
    "attn.wo_a": "self_attn.o_a_proj",
    "attn.wo_b": "self_attn.o_b_proj",
    "attn.attn_sink": "self_attn.sinks",
    "attn.compressor.wkv": "self_attn.compressor.kv_proj",
    "attn.compressor.wgate": "self_attn.compressor.gate_proj",
    "attn.compressor.norm": "self_attn.compressor.kv_norm",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.indexer.wq_b": "self_attn.compressor.indexer.q_b_proj",
    "attn.indexer.weights_proj": "self_attn.compressor.indexer.scorer.weights_proj",
    "attn.indexer.compressor.wkv": "self_attn.compressor.indexer.kv_proj",
    "attn.indexer.compressor.wgate": "self_attn.compressor.indexer.gate_proj",
    "attn.indexer.compressor.norm": "self_attn.compressor.indexer.kv_norm",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
}
_V32_TRANSFORMERS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn.wq_a": "self_attn.q_a_proj",
    "attn.q_norm": "self_attn.q_a_layernorm",
    "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv_a": "self_attn.kv_a_proj_with_mqa",
    "attn.kv_norm": "self_attn.kv_a_layernorm",
    "attn.wkv_b": "self_attn.kv_b_proj",
    "attn.wo": "self_attn.o_proj",
    "attn.indexer.wq_b": "self_attn.indexer.wq_b",
    "attn.indexer.wk": "self_attn.indexer.wk",
    "attn.indexer.k_norm": "self_attn.indexer.k_norm",
    "attn.indexer.weights_proj": "self_attn.indexer.weights_proj",
}
_FEED_FORWARD_TRANSFORMERS = {
    "ffn.gate": "mlp.gate",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.shared_experts.w1": "mlp.shared_experts.gate_proj",
    "ffn.shared_experts.w3": "mlp.shared_experts.up_proj",
    "ffn.shared_experts.w2": "mlp.shared_experts.down_proj",
    "ffn.w1": "mlp.gate_proj",
    "ffn.w3": "mlp.up_proj",
    "ffn.w2": "mlp.down_proj",
}
_CANONICAL = {
    "embed_tokens": "embed", "lm_head": "head", "self_attn": "attn", "mlp": "ffn", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "q_a_proj": "wq_a", "q_a_norm": "q_norm", "q_a_layernorm": "q_norm",
    "q_b_proj": "wq_b", "kv_proj": "wkv", "kv_a_proj_with_mqa": "wkv_a", "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "wkv_b",
    "o_a_proj": "wo_a", "o_b_proj": "wo_b", "o_proj": "wo", "sinks": "attn_sink", "position_bias": "ape",
    "e_score_correction_bias": "bias", "up_proj": "w3", "down_proj": "w2", "weight_scale_inv": "scale",
}  # fmt: skip
"""Components of transformers' names that always mean the same; the others depend on what is around them."""
_CANONICAL_STREAMS = (
    ("hc_head.hc_", "hc_head_"), ("collapse.", "hc_head_"), (".attn_hc.", ".hc_attn_"), (".ffn_hc.", ".hc_ffn_"),
)  # fmt: skip
_V32_PROJECTION = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


@dataclass(frozen=True)
class Location:
    """Where a checkpoint keeps one matrix (or vector): a tensor, or a slice of a stacked one, by its name in the file.

    `expert` indexes the tensor's first dimension; `half` then picks the first or second half of its rows. Both apply to
    the scales in the same way.
    """

    name: str
    scale_name: str
    expert: int | None = None
    half: int | None = None


def canonical(name: str) -> str:
    """The official name of a checkpoint's tensor in any spelling, or a mixture; official names are returned unchanged.

    Stacked experts, which have no official name, become `layers.i.ffn.experts.gate_up_proj` (and `..._scale`). A name
    of no known tensor comes back changed or not, and then simply matches nothing.
    """
    parts = name.removeprefix("model.").split(".")
    in_compressor = "compressor" in parts
    out: list[str] = []
    for part in parts:
        if part == "gate_proj":
            part = "wgate" if in_compressor else "w1"
        elif part == "down_proj" and out[-1:] == ["experts"]:
            pass  # stacked: not one expert's w2
        elif part == "kv_norm" and out[-1:] != ["attn"]:
            part = "norm"
        elif part == "norm" and out[-1:] == ["attn"]:
            part = "kv_norm"
        else:
            part = _CANONICAL.get(part, part)
        out.append(part)
    if "indexer" in out:
        out = _official_indexer(out)
    joined = ".".join(part for part in out if part != "scorer")
    for theirs, official in _CANONICAL_STREAMS:
        joined = joined.replace(theirs, official)
    return joined.removesuffix("_inv") if joined.endswith("_proj_scale_inv") else joined


def _official_indexer(parts: list[str]) -> list[str]:
    """transformers puts the indexer inside the compressor; officially its compressor is inside the indexer."""
    at = parts.index("indexer")
    if parts[at - 1] != "compressor":
        return parts
    inside = parts[at + 1] if at + 1 < len(parts) else ""
    own = ["compressor"] if inside in ("wkv", "wgate", "norm", "ape") else []
    return [*parts[: at - 1], "indexer", *own, *parts[at + 1 :]]


def stacked(parameter: str, names: Mapping[str, str], expert: int) -> Location | None:
    """An expert's place in transformers' stacked tensors, if a checkpoint has them.

    `names` maps the canonical names of a checkpoint's tensors to their own.
    """
    stem, projection = parameter.rsplit(".", 1)
    tensor, half = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", None)}[projection]
    name, scale = f"{stem}.{tensor}", f"{stem}.{tensor}_scale"
    return Location(names[name], names.get(scale, scale), expert, half) if name in names else None


def find(parameter: str, expert: int | None, names: Mapping[str, str]) -> Location | None:
    """Where a checkpoint keeps one of our tensors; None if it has none. Arguments as for `stacked` and `locate`."""
    official = _per_expert(_official(parameter), expert)
    if official.name in names:
        return Location(names[official.name], names.get(official.scale_name, official.scale_name))
    return None if expert is None else stacked(parameter, names, expert)


def locate(parameter: str, expert: int | None, is_mla: bool, layout: Layout) -> Location:
    """The one place where a writer of `layout` puts one of our tensors.

    Args:
        parameter: its state-dict name.
        expert: which expert, for the stacked `ffn.experts.*`; None for all others.
        is_mla: the model is V3.2.
    """
    if parameter.startswith("mtp."):
        return _per_expert(_official(parameter), expert)
    if layout == "transformers":
        return _transformers(parameter, expert, is_mla)
    if layout == "transformers-per-expert" or is_mla:
        return _unstacked(_transformers(parameter, expert, is_mla), parameter, expert, is_mla)
    if layout == "saved":
        return _per_expert(_saved(parameter), expert)
    return _per_expert(_official(parameter), expert)


def _official(parameter: str) -> str:
    name = parameter.replace("collapse.", "hc_head_")
    return name.replace(".attn_hc.", ".hc_attn_").replace(".ffn_hc.", ".hc_ffn_")


def _saved(parameter: str) -> str:
    if parameter == "head.weight":
        return parameter
    if parameter == "embed.weight":
        return "model.embed_tokens.weight"
    if parameter.startswith("collapse."):
        return parameter.replace("collapse.", "model.hc_head.hc_")
    return "model." + _official(parameter).replace(".attn.kv_norm.", ".attn.norm.")


def _per_expert(name: str, expert: int | None) -> Location:
    if expert is not None:
        stem, projection = name.rsplit(".", 1)
        name = f"{stem}.{expert}.{projection}.weight"
    return Location(name, name.removesuffix("weight") + "scale")


def _transformers(parameter: str, expert: int | None, is_mla: bool) -> Location:
    top = {
        "embed.weight": "model.embed_tokens.weight",
        "head.weight": "lm_head.weight",
        "norm.weight": "model.norm.weight",
    }
    if parameter in top:
        return Location(top[parameter], top[parameter] + "_scale_inv")
    if parameter.startswith("collapse."):
        name = parameter.replace("collapse.", "model.hc_head.hc_")
        return Location(name, name + "_scale_inv")
    _, layer, inside = parameter.split(".", 2)
    prefix = f"model.layers.{layer}."
    if expert is not None:
        stacked, half = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", None)}[inside[-2:]]
        name = f"{prefix}mlp.experts.{stacked}"
        return Location(name, name + "_scale_inv", expert, half)
    table = {**(_V32_TRANSFORMERS if is_mla else _V4_TRANSFORMERS), **_FEED_FORWARD_TRANSFORMERS}
    if inside in table:
        name = prefix + table[inside]
    else:
        stem, leaf = inside.rsplit(".", 1)
        name = f"{prefix}{table[stem]}.{leaf}"
    return Location(name, name + "_scale_inv")


def _unstacked(location: Location, parameter: str, expert: int | None, is_mla: bool) -> Location:
    """One tensor per expert under transformers' names, which for V3.2 is also how it is published."""
    if expert is None:
        return location
    stem = location.name.rsplit(".", 1)[0]
    projection = parameter.rsplit(".", 1)[1]
    name = f"{stem}.{expert}.{_V32_PROJECTION[projection] if is_mla else projection}.weight"
    return Location(name, name + "_scale_inv")


def written_layout(layout: Literal["official", "transformers"], weight_format: str) -> Layout:
    """The spelling in which a checkpoint of this layout and format is written."""
    return "transformers-per-expert" if layout == "transformers" and weight_format != "plain" else layout
