"""Teachers that are on the disk until their turn comes.

    teachers = Teachers({"mathematics": "runs/math", "code": "runs/code"}, resident=1, …)
    states = teachers.states("mathematics", batch, where_BT)     (positions, width): all that is kept of a pass
    head = teachers.head("mathematics")                          (vocabulary, width): one is in memory at a time

A teacher is asked in two halves. Its body turns a batch's samples into last hidden states, which are small; its head turns
those into logits where they are needed, a tile at a time (`ops.reverse_kl`). So a step holds one head and no more bodies
than `resident`, however many teachers there are, and samples are ordered by teacher so that each half is read once a batch.
Source: DeepSeek-V4 report, section 5.2.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from longreach.checkpoint.load import load_model
from longreach.checkpoint.reader import Checkpoint
from longreach.data.examples import ExampleBatch
from longreach.errors import RequestError
from longreach.model.config import ModelConfig
from longreach.model.config_io import read_config
from longreach.model.transformer import Transformer
from longreach.rundir import find_model
from longreach.tokenizer.bpe import Tokenizer
from longreach.train.sft import covered_tokens


class Teachers:
    """The teachers of a run by name. At most `resident` bodies and one head are in memory after every public call.

    Args:
        runs: name -> run or checkpoint directory.
        student: where the student's weights came from; only named in errors.
        tokenizer, vocab_size: the student's.
        resident: bodies kept, at least 1; the one not used for longest goes first.
        dtype, device: of bodies and heads.

    Attributes:
        bodies_loaded, heads_loaded: read from the disk so far.

    Raises:
        RequestError: a folder that is no run, another tokenizer or vocabulary than the student's.
        ConfigError, CheckpointError: weights that cannot be read.
    """

    def __init__(
        self,
        runs: Mapping[str, str | Path],
        *,
        student: Path,
        tokenizer: Tokenizer,
        vocab_size: int,
        resident: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if resident < 1:
            raise RequestError(
                f"--resident {resident} must be at least 1: the teacher that is asked has to be in memory"
            )
        self.resident, self.dtype, self.device = resident, dtype, torch.device(device)
        self.paths: dict[str, Path] = {}
        self.configs: dict[str, ModelConfig] = {}
        self.bodies_loaded = self.heads_loaded = 0
        self._bodies: OrderedDict[str, Transformer] = OrderedDict()
        self._head: tuple[str, Tensor] | None = None
        for name, run in runs.items():
            path = find_model(run)
            config = read_config(path)
            check_same_vocabulary(student, tokenizer, path, Tokenizer.load(path))
            if config.vocab_size != vocab_size:
                raise RequestError(
                    f"{path} predicts {config.vocab_size} tokens, the student {student} {vocab_size}; a divergence over the "
                    "vocabulary needs one vocabulary"
                )
            with Checkpoint.open(path) as checkpoint:
                checkpoint.match(config)  # a damaged teacher is refused now and not in the middle of the run
            self.paths[name], self.configs[name] = path, config

    @torch.no_grad()
    def states(self, name: str, batch: ExampleBatch, where_BT: Tensor) -> Tensor:
        """The last hidden states of a teacher where `where_BT` is true, row by row.

        Args:
            batch: on the teachers' device.
            where_BT: bool; it may have fewer columns than the batch.

        Returns:
            (positions, the teacher's width) in the teachers' dtype.
        """
        body = self.body(name)
        attention = "dense" if batch.longest_slot <= covered_tokens(body.config) else "sparse"
        hidden_BTE = body.features(batch.tokens, documents=batch.slots, attention=attention, keep=()).hidden
        return hidden_BTE[:, : where_BT.shape[1]][where_BT]

    def body(self, name: str) -> Transformer:
        """A teacher without its head, from memory or from the disk."""
        if name not in self._bodies:
            while len(self._bodies) >= self.resident:
                self._bodies.popitem(last=False)
            self._bodies[name] = load_body(self.paths[name], self.configs[name], self.dtype, self.device)
            self.bodies_loaded += 1
        self._bodies.move_to_end(name)
        return self._bodies[name]

    def head(self, name: str) -> Tensor:
        """A teacher's head, `(vocabulary, width)`; takes the place of the last one asked for."""
        if self._head is None or self._head[0] != name:
            self._head = None
            self._head = name, load_head(self.paths[name], self.configs[name], self.dtype, self.device)
            self.heads_loaded += 1
        return self._head[1]


def load_body(path: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Transformer:
    """A model for hidden states alone: no head, no MTP block, no gradients."""
    changes = {}
    if config.num_nextn_predict_layers:
        changes = {
            "num_nextn_predict_layers": 0,
            "compress_ratios": config.compress_ratios[: -config.num_nextn_predict_layers],
        }
    model = load_model(path, dtype=dtype, device=device, **changes).eval().requires_grad_(False)
    model.head.weight = nn.Parameter(
        torch.empty(0, config.hidden_size, dtype=dtype, device=device), requires_grad=False
    )
    return model


def load_head(path: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The head alone, read from its own place in the checkpoint."""
    with Checkpoint.open(path) as checkpoint:
        place = next(stored for stored in checkpoint.match(config) if stored.unit.parameter.name == "head.weight")
        return checkpoint.read(place).to(device=device, dtype=dtype)


def check_same_vocabulary(one: Path, tokenizer: Tokenizer, other: Path, its: Tokenizer) -> None:
    """Refuse two models to which one id means two things.

    Raises:
        RequestError: names both and the first difference.
    """
    if (difference := first_difference(tokenizer, its)) is not None:
        raise RequestError(
            f"{other} has another tokenizer than {one}: {difference}; both must come from one tokenizer.json"
        )


def first_difference(one: Tokenizer, other: Tokenizer) -> str | None:
    """What tells two vocabularies apart; None where every id stands for the same bytes and special tokens are the same."""
    if one.vocab_size != other.vocab_size:
        return f"{other.vocab_size} tokens against {one.vocab_size}"
    for index, (here, there) in enumerate(zip(one.token_bytes, other.token_bytes, strict=True)):
        if here != there:
            return f"token {index} is {shown(there)} against {shown(here)}"
    if one.special_ids != other.special_ids:
        index = min(set(one.special_ids.values()) ^ set(other.special_ids.values()), default=0)
        return f"token {index} is special in one alone"
    return None


def shown(token: bytes) -> str:
    return repr(token.decode("utf-8", "backslashreplace"))


def by_teacher(names: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Places of samples, ordered by their teacher: each name once, in the order of first appearance."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    return list(places.items())
