"""The base's answers, kept: it is asked once for each set of examples, whatever adapters are measured afterwards.

A file is named by a digest of all that the answers depend on: the base's values and config, its dtype and tokenizer,
the examples, the settings, the versions. A file that cannot be read is asked again; a folder that cannot be written
costs the next run the same work, and this one nothing. It knows no metric.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from kitout.assets.store import cache_dir
from kitout.data.encode.tokenizer_digest import template_digest, tokenizer_digest
from kitout.evaluate.ask.batches import ProgressFn
from kitout.evaluate.sets.evaluation_set import Asked, EvaluationSet
from kitout.files.atomic import write_text
from kitout.version import __version__

MAX_BYTES = 1_000_000_000  # of a file that is read


def base_answers(asked: Asked, what: EvaluationSet, on_progress: ProgressFn | None = None, keep: bool = True) -> Any:
    """The base's answers to a set: those that are kept, or asked now and then kept. keep: False does neither."""
    file = _file(asked, what) if keep and asked.base_digest else None
    found = None if file is None else _read(file, len(what))
    if found is not None:
        return found
    (answers,) = what.ask(asked, [None], on_progress)
    if file is None:
        return answers
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_text(file, json.dumps({"examples": len(what), "answers": answers}))
    except OSError as error:
        warnings.warn(f"the base's answers cannot be kept, and are asked again next time: {error}", stacklevel=2)
    return answers


def _file(asked: Asked, what: EvaluationSet) -> Path:
    own = asked.tokenizer
    config = {name: value for name, value in asked.kit.config.to_dict().items() if name != "_name_or_path"}
    parts = {
        "base": asked.base_digest,
        "config": [json.dumps(config, sort_keys=True, default=str), str(asked.kit.config._attn_implementation)],
        "dtype": str(asked.kit.dtype),
        "device": asked.kit.device.type,
        "tokenizer": None if own is None else [tokenizer_digest(own), template_digest(own)],
        "set": [what.kind, what.digest],
        "pad_token_id": asked.pad_token_id,
        "max_new_tokens": asked.max_new_tokens,
        "versions": [__version__, torch.__version__, transformers.__version__],
    }
    return cache_dir() / "base-answers" / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}.json"


def _read(file: Path, examples: int) -> Any:
    """What is kept; None where there is nothing, or something else."""
    try:
        if file.stat().st_size > MAX_BYTES:
            return None
        kept = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return kept.get("answers") if isinstance(kept, dict) and kept.get("examples") == examples else None
