"""Averaging the weights of models that were trained on from one start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from serving import make_tokenizer

from longreach.checkpoint.load import load_model
from longreach.checkpoint.save import save_model
from longreach.errors import RequestError
from longreach.model.config import ModelConfig
from longreach.model.transformer import Transformer
from longreach.tokenizer.bpe import Tokenizer
from longreach.train.average import AverageOptions, averaged, main, read_shares

TOKENIZER = make_tokenizer()
CONFIG = ModelConfig.preset("micro").replace(vocab_size=TOKENIZER.vocab_size)


def saved(folder: Path, change: float = 0.0, seed: int = 1, config: ModelConfig = CONFIG, tokenizer=TOKENIZER) -> Path:
    """A run whose floating-point weights are those of `seed`, moved by `change` times noise; tables stay."""
    model = Transformer(config, seed=seed)
    made = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.dtype.is_floating_point:
                value.add_(torch.randn(value.shape, generator=made), alpha=change)
    return save_model(model, folder / "model", tokenizer=tokenizer).parent


def state(path: Path) -> dict[str, torch.Tensor]:
    return load_model(path, dtype=torch.float32).state_dict()


@pytest.mark.parametrize("weights", [None, "0.2,0.3,0.5"])
def test_the_average_of_one_model_with_itself_is_that_model_bit_for_bit(tmp_path, weights):
    run = saved(tmp_path / "one", change=0.1)
    assert main(AverageOptions(runs=(run, run, run), out=tmp_path / "mean", weights=weights)) == 0
    before, after = state(run), state(tmp_path / "mean")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_two_models_give_the_weighted_mean_of_every_weight_and_router_bias(tmp_path):
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two", change=0.3)
    main(AverageOptions(runs=(one, two), out=tmp_path / "mean", weights="3,1"))
    a, b, mean = state(one), state(two), state(tmp_path / "mean")
    biases = [name for name in a if name.endswith("gate.bias")]
    tables = [name for name in a if name.endswith("tid2eid")]
    assert biases and tables and not torch.equal(a[biases[0]], b[biases[0]])
    for name in a:
        if name in tables:
            assert torch.equal(mean[name], a[name])
        else:
            torch.testing.assert_close(mean[name], 0.75 * a[name] + 0.25 * b[name])


def test_the_result_is_a_run_directory_like_any_other(tmp_path, capsys):
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two", change=0.1)
    main(AverageOptions(runs=(one, two), out=tmp_path / "mean"))
    out = capsys.readouterr().out
    assert f"model: {tmp_path / 'mean' / 'model'}\nnext: longreach " in out
    assert Tokenizer.load(tmp_path / "mean" / "model").token_bytes == TOKENIZER.token_bytes
    with pytest.raises(RequestError, match="already holds a run"):
        main(AverageOptions(runs=(one, two), out=tmp_path / "mean"))


def test_models_with_other_tables_of_experts_are_refused(tmp_path):
    """Hash-routed layers of different starts send one token to different experts."""
    one = saved(tmp_path / "one")
    other = Transformer(CONFIG, seed=1)
    table = next(value for name, value in other.state_dict().items() if name.endswith("tid2eid"))
    table[5] = (table[5] + 1) % CONFIG.n_routed_experts
    save_model(other, tmp_path / "two" / "model", tokenizer=TOKENIZER)
    with pytest.raises(RequestError, match=r"two.* routes tokens by another table than .*one.*tid2eid"):
        averaged([one / "model", tmp_path / "two" / "model"], [0.5, 0.5])


def test_models_of_another_shape_are_refused_by_the_setting_that_differs(tmp_path):
    one = saved(tmp_path / "one")
    two = saved(tmp_path / "two", config=CONFIG.replace(index_topk=16, sliding_window=32))
    with pytest.raises(RequestError, match=r"two.* has sliding_window=32, .*one.* 64 and 1 more"):
        main(AverageOptions(runs=(one, two), out=tmp_path / "mean"))
    assert not (tmp_path / "mean").exists()


def test_models_of_another_tokenizer_are_refused_and_nothing_is_written(tmp_path):
    other = Tokenizer.train(["quite another text with other words " * 20], vocab_size=TOKENIZER.vocab_size)
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two", tokenizer=other)
    with pytest.raises(RequestError, match=r"two.* has another tokenizer than .*one.*: token \d+ is '.*' against '.*'"):
        main(AverageOptions(runs=(one, two), out=tmp_path / "mean"))
    assert not (tmp_path / "mean").exists()


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        (None, 1, "an average needs at least two models; 1 given"),
        ("0.5,0.5", 3, "are 2 for 3 models"),
        ("half,half", 2, "are no numbers"),
        ("1,-1", 2, "must not be negative"),
        ("0,0", 2, "one at least must be above 0"),
        ("nan,1", 2, "must not be negative"),
        ("inf,1", 2, "above 0"),
    ],
)
def test_shares_that_make_no_sense_are_refused(text, count, message):
    with pytest.raises(RequestError, match=message):
        read_shares(text, count)


def test_shares_are_divided_by_their_sum():
    assert read_shares("2,6", 2) == (0.25, 0.75)
    assert read_shares(None, 4) == (0.25,) * 4


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    one = saved(tmp_path / "one")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="holds no model"):
        main(AverageOptions(runs=(one, tmp_path / "empty"), out=tmp_path / "mean"))
