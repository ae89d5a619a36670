"""Keys of PEFT, the Trainer, TRL, Axolotl and LLaMA-Factory are errors that say what to write, which is a setting."""

from __future__ import annotations

import re

import pytest

from kitout import LoRA, PrefixTuning
from kitout.errors import ConfigError
from kitout.methods import Houlsby
from kitout.train.config.describe import sections
from kitout.train.config.foreign_keys import ELSEWHERE_BY_SETTING, LEAVE_OUT
from kitout.train.config.load import load

KEYS = [
    ("learning_rate", "train.lr"), ("train.learning_rate", "train.lr"), ("train.learning-rate", "train.lr"),
    ("train.LearningRate", "train.lr"), ("jobs.0.train.learning_rate", "jobs.0.train.lr"), ("lr", "train.lr"),
    ("batch", "train.batch_size"), ("num_train_epochs", "train.epochs"), ("train.num_train_epochs", "train.epochs"),
    ("per_device_train_batch_size", "train.batch_size"), ("gradient_accumulation_steps", "train.batch_size"),
    ("target_modules", "method.targets"), ("r", "method.rank"), ("lora_alpha", "method.alpha"),
    ("train.r", "method.rank"), ("model.load_in_4bit", "model.quantization=nf4"), ("bf16", "model.dtype=bfloat16"),
    ("base_model", "model.name"), ("output_dir", "output.folder"), ("train.max_length", "data.max_length"),
    ("sequence_len", "data.max_length"), ("cutoff_len", "data.max_length"), ("val_set_size", "data.validation"),
    ("warmup_steps", "train.warmup_ratio"), ("train.gradient_checkpointing", "train.activation_checkpointing"),
    ("max_steps", "train.steps"), ("eval_steps", "evaluate.steps"), ("train.labels", "data.labels"),
    ("seed", "data.seed or train.seed"), ("lr_scheduler_type", "train.lr_schedule"), ("rank", "method.rank"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "setting"), KEYS)
def test_the_error_says_what_to_write(key: str, setting: str) -> None:
    values: dict = {"model": {"name": "m"}, "data": {"train": "d"}, "jobs": [{"name": "a", "train": {}}]}
    *parents, last = key.split(".")
    inner = values
    for parent in parents:
        inner = inner[int(parent)] if parent.isdigit() else inner.setdefault(parent, {})
    inner[last] = 1
    with pytest.raises(ConfigError, match=re.escape(f"{key}: there is no such setting; write {setting}")):
        load(values)


def test_what_is_always_so_can_be_left_out() -> None:
    with pytest.raises(ConfigError, match="optim: there is no such setting; leave it out: the optimizer is AdamW"):
        load({"model": "m", "data": "d", "optim": "adamw_torch"})


def test_what_is_advised_exists() -> None:
    known = {
        f"{s.name}.{one.name}".replace("data.train.0", "data.train").lstrip(".")
        for s in sections()
        for one in s.settings
    }
    known |= {f"method.{name}" for cls in (LoRA, PrefixTuning, Houlsby) for name in cls.model_fields}
    advised = {re.split(r"[ =]", setting)[0] for setting in ELSEWHERE_BY_SETTING}
    assert advised <= known


def test_every_key_is_written_once() -> None:
    keys = [key for names in (*ELSEWHERE_BY_SETTING.values(), *LEAVE_OUT.values()) for key in names.split()]
    assert sorted(set(keys)) == sorted(keys)
