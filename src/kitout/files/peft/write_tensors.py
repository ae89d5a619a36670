"""An adapter's tensors under PEFT's names; what PEFT cannot hold is an error with its reason.

Strength is folded, the subtracted start of PiSSA becomes more ranks, and channels of a fused projection become one map
on the whole. It knows the parameters of LoRA and IA3 and nothing of folders or json.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kitout.base.site import Site
from kitout.base.weights import is_conv1d
from kitout.errors import Errors
from kitout.files.head_spec import plain_class
from kitout.files.peft.read_tensors import CONV_CLASSES, PeftModuleTensors, embed_scale, why_peft_differs
from kitout.methods import IA3, LoRA
from kitout.methods.deltas.dora import DoRADelta
from kitout.methods.deltas.low_rank import LowRankDelta
from kitout.methods.lora import BIAS
from kitout.runtime.adapter import Adapter
from kitout.runtime.state import KitState

TASK_BY_CLASS_NAME = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
TEXT_INPUTS = ("input_ids", "attention_mask", "inputs_embeds")
DECODER_INPUTS = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds")


def to_peft_tensors(adapter: Adapter, errors: Errors) -> dict[str, PeftModuleTensors]:
    """The adapter's tensors by module path, under PEFT's key endings."""
    method = adapter.method
    if type(method) not in (LoRA, IA3):
        errors.add(f"{type(method).__name__} cannot be written for PEFT; LoRA (with rslora, dora) and IA3 can")
        return {}
    by_path: dict[str, list[Site]] = {}
    for site in adapter.sites:
        if site.parameter_names == BIAS:  # written by `biases.py`
            continue
        by_path.setdefault(site.path, []).append(site)
    parts = {}
    for path, sites in by_path.items():
        if sites[0].reader is not None:
            errors.add(f"{path}: PEFT wraps modules, and {sites[0].reader} reads this weight without running a module")
            continue
        part = _write_lora(adapter, sites) if isinstance(method, LoRA) else _write_ia3(adapter, sites)
        if isinstance(part, str):
            errors.add(f"{path}: {part}")
        else:
            part.is_transposed = is_conv1d(sites[0].module)
            parts[path] = part
    return parts


def to_one_scale(parts: Mapping[str, PeftModuleTensors], rslora: bool) -> tuple[int, float]:
    """r and lora_alpha of the whole file. A module whose alpha / rank differs from that of most has its B rescaled.

    Not every reader knows PEFT's patterns: versions of vLLM apply lora_alpha / r to every module. With one scale, ranks
    may differ. r is the largest, for which such a reader makes room.
    """

    def root(rank: int) -> float:
        return math.sqrt(rank) if rslora else rank

    scales = [_round_alpha(part.alpha / root(part.rank)) for part in parts.values()]
    scale = max(scales, key=scales.count)
    for part, own in zip(parts.values(), scales, strict=True):
        if own != scale:
            ends = [end for end in part.values if end.startswith((".lora_B.", ".lora_embedding_B"))]
            part.values |= {end: part.values[end] * (own / scale) for end in ends}
            part.alpha = _round_alpha(scale * root(part.rank))
    rank = max(part.rank for part in parts.values())
    alphas = {part.rank: part.alpha for part in parts.values()}
    return rank, alphas[rank]


def _write_lora(adapter: Adapter, sites: Sequence[Site]) -> PeftModuleTensors | str:
    module, strength, method = sites[0].module, adapter.strength, adapter.method
    assert isinstance(method, LoRA)
    if any(s.port != "out" for s in sites):
        return "PEFT's LoRA changes a module's output, this one its input"
    if reason := why_peft_differs(module):
        return reason
    deltas = [adapter.delta(s) for s in sites]
    extra = {}
    if isinstance(deltas[0], DoRADelta):
        if sites[0].channels is not None:
            return "PEFT's DoRA renormalizes every row of a fused projection, this one only some"
        if strength != 1.0 or embed_scale(module) != 1.0:
            return f"DoRA at strength {strength:g} or over a scaled embedding has no equivalent in PEFT: set strength 1"
        factors: tuple[Tensor, Tensor, float] = deltas[0].a, deltas[0].b, deltas[0].scale
        extra = {".lora_magnitude_vector": deltas[0].magnitude.view(_vector_shape(module, 1))}
    else:
        factors = _stack_factors(sites, deltas)
    a, b, scale = factors
    rank = a.shape[0]
    alpha = strength * scale * (math.sqrt(rank) if method.rslora else rank)
    b = b / embed_scale(module)
    if isinstance(module, nn.Embedding):
        values = {".lora_embedding_A": a, ".lora_embedding_B": b}
    else:
        kernel = module.weight.shape[1:] if isinstance(module, CONV_CLASSES) else a.shape[1:]
        values = {".lora_A.weight": a.reshape(rank, *kernel), ".lora_B.weight": b[(...,) + (None,) * (len(kernel) - 1)]}
    return PeftModuleTensors({**values, **extra}, rank, _round_alpha(alpha), shift=_shift(adapter, sites))


def _shift(adapter: Adapter, sites: Sequence[Site]) -> Tensor | None:
    """What the sites of one module add to its bias, [d_out] of the whole module; None where they have none."""
    whole: Tensor | None = None
    for site in sites:
        shift = adapter.delta(site)._parameters.get("shift")
        if shift is not None:
            whole = shift.new_zeros(_num_outputs(site)) if whole is None else whole
            whole[slice(None) if site.channel_index is None else site.channel_index] += adapter.strength * shift
    return whole


def _stack_factors(sites: Sequence[Site], deltas: Sequence[Any]) -> tuple[Tensor, Tensor, float]:
    """A, B and scale of one low-rank map for the whole module: ranks add up, each site writes its own channels."""
    scale = deltas[0].scale
    all_a, all_b = [], []
    for site, delta in zip(sites, deltas, strict=True):
        assert isinstance(delta, LowRankDelta)
        a, b = delta.factors()
        b = b * (delta.scale / scale)
        if site.channel_index is not None:
            whole = b.new_zeros(_num_outputs(site), b.shape[1])
            whole[site.channel_index] = b
            b = whole
        all_a.append(a)
        all_b.append(b)
    return torch.cat(all_a), torch.cat(all_b, 1), scale


def _num_outputs(site: Site) -> int:
    """Number of outputs of the whole module that a site with channels belongs to."""
    weight = site.module._parameters["weight"]
    assert weight is not None
    return int(weight.shape[1] if is_conv1d(site.module) else weight.shape[0])


def _write_ia3(adapter: Adapter, sites: Sequence[Site]) -> PeftModuleTensors | str:
    module, strength = sites[0].module, adapter.strength
    at_input = sites[0].port == "in"
    if any((s.port == "in") != at_input for s in sites):
        return "PEFT's IA3 scales a module's input or its output, this one both"
    if not (isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)) or is_conv1d(module)):
        return f"PEFT has no IA3 over {type(module).__name__}"
    total: Tensor | None = None
    for site in sites:
        scale: Any = adapter.delta(site).scale
        value = 1.0 + strength * (scale - 1.0) if strength != 1.0 else scale
        if site.channel_index is not None:
            total = torch.ones(_num_outputs(site), dtype=value.dtype, device=value.device) if total is None else total
            total[site.channel_index] *= value
        else:
            total = value if total is None else total * value
    assert total is not None
    shape = _vector_shape(module, 1) if isinstance(module, CONV_CLASSES) else (1, -1) if at_input else (-1, 1)
    return PeftModuleTensors({".ia3_l": total.reshape(shape)}, at_input=at_input)


def _vector_shape(module: nn.Module, axis: int) -> tuple[int, ...]:
    """The shape of a vector over channels in PEFT: (1, n, 1, 1) for a convolution, else (n,)."""
    if not isinstance(module, CONV_CLASSES):
        return (-1,)
    return tuple(-1 if i == axis else 1 for i in range(module.weight.ndim))


def why_not_in_vllm(adapter: Adapter) -> list[str]:
    """What vLLM refuses or passes over when it loads such a folder: every reason. After vllm/lora/peft_helper.py."""
    method = adapter.method
    if not isinstance(method, LoRA):
        return [f"it reads LoRA only, and this is {type(method).__name__}: serve kit.merged_copy({adapter.name!r})"]
    reasons = ["it does not read DoRA (dora=True)"] if method.dora else []
    if method.bias != "none" or method.lora_bias:
        reasons.append(f"it reads no trained biases (bias={method.bias!r}, lora_bias={method.lora_bias})")
    if adapter.heads:
        heads = ", ".join(path.replace("/", ".") for path in adapter.heads)
        reasons.append(f"it reads no heads (modules_to_save): {heads}")
    others = {
        type(s.module).__name__: s.path
        for s in adapter.sites
        if not isinstance(s.module, (nn.Linear, nn.Embedding)) and not is_conv1d(s.module)
    }
    return reasons + [f"it has no LoRA over {kind} ({path})" for kind, path in others.items()]


def _round_alpha(value: float) -> float:
    """8 instead of 8.000000000000002 or 8.0: alpha was divided by the rank and multiplied again."""
    rounded = float(f"{value:.12g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 2**31 else rounded


def task_of(model: Any) -> str | None:
    """PEFT's task type of a model; None where PEFT's class for that task cannot call it.

    Each of these classes passes on the inputs of a text model by name, those that are not given as None. So it cannot
    call a model of sound or images, which would hand `input_ids` on to a part that gets its own.
    """
    cls = plain_class(model)
    task = next((task for end, task in TASK_BY_CLASS_NAME.items() if cls.__name__.endswith(end)), None)
    if task is None:
        generates = callable(getattr(model, "can_generate", None)) and model.can_generate()
        task = "FEATURE_EXTRACTION"
        if generates:
            task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    passed = TEXT_INPUTS + (DECODER_INPUTS if task == "SEQ_2_SEQ_LM" else ())
    takes_ids = "input_ids" in inspect.signature(cls.forward).parameters
    return task if takes_ids and all(takes_argument(model, name) for name in passed) else None


def takes_argument(model: Any, name: str) -> bool:
    """The model's forward has this argument, or hands it on to what is below its head."""
    parameters = inspect.signature(plain_class(model).forward).parameters
    if name in parameters:
        return True
    below = getattr(model, "base_model", model)
    hands_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return hands_on and below is not model and name in inspect.signature(plain_class(below).forward).parameters


def heads_of(state: KitState, adapter: Adapter, errors: Errors) -> dict[str, Tensor]:
    """Head tensors under PEFT's keys. PEFT fills a copy of the base's module, so the head must be of that class."""
    tensors: dict[str, Tensor] = {}
    all_paths = [path for path, _ in state.base.named_modules()]
    for key, head in adapter.heads.items():
        path, module = key.replace("/", "."), head.module
        assert isinstance(module, nn.Module)
        own, values = state.base.get_submodule(path), module.state_dict()
        also = [p for p in all_paths if p.endswith(path) and p.replace(".", "/") not in adapter.heads]
        if plain_class(module) is not plain_class(own) or values.keys() != own.state_dict().keys():
            errors.add(
                f"head {path}: PEFT copies the base's {type(own).__name__}, and this is a {type(module).__name__}"
            )
        if adapter.strength != 1.0:
            errors.add(f"head {path}: strength {adapter.strength:g} mixes two heads, which PEFT cannot: set strength 1")
        if also:
            errors.add(f"head {path}: PEFT would also replace {', '.join(also[:3])}, whose paths have the same end")
        tensors |= {f"{path}.{name}": value for name, value in values.items()}
    return tensors
