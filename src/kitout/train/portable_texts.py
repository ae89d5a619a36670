"""Texts of a run without paths of this machine, for the card of an adapter: it travels, and the folders do not.

Every path that the settings name, and every other absolute path that exists here, becomes its last component; a name of
the hub or of a built-in model or set stays. Texts that are not about files pass unchanged. The run folder's own files
keep their paths. It knows settings, and nothing of cards.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kitout.assets import store
from kitout.evaluate.report.summary import RunSummary
from kitout.files.portable_name import portable_name
from kitout.train.config import yaml_file
from kitout.train.config.schema import RunConfig

# Behind a path a name may go on (a folder's file); in front of one stands no other part of a path.
FRONT, END = r"(?<![\w./\\~-])", r"(?![\w-])"
ABSOLUTE = re.compile(FRONT + r"(?:~|[A-Za-z]:)?[/\\][^\s'\"`,;:()\[\]|<>]+")


def portable_summary(summary: RunSummary, config: RunConfig) -> RunSummary:
    """A summary as a card may show it."""
    shorten = portable_text_fn(config)

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return shorten(value)
        if isinstance(value, Mapping):
            return {key: walk(inner) for key, inner in value.items()}
        return [walk(inner) for inner in value] if isinstance(value, list | tuple) else value

    texts = {name: walk(getattr(summary, name)) for name in ("title", "model", "data", "preflight", "notes")}
    name, separator, rows = summary.data_name.partition("#")
    return replace(
        summary, **texts, data_name=portable_name(name) + separator + rows,
        config=yaml_file.to_yaml(walk(config.to_dict())),
    )  # fmt: skip


def portable_text_fn(config: RunConfig) -> Callable[[str], str]:
    """Text -> the same text without paths: by the settings, then by what exists."""
    short_names: dict[str, str] = {}
    folders = [store.cache_dir() / "assets", Path.cwd()]
    for setting in _path_settings(config):
        path = setting.partition("#")[0]
        short = portable_name(path)
        for spelled in _spellings(path):
            short_names[spelled] = short
            if Path(spelled).is_file():
                folders.append(Path(spelled).parent)
    for folder in folders:
        if len(folder.parts) > 1:
            short_names.setdefault(f"{folder}{os.sep}", "")
    names = sorted((name for name, short in short_names.items() if name and name != short), key=len, reverse=True)
    ends = ["" if name.endswith(os.sep) else END for name in names]
    known = re.compile(FRONT + "(?:" + "|".join(re.escape(n) + end for n, end in zip(names, ends, strict=True)) + ")")

    def shorten(text: str) -> str:
        text = known.sub(lambda found: short_names[found[0]], text)
        return ABSOLUTE.sub(lambda found: _if_it_exists(found[0]), text)

    return shorten


def _path_settings(config: RunConfig) -> Iterator[str]:
    for job in config.per_job():
        yield from (job.model.name, str(job.output.folder), *(source.path for source in job.data.train))
        yield from (value for value in (job.data.validation, job.data.test) if isinstance(value, str))
        if job.train.from_ is not None:
            yield job.train.from_
        yield from job.more_paths()


def _spellings(path: str) -> list[str]:
    """A path as it is written, expanded, absolute and without links: messages hold any of them."""
    try:
        expanded = Path(path).expanduser()
        is_here = expanded.exists()
        found = [path, str(expanded), *([str(expanded.absolute()), str(expanded.resolve())] if is_here else [])]
    except (OSError, RuntimeError, ValueError):  # too long, a zero character, no such home
        return [path]
    return list(dict.fromkeys(found))


def _if_it_exists(path: str) -> str:
    """What looks like a path and is none stays: "/r/python", a label, a word with a slash."""
    end = path.rstrip(".")
    try:
        return portable_name(end) + path[len(end) :] if Path(end).expanduser().exists() else path
    except (OSError, RuntimeError, ValueError):
        return path
