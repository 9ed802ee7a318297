"""Where text comes from: a file, a folder of text files, a JSONL file, or `stdlib`, the sources of Python itself.

    read_documents("stdlib")           12 MB of code that every machine with Python has
    read_documents("corpus/")          every text file below, in the order of their names
    read_documents("pages.jsonl")      one {"text": …} per line

The order depends on names only, so the same data gives the same run on any machine.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from longreach.errors import RequestError

TEXT_SUFFIXES = (
    ".txt", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".json", ".yaml", ".yml", ".toml",
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".sh", ".sql",
)  # fmt: skip
"""What counts as text inside a folder; a file named on its own may have any name."""

_NOT_SOURCES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def read_documents(source: str) -> list[str]:
    """All non-empty documents of a source, in a fixed order.

    Args:
        source: `stdlib`, or a path to a text file, a `.jsonl` file, or a folder of either.

    Raises:
        RequestError: nothing there, no text in it, or bytes that are not UTF-8 (named with file and offset).
    """
    if source == "stdlib":
        documents = [_read_text(path) for path in _stdlib_files()]
    else:
        documents = []
        for path in _files(Path(source)):
            documents.extend(_read_jsonl(path) if path.suffix == ".jsonl" else [_read_text(path)])
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise RequestError(f"--data {source} holds no text")
    return documents


def split_validation(documents: list[str], share: float = 0.02) -> tuple[list[str], list[str]]:
    """Set aside about `share` of the documents for validation, chosen by a hash of their text.

    A document is on the same side in every run, whatever else the corpus holds, and a copy of it is never on both. A
    corpus too small for its hash to choose any gives up its lowest hash; one of a single document, its last tenth.

    Returns:
        (training, validation), neither empty, both in the given order.
    """
    if len(documents) == 1:
        text = documents[0]
        cut = len(text) - max(1, len(text) // 10)
        return ([text[:cut]], [text[cut:]]) if cut else ([text], [text])
    hashes = {document: _unit_hash(document) for document in documents}
    threshold = max(share, min(hashes.values()))
    held_out = {document for document, value in hashes.items() if value <= threshold}
    training = [document for document in documents if document not in held_out]
    if not training:  # every document is a copy of one text
        return documents[1:], documents[:1]
    return training, [document for document in hashes if document in held_out]


def _unit_hash(text: str) -> float:
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _stdlib_files() -> Iterator[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        if not _NOT_SOURCES.intersection(folders):
            yield path


def _files(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise RequestError(f"--data {root} does not exist; give a text file, a folder, a .jsonl file, or stdlib")
    found = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in (*TEXT_SUFFIXES, ".jsonl")
        and path.is_file()
        and not any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(root).parts)
    ]
    if not found:
        raise RequestError(f"--data {root} holds no text files; looked for {' '.join(TEXT_SUFFIXES)} .jsonl")
    return found


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; convert it or leave it out"
        ) from None


def _read_jsonl(path: Path) -> Iterator[str]:
    # Only "\n" ends a line here: JSON strings may hold U+2028 and its like, which splitlines would cut at.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise RequestError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise RequestError(f'{path} line {number} must be an object with a string under "text"')
        yield record["text"]
