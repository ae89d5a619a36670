"""Adapters of Hugging Face PEFT: `load_peft` and `save_peft`, without importing peft.

LoRA, rsLoRA, DoRA, IA3, prompt and prefix tuning. A folder holds adapter_config.json and adapter_model.safetensors;
keys are "base_model.model.<path>.lora_A.weight" and the like, "prompt_embeddings" for what lies in front of the text,
and plain parameters for heads (modules_to_save). Which modules carry an adapter is told by the tensors. Such files do
not say which base they were made for: paths and shapes are all that can be checked. Written after peft 0.21.2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kitout.errors import Faults, FileError, KitoutError, MergeState
from kitout.files.adapter_tensors import HEAD, Slot, admit, blank, mismatches, not_finite
from kitout.files.atomic import check_replaceable, replace_folder
from kitout.files.head_spec import blank_copy
from kitout.files.peft.config import FrontSettings, Settings, commonest, read_config, spelled
from kitout.files.peft.infer_method import method_for
from kitout.files.peft.read_tensors import PREFIX, Found, carriers, grouped
from kitout.files.peft.virtual_tokens import read_front, write_front
from kitout.files.peft.write_tensors import exported, heads_of, task_of
from kitout.files.safetensors_reader import open_regular, open_tensors, parse, write_tensors
from kitout.methods import LoRA, PrefixTuning, PromptTuning
from kitout.runtime.adapter import Adapter
from kitout.runtime.build_adapter import check_name, check_sites
from kitout.runtime.state import KitState

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MOST_JSON = 4 * 2**20


@torch.no_grad()
def load_peft(state: KitState, folder: str | PathLike[str], name: str) -> Adapter:
    """Adds an adapter that PEFT saved, trainable and not worn; its values are held in fp32 as PEFT holds them.

    Raises FileError, with every reason at once, where the file does not fit this model or asks for what kitout does
    not do; the kit is as before then.
    """
    if state.merged_names:
        raise MergeState(f"{state.merged_text} merged into the base: unmerge() before loading {folder}")
    check_name(state, name)
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
    built = None
    try:
        if isinstance(settings, FrontSettings):
            found: Found | None = read_front(state, settings, stored, faults)
        else:
            found = _read_weights(state, settings, stored, faults)
        if found is not None and not faults.items:
            built = _blank(state, name, found)
    except KitoutError as error:
        faults.add(str(error))
    faults.raise_if_any()
    assert built is not None
    assert found is not None
    adapter, held = built
    values = dict(found.values)
    for path, tensors_of in found.heads.items():
        values |= {f"{HEAD}{path.replace('.', '/')}.{own}": value for own, value in tensors_of.items()}
    # PEFT computes half-precision adapters in fp32; so do we.
    values = {k: v.float() if v.is_floating_point() and v.dtype.itemsize < 4 else v for k, v in values.items()}
    mismatches(held, {k: (v.dtype, tuple(v.shape)) for k, v in values.items()}, faults)
    faults.raise_if_any()
    admit(state, adapter, held, values, 1.0)
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


def _read_weights(state: KitState, settings: Settings, stored: Mapping[str, Tensor], faults: Faults) -> Found | None:
    """LoRA and IA3: what the modules carry, and a method that says as much; None where a fault was added."""
    parts, heads = grouped(state, settings, stored, faults)
    missing = [p for p in carriers(state.survey) if settings.names(p) and p not in parts]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        faults.add(f"target_modules also names {', '.join(missing[:4])}{more}, but the file has no tensors for them")
    if not parts:
        faults.add("the file has no adapter tensors at all")
    if faults.items:
        return None
    facts = [{p: getattr(part, f) for p, part in parts.items()} for f in ("inward", "rank", "alpha")]
    method, sites = method_for(state.survey, settings, *facts)
    values = {f"{s.key}.{own}": value for s in sites for own, value in parts[s.path].values.items()}
    return Found(method, sites, values, heads)


def _blank(state: KitState, name: str, found: Found) -> tuple[Adapter, dict[str, Slot]]:
    modules = {path: blank_copy(state.base.get_submodule(path)).requires_grad_(True) for path in found.heads}
    check_sites(state, name, found.sites)
    return blank(state, name, found.method, found.sites, modules)


@torch.no_grad()
def save_peft(state: KitState, name: str, folder: str | PathLike[str]) -> None:
    """Writes an adapter as PEFT does, so that PeftModel.from_pretrained(base, folder) computes the same.

    Strength is folded in; a PiSSA adapter becomes a plain LoRA of twice the rank; several LoRAs on channels of one
    fused projection become one on the whole; the encoder of a prefix is folded. Raises FileError, with every reason at
    once, for what PEFT cannot hold.
    """
    adapter = state[name].settled()
    target = Path(folder)
    check_replaceable(target.expanduser(), (CONFIG, WEIGHTS))
    faults = Faults(FileError, f"{name!r} has no equal in PEFT")
    front = isinstance(adapter.method, (PromptTuning, PrefixTuning))
    tensors, told = write_front(state, adapter, faults) if front else _write_weights(state, adapter, faults)
    faults.raise_if_any()
    if bad := not_finite(tensors):
        raise FileError(f"{name!r} holds NaN or infinity in {', '.join(bad[:4])}: there is nothing worth saving in it")
    config = {**_common(state, adapter), **told}

    def fill(fresh: Path) -> None:
        write_tensors(fresh / WEIGHTS, tensors, {"format": "pt"})
        (fresh / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    replace_folder(target, (CONFIG, WEIGHTS), fill)


def _common(state: KitState, adapter: Adapter) -> dict[str, Any]:
    """What adapter_config.json says of every method."""
    config = getattr(state.base, "config", None)
    return {
        "base_model_name_or_path": getattr(config, "_name_or_path", None) or None,
        "revision": None,
        "inference_mode": True,
        "modules_to_save": [path.replace("/", ".") for path in adapter.heads] or None,
    }


def _write_weights(state: KitState, adapter: Adapter, faults: Faults) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """LoRA and IA3: the tensors, and what the config says of them."""
    parts = exported(adapter, faults)
    saved = heads_of(state, adapter, faults)
    if faults.items:
        return {}, {}
    tensors = {f"{PREFIX}{path}{end}": value for path, part in parts.items() for end, value in part.values.items()}
    tensors |= {PREFIX + key: value for key, value in saved.items()}
    everything = [path for path, _ in state.base.named_modules()]
    where = spelled(list(parts), everything, [p for p, part in parts.items() if part.inward])
    task = task_of(state.base)
    told = {
        "task_type": None if task == "SEQ_CLS" else task,  # which would claim heads on its own
        "target_modules": where["target_modules"],
        "fan_in_fan_out": any(part.transposed for part in parts.values()),
    }
    if not isinstance(adapter.method, LoRA):
        return tensors, {"peft_type": "IA3", "feedforward_modules": where["feedforward_modules"], **told}
    rank, rank_pattern = commonest({path: part.rank for path, part in parts.items()})
    alpha, alpha_pattern = commonest({path: part.alpha for path, part in parts.items()})
    return tensors, {
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
        **told,
    }
