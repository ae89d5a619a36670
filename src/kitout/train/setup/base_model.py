"""The frozen base: found, loaded in the right class and dtype, attached, and given the heads that training needs.

What a checkpoint does not hold (a classifier for labels it never saw) is trained with the adapter and saved with it. No
code of a model's folder is ever run. It knows model classes by task, and nothing of data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kitout.data.encode.languages import Languages
from kitout.errors import ConfigError, KitoutError
from kitout.format import short_repr
from kitout.kit import Kit, attach
from kitout.train.config.schema import ModelConfig, RunConfig
from kitout.train.objectives.tasks import Task
from kitout.train.setup import device
from kitout.train.setup.find_inputs import fetch_inputs, find_inputs, near_builtin, raise_together, resolve_model
from kitout.train.setup.heads import copy_heads
from kitout.train.setup.quantization import keep_nf4_trainable, quantization_kwargs

# Tokens of the usual example: below, plain attention trains faster on a CPU than the fused one, whose backward is slow.
EAGER_BELOW_TOKENS = 256


@dataclass(frozen=True)
class Placement:
    """Where and how the frozen weights are held."""

    device: torch.device
    """Where the base is computed."""
    dtype: torch.dtype
    """Of the frozen weights."""
    reason: str
    """Why this dtype, in words."""


@dataclass(frozen=True)
class LoadedModel:
    """A model as transformers has loaded it."""

    model: Any
    """On its device, frozen weights in their dtype."""
    new_heads: frozenset[str]
    """Paths of the modules that the checkpoint does not hold, or holds in another shape."""


@dataclass(frozen=True)
class LoadedBase:
    """A kit without an adapter, and the heads that every adapter trains a copy of."""

    kit: Kit
    """In eval mode, without an adapter."""
    heads: dict[str, nn.Module]
    """By path, in model order: the modules that every adapter trains a copy of."""
    new_heads: frozenset[str]
    """Those of them that the checkpoint does not hold."""
    dtype_reason: str
    """Why the weights have this dtype, in words."""


def load_config(config: ModelConfig) -> Any:
    """The model's own config; ConfigError with the loader's message where there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(resolve_model(config.name), revision=config.revision)
    except Exception as error:  # whatever a damaged or hostile file makes of the loader
        raise ConfigError(
            f"model.name={short_repr(config.name)}: no model is there: {_short_message(error)}"
            f"{near_builtin(config.name, 'model')}"
        ) from error


def find_base(config: RunConfig, log: Callable[[str], None]) -> Any:
    """The config of the base; a name of a model and names of data that are nothing are one error."""
    errors = list(find_inputs(config).errors)
    hf_config = None
    if not any(isinstance(error, ConfigError) for error in errors):
        try:
            fetch_inputs(config, log)
            hf_config = load_config(config.model)
        except KitoutError as error:
            errors.insert(0, error)
    raise_together(errors)
    return hf_config


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's own tokenizer."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve_model(config.name), revision=config.revision)
    except Exception as error:  # whatever a damaged or hostile file makes of the loader
        raise ConfigError(
            f"model.name={short_repr(config.name)}: its tokenizer does not load: {_short_message(error)}"
        ) from error


def choose_placement(config: ModelConfig) -> Placement:
    """The device and dtype of the frozen weights; `auto` times this machine, so two calls may differ."""
    used = device.default_device() if config.device == "auto" else torch.device(config.device)
    if used.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device=cuda, and torch finds no GPU here: leave it out, or choose cpu")
    if config.dtype == "float16" and used.type == "cpu":
        raise ConfigError("model.dtype=float16 on a CPU overflows to nan in training: choose bfloat16 or float32")
    if config.dtype != "auto":
        return Placement(used, getattr(torch, config.dtype), "as requested")
    return Placement(used, *device.choose_dtype("auto", used))


def load_base(
    config: ModelConfig, task: Task, placement: Placement, label_names: Sequence[str], median_tokens: int,
    pad_token_id: int | None = None, image_size: int | None = None,
) -> LoadedBase:  # fmt: skip
    """The kit and its heads.

    label_names: of a classifier. median_tokens: of the usual example, by which attention is chosen on a CPU.
    pad_token_id: of a model that has none of its own, without which a classifier reads no more than one row.
    image_size: of a side, if it is not the model's own: then the kit tries the model on images of that size.
    """
    loaded = load_model(config, task, placement, label_names, pad_token_id)
    return attach_for_training(loaded, config, task, placement, median_tokens, image_size)


def load_model(
    config: ModelConfig, task: Task, placement: Placement, label_names: Sequence[str], pad_token_id: int | None
) -> LoadedModel:
    """The model in the class of its task; ConfigError with the loader's message where it does not load."""
    import transformers
    from transformers.utils import logging as transformers_logging

    kwargs: dict[str, Any] = {"dtype": placement.dtype, "revision": config.revision}
    kwargs |= quantization_kwargs(config.quantization, placement.dtype)
    if not task.is_language_model:
        kwargs |= {"num_labels": max(1, len(label_names)), "ignore_mismatched_sizes": True}
        if label_names:
            kwargs |= {"id2label": dict(enumerate(label_names))}
            kwargs |= {"label2id": {label: i for i, label in enumerate(label_names)}}
    auto_model = getattr(transformers, task.auto_model)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it would warn of newly initialized heads, which are meant
    transformers_logging.disable_progress_bar()
    try:
        model, info = auto_model.from_pretrained(resolve_model(config.name), output_loading_info=True, **kwargs)
    except Exception as error:  # whatever a damaged or hostile file makes of the loader
        raise ConfigError(
            f"model.name={short_repr(config.name)} does not load for {task.name}: {_short_message(error)}"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if config.quantization == "none":
        model.to(placement.device)
    if config.quantization == "nf4":
        keep_nf4_trainable(model)
    if pad_token_id is not None:
        model.config.get_text_config().pad_token_id = pad_token_id
    new_keys = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    return LoadedModel(model, frozenset(key.rpartition(".")[0] for key in new_keys))


def choose_pad_token(hf_config: Any, tokenizer: Any) -> int:
    """The id rows are padded with. Decoders find a row's last token by it, so texts should not hold it."""
    configured = hf_config.get_text_config().pad_token_id
    candidates = (configured, tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id, 0)
    return next(int(i) for i in candidates if i is not None)


def set_target_language(kit: Kit, languages: Languages) -> None:
    """The model starts what it writes with the code of that language."""
    model: Any = kit.base
    for name, value in languages.generation_settings.items():
        setattr(model.generation_config, name, value)
        if name == "decoder_start_token_id":  # else a code in front of the targets, which are trained on
            model.config.decoder_start_token_id = value


def attach_for_training(
    loaded: LoadedModel, config: ModelConfig, task: Task, placement: Placement, median_tokens: int,
    image_size: int | None,
) -> LoadedBase:  # fmt: skip
    """The kit on the model, with the attention that trains fastest, and copies of the heads."""
    example = None if image_size is None else _example_images(loaded.model, image_size)
    kit = attach(loaded.model, example_batch=example)
    base: Any = kit.base
    if config.attention != "auto":
        try:
            base.set_attn_implementation(config.attention)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"model.attention={config.attention}: {_short_message(error)}") from error
    elif placement.device.type == "cpu" and 0 < median_tokens < EAGER_BELOW_TOKENS:
        base.set_attn_implementation("eager")
    kit.eval()
    heads = copy_heads(kit, loaded.new_heads, task.is_language_model)
    return LoadedBase(kit, heads, loaded.new_heads, placement.reason)


def _example_images(model: Any, size: int) -> dict[str, Any]:
    """A model may be built for far more pixels than a run shows it: to be tried on these takes less time and memory."""
    from kitout.train.objectives.image_classification import interpolation_kwargs  # images need pillow

    channels = getattr(model.config, "num_channels", 3)
    pixels = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0)).to(
        model.device, model.dtype
    )
    return {"pixel_values": pixels} | interpolation_kwargs(model, pixels)


def _short_message(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
