"""A run in one object: model, method, data, objective, training, evaluation and output, checked as a whole.

The same schema serves Python, YAML, the command line and a form: `RunConfig.model_json_schema()`. Frozen and keyword
only; every error is reported at once. It opens no file and knows no model: what it cannot check alone is checked by the
pre-flight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from kitout.train.config.foreign_keys import OF_STAGES
from kitout.train.config.method_field import DEFAULT_METHOD, MethodField, method_to_dict, parse_method
from kitout.train.config.sections import AdapterName as AdapterName  # for those that import them from here
from kitout.train.config.sections import AugmentConfig as AugmentConfig
from kitout.train.config.sections import ConfigSection as ConfigSection
from kitout.train.config.sections import Lengths, check_name
from kitout.train.config.sections import ModelConfig as ModelConfig
from kitout.train.config.sections import OutputConfig as OutputConfig
from kitout.train.config.sections import SourceConfig as SourceConfig
from kitout.train.config.seeds import Seeds, adapter_name
from kitout.train.objectives.tasks import TASKS

if TYPE_CHECKING:
    ObjectiveName: TypeAlias = str
else:  # pydantic reads the names from the table of tasks
    OBJECTIVES = ("auto", *TASKS)
    ObjectiveName = Literal[OBJECTIVES]

WITHOUT_METHODS = object()  # a context of validation: all but the methods, which would load torch
DEFAULT_BATCH_SIZE = 16  # a run whose length is chosen by a small train split has a smaller one


class DataConfig(ConfigSection):
    """What is trained on, and what is measured on."""

    train: tuple[SourceConfig, ...]
    """One source or a list of them: a path alone, or path with its own weight, format, columns, limit."""
    validation: str | float | int = 0.05
    """A file of its own, a fraction of train, or a number of examples; evaluated during training. 0: none."""
    test: str | float | int = 0.1
    """A file of its own, a fraction of train, or a number of examples; evaluated once, at the end. 0: none."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens are trained on: the assistant's turns, its last turn only, or every token."""
    chat_template_kwargs: dict[str, Any] = {}
    """Arguments of the chat template besides the turns: {"enable_thinking": false}."""
    template_date: str | None = None
    """The day (YYYY-MM-DD) that a chat template takes for today; default: the day on which the run starts first."""
    src_lang: str | None = None
    """The language of sources, by the tokenizer's code (eng_Latn), for translation; default: the tokenizer's own."""
    tgt_lang: str | None = None
    """The language of targets (deu_Latn): its code is written into each target, and generation starts with it."""
    group: str | None = None
    """A column whose value says which rows are about one thing, such as the passage of a question: they stay in one
    split, and all intervals and verdicts resample them as a whole."""
    labels: tuple[str, ...] | None = None
    """The closed set of labels, in order; default: those of the train split."""
    max_length: int | None = Field(default=None, gt=1)
    """Tokens of one example at most, and never more than the model reads; default: 1024, or the tokenizer's
    `model_max_length` if that is less. Truncation takes the front of its context, never its answer, if that fits."""
    bad_rows: Literal["error", "skip"] = "error"
    """Rows that cannot be read or trained on: error reports them; skip leaves them out, counts them and lists their
    lines in the pre-flight, the results and the report. More bad rows than good ones are an error all the same."""
    streaming: bool = False
    """Read the training set while training, never whole in memory; needs train.steps."""
    image_size: int | None = Field(default=None, gt=0, le=16384)
    """Pixels of a side, for images; default: the model's own."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes to training images; validation and test images stay as they are."""
    seed: int = 0
    """Of the split and the limits."""

    @field_validator("train", mode="before")
    @classmethod
    def _parse_sources(cls, value: Any) -> Any:
        sources = value if isinstance(value, list | tuple) else [value]
        if not sources:
            raise ValueError("expected at least one source: a path, or a list of sources")
        return tuple({"path": str(v)} if isinstance(v, str | Path) else v for v in sources)

    @field_validator("augment", mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        """A section whose settings are all commented out."""
        return {} if value is None else value

    @field_validator("labels", mode="before")
    @classmethod
    def _labels_as_text(cls, value: Any) -> Any:
        """A label that reads like a number is a word all the same."""
        return [str(v) if type(v) in (int, float) else v for v in value] if isinstance(value, list | tuple) else value

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and len(set(value)) < max(2, len(value)):
            raise ValueError(f"expected at least 2 labels, each once; found {', '.join(value)}")
        return value

    @field_validator("template_date", mode="before")
    @classmethod
    def _check_date(cls, value: Any) -> Any:
        try:
            return value if value is None else date.fromisoformat(str(value)).isoformat()
        except ValueError:
            raise ValueError(f"expected a day as YYYY-MM-DD, found {str(value)[:40]!r}") from None

    @field_validator("validation", "test", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("validation", "test")
    @classmethod
    def _check_fraction(cls, value: str | float) -> str | float:
        if isinstance(value, float) and not (0 <= value < 1 or value.is_integer()):
            raise ValueError("a fraction is between 0 and 1; a number of examples is a whole number")
        if not isinstance(value, str) and value < 0:
            raise ValueError("expected 0 or more")
        return int(value) if isinstance(value, float) and value >= 1 else value


class TrainConfig(ConfigSection):
    """How it is trained."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    from_: str | None = Field(default=None, alias="from")
    """An adapter folder (kitout's or PEFT's) whose values the run starts from, with the same method and sites and a new
    optimizer; its card names the parent. Default: new values, by the seed."""

    lr: float | None = Field(default=None, gt=0)
    """Learning rate of AdamW; default: the method's own (`kitout methods`)."""
    head_lr: float | None = Field(default=None, gt=0)
    """Of the adapter's heads (a classifier); default: the method's own."""
    head: Literal["linear", "batchnorm"] = "linear"
    """The classifier of an image model: linear, or linear after a BatchNorm without gain and shift (AdaptFormer's)."""
    loraplus_lr_ratio: float = Field(default=1.0, gt=0)
    """LoRA+: the learning rate of B over that of A (Hayou et al. 2024 use 16)."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay, not of scales, shifts, biases and virtual tokens; default: the method's own."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the train split; a fraction of one is fine. Default, without steps: as many as the method needs for
    enough optimizer steps, 1 to 10, and no more than an hour's where one pass is shorter (the pre-flight says why)."""
    steps: int | None = Field(default=None, gt=0)
    """Optimizer steps, instead of epochs."""
    batch_size: int | None = Field(default=None, gt=0)
    """Examples of one optimizer step, over all processes. The result depends on it. Default: 16; without epochs and
    steps 8 or 4 where the train split is small."""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """Examples of one forward; default: the whole batch on a GPU, on a CPU as many as keep it busy. It is halved when
    memory runs out. Changes cost, not the result."""
    warmup_ratio: float = Field(default=0.06, ge=0, lt=1)
    """The fraction of the run that is linear warmup."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Of the learning rate after warmup."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients of a step are clipped to this norm."""
    group_by_length: bool = True
    """Batches of similar lengths, in an order sampled by the seed: less padding."""
    packing: bool = False
    """Several examples in one row, none of which attends to another; tested on this model before training starts."""
    activation_checkpointing: bool = False
    """Activations are recomputed in backward: less memory, about a fifth slower."""
    trunk: Literal["auto", "off"] = "off"
    """auto: what is frozen below the first trained block is computed once per example and kept, where that gives the
    same losses and saves time (a few steps are tried). Equal but for rounding."""
    trunk_bytes: int = Field(default=2 * 2**30, ge=0)
    """Kept of it at most: in memory first, of texts then in a file of the run's folder; the rest is computed again."""
    compile: Literal["off", "blocks"] = "off"
    """blocks: each block is compiled with its adapters (torch.compile) while it trains. Faster steps for seconds to
    minutes of compiling, so for long runs; equal but for rounding."""
    pad_to: Lengths = ()
    """Lengths of batches of texts: each is padded to the least of these that holds its longest row. Default: that row's
    own; with train.compile=blocks few that the data choose, so that there are at most 4 shapes."""
    early_stopping_patience: int | None = Field(default=None, gt=0)
    """Stops after so many evaluations without a better one."""
    save_steps: int | None = Field(default=None, gt=0)
    """Steps between checkpoints; default: about ten in a run, and with every evaluation."""
    keep_checkpoints: int = Field(default=2, gt=0)
    """Checkpoints kept, besides the best."""
    fsdp: bool = False
    """With several processes: the frozen base is sharded over them (FSDP2), not copied."""
    seed: int = Field(default=0, ge=0)
    """Of the adapter's initial values, the order of examples and dropout."""
    seeds: Seeds = ()
    """Instead of seed: everything is trained once with each of these, together, as adapters NAME-s0, NAME-s1, ...
    Results, report and cards then have means over seeds and, from 3 seeds, verdicts between methods."""

    @model_validator(mode="after")
    def _check_one_kind_of_seed(self) -> TrainConfig:
        if self.seeds and "seed" in self.model_fields_set:
            raise ValueError(f"seeds: takes the place of seed, found seed={self.seed} too: leave one of them out")
        return self


class EvaluateConfig(ConfigSection):
    """What is measured, and when."""

    steps: int | None = Field(default=None, ge=0)
    """Steps between evaluations on the validation split; default: about five in a run. 0: none."""
    generate_examples: int = Field(default=32, ge=0)
    """Validation examples whose answers are generated at each evaluation (language models). 0: loss only."""
    max_new_tokens: int | None = Field(default=None, gt=0)
    """Of a generated answer; default: twice the longest reference, at most 256."""
    max_test_examples: int = Field(default=1000, gt=0)
    """Test examples evaluated at the end, at most, on the base and on the adapter."""
    show_examples: int = Field(default=8, ge=0)
    """Test examples shown side by side."""
    best_metric: str | None = None
    """The metric by which the best checkpoint is kept; default: the loss on the validation split."""
    forgetting: Literal["none", "quick", "full"] = "none"
    """After training: what the adapter made a language model forget, on built-in sets of knowledge, English and chat
    (quick: 200 questions of each and 300 texts; full: all of them)."""
    prove_merge: bool = False
    """After training: merge the adapter, run test examples again, unmerge it, and compare the base bit by bit."""


class JobConfig(ConfigSection):
    """One of several adapters trained at once on one base; settings that are left out are the run's."""

    type_name: ClassVar[str] = "job"

    name: AdapterName
    """Of its adapter."""
    method: MethodField | None = None
    """What is trained."""
    data: DataConfig | None = None
    """What it is trained on."""
    train: TrainConfig | None = None
    """How: settings that are left out are the run's."""

    @field_validator("method", mode="before")
    @classmethod
    def _parse_method(cls, value: Any, info: ValidationInfo) -> Any:
        return value if value is None or info.context is WITHOUT_METHODS else parse_method(value)

    @field_validator("data", mode="before")
    @classmethod
    def _parse_data(cls, value: Any) -> Any:
        return {"train": value} if isinstance(value, str | Path | list) else value


class RunConfig(ConfigSection):
    """Everything a run depends on. `method`: a Method, a name, or {"name": "LoRA", "rank": 16}."""

    foreign_keys: ClassVar[Mapping[str, str]] = OF_STAGES

    model: ModelConfig
    """The frozen base, or its name alone."""
    method: MethodField = Field(default_factory=lambda: parse_method(DEFAULT_METHOD))
    """What is trained: a name, or a name and settings (`kitout methods` lists them)."""
    data: DataConfig
    """What is trained on, or its path alone."""
    objective: ObjectiveName = "auto"
    """auto: by the data (answers: causal_lm or seq2seq_lm, as the model is; labels: classification; ...)."""
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    output: OutputConfig = OutputConfig()
    jobs: tuple[JobConfig, ...] = ()
    """Several adapters at once, each with its own data, method and learning rate; empty: one, by the settings above."""

    @field_validator("model", mode="before")
    @classmethod
    def _parse_model(cls, value: Any) -> Any:
        return {"name": str(value)} if isinstance(value, str | Path) else value

    @field_validator("data", mode="before")
    @classmethod
    def _parse_data(cls, value: Any) -> Any:
        return {"train": value} if isinstance(value, str | Path | list) else value

    @field_validator("method", mode="before")
    @classmethod
    def _parse_method(cls, value: Any, info: ValidationInfo) -> Any:
        return value if info.context is WITHOUT_METHODS else parse_method(value)

    @field_validator("train", "evaluate", "output", mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        """A section whose settings are all commented out."""
        return {} if value is None else value

    @model_validator(mode="after")
    def _check_job_names(self) -> RunConfig:
        names = [run.output.name for run in self.per_job()]
        if len(set(names)) < len(names):
            raise ValueError(f"two jobs share a name: {sorted(n for n in set(names) if names.count(n) > 1)}")
        for name in names:
            check_name(name)  # with its seed it may have become too long
        return self

    def per_job(self) -> tuple[RunConfig, ...]:
        """Each adapter as a run of its own: every job once per seed; the run itself where there are neither."""
        return tuple(one for run in self.without_seeds() for one in run._per_seed())

    def without_seeds(self) -> tuple[RunConfig, ...]:
        """Each job as a run of its own, whose train.seeds are still together."""
        return tuple(self._run_of_job(job) for job in self.jobs) or (self,)

    def seeds_by_job(self) -> dict[str, dict[str, int]]:
        """Of jobs with train.seeds: job -> adapter -> its seed. (A key of results.json.)"""
        runs = [run for run in self.without_seeds() if run.train.seeds]
        return {run.output.name: {one.output.name: one.train.seed for one in run._per_seed()} for run in runs}

    def _per_seed(self) -> Iterator[RunConfig]:
        if not self.train.seeds:
            yield self
        for seed in self.train.seeds:
            train = self.train.model_copy(update={"seed": seed, "seeds": ()})
            output = self.output.model_copy(update={"name": adapter_name(self.output.name, seed)})
            yield self.model_copy(update={"train": train, "output": output})

    def _run_of_job(self, job: JobConfig) -> RunConfig:
        """Settings that the job leaves out are the run's."""
        changes: dict[str, Any] = {"jobs": (), "output": self.output.model_copy(update={"name": job.name})}
        if job.method is not None:
            changes["method"] = job.method
        for name, section, own in (("data", self.data, job.data), ("train", self.train, job.train)):
            if own is not None:
                update = {field: getattr(own, field) for field in own.model_fields_set}
                if "seed" in update:
                    update["seeds"] = ()  # one seed of the job's own, whatever seeds the run has
                changes[name] = section.model_copy(update=update)
        return self.model_copy(update=changes)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, the way `load` reads them: what run.yaml holds."""
        plain: dict[str, Any] = self.model_dump(mode="json", by_alias=True, exclude={"method", "jobs"})
        if self.train.seeds:
            del plain["train"]["seed"]  # seeds take its place
        plain["method"] = method_to_dict(self.method)
        plain["jobs"] = [
            job.model_dump(mode="json", by_alias=True, exclude={"method"}, exclude_unset=True)
            | ({} if job.method is None else {"method": method_to_dict(job.method)})
            for job in self.jobs
        ]
        return plain
