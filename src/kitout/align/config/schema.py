"""A run of stages in one object: the base, the output, and stages, each trained from one before it or from a folder.

The same schema serves Python, YAML, the command line and a form: `AlignConfig.model_json_schema()`. A stage becomes a
run of `kitout train` (`StageConfig.run_config`), so that loop, folder and evaluation are the same. It opens no file;
what stages say of each other is checked by `conflicts`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from kitout.align.config.foreign_keys import ADVICE
from kitout.align.config.gym_name import is_gym
from kitout.align.config.kind_advice import KindAdvice
from kitout.align.config.kinds import KINDS, Kind, KindName, default_lr
from kitout.align.config.losses import Loss
from kitout.errors import suggest
from kitout.format import short_repr
from kitout.train.config.error_messages import JOIN, explain
from kitout.train.config.method_field import DEFAULT_METHOD, MethodField, method_to_dict, parse_method
from kitout.train.config.schema import WITHOUT_METHODS, DataConfig, EvaluateConfig, RunConfig, TrainConfig
from kitout.train.config.sections import AdapterName, ConfigSection, ModelConfig

if TYPE_CHECKING:
    from kitout.method import Method

ADAPTER = "adapter"  # the folder of a stage's adapter, in the stage's own
FUNCTION_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


class RolloutConfig(ConfigSection):
    """How answers are sampled."""

    prompts: int = Field(default=8, gt=0)
    """Prompts of one step; each is answered `samples` times."""
    samples: int = Field(default=8, gt=0)
    """Answers to one prompt: 2 or more where they are compared with each other (grpo, rloo)."""
    max_new_tokens: int = Field(default=256, gt=0)
    """Tokens of an answer at most; one that is cut there has no end token."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling; 1: as the model is, else every log-probability is computed at this temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sampling from the most likely tokens of this sum; 1: from all, which alone is unbiased."""
    top_k: int = Field(default=0, ge=0)
    """Sampling from so many tokens; 0: from all, which alone is unbiased."""


class RewardSource(ConfigSection):
    """What scores answers, and how much that counts."""

    type_name: ClassVar[str] = "reward"

    source: str
    """A stage of kind reward, a reward adapter's folder, `module:function` or `gym:NAME` (reasoning-gym)."""
    weight: float = 1.0
    """Its score is multiplied by this before all are added."""

    @property
    def of(self) -> Literal["adapter", "function", "gym"]:
        """What kind of source it is."""
        if is_gym(self.source):
            return "gym"
        return "function" if FUNCTION_PATTERN.fullmatch(self.source) else "adapter"


class StageLoss(ConfigSection):
    """The settings of a stage that a run of `kitout train` has not."""

    kind: KindName
    """What is trained how: sft, reward, dpo, orpo, simpo, kto, grpo, rloo or ppo."""
    loss: Loss | None = Field(default=None, validate_default=True)
    """Settings of the kind's loss (`kitout align KIND --help`)."""
    rollout: RolloutConfig | None = Field(default=None, validate_default=True)
    """How answers are sampled: ppo, grpo, rloo."""
    reward: tuple[RewardSource, ...] = ()
    """What scores answers (ppo, grpo, rloo): a stage of kind reward, a folder, module:function or gym:NAME; several as
    a list, or with weights: {taste: 1, "rules:length": 0.1}."""

    @field_validator("kind", mode="before")
    @classmethod
    def _known_kind(cls, value: Any) -> Any:
        if not (isinstance(value, str) and value in KINDS):
            raise ValueError(f"there is no kind {short_repr(value)}: {suggest(str(value), KINDS, len(KINDS))}")
        return value

    @field_validator("loss", mode="before")
    @classmethod
    def _parse_loss(cls, value: Any, info: ValidationInfo) -> Any:
        kind = KINDS.get(info.data.get("kind", ""))
        if kind is None:  # which is an error already
            return None
        settings = kind.loss
        if settings is None:
            if value:
                raise ValueError(f"a stage of kind {info.data['kind']} has no loss to set: leave it out")
            return None
        if isinstance(value, settings):
            return value
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"expected settings (name: value), found {short_repr(value)}")
        try:
            return settings.model_validate(dict(value or {}))
        except ValidationError as error:
            advice = KIND_ADVICE.of(info.data["kind"])
            raise ValueError(JOIN.join(explain(error, settings, lambda _location: advice))) from error

    @field_validator("rollout", mode="before")
    @classmethod
    def _parse_rollout(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.data.get("kind", "")
        if name not in KINDS or isinstance(value, RolloutConfig):
            return value
        kind = KINDS[name]
        if not kind.takes_reward:
            if value:
                sampling = ", ".join(one for one, kind in KINDS.items() if kind.takes_reward)
                raise ValueError(f"a stage of kind {name} samples no answers ({sampling} do): leave it out")
            return None
        return {"samples": kind.samples, **value} if isinstance(value, Mapping) else value or {"samples": kind.samples}

    @field_validator("reward", mode="before")
    @classmethod
    def _parse_reward(cls, value: Any) -> Any:
        if value is None:
            return ()
        if isinstance(value, Mapping):
            by_source = not value.keys() & {"source", "weight"}
            value = [{"source": str(k), "weight": v} for k, v in value.items()] if by_source else [value]
        entries = value if isinstance(value, list | tuple) else [value]
        if any(callable(one) for one in entries):
            raise ValueError("a function is named by its module, so that a run can be resumed: write module:function")
        return [{"source": str(one)} if isinstance(one, str | Path) else one for one in entries]

    @property
    def of_kind(self) -> Kind:
        """The entry of its kind."""
        return KINDS[self.kind]

    @property
    def has_reference(self) -> bool:
        """Whether the log-probabilities of a reference are needed."""
        reference = self.of_kind.reference
        return reference == "always" or (reference == "by beta" and getattr(self.loss, "beta", 0.0) > 0)

    def without_empty(self, plain: dict[str, Any]) -> dict[str, Any]:
        """Plain values without those of these settings that the kind has not."""
        empty = {"loss": self.loss is None, "rollout": self.rollout is None, "reward": not self.reward}
        return {key: value for key, value in plain.items() if not empty.get(key, False)}


class StageConfig(StageLoss):
    """One stage: an adapter that is trained by one kind of loss."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)
    type_name: ClassVar[str] = "stage"
    foreign_keys: ClassVar[Mapping[str, str]] = ADVICE

    name: AdapterName = ""
    """Of the stage, its folder and its adapter; default: the kind."""
    from_: str | None = Field(default=None, alias="from")
    """A stage before it, by name, or an adapter folder: policy and reference start as this adapter. Default: a new
    adapter, whose reference is the base. The value adapter of ppo starts from the reward adapter, if there is one."""
    data: DataConfig
    """What is trained on, or its path alone: answers (sft), pairs (reward, dpo, orpo, simpo), single answers with a
    label (kto) or prompts (ppo, grpo, rloo); sft and those with prompts also gym:NAME."""
    method: MethodField | None = None
    """What is trained, as in `kitout train`; default: the method of what it starts `from`, else LoRA."""
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="before")
    @classmethod
    def _named_as_kind(cls, values: Any) -> Any:
        kind = values.get("kind") if isinstance(values, Mapping) else None
        if not isinstance(kind, str) or kind not in KINDS or values.get("name"):
            return values
        return {**values, "name": kind}

    @field_validator("from_", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("data", mode="before")
    @classmethod
    def _parse_data(cls, value: Any) -> Any:
        return {"train": value} if isinstance(value, str | Path | list) else value

    @field_validator("method", mode="before")
    @classmethod
    def _parse_method(cls, value: Any, info: ValidationInfo) -> Any:
        return value if value is None or info.context is WITHOUT_METHODS else parse_method(value)

    @field_validator("train", "evaluate", mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        """A section whose settings are all commented out."""
        return {} if value is None else value

    def run_config(self, align: AlignConfig, context: object = None) -> StageRun:
        """The stage as a run: every name of a stage is the folder of its adapter.

        `method` is not set where the folder in `from` decides it (`adopt_parents`); `train.lr` stays open until the
        method is known (`with_default_lr`). context: WITHOUT_METHODS, as for `load`.
        """
        train: dict[str, Any] = {"from_": None if self.from_ is None else align.adapter_of(self.from_)}
        if self.rollout is not None:
            train["batch_size"] = self.rollout.prompts
        rewards = [one.model_copy(update={"source": align.adapter_of(one.source)}) for one in self.reward]
        method = DEFAULT_METHOD if context is WITHOUT_METHODS else align.method_of(self)
        values: dict[str, Any] = {
            "kind": self.kind,
            "loss": self.loss,
            "rollout": self.rollout,
            "reward": rewards,
            "model": align.model,
            **({} if method is None else {"method": method}),
            "data": self.data,
            "train": self.train.model_copy(update=train),
            "evaluate": self.evaluate,
            "output": {"folder": align.folder_of(self.name), "name": self.name, "report_to": align.output.report_to},
        }
        return StageRun.model_validate(values, context=context)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        plain = self.model_dump(mode="json", by_alias=True, exclude={"method"})
        if self.method is not None:
            plain["method"] = method_to_dict(self.method)
        return self.without_empty(plain)


class StageRun(RunConfig, StageLoss):
    """A stage as a run of `kitout train`, with what its kind adds: what the run.yaml of its folder holds."""

    def with_answers_as_batch(self) -> StageRun:
        """The run whose batch size is what a step trains on: of prompts, all their answers."""
        if self.rollout is None:
            return self
        answers = self.rollout.prompts * self.rollout.samples
        return self.model_copy(update={"train": self.train.model_copy(update={"batch_size": answers})})

    def to_dict(self) -> dict[str, Any]:
        return self.without_empty(super().to_dict())

    def more_paths(self) -> tuple[str, ...]:
        return tuple(one.source for one in self.reward if one.of == "adapter")


class AlignOutput(ConfigSection):
    """Where it goes."""

    folder: Path = Path("runs/align")
    """Holds a folder for each stage, by its name; of a single stage it is the stage's folder itself."""
    report_to: tuple[Literal["tensorboard", "trackio", "wandb", "mlflow"], ...] = ()
    """Trackers besides metrics.jsonl, by transformers' own integrations."""


class AlignConfig(ConfigSection):
    """Everything that stages on one base depend on."""

    foreign_keys: ClassVar[Mapping[str, str]] = ADVICE

    model: ModelConfig
    """The frozen base, or its name alone."""
    output: AlignOutput = AlignOutput()
    """Where it goes, or the folder alone."""
    stages: tuple[StageConfig, ...]
    """In the order in which they are trained."""

    @field_validator("model", mode="before")
    @classmethod
    def _parse_model(cls, value: Any) -> Any:
        return {"name": str(value)} if isinstance(value, str | Path) else value

    @field_validator("output", mode="before")
    @classmethod
    def _parse_output(cls, value: Any) -> Any:
        return {} if value is None else {"folder": value} if isinstance(value, str | Path) else value

    @field_validator("stages", mode="before")
    @classmethod
    def _parse_stages(cls, value: Any) -> Any:
        stages = [value] if isinstance(value, Mapping | StageConfig) else value
        if isinstance(stages, list | tuple) and not stages:
            raise ValueError("expected at least one stage: {kind: dpo, data: pairs.jsonl}")
        return stages

    def stage(self, name: str) -> StageConfig | None:
        """The stage of that name."""
        return next((one for one in self.stages if one.name == name), None)

    def folder_of(self, name: str) -> Path:
        """The folder of a stage."""
        return self.output.folder if len(self.stages) == 1 else self.output.folder / name

    def adapter_of(self, text: str) -> str:
        """The folder of a stage's adapter; anything else is taken as it stands."""
        return text if self.stage(text) is None else str(self.folder_of(text) / ADAPTER)

    def method_of(self, stage: StageConfig) -> Method | None:
        """What a stage trains: its own method, or that of what it starts from; None: of a folder, which says so."""
        owner = self.method_owner(stage)
        return None if owner is None else owner.method or parse_method(DEFAULT_METHOD)

    def method_owner(self, stage: StageConfig) -> StageConfig | None:
        """The stage whose method another one trains on: itself, or one before it; None: a folder's."""
        seen: list[str] = []
        while stage.method is None and stage.from_ is not None:
            before = self.stage(stage.from_)
            if before is None or before.name in seen:
                return None
            seen.append(before.name)
            stage = before
        return stage

    def runs(self, context: object = None) -> Iterator[StageRun]:
        """Each stage as a run."""
        return (stage.run_config(self, context) for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, the way `load_align` reads them: what run.yaml holds."""
        plain = self.model_dump(mode="json", by_alias=True, exclude={"stages"})
        return {**plain, "stages": [stage.to_dict() for stage in self.stages]}


def with_default_lr(run: StageRun) -> StageRun:
    """The run with the learning rate of its kind and method, where it names none."""
    if run.train.lr is not None:
        return run
    train = run.train.model_copy(update={"lr": default_lr(run.kind, run.method)})
    return run.model_copy(update={"train": train})


KIND_ADVICE = KindAdvice(StageConfig, AlignConfig)
