"""Sections of a run's config that stand for themselves: the base, a source of examples, augmentation, the output.

And what all sections have in common: frozen, keyword only, nothing unknown, no number that others cannot read. It knows
no other section; `schema` puts them together.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from kitout.format import ADAPTER_NAME_PATTERN, ADAPTER_NAME_RULE, short_repr
from kitout.no_booleans import refuse_booleans

MAX_WHOLE_NUMBER = 2**32 - 1


def check_name(value: str) -> str:
    if not ADAPTER_NAME_PATTERN.fullmatch(value):
        raise ValueError(f"{short_repr(value)}: {ADAPTER_NAME_RULE}")
    return value


AdapterName: TypeAlias = Annotated[str, AfterValidator(check_name)]


def _sorted_lengths(value: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(value)))


Lengths: TypeAlias = Annotated[tuple[Annotated[int, Field(gt=1)], ...], AfterValidator(_sorted_lengths)]


class ConfigSection(BaseModel):
    """One section of the config: frozen, keyword only, nothing unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    type_name: ClassVar[str] = "settings"
    """What a setting of this type is called in words."""
    foreign_keys: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """What else its settings are called elsewhere -> what to say of it, besides the table of `foreign_keys`."""

    def more_paths(self) -> tuple[str, ...]:
        """Folders that a kind of run names, besides those that every run has."""
        return ()

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        refuse_booleans(cls.model_fields[info.field_name or ""].annotation, value)
        return value

    @field_validator("*")
    @classmethod
    def _check_whole_numbers(cls, value: Any) -> Any:
        """What reads them (torch, numpy, tokenizers) has numbers of 32 bits."""
        if isinstance(value, int) and abs(value) > MAX_WHOLE_NUMBER:
            raise ValueError(f"expected at most {MAX_WHOLE_NUMBER:,}, found {short_repr(value, 40)}")
        return value


class ModelConfig(ConfigSection):
    """The frozen base."""

    name: str
    """A folder, a name on the Hugging Face hub, or a built-in model (`kitout assets list`)."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the frozen weights; auto: bfloat16 where the machine is faster in it, else float32; decided once for a run.
    Adapters stay float32."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """auto: the model's own choice; on a CPU with texts below 256 tokens plain (eager), which trains faster there."""
    quantization: Literal["none", "nf4", "int8", "torchao-int8"] = "none"
    """nf4 and int8: bitsandbytes; torchao-int8: weight only. LoRA and the activation methods train over them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it runs; auto: on a GPU if there is one."""
    adapters: dict[AdapterName, str] = {}
    """Adapter folders (kitout's or PEFT's) that stay frozen, by the names under which a composition (Mixture, Fusion,
    Gated) names what it is made of: {"a": "runs/a/adapter", "b": "runs/b/adapter"}."""


class SourceConfig(ConfigSection):
    """One set of examples, alone or in a mixture. Of one alone the number may be left out: `data.train.limit`."""

    type_name: ClassVar[str] = "source"

    path: str
    """A file (.jsonl, .json, .csv, .tsv, .parquet, .txt), a folder, a built-in set (`kitout assets list`) or a name on
    the hub (`owner/name:config`); `#500` behind it: its first 500 rows only."""
    weight: float = Field(default=1.0, gt=0)
    """Its weight in a mixture: 2 is sampled twice as often as 1, relative to its size."""
    format: str = "auto"
    """auto, or a format by name (`kitout train --help` lists them)."""
    columns: dict[str, str] = {}
    """Names of columns that are not recognized: {"text": "body", "label": "stars"}."""
    system_prompt: str | None = None
    """A system turn for every example; labelled texts become chats whose answer is the label, for language models."""
    limit: int | None = Field(default=None, gt=0)
    """At most so many examples of each split, sampled by the seed."""


class AugmentConfig(ConfigSection):
    """Random changes to training images, sampled each time by the seed; needs kornia."""

    type_name: ClassVar[str] = "augmentation"

    min_crop: float = Field(default=1.0, ge=0.01, le=1)
    """The smallest fraction of an image's area that a random crop keeps; 1: no crop."""
    horizontal_flip: bool = False
    """Half of the images are flipped left to right; not for digits or letters."""
    rotate: float = Field(default=0.0, ge=0, le=180)
    """Degrees of rotation at most, either way."""
    color_jitter: float = Field(default=0.0, ge=0, le=1)
    """Largest change of brightness, contrast and saturation."""


class OutputConfig(ConfigSection):
    """Where it goes."""

    folder: Path = Path("runs/train")
    """Holds adapter, report, metrics and checkpoints of this run; a run of other settings is never overwritten."""
    name: AdapterName = "adapter"
    """Of the adapter."""
    report_to: tuple[Literal["tensorboard", "trackio", "wandb", "mlflow"], ...] = ()
    """Trackers besides metrics.jsonl, by transformers' own integrations."""
