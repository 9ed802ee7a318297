"""Reading text, holding some out, packing it into rows, and batches by step."""

from __future__ import annotations

import sys
from itertools import islice

import numpy as np
import pytest

from longreach.data import documents as documents_module
from longreach.data import readers
from longreach.data.documents import MemoryDocuments, encode_documents, encode_stream
from longreach.data.packing import PackedRows
from longreach.data.sources import Source, parse_sources
from longreach.data.split import Split
from longreach.data.stream import MixtureStream, in_order
from longreach.errors import RequestError
from longreach.tokenizer.bpe import Tokenizer


def read_documents(source: str) -> list[str]:
    """All texts of one source."""
    return list(Source(source))


def split_validation(documents: list[str]) -> tuple[list[str], list[str]]:
    """(training, validation) of texts in memory."""
    split = Split.of([documents])
    return list(split.training(0)), list(split.validation())


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


def test_a_long_text_file_becomes_documents_cut_after_line_ends_and_none_of_it_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LARGEST_DOCUMENT", 7)
    for text in ("ab\ncdé\nfghijklmnop\nq", "é" * 20, "1234567", "123456\n" * 2, "\n\n€"):
        (tmp_path / "long.txt").write_text(text, encoding="utf-8")
        pieces = list(readers.read_text(tmp_path / "long.txt"))
        assert "".join(pieces) == text
        assert all(len(piece.encode()) <= 14 for piece in pieces)
    (tmp_path / "long.txt").write_text("ab\ncdef\ng", encoding="utf-8")
    assert list(readers.read_text(tmp_path / "long.txt")) == ["ab\n", "cdef\ng"]
    for content, offset in ((b"123456\xc3\xa9\xff", 8), (b"12345678\xc3", 8), (b"123456\xc3z", 6)):
        (tmp_path / "long.txt").write_bytes(content)
        with pytest.raises(RequestError, match=f"long.txt is not UTF-8: byte 0x.. at offset {offset};"):
            list(readers.read_text(tmp_path / "long.txt"))


def test_the_offset_of_a_bad_byte_in_jsonl_counts_from_the_start_of_the_file(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "a\xff"}\n')
    with pytest.raises(RequestError, match="byte 0xff at offset 26"):
        read_documents(str(tmp_path / "bad.jsonl"))


def test_half_a_surrogate_pair_in_jsonl_is_named_with_its_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "ok"}\n{"text": "a\\ud800"}\n')
    with pytest.raises(RequestError, match=r"bad\.jsonl line 2 holds half a surrogate pair at character 1"):
        read_documents(str(tmp_path / "bad.jsonl"))


# ---- the command line's way to name sources -------------------------------------------------------------------------


def test_a_source_may_have_a_weight_and_a_path_may_have_an_at_sign(tmp_path):
    for name in ("notes.txt", "a@2"):
        (tmp_path / name).write_text("text")
    notes, odd = str(tmp_path / "notes.txt"), str(tmp_path / "a@2")
    assert parse_sources([notes, "stdlib"]) == [Source(notes), Source("stdlib")]
    assert parse_sources([f"{notes}@3", "stdlib@0.5"]) == [Source(notes, 3.0), Source("stdlib", 0.5)]
    assert parse_sources([odd]) == [Source(odd)]
    assert parse_sources([f"{odd}@4"], "body") == [Source(odd, 4.0, "body")]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "--data is missing; give a text file"),
        (["absent"], "--data absent does not exist; give .*nothing is downloaded"),
        (["absent@2"], "--data absent does not exist"),
        (["stdlib@much"], "--data stdlib@much does not exist"),
        (["stdlib@0"], "--data stdlib@0: the weight after @ must be a number above 0"),
        (["stdlib@-1"], "the weight after @"),
        (["stdlib@inf"], "the weight after @"),
        (["stdlib@nan"], "the weight after @"),
        (["stdlib@1", "tests"], "--data tests has no weight but others have; .* as in tests@1"),
    ],
)
def test_sources_that_cannot_be_are_refused(specs, message, request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    with pytest.raises(RequestError, match=message) as refused:
        parse_sources(specs)
    assert "\n" not in str(refused.value)


def test_the_field_of_the_text_can_be_named(tmp_path):
    (tmp_path / "pages.jsonl").write_text('{"text": "wrong", "body": "right"}\n')
    assert list(Source(str(tmp_path / "pages.jsonl"), text_field="body")) == ["right"]
    with pytest.raises(RequestError, match='an object with a string under "content"'):
        list(Source(str(tmp_path / "pages.jsonl"), text_field="content"))


def test_parquet_files_are_read_by_column_alone_and_inside_a_folder(tmp_path):
    pytest.importorskip("pyarrow", reason="Parquet needs the data extra")
    write_parquet(tmp_path / "b.parquet", {"n": [1, 2, 3, 4], "text": ["one", None, "", "four"]})
    (tmp_path / "a.txt").write_text("zero")
    assert read_documents(str(tmp_path / "b.parquet")) == ["one", "four"]
    assert read_documents(str(tmp_path)) == ["zero", "one", "four"]


def test_parquet_errors_are_one_line_with_the_name_of_the_file(tmp_path):
    pytest.importorskip("pyarrow", reason="Parquet needs the data extra")
    path = tmp_path / "x.parquet"
    write_parquet(path, {"body": ["a"], "text": [1]})
    for field, message in (
        ("content", r"x\.parquet has no column 'content', only body, text; name one with --text-field"),
        ("text", r"x\.parquet: column 'text' holds int64, not text"),
    ):
        with pytest.raises(RequestError, match=message):
            list(Source(str(path), text_field=field))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(RequestError, match=r"x\.parquet is not a Parquet file that can be read") as refused:
        list(Source(str(path)))
    assert "\n" not in str(refused.value)


def test_bytes_that_are_not_utf8_in_parquet_are_named_by_row(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="Parquet needs the data extra")
    from pyarrow import parquet

    broken = arrow.Array.from_buffers(arrow.string(), 2, arrow.array([b"ok", b"a\xff"], arrow.binary()).buffers())
    parquet.write_table(arrow.table({"text": broken}), tmp_path / "x.parquet")
    with pytest.raises(RequestError, match=r"x\.parquet row 2 is not UTF-8"):
        read_documents(str(tmp_path / "x.parquet"))


@pytest.mark.parametrize(("library", "name"), [("pyarrow", "x.parquet"), ("datasets", "saved")])
def test_without_the_library_the_line_says_how_to_get_it(tmp_path, monkeypatch, library, name):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(RequestError, match=rf"{name} cannot be read: {library} is not installed \(pip install 'longr"):
        read_documents(str(tmp_path / name))


def test_a_saved_dataset_is_read_and_its_splits_are_named(tmp_path):
    datasets = pytest.importorskip("datasets", reason="saved datasets need the data extra")
    one = datasets.Dataset.from_dict({"text": ["first", None, "third"], "id": [1, 2, 3]})
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path / "saved"))
    assert read_documents(str(tmp_path / "saved" / "train")) == ["first", "third"]
    with pytest.raises(
        RequestError, match=r"^[^:]*saved holds the splits train, test; give one of them, as in .*saved/train"
    ):
        read_documents(str(tmp_path / "saved"))
    with pytest.raises(RequestError, match=r"^[^:]*train has no column 'body', only text, id"):
        list(Source(str(tmp_path / "saved" / "train"), text_field="body"))
    (tmp_path / "saved" / "train" / "state.json").unlink()
    with pytest.raises(RequestError, match="train is not a dataset that can be read") as refused:
        read_documents(str(tmp_path / "saved" / "train"))
    assert "\n" not in str(refused.value)


def write_parquet(path, columns):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.table(columns), path)


# ---- what is held out -----------------------------------------------------------------------------------------------


def test_stdlib_is_the_library_without_its_tests_in_a_fixed_order():
    documents = read_documents("stdlib")
    assert 300 < len(documents) < 2000
    assert sum(map(len, documents)) > 5_000_000
    joined = "".join(documents)
    assert "class OrderedDict(dict)" in joined
    assert "class Tensor(torch" not in joined, "site-packages are not the library"
    assert documents[:50] == list(islice(Source("stdlib"), 50))


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
    assert split_validation(["same", "same"]) == (["same", "sam"], ["e"])
    assert split_validation(["x"]) == (["x"], ["x"])
    training, validation = split_validation(["one", "two"])
    assert len(training) == len(validation) == 1


def test_several_sources_are_divided_as_one_and_each_keeps_something_to_train_on():
    many = [f"document number {i}" for i in range(2000)]
    whole = Split.of([many])
    held_out = set(whole.validation())
    doomed = next(text for text in many if text in held_out)  # a source of this alone would lose everything
    split = Split.of([many[:1000], many[1000:], [doomed]])
    assert list(split.training(0)) + list(split.training(1)) == list(whole.training(0))
    cut = len(doomed) - len(doomed) // 10
    assert list(split.training(2)) == [doomed[:cut]]
    assert list(split.validation()) == [*whole.validation(), doomed[cut:]]


def test_texts_are_encoded_in_portions_without_reading_ahead(monkeypatch):
    tokenizer = Tokenizer.train(["some text"], vocab_size=300)
    monkeypatch.setattr(documents_module, "_ENCODE_AT_ONCE", 5)
    read = []
    stream = encode_stream((read.append(i) or f"text {i}" for i in range(12)), tokenizer)
    for count in (5, 5, 5, 5, 5, 10, 10):
        next(stream)
        assert len(read) == count
    assert len(list(stream)) == 5
    monkeypatch.setattr(documents_module, "_CHARACTERS_AT_ONCE", 11)
    read.clear()
    next(encode_stream((read.append(i) or f"text {i}" for i in range(12)), tokenizer))
    assert len(read) == 2, "long texts make smaller portions"
    whole = encode_documents([f"text {i}" for i in range(12)], tokenizer)
    for at_once in (1, 2, 64):
        monkeypatch.setattr(documents_module, "_ENCODE_AT_ONCE", at_once)
        again = encode_documents([f"text {i}" for i in range(12)], tokenizer)
        assert [ids.tolist() for ids in again] == [ids.tolist() for ids in whole]


# ---- rows and batches -----------------------------------------------------------------------------------------------


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


def test_data_shorter_than_a_row_is_refused_for_training_and_cut_short_for_validation():
    with pytest.raises(RequestError, match="5 tokens, fewer than one row of 8"):
        MixtureStream([MemoryDocuments([np.arange(5)])], seed=0).next_batch(1, 8)
    (batch,) = in_order([np.arange(5)], seq_len=8, rows_per_batch=4, max_tokens=100)
    assert batch.tokens.tolist() == [[0, 1, 2, 3, 4]]


def test_validation_stops_at_its_token_limit():
    batches = list(in_order([np.arange(1000)], seq_len=10, rows_per_batch=4, max_tokens=60))
    assert sum(batch.tokens.numel() for batch in batches) == 60


def test_validation_reads_no_more_documents_than_it_needs():
    read = []

    class Counted(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    batches = list(in_order(Counted(np.arange(30) for _ in range(100)), seq_len=10, rows_per_batch=4, max_tokens=60))
    assert sum(batch.tokens.numel() for batch in batches) == 60
    assert read == [0, 1]
