"""An adapter out of two checkpoints: the difference of a fine-tuned model from the base, cut to a low rank.

One matrix is compared at a time. What differs outside the targets is left out, listed and counted in the residual. It
knows models as named parameters and nothing of how they were trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from kitout.errors import ConfigError, Errors
from kitout.fuse.changes import Places, base_parameters, difference, square_of, weight_name
from kitout.fuse.lora.build_lora import LoRABuilder
from kitout.fuse.lora.targets import selected
from kitout.fuse.residual import FusedAdapter
from kitout.fuse.result import DROPPABLE, Combined, NewAdapter
from kitout.kit import Kit
from kitout.methods.lora import LoRA
from kitout.runtime.build_adapter import check_name
from kitout.runtime.hooks.class_swap import original_class

MAX_SHOWN_ERRORS = 8


@torch.no_grad()
def extract(
    kit: Kit,
    tuned: nn.Module | Mapping[str, Tensor] | str | Path,
    name: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: str = "all-linear",
    layers: str = "all",
) -> FusedAdapter:
    """A new LoRA `name` on the kit: what `tuned` is more than the base, at `targets`, cut to a rank or an energy.

    tuned: the same architecture fine-tuned: a model, its parameters by name, or a folder that the base's class loads.
    rank: of every site, 32 if there is no energy; energy: the share of the squared singular values that each site
    keeps. The residual is over all parameters: what differs outside the targets counts, and `dropped` lists it.

    Raises AdapterExists or InvalidAdapterName for the name; MergeStateError while adapters are merged; TargetError for
    targets that select nothing; ConfigError where rank and energy are given, `tuned` does not load or is no copy of
    this base with parameters of the same shapes, or nothing differs at the targets. Then nothing is added to the kit.
    """
    state = kit.state
    state.check_attached()
    check_name(state, name)
    state.check_unmerged(f"extracting {name!r}")
    to = LoRA(energy=energy, targets=targets, layers=layers) if rank is None and energy is not None else None
    if to is None:
        if energy is not None:
            raise ConfigError(f"extract: rank={rank} or energy={energy:g}, not both")
        to = LoRA(rank=32 if rank is None else rank, targets=targets, layers=layers)
    theirs = _parameters_of(kit, tuned)
    ours = base_parameters(state.base)
    new = NewAdapter(state, Places(state.survey), name, [], frozenset([*DROPPABLE, "matrices"]), {"how": "extract"})
    builder = LoRABuilder(new, to)
    wanted = {weight_name(site) for site in selected(state, to.model_copy(update={"energy": None, "rank": 1}))}
    errors = Errors(ConfigError, f"{name!r} cannot be extracted: tuned is no fine-tuned copy of this base")
    for parameter in sorted(wanted):
        if parameter not in theirs:
            errors.add(f"it has no {parameter}")
        elif theirs[parameter].shape != ours[parameter].shape:
            shapes = f"{list(theirs[parameter].shape)}, here {list(ours[parameter].shape)}"
            errors.add(f"{parameter} has the shape {shapes}")
    errors.shorten(MAX_SHOWN_ERRORS, "parameters")
    errors.raise_if_any()
    changed, seen = False, set()
    for parameter, old in ours.items():
        value = theirs.get(parameter)
        if value is None or value.shape != old.shape:
            new.dropped[parameter] = "not in tuned" if value is None else "another shape"
            continue
        pair = old.data_ptr(), value.data_ptr()
        if parameter not in wanted and pair in seen:
            continue  # tied in both: compared already
        seen.add(pair)
        change = difference(new.places, parameter, value, old)
        square = square_of(change)
        changed = changed or (parameter in wanted and square > 0)
        builder.take(new.places[parameter], Combined(change, square))
    if not changed:
        raise ConfigError(f"{name!r}: tuned is equal to the base at targets={targets!r}: there is nothing to extract")
    return builder.finish()


def _parameters_of(kit: Kit, tuned: nn.Module | Mapping[str, Tensor] | str | Path) -> Mapping[str, Tensor]:
    if isinstance(tuned, Kit):
        tuned = tuned.base
    if isinstance(tuned, nn.Module):
        return base_parameters(tuned)
    if isinstance(tuned, Mapping):
        return tuned
    if not isinstance(tuned, (str, Path)):
        raise ConfigError(f"tuned is a model, its parameters by name, or a folder, found {type(tuned).__name__}")
    load = getattr(original_class(kit.state.base), "from_pretrained", None)
    if load is None:
        raise ConfigError(
            f"{original_class(kit.state.base).__name__} loads no folders: give the fine-tuned model itself"
        )
    try:
        return base_parameters(load(str(tuned), dtype=kit.state.dtype))
    except (OSError, ValueError) as error:
        raise ConfigError(f"tuned={str(tuned)!r} does not load as the base does: {str(error)[:200]}") from None
