"""`longreach prepare --data my-texts/ pages.jsonl --out corpus/`: texts to token shards on disk, once for many runs.

A corpus larger than memory is read a few documents at a time; `pretrain --data corpus/` then opens it in an instant and
maps its tokens from disk. The folder appears when all of it is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from longreach.data.corpus import prepare, tokenizer_sample
from longreach.data.sources import parse_sources
from longreach.data.split import Split
from longreach.errors import RequestError
from longreach.runtime import json_line, log, setup_logging
from longreach.tokenizer.bpe import Tokenizer


@dataclass(frozen=True)
class PrepareOptions:
    """Encode texts into a prepared corpus: token shards, held-out documents and the tokenizer of all."""

    out: Path
    """Folder to make."""
    data: tuple[str, ...] | None = None
    """Sources as `longreach pretrain` takes them, PATH or PATH@WEIGHT."""
    text_field: str = "text"
    """Field of .jsonl records and column of .parquet files that holds the text."""
    tokenizer: Path | None = None
    """A tokenizer.json to use instead of learning one from the data."""
    vocab_size: int = 4096
    """Tokens of a tokenizer learned here; a model needs a preset with at least as many."""
    json: bool = False
    """End with one JSON object on stdout."""


def main(options: PrepareOptions) -> int:
    """Run the command."""
    setup_logging()
    if not options.data:
        raise RequestError("--data is missing; give a text file, a folder, a .jsonl or .parquet file, or stdlib")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise RequestError(f"--out {options.out} is not empty; give a folder that does not exist yet")
    tokenizer = Tokenizer.load(options.tokenizer) if options.tokenizer is not None else None
    log.info("reading    %s", " ".join(options.data))
    split = Split.of(parse_sources(options.data, options.text_field))
    if tokenizer is None:
        log.info("tokenizer  learning %d tokens", options.vocab_size)
        tokenizer = Tokenizer.train(tokenizer_sample(split), options.vocab_size)
    documents = sum(survey.documents for survey in split.surveys)
    log.info(
        "encoding   %s documents, %s characters", f"{documents:,}", f"{sum(s.characters for s in split.surveys):,}"
    )
    corpus = prepare(split, tokenizer, options.out)
    figures = {
        "documents": sum(map(len, corpus.training)),
        "tokens": corpus.num_tokens,
        "held_out": len(corpus.validation),
        "vocab_size": tokenizer.vocab_size,
    }
    log.info("%s documents, %s tokens to train on; %d documents held out", f"{figures['documents']:,}",
             f"{figures['tokens']:,}", figures["held_out"])  # fmt: skip
    if options.json:
        print(json_line({"command": "prepare", "corpus": str(options.out), "figures": figures}))
    else:
        print(f"corpus: {options.out}")
        print(f"next: longreach pretrain --data {options.out} --out runs/mine --minutes 30")
    return 0
