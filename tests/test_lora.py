"""Adapters: they begin as nothing, learn alone, count what they should, merge into what they compute, and go on after a kill."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_frozen import FORMATS, codes_of, kept_bytes, saved, small, small_v32, some_tokens
from test_sft import Doubling, use_small_things, weights_of

from longreach.checkpoint import convert
from longreach.checkpoint.frozen import load_frozen
from longreach.checkpoint.load import load_model
from longreach.checkpoint.merge import write_merged
from longreach.checkpoint.reader import Checkpoint
from longreach.checkpoint.table import tensor_table
from longreach.errors import CheckpointError, RequestError
from longreach.journey.lora_slice import LoraBenchOptions, slice_config
from longreach.journey.lora_slice import main as bench
from longreach.model.config import ModelConfig
from longreach.model.frozen import FrozenLinear
from longreach.model.layers import Linear
from longreach.model.transformer import Transformer
from longreach.optim.groups import parameter_groups
from longreach.rundir import RunDirectory
from longreach.tasks.base import RIGHT, wrong
from longreach.train import distill, grpo, merge, sft, state, tuning
from longreach.train.distill_options import DistillOptions
from longreach.train.grpo_options import GRPOOptions
from longreach.train.lora import (
    TARGETS,
    Adaptation,
    AdaptedLinear,
    adapt,
    adapter_state,
    deltas,
    follow,
    load_adapters,
    read_adapters,
    save_adapters,
)
from longreach.train.sft import SFTOptions

EVERYTHING = tuple(TARGETS)


def smooth(**changes: Any) -> ModelConfig:
    """Without the roundings of the released code, whose steps make any two ways of adding differ."""
    return small(numerics="transformers", **changes)


def adapted(
    path: Path, targets: tuple[str, ...] = EVERYTHING, rank: int = 3, filled: bool = True, **load: Any
) -> Transformer:
    """A frozen model with adapters; `filled` ones say something."""
    model = adapt(load_frozen(path, **load), Adaptation(rank, targets=targets), seed=1)
    if filled:
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for name, value in adapter_state(model).items():
                if name.endswith("lora_B"):
                    value.copy_(0.05 * torch.randn(value.shape, generator=generator))
    return model


def merged_by_hand(path: Path, model: Transformer) -> Transformer:
    """The ordinary model of a base with each delta added to its weight."""
    plain = load_model(path, dtype=torch.float32)
    with torch.no_grad():
        for name, delta in deltas(model).items():
            weight = plain.get_parameter(name)
            if weight.dim() == 3:
                weight += torch.stack([delta(expert) for expert in range(len(weight))])
            else:
                weight += delta(None)
    return plain


# ---- what adapters compute ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_format", FORMATS)
def test_new_adapters_change_nothing(tmp_path, weight_format):
    path = saved(tmp_path, smooth(), weight_format)
    tokens = some_tokens(smooth())
    model = adapted(path, filled=False)
    torch.testing.assert_close(model(tokens), load_frozen(path)(tokens), rtol=0, atol=1e-5)
    assert all(bool(value.any()) == name.endswith("lora_A") for name, value in adapter_state(model).items())


def test_an_adapter_adds_alpha_over_rank_times_b_a_x():
    base = Linear(3, 2)
    layer = AdaptedLinear(base, rank=1, scale=Adaptation(1, alpha=4.0).scale)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]]))
        layer.lora_A.copy_(torch.tensor([[1.0, 1.0, 0.0]]))
        layer.lora_B.copy_(torch.tensor([[0.5], [-1.0]]))
    x = torch.tensor([[1.0, 2.0, 3.0]])
    # W x = (7, 2); A x = 3; 4 B A x = (6, -12)
    torch.testing.assert_close(layer(x), torch.tensor([[13.0, -10.0]]))
    torch.testing.assert_close(x @ layer.weight.t(), torch.tensor([[13.0, -10.0]]))


@pytest.mark.parametrize("kind", ["plain", "fp8", "fp4"])
def test_an_adapter_reads_the_rounded_input_that_its_frozen_matrix_reads(kind):
    codes = codes_of(torch.randn(96, 160), kind)
    layer = AdaptedLinear(FrozenLinear(codes, torch.float32, rounds_input=True), rank=2, scale=2.0)
    merged = Linear(160, 96, rounds_input=True)
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
        merged.weight.copy_(codes.decode(torch.float32) + 2 * layer.lora_B @ layer.lora_A)
    x = torch.randn(5, 160)
    torch.testing.assert_close(layer(x), merged(x), rtol=1e-4, atol=1e-4)
    assert (layer(x) - x @ merged.weight.t()).abs().max() > 0.1


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_model_with_adapters_gives_the_logits_of_the_merged_weights(tmp_path, weight_format):
    path = saved(tmp_path, smooth(), weight_format)
    tokens = some_tokens(smooth())
    model = adapted(path)
    merged = merged_by_hand(path, model)
    assert (merged(tokens) - load_frozen(path)(tokens)).abs().max() > 0.01
    torch.testing.assert_close(model(tokens), merged(tokens), rtol=0, atol=1e-5)
    expected, got = (m.features(tokens, keep=("mtp",)).mtp for m in (merged, model))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_adapters_serve_v32_with_its_dense_layer_too(tmp_path):
    path = saved(tmp_path, small_v32(), "fp8")
    model, tokens = adapted(path), some_tokens(small_v32())
    assert {"layers.0.ffn.w2.weight", "layers.0.attn.wkv_b.weight", "layers.1.ffn.experts.w3"} <= deltas(model).keys()
    torch.testing.assert_close(model(tokens), merged_by_hand(path, model)(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_gradients_of_adapters_are_those_of_the_merged_weights_times_the_other_factor(tmp_path, weight_format):
    path = saved(tmp_path, smooth(), weight_format)
    tokens = some_tokens(smooth())
    model = adapted(path)
    merged = merged_by_hand(path, model)
    for either in (model, merged):
        features = either.features(tokens, keep=("mtp",))
        (either.head(features.hidden).logsumexp(-1).sum() + features.mtp.square().sum()).backward()
    state = dict(model.named_parameters())
    scale, checked = 2.0, 0
    for name in deltas(model):
        full = merged.get_parameter(name).grad
        stem = name.removesuffix("weight") if full.dim() == 2 else name + "_"
        a, b = state[stem + "lora_A"], state[stem + "lora_B"]
        for mine, wanted in ((a.grad, scale * b.mT @ full), (b.grad, scale * full @ a.mT)):
            torch.testing.assert_close(mine, wanted, rtol=2e-3, atol=2e-4 * max(1.0, wanted.abs().max().item()))
            checked += 1
    assert checked == len(adapter_state(model))


def test_adapters_and_nothing_else_learn_and_adamw_trains_them(tmp_path):
    model = adapted(saved(tmp_path, small(), "fp8-fp4"))
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == set(adapter_state(model))
    (group,) = parameter_groups(model)
    assert (group["role"], group["optimizer"]) == ("adapters", "adamw")
    assert {p.dtype for p in adapter_state(model).values()} == {torch.float32}


def test_targets_decide_where_adapters_stand(tmp_path):
    path = saved(tmp_path, small(), "plain")
    found = {target: set(deltas(adapted(path, (target,)))) for target in TARGETS}
    assert {name.split(".", 2)[2] for name in found["attention"]} == {
        f"attn.{w}.weight" for w in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")
    }
    assert {name.split(".", 2)[2] for name in found["shared"]} == {f"ffn.shared_experts.w{n}.weight" for n in (1, 2, 3)}
    assert {name.split(".", 2)[2] for name in found["experts"]} == {f"ffn.experts.w{n}" for n in (1, 2, 3)}
    assert found["head"] == {"head.weight"}
    assert set(deltas(adapted(path, Adaptation(3).targets))) == found["attention"] | found["shared"]


def test_a_step_keeps_no_decoded_matrix(tmp_path):
    """What a model keeps for the way back does not grow by its frozen weights: with a hundred times the experts' bytes the
    same tokens keep the same, but for their own activations."""
    kept = {}
    for width in (48, 4800):
        path = saved(tmp_path / str(width), small(moe_intermediate_size=width, num_experts_per_tok=1), "fp8-fp4")
        model = adapted(path, ("attention",))
        experts = sum(c.shape[0] * c.shape[1] for c in model.get_submodule("layers.1.ffn.experts").w1.experts)
        kept[width] = (
            kept_bytes(lambda model=model: model.features(some_tokens(small(), 4, 1)).hidden.sum()),
            4 * experts,
        )
    # gate and up of 4 tokens in 3 layers of routed and shared experts are all that may grow
    grown, activations = kept[4800][0] - kept[48][0], 3 * 4 * 4 * (4800 - 48) * 6
    assert grown <= activations < 0.5 * kept[4800][1]


def test_bfloat16_computes_in_bfloat16_with_adapters_in_float32(tmp_path):
    model = adapted(saved(tmp_path, small(), "fp8-fp4"), dtype=torch.bfloat16)
    hidden = model.features(some_tokens(small())).hidden
    hidden.float().square().sum().backward()
    assert hidden.dtype == torch.bfloat16
    learning = [p for name, p in model.named_parameters() if re.match(r"layers.1.attn.*lora", name)]
    assert len(learning) == 10 and all(p.grad is not None and p.grad.dtype == torch.float32 for p in learning)


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("layout", ["official", "transformers"])
def test_a_merged_checkpoint_computes_what_base_and_adapters_compute(tmp_path, weight_format, layout):
    config = smooth(num_nextn_predict_layers=0, compress_ratios=(0, 4, 8))
    path = saved(tmp_path, config, weight_format, layout)
    tokens, model = some_tokens(config), adapted(path)
    merged = load_model(write_merged(path, tmp_path / "merged", deltas(model)), dtype=torch.float32)
    error = (merged(tokens) - model(tokens)).abs().mean()
    change = (load_frozen(path)(tokens) - model(tokens)).abs().mean()
    # in BF16 a matrix keeps 8 bits of each weight, and the change is a small part of it
    assert error < (1e-5 if weight_format == "plain" else 0.1 * change)


def test_merging_leaves_every_other_matrix_as_it_is_stored(tmp_path):
    path = saved(tmp_path, small(), "fp8-fp4")
    made = write_merged(path, tmp_path / "merged", deltas(adapted(path, ("attention",))))
    with Checkpoint.open(path) as before, Checkpoint.open(made) as after:
        base = {stored.unit.label: stored for stored in before.match(small())}
        for stored in after.match(small()):
            is_adapted = ".attn.w" in stored.unit.label
            assert stored.encoding == ("plain" if is_adapted else base[stored.unit.label].encoding)
            if not is_adapted:
                for mine, theirs in zip(after.read_raw(stored), before.read_raw(base[stored.unit.label]), strict=True):
                    assert (mine is None and theirs is None) or torch.equal(
                        mine.view(torch.uint8), theirs.view(torch.uint8)
                    )


@pytest.mark.parametrize("to", ["official", "transformers"])
@pytest.mark.parametrize("quantize", ["fp8-fp4", "plain"])
def test_a_merged_checkpoint_converts_to_both_layouts(tmp_path, to, quantize):
    config = small(num_nextn_predict_layers=0, compress_ratios=(0, 4, 8))
    path = saved(tmp_path, config, "fp8-fp4")
    made = write_merged(path, tmp_path / "merged", deltas(adapted(path)))
    options = convert.ConvertOptions(source=made, destination=tmp_path / "out", to=to, quantize=quantize)
    assert convert.main(options) == 0
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        encodings = {s.encoding for s in checkpoint.match(config) if s.unit.parameter.kind in ("linear", "expert")}
    assert encodings == ({"plain"} if quantize == "plain" else {"fp8", "fp4"})


def test_adapters_are_saved_by_peft_names_and_come_back_exactly(tmp_path):
    path = saved(tmp_path, small(), "fp8-fp4")
    model, other = adapted(path), adapted(path, filled=False)
    save_adapters(model, tmp_path / "adapters", Adaptation(3, targets=EVERYTHING), path)
    read_adapters(other, tmp_path / "adapters")
    assert all(torch.equal(value, adapter_state(other)[name]) for name, value in adapter_state(model).items())
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 6.0)
    assert "model.layers.1.self_attn.q_a_proj" in config["target_modules"] and "lm_head" in config["target_modules"]


def test_the_names_in_the_file_are_those_of_transformers_modules_and_their_product_is_what_those_lack(tmp_path):
    """transformers' model, each named module's weight moved by alpha / r B A as PEFT merges, gives this model's logits."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    config = small(num_nextn_predict_layers=0, compress_ratios=(0, 4, 8), numerics="transformers", head_dim=32)
    path = saved(tmp_path, config, "plain", "transformers")
    model = adapted(path, ("attention", "shared", "head"))
    save_adapters(model, tmp_path / "adapters", Adaptation(3), path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tensors = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    told = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    tokens = some_tokens(config, 24, 1)
    with torch.no_grad():
        before = peer(tokens).logits
        for module in told["target_modules"]:
            a, b = (tensors[f"base_model.model.{module}.lora_{leaf}.weight"] for leaf in "AB")
            peer.get_submodule(module).weight += told["lora_alpha"] / told["r"] * b @ a
        after = peer(tokens).logits
        ours = model(tokens)
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(ours, after, rtol=0, atol=2e-4)


def test_adapters_of_another_rank_are_refused(tmp_path):
    path = saved(tmp_path, small(), "plain")
    with pytest.raises(CheckpointError, match="do not fit this model and these options"):
        load_adapters(adapted(path, rank=2), adapter_state(adapted(path)))
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_adapters(adapted(path), tmp_path / "nowhere")


def test_a_merged_copy_follows_the_adapters(tmp_path):
    path = saved(tmp_path, smooth(), "fp8-fp4")
    model, tokens = adapted(path), some_tokens(smooth(), rows=1)
    copy = load_model(path, dtype=torch.float32, arithmetic="invariant")
    copy.requires_grad_(False)
    base = {name: copy.get_parameter(name).clone() for name in deltas(model)}
    for factor in (1.0, -0.5):
        load_adapters(model, {name: factor * value for name, value in adapter_state(model).items()})
        follow(copy, base, model)
        torch.testing.assert_close(copy(tokens), model(tokens), rtol=0, atol=1e-4)


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a small model that has begun to learn."""
    use_small_things(monkeypatch)
    given = options(tmp_path / "base", preset="micro", vocab=420, steps=4)
    assert sft.main(given) == 0
    return tmp_path / "base"


def options(folder: Path, **given: Any) -> SFTOptions:
    fields: dict[str, Any] = dict(
        out=folder, task=("doubling",), batch_tokens=120, threads=1, device="cpu", checkpoint_every=3, eval_every=4
    )
    return SFTOptions(**(fields | given))


def lora(folder: Path, base: Path, **given: Any) -> SFTOptions:
    return options(folder, run=base, **({"lora": 4, "steps": 6} | given))


def changed_weights(run: Path, base: Path) -> set[str]:
    ours, theirs = weights_of(run), weights_of(base)
    assert ours.keys() == theirs.keys()
    return {name for name, weight in ours.items() if not torch.equal(weight, theirs[name])}


def test_a_run_with_adapters_leaves_an_ordinary_model_in_which_only_the_targets_changed(tmp_path, base):
    assert sft.main(lora(tmp_path / "run", base)) == 0
    changed = changed_weights(tmp_path / "run", base)
    assert changed and all(".attn.w" in name or ".shared_experts.w" in name for name in changed)
    saved_state = state.newest_state(RunDirectory(tmp_path / "run").state_dir)
    assert all(name.endswith(("lora_A", "lora_B")) for name in saved_state["model"])
    assert (tmp_path / "run" / "adapters" / "adapter_model.safetensors").is_file()
    assert RunDirectory(tmp_path / "run").read_config()["lora_merge"] == "always"


def test_adapters_learn(tmp_path, base):
    assert (
        sft.main(
            lora(tmp_path / "run", base, steps=60, lr=0.005, checkpoint_every=100, eval_every=100, batch_tokens=480)
        )
        == 0
    )
    losses = [r["loss"] for r in RunDirectory(tmp_path / "run").read_metrics() if "loss" in r]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_a_run_with_adapters_that_was_stopped_goes_on_to_the_same_bits(tmp_path, base):
    assert sft.main(lora(tmp_path / "whole", base, steps=6)) == 0
    assert sft.main(lora(tmp_path / "parts", base, steps=6)) == 0
    # as a kill after step 3 leaves it: the state of step 3 is the newest
    folder = RunDirectory(tmp_path / "parts").state_dir
    for step, file in state.state_files(folder):
        if step > 3:
            file.unlink()
    assert sft.main(SFTOptions(out=tmp_path / "parts", resume=True, device="cpu")) == 0
    for name in ("whole", "parts"):
        assert state.newest_state(RunDirectory(tmp_path / name).state_dir)["step"] == 6
    mine, theirs = (state.newest_state(RunDirectory(tmp_path / n).state_dir)["model"] for n in ("parts", "whole"))
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert not changed_weights(tmp_path / "parts", tmp_path / "whole")


def test_routers_keep_their_biases_beside_adapters(tmp_path, base):
    assert sft.main(lora(tmp_path / "run", base)) == 0
    ours, theirs = weights_of(tmp_path / "run"), weights_of(base)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if ".gate." in name)


def test_a_quantised_base_keeps_its_codes_and_its_run_only_adapters_until_it_is_merged(tmp_path, base, capsys):
    quantised = tmp_path / "quantised"
    assert (
        convert.main(convert.ConvertOptions(source=base, destination=quantised, to="official", quantize="fp8-fp4")) == 0
    )
    given = lora(tmp_path / "run", quantised, lora_merge="never", lora_targets=(("attention",), ("head",)))
    assert sft.main(given) == 0
    assert f"next: longreach merge {tmp_path / 'run'}" in capsys.readouterr().out
    run = RunDirectory(tmp_path / "run")
    assert not run.model_dir.exists()
    newest = state.state_files(run.state_dir)[-1][1]
    assert newest.stat().st_size < 0.5 * tuning.weight_bytes(base / "model")
    assert merge.main(merge.MergeOptions(run=run.path, json=True)) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["matrices"] == 5 * 3 + 1
    with Checkpoint.open(run.model_dir) as checkpoint:
        formats = {s.unit.label: s.encoding for s in checkpoint.match(load_model(run.path).config)}
    assert formats["layers.1.ffn.experts.w1[0]"] == "fp4" and formats["layers.1.attn.wq_a.weight"] == "plain"
    assert merge.main(merge.MergeOptions(run=run.path, out=tmp_path / "other")) == 0
    mine, theirs = (load_model(path).state_dict() for path in (run.model_dir, tmp_path / "other"))
    assert all(torch.equal(weight, theirs[name]) for name, weight in mine.items())


def test_a_run_without_adapters_has_nothing_to_merge(base):
    with pytest.raises(RequestError, match="is no run with --lora"):
        merge.main(merge.MergeOptions(run=base))


@pytest.mark.parametrize(("given", "said"), [
    ({"lora": 0}, "the rank must be at least 1"),
    ({"lora_alpha": -1.0}, "--lora-alpha -1 must be above 0"),
    ({"lora_targets": (("attention", "norms"),)}, "'norms' is none of attention, shared, experts, head"),
    ({"qat": "fp8"}, "--qat fp8 trains the weights that are stored"),
    ({"optimizer": "muon"}, "adapters are trained by AdamW"),
    ({"bias_speed": 0.1}, "--bias-speed moves routers"),
    ({"lora": None, "lora_alpha": 4.0}, "--lora-alpha is about adapters; give --lora RANK"),
    ({"lora": None, "lora_targets": (("head",),)}, "--lora-targets is about adapters"),
])  # fmt: skip
def test_options_that_make_no_sense_are_refused_before_anything_is_written(tmp_path, base, given, said):
    with pytest.raises(RequestError, match=said):
        sft.main(lora(tmp_path / "run", base, **given))
    assert not (tmp_path / "run").exists()


def test_a_new_model_has_nothing_to_adapt(tmp_path, monkeypatch):
    use_small_things(monkeypatch)
    with pytest.raises(RequestError, match="with --preset there are none"):
        sft.main(options(tmp_path / "run", preset="micro", vocab=420, lora=4, steps=2))


def test_a_target_that_the_model_lacks_is_refused(tmp_path):
    config = small(feed_forward="dense", intermediate_size=48, num_hash_layers=0)
    with pytest.raises(RequestError, match="--lora-targets experts: this model has none"):
        adapted(saved(tmp_path, config, "plain"))


def test_a_resumed_run_keeps_its_rank(tmp_path, base):
    assert sft.main(lora(tmp_path / "run", base, steps=3)) == 0
    with pytest.raises(RequestError, match="--lora 2 differs from this run's 4"):
        sft.main(SFTOptions(out=tmp_path / "run", resume=True, device="cpu", lora=2))


# ---- rewards and teachers -------------------------------------------------------------------------------------------


def few(**given: Any) -> dict[str, Any]:
    """A few short attempts at the task."""
    return dict(
        task=(("doubling",),), problems=3, modes=(("non-think",),), windows="24", steps=2, eval_count=0,
        threads=1, device="cpu", lora=4, lr=0.01,
    ) | given  # fmt: skip


def test_rewards_teach_adapters_and_attempts_come_from_the_merged_weights(tmp_path, base, monkeypatch):
    monkeypatch.setattr(
        Doubling, "verify", lambda self, problem, reply: RIGHT if len(str(reply)) % 2 else wrong("even")
    )
    given = GRPOOptions(run=base, out=tmp_path / "rl", group_size=4, **few(updates=2, steps=3))
    assert grpo.main(given) == 0
    changed = changed_weights(tmp_path / "rl", base)
    assert changed and all(".attn.w" in name or ".shared_experts.w" in name for name in changed)
    gaps = [r["logprob_gap"] for r in RunDirectory(tmp_path / "rl").read_metrics() if r.get("logprob_gap") is not None]
    assert gaps and max(gaps) < 1e-4  # what drew and what learns are one policy, after updates as before


def test_a_teacher_teaches_adapters(tmp_path, base):
    assert sft.main(lora(tmp_path / "teacher", base, lr=0.01)) == 0
    given = DistillOptions(run=base, out=tmp_path / "student", teacher=(f"doubling={tmp_path / 'teacher'}",), **few())
    assert distill.main(given) == 0
    changed = changed_weights(tmp_path / "student", base)
    assert changed and all(".attn.w" in name or ".shared_experts.w" in name for name in changed)


def test_attempts_of_a_model_too_large_to_merge_are_refused_in_one_line(tmp_path, base, monkeypatch):
    monkeypatch.setattr(tuning, "LARGEST_MERGED", 1000)
    with pytest.raises(RequestError, match="drawn from a merged copy in float32, which would take"):
        grpo.main(GRPOOptions(run=base, out=tmp_path / "rl", group_size=4, **few()))


# ---- the slice ------------------------------------------------------------------------------------------------------


def test_the_bench_trains_adapters_on_a_slice_and_leaves_nothing_behind(tmp_path, capsys):
    given = LoraBenchOptions(preset="tiny", tokens=48, steps=3, threads=1, folder=tmp_path, json=True, lr=0.01)
    assert bench(given) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    losses = told["losses"]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert 0 < told["anonymous_bytes"] <= told["peak_bytes"] and told["learning"] < 0.05 * told["parameters"]
    assert not list(tmp_path.iterdir())


def test_the_slice_of_flash_has_its_width_experts_and_formats():
    config = slice_config("flash", 2)
    assert (config.layer_kind(0), config.layer_kind(1)) == ("csa", "hca")
    whole = ModelConfig.preset("flash")
    for name in (
        "hidden_size",
        "num_attention_heads",
        "n_routed_experts",
        "num_experts_per_tok",
        "vocab_size",
        "weight_format",
    ):
        assert getattr(config, name) == getattr(whole, name)
    assert sum(spec.nbytes for spec in tensor_table(config)) == pytest.approx(9.28e9, rel=0.01)


def test_a_shape_without_both_kinds_of_layer_has_no_slice():
    with pytest.raises(RequestError, match="--preset v32 has no CSA and HCA layers"):
        slice_config("v32", 2)


@pytest.mark.slow
def test_two_layers_of_flash_at_full_width_are_tuned_within_12_gib(tmp_path, capsys):
    """Takes five to ten minutes, 9.3 GB of disk and 10.6 GiB of memory."""
    assert bench(LoraBenchOptions(steps=2, folder=tmp_path, json=True)) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert told["peak_bytes"] <= 12 * 2**30 and told["losses"][-1] < told["losses"][0]
