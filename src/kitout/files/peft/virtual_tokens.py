"""Prompts and prefixes in PEFT's files: one tensor of what lies in front of the text, as our Deltas hold it, both ways.

A prompt is [p, d]; for an encoder-decoder PEFT keeps p rows more, which it never reads. A prefix is [m, 2 L H_kv d_h],
keys and values of each layer in turn, of the decoder's self-attention alone where there is an encoder too; an encoder
of the prefix (prefix_projection) is folded when PEFT saves, and when we do. PEFT's prompts before an encoder also stand
in for the token that a classifier reads. It knows those two methods, and nothing of folders or json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kitout.base.site import Site
from kitout.base.survey import Tower
from kitout.errors import Errors
from kitout.files.head_spec import plain_class
from kitout.files.peft.config import TASKS, PeftPromptConfig
from kitout.files.peft.read_tensors import PeftAdapter, head_tensors, without_tensors
from kitout.files.peft.write_tensors import heads_of, task_of
from kitout.methods import PrefixTuning, PromptTuning
from kitout.runtime.adapter import Adapter
from kitout.runtime.state import KitState

PROMPT_KEY, PREFIX = "prompt_embeddings", "base_model."
ENCODER_DECODER_TASK = "SEQ_2_SEQ_LM"  # the task of an encoder and a decoder
HEADS = ("classifier", "score")  # what PEFT takes for the head of SEQ_CLS and insists on finding in the file


def read_virtual_tokens(
    state: KitState, settings: PeftPromptConfig, stored: Mapping[str, Tensor], faults: Errors
) -> PeftAdapter:
    """The method, its sites in this model and their values; values are missing where a fault was added."""
    task = task_of(state.base)
    if reason := _why_no_task(state, task):
        faults.add(reason)
    elif task != settings.task:
        faults.add(f"it was made for a model of {settings.task}, and {_model_name(state)} is one of {task}")
    prompt = settings.kind == "PROMPT_TUNING"
    method = _prompt_method(state, settings, faults) if prompt else _prefix_method(state, settings)
    front = PeftAdapter(method, method.sites(state.survey))
    rest = {key: value for key, value in stored.items() if key != PROMPT_KEY}
    front.heads = head_tensors(state.base, settings.modules_to_save, PREFIX, rest, faults)
    able = ((1, 2) if prompt else (2,)) if settings.task == ENCODER_DECODER_TASK else (1,)
    if settings.num_submodules not in able:
        faults.add(
            f"num_transformer_submodules={settings.num_submodules} makes no sense for {settings.task} and "
            f"{settings.kind}"
        )
    if PROMPT_KEY not in stored:
        faults.add(f"tensor {PROMPT_KEY!r} is missing")
    elif prompt:
        _read_prompt(front, settings, stored[PROMPT_KEY], faults)
    else:
        _read_prefix(state, front, settings, stored[PROMPT_KEY], faults)
    return front


def _prompt_method(state: KitState, settings: PeftPromptConfig, faults: Errors) -> PromptTuning:
    if settings.task != "SEQ_CLS" or any(t.causal for t in state.survey.towers):
        return PromptTuning(length=settings.length)
    if reason := _why_reads_more(state):
        faults.add(reason)
    return PromptTuning(length=settings.length, pooled="prompt")


def _read_prompt(peft_adapter: PeftAdapter, settings: PeftPromptConfig, value: Tensor, faults: Errors) -> None:
    site = peft_adapter.sites[0]
    if len(peft_adapter.sites) > 1:
        faults.add(
            f"PEFT's prompts are in one stack, here they would be in {', '.join(s.tower for s in peft_adapter.sites)}"
        )
        return
    wanted = (settings.length * settings.num_submodules, site.d_out)
    if tuple(value.shape) != wanted or settings.width not in (None, site.d_out):
        shape, told = list(value.shape), settings.width
        faults.add(
            f"{PROMPT_KEY} has shape {shape} (token_dim={told}), and {settings.length} prompts here take {list(wanted)}"
        )
        return
    peft_adapter.values[f"{site.key}.prompt"] = value[: settings.length].clone()


def _prefix_method(state: KitState, settings: PeftPromptConfig) -> PrefixTuning:
    method = PrefixTuning(length=settings.length)
    return method if len(state.survey.towers) == 1 else method.model_copy(update={"places": "decoder"})


def _read_prefix(
    state: KitState, peft_adapter: PeftAdapter, settings: PeftPromptConfig, value: Tensor, faults: Errors
) -> None:
    sites = peft_adapter.sites
    if reason := _why_prefix_differs(state, sites):
        faults.add(reason)
        return
    heads, width = sites[0].num_kv_heads, sites[0].d_out
    slots = settings.layers or len(sites)
    fits = slots >= len(sites) if settings.num_submodules > 1 else slots == len(sites)
    told = settings.heads in (None, heads) and settings.width in (None, width)
    if not (fits and told and tuple(value.shape) == (settings.length, 2 * slots * width)):
        said = f"{settings.layers} layers of {settings.heads} heads in {settings.width} channels"
        faults.add(
            f"{PROMPT_KEY} has shape {list(value.shape)} for {said}; {settings.length} positions here take "
            f"{[settings.length, 2 * len(sites) * width]}: {len(sites)} layers of {heads} heads in {width} channels"
        )
        return
    parts = value.view(settings.length, slots, 2, heads, width // heads)
    for layer, site in enumerate(sites):
        peft_adapter.values[f"{site.key}.prefix"] = parts[:, _slot(layer, settings.num_submodules, slots)].clone()


def _slot(layer: int, num_submodules: int, slots: int) -> int:
    """Which keys and values of the file a layer gets.

    For an encoder-decoder PEFT lays the file's twice in a row and deals out four tensors to each layer, two for itself
    and two for the cross-attention, which are then dropped: the decoder's layers get every second of an odd number, and
    the first half of an even number of layers shares its prefix with the second.
    """
    return num_submodules * layer % slots


def _why_no_task(state: KitState, task: str | None) -> str | None:
    """Why PEFT has nothing to put in front of the text of such a model."""
    if task not in TASKS:
        return f"PEFT has prompts and prefixes for {', '.join(TASKS)}, and {_model_name(state)} is for none of them"
    if task == "SEQ_CLS" and len(state.survey.towers) > 1:
        return (
            "PEFT's prompts and prefixes do not work in a classifier with encoder and decoder, as "
            f"{_model_name(state)} is"
        )
    return None


def _why_reads_more(state: KitState) -> str | None:
    """Why the head of this encoder does not read its first token alone, so that PEFT's prompts would be more to it."""
    config = getattr(state.base, "config", None)
    for name in ("classifier_pooling", "summary_type"):
        if (how := getattr(config, name, None)) not in (None, "cls", "first"):
            return f"{name}={how!r}: with PEFT this classifier reads the prompts' outputs as well, here it does not"
    return None


def _tower(state: KitState, site: Site) -> Tower:
    return next(t for t in state.survey.towers if t.path == site.tower)


def _model_name(state: KitState) -> str:
    return plain_class(state.base).__name__


def write_virtual_tokens(state: KitState, adapter: Adapter, faults: Errors) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The file's tensors and what its config says beyond the common; adapter: settled."""
    task, prompt = task_of(state.base), isinstance(adapter.method, PromptTuning)
    if reason := _why_no_task(state, task):
        faults.add(reason)
    if adapter.strength != 1.0:
        faults.add(f"strength {adapter.strength:g} has no equal in PEFT for what lies in front: set strength 1")
    unlike = _why_prompt_differs if prompt else _why_prefix_unsaved
    if reason := unlike(state, adapter):
        faults.add(reason)
    heads = heads_of(state, adapter, faults)
    if task == "SEQ_CLS":
        heads |= _own_heads(state, adapter, faults)
    if faults.messages:
        return {}, {}
    value, told = (
        _write_prompt(state, adapter) if prompt else _write_prefix(adapter, 2 if task == ENCODER_DECODER_TASK else 1)
    )
    tensors = {PROMPT_KEY: value, **{PREFIX + key: value for key, value in heads.items()}}
    return tensors, {"task_type": task, "num_virtual_tokens": len(value), "token_dim": adapter.sites[0].d_out, **told}


def _write_prompt(state: KitState, adapter: Adapter) -> tuple[Tensor, dict[str, Any]]:
    (site,) = adapter.sites
    value: Any = adapter.delta(site).prompt
    return value, {
        "peft_type": "PROMPT_TUNING",
        "num_transformer_submodules": 1,  # without the rows that PEFT would keep for a decoder and never read
        "num_attention_heads": 1,  # read by nobody, but looked for in the model's config if it is not here
        "num_layers": _tower(state, site).depth,  # likewise
        "prompt_tuning_init": "RANDOM",
    }


def _write_prefix(adapter: Adapter, num_submodules: int) -> tuple[Tensor, dict[str, Any]]:
    values: list[Any] = [adapter.delta(s).prefix for s in adapter.sites]
    slots = len(values) + (num_submodules - 1) * (1 - len(values) % 2)  # an odd number, so that no two layers share one
    parts = values[0].new_zeros(len(values[0]), slots, *values[0].shape[1:])
    for layer, value in enumerate(values):
        parts[:, _slot(layer, num_submodules, slots)] = value
    return parts.flatten(1), {
        "peft_type": "PREFIX_TUNING",
        "num_transformer_submodules": num_submodules,
        "num_attention_heads": adapter.sites[0].num_kv_heads,
        "num_layers": slots,
        "prefix_projection": False,
    }


def _why_prefix_differs(state: KitState, sites: Sequence[Site]) -> str | None:
    """Why these attentions are not what a prefix of PEFT sits at: every layer of one stack, all of one shape."""
    towers, shapes = {s.tower for s in sites}, sorted({(s.num_kv_heads, s.d_out) for s in sites})
    if len(towers) > 1 or any(s.role != "kv.self" for s in sites):
        return (
            f"PEFT's prefix is in one stack's self-attention, this one at {len(sites)} places in "
            f"{', '.join(sorted(towers))}: choose places='decoder' (or 'encoder' where there is no decoder)"
        )
    tower = _tower(state, sites[0])
    if len(state.survey.towers) > 1 and not tower.causal:
        return f"PEFT's prefix is in the decoder, this one in {tower.path}"
    if [s.layer for s in sites] != list(range(tower.depth)):
        return f"PEFT's prefix is in every layer, this one in {len(sites)} of the {tower.depth} in {tower.path}"
    if len(shapes) > 1:
        return f"PEFT's prefix has one shape, and attentions here have {shapes} (heads, channels)"
    return None


def _why_prefix_unsaved(state: KitState, adapter: Adapter) -> str | None:
    """Why PEFT has no prefix like this one: its keys must also be as wide as the cache that PEFT puts them into."""
    site = adapter.sites[0]
    if reason := _why_prefix_differs(state, adapter.sites):
        return reason
    queries = max((s.d_in for s in state.survey.sites if (s.tower, s.role) == (site.tower, "attn.o")), default=0)
    if queries > site.d_out and getattr(getattr(state.base, "config", None), "num_key_value_heads", None) is None:
        return (
            f"{site.path} has keys of {site.d_out} channels for queries of {queries}; without num_key_value_heads in "
            "the model's config there is no telling which of them its cache, and so PEFT's prefix, has"
        )
    return None


def _why_prompt_differs(state: KitState, adapter: Adapter) -> str | None:
    """Why PEFT has no prompt like this one."""
    method, sites = adapter.method, adapter.sites
    assert isinstance(method, PromptTuning)
    if method.place == "after":
        return "PEFT's prompts come before the text, this one after its first token (place='after')"
    tower = _tower(state, sites[0])
    if len(sites) > 1 or (tower.causal and len(state.survey.towers) > 1):
        return f"PEFT's prompts are the encoder's alone, these in {', '.join(s.tower for s in sites)}"
    if tower.causal or task_of(state.base) != "SEQ_CLS":
        return None
    if method.pooled == "text":
        return (
            "with PEFT an encoder's classifier reads the output of the first prompt, here that of the first token: "
            "train it with PromptTuning(pooled='prompt')"
        )
    return _why_reads_more(state)


def _own_heads(state: KitState, adapter: Adapter, faults: Errors) -> dict[str, Tensor]:
    """The base's own heads, where the adapter brings none: PEFT does not load a classifier's prompts without."""
    brought = [path.replace("/", ".") for path in adapter.heads]
    base: nn.Module = state.base
    paths = without_tensors(base, HEADS, brought)
    if paths and state.merged_names:
        faults.add(f"{paths[0]} goes along, and {state.merged_text} merged into the base: unmerge() first")
    return {f"{p}.{name}": value for p in paths for name, value in base.get_submodule(p).state_dict().items()}
