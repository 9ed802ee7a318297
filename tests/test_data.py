"""Reading text, holding some out, packing it into rows, and batches by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from longreach.data.packing import PackedRows, encode_documents
from longreach.data.sources import read_documents, split_validation
from longreach.data.stream import TrainingStream, in_order
from longreach.errors import RequestError
from longreach.tokenizer.bpe import Tokenizer


def test_a_folder_is_read_in_the_order_of_names_without_hidden_and_other_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name, text in {"b.txt": "two", "a.py": "one", "sub/c.md": "three", ".git/x.txt": "no", "d.bin": "no"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "empty.txt").write_text(" \n")
    assert read_documents(str(tmp_path)) == ["one", "two", "three"]


def test_jsonl_gives_one_document_per_line(tmp_path):
    path = tmp_path / "pages.jsonl"
    path.write_text('{"text": "first\\nline", "id": 1}\n\n{"text": "sep\u2028arator"}\n', encoding="utf-8")
    assert read_documents(str(path)) == ["first\nline", "sep\u2028arator"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "ok"}\n{oops\n', r"bad\.jsonl line 2 is not JSON"),
        (b'{"body": "x"}\n', r'bad\.jsonl line 1 must be an object with a string under "text"'),
        (b'{"text": 3}\n', r"bad\.jsonl line 1 must be"),
        (b'{"text": "a\xff"}\n', r"bad\.jsonl is not UTF-8: byte 0xff at offset 11"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(RequestError, match=message):
        read_documents(str(tmp_path / "bad.jsonl"))


def test_a_file_that_is_not_utf8_is_named_with_the_offset_of_the_byte(tmp_path):
    (tmp_path / "good.txt").write_text("fine")
    (tmp_path / "latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    with pytest.raises(RequestError, match=r"latin\.txt is not UTF-8: byte 0xe9 at offset 3"):
        read_documents(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"), [("absent", "does not exist"), ("folder", "no text files"), ("f.txt", "no text")]
)
def test_a_source_without_text_is_refused(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "f.txt").write_text("")
    with pytest.raises(RequestError, match=message):
        read_documents(str(tmp_path / name))


def test_stdlib_is_the_library_without_its_tests_in_a_fixed_order():
    documents = read_documents("stdlib")
    assert 300 < len(documents) < 2000
    assert sum(map(len, documents)) > 5_000_000
    joined = "".join(documents)
    assert "class OrderedDict(dict)" in joined
    assert "class Tensor(torch" not in joined, "site-packages are not the library"
    assert documents == read_documents("stdlib")


def test_the_held_out_documents_do_not_depend_on_what_else_the_corpus_holds():
    documents = [f"document number {i}" for i in range(2000)]
    training, validation = split_validation(documents)
    assert 10 < len(validation) < 80
    assert sorted(training + validation) == sorted(documents)
    half_training, half_validation = split_validation(documents[::2])
    assert set(half_validation) <= set(validation)
    assert set(half_training) <= set(training)


def test_copies_of_a_document_are_never_on_both_sides():
    documents = [f"document number {i % 100}" for i in range(300)]
    training, validation = split_validation(documents)
    assert not set(training) & set(validation)
    assert len(validation) == len(set(validation))


def test_even_one_document_leaves_something_to_train_and_something_to_validate():
    assert split_validation(["0123456789" * 2]) == (["012345678901234567"], ["89"])
    assert split_validation(["same", "same"]) == (["same"], ["same"])
    training, validation = split_validation(["one", "two"])
    assert len(training) == len(validation) == 1


def test_documents_are_packed_end_to_end_with_their_numbers():
    documents = [np.array([0, 5, 6, 7, 1]), np.array([0, 8, 9, 1]), np.array([0, 4, 1])]
    rows = PackedRows(documents, seq_len=6)
    tokens, owners = rows.take([0, 1])
    # Row 1 begins with the last token of row 0; the twelfth token does not fill a third row.
    np.testing.assert_array_equal(tokens, [[0, 5, 6, 7, 1, 0], [0, 8, 9, 1, 0, 4]])
    np.testing.assert_array_equal(owners, [[0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 2, 2]])
    assert len(rows) == 2


def test_each_document_begins_with_bos_and_ends_with_eos_and_typed_marks_stay_text():
    tokenizer = Tokenizer.train(["some text"], vocab_size=300)
    (ids,) = encode_documents(["<｜end▁of▁sentence｜>"], tokenizer)
    assert ids[0] == 0
    assert ids[-1] == 1
    assert (ids[1:-1] > 17).all()


def test_one_pass_predicts_every_token_once():
    documents = [np.arange(start, start + length) for start, length in [(0, 30), (100, 17), (200, 34)]]
    stream = TrainingStream(documents, seq_len=9, rows_per_batch=2, seed=3)
    assert stream.rows_per_pass == 10
    targets = torch.cat([stream.batch(step).tokens[:, 1:] for step in range(5)]).flatten().tolist()
    every = {int(token) for document in documents for token in document}
    assert len(targets) == len(set(targets)) == 80
    assert set(targets) < every
    assert len(every - set(targets)) == 1, "only the very first token of a pass has nothing before it"


def test_a_batch_depends_on_seed_and_step_only():
    documents = [np.arange(i, i + 40) for i in range(0, 400, 40)]
    walked = TrainingStream(documents, seq_len=8, rows_per_batch=3, seed=1)
    batches = [walked.batch(step) for step in range(50)]
    for step in (49, 0, 20, 33):
        jumped = TrainingStream(documents, seq_len=8, rows_per_batch=3, seed=1).batch(step)
        assert torch.equal(jumped.tokens, batches[step].tokens)
        assert torch.equal(jumped.documents, batches[step].documents)
    other = TrainingStream(documents, seq_len=8, rows_per_batch=3, seed=2).batch(0)
    assert not torch.equal(other.tokens, batches[0].tokens)


def test_passes_differ_in_order():
    documents = [np.arange(i, i + 40) for i in range(0, 400, 40)]
    stream = TrainingStream(documents, seq_len=8, rows_per_batch=stream_rows(documents, 8), seed=1)
    assert not torch.equal(stream.batch(0).tokens, stream.batch(1).tokens)


def stream_rows(documents: list[np.ndarray], seq_len: int) -> int:
    return TrainingStream(documents, seq_len, 1, 0).rows_per_pass


def test_a_batch_larger_than_the_data_is_filled_from_several_passes():
    stream = TrainingStream([np.arange(20)], seq_len=10, rows_per_batch=7, seed=0)
    assert stream.batch(0).tokens.shape == (7, 10)
    assert torch.equal(stream.batch(4).tokens, stream.batch(4).tokens)


def test_data_shorter_than_a_row_is_refused_for_training_and_cut_short_for_validation():
    with pytest.raises(RequestError, match="5 tokens, fewer than one row of 8"):
        TrainingStream([np.arange(5)], seq_len=8, rows_per_batch=1, seed=0)
    (batch,) = in_order([np.arange(5)], seq_len=8, rows_per_batch=4, max_tokens=100)
    assert batch.tokens.tolist() == [[0, 1, 2, 3, 4]]


def test_validation_stops_at_its_token_limit():
    batches = list(in_order([np.arange(1000)], seq_len=10, rows_per_batch=4, max_tokens=60))
    assert sum(batch.tokens.numel() for batch in batches) == 60
