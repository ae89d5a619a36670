"""The reference of a stage: its log-probabilities over a data set, computed once and kept beside the run.

The reference is the base, or a frozen adapter. It is never in a training step's graph: its values are read by row. The
file `reference.safetensors` holds them under a key of data, base and adapter, so a resumed run does not compute them
again and another run never takes them. It knows rows and routes, and no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kitout.align.config.schema import StageRun
from kitout.align.objectives.scored_answers import AnswerScorer
from kitout.base.eval_mode import eval_mode
from kitout.data.encode.item import EncodedExample
from kitout.files.atomic import write_bytes
from kitout.kit import Kit
from kitout.train.loop import distributed
from kitout.train.measure.predict import ProgressFn, plan_lengths
from kitout.train.setup.parent import load_parts
from kitout.train.setup.prepare import PreparedRun

REFERENCE = "reference"  # the name on the kit of the frozen adapter that a policy starts from
STARTING = "starting adapter"  # the same, where the trained one is compared with it
REFERENCE_FILE = "reference.safetensors"
LOG_PROBS, LENGTHS, KEY = "log_probs", "lengths", "key"


class Unscored(dict[EncodedExample, Tensor]):
    """In the place of scores where a step is tried for its time and memory alone: zeros."""

    def __missing__(self, row: EncodedExample) -> Tensor:
        return torch.zeros(row.num_targets)


def score_rows(
    kit: Kit, scorer: AnswerScorer, rows: Sequence[EncodedExample], adapter: str | None,
    on_progress: ProgressFn | None = None,
) -> list[Tensor]:  # fmt: skip
    """Of each row the log-probability of every token of its answer, [T] of float32 on the CPU.

    adapter: whose; None: the base's. Dropout is off. Processes divide the rows.
    """
    own = distributed.my_slice(range(len(rows)))
    found: list[tuple[int, Tensor]] = []
    with eval_mode(kit.base, kit), kit.use(adapter):
        for batch_of in plan_lengths([rows[i].length for i in own]):
            if on_progress is not None:
                on_progress(len(found), len(own))
            indices = [own[i] for i in batch_of]
            batch = scorer.collate([rows[i] for i in indices])
            log_probs, _ = scorer(kit, batch)
            counts = [rows[i].num_targets for i in indices]
            found += zip(indices, log_probs.float().cpu().split(counts), strict=True)
    return [scores for _, scores in sorted(distributed.all_gather(found), key=lambda pair: pair[0])]


def reference_scores(
    kit: Kit, scorer: AnswerScorer, rows: Sequence[EncodedExample], adapter: str | None, folder: Path, key: str,
    on_progress: ProgressFn | None = None,
) -> dict[EncodedExample, Tensor]:  # fmt: skip
    """`score_rows` of each different row, from the folder's file where that has this key.

    key: of everything that the values depend on.
    """
    distinct = list(dict.fromkeys(rows))
    scores = _read(folder / REFERENCE_FILE, key, [row.num_targets for row in distinct])
    if scores is None:
        scores = score_rows(kit, scorer, distinct, adapter, on_progress)
        if distributed.rank() == 0:
            _write(folder / REFERENCE_FILE, key, scores)
    return dict(zip(distinct, scores, strict=True))


def load_start(config: StageRun, prepared: PreparedRun) -> str | None:
    """What the policy starts from, added to the kit and frozen; None: the base, or a stage that writes no text.

    It is the reference of a loss that has one, and for every loss what the policy is compared with at the end.
    """
    parent = prepared.parents.get(prepared.jobs[0].name)
    if parent is None or not config.of_kind.writes_text:
        return None
    load_parts(prepared.kit, {REFERENCE: parent})
    return REFERENCE


def _write(file: Path, key: str, scores: Sequence[Tensor]) -> None:
    lengths = torch.tensor([len(one) for one in scores], dtype=torch.int64)
    write_bytes(file, save({LOG_PROBS: torch.cat(list(scores)), LENGTHS: lengths}, {KEY: key}))


def _read(file: Path, key: str, lengths: Sequence[int]) -> list[Tensor] | None:
    """None where there is no such file, or it is of something else."""
    try:
        with safe_open(file, framework="pt") as opened:
            if (opened.metadata() or {}).get(KEY) != key:
                return None
            values, counts = opened.get_tensor(LOG_PROBS), opened.get_tensor(LENGTHS).tolist()
    except (OSError, SafetensorError):
        return None
    return list(values.split(counts)) if counts == list(lengths) else None
