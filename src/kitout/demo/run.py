"""The demo from end to end: data, base measured, adapter trained, measured again, compared, merged, kept.

Everything it prints was computed in this run. `Options` is what the command line can change. It knows the order of the
work; how each part is done is in the modules beside it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import kitout
from kitout import Kit, LoRA
from kitout.assets import store
from kitout.assets.catalog import ASSETS
from kitout.base import memory
from kitout.data.read.tables import DataError
from kitout.demo import data, report, score
from kitout.demo.data import Split
from kitout.demo.screen import Screen
from kitout.demo.task import TWEETS, Task
from kitout.demo.train import Progress, Settings, train
from kitout.files.base_fingerprint import fingerprint
from kitout.train.setup import device

NAME = "demo"
BASE, DATA = "smollm2-135m", "tweets"
SMALL = 1_000_000_000  # parameters


@dataclass(frozen=True)
class Options:
    """model and data None: the embedded ones."""

    model: Path | None = None
    data: Path | None = None
    text: str | None = None
    label: str | None = None
    instruction: str | None = None
    out: Path = Path("runs/demo")
    train: int = 1280
    test: int = 600
    shown: int = 6
    dtype: str = "auto"
    data_seed: int = 0
    settings: Settings = field(default_factory=Settings)


def run(options: Options, screen: Screen) -> dict[str, Any]:
    """Does it all and returns what `results.json` holds."""
    split = _data(options, screen)
    where = device.device()
    form, why = device.dtype(options.dtype, where)
    kit, task, model = _equip(options, split, where, form, screen)
    count = kit.num_parameters(NAME)
    screen.say(f"{count} by LoRA rank {options.settings.rank}; weights in {str(form)[6:]} ({why})")

    with kit.use(None), screen.phase("measuring the base") as tell:
        base = score.measure(kit, task, split.test, tell)
    base_peak = memory.peak(where)
    kit.use(NAME)
    trained = _train(kit, task, split, options, screen)
    with screen.phase("measuring the tuned model") as tell:
        tuned = score.measure(kit, task, split.test, tell)
    peak = memory.peak(where)
    answers = _answers(kit, task, split, options.shown)
    adapter = options.out / "adapter"
    kit.save(NAME, adapter, metadata={"trained by": "kitout demo", "instruction": task.instruction})
    merged = _merge(kit, task, split, [a["text"] for a in answers])

    results = {
        "model": model,
        "data": _described(options, split),
        "task": {"instruction": task.instruction, "chat": task.chat, "labels": task.labels},
        "settings": asdict(options.settings),
        "machine": device.describe(where) | {"dtype": str(form)[6:]},
        "adapter": {"trainable": count.trainable, "percent": count.percent, "bytes": count.bytes},
        "base": report.figures(base) | {"peak_bytes": base_peak},
        "tuned": report.figures(tuned) | {"peak_bytes": peak},
        "majority": split.majority,
        "training": asdict(trained),
        "answers": answers,
        "merged": merged,
    }
    report.write(options.out / "results.json", results)
    picture = report.picture(options.out / "results.png", results)
    (options.out / "checkpoint.safetensors").unlink(missing_ok=True)  # the run is whole: the next one starts afresh
    report.show(screen, results, adapter, picture)
    kit.detach()
    return results


def _data(options: Options, screen: Screen) -> Split:
    path = options.data or store.get(DATA, screen.say) / "tweets.jsonl"
    split = data.split(data.load(path, options.text, options.label), options.train, options.test, options.data_seed)
    screen.say(
        f"{path.name}: {len(split.train):,} texts to learn from, {len(split.test):,} held out "
        f"({split.dropped:,} duplicates left out); labels {', '.join(split.labels)}"
    )
    return split


def _equip(
    options: Options, split: Split, where: torch.device, form: torch.dtype, screen: Screen
) -> tuple[Kit, Task, dict[str, Any]]:
    """The frozen model with a fresh adapter, the task under its tokenizer, and what is worth noting about the model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    folder = options.model or store.get(BASE, screen.say)
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder} is no model folder: it holds no config.json (a model saved by save_pretrained does)")
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=form).to(where)
    except (OSError, ValueError) as wrong:
        raise DataError(f"{folder} does not load as a language model with its tokenizer: {wrong}") from wrong
    kit = kitout.attach(model)
    if where.type == "cpu":
        # short texts on a CPU: plain attention trains 1.3 times faster than the fused one, whose backward is slow
        model.set_attn_implementation("eager")
    chosen = options.settings
    kit.add(
        NAME,
        LoRA(rank=chosen.rank, alpha=chosen.alpha, targets=chosen.targets, layers=chosen.layers),
        seed=chosen.seed,
    )
    kit.eval()
    instruction = options.instruction or (TWEETS if options.data is None else None)
    about: dict[str, Any] = {"folder": str(folder), "fingerprint": print_of(kit)}
    if options.model is None:
        about |= {"name": BASE, "caveat": ASSETS[BASE].caveat}
    return kit, Task(tokenizer, split.labels, instruction), about


def print_of(kit: Kit) -> str:
    return hashlib.sha256(fingerprint(kit.state, ()).model_dump_json().encode()).hexdigest()


def _described(options: Options, split: Split) -> dict[str, Any]:
    return {
        "file": str(options.data) if options.data else DATA,
        "seed": options.data_seed,
        "train": len(split.train),
        "test": len(split.test),
        "duplicates": split.dropped,
        "train_sha256": data.digest(split.train),
        "test_sha256": data.digest(split.test),
    }


def _train(kit: Kit, task: Task, split: Split, options: Options, screen: Screen) -> Progress:
    pairs = [(task.encode(e.text), task.answer(e)) for e in split.train]
    same = {  # a checkpoint is continued only if all of this is the same
        "settings": asdict(options.settings),
        "model": print_of(kit),
        "pairs": hashlib.sha256(json.dumps(pairs).encode()).hexdigest(),
        "dtype": str(kit.dtype),
        "versions": [kitout.__version__, torch.__version__, sys.byteorder],
    }
    file = options.out / "checkpoint.safetensors"
    with screen.phase("training") as bar:

        def tell(done: Progress) -> None:
            loss = sum(done.losses[-10:]) / max(1, len(done.losses[-10:]))
            speed = f"{done.tokens / done.seconds:,.0f} tokens/s" if done.seconds else ""
            resumed = f"resumed at {done.resumed_at[-1]}  " if done.resumed_at else ""
            bar(done.step, done.steps, f"{resumed}loss {loss:.3f}  {speed}")

        return train(kit, NAME, pairs, task.end, options.settings, file, json.dumps(same), tell)


def _answers(kit: Kit, task: Task, split: Split, shown: int) -> list[dict[str, str]]:
    """Written answers of both, for the first test texts of each label in turn: nobody picked them."""
    turns = [[e for e in split.test if e.label == label] for label in task.labels]
    chosen = [e for i in range(shown) for turn in turns for e in turn[i : i + 1]][:shown]
    texts = [e.text for e in chosen]
    tuned = score.write(kit, task, texts)
    with kit.use(None):
        base = score.write(kit, task, texts)
    return [
        {"text": e.text, "label": e.label, "base": b, "tuned": t} for e, b, t in zip(chosen, base, tuned, strict=True)
    ]


def _merge(kit: Kit, task: Task, split: Split, texts: list[str], most: int = 32) -> dict[str, Any]:
    """Folds the adapter into the weights and asks again; then takes it out, and the base must be back bit for bit.

    In fp32, where folding is exact: in bf16 the merged weights are rounded once more, and a close call may go the other
    way. A model too large to hold in fp32 besides is asked in its own format.
    """
    if sum(value.numel() for value in kit.base.parameters()) < SMALL:
        kit.float()
    held = {key: value.clone() for key, value in kit.base.state_dict().items()}
    before = _asked(kit, task, split, texts, most)
    kit.merge(NAME)
    after = _asked(kit, task, split, texts, most)
    kit.unmerge()
    return {
        "dtype": str(kit.dtype)[6:],
        "asked": len(before),
        "same": sum(b == a for b, a in zip(before, after, strict=True)),
        "restored_bit_for_bit": all(torch.equal(value, held[key]) for key, value in kit.base.state_dict().items()),
    }


def _asked(kit: Kit, task: Task, split: Split, texts: list[str], most: int) -> list[str]:
    """Written answers to the texts, then the labels chosen for the first test texts."""
    chosen = score.measure(kit, task, split.test[:most], lambda *_: None).chosen
    return [*score.write(kit, task, texts), *chosen]
