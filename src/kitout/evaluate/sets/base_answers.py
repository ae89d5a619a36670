"""The base's answers, kept: it is asked once for each set of examples, whatever adapters are measured afterwards.

A file is named by a digest of all that the answers depend on: the base's values, its dtype and tokenizer, the examples,
the settings, the versions. A file that cannot be read is asked again. It knows no metric.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from kitout.assets.store import cache_dir
from kitout.data.encode.tokenizer_digest import template_digest, tokenizer_digest
from kitout.evaluate.ask.batches import ProgressFn
from kitout.evaluate.sets.evaluation_set import Asked, EvaluationSet
from kitout.files.atomic import write_text
from kitout.files.base_fingerprint import fingerprint
from kitout.version import __version__

MAX_BYTES = 1_000_000_000  # of a file that is read


def base_answers(asked: Asked, what: EvaluationSet, on_progress: ProgressFn | None = None, keep: bool = True) -> Any:
    """The base's answers to a set: those that are kept, or asked now and then kept. keep: False does neither."""
    file = _file(asked, what)
    if keep:
        found = _read(file)
        if found is not None:
            return found
    (answers,) = what.ask(asked, [None], on_progress)
    if keep:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_text(file, json.dumps(answers))
    return answers


def _file(asked: Asked, what: EvaluationSet) -> Path:
    parts = {
        "base": fingerprint(asked.kit.state, ()).model_dump_json(),
        "dtype": str(asked.kit.dtype),
        "device": asked.kit.device.type,
        "tokenizer": [tokenizer_digest(asked.tokenizer), template_digest(asked.tokenizer)],
        "set": [what.kind, what.digest],
        "max_new_tokens": asked.max_new_tokens,
        "versions": [__version__, torch.__version__, transformers.__version__],
    }
    return cache_dir() / "base-answers" / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}.json"


def _read(file: Path) -> Any:
    try:
        if file.stat().st_size > MAX_BYTES:
            return None
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
