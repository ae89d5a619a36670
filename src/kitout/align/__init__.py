"""RLHF: preference losses, reward models and reinforcement on one frozen base; `kitout.align(...)`.

`config` describes the stages; each is a run of `kitout.train` with an objective of its own. The package itself can be
called, so that the same object serves `kitout.align(...)` and `kitout.align.config.schema`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from os import PathLike
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kitout.align.config.schema import AlignConfig
    from kitout.train.run import Result


class _AlignModule(ModuleType):
    """A module that can be called."""

    def __call__(
        self,
        config: AlignConfig | Mapping[str, Any] | str | PathLike[str] | None = None,
        *,
        stage: str | None = None,
        dry_run: bool = False,
        log: Callable[[str], None] = print,
        **settings: Any,
    ) -> Result:
        """Trains the stages that a config, a mapping or a run.yaml describes, one after the other; resumes them too.

        stage: a kind (sft, reward, dpo, orpo, simpo, kto, grpo, rloo, ppo), for one stage alone. settings: model=,
        output=, stages=, over those of the config; of one stage also data=, from_=, reward=, method=, loss=, rollout=,
        train=, evaluate=. dry_run: stops after the pre-flight. log: gets the lines to print. The result is that of the
        last stage. KitoutError before anything expensive if something is wrong.
        """
        from kitout.align.config.load import load_align, read_values
        from kitout.align.start import start

        values = read_values(config)
        if "from_" in settings:
            settings["from"] = settings.pop("from_")
        kind = {} if stage is None else {"kind": stage}
        return start(load_align(values | kind | settings, log), dry_run=dry_run, log=log)


sys.modules[__name__].__class__ = _AlignModule
