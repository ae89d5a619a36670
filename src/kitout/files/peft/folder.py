"""Adapters of Hugging Face PEFT: `load_peft` and `save_peft`, without importing peft.

LoRA, rsLoRA, DoRA, IA3, prompt and prefix tuning. A folder holds adapter_config.json and adapter_model.safetensors.
Keys are "base_model.model.<path>.lora_A.weight" and the like, "prompt_embeddings" for virtual tokens, and plain
parameters for heads (modules_to_save). The tensors decide which modules have an adapter. Such files do not say which
base they were made for: only paths and shapes can be checked. Written after peft 0.21.2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kitout.errors import Errors, FileError, KitoutError, MergeStateError, RouteError
from kitout.files.adapter_tensors import (
    HEAD,
    TensorSlot,
    build_empty,
    check_tensors,
    fill_and_register,
    non_finite_names,
)
from kitout.files.atomic import check_replaceable, replace_folder
from kitout.files.head_spec import blank_copy
from kitout.files.peft.biases import read_shifts, take_biases, write_biases
from kitout.files.peft.config import PeftConfig, PeftPromptConfig, patterns_of, read_config, target_modules_for
from kitout.files.peft.infer_method import infer_method
from kitout.files.peft.read_tensors import PREFIX, PeftAdapter, PeftModuleTensors, adaptable_modules, by_module
from kitout.files.peft.virtual_tokens import read_virtual_tokens, write_virtual_tokens
from kitout.files.peft.write_tensors import heads_of, task_of, to_one_scale, to_peft_tensors, why_not_in_vllm
from kitout.files.portable_name import portable_name
from kitout.files.safetensors_reader import open_regular, open_tensors, parse_json, write_tensors
from kitout.files.system_errors import as_path, as_path_error
from kitout.methods import LoRA, PrefixTuning, PromptTuning
from kitout.runtime.adapter import Adapter
from kitout.runtime.build_adapter import check_name, check_sites, select_sites
from kitout.runtime.left_out import left_out_text, warn_left_out
from kitout.runtime.state import KitState

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MAX_PEFT_JSON_BYTES = 4 * 2**20


@torch.no_grad()
def load_peft(state: KitState, folder: str | PathLike[str], name: str) -> Adapter:
    """Adds an adapter that PEFT saved, trainable and not active. Its values are held in fp32, as PEFT holds them.

    Raises FileError with every reason at once where the file does not fit this model or asks for something that kitout
    does not support; then the kit is as before.
    """
    state.check_attached()
    if state.merged_names:
        raise MergeStateError(f"{state.merged_text} merged into the base: unmerge() before loading {folder}")
    check_name(state, name)
    folder_path = as_path(folder)
    errors = Errors(FileError, f"{folder_path} cannot be loaded")
    with as_path_error("read", folder_path):
        config = _read_json(folder_path)
    settings = read_config(config, errors)
    errors.raise_if_any()
    assert settings is not None
    with as_path_error("read", folder_path):
        tensors = open_tensors(folder_path / WEIGHTS)
        with tensors.file:
            stored, _ = tensors.read()
    if bad := non_finite_names(stored):
        errors.add(f"NaN or infinity in {', '.join(bad[:4])}")
    built = None
    try:
        if isinstance(settings, PeftPromptConfig):
            peft_adapter: PeftAdapter | None = read_virtual_tokens(state, settings, stored, errors)
        else:
            peft_adapter = _read_weights(state, settings, stored, errors, name)
        if peft_adapter is not None and not errors.messages:
            built = _build_empty(state, name, peft_adapter)
    except KitoutError as error:
        errors.add(str(error))
    errors.raise_if_any()
    assert built is not None
    assert peft_adapter is not None
    adapter, slots = built
    values = dict(peft_adapter.values)
    for path, head in peft_adapter.heads.items():
        values |= {f"{HEAD}{path.replace('.', '/')}.{parameter}": value for parameter, value in head.items()}
    # PEFT computes half-precision adapters in fp32, and so does kitout.
    values = {k: v.float() if v.is_floating_point() and v.dtype.itemsize < 4 else v for k, v in values.items()}
    check_tensors(slots, {k: (v.dtype, tuple(v.shape)) for k, v in values.items()}, errors)
    errors.raise_if_any()
    adapter.left_out = peft_adapter.left_out
    try:
        fill_and_register(state, adapter, slots, values, 1.0)
    except RouteError as error:  # `use` could not activate it
        errors.add(str(error))
    errors.raise_if_any()
    warn_left_out(name, adapter.left_out, stacklevel=4)
    base_name = config.get("base_model_name_or_path")  # often a path of whoever trained it
    adapter.metadata = {"peft": {"base_model_name_or_path": base_name and portable_name(str(base_name))}}
    return adapter


def _read_json(folder_path: Path) -> dict[str, Any]:
    if not (folder_path / CONFIG).is_file():
        hint = "it is not a folder of PEFT" if folder_path.is_dir() else "there is no such folder"
        hint = "kit.load(folder) reads it" if (folder_path / "adapter.json").is_file() else hint
        raise FileError(f"{folder_path} holds no {CONFIG}: {hint}")
    if not (folder_path / WEIGHTS).is_file():
        if (folder_path / PICKLED).is_file():
            raise FileError(
                f"{folder_path} holds its weights pickled ({PICKLED}), and reading a pickle runs any code in it. "
                f"If you trust it, convert it: safetensors.torch.save_file(torch.load('{PICKLED}', weights_only=True), "
                f"'{WEIGHTS}')"
            )
        raise FileError(f"{folder_path} holds no {WEIGHTS}")
    file, _ = open_regular(folder_path / CONFIG, MAX_PEFT_JSON_BYTES)
    with file:
        return parse_json(file.read(), folder_path / CONFIG)


def _read_weights(
    state: KitState, settings: PeftConfig, stored: Mapping[str, Tensor], errors: Errors, name: str
) -> PeftAdapter | None:
    """LoRA and IA3: the tensors of each module and the method that matches them; None where an error was added."""
    rest = dict(stored)
    biases = take_biases(settings, rest)
    parts, heads, left_out = by_module(state, settings, rest, errors)
    modules = [p for p in adaptable_modules(state.survey) if p not in state.survey.unused]
    missing = [p for p in modules if settings.selects(p) and p not in parts]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        errors.add(f"target_modules also names {', '.join(missing[:4])}{more}, but the file has no tensors for them")
    if left_out and not parts:
        errors.add(f"nothing in this file has an effect on this model, in PEFT neither: {left_out_text(left_out)}")
    elif not parts:
        errors.add("the file has no adapter tensors at all")
    if errors.messages:
        return None
    at_input = {path: part.at_input for path, part in parts.items()}
    ranks = {path: part.rank for path, part in parts.items()}
    alphas = {path: part.alpha for path, part in parts.items()}
    method, sites = infer_method(state.survey, settings, at_input, ranks, alphas)
    if isinstance(method, LoRA) and (method.bias != "none" or method.lora_bias):
        sites, _ = select_sites(state, method, heads, name)
        for path, shift in read_shifts(state, method, sites, parts, biases, errors).items():
            parts.setdefault(path, PeftModuleTensors()).values["shift"] = shift
    values = {f"{s.key}.{parameter}": value for s in sites for parameter, value in parts[s.path].values.items()}
    return PeftAdapter(method, sites, values, heads, left_out)


def _build_empty(state: KitState, name: str, peft_adapter: PeftAdapter) -> tuple[Adapter, dict[str, TensorSlot]]:
    modules = {path: blank_copy(state.base.get_submodule(path)).requires_grad_(True) for path in peft_adapter.heads}
    check_sites(name, peft_adapter.sites, modules, peft_adapter.method)
    return build_empty(state, name, peft_adapter.method, peft_adapter.sites, modules)


@torch.no_grad()
def save_peft(state: KitState, name: str, folder: str | PathLike[str], *, for_vllm: bool = False) -> None:
    """Writes an adapter as PEFT does, so that PeftModel.from_pretrained(base, folder) computes the same.

    Strength is folded. A PiSSA adapter becomes a plain LoRA of twice the rank. Several LoRAs on channels of one fused
    projection become one on the whole. Ranks and alphas by role are written with one scale for all. The encoder of a
    prefix is folded. for_vllm: also refuse what vLLM does not read. Raises FileError with every reason at once for what
    PEFT cannot hold.
    """
    adapter = state[name].inference_form()
    target = as_path(folder)
    with as_path_error("written", target):
        check_replaceable(target, (CONFIG, WEIGHTS))
    errors = Errors(FileError, f"{name!r} has no equivalent in PEFT")
    has_virtual_tokens = isinstance(adapter.method, (PromptTuning, PrefixTuning))
    write = write_virtual_tokens if has_virtual_tokens else _write_weights
    tensors, own_fields = write(state, adapter, errors)
    errors.raise_if_any()
    if for_vllm:
        errors = Errors(FileError, f"{name!r} cannot be read by vLLM")
        for reason in why_not_in_vllm(adapter):
            errors.add(reason)
        errors.raise_if_any()
    if bad := non_finite_names(tensors):
        raise FileError(f"{name!r} holds NaN or infinity in {', '.join(bad[:4])}: there is nothing worth saving in it")
    config = {**_common_fields(state, adapter), **own_fields}

    def write_into(temp_path: Path) -> None:
        write_tensors(temp_path / WEIGHTS, tensors, {"format": "pt"})
        (temp_path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    with as_path_error("written", target):
        replace_folder(target, (CONFIG, WEIGHTS), write_into)


def _common_fields(state: KitState, adapter: Adapter) -> dict[str, Any]:
    """Fields of adapter_config.json that every method has."""
    base_name = getattr(getattr(state.base, "config", None), "_name_or_path", None)
    return {
        "base_model_name_or_path": portable_name(base_name) if base_name else None,
        "revision": None,
        "inference_mode": True,
        "modules_to_save": [path.replace("/", ".") for path in adapter.heads] or None,
    }


def _write_weights(state: KitState, adapter: Adapter, errors: Errors) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """LoRA and IA3: the tensors, and their fields of adapter_config.json."""
    parts = to_peft_tensors(adapter, errors)
    heads = heads_of(state, adapter, errors)
    if errors.messages:
        return {}, {}
    rank, alpha = to_one_scale(parts, adapter.method.rslora) if isinstance(adapter.method, LoRA) else (0, 0.0)
    biases, bias_fields = write_biases(state, adapter, parts, errors) if rank else ({}, {})
    if errors.messages:
        return {}, {}
    tensors = {f"{PREFIX}{path}{end}": value for path, part in parts.items() for end, value in part.values.items()}
    tensors |= {PREFIX + key: value for key, value in [*biases.items(), *heads.items()]}
    all_paths = [path for path, _ in state.base.named_modules()]
    targets = target_modules_for(list(parts), all_paths, [p for p, part in parts.items() if part.at_input])
    task = task_of(state.base)
    fields = {
        "task_type": task if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") else None,  # in others PEFT adds heads by itself
        "target_modules": targets["target_modules"],
        "fan_in_fan_out": any(part.is_transposed for part in parts.values()),
    }
    if not isinstance(adapter.method, LoRA):
        return tensors, {"peft_type": "IA3", "feedforward_modules": targets["feedforward_modules"], **fields}
    return tensors, {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": patterns_of({path: part.rank for path, part in parts.items()}, rank),
        "alpha_pattern": patterns_of({path: part.alpha for path, part in parts.items()}, alpha),
        "lora_dropout": adapter.method.dropout,
        "use_rslora": adapter.method.rslora,
        "use_dora": adapter.method.dora,
        **bias_fields,
        "init_lora_weights": True,
        **fields,
    }
