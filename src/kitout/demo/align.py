"""`kitout demo align`: a preset of `kitout align` on a small language model, from sums to preferences in one file.

It learns sums from a few right answers (sft), then from its own answers and their rewards (grpo); beside them a reward
model and DPO on pairs. Then it asks what the adapters changed elsewhere (`kitout.assess`). It turns a few options into
stages and their results into one table, and trains and measures nothing itself. Learning rates are those of the kinds
where these learn in minutes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kitout.align.config.load import load_align
from kitout.align.config.schema import ADAPTER, AlignConfig
from kitout.align.start import start
from kitout.assets.catalog import ASSETS
from kitout.assets.store import fetch_asset
from kitout.data.read.sources import without_slice
from kitout.evaluate.compare import format_value
from kitout.evaluate.metrics.registry import metric_title
from kitout.format import align_columns
from kitout.train.run_folder import RESULTS_FILE

MODEL, PAIRS, ELSEWHERE = "smollm2-135m", "nq-pairs", ("piqa", "wiki")
# Two numbers of one or two digits: by default up to six of four, of which a small model learns nothing in minutes.
TASK = "gym:chain_sum:max_terms=2:max_digits=2"
SYSTEM_PROMPT, PAIRS_SYSTEM_PROMPT = "Answer with a number.", "Answer in a few words."
MAX_NEW_TOKENS = 8  # a sum has at most 4, and the end
# Three times the kind's own, which is for longer runs, and constant. After 48 right answers grpo raises the reward with
# each of three seeds; after ten times as many it does so with some (docs/results/align.md, the first two tasks).
GRPO_LR, GRPO_SCHEDULE = 3e-4, "constant"
# Ten times the kind's own: after 24 steps of 8 pairs the loss was 0.66 at 1e-3 and 0.69, as at the start, at 1e-4.
DPO_LR = 1e-3
SFT_STEPS, GRPO_STEPS, PAIR_STEPS = 6, 60, 60
NUM_PROMPTS, NUM_PAIRS, NUM_TEST, NUM_ELSEWHERE = 2000, 1000, 300, 100
TITLES = {
    "sft": "sums: the base, then sft",
    "grpo": "sums: sft, then grpo",
    "reward": "pairs: the longer answer, then the reward model",
    "dpo": "pairs: the base, then dpo",
}
FINAL = ("grpo", "dpo")  # the stages whose adapters are asked something else


@dataclass(frozen=True, kw_only=True)
class AlignDemo:
    """The options of the command line."""

    model: Path | None = None
    """A model folder; None: the built-in one."""
    task: str = TASK
    """A task of reasoning-gym, with its settings."""
    pairs: Path | None = None
    """A table of prompts with a chosen and a rejected answer; None: the built-in pairs."""
    elsewhere: tuple[str, ...] = ELSEWHERE
    """Sets that say what the adapters changed elsewhere; none: it is not measured."""
    out: Path = Path("runs/demo-align")
    """Holds a folder for each stage."""
    scale: float = 1.0
    """All numbers of steps and of examples are multiplied by this."""
    seed: int = 0
    """Of the splits, the initial values, the order of examples and what is sampled."""

    def count(self, number: int) -> int:
        """A number of steps or examples, scaled."""
        return max(4, round(number * self.scale))


def preset(options: AlignDemo) -> AlignConfig:
    """The stages that the options describe."""
    count, seed = options.count, options.seed
    held_out = {"validation": 0, "test": count(NUM_TEST), "seed": seed}
    sums = {"train": [{"path": options.task, "system_prompt": SYSTEM_PROMPT, "limit": count(NUM_PROMPTS)}], **held_out}
    pairs = {
        "train": [
            {"path": str(options.pairs or PAIRS), "system_prompt": PAIRS_SYSTEM_PROMPT, "limit": count(NUM_PAIRS)}
        ],
        **held_out,
    }
    evaluate = {"max_test_examples": count(NUM_TEST), "show_examples": 4}
    of_pairs = {"data": pairs, "evaluate": {"max_test_examples": count(NUM_TEST)}}
    pair_steps = {"steps": count(PAIR_STEPS), "batch_size": 8, "seed": seed}
    return load_align(
        {
            "model": str(options.model or MODEL),
            "output": str(options.out),
            "stages": [
                {
                    "kind": "sft", "data": sums,
                    "train": {"steps": count(SFT_STEPS), "batch_size": 8, "seed": seed},
                    "evaluate": {**evaluate, "max_new_tokens": MAX_NEW_TOKENS},
                },
                {
                    "kind": "grpo", "data": sums, "from": "sft", "reward": options.task,
                    "rollout": {"prompts": 4, "samples": 8, "max_new_tokens": MAX_NEW_TOKENS},
                    "train": {
                        "steps": count(GRPO_STEPS), "lr": GRPO_LR, "lr_schedule": GRPO_SCHEDULE, "seed": seed,
                    },
                    "evaluate": evaluate,
                },
                {"kind": "reward", **of_pairs, "train": pair_steps},
                {"kind": "dpo", **of_pairs, "train": {**pair_steps, "lr": DPO_LR}},
            ],
        }
    )  # fmt: skip


def demo(options: AlignDemo, log: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Trains the stages, measures what is left elsewhere and prints one table; finished stages are not trained again.

    The result is the table's rows: what, metric, base, tuned, difference and its interval, as results.json has them.
    """
    config = preset(options)
    for name in dict.fromkeys(without_slice(one) for one in options.elsewhere if without_slice(one) in ASSETS):
        fetch_asset(name, log)  # before what takes long
    start(config, log=log)
    changes = list(_stage_changes(config))
    changes += _changes_elsewhere(config, options, log)
    log("\nWhat was learned, on held-out examples, with 95 % intervals")
    for line in align_columns([("", "metric", "examples", "before", "after", "difference"), *map(_row, changes)]):
        log(line)
    log("a difference whose interval holds 0 may be chance")
    for name in dict.fromkeys((str(options.model or MODEL), str(options.pairs or PAIRS))):
        if name in ASSETS and ASSETS[name].caveat:
            log(f"note: {name}: {ASSETS[name].caveat}")
    for stage in config.stages:
        log(f"{stage.name}: {config.folder_of(stage.name)}")
    log("on your own data: kitout align --example > run.yaml; kitout align run.yaml")
    return changes


def _stage_changes(config: AlignConfig) -> Iterator[dict[str, Any]]:
    """Of each stage's results how many answers are right, else the headline."""
    for stage in config.stages:
        results = json.loads((config.folder_of(stage.name).expanduser() / RESULTS_FILE).read_text(encoding="utf-8"))
        for changes in results["comparisons"].values():
            # sums are right or wrong; a reward has a part for a part of the answer
            exact = (one for one in changes if one["name"] == "exact_match")
            yield {"what": TITLES[stage.name], **next(exact, changes[0])}


def _changes_elsewhere(
    config: AlignConfig, options: AlignDemo, log: Callable[[str], None]
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Base against the last adapters, on sets that they were not trained for."""
    if not options.elsewhere:
        return
    from kitout.assess import run
    from kitout.predict.load import load

    predictor = load(*(config.folder_of(name) / ADAPTER for name in FINAL), base=config.model.name)
    sources = [{"path": name, "limit": options.count(NUM_ELSEWHERE)} for name in options.elsewhere]
    assessment = run(
        predictor.kit, predictor.loaded, sources, tokenizer=predictor.tokenizer, usages=predictor.usages,
        seed=options.seed, log=log,
    )  # fmt: skip
    for outcome in assessment.sets:
        for name, changes in outcome.changes.items():
            yield {"what": f"{outcome.name}: the base, then {name}", **asdict(changes[0])}


def _row(change: Mapping[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    share = change["base"]["share"]
    unit = " points" if share else ""
    low, high = (format_value(change[end], share, True) for end in ("low", "high"))
    return (
        change["what"],
        metric_title(change["name"], change["tuned"].get("note", "")),
        f"{change['base']['n']:,}",
        _with_interval(change["base"]),
        _with_interval(change["tuned"]),
        f"{format_value(change['difference'], share, True)} ({low} to {high}){unit}",
    )


def _with_interval(score: Mapping[str, Any]) -> str:
    value, low, high = (format_value(score[name], score["share"]) for name in ("value", "low", "high"))
    return f"{value}{' %' if score['share'] else ''} ({low} to {high})"
