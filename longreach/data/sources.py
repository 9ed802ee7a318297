"""Where text comes from, as named on the command line: `--data SOURCE…`, each with a weight or none with one.

    stdlib                           12 MB of code that every machine with Python has: Python's own library
    notes.txt  pages.jsonl  c4.parquet
    corpus/                          every file of these kinds below, in the order of their names
    saved/                           a Hugging Face dataset written by save_to_disk; nothing is ever downloaded
    code/@3 pages.jsonl@1            of every four tokens three are code, however long the two are

Without weights a source counts by its size, so that all are seen equally often. The order depends on names only, so the
same data gives the same run on any machine. Texts of white space alone are left out.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from longreach.data.readers import is_saved_dataset, read_dataset, read_jsonl, read_parquet, read_text
from longreach.errors import RequestError

TEXT_SUFFIXES = (
    ".txt", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".json", ".yaml", ".yml", ".toml",
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".sh", ".sql",
)  # fmt: skip
"""What counts as text inside a folder; a file named on its own may have any name."""

PREPARED = "longreach-corpus.json"
"""The file that marks a folder as a corpus already turned into tokens (data/corpus.py)."""

_ALLOWED = "give a text file, a folder, a .jsonl or .parquet file, a saved dataset, or stdlib"
_NOT_SOURCES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Source:
    """One place that texts come from. Iterating reads it; it may be iterated any number of times."""

    name: str
    """`stdlib` or a path."""
    weight: float | None = None
    """Share of the tokens relative to the other sources; None: by size."""
    text_field: str = "text"
    """Where the text is in a JSONL object, a Parquet file or a dataset."""

    def __iter__(self) -> Iterator[str]:
        """Its texts, in a fixed order.

        Raises:
            RequestError: no text in it, or something that cannot be read, named with file and place.
        """
        empty = True
        for text in self._texts():
            if text.strip():
                empty = False
                yield text
        if empty:
            raise RequestError(f"--data {self.name} holds no text")

    def _texts(self) -> Iterator[str]:
        if self.name == "stdlib":
            for path in _stdlib_files():
                yield from read_text(path)
            return
        root = Path(self.name)
        if (root / PREPARED).is_file():
            raise RequestError(
                f"--data {root} is a prepared corpus, tokens and no text; give it alone, without a weight"
            )
        if is_saved_dataset(root):
            yield from read_dataset(root, self.text_field)
            return
        for path in _files(root):
            match path.suffix.lower():
                case ".jsonl":
                    yield from read_jsonl(path, self.text_field)
                case ".parquet":
                    yield from read_parquet(path, self.text_field)
                case _:
                    yield from read_text(path)


def parse_sources(specs: Sequence[str], text_field: str = "text") -> list[Source]:
    """The sources that `PATH` or `PATH@WEIGHT` name. A path that exists as it is written has no weight in it.

    Raises:
        RequestError: none given, one that does not exist, a weight that is not above 0, or weights for some only.
    """
    if not specs:
        raise RequestError(f"--data is missing; {_ALLOWED}")
    sources = [_parse(spec, text_field) for spec in specs]
    bare = [source.name for source in sources if source.weight is None]
    if bare and len(bare) < len(sources):
        raise RequestError(f"--data {bare[0]} has no weight but others have; give every source one, as in {bare[0]}@1")
    return sources


def _parse(spec: str, text_field: str) -> Source:
    name, at, number = spec.rpartition("@")
    if at and name and not Path(spec).exists():
        try:
            weight = float(number)
        except ValueError:
            pass  # the "@" belongs to a path, and that path is not there
        else:
            if not 0 < weight < math.inf:
                raise RequestError(f"--data {spec}: the weight after @ must be a number above 0")
            return Source(_existing(name), weight, text_field)
    return Source(_existing(spec), None, text_field)


def _existing(name: str) -> str:
    if name != "stdlib" and not Path(name).exists():
        raise RequestError(f"--data {name} does not exist; {_ALLOWED} (nothing is downloaded)")
    return name


def _stdlib_files() -> Iterator[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        if not _NOT_SOURCES.intersection(folders):
            yield path


def _files(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    _existing(str(root))
    suffixes = (*TEXT_SUFFIXES, ".jsonl", ".parquet")
    found = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in suffixes
        and path.is_file()
        and not any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(root).parts)
    ]
    if not found:
        raise RequestError(f"--data {root} holds no text files; looked for {' '.join(suffixes)}")
    return found
