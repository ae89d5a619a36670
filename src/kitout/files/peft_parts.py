"""Tensors of PEFT's files and those of our Deltas, translated module by module in both directions.

A `Part` is what one module carries. Reading: keys are taken apart and every stranger is named; a base weight that PEFT
stored along (embeddings) must equal the one here. Writing: what PEFT has no place for is a fault with its reason. It
knows LoRA's and IA3's parameters and nothing of folders or json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kitout.base.select import WHOLE
from kitout.base.site import Site
from kitout.base.weights import fan_in, transposed
from kitout.errors import Faults, suggest
from kitout.files.heads import plain_class
from kitout.files.peft_config import Settings
from kitout.kit.adapter import Adapter
from kitout.methods import IA3, LoRA
from kitout.methods.dora import Decomposed
from kitout.methods.lowrank import LowRank

if TYPE_CHECKING:
    from kitout.base.find import Survey
    from kitout.kit.kit import Kit

PREFIX = "base_model.model."
ENDS = {
    "LORA": {
        ".lora_A.weight": "a",
        ".lora_B.weight": "b",
        ".lora_embedding_A": "a",
        ".lora_embedding_B": "b",
        ".lora_magnitude_vector": "magnitude",
        ".lora_magnitude_vector.weight": "magnitude",
    },
    "IA3": {".ia3_l": "scale"},
}
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Part:
    """What one module carries. values: by a Delta's own parameter names when read, by PEFT's key endings when written.

    inward: on the module's input (IA3). transposed: the weight is stored [d_in, d_out].
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    rank: int = 0
    alpha: float = 0.0
    inward: bool = False
    transposed: bool = False


def carriers(survey: Survey) -> dict[str, Site]:
    """The whole modules that a weight adapter can sit at, by path."""
    able = (s for s in survey.sites if s.channels is None and s.role not in WHOLE and s.port == "out")
    return {s.path: s for s in able if s.kind in ("linear", "embedding", "conv")}


# ---- reading --------------------------------------------------------------------------------------------------------


def grouped(
    kit: Kit, settings: Settings, stored: Mapping[str, Tensor], faults: Faults
) -> tuple[dict[str, Part], dict[str, dict[str, Tensor]]]:
    """The file's tensors as parts by module path, and as heads by path and parameter name."""
    raw: dict[str, dict[str, Tensor]] = {}
    heads: dict[str, dict[str, Tensor]] = {}
    for key, value in stored.items():
        if not key.startswith(PREFIX):
            faults.add(f"unexpected key {key[:120]!r}: it does not start with {PREFIX!r}")
            continue
        rest = key[len(PREFIX) :]
        end = next((e for e in ENDS[settings.kind] if rest.endswith(e)), None)
        if end is not None:
            raw.setdefault(rest.removesuffix(end), {})[ENDS[settings.kind][end]] = value
        elif (path := _head_path(kit.base, settings, rest)) is not None:
            heads.setdefault(path, {})[rest[len(path) + 1 :]] = value
        elif reason := _stranger(kit.base, rest, value):
            faults.add(reason)
    sites = carriers(kit.found)
    parts = {}
    for path, values in raw.items():
        if path not in sites:
            faults.add(f"this model has no module {path[:120]!r} that could carry it; {suggest(path[:120], sites, 3)}")
            continue
        read = _read_lora if settings.kind == "LORA" else _read_ia3
        part = read(sites[path], settings, values)
        if isinstance(part, str):
            faults.add(f"{path}: {part}")
        else:
            parts[path] = part
    return parts, heads


def _head_path(base: nn.Module, settings: Settings, rest: str) -> str | None:
    """The module of modules_to_save that a key belongs to: the outermost one whose path ends like an entry."""
    names = rest.split(".")
    for n in range(1, len(names)):
        path = ".".join(names[:n])
        if path.endswith(settings.saved) and _submodule(base, path) is not None:
            return path
    return None


def _submodule(base: nn.Module, path: str) -> nn.Module | None:
    try:
        return base.get_submodule(path)
    except AttributeError:
        return None


def _stranger(base: nn.Module, rest: str, value: Tensor) -> str | None:
    """None for a weight of the base that PEFT stored along and that is the same here; else what is wrong with it."""
    path, _, name = rest.replace(".base_layer.", ".").rpartition(".")
    module = _submodule(base, path)
    own = None if module is None else module._parameters.get(name)
    if own is None:
        return f"unexpected key {rest[:120]!r}: no such adapter tensor, and modules_to_save does not name it"
    if own.shape != value.shape:
        return f"{rest[:120]} has shape {list(value.shape)}, this base {list(own.shape)} (was the vocabulary resized?)"
    if not torch.allclose(own.float().cpu(), value.float(), rtol=2**-7, atol=1e-6):
        return (
            f"{rest[:120]} was changed from this base's own, which is no part of an adapter: list it in modules_to_save"
        )
    return None


def _read_lora(site: Site, settings: Settings, values: dict[str, Tensor]) -> Part | str:
    wanted = {"a", "b", "magnitude"} if settings.dora else {"a", "b"}
    if set(values) != wanted:
        return f"has {', '.join(sorted(values))}, needs {', '.join(sorted(wanted))}"
    if reason := _unlike_ours(site.module):
        return reason
    a, b = values["a"], values["b"]
    rank, width = settings.rank_at(site.path), fan_in(site)
    if a.shape[:1] != (rank,) or a.numel() != rank * width or b.shape[:2] != (site.d_out, rank) or b[0, 0].numel() != 1:
        shapes = f"A {list(a.shape)}, B {list(b.shape)}"
        return f"{shapes} do not fit rank {rank} over {width} -> {site.d_out}"
    scale = _embed_scale(site.module)
    if scale != 1.0 and settings.dora:
        return f"DoRA over an embedding that multiplies its output by {scale:g} is not supported"
    ours = {"a": a.reshape(rank, width), "b": b.reshape(site.d_out, rank) * scale}
    if settings.dora:
        if values["magnitude"].numel() != site.d_out:
            return f"magnitude has shape {list(values['magnitude'].shape)}, needs {site.d_out} values"
        ours["magnitude"] = values["magnitude"].flatten()
    return Part(ours, rank, settings.alpha_at(site.path))


def _read_ia3(site: Site, settings: Settings, values: dict[str, Tensor]) -> Part | str:
    inward, scale = settings.inward(site.path), values["scale"]
    width = site.d_in if inward else site.d_out
    if scale.numel() != width or max(scale.shape, default=0) != width:
        return f"ia3_l has shape {list(scale.shape)}, its {'input' if inward else 'output'} has width {width}"
    return Part({"scale": scale.flatten()}, inward=inward)


def _unlike_ours(module: nn.Module) -> str | None:
    """Why PEFT's map over this module is another one than ours."""
    if isinstance(module, CONVS):
        plain = module.groups == 1 and all(d == 1 for d in module.dilation) and module.padding_mode == "zeros"
        return None if plain else "PEFT's LoRA over a grouped, dilated or specially padded convolution is another map"
    if isinstance(module, (nn.Linear, nn.Embedding)) or transposed(module):
        return None
    return f"PEFT has no LoRA over {type(module).__name__}"


def _embed_scale(module: nn.Module) -> float:
    """What an embedding multiplies its output by; PEFT's change is multiplied along, ours is added after."""
    scale = getattr(module, "embed_scale", None) if isinstance(module, nn.Embedding) else None
    return 1.0 if scale is None else float(scale)


# ---- writing --------------------------------------------------------------------------------------------------------


def exported(adapter: Adapter, faults: Faults) -> dict[str, Part]:
    """The adapter's values under PEFT's names, by module path."""
    method = adapter.method
    if type(method) not in (LoRA, IA3):
        faults.add(f"{type(method).__name__} is no method of PEFT's files; LoRA (with rslora, dora) and IA3 are")
        return {}
    by_path: dict[str, list[Site]] = {}
    for site in adapter.sites:
        by_path.setdefault(site.path, []).append(site)
    parts = {}
    for path, sites in by_path.items():
        part = _write_lora(adapter, sites) if isinstance(method, LoRA) else _write_ia3(adapter, sites)
        if isinstance(part, str):
            faults.add(f"{path}: {part}")
        else:
            part.transposed = transposed(sites[0].module)
            parts[path] = part
    return parts


def _write_lora(adapter: Adapter, sites: Sequence[Site]) -> Part | str:
    module, strength, method = sites[0].module, adapter.strength, adapter.method
    assert isinstance(method, LoRA)
    if any(s.port != "out" for s in sites):
        return "PEFT's LoRA changes a module's output, this one its input"
    if reason := _unlike_ours(module):
        return reason
    deltas = [adapter.delta(s) for s in sites]
    extra = {}
    if isinstance(deltas[0], Decomposed):
        if sites[0].channels is not None:
            return "PEFT's DoRA renormalises every row of a fused projection, this one only some"
        if strength != 1.0 or _embed_scale(module) != 1.0:
            return f"DoRA at strength {strength:g} or over a scaled embedding has no equal in PEFT: set strength 1"
        factors: tuple[Tensor, Tensor, float] = deltas[0].a, deltas[0].b, deltas[0].scale
        extra = {".lora_magnitude_vector": deltas[0].magnitude.view(_spread(module, 1))}
    else:
        factors = _stacked(sites, deltas)
    a, b, scale = factors
    rank = a.shape[0]
    alpha = strength * scale * (math.sqrt(rank) if method.rslora else rank)
    b = b / _embed_scale(module)
    if isinstance(module, nn.Embedding):
        values = {".lora_embedding_A": a, ".lora_embedding_B": b}
    else:
        kernel = module.weight.shape[1:] if isinstance(module, CONVS) else a.shape[1:]
        values = {".lora_A.weight": a.reshape(rank, *kernel), ".lora_B.weight": b[(...,) + (None,) * (len(kernel) - 1)]}
    return Part({**values, **extra}, rank, _short(alpha))


def _stacked(sites: Sequence[Site], deltas: Sequence[Any]) -> tuple[Tensor, Tensor, float]:
    """One low-rank map for the whole module: ranks add up, each part writes its own channels, one scale for all."""
    scale = deltas[0].scale
    downs, ups = [], []
    for site, delta in zip(sites, deltas, strict=True):
        assert isinstance(delta, LowRank)
        a, b = delta.factors()
        b = b * (delta.scale / scale)
        if site.span is not None:
            whole = b.new_zeros(_width(site), b.shape[1])
            whole[site.span] = b
            b = whole
        downs.append(a)
        ups.append(b)
    return torch.cat(downs), torch.cat(ups, 1), scale


def _width(site: Site) -> int:
    """Outputs of the whole module a fused part belongs to."""
    weight = site.module._parameters["weight"]
    assert weight is not None
    return int(weight.shape[1] if transposed(site.module) else weight.shape[0])


def _write_ia3(adapter: Adapter, sites: Sequence[Site]) -> Part | str:
    module, strength = sites[0].module, adapter.strength
    inward = sites[0].port == "in"
    if any((s.port == "in") != inward for s in sites):
        return "PEFT's IA3 scales a module's input or its output, this one both"
    if not (isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)) or transposed(module)):
        return f"PEFT has no IA3 over {type(module).__name__}"
    total: Tensor | None = None
    for site in sites:
        scale: Any = adapter.delta(site).scale
        value = 1.0 + strength * (scale - 1.0) if strength != 1.0 else scale
        if site.span is not None:
            total = torch.ones(_width(site), dtype=value.dtype, device=value.device) if total is None else total
            total[site.span] *= value
        else:
            total = value if total is None else total * value
    assert total is not None
    shape = _spread(module, 1) if isinstance(module, CONVS) else (1, -1) if inward else (-1, 1)
    return Part({".ia3_l": total.reshape(shape)}, inward=inward)


def _spread(module: nn.Module, axis: int) -> tuple[int, ...]:
    """The shape PEFT gives a vector over a convolution's channels, (1, n, 1, 1); (n,) elsewhere."""
    if not isinstance(module, CONVS):
        return (-1,)
    return tuple(-1 if i == axis else 1 for i in range(module.weight.ndim))


def _short(value: float) -> float:
    """8 rather than 8.000000000000002, and 8 rather than 8.0: alpha went through a division and back."""
    rounded = float(f"{value:.12g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 2**31 else rounded


def heads_of(kit: Kit, adapter: Adapter, faults: Faults) -> dict[str, Tensor]:
    """Head tensors under PEFT's keys. PEFT copies the base's own module and fills it, so it must be one like that."""
    found: dict[str, Tensor] = {}
    everything = [path for path, _ in kit.base.named_modules()]
    for key, head in adapter.heads.items():
        path, module = key.replace("/", "."), head.module
        assert isinstance(module, nn.Module)
        own, state = kit.base.get_submodule(path), module.state_dict()
        also = [p for p in everything if p.endswith(path) and p != path]
        if plain_class(module) is not plain_class(own) or state.keys() != own.state_dict().keys():
            faults.add(
                f"head {path}: PEFT copies the base's {type(own).__name__}, and this is a {type(module).__name__}"
            )
        if adapter.strength != 1.0:
            faults.add(f"head {path}: strength {adapter.strength:g} mixes two heads, which PEFT cannot: set strength 1")
        if also:
            faults.add(f"head {path}: PEFT would also replace {', '.join(also[:3])}, whose names end alike")
        found |= {f"{path}.{name}": value for name, value in state.items()}
    return found
