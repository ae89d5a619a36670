"""What `align` trains, ours and TRL's: a random Llama and random data in a folder, and the stages over them.

kitout is what `kitout align` runs: the stage from its config, prepared, with the dtype, attention and micro-batch that
it chooses by itself; a step is everything from its beginning to the next one's (answers, rewards, reference, update,
logs). TRL 1.16 with PEFT has a LoRA of the same rank and targets, no checkpointing, and is tried in float32 and
bfloat16, eager and sdpa. `python align_stages.py CASE FOLDER` runs one case for its memory.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from training import Tuning
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from kitout.align.config.load import load_align
from kitout.align.config.schema import StageRun
from kitout.align.reinforce import Reinforcement
from kitout.align.run import OfflineStage, run_stage
from kitout.align.tasks import task_of
from kitout.base import memory
from kitout.train.loop.base_mode import training_mode
from kitout.train.run import build_trainer as build_sft
from kitout.train.run import opened_run_folder, resolve_placement, run_signature
from kitout.train.setup.prepare import PreparedRun, prepare

PROMPT, ANSWER = 32, 32  # tokens
PROMPTS, SAMPLES, PAIRS = 4, 8, 8  # of a step
RANK = 8
STEPS = 5  # of one run; those after the first two are timed
SHAPES = {
    "d256": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4},
    "smollm2": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
}  # fmt: skip


def folder_of(shape: str) -> Path:
    """A model of this shape with random values, its tokenizer (a word is a token), and data for every kind of stage."""
    folder = Path(tempfile.mkdtemp()) / shape
    config = LlamaConfig(
        **{"vocab_size": 4096, **SHAPES[shape]}, max_position_embeddings=512, bos_token_id=None, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, config.vocab_size))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(folder)
    rng = random.Random(0)
    texts = [[" ".join(rng.choices(words[3:], k=size)) for size in (PROMPT, ANSWER - 1, ANSWER - 1)] for _ in range(64)]
    names = "prompt", "chosen", "rejected"
    pairs = [dict(zip(names, [prompt, f" {good}", f" {bad}"], strict=True)) for prompt, good, bad in texts]
    for name, rows in {
        "pairs": pairs,
        "prompts": [{"prompt": pair["prompt"]} for pair in pairs],
        "sft": [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs],
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def alternating(prompts: list[Any], completions: list[Any], rows: Any = None, **_: Any) -> list[float]:  # noqa: ARG001
    """A reward that costs nothing, and differs within every group."""
    return [float(i % 2) for i in range(len(completions))]


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Processor seconds of every step but the first two, from its beginning to the next one's."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.marks = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.marks.append(time.process_time())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.last = time.process_time()

    def seconds(self) -> list[float]:
        """The last step's ends with the step, before what ends a run."""
        return [after - before for before, after in pairwise([*self.marks, self.last])][2:]


@dataclass
class Case:
    """A trainer that can be run again and again."""

    train: Callable[[int], object]
    """A run of so many steps."""
    clock: StepClock
    """Of its steps."""
    note: str = ""
    """What it has chosen by itself."""
    stage: Any = None
    """Ours."""
    prepared: Any = None
    """Its set-up."""

    def __call__(self, steps: int) -> list[float]:
        self.train(steps)
        return self.clock.seconds()


# ---- kitout --------------------------------------------------------------------------------------------------------


def stage_config(kind: str, folder: Path, **more: Any) -> StageRun:
    file, form = {
        "dpo": ("pairs", "preference"),
        "reward": ("pairs", "preference"),
        "sft": ("sft", "completion"),
    }.get(kind, ("prompts", "raw_prompts"))
    method = {"name": "LoRA", "rank": RANK, "alpha": 2 * RANK, "targets": "all-linear"}
    data = {"train": {"path": str(folder / f"{file}.jsonl"), "format": form}, "validation": 0, "test": 0}
    train = {"steps": STEPS, "lr": 1e-4, "save_steps": 1000, "epochs": 40}
    values: dict[str, Any] = {
        "kind": kind, "model": {"name": str(folder)}, "method": method, "data": data, "train": train,
        "output": {"folder": tempfile.mkdtemp() + "/run"},
    }  # fmt: skip
    if kind in ("dpo", "sft", "reward"):
        train["batch_size"] = PROMPTS * SAMPLES if kind == "sft" else PAIRS
    else:
        values |= {
            "reward": "align_stages:alternating",
            "rollout": {"prompts": PROMPTS, "samples": SAMPLES, "max_new_tokens": ANSWER},
        }  # fmt: skip
    values |= more
    config = load_align(values)
    return next(iter(config.runs()))


def kitout_case(config: StageRun) -> Case:
    """A stage as `kitout align` trains it; every run starts anew but for the adapter's values."""
    clock = StepClock()
    with opened_run_folder(config) as folder:
        task = None if config.kind == "sft" else task_of(config)
        prepared: PreparedRun = prepare(config, resolve_placement(config, folder), lambda _line: None, task=task)
        signature = run_signature(prepared)
        stage: Any = None
        if config.kind != "sft":
            kind = Reinforcement if config.rollout is not None else OfflineStage
            stage = kind(config, prepared, folder, lambda _line: None)
            stage.prepare(signature, dry_run=False)

    def train(steps: int) -> None:
        if stage is None:
            trainer, estimate = build_sft(prepared, config, folder, None, signature, dict)
        else:
            trainer, estimate = stage.build_trainer(None, signature)
        trainer.args.max_steps = steps
        trainer.display.console.quiet = True
        trainer.add_callback(clock)
        dtype, attention = str(prepared.kit.dtype).removeprefix("torch."), prepared.kit.config._attn_implementation
        case.note = f"{dtype} {attention}, micro-batch {estimate.micro}"
        with trainer.display:
            trainer.train()

    case = Case(train, clock, stage=stage, prepared=prepared)
    return case


def reference_passes(dpo: Case) -> tuple[Case, Case]:
    """Forward and backward of a step's pairs: with the reference that is kept, and with its rows in the same graph."""
    kit, job = dpo.stage.prepared.kit, dpo.stage.job
    objective, items = job.objective, [job.examples[i] for i in job.batches[0]]  # the reference scored what is trained
    weights = torch.full((PAIRS,), 1.0 / PAIRS)

    def kept() -> Tensor:
        batch = objective.collate(items, None)
        with kit.use(job.name):
            return objective.losses(kit, batch, weights).total

    def in_graph() -> Tensor:
        rows = [row for item in items for row in item.rows]
        batch = objective.scorer.collate([*rows, *rows])
        with kit.use([name for name in (job.name, None) for _ in rows]):
            log_probs, _ = objective.scorer(kit, batch)
        policy, reference = log_probs.chunk(2)
        targets = {"owners": batch.targets["owners"][: len(policy)], "reference": reference}
        pairs = replace(batch, targets=targets, num_examples=PAIRS)
        return objective._losses_of_pairs(policy, pairs)[0].mean()

    return _passes(kit, kept), _passes(kit, in_graph)


def _passes(kit: Any, loss: Callable[[], Tensor]) -> Case:
    """The loss is run forward and backward as often as a run has steps that are timed."""
    clock = StepClock()

    def train(steps: int) -> None:
        clock.on_train_begin()
        with training_mode(kit, list(kit.names), False):
            for _ in range(steps):
                clock.on_step_begin()
                loss().backward()
                kit.zero_grad()
                clock.on_step_end()

    return Case(train, clock, stage=loss)


def saved_bytes(passes: Case) -> int:
    """What autograd saves for the backward, without parameters; each storage counts once."""
    sizes: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        if not isinstance(value, torch.nn.Parameter):
            sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        total = passes.stage()
    del total
    return sum(sizes.values())


# ---- TRL -----------------------------------------------------------------------------------------------------------


def _arguments(batch: int, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": batch, "max_steps": STEPS,
        "learning_rate": 1e-4, "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "dataloader_pin_memory": False, "gradient_checkpointing": False, **more,
    }  # fmt: skip


def _shared(folder: Path, tuning: Tuning, file: str) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig

    model = LlamaForCausalLM.from_pretrained(folder, dtype=tuning.dtype, attn_implementation=tuning.attention)
    rows = [json.loads(line) for line in (folder / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()]
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return {
        "model": model, "train_dataset": Dataset.from_list(rows), "peft_config": lora,
        "processing_class": AutoTokenizer.from_pretrained(folder),
    }  # fmt: skip


def grpo_peer(folder: Path, tuning: Tuning, beta: float = 0.04) -> Case:
    from trl import GRPOConfig, GRPOTrainer

    clock = StepClock()
    args = GRPOConfig(
        **_arguments(PROMPTS * SAMPLES), num_generations=SAMPLES, max_completion_length=ANSWER, beta=beta,
    )  # fmt: skip
    trainer = GRPOTrainer(reward_funcs=alternating, args=args, callbacks=[clock], **_shared(folder, tuning, "prompts"))
    return Case(_short_run(trainer), clock, str(tuning))


def _short_run(trainer: Any) -> Callable[[int], object]:
    def train(steps: int) -> None:
        trainer.args.max_steps = steps
        trainer.train()

    return train


def dpo_peer(folder: Path, tuning: Tuning, is_precomputed: bool = False) -> Case:
    from trl import DPOConfig, DPOTrainer

    clock = StepClock()
    args = DPOConfig(**_arguments(PAIRS), precompute_ref_log_probs=is_precomputed)
    trainer = DPOTrainer(args=args, callbacks=[clock], **_shared(folder, tuning, "pairs"))
    return Case(_short_run(trainer), clock, str(tuning))


# ---- memory --------------------------------------------------------------------------------------------------------


def main() -> None:
    """One case in this process: its weights and its peak, as JSON. "parents" trains what PPO starts from."""
    which, where = sys.argv[1:]
    folder = Path(where)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    device = torch.device("cpu")
    parents = {kind: str(folder / kind) for kind in ("sft", "reward")}
    if which == "parents":
        for kind, output in parents.items():
            config = stage_config(kind, folder, output={"folder": output})
            small = config.model_copy(update={"train": config.train.model_copy(update={"steps": 1, "batch_size": 2})})
            run_stage(small, log=lambda _line: None)
        print("{}")
        return
    more: dict[str, Any] = {}
    if which == "ppo":
        more = {"from": f"{parents['sft']}/adapter", "reward": f"{parents['reward']}/adapter"}
    empty = memory.current(device)
    case = kitout_case(stage_config(which, folder, **more))
    loaded = memory.current(device)
    memory.reset_peak(device)
    case(steps=2)
    kit = case.prepared.kit
    base = size_of(kit.base.parameters())
    adapters = {name: size_of(kit[name].parameters()) for name in kit.names}
    peak = memory.peak(device)
    print(json.dumps({
        "dtype": str(kit.dtype).removeprefix("torch."), "base": base, "adapters": adapters,
        "weights": base + sum(adapters.values()), "peak": peak - empty, "above_loaded": peak - loaded,
    }))  # fmt: skip


def size_of(parameters: Iterable[Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in parameters)


if __name__ == "__main__":
    main()
