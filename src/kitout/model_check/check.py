"""check(model): the laws run on the user's own model, so that a model nobody tried can be tried in a minute.

The order of things: the base alone, a kit, each method in turn, each law; then the model as it was. It knows which
methods stand for their kind, and nothing of how a law is measured.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kitout.base.eval_mode import eval_mode
from kitout.errors import ConfigError, KitoutError
from kitout.kit import Kit, attach
from kitout.method import Method
from kitout.methods.bitfit import BitFit
from kitout.methods.houlsby import Houlsby
from kitout.methods.ia3 import IA3
from kitout.methods.lora import LoRA
from kitout.methods.parallel_adapter import ParallelAdapter
from kitout.methods.prefix_tuning import PrefixTuning
from kitout.methods.prompt_tuning import PromptTuning
from kitout.methods.vpt import VPT
from kitout.model_check.bare_base import measure_base
from kitout.model_check.laws import LAWS, NAMES, LawRun, add_adapters
from kitout.model_check.result import COLUMNS, CheckCell, Column, ModelCheck

PACKAGE = Path(__file__).parents[1]


def check(
    model: nn.Module,
    methods: Sequence[Method] | None = None,
    *,
    columns: Sequence[Column] = COLUMNS,
    example_batch: Mapping[str, Any] | None = None,
    roles: Mapping[str, str] | None = None,
    seed: int = 0,
    on_cell: Callable[[str, Column, CheckCell], None] | None = None,
) -> ModelCheck:
    """A table of methods x {effect, rows, merge, save, cache} on one tiny batch: `print(kitout.check(model))`.

    effect: the output changes, every parameter has a gradient, off is the base. rows: adapters and the base in one
    batch are what each row is alone, with padding. merge: merged equals attached, unmerge restores the bits. save:
    saved and loaded is bitwise the same. cache: cached calls equal full ones. `.ok` is False if a cell is wrong or an
    error; `.cells[method, column]` has the outcome, the difference and the message.

    methods: any Method instances; default one of each kind that the model's inputs allow. example_batch and roles: as
    `attach` takes them. on_cell: called with every cell as it is known. Random numbers are drawn by `seed` alone, and
    the model is afterwards what it was: mode, gradients, random state, values. Beside it there is memory for two
    adapters, the gradients' activations of three short rows, and while one is merged a second copy of the modules it
    changes; a base of at most 256 MiB is copied once at a time as well. Raises ConfigError where the base itself does
    not run, and what `attach` raises.
    """
    unknown = [column for column in columns if column not in LAWS]
    if unknown:
        raise ConfigError(f"columns are {', '.join(COLUMNS)}; found {', '.join(map(str, unknown))}")
    if not isinstance(model, nn.Module) or isinstance(model, Kit) or "_kitout" in model.__dict__:
        raise ConfigError("check() takes a model without a kit: kit.detach() first, or check before attach()")
    chosen = default_methods(model) if methods is None else list(methods)
    cells: dict[tuple[str, Column], CheckCell] = {}

    def record(label: str, column: Column, cell: CheckCell) -> None:
        cells[label, column] = cell
        if on_cell is not None:
            on_cell(label, column, cell)

    # frozen from the start: torch takes another path through a product of a matrix that requires a gradient
    with eval_mode(model, grad=True, freeze=True), _kept_tensors(model):
        torch.manual_seed(seed)
        base = measure_base(model, example_batch)
        kit = attach(model, roles=roles, example_batch=example_batch)
        try:
            for label, method in zip(_labels(chosen), chosen, strict=True):
                _check_method(LawRun(kit, base, method), columns, seed, partial(record, label))
        finally:
            kit.detach()
    return ModelCheck(type(model).__name__, cells, base.notes)


def default_methods(model: nn.Module) -> list[Method]:
    """One of each kind: low rank, scale, bias, serial and parallel bottleneck, keys and values, virtual tokens."""
    methods: list[Method] = [
        LoRA(rank=4, targets="all-linear"), IA3(), BitFit(), Houlsby(width=8), ParallelAdapter(width=8),
        PrefixTuning(length=4),
    ]  # fmt: skip
    accepted = inspect.signature(model.forward).parameters
    if "input_ids" in accepted:
        methods.append(PromptTuning(length=3))
    if "input_ids" not in accepted or "pixel_values" in accepted:
        methods.append(VPT(length=3))
    return methods


def _labels(methods: Sequence[Method]) -> list[str]:
    """The class names, with the settings where a class comes twice."""
    names = [type(method).__name__ for method in methods]
    labels: list[str] = []
    for name, method in zip(names, methods, strict=True):
        settings = ", ".join(f"{k}={v!r}" for k, v in method.non_default_settings().items())
        label = name if names.count(name) == 1 else f"{name}({settings})"
        labels.append(label if label not in labels else f"{label} #{len(labels)}")
    return labels


def _check_method(
    run: LawRun, columns: Sequence[Column], seed: int, record: Callable[[Column, CheckCell], None]
) -> None:
    asked = [column for column in COLUMNS if column in columns]
    kit = run.kit
    try:
        unfit = _outcome(lambda: add_adapters(run, seed))
        for column in asked:
            if unfit is None:
                cell = _outcome(partial(LAWS[column], run))
                assert cell is not None
            else:
                cell = unfit if column == asked[0] else CheckCell("not applicable", "")
            record(column, cell)
    finally:
        kit.use(None)
        for name in NAMES:
            if name in kit:
                kit.remove(name)


def _outcome(ask: Callable[[], CheckCell | None]) -> CheckCell | None:
    """What it returns; a KitoutError is a refusal, any other exception an error with its type and place."""
    try:
        return ask()
    except KitoutError as error:
        return CheckCell("refused", str(error))
    except Exception as error:
        return CheckCell("error", f"{type(error).__name__}: {str(error)[:300]} ({_place(error)})")


def _place(error: Exception) -> str:
    """Where it was raised, and the last line of kitout on the way there."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if Path(f.filename).is_relative_to(PACKAGE) and "model_check" not in f.filename]
    places = dict.fromkeys(f"{Path(f.filename).name}:{f.lineno} in {f.name}" for f in (*frames[-1:], *ours[-1:]))
    return ", from ".join(places)


@contextmanager
def _kept_tensors(model: nn.Module) -> Iterator[None]:
    """Tensors that modules keep of a forward as plain attributes (a recurrent state) are put back afterwards."""

    def is_state(value: object) -> bool:
        return value is None or isinstance(value, Tensor)

    kept = [(m, {k: v for k, v in m.__dict__.items() if is_state(v)}) for m in model.modules()]
    try:
        yield
    finally:
        for module, before in kept:
            now = module.__dict__
            now.update({k: v for k, v in before.items() if now.get(k) is not v})
            for name in [k for k, v in now.items() if isinstance(v, Tensor) and k not in before]:
                del now[name]
