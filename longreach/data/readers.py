"""From one file, or one saved Hugging Face dataset, to its texts, one after the other and never all at once.

    notes.txt        one document (a file above 16 MB becomes several, cut after a line end)
    pages.jsonl      one per line, under "text" or another field
    pages.parquet    one per row of the column "text" or another; needs pyarrow
    saved/           what datasets.save_to_disk wrote; needs datasets

Whatever cannot be read is a RequestError of one line with the file and the place in it.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longreach.errors import RequestError

LARGEST_DOCUMENT = 16_000_000
"""Bytes of one document of a text file: about four million tokens, more than any row, and encoding it takes some GB."""

_INSTALL = "is not installed (pip install 'longreach[data]')"


def read_text(path: Path) -> Iterator[str]:
    """A text file as one document, or as several if it is above LARGEST_DOCUMENT bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    kept, done = "", 0
    with _opened(path) as file:
        while True:
            block = file.read(LARGEST_DOCUMENT)
            waiting = len(decoder.getstate()[0])  # bytes of a character that the last block cut in two
            try:
                kept += decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error, done - waiting) from None
            done += len(block)
            if len(block) < LARGEST_DOCUMENT:
                if not block:
                    break
                continue
            cut = kept.rfind("\n") + 1 or len(kept)
            yield kept[:cut]
            kept = kept[cut:]
    yield kept


def read_jsonl(path: Path, field: str) -> Iterator[str]:
    """The string under `field` of every line."""
    start = 0
    with _opened(path) as file:
        # Only "\n" ends a line here: JSON strings may hold U+2028 and its like, which str.splitlines would cut at.
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error, start) from None
            start += len(line)
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                raise RequestError(f"{path} line {number} is not JSON: {error}") from None
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                raise RequestError(f'{path} line {number} must be an object with a string under "{field}"')
            yield _whole(record[field], f"{path} line {number}")


def read_parquet(path: Path, field: str) -> Iterator[str]:
    """The column `field`, row by row; a null is an empty text."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise RequestError(f"{path} cannot be read: pyarrow {_INSTALL}") from None
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            _check_column(path, field, file.schema_arrow)
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0):
                    row += 1
                    yield value.as_py() or ""
    except UnicodeDecodeError:
        raise RequestError(f"{path} row {row} is not UTF-8; convert it or leave it out") from None
    except (OSError, arrow.ArrowException) as error:
        raise RequestError(f"{path} is not a Parquet file that can be read: {str(error).splitlines()[0]}") from error


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file()


def read_dataset(folder: Path, field: str) -> Iterator[str]:
    """The column `field` of a dataset saved with `save_to_disk`; a null is an empty text."""
    try:
        import datasets
    except ImportError:
        raise RequestError(f"{folder} cannot be read: datasets {_INSTALL}") from None
    try:
        saved: Any = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.DatasetDict):
            names = [str(name) for name in saved]
            raise RequestError(
                f"{folder} holds the splits {', '.join(names)}; give one of them, as in {folder / names[0]}"
            )
        _check_column(folder, field, saved.features.arrow_schema)
        for row in saved.select_columns([field]):
            yield row[field] or ""
    except RequestError:
        raise
    except Exception as error:  # a damaged folder fails in whichever library meets the damage first
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RequestError(f"{folder} is not a dataset that can be read: {reason}") from error


def _check_column(path: Path, field: str, schema: Any) -> None:
    if field not in schema.names:
        raise RequestError(
            f"{path} has no column {field!r}, only {', '.join(schema.names)}; name one with --text-field"
        )
    kind = str(schema.field(field).type)
    if kind not in ("string", "large_string", "string_view"):
        raise RequestError(f"{path}: column {field!r} holds {kind}, not text; name another with --text-field")


def _whole(text: str, place: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{place} holds half a surrogate pair at character {error.start}; no text has that"
        ) from None
    return text


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from error


def _not_utf8(path: Path, error: UnicodeDecodeError, start: int) -> RequestError:
    byte, offset = error.object[error.start], start + error.start
    return RequestError(f"{path} is not UTF-8: byte 0x{byte:02x} at offset {offset}; convert it or leave it out")
