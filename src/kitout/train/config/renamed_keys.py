"""Settings and values of earlier versions, and what they are called now.

A config that holds one is an error that names the new one; the run.yaml that an older run folder holds is translated.
It knows names, and no type of any setting.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

RENAMED_KEYS = {
    "model.quantise": "model.quantization",
    "data.learn": "data.train_on",
    "data.template": "data.chat_template_kwargs",
    "data.train.*.instruction": "data.train.*.system_prompt",
    "train.batch": "train.batch_size",
    "train.micro_batch": "train.micro_batch_size",
    "train.decay": "train.weight_decay",
    "train.ratio": "train.loraplus_lr_ratio",
    "train.warmup": "train.warmup_ratio",
    "train.schedule": "train.lr_schedule",
    "train.clip": "train.max_grad_norm",
    "train.checkpointing": "train.activation_checkpointing",
    "train.patience": "train.early_stopping_patience",
    "train.save_every": "train.save_steps",
    "train.keep": "train.keep_checkpoints",
    "train.shard": "train.fsdp",
    "evaluate.every": "evaluate.steps",
    "evaluate.generate": "evaluate.generate_examples",
    "evaluate.test": "evaluate.max_test_examples",
    "evaluate.shown": "evaluate.show_examples",
    "evaluate.best": "evaluate.best_metric",
}
RENAMED_OBJECTIVES = {
    "causal": "causal_lm",
    "seq2seq": "seq2seq_lm",
    "classify": "classification",
    "regress": "regression",
    "tokens": "token_classification",
    "images": "image_classification",
}


def new_key(location: str) -> str | None:
    """`jobs.1.train.batch` -> `jobs.1.train.batch_size`; None for a setting that never had another name."""
    job, key = re.fullmatch(r"((?:jobs|stages)\.\d+\.)?(.*)", location, re.DOTALL).groups("")  # type: ignore[union-attr]
    new = RENAMED_KEYS.get(re.sub(r"\.\d+\.", ".*.", key))
    if new is None:
        return None
    above, _, _ = key.rpartition(".")
    return f"{job}{above}.{new.rpartition('.')[2]}"


def translate(values: Mapping[str, Any]) -> dict[str, Any]:
    """A run.yaml of an earlier version with the names of today; what has today's names stays as it is."""
    translated: dict[str, Any] = _translate(values, "")
    objective = translated.get("objective")
    if isinstance(objective, str):
        translated["objective"] = RENAMED_OBJECTIVES.get(objective, objective)
    return translated


def _translate(value: Any, location: str) -> Any:
    if isinstance(value, list):
        return [_translate(entry, f"{location}.{i}") for i, entry in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    translated = {}
    for key, inner in value.items():
        inner_location = f"{location}.{key}" if location else str(key)
        new = new_key(inner_location)
        translated[new.rpartition(".")[2] if new else key] = _translate(inner, inner_location)
    return translated
