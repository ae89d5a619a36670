"""Adapters of Hugging Face PEFT: `load_peft` and `save_peft`, for LoRA, rsLoRA, DoRA and IA3, without importing peft.

A folder holds adapter_config.json and adapter_model.safetensors; keys are "base_model.model.<path>.lora_A.weight" and
the like, heads (modules_to_save) plain parameters. Which modules carry an adapter is told by the tensors. Such files
do not say which base they were made for: paths and shapes are all that can be checked. Written after peft 0.21.2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kitout.errors import Faults, FileError, KitoutError, MergeState
from kitout.files.folder import check_replaceable, replace_folder
from kitout.files.heads import blank_copy
from kitout.files.peft_config import Settings, commonest, read_config, spelled
from kitout.files.peft_export import exported, heads_of
from kitout.files.peft_method import method_for
from kitout.files.peft_parts import PREFIX, Part, carriers, grouped
from kitout.files.rebuild import HEAD, admit, blank, mismatches, not_finite
from kitout.files.tensors import open_regular, open_tensors, parse, write_tensors
from kitout.kit.adapter import Adapter
from kitout.kit.build import check_name, check_sites
from kitout.methods import LoRA

if TYPE_CHECKING:
    from os import PathLike

    from kitout.kit.kit import Kit

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MOST_JSON = 4 * 2**20


@torch.no_grad()
def load_peft(kit: Kit, folder: str | PathLike[str], name: str) -> Adapter:
    """Adds an adapter that PEFT saved, trainable and not worn; its values are held in fp32 as PEFT holds them.

    Raises FileError, with every reason at once, where the file does not fit this model or asks for what kitout does
    not do; the kit is as before then.
    """
    if kit.merged_name is not None:
        raise MergeState(f"{kit.merged_name!r} is merged into the base: unmerge() before loading {folder}")
    check_name(kit, name)
    where = Path(folder).expanduser()
    faults = Faults(FileError, f"{where} cannot be loaded")
    config = _config(where)
    settings = read_config(config, faults)
    faults.raise_if_any()
    assert settings is not None
    tensors = open_tensors(where / WEIGHTS)
    with tensors.file:
        stored, _ = tensors.read()
    if bad := not_finite(stored):
        faults.add(f"NaN or infinity in {', '.join(bad[:4])}")
    parts, heads = grouped(kit, settings, stored, faults)
    _complete(kit, settings, parts, faults)
    faults.raise_if_any()
    adapter = _build(kit, where, name, settings, parts, heads)
    adapter.note = {"peft": {"base_model_name_or_path": config.get("base_model_name_or_path")}}
    return adapter


def _config(where: Path) -> dict[str, Any]:
    if not (where / CONFIG).is_file():
        hint = "kit.load(folder) reads it" if (where / "adapter.json").is_file() else "there is nothing of PEFT in it"
        raise FileError(f"{where} holds no {CONFIG}: {hint}")
    if not (where / WEIGHTS).is_file():
        if (where / PICKLED).is_file():
            raise FileError(
                f"{where} holds its weights pickled ({PICKLED}), and reading a pickle runs whatever it says. If you "
                f"trust it, convert it: safetensors.torch.save_file(torch.load('{PICKLED}', weights_only=True), "
                f"'{WEIGHTS}')"
            )
        raise FileError(f"{where} holds no {WEIGHTS}")
    file, _ = open_regular(where / CONFIG, MOST_JSON)
    with file:
        return parse(file.read(), where / CONFIG)


def _complete(kit: Kit, settings: Settings, parts: Mapping[str, Part], faults: Faults) -> None:
    """Every module that the config lists by name has its tensors."""
    missing = [p for p in carriers(kit.found) if settings.names(p) and p not in parts]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        faults.add(f"target_modules also names {', '.join(missing[:4])}{more}, but the file has no tensors for them")
    if not parts:
        faults.add("the file has no adapter tensors at all")


def _build(
    kit: Kit, where: Path, name: str, settings: Settings, parts: Mapping[str, Part], heads: dict[str, dict[str, Tensor]]
) -> Adapter:
    faults = Faults(FileError, f"{where} cannot be loaded")
    modules = {path: blank_copy(kit.base.get_submodule(path)).requires_grad_(True) for path in heads}
    try:
        facts = [{p: getattr(part, f) for p, part in parts.items()} for f in ("inward", "rank", "alpha")]
        method, sites = method_for(kit.found, settings, *facts)
        check_sites(kit, name, sites)
        adapter, held = blank(kit, name, method, sites, modules)
    except KitoutError as error:
        raise FileError(f"{where} cannot be loaded: {error}") from None
    values = {f"{s.key}.{own}": value for s in sites for own, value in parts[s.path].values.items()}
    for path, tensors in heads.items():
        values |= {f"{HEAD}{path.replace('.', '/')}.{own}": value for own, value in tensors.items()}
    # PEFT computes half-precision adapters in fp32; so do we.
    values = {k: v.float() if v.is_floating_point() and v.dtype.itemsize < 4 else v for k, v in values.items()}
    mismatches(held, {k: (v.dtype, tuple(v.shape)) for k, v in values.items()}, faults)
    faults.raise_if_any()
    admit(kit, adapter, held, values, 1.0)
    return adapter


@torch.no_grad()
def save_peft(kit: Kit, name: str, folder: str | PathLike[str]) -> None:
    """Writes an adapter as PEFT does, so that PeftModel.from_pretrained(base, folder) computes the same.

    Strength is folded in; a PiSSA adapter becomes a plain LoRA of twice the rank; several LoRAs on channels of one
    fused projection become one on the whole. Raises FileError, with every reason at once, for what PEFT cannot hold.
    """
    adapter = kit[name]
    target = Path(folder)
    check_replaceable(target.expanduser(), (CONFIG, WEIGHTS))
    faults = Faults(FileError, f"{name!r} has no equal in PEFT")
    parts = exported(adapter, faults)
    saved = heads_of(kit, adapter, faults)
    faults.raise_if_any()
    tensors = {f"{PREFIX}{path}{end}": value for path, part in parts.items() for end, value in part.values.items()}
    tensors |= {PREFIX + key: value for key, value in saved.items()}
    if bad := not_finite(tensors):
        raise FileError(f"{name!r} holds NaN or infinity in {', '.join(bad[:4])}: there is nothing worth saving in it")
    config = _written(kit, adapter, parts)

    def fill(fresh: Path) -> None:
        write_tensors(fresh / WEIGHTS, tensors, {"format": "pt"})
        (fresh / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    replace_folder(target, (CONFIG, WEIGHTS), fill)


def _written(kit: Kit, adapter: Adapter, parts: Mapping[str, Part]) -> dict[str, Any]:
    """adapter_config.json."""
    model: Any = kit.base
    config = getattr(model, "config", None)
    everything = [path for path, _ in model.named_modules()]
    where = spelled(list(parts), everything, [p for p, part in parts.items() if part.inward])
    common: dict[str, Any] = {
        "task_type": _task(model),
        "base_model_name_or_path": getattr(config, "_name_or_path", None) or None,
        "revision": None,
        "inference_mode": True,
        "target_modules": where["target_modules"],
        "fan_in_fan_out": any(part.transposed for part in parts.values()),
        "modules_to_save": [path.replace("/", ".") for path in adapter.heads] or None,
    }
    if not isinstance(adapter.method, LoRA):
        return {"peft_type": "IA3", "feedforward_modules": where["feedforward_modules"], **common}
    rank, rank_pattern = commonest({path: part.rank for path, part in parts.items()})
    alpha, alpha_pattern = commonest({path: part.alpha for path, part in parts.items()})
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "lora_dropout": adapter.method.dropout,
        "use_rslora": adapter.method.rslora,
        "use_dora": adapter.method.dora,
        "bias": "none",
        "init_lora_weights": True,
        **common,
    }


def _task(model: Any) -> str | None:
    """PEFT's task type where it only adds `generate`; that of a classifier would claim heads on its own."""
    if not callable(getattr(model, "can_generate", None)) or not model.can_generate():
        return None
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
