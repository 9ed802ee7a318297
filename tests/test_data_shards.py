"""Token shards and prepared corpora: what is written is read back, and half of it is never taken for the whole."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from itertools import islice

import numpy as np
import pytest

from longreach.data import shards as shards_module
from longreach.data.corpus import is_prepared, open_corpus, prepare, read_corpus, tokenizer_sample
from longreach.data.documents import DocumentsDigest, MemoryDocuments
from longreach.data.shards import TokenShards, write_shards
from longreach.data.sources import Source, parse_sources
from longreach.data.split import Split
from longreach.data.stream import MixtureStream, in_order
from longreach.errors import RequestError
from longreach.tokenizer.bpe import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["some text for a tokenizer " * 5], vocab_size=300)


def some(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 300, rng.integers(1, 40)) for _ in range(count)]


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- shards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_tokens", [1, 100, 10**6])
def test_documents_come_back_from_any_number_of_shards(tokenizer, tmp_path, shard_tokens):
    documents = some(60)
    written = write_shards(iter(documents), tmp_path / "out", tokenizer, shard_tokens)
    assert len(names(tmp_path / "out")) == 1 + 2 * {1: 60, 100: len(written._tokens), 10**6: 1}[shard_tokens]
    assert names(tmp_path) == ["out"]
    read = TokenShards.open(tmp_path / "out", tokenizer)
    assert len(read) == 60
    assert read.num_tokens == sum(map(len, documents))
    assert read.digest == MemoryDocuments(documents).digest
    for number, document in enumerate(documents):
        np.testing.assert_array_equal(read[number], document)
        assert read[number].dtype == np.uint16
        assert isinstance(read[number], np.memmap), "nothing is copied"
    for outside in (-1, 60):
        with pytest.raises(IndexError):
            read[outside]


def test_files_are_what_the_format_says(tokenizer, tmp_path):
    write_shards([np.array([0, 7, 1]), np.array([0, 299])], tmp_path / "out", tokenizer)
    assert names(tmp_path / "out") == ["index.json", "offsets-00000.npy", "tokens-00000.bin"]
    assert (tmp_path / "out" / "tokens-00000.bin").read_bytes() == bytes([0, 0, 7, 0, 1, 0, 0, 0, 43, 1])
    assert np.load(tmp_path / "out" / "offsets-00000.npy").tolist() == [0, 3, 5]
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert (index["documents"], index["tokens"], index["dtype"], index["vocab_size"]) == (2, 5, "uint16", 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    assert index["tokenizer"] == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()


def test_a_vocabulary_above_65536_takes_four_bytes(tmp_path):
    class Large:
        vocab_size, _json = 70_000, "{}"

    read = write_shards([np.array([0, 69_999])], tmp_path / "out", Large())
    assert read[0].tolist() == [0, 69_999]
    assert (tmp_path / "out" / "tokens-00000.bin").stat().st_size == 8


def test_the_digest_tells_documents_apart_that_have_the_same_tokens():
    def digest(*documents):
        hashed = DocumentsDigest()
        for document in documents:
            hashed.add(np.array(document))
        return hashed.hexdigest()

    assert digest([1, 2], [3]) != digest([1], [2, 3])
    assert MemoryDocuments([np.array([1, 2], dtype=np.uint16)]).digest == digest([1, 2])


def damage_cut(folder):
    path = folder / "tokens-00001.bin"
    path.write_bytes(path.read_bytes()[:-2])


def damage_offsets(folder):
    path = folder / "offsets-00000.npy"
    path.write_bytes(path.read_bytes()[:-8])


def damage_index(folder):
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"documents": 7}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_cut, r"tokens-00001\.bin has \d+ bytes where its index says \d+: it is damaged"),
        (damage_offsets, r"offsets-00000\.npy is damaged"),
        (damage_index, r"index\.json contradicts itself"),
        (lambda folder: (folder / "tokens-00001.bin").unlink(), r"no token shards: tokens-00001\.bin is missing"),
        (lambda folder: (folder / "index.json").unlink(), r"no token shards: index\.json is missing"),
        (lambda folder: (folder / "index.json").write_text('{"form'), r"index\.json is not an index"),
        (lambda folder: (folder / "index.json").write_text("[]"), r"index\.json is not an index"),
        (
            lambda folder: (folder / "index.json").write_text('{"format": "2"}'),
            "has the format '2', this release reads",
        ),
    ],
)
def test_damaged_shards_are_one_line(tokenizer, tmp_path, damage, message):
    write_shards(some(30), tmp_path / "out", tokenizer, shard_tokens=100)
    TokenShards.open(tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(RequestError, match=message) as refused:
        TokenShards.open(tmp_path / "out")
    assert "\n" not in str(refused.value)


def test_another_tokenizer_is_refused(tokenizer, tmp_path):
    write_shards(some(3), tmp_path / "out", tokenizer)
    same_size = Tokenizer.train(["quite another text " * 5], vocab_size=300)
    with pytest.raises(RequestError, match=r"out was written with another tokenizer \(sha256 [0-9a-f]{12}, this one"):
        TokenShards.open(tmp_path / "out", same_size)
    larger = Tokenizer.train(["some text"], vocab_size=310)
    with pytest.raises(RequestError, match="out was written with a vocabulary of 300, this tokenizer has 310"):
        TokenShards.open(tmp_path / "out", larger)


@pytest.mark.parametrize("bad", [300, -1])
def test_an_id_outside_the_vocabulary_is_refused_and_nothing_is_left(tokenizer, tmp_path, bad):
    with pytest.raises(RequestError, match="outside the vocabulary of 300"):
        write_shards([np.array([1, 2]), np.array([1, bad])], tmp_path / "out", tokenizer)
    assert names(tmp_path) == []


def test_a_half_written_folder_is_never_read_and_the_next_attempt_begins_anew(tokenizer, tmp_path, monkeypatch):
    def interrupted():
        yield from some(20)
        raise KeyboardInterrupt

    # As after a kill: nothing gets the chance to clean up.
    with monkeypatch.context() as killed:
        killed.setattr(shards_module.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            write_shards(interrupted(), tmp_path / "out", tokenizer, shard_tokens=50)
    assert names(tmp_path) == [".out.partial"]
    for folder in ("out", ".out.partial"):
        with pytest.raises(RequestError, match="holds no token shards"):
            TokenShards.open(tmp_path / folder)
    again = write_shards(some(3), tmp_path / "out", tokenizer)
    assert len(again) == 3
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["index.json", "offsets-00000.npy", "tokens-00000.bin"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards_module, "_to_disk", full)
    with pytest.raises(RequestError, match=r"out cannot be written: No space left on device"):
        write_shards(some(3), tmp_path / "out", tokenizer)
    assert names(tmp_path) == []


def test_nothing_is_overwritten(tokenizer, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(RequestError, match="out exists and is not empty; give a new folder"):
        write_shards(some(3), tmp_path / "out", tokenizer)
    assert names(tmp_path / "out") == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    assert len(write_shards(some(3), tmp_path / "empty", tokenizer)) == 3


def test_documents_are_written_as_they_come(tokenizer, tmp_path):
    partial = tmp_path / ".out.partial"
    largest = []

    def watched():
        for number in range(2000):
            if number % 400 == 399:
                largest.append(sum(path.stat().st_size for path in partial.iterdir()))
            yield np.full(500, number % 300)

    write_shards(watched(), tmp_path / "out", tokenizer, shard_tokens=200_000)
    # Each document is 1,000 bytes on disk; what is not there yet is in the buffer of one file.
    assert all(written >= 1000 * (400 * step + 398) - 20_000 for step, written in enumerate(largest))


# ---- corpora --------------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path) -> list[Source]:
    (tmp_path / "code").mkdir()
    for number in range(120):
        (tmp_path / "code" / f"{number:03d}.py").write_text(f"value_{number} = {number}\n" * (1 + number % 5))
    with (tmp_path / "notes.jsonl").open("w") as file:
        for number in range(80):
            file.write(json.dumps({"text": f"note {number} says something else"}) + "\n")
    return parse_sources([f"{tmp_path}/code@3", f"{tmp_path}/notes.jsonl@1"])


def test_a_prepared_corpus_is_the_same_as_one_in_memory(tokenizer, tmp_path, sources):
    split = Split.of(sources)
    memory = read_corpus(split, tokenizer)
    disk = prepare(split, tokenizer, tmp_path / "out", shard_tokens=300)
    assert is_prepared(tmp_path / "out")
    assert not is_prepared(tmp_path / "code")
    assert disk.weights == memory.weights == [3.0, 1.0]
    assert disk.names == memory.names == [source.name for source in sources]
    assert [d.digest for d in disk.training] == [d.digest for d in memory.training]
    assert disk.validation.digest == memory.validation.digest
    assert disk.num_tokens == memory.num_tokens > 3000
    assert len(disk.training[0]) + len(disk.training[1]) + len(disk.validation) == 200

    again = open_corpus(tmp_path / "out", tokenizer)
    a = MixtureStream(memory.training, memory.weights, seed=0).next_batch(4, 64)
    b = MixtureStream(again.training, again.weights, seed=0).next_batch(4, 64)
    assert a.tokens.tolist() == b.tokens.tolist()
    assert [x.tokens.tolist() for x in in_order(memory.validation, 16, 2, 100)] == [
        x.tokens.tolist() for x in in_order(again.validation, 16, 2, 100)
    ]


def test_a_half_prepared_corpus_leaves_nothing_and_a_damaged_one_is_named(tokenizer, tmp_path, sources, monkeypatch):
    split = Split.of(sources)
    (tmp_path / "notes.jsonl").write_text('{"text": "note"}\n{"body": 1}\n')  # changed after it was surveyed
    with pytest.raises(RequestError, match=r"notes\.jsonl line 2 must be"):
        prepare(split, tokenizer, tmp_path / "out")
    assert names(tmp_path) == ["code", "notes.jsonl"]

    prepare(Split.of(sources[:1]), tokenizer, tmp_path / "out")
    with pytest.raises(RequestError, match="out exists and is not empty"):
        prepare(Split.of(sources[:1]), tokenizer, tmp_path / "out")
    with pytest.raises(RequestError, match="is a prepared corpus, tokens and no text; give it alone"):
        list(Source(str(tmp_path / "out")))
    other = Tokenizer.train(["quite another text " * 5], vocab_size=300)
    with pytest.raises(RequestError, match="train-0 was written with another tokenizer"):
        open_corpus(tmp_path / "out", other)
    shutil.rmtree(tmp_path / "out" / "validation")
    with pytest.raises(RequestError, match="validation holds no token shards"):
        open_corpus(tmp_path / "out")
    (tmp_path / "out" / "longreach-corpus.json").write_text("{")
    with pytest.raises(RequestError, match=r"longreach-corpus\.json cannot be read"):
        open_corpus(tmp_path / "out")
    with pytest.raises(RequestError, match="code is not a prepared corpus"):
        open_corpus(tmp_path / "code")


def test_a_tokenizer_learns_from_a_sample_spread_over_every_source_by_weight(sources):
    split = Split.of(sources)
    everything = [text for number in range(2) for text in split.training(number)]
    assert list(tokenizer_sample(split, 10**9)) == everything, "held-out texts are not among them"
    sample = list(tokenizer_sample(split, 2000))
    code = [text for text in sample if text.startswith("value")]
    notes = [text for text in sample if text.startswith("note")]
    assert code + notes == sample
    assert 1400 <= sum(map(len, code)) <= 1500
    assert 420 <= sum(map(len, notes)) <= 500
    numbers = [int(text.split("_")[1].split(" ")[0]) for text in code]
    gaps = np.diff([0, *numbers, 120])
    assert max(gaps) < 20, "not only the beginning of the source"
    assert set(sample) <= set(everything)


def test_a_source_too_small_for_its_share_leaves_the_rest_to_the_others():
    split = Split.of([Texts("a", ["x" * 100] * 100), Texts("b", ["yy"] * 5)])
    sizes = {letter: sum(text.count(letter) for text in tokenizer_sample(split, 5000)) for letter in "xy"}
    assert sizes["y"] in (8, 10)
    assert 4800 < sizes["x"] <= 4990


def test_of_a_text_longer_than_the_share_the_beginning_is_taken():
    split = Split.of([Texts("a", ["x" * 900 + "z" * 100])])
    assert list(tokenizer_sample(split, 50)) == ["x" * 45], "as much as of the text that is not held out"


class Texts:
    """A source in memory with equal weight."""

    def __init__(self, name: str, texts: list[str]):
        self.name, self.weight, self._texts = name, 1.0, texts

    def __iter__(self):
        return islice(self._texts, None)
