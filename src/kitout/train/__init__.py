"""How it is learnt: `kitout.train(...)`, one loop, one objective per file.

`config` says everything a run depends on, `prepare` makes it, `loop` runs it with `step`, `health` and `keep`, `finish`
leaves what it came to; `images` and `trunk` are the vision demo's own loop. Nothing here knows a file format.
The room itself can be called, so that the same object serves `kitout.train(...)` and `kitout.train.config.schema`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kitout.train.config.schema import RunConfig
    from kitout.train.run import Result


class _CallableModule(ModuleType):
    """The module, callable."""

    def __call__(
        self,
        config: RunConfig | Mapping[str, Any] | str | PathLike[str] | None = None,
        *,
        dry_run: bool = False,
        log: Callable[[str], None] = print,
        **sections: Any,
    ) -> Result:
        """Trains what a config, a mapping or a run.yaml says; goes on where the same call stopped before.

        sections: model=, data=, method=, train=, ... as in a run.yaml, over those of the config. dry_run: stops after
        the pre-flight. say: hears what is told. Raises KitoutError before anything expensive if something is wrong.
        """
        from kitout.train.config.load import load
        from kitout.train.config.schema import RunConfig
        from kitout.train.config.yaml_file import read_yaml
        from kitout.train.run import run

        if isinstance(config, RunConfig):
            held = config.to_dict()
        else:
            held = (
                dict(config) if isinstance(config, Mapping) else {} if config is None else dict(read_yaml(Path(config)))
            )
        return run(load(held | sections), dry_run=dry_run, log=log)


sys.modules[__name__].__class__ = _CallableModule
