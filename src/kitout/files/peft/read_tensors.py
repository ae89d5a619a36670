"""Tensors of PEFT's files by module, under the names of kitout's Deltas, and the heads.

Every unknown key is an error; a base weight that PEFT also stored (embeddings) must equal that of this base. It knows
the parameters of LoRA and IA3 and nothing of folders or json. `write_tensors.py` does the reverse.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kitout.base.select import COMPOSITE_ROLES
from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.base.weights import fan_in, is_conv1d
from kitout.errors import Errors, suggest
from kitout.files.peft.config import PeftConfig
from kitout.method import Method
from kitout.runtime.left_out import NEVER_RUNS
from kitout.runtime.state import KitState

PREFIX = "base_model.model."
ENDS = {
    "LORA": {
        ".lora_A.weight": "a",
        ".lora_B.weight": "b",
        ".lora_B.bias": "bias",
        ".lora_embedding_A": "a",
        ".lora_embedding_B": "b",
        ".lora_magnitude_vector": "magnitude",
        ".lora_magnitude_vector.weight": "magnitude",
    },
    "IA3": {".ia3_l": "scale"},
}
CONV_CLASSES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class PeftModuleTensors:
    """The adapter tensors of one module."""

    values: dict[str, Tensor] = field(default_factory=dict)
    """By the parameter names of a Delta when read, by PEFT's key endings when written."""
    rank: int = 0
    """LoRA only."""
    alpha: float = 0.0
    """LoRA only."""
    at_input: bool = False
    """On the module's input (IA3)."""
    is_transposed: bool = False
    """The module stores its weight as [d_in, d_out]."""
    bias: Tensor | None = None
    """Of B (lora_bias), when read."""
    shift: Tensor | None = None
    """What is added to the module's bias, when written; None where nothing can be."""
    has_shift: bool = False
    """The file trains a bias here."""


@dataclass
class PeftAdapter:
    """An adapter of a PEFT file in the terms of kitout."""

    method: Method
    sites: list[Site]
    values: dict[str, Tensor] = field(default_factory=dict)
    """By "<site>.<parameter>"."""
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """By path, then by parameter name."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Path -> why, of modules whose values have no effect in PEFT either."""


def adaptable_modules(survey: Survey) -> dict[str, Site]:
    """The whole modules that LoRA or IA3 can sit at, by path."""
    modules = (s for s in survey.sites if s.channels is None and s.role not in COMPOSITE_ROLES and s.port == "out")
    return {s.path: s for s in modules if s.kind in ("linear", "embedding", "conv")}


def by_module(
    state: KitState, settings: PeftConfig, stored: Mapping[str, Tensor], errors: Errors
) -> tuple[dict[str, PeftModuleTensors], dict[str, dict[str, Tensor]], dict[str, str]]:
    """The file's tensors as parts by module path, and as heads by path and parameter name; and path -> why of what has
    no effect: PEFT wraps modules, and these never run.
    """
    by_path: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, value in stored.items():
        end = next((e for e in ENDS[settings.kind] if key.endswith(e)), None)
        if end is not None and key.startswith(PREFIX):
            by_path.setdefault(key[len(PREFIX) :].removesuffix(end), {})[ENDS[settings.kind][end]] = value
        else:
            rest[key] = value
    heads = head_tensors(state.base, settings.modules_to_save, PREFIX, rest, errors)
    sites = adaptable_modules(state.survey)
    inert = inert_modules(state.survey)
    parts, left_out = {}, {}
    for path, values in by_path.items():
        if path in inert:
            left_out[path] = inert[path]
            continue
        if path not in sites:
            errors.add(
                f"this model has no module {path[:120]!r} that can have an adapter; {suggest(path[:120], sites, 3)}"
            )
            continue
        read = _read_lora if settings.kind == "LORA" else _read_ia3
        part = read(sites[path], settings, values)
        if isinstance(part, str):
            errors.add(f"{path}: {part}")
        else:
            parts[path] = part
    return parts, heads, left_out


def inert_modules(survey: Survey) -> dict[str, str]:
    """Path -> why of the modules where an adapter of PEFT, which wraps the module, never runs."""
    never = dict.fromkeys(survey.unused, NEVER_RUNS)
    read = (s for s in survey.sites if s.reader not in (None, s.path))
    return never | {s.path: f"PEFT has no effect there: {s.reader} reads its weight and never runs it" for s in read}


def head_tensors(
    base: nn.Module, modules_to_save: tuple[str, ...], prefix: str, stored: Mapping[str, Tensor], errors: Errors
) -> dict[str, dict[str, Tensor]]:
    """Heads by path and parameter name; tensors that belong to no head must equal those of the base."""
    heads: dict[str, dict[str, Tensor]] = {}
    for key, value in stored.items():
        rest = key.removeprefix(prefix)
        if rest == key:
            errors.add(f"unexpected key {key[:120]!r}: it does not start with {prefix!r}")
        elif (path := _head_path(base, modules_to_save, rest)) is not None:
            heads.setdefault(path, {})[rest[len(path) + 1 :]] = value
        elif reason := _unexpected(base, rest, value):
            errors.add(reason)
    for path in without_tensors(base, modules_to_save, heads):
        errors.add(f"modules_to_save names {path}, and the file has no tensors for it")
    return heads


def _head_path(base: nn.Module, modules_to_save: tuple[str, ...], rest: str) -> str | None:
    """The module of modules_to_save that a key belongs to: the outermost one whose path ends like an entry."""
    names = rest.split(".")
    for n in range(1, len(names)):
        path = ".".join(names[:n])
        if path.endswith(modules_to_save) and _submodule(base, path) is not None:
            return path
    return None


def without_tensors(base: nn.Module, modules_to_save: tuple[str, ...], heads: Collection[str]) -> list[str]:
    """Outermost modules with values whose paths end like an entry of `modules_to_save` and that are not in `heads`."""
    paths = [p for p, m in base.named_modules() if p and p.endswith(modules_to_save) and m.state_dict()]
    outermost = [p for p in paths if not any(p.startswith(f"{other}.") for other in paths)]
    return [p for p in outermost if p not in heads]


def _submodule(base: nn.Module, path: str) -> nn.Module | None:
    try:
        return base.get_submodule(path)
    except AttributeError:
        return None


def _unexpected(base: nn.Module, rest: str, value: Tensor) -> str | None:
    """None for a weight of the base that PEFT also stored and that is the same here; else the error message."""
    path, _, name = rest.replace(".base_layer.", ".").rpartition(".")
    module = _submodule(base, path)
    own = None if module is None else module._parameters.get(name)
    if own is None:
        return f"unexpected key {rest[:120]!r}: no such adapter tensor, and modules_to_save does not name it"
    if own.shape != value.shape:
        return f"{rest[:120]} has shape {list(value.shape)}, this base {list(own.shape)} (was the vocabulary resized?)"
    if not torch.allclose(own.float().cpu(), value.float(), rtol=2**-7, atol=1e-6):
        return f"{rest[:120]} differs from this base's own, which is not part of an adapter: list it in modules_to_save"
    return None


def _read_lora(site: Site, settings: PeftConfig, values: dict[str, Tensor]) -> PeftModuleTensors | str:
    needed = {"a", "b", "magnitude"} if settings.dora else {"a", "b"}
    if settings.lora_bias:
        needed |= {"bias"}
    if set(values) != needed:
        return f"has {', '.join(sorted(values))}, needs {', '.join(sorted(needed))}"
    if reason := why_peft_differs(site.module):
        return reason
    a, b = values["a"], values["b"]
    rank, width = settings.rank_at(site.path), fan_in(site)
    if a.shape[:1] != (rank,) or a.numel() != rank * width or b.shape[:2] != (site.d_out, rank) or b[0, 0].numel() != 1:
        shapes = f"A {list(a.shape)}, B {list(b.shape)}"
        return f"{shapes} do not fit rank {rank} over {width} -> {site.d_out}"
    scale = embed_scale(site.module)
    if scale != 1.0 and settings.dora:
        return f"DoRA over an embedding that multiplies its output by {scale:g} is not supported"
    parameters = {"a": a.reshape(rank, width), "b": b.reshape(site.d_out, rank) * scale}
    if settings.dora:
        if values["magnitude"].numel() != site.d_out:
            return f"magnitude has shape {list(values['magnitude'].shape)}, needs {site.d_out} values"
        parameters["magnitude"] = values["magnitude"].flatten()
    bias = values.get("bias")
    if bias is not None and bias.shape != (site.d_out,):
        return f"the bias of B has shape {list(bias.shape)}, needs {site.d_out} values"
    is_trained = settings.lora_bias or (settings.bias != "none" and site.module._parameters.get("bias") is not None)
    has_shift = is_trained and not isinstance(site.module, nn.Embedding)
    return PeftModuleTensors(parameters, rank, settings.alpha_at(site.path), bias=bias, has_shift=has_shift)


def _read_ia3(site: Site, settings: PeftConfig, values: dict[str, Tensor]) -> PeftModuleTensors | str:
    at_input, scale = settings.at_input(site.path), values["scale"]
    width = site.d_in if at_input else site.d_out
    if scale.numel() != width or max(scale.shape, default=0) != width:
        return f"ia3_l has shape {list(scale.shape)}, its {'input' if at_input else 'output'} has width {width}"
    return PeftModuleTensors({"scale": scale.flatten()}, at_input=at_input)


def why_peft_differs(module: nn.Module) -> str | None:
    """Why PEFT's LoRA over this module is another map than kitout's; None where it is the same."""
    if isinstance(module, CONV_CLASSES):
        is_plain = module.groups == 1 and all(d == 1 for d in module.dilation) and module.padding_mode == "zeros"
        return (
            None if is_plain else "PEFT's LoRA over a grouped, dilated or specially padded convolution is another map"
        )
    if isinstance(module, (nn.Linear, nn.Embedding)) or is_conv1d(module):
        return None
    return f"PEFT has no LoRA over {type(module).__name__}"


def embed_scale(module: nn.Module) -> float:
    """What an embedding multiplies its output by: PEFT multiplies its change as well, kitout adds it afterwards."""
    scale = getattr(module, "embed_scale", None) if isinstance(module, nn.Embedding) else None
    return 1.0 if scale is None else float(scale)
