"""By how much an adapter raises the bits per byte of plain English (`wiki`): what a search may limit.

The set and the base's kept answers are those of the quick suite of forgetting. It knows a prepared run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kitout.errors import ConfigError
from kitout.evaluate.sets.evaluation_set import Asked
from kitout.evaluate.sets.outcome import forgetting_of, measure_set
from kitout.evaluate.sets.suites import TEXTS, suite_sets
from kitout.train.setup.base_model import choose_pad_token
from kitout.train.setup.prepare import PreparedRun

SUITE = "quick"


def wiki_rises(run: PreparedRun, names: Sequence[str], seed: int, log: Callable[[str], None]) -> dict[str, float]:
    """Bits per byte more than the base's, by adapter."""
    asked = Asked(run.kit, run.tokenizer, choose_pad_token(run.kit.config, run.tokenizer))
    texts = next(one for one in suite_sets(SUITE, run.tokenizer, seed, log) if one.name == TEXTS)
    log(f"measuring forgetting of {', '.join(names)} on {texts.name}, {len(texts):,} texts ...")
    outcome = measure_set(asked, texts, {name: name for name in names}, seed, True)
    return {name: forgetting_of([outcome], name)[0].change.difference for name in names}


def check_forgets(run: PreparedRun) -> None:
    """ConfigError where the model is no decoder that writes text."""
    if (run.task.used_as or run.objective) != "causal_lm":
        raise ConfigError(
            f"goal.max_forgetting asks a language model (objective=causal_lm), and the run has objective="
            f"{run.objective}: leave it out"
        )
