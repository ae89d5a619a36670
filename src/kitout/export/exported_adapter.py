"""`kitout export`: one adapter written in the format of another library, loaded again by that library and compared.

Where the library is not installed the folder is written and the result says that nothing compared it. What the format
cannot hold is refused with every reason. It knows the table of formats and none of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kitout.base.eval_mode import eval_mode
from kitout.errors import ConfigError, FileError, suggest
from kitout.export.formats import FORMATS
from kitout.export.formats.format import AdapterFormat
from kitout.export.new_folder import check_new_folder, folder_bytes, write_new_folder
from kitout.export.output_difference import OutputDifference, output_difference
from kitout.export.sample_batch import image_batch, logits_of, text_batch
from kitout.export.stored_dtype import stored_dtype
from kitout.format import format_bytes
from kitout.install_hint import suggest_install
from kitout.predict.load import load
from kitout.predict.predictor import Predictor
from kitout.runtime.merge.copy import copy_unhooked
from kitout.train.objectives.tasks import TASKS

LogFn = Callable[[str], None]


@dataclass(frozen=True)
class ExportedAdapter:
    """A folder in another library's format."""

    folder: Path
    """The folder."""
    adapter: str
    """The adapter in it."""
    to: str
    """The format."""
    num_bytes: int
    """Of its files."""
    difference: OutputDifference | None
    """Between the kit and what the other library makes of the folder; None: that is not installed."""
    notes: tuple[str, ...] = ()
    """What whoever uses the folder should know."""

    def __str__(self) -> str:
        package = FORMATS[self.to].package
        lines = [f"exported {self.adapter} to {self.folder} for {self.to}: {format_bytes(self.num_bytes)}"]
        if self.difference is None:
            lines.append(f"checked  not compared: {package} is not installed here: {suggest_install(package)}")
        else:
            lines.append(f"checked  loaded by {package}, against the kit on one batch:")
            lines += [f"         {line}" for line in self.difference.lines]
        return "\n".join([*lines, *(f"note     {note}" for note in self.notes)])


def export_adapter(
    folder: str | PathLike[str],
    out: str | PathLike[str],
    *,
    to: str = "peft",
    base: str | PathLike[str] | nn.Module | None = None,
    tokenizer: Any = None,
    task: str | None = None,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    verify: bool = True,
    log: LogFn = lambda _line: None,
) -> ExportedAdapter:
    """Writes one adapter as `to` has it into `out`, a new or empty folder; base, ..., verify: as `kitout.load`.

    dtype: of the base while they are compared; None: of its own files. Raises FileError with every reason where the
    format has no such adapter; then nothing is written.
    """
    if to not in FORMATS:
        raise ConfigError(f"there is no format {to!r}: {suggest(to, FORMATS)}")
    path = check_new_folder(out)
    log("loading the base and the adapter")
    if dtype is None:
        dtype = stored_dtype([folder], base, device, verify)
    predictor = load(folder, base=base, tokenizer=tokenizer, task=task, device=device, dtype=dtype, verify=verify)
    if len(predictor.loaded) > 1:
        raise ConfigError(
            f"{folder} holds several adapters ({', '.join(predictor.loaded)}): export them one by one, for example "
            f"{Path(folder) / 'adapter' / predictor.loaded[0]}"
        )
    return write_exported(predictor, path, FORMATS[to], log)


def write_exported(
    predictor: Predictor, path: Path, adapter_format: AdapterFormat, log: LogFn = lambda _line: None
) -> ExportedAdapter:
    """The one adapter of a predictor, in a format, into a new or empty folder."""
    kit = predictor.kit
    (name,) = predictor.loaded
    if predictor.usage.task not in TASKS:
        raise FileError(
            f"{name} is a reward adapter: {adapter_format.package} has no head of one value in the place of the output "
            "head; use it as it is: kitout align ppo --reward FOLDER"
        )
    is_installed = importlib.util.find_spec(adapter_format.package) is not None
    found: list[OutputDifference] = []

    def write_into(folder: Path) -> None:
        log(f"writing {name} for {adapter_format.name}")
        own = folder / "adapter"  # a writer that replaces folders may do so with this one
        adapter_format.write(kit, name, own)
        for file in own.iterdir():
            file.rename(folder / file.name)
        own.rmdir()
        if is_installed:
            log(f"loading it with {adapter_format.package}, and comparing it with the kit")
            difference = _compare(predictor, adapter_format, folder)
            if not difference.is_rounding:
                raise FileError(
                    f"{adapter_format.package} computes something else than the kit ({difference}), so nothing was "
                    "written: please report it"
                )
            found.append(difference)

    write_new_folder(path, kit.num_parameters(name).bytes, write_into)
    notes = (*(found[0].notes if found else ()), *adapter_format.notes(kit, name, path))
    return ExportedAdapter(path, name, adapter_format.name, folder_bytes(path), found[0] if found else None, notes)


def _compare(predictor: Predictor, adapter_format: AdapterFormat, folder: Path) -> OutputDifference:
    kit, preprocessing = predictor.kit, predictor.preprocessing
    if preprocessing.task.reads_images:
        batch = image_batch(kit, preprocessing.pixels.standalone())
    else:
        batch = text_batch(kit, predictor.tokenizer, preprocessing.pad_token_id)
    other = adapter_format.load(copy_unhooked(kit.state), folder)
    with eval_mode(kit.base, kit, other):
        with kit.use(None):
            base = logits_of(kit, batch)
        with kit.use(predictor.loaded[0]):
            expected = logits_of(kit, batch)
        return output_difference(expected, logits_of(other, batch), base, kit.dtype)
