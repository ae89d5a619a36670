"""Prompts and prefixes in PEFT's files: one tensor of virtual tokens, read and written.

A prompt is [p, d]; for an encoder-decoder PEFT keeps p more rows, which it never reads. A prefix is [m, 2 L H_kv d_h],
keys and values of each layer in turn, of the decoder's self-attention only where there is an encoder too. An encoder of
the prefix (prefix_projection) is folded when PEFT saves, and when kitout does. PEFT's prompts before an encoder also
replace the token that a classifier reads. Where PEFT returns outputs of its prompts too (hidden states, token labels),
kitout returns those of the text. It knows these two methods, and nothing of folders or json.
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
from kitout.files.peft.write_tensors import heads_of, takes_argument, task_of
from kitout.methods import PrefixTuning, PromptTuning
from kitout.runtime.adapter import Adapter
from kitout.runtime.build_adapter import cached_heads
from kitout.runtime.state import KitState

PROMPT_KEY, PREFIX = "prompt_embeddings", "base_model."
ENCODER_DECODER_TASK = "SEQ_2_SEQ_LM"
# What PEFT takes for the head of a task and insists on finding in the file.
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def read_virtual_tokens(
    state: KitState, settings: PeftPromptConfig, stored: Mapping[str, Tensor], errors: Errors
) -> PeftAdapter:
    """The method, its sites in this model and their values; values are missing where an error was added."""
    task = task_of(state.base)
    if reason := _why_no_task(state, task):
        errors.add(reason)
    elif settings.task not in (task, "FEATURE_EXTRACTION"):  # which PEFT runs on any model, as it is
        errors.add(f"it was made for a model of {settings.task}, and {_model_name(state)} is one of {task}")
    is_prompt = settings.kind == "PROMPT_TUNING"
    if not is_prompt and (reason := _why_no_cache_for(state, settings.task)):
        errors.add(reason)
    method = _prompt_method(state, settings, task, errors) if is_prompt else _prefix_method(state, settings)
    peft_adapter = PeftAdapter(method, method.sites(state.survey))
    rest = {key: value for key, value in stored.items() if key != PROMPT_KEY}
    peft_adapter.heads = head_tensors(state.base, settings.modules_to_save, PREFIX, rest, errors)
    allowed = ((1, 2) if is_prompt else (2,)) if settings.task == ENCODER_DECODER_TASK else (1,)
    if settings.num_submodules not in allowed:
        errors.add(
            f"num_transformer_submodules={settings.num_submodules} makes no sense for {settings.task} and "
            f"{settings.kind}"
        )
    if PROMPT_KEY not in stored:
        errors.add(f"tensor {PROMPT_KEY!r} is missing")
    elif is_prompt:
        _read_prompt(peft_adapter, settings, stored[PROMPT_KEY], errors)
    else:
        _read_prefix(state, peft_adapter, settings, stored[PROMPT_KEY], errors)
    return peft_adapter


def _prompt_method(state: KitState, settings: PeftPromptConfig, task: str | None, errors: Errors) -> PromptTuning:
    if any(t.causal for t in state.survey.towers):
        return PromptTuning(length=settings.length)
    if reason := _why_head_reads_more(state, task):
        errors.add(reason)
    return PromptTuning(length=settings.length, pooled="prompt" if task == "SEQ_CLS" else "text")


def _read_prompt(peft_adapter: PeftAdapter, settings: PeftPromptConfig, value: Tensor, errors: Errors) -> None:
    site = peft_adapter.sites[0]
    if len(peft_adapter.sites) > 1:
        errors.add(
            f"PEFT's prompts are in one stack, here they would be in {', '.join(s.tower for s in peft_adapter.sites)}"
        )
        return
    shape = (settings.length * settings.num_submodules, site.d_out)
    if tuple(value.shape) != shape or settings.width not in (None, site.d_out):
        errors.add(
            f"{PROMPT_KEY} has shape {list(value.shape)} (token_dim={settings.width}), and {settings.length} prompts "
            f"here take {list(shape)}"
        )
        return
    peft_adapter.values[f"{site.key}.prompt"] = value[: settings.length].clone()


def _prefix_method(state: KitState, settings: PeftPromptConfig) -> PrefixTuning:
    method = PrefixTuning(length=settings.length)
    return method if len(state.survey.towers) == 1 else method.model_copy(update={"places": "decoder"})


def _read_prefix(
    state: KitState, peft_adapter: PeftAdapter, settings: PeftPromptConfig, value: Tensor, errors: Errors
) -> None:
    sites = peft_adapter.sites
    if reason := _why_prefix_differs(state, sites):
        errors.add(reason)
        return
    heads, width = sites[0].num_kv_heads, sites[0].d_out
    layers = _tower(state, sites[0]).depth
    slots = settings.layers or layers
    layers_fit = slots >= layers if settings.num_submodules > 1 else slots == layers
    widths_fit = settings.heads in (None, heads) and settings.width in (None, width)
    if not (layers_fit and widths_fit and tuple(value.shape) == (settings.length, 2 * slots * width)):
        sizes = f"{settings.layers} layers of {settings.heads} heads in {settings.width} channels"
        errors.add(
            f"{PROMPT_KEY} has shape {list(value.shape)} for {sizes}; {settings.length} positions here take "
            f"{[settings.length, 2 * layers * width]}: {layers} layers of {heads} heads in {width} channels"
        )
        return
    parts = value.view(settings.length, slots, 2, heads, width // heads)
    for site in sites:
        slot = _slot(site.layer or 0, settings.num_submodules, slots)
        peft_adapter.values[f"{site.key}.prefix"] = parts[:, slot].clone()


def _slot(layer: int, num_submodules: int, slots: int) -> int:
    """Index of a layer's keys and values in the file.

    For an encoder-decoder PEFT repeats those of the file once and gives four tensors to each layer: two for itself and
    two for the cross-attention, which are dropped. So the layers of the decoder get every second one of an odd number;
    with an even number, the second half of the layers would get the same as the first.
    """
    return num_submodules * layer % slots


def _why_no_task(state: KitState, task: str | None) -> str | None:
    """Why PEFT has no virtual tokens for such a model; None where it has."""
    if task not in TASKS:
        return f"PEFT has prompts and prefixes for {', '.join(TASKS)}, and {_model_name(state)} has none of these tasks"
    if task == "SEQ_CLS" and len(state.survey.towers) > 1:
        return (
            "PEFT's prompts and prefixes do not work in a classifier with encoder and decoder, as "
            f"{_model_name(state)} is"
        )
    return None


def _why_head_reads_more(state: KitState, task: str | None) -> str | None:
    """Why the head of this encoder also reads outputs of PEFT's prompts and not of the text alone."""
    headless = getattr(state.base, "base_model", state.base) is state.base
    if task != "SEQ_CLS":
        if headless or task != "FEATURE_EXTRACTION" or _model_name(state).endswith("MaskedLM"):
            return None
        return f"the head of {_model_name(state)} may read the first token, which is a prompt's output with PEFT"
    config = getattr(state.base, "config", None)
    for name in ("classifier_pooling", "summary_type"):
        if (value := getattr(config, name, None)) not in (None, "cls", "first"):
            return f"{name}={value!r}: with PEFT this classifier reads the prompts' outputs as well, here it does not"
    return None


def _why_no_cache_for(state: KitState, task: str | None) -> str | None:
    """Why PEFT has no prefix in this model: it comes as a cache, which others ignore or do not take.

    An encoder-decoder needs a cache of four tensors for each layer, which only SEQ_2_SEQ_LM makes.
    """
    if len(state.survey.towers) > 1 and task != "SEQ_2_SEQ_LM":
        return f"PEFT's prefix for {task} does not work in a model with encoder and decoder, as {_model_name(state)} is"
    if takes_argument(state.base, "past_key_values"):
        return None
    return f"PEFT's prefix comes as a cache, and {_model_name(state)} takes no past_key_values"


def _tower(state: KitState, site: Site) -> Tower:
    return next(t for t in state.survey.towers if t.path == site.tower)


def _model_name(state: KitState) -> str:
    return plain_class(state.base).__name__


def write_virtual_tokens(state: KitState, adapter: Adapter, errors: Errors) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and their fields of adapter_config.json. The adapter is in its inference form."""
    task, is_prompt = task_of(state.base), isinstance(adapter.method, PromptTuning)
    if reason := _why_no_task(state, task):
        errors.add(reason)
    if adapter.strength != 1.0:
        errors.add(f"strength {adapter.strength:g} has no equivalent in PEFT for virtual tokens: set strength 1")
    why_differs = _why_prompt_differs if is_prompt else _why_prefix_unsaved
    if reason := why_differs(state, adapter):
        errors.add(reason)
    heads = heads_of(state, adapter, errors)
    if task in HEADS:
        heads |= _own_heads(state, adapter, HEADS[task], errors)
    if errors.messages:
        return {}, {}
    if is_prompt:
        value, fields = _write_prompt(state, adapter)
    else:
        value, fields = _write_prefix(state, adapter, 2 if task == ENCODER_DECODER_TASK else 1)
    tensors = {PROMPT_KEY: value, **{PREFIX + key: value for key, value in heads.items()}}
    return tensors, {"task_type": task, "num_virtual_tokens": len(value), "token_dim": adapter.sites[0].d_out, **fields}


def _write_prompt(state: KitState, adapter: Adapter) -> tuple[Tensor, dict[str, Any]]:
    (site,) = adapter.sites
    value: Any = adapter.delta(site).prompt
    return value, {
        "peft_type": "PROMPT_TUNING",
        "num_transformer_submodules": 1,  # without the rows for a decoder, which PEFT never reads
        "num_attention_heads": 1,  # never read, but looked for in the model's config if it is missing
        "num_layers": _tower(state, site).depth,  # likewise
        "prompt_tuning_init": "RANDOM",
    }


def _write_prefix(state: KitState, adapter: Adapter, num_submodules: int) -> tuple[Tensor, dict[str, Any]]:
    values: dict[int, Any] = {site.layer or 0: adapter.delta(site).prefix for site in adapter.sites}
    layers, like = _tower(state, adapter.sites[0]).depth, next(iter(values.values()))
    slots = layers + (num_submodules - 1) * (1 - layers % 2)  # an odd number, so that no two layers share one
    parts = like.new_zeros(len(like), slots, *like.shape[1:])
    for layer, value in values.items():  # zeros where a layer reads the keys of another: PEFT does not read them either
        parts[:, _slot(layer, num_submodules, slots)] = value
    return parts.flatten(1), {
        "peft_type": "PREFIX_TUNING",
        "num_transformer_submodules": num_submodules,
        "num_attention_heads": adapter.sites[0].num_kv_heads,
        "num_layers": slots,
        "prefix_projection": False,
    }


def _why_prefix_differs(state: KitState, sites: Sequence[Site]) -> str | None:
    """Why PEFT has no prefix at these attentions: it needs every layer of one stack, all of one shape."""
    towers, shapes = {s.tower for s in sites}, sorted({(s.num_kv_heads, s.d_out) for s in sites})
    if len(towers) > 1 or any(s.role != "kv.self" for s in sites):
        place = "decoder" if any(t.causal for t in state.survey.towers) else "encoder"
        return (
            f"PEFT's prefix is in one stack's self-attention, this one at {len(sites)} places in "
            f"{', '.join(sorted(towers))}: choose places={place!r}"
        )
    tower = _tower(state, sites[0])
    if len(state.survey.towers) > 1 and not tower.causal:
        return f"PEFT's prefix is in the decoder, this one in {tower.path}"
    sharing = {s.layer for s in state.survey.kv_sites if s.tower == tower.path and s.shares_kv_of}
    if [s.layer for s in sites] != [layer for layer in range(tower.depth) if layer not in sharing]:
        return f"PEFT's prefix is in every layer, this one in {len(sites)} of the {tower.depth} in {tower.path}"
    if len(shapes) > 1:
        return f"PEFT's prefix has one shape, and attentions here have {shapes} (heads, channels)"
    return None


def _why_prefix_unsaved(state: KitState, adapter: Adapter) -> str | None:
    """Why PEFT has no prefix like this one: its keys must also be as wide as the cache that PEFT puts them into."""
    site = adapter.sites[0]
    if reason := _why_prefix_differs(state, adapter.sites) or _why_no_cache_for(state, task_of(state.base)):
        return reason
    queries = max((s.d_in for s in state.survey.sites if (s.tower, s.role) == (site.tower, "attn.o")), default=0)
    if queries > site.d_out and getattr(getattr(state.base, "config", None), "num_key_value_heads", None) is None:
        heads = cached_heads(state)
        if heads != site.num_kv_heads:
            return (
                f"{site.path} has keys of {site.num_kv_heads} heads, and PEFT's prefix those of the model's cache: "
                f"{heads or 'its heads could not be counted'}"
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
    if tower.causal or len(state.survey.towers) > 1:
        return None
    task = task_of(state.base)
    if task != "SEQ_CLS" and method.pooled == "prompt":
        return "pooled='prompt' is for classifiers of whole texts, and PEFT returns the text's own first output here"
    if task == "SEQ_CLS" and method.pooled == "text":
        return (
            "with PEFT an encoder's classifier reads the output of the first prompt, here that of the first token: "
            "train it with PromptTuning(pooled='prompt')"
        )
    return _why_head_reads_more(state, task)


def _own_heads(state: KitState, adapter: Adapter, names: tuple[str, ...], errors: Errors) -> dict[str, Tensor]:
    """The base's own heads where the adapter has none: PEFT does not load the prompts of a classifier without them."""
    adapter_heads = [path.replace("/", ".") for path in adapter.heads]
    base: nn.Module = state.base
    paths = without_tensors(base, names, adapter_heads)
    if paths and state.merged_names:
        errors.add(f"{paths[0]} is saved with it, and {state.merged_text} merged into the base: unmerge() first")
    return {f"{p}.{name}": value for p in paths for name, value in base.get_submodule(p).state_dict().items()}
