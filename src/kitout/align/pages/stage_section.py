"""What a stage's pages say of the stage itself: its kind, its loss, its reference and its rewards.

Paths are named as they are on any machine, because a card travels. It knows a stage's settings, and no run.
"""

from __future__ import annotations

from collections.abc import Sequence

from kitout.align.config.kinds import KINDS
from kitout.align.config.schema import StageRun
from kitout.evaluate.report.section import Section
from kitout.evaluate.report.summary import format_fact

OF_LOSS, OF_ROLLOUT = "loss", "rollout"


def stage_section(config: StageRun, reference: str | None, rewards: Sequence[tuple[str, float]] = ()) -> Section:
    """reference: its name, None: there is none. rewards: each source with its weight."""
    rows = [("stage", "what it is"), (config.kind, KINDS[config.kind].title)]
    if config.loss is not None:
        rows.append((OF_LOSS, _settings(config.loss.model_dump(by_alias=True))))
    if config.rollout is not None:
        rows.append((OF_ROLLOUT, _settings(config.rollout.model_dump(by_alias=True))))
    if reference is not None:
        rows.append(("reference", "the frozen base" if reference == "base" else "the adapter that it started from"))
    rows += [("reward", name if weight == 1 else f"{name}, times {format_fact(weight)}") for name, weight in rewards]
    return Section(title="The stage", table=rows, is_printed=False)


def _settings(values: dict[str, object]) -> str:
    return ", ".join(f"{name}={format_fact(value)}" for name, value in values.items() if value is not None)
