"""A model of this process from its directory: weights, tokenizer, engine, and the tables it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from longreach.engine.engine import EngineOptions
from longreach.engine.llm import LLM
from longreach.errors import ConfigError
from longreach.model.stores import Precision
from longreach.native import status as native_status
from longreach.rundir import find_model
from longreach.runtime import log
from longreach.server.models import ChatSetup, LocalModel
from longreach.tokenizer.bpe import Tokenizer
from longreach.tokenizer.special import ASSISTANT, THINK_END, THINK_START, USER


def open_local(
    name: str,
    path: Path,
    setup: ChatSetup,
    *,
    device: str = "cpu",
    hosted: bool = False,
    arithmetic: Literal["fast", "invariant"] = "fast",
    max_running: int = 16,
    memory_gib: float = 1.0,
    precision: Precision | None = None,
    disk_cache: Path | None = None,
    disk_gib: float = 10.0,
    speculation: Literal["off", "lookup", "mtp"] = "off",
    draft_tokens: int = 3,
) -> LocalModel:
    """Load a model and make it ready to answer.

    Raises:
        LongreachError: there is no model, it cannot be loaded, or an option makes no sense.
    """
    options = EngineOptions(
        max_running=max_running, memory_gib=memory_gib, precision=precision, disk_cache=disk_cache, disk_gib=disk_gib,
        speculation=speculation, draft_tokens=draft_tokens, checkpoint_gib=memory_gib / 2, swap_gib=memory_gib,
    )  # fmt: skip
    options.check()
    tokenizer = Tokenizer.load(find_model(path))
    missing = [mark for mark in (USER, ASSISTANT, THINK_START, THINK_END) if mark not in tokenizer.special_ids]
    if missing:
        raise ConfigError(
            f"{path}: its tokenizer lacks {', '.join(missing)}, so no conversation can be laid out for it"
        )
    llm = LLM(path, options, tokenizer=tokenizer, arithmetic=arithmetic, device=device)
    model = LocalModel(name, llm.engine, setup, hosted=hosted)
    model.replay.limit = int(model.replay.limit * memory_gib)  # its own size is meant for a cache of a GiB
    dtype = str(llm.engine.model.dtype).removeprefix("torch.")
    log.info(
        "%s: %s, %s, context of %d tokens, cache of %g GiB in %s%s; compiled: %s", name, path, dtype, model.context, memory_gib,
        llm.engine.precision, f" and {disk_cache}" if disk_cache is not None else "", native_status(),
    )  # fmt: skip
    return model
