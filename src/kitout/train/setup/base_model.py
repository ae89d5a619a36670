"""From a config to a kit that can learn: the frozen model in the right class and number format, adapters, fresh heads.

What a checkpoint does not hold (a classifier for labels it never saw) is trained with the adapter and saved with it.
Quantised bases come through transformers' own loaders. No code of a model's folder is ever run. It knows model classes
by objective, and nothing of data.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kitout.errors import ConfigError
from kitout.kit import Kit, attach
from kitout.train.config.schema import ModelConfig
from kitout.train.loop.base_mode import keep_nf4_trainable
from kitout.train.setup import device
from kitout.train.setup.heads import copy_heads

AUTO_MODELS = {
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "multilabel": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "image_classification": "AutoModelForImageClassification",
}
EAGER_BELOW_TOKENS = (
    256  # tokens: below, plain attention trains faster than the fused one on a CPU, whose backward is slow there
)


@dataclass(frozen=True)
class LoadedBase:
    """kit: eval mode, no adapter yet. heads: modules by path, in model order, that every adapter trains a copy of.

    missing: those of them that the checkpoint does not hold. why: of the number format. opening: what the loader was
    told besides, for others who open the base.
    """

    kit: Kit
    heads: dict[str, nn.Module]
    new_heads: frozenset[str]
    device: torch.device
    dtype_reason: str
    from_pretrained_kwargs: Mapping[str, Any]


def resolve_model(name: str) -> str:
    """A folder, an embedded model's folder, or the name as the hub knows it."""
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser())
    from kitout.assets import store  # the embedded models live with the demo that shows them
    from kitout.assets.catalog import ASSETS

    return str(store.fetch_asset(name, lambda _words: None)) if name in ASSETS else name


def resolve_data(path: str) -> str:
    """A path as it is said, or the folder of an embedded set."""
    if Path(path).expanduser().exists():
        return path
    from kitout.assets import store
    from kitout.assets.catalog import ASSETS

    name, mark, rows = path.partition("#")
    return str(store.fetch_asset(name, lambda _words: None)) + mark + rows if name in ASSETS else path


def load_config(config: ModelConfig) -> Any:
    """The model's own config; ConfigError with what is wrong where there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(resolve_model(config.name), revision=config.revision)
    except (OSError, ValueError) as wrong:
        raise ConfigError(f"model.name={config.name!r}: no model is there: {_short_message(wrong)}") from wrong


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's own tokenizer."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve_model(config.name), revision=config.revision)
    except (OSError, ValueError, ImportError) as wrong:
        raise ConfigError(
            f"model.name={config.name!r}: its tokenizer does not load: {_short_message(wrong)}"
        ) from wrong


def choose_device_and_dtype(config: ModelConfig) -> tuple[torch.device, torch.dtype, str]:
    """Where and in which format the frozen weights are, and why."""
    where = device.default_device() if config.device == "auto" else torch.device(config.device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device=cuda, and torch finds no GPU here: leave it out, or write cpu")
    if config.dtype == "float16" and where.type == "cpu":
        raise ConfigError("model.dtype=float16 on a CPU overflows to nan in training: write bfloat16 or float32")
    if config.dtype != "auto":
        return where, getattr(torch, config.dtype), "as asked"
    form, why = device.choose_dtype("auto", where)
    return where, form, why


def load_base(
    config: ModelConfig, objective: str, labels: Sequence[str], median_tokens: int, pad_token_id: int | None = None,
    image_size: int | None = None,
) -> LoadedBase:  # fmt: skip
    """The kit. labels: of a classifier. median: tokens of the usual example, by which attention is chosen on a CPU.

    filler: padding id of a model that has none of its own, without which a classifier reads no more than one row.
    image_size: of a side, if it is not the model's own: then the kit tries the model on images of that size.
    """
    import transformers
    from transformers.utils import logging as its_logging

    where, form, why = choose_device_and_dtype(config)
    asked: dict[str, Any] = {"dtype": form, "revision": config.revision} | _quantization_kwargs(config, form)
    if objective not in ("causal_lm", "seq2seq_lm"):
        asked |= {"num_labels": max(1, len(labels)), "ignore_mismatched_sizes": True}
        if labels:
            asked |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    loader = getattr(transformers, AUTO_MODELS[objective])
    loud = its_logging.get_verbosity()
    its_logging.set_verbosity_error()  # it would warn of fresh heads, which are meant
    its_logging.disable_progress_bar()
    try:
        model, told = loader.from_pretrained(resolve_model(config.name), output_loading_info=True, **asked)
    except (OSError, ValueError, ImportError) as wrong:
        raise ConfigError(
            f"model.name={config.name!r} does not load for {objective}: {_short_message(wrong)}"
        ) from wrong
    finally:
        its_logging.set_verbosity(loud)
    if config.quantization == "none":
        model.to(where)
    fresh = {name.rpartition(".")[0] for name in [*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])]}
    if config.quantization == "nf4":
        keep_nf4_trainable(model)
    if pad_token_id is not None:
        model.config.get_text_config().pad_token_id = pad_token_id  # before the kit tries the model on a few rows
    kit = attach(model, example_batch=None if image_size is None else _example_images(model, image_size))
    _set_attention(kit, config, where, median_tokens)
    kit.eval()
    opening = {"num_labels": asked["num_labels"]} if "num_labels" in asked else {}
    opening |= {"ignore_mismatched_sizes": True} if told["mismatched_keys"] else {}
    opening |= {} if config.revision is None else {"revision": config.revision}
    opening |= {} if pad_token_id is None else {"pad_token_id": pad_token_id}
    return LoadedBase(
        kit, copy_heads(kit, fresh, objective in ("causal_lm", "seq2seq_lm")), frozenset(fresh), where, why, opening
    )


def _example_images(model: Any, size: int) -> dict[str, Any]:
    """A model may be built for far more pixels than a run shows it: to be tried on these takes less time and memory."""
    from kitout.train.objectives.image_classification import interpolation_kwargs  # images need pillow

    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)
    return {"pixel_values": pixels} | interpolation_kwargs(model, pixels)


def _set_attention(kit: Kit, config: ModelConfig, device_used: torch.device, median_tokens: int) -> None:
    base: Any = kit.base
    if config.attention != "auto":
        try:
            base.set_attn_implementation(config.attention)
        except (ValueError, ImportError) as wrong:
            raise ConfigError(f"model.attention={config.attention}: {_short_message(wrong)}") from wrong
    elif device_used.type == "cpu" and 0 < median_tokens < EAGER_BELOW_TOKENS:
        base.set_attn_implementation("eager")


def _quantization_kwargs(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What the loader is told of a quantised base; ConfigError where the library is not there."""
    if config.quantization == "none":
        return {}
    library = "torchao" if config.quantization.startswith("torchao") else "bitsandbytes"
    if importlib.util.find_spec(library) is None:
        raise ConfigError(
            f"model.quantization={config.quantization} needs {library}, not installed here: pip install {library}"
        )
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    from transformers import BitsAndBytesConfig

    if config.quantization == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for every product
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    }


def _short_message(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]
