"""Answers in files: those of a base for all later runs, those of each adapter so that a killed run goes on.

A file is named by a digest of all that the answers depend on: the base's values and config, its dtype and tokenizer,
the adapter's values and settings, the examples, the settings, the versions. A file that cannot be read is asked again;
a folder that cannot be written costs the next run the same work, and this one nothing. It knows no metric.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from kitout.data.encode.tokenizer_digest import template_digest, tokenizer_digest
from kitout.evaluate.ask.batches import ProgressFn
from kitout.evaluate.ask.decoding import KEPT_GENERATION_SETTINGS
from kitout.evaluate.sets.evaluation_set import Asked, EvaluationSet
from kitout.files.atomic import write_text
from kitout.files.part_folders import content_digest
from kitout.route import RouteEntry, adapter_names
from kitout.version import __version__

MAX_BYTES = 1_000_000_000  # of a file that is read


def route_answers(
    asked: Asked, what: EvaluationSet, routes: Mapping[str, RouteEntry], folder: Path | None,
    on_progress: ProgressFn | None = None, log: Callable[[str], None] = lambda _line: None,
) -> list[Any]:  # fmt: skip
    """The answers to a set under each route: those kept in the folder, and the others asked now and kept there.

    folder: None keeps nothing, and asks for all of them. log: gets a line about those that are taken from there.
    """
    files = {
        name: None if folder is None else answers_file(folder, asked, what, route) for name, route in routes.items()
    }
    found = {name: kept for name, file in files.items() if (kept := read_answers(file, len(what))) is not None}
    if found:
        log(f"{what.name}: answers of {', '.join(found)} are taken from {folder}")
    missing = [name for name in routes if name not in found]
    together = [missing] if what.shares_batches else [[name] for name in missing]
    for names in together if missing else ():
        answers = what.ask(asked, [routes[name] for name in names], on_progress)
        for name, own in zip(names, answers, strict=True):
            write_answers(files[name], len(what), own)
            found[name] = own
    return [found[name] for name in routes]


def answers_file(folder: Path, asked: Asked, what: EvaluationSet, route: RouteEntry) -> Path | None:
    """Where these answers are kept; None where the base's values cannot be read. route: None: the base alone."""
    if not asked.base_digest:
        return None
    own, state = asked.tokenizer, asked.kit.state
    config = {name: value for name, value in asked.kit.config.to_dict().items() if name != "_name_or_path"}
    parts: dict[str, Any] = {
        "base": asked.base_digest,
        "config": [json.dumps(config, sort_keys=True, default=str), str(asked.kit.config._attn_implementation)],
        "dtype": str(asked.kit.dtype),
        "device": asked.kit.device.type,
        "tokenizer": None if own is None else [tokenizer_digest(own), template_digest(own), _special_tokens(own)],
        "generation": _generation_settings(asked.kit.base),
        "set": [what.kind, what.digest],
        "pad_token_id": asked.pad_token_id,
        "max_new_tokens": asked.max_new_tokens,
        "versions": [__version__, torch.__version__, transformers.__version__],
    }
    if route is not None:
        names = state.names_with_parts(adapter_names(route))
        parts["route"] = repr(route)
        parts["adapters"] = {name: content_digest(state, state[name], keep_encoder=False) for name in names}
        parts["dtypes"] = sorted({str(value.dtype) for name in names for value in state[name].parameters()})
    return folder / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}.json"


def _special_tokens(tokenizer: Any) -> list[Any]:
    """What a text begins and ends with, and where a tokenizer cuts it: no digest of its words has that."""
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length]
    return [list(tokenizer("a", verbose=False)["input_ids"]), *ends]


def _generation_settings(base: Any) -> list[Any]:
    """What an answer starts and stops with, and which tokens it may not have: no part of the base's config."""
    own = getattr(base, "generation_config", None)
    return [] if own is None else [getattr(own, name, None) for name in ("eos_token_id", *KEPT_GENERATION_SETTINGS)]


def read_answers(file: Path | None, examples: int) -> Any:
    """What is kept; None where there is nothing, or something else."""
    try:
        if file is None or file.stat().st_size > MAX_BYTES:
            return None
        kept = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return kept.get("answers") if isinstance(kept, dict) and kept.get("examples") == examples else None


def write_answers(file: Path | None, examples: int, answers: Any) -> None:
    """Keeps them; a warning where the folder cannot be written."""
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_text(file, json.dumps({"examples": examples, "answers": answers}))
    except OSError as error:
        warnings.warn(f"answers cannot be kept, and are asked again next time: {error}", stacklevel=3)
