"""What a run takes from outside, by name: its base and its data. Found before anything is loaded, wrong ones together.

A name is a path, a built-in model or set, or what the hub may have. What is on this machine is decided here and needs
no torch; a name that only the hub knows is left to its loader (`in_doubt`). It reads no file but PEFT's config.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from kitout.assets import store
from kitout.assets.catalog import ASSETS
from kitout.data.read.sources import could_be_on_hub, without_slice
from kitout.data.read.tables import READERS
from kitout.errors import ConfigError, DataError, Errors, KitoutError
from kitout.format import short_repr
from kitout.train.config.schema import DataConfig, RunConfig

CLOSE, MIN_PREFIX = 0.8, 5
FILE_SUFFIXES = (*READERS, ".npz", ".xlsx", ".xls", ".zip", ".gz")  # of what is no name on the hub
MODEL_CONFIG = "config.json"
ADAPTER_FILES = ("adapter.json", "adapter_config.json")
TASKS_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # of PEFT, each another model class's
MAX_CONFIG_BYTES = 2**20


@dataclass(frozen=True)
class FoundInputs:
    """What is known of a run's names without loading anything."""

    errors: tuple[KitoutError, ...]
    """Names that are nothing, of the model first."""
    in_doubt: bool
    """Some name may be the hub's."""
    assets: tuple[str, ...]
    """Built-in models and sets among them."""


def find_inputs(config: RunConfig) -> FoundInputs:
    """The base and every file of every job; nothing is read, fetched or loaded."""
    model = config.model.name
    paths = list(dict.fromkeys(path for job in config.per_job() for path in _paths_of(job)))
    errors: dict[str, list[KitoutError]] = {f"model {model}": [*_model_errors(model)]}
    adapters = [
        error
        for name, path in config.model.adapters.items()
        for error in adapter_errors(f"model.adapters.{name}", path)
    ]
    errors |= {path: [*_data_errors(path)] for path in paths}
    assets = [name for name in (_builtin(one) for one in (model, *paths)) if name is not None]
    in_doubt = any(
        not found and _builtin(name) is None and _existing(without_slice(name)) is None
        for (found, name) in zip(errors.values(), (model, *paths), strict=True)
    )
    found_errors = [*adapters, *(error for found in errors.values() for error in found)]
    return FoundInputs(tuple(found_errors), in_doubt, tuple(assets))


def check_inputs(config: RunConfig) -> None:
    """Every wrong name at once, where the hub need not be asked; else `prepare` does it."""
    found = find_inputs(config)
    if not found.in_doubt:
        raise_together(found.errors)


def raise_together(errors: Iterable[KitoutError]) -> None:
    """The one error there is, or one that holds all of them."""
    found = list({str(error): error for error in errors}.values())
    if len(found) == 1:
        raise found[0]
    together = Errors(ConfigError, "the run's config")
    for error in found:
        together.add(str(error))
    together.raise_if_any()


def fetch_inputs(config: RunConfig, log: Callable[[str], None]) -> None:
    """Built-in models and sets that are not here yet. log: gets a line about each."""
    for name in find_inputs(config).assets:
        store.fetch_asset(name, log)


def resolve_model(name: str) -> str:
    """A folder, a built-in model's folder, or the name as the hub knows it."""
    folder = _existing(name)
    return str(folder) if folder is not None and folder.is_dir() else _asset_folder(name) or name


def resolve_data(path: str) -> str:
    """A path as it is given, or the folder of a built-in set."""
    if _existing(path) is not None:
        return path
    name, slice_separator, rows = path.partition("#")
    folder = _asset_folder(name)
    return path if folder is None else folder + slice_separator + rows


def _asset_folder(name: str) -> str | None:
    return str(store.fetch_asset(name, lambda _line: None)) if name in ASSETS else None


def _existing(text: str) -> Path | None:
    """What a path names; None where there is nothing, or where no system can have anything of that name."""
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, a zero character, no such home
        return None


def _builtin(name: str) -> str | None:
    """The built-in model or set of that name; None where a path has the name, or nothing."""
    asset = name.partition("#")[0]
    return asset if asset in ASSETS and _existing(name) is None else None


def _paths_of(job: RunConfig) -> list[str]:
    held_out = (value for value in (job.data.validation, job.data.test) if isinstance(value, str))
    return [*(source.path for source in job.data.train), *held_out]


def _model_errors(name: str) -> list[ConfigError]:
    heading = f"model.name={short_repr(name)}"
    path = _existing(name)
    if path is not None and path.is_dir():
        if _is_model_folder(path):
            return []
        if any((path / file).is_file() for file in ADAPTER_FILES):
            advice = f"name its base, and continue it by train.from={name}"
            return [ConfigError(f"{heading} is an adapter's folder, no model is there: {advice}")]
        return [ConfigError(f"{heading}: no model is there: the folder has no {MODEL_CONFIG}")]
    hint = near_builtin(name, "model")
    if path is not None:
        return [ConfigError(f"{heading} is a file: name the folder of the model{hint}")]
    if name in ASSETS and ASSETS[name].kind == "model":
        return []
    if name in ASSETS:
        return [
            ConfigError(f"{heading} is a built-in data set: the built-in models are {', '.join(_of_kind('model'))}")
        ]
    if could_be_on_hub(name) and not (hint and "/" not in name):
        return []
    return [ConfigError(f"{heading}: no model is there{hint or _beside(name, _is_model_folder)}")]


def adapter_errors(setting: str, path: str) -> list[ConfigError]:
    """What is wrong with a setting that names an adapter folder."""
    heading = f"{setting}={short_repr(path)}: no adapter is there"
    folder = _existing(path)
    if folder is not None and any((folder / file).is_file() for file in ADAPTER_FILES):
        return []
    inner = None if folder is None else folder / "adapter"
    if inner is not None and any((inner / file).is_file() for file in ADAPTER_FILES):
        return [ConfigError(f"{heading}; write {setting}={inner}")]
    return [ConfigError(f"{heading}{'' if folder is None else ': the folder has no ' + ADAPTER_FILES[0]}")]


def peft_task(path: str | Path) -> str:
    """The task that a folder of Hugging Face PEFT is for; "" of any other folder, and where none is said."""
    file = Path(path).expanduser() / ADAPTER_FILES[1]
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            return ""
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""  # whoever loads it says why
    return str(fields.get("task_type"))[:40].rpartition(".")[2] if isinstance(fields, dict) else ""


def _data_errors(name: str) -> list[DataError]:
    path = without_slice(name)
    heading = "the data cannot be read"
    if _existing(name) is not None or _existing(path) is not None:
        return []
    if path in ASSETS:
        sets = ", ".join(_of_kind("data"))
        is_model = ASSETS[path].kind == "model"
        return [DataError(f"{heading}: {path} is a built-in model: the built-in sets are {sets}")] if is_model else []
    hint = near_builtin(path, "data")
    is_file_name = Path(path).suffix.lower() in FILE_SUFFIXES
    if not is_file_name and could_be_on_hub(name) and not (hint and "/" not in path):
        return []
    return [DataError(f"{heading}: there is no file {short_repr(path)[1:-1]}{hint or _beside(path, _is_table)}")]


def near_builtin(name: str, kind: str) -> str:
    """`smollm2-135`, `./models/SmolLM2-135M` -> which built-in model may be meant, to end a message; "" for none."""
    last = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    stem = last.partition(".")[0].lower().replace("_", "-")
    known = {one.lower(): one for one in _of_kind(kind)}
    close = get_close_matches(stem[:80], known, n=2, cutoff=CLOSE)
    close = close or [one for one in known if len(stem) >= MIN_PREFIX and one.startswith(stem)][:2]
    names = " or ".join(repr(known[one]) for one in close)
    return f"; did you mean the built-in {names}? (`kitout assets list`)" if close else ""


def hint_of_names(config: DataConfig) -> str:
    """What may be meant by a source that is nothing here, whatever the hub said of it; "" for none."""
    missing = (one.path for one in config.train if not (_builtin(one.path) or _existing(without_slice(one.path))))
    return next(filter(None, (near_builtin(path, "data") for path in missing)), "")


def _of_kind(kind: str) -> list[str]:
    return [name for name, asset in ASSETS.items() if (asset.kind == "model") == (kind == "model")]


def _beside(name: str, is_candidate: Callable[[Path], bool]) -> str:
    """What lies in the folder where a path should be: the closest names, else the first ones."""
    path = Path(name)
    try:
        folder = path.expanduser().parent
        found = sorted(one.name for one in folder.iterdir() if is_candidate(one) and not one.name.startswith("."))
    except (OSError, RuntimeError, ValueError):
        return ""
    close = get_close_matches(path.name[:80], found, n=3, cutoff=0.7)
    if close:
        return f"; did you mean {' or '.join(repr(str(path.with_name(one))) for one in close)}?"
    return f"; beside it: {', '.join(found[:8])}" if found else ""


def _is_model_folder(path: Path) -> bool:
    return (path / MODEL_CONFIG).is_file()


def _is_table(path: Path) -> bool:
    return path.suffix.lower() in FILE_SUFFIXES and path.is_file()
