"""Training: `kitout.train(...)`, one loop, one objective per file.

`config` describes a run, `setup` builds what it needs, `preflight` shows it, `loop` trains it, `measure` evaluates it,
and `outputs` writes what is kept. The package itself can be called, so that the same object serves
`kitout.train(...)` and `kitout.train.config.schema`.
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
    """A module that can be called."""

    def __call__(
        self,
        config: RunConfig | Mapping[str, Any] | str | PathLike[str] | None = None,
        *,
        dry_run: bool = False,
        log: Callable[[str], None] = print,
        **sections: Any,
    ) -> Result:
        """Trains what a config, a mapping or a run.yaml describes; the same call resumes a run that was stopped.

        sections: model=, data=, method=, train=, ... as in a run.yaml, over those of the config. dry_run: stops after
        the pre-flight. log: gets the lines to print. KitoutError before anything expensive if something is wrong.
        """
        from kitout.train.config.load import load
        from kitout.train.config.schema import RunConfig
        from kitout.train.config.yaml_file import read_yaml
        from kitout.train.start import start

        if isinstance(config, RunConfig):
            values = config.to_dict()
        elif isinstance(config, Mapping):
            values = dict(config)
        else:
            values = {} if config is None else read_yaml(Path(config))
        return start(load(values | sections, log), dry_run=dry_run, log=log)


sys.modules[__name__].__class__ = _CallableModule
