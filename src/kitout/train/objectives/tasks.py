"""The table of tasks: whatever differs between objectives outside their own files stands here, one entry each.

A new objective is one file and one entry. The config's list of objectives, the data's encoders, the class that loads
the base, the metrics and the model card take theirs from here. It knows how each objective is built, and no config.
It loads no torch: a config is checked by this table, and an objective is imported when a job is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.data.encode.languages import Languages
from kitout.data.examples.examples import Example, LabeledText, TaggedWords

if TYPE_CHECKING:
    from torch import nn

    from kitout.evaluate.metrics.registry import Task as MetricTask
    from kitout.kit import Kit
    from kitout.train.objectives.objective import Objective
    from kitout.train.objectives.sequence import SequenceTask

LANGUAGE_MODELS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
TRAINING = ("training",)  # the kind of examples that plain training takes
EncodeFn: TypeAlias = Callable[[Sequence[Example]], list[Any]]  # items of its task


@dataclass(frozen=True)
class EncoderSettings:
    """What an encoder may depend on."""

    tokenizer: Any
    """The model's own."""
    max_length: int
    """Tokens of one example at most."""
    label_names: tuple[str, ...] = ()
    """The closed set of labels, in order."""
    train_on: str = "assistant"
    """Which turns of a chat are trained on."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the chat template takes besides the turns."""
    max_target_length: int | None = None
    """Tokens that a sequence-to-sequence model writes at most; None: as max_length."""
    languages: Languages | None = None
    """Of a sequence-to-sequence tokenizer that has languages."""
    dropped: list[str] = field(default_factory=list)
    """Gets a message for every example of alignment that does not fit and is left out."""


@dataclass(frozen=True)
class ObjectiveSettings:
    """What an objective may depend on, besides its kit."""

    pad_token_id: int | None = None
    """The id rows are padded with; None: of images."""
    pack_width: int = 0
    """Tokens of a row that holds several examples; 0: one example in each row."""
    images: Any = None
    """The ImageSet; None: of texts."""
    pixels: Any = None
    """The PixelProcessor of images."""


@dataclass(frozen=True)
class Task:
    """One entry: an objective by its name, and everything that other files need to know about it."""

    name: str
    """As `objective:` of a config has it."""
    auto_model: str
    """The class of transformers that loads its base."""
    hub_task: str
    """The task by the name that the hub gives it."""
    metric_task: MetricTask
    """What `kitout.evaluate.metrics.registry` scores its predictions by."""
    build_objective: Callable[[Kit, ObjectiveSettings], Objective]
    """The objective of one job."""
    build_encoder: Callable[[EncoderSettings], EncodeFn] | None
    """The encoder of its examples; None: it reads images."""
    fits: Callable[[Sequence[Example], bool], bool]
    """Whether `objective: auto` selects it for these examples; the bool: the model is an encoder-decoder."""
    reference_of: Callable[[Any, Any], Any] = lambda item, _images: item.label
    """(item, ImageSet or None) -> the reference as its metrics take it."""
    has_labels: bool = False
    """Its answers are a closed set of labels, which the examples name."""
    needs_pad_id: bool = False
    """The model finds a row's last token by its config's padding id."""
    packable: bool = False
    """Several examples may share a row."""
    build_heads: Callable[[Kit, int], dict[str, nn.Module]] | None = None
    """(kit, seed) -> the heads of a new adapter, by path; None: a classifier, where the base has one."""
    kinds: tuple[str, ...] = TRAINING
    """Which kinds of examples it takes (`KINDS` of `data.examples.format_table`)."""
    used_as: str = ""
    """The task that its adapters are used for, where that is another one; empty: its own."""
    new_tokens: int = 0
    """Tokens that are written behind each text in training, at most, for which there has to be room."""

    @property
    def reads_images(self) -> bool:
        """Its examples are images, not texts."""
        return self.build_encoder is None

    @property
    def generates_text(self) -> bool:
        """Answers are written, and measured as texts."""
        return self.metric_task == "generation"

    @property
    def is_language_model(self) -> bool:
        """Its base has an output head over the vocabulary, and no classification head."""
        return self.auto_model in LANGUAGE_MODELS


def _label_kind(examples: Sequence[Example]) -> str:
    """What the labels of these texts are: several per text, numbers, or one class each; "" where they have none."""
    if not isinstance(examples[0], LabeledText):
        return ""
    if isinstance(examples[0].label, tuple):
        return "multilabel"
    labels = [e.label for e in examples if isinstance(e, LabeledText)]
    try:
        values = [float(label) for label in labels]  # type: ignore[arg-type]  # a tuple is no number
    except (TypeError, ValueError, OverflowError):
        return "classification"
    # a table without types holds numbers as text; whole numbers are classes
    numbers = any(isinstance(label, float) for label in labels) or any(v % 1 for v in values if math.isfinite(v))
    return "regression" if numbers else "classification"


def _is_generation(examples: Sequence[Example]) -> bool:
    return not isinstance(examples[0], TaggedWords | LabeledText)


def _sequence_task(name: SequenceTask, encoder: str, has_labels: bool = True) -> Task:
    return Task(
        name,
        "AutoModelForSequenceClassification",
        "text-classification",
        name,
        lambda kit, settings: _sequence_classification(kit, name, settings),
        lambda s: _label_encoder(encoder)(s.tokenizer, s.max_length, *([s.label_names] if has_labels else [])),
        lambda examples, _: _label_kind(examples) == name,
        has_labels=has_labels,
        needs_pad_id=True,
    )


def _label_encoder(name: str) -> Callable[..., EncodeFn]:
    from kitout.data.encode import classification

    encoder: Callable[..., EncodeFn] = getattr(classification, name)
    return encoder


def _causal_encoder(s: EncoderSettings) -> EncodeFn:
    from kitout.data.encode.generation import CausalEncoder

    return CausalEncoder(s.tokenizer, s.max_length, s.train_on, s.chat_template_kwargs)


def _seq2seq_encoder(s: EncoderSettings) -> EncodeFn:
    from kitout.data.encode.generation import Seq2SeqEncoder

    return Seq2SeqEncoder(s.tokenizer, s.max_length, s.max_target_length, s.languages)


def _causal_lm(kit: Kit, settings: ObjectiveSettings) -> Objective:
    from kitout.train.objectives.causal_lm import CausalLM

    return CausalLM(kit, settings.pack_width)


def _seq2seq_lm(kit: Kit, settings: ObjectiveSettings) -> Objective:
    from kitout.train.objectives.seq2seq_lm import Seq2SeqLM

    return Seq2SeqLM(kit, _pad_token_id(settings))


def _sequence_classification(kit: Kit, name: SequenceTask, settings: ObjectiveSettings) -> Objective:
    from kitout.train.objectives.sequence import SequenceClassification

    return SequenceClassification(kit, name, _pad_token_id(settings))


def _token_classification(kit: Kit, settings: ObjectiveSettings) -> Objective:
    from kitout.train.objectives.token_classification import TokenClassification

    return TokenClassification(kit, _pad_token_id(settings))


def _image_classification(kit: Kit, settings: ObjectiveSettings) -> Objective:
    from kitout.train.objectives.image_classification import ImageClassification  # images need pillow

    return ImageClassification(kit, settings.images, settings.pixels)


def _answer_encoder(s: EncoderSettings) -> EncodeFn:
    from kitout.data.encode.answers import UnpairedEncoder

    return UnpairedEncoder(s.tokenizer, s.max_length, s.chat_template_kwargs, s.dropped)


def _reward_score(kit: Kit, _settings: ObjectiveSettings) -> Any:
    from kitout.train.objectives.reward_score import RewardScore

    return RewardScore(kit)


def _pad_token_id(settings: ObjectiveSettings) -> int:
    assert settings.pad_token_id is not None, "texts are padded"
    return settings.pad_token_id


def _token_classes(item: EncodedExample, _images: Any) -> list[int]:
    return [label for label in item.labels if label != IGNORE_INDEX]


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "causal_lm",
            "AutoModelForCausalLM",
            "text-generation",
            "generation",
            _causal_lm,
            _causal_encoder,
            lambda examples, is_encoder_decoder: _is_generation(examples) and not is_encoder_decoder,
            packable=True,
        ),
        _sequence_task("classification", "ClassEncoder"),
        _sequence_task("regression", "RegressionEncoder", has_labels=False),
        _sequence_task("multilabel", "MultiLabelEncoder"),
        Task(
            "token_classification",
            "AutoModelForTokenClassification",
            "token-classification",
            "tokens",
            _token_classification,
            lambda s: _label_encoder("TokenClassEncoder")(s.tokenizer, s.max_length, s.label_names),
            lambda examples, _: isinstance(examples[0], TaggedWords),
            _token_classes,
            has_labels=True,
            needs_pad_id=True,
        ),
        Task(
            "seq2seq_lm",
            "AutoModelForSeq2SeqLM",
            "text-generation",
            "generation",
            _seq2seq_lm,
            _seq2seq_encoder,
            lambda examples, is_encoder_decoder: _is_generation(examples) and is_encoder_decoder,
        ),
        Task(
            "image_classification",
            "AutoModelForImageClassification",
            "image-classification",
            "classification",
            _image_classification,
            None,
            lambda _examples, _is_encoder_decoder: False,
            lambda row, images: images.labels[row],
            has_labels=True,
        ),
    )
}

REWARD = "reward"  # the task of a reward adapter, which `kitout align reward` trains
USES: dict[str, Task] = TASKS | {
    REWARD: Task(
        REWARD,
        "AutoModelForCausalLM",
        "text-classification",
        "pairs",
        _reward_score,
        _answer_encoder,
        lambda _examples, _is_encoder_decoder: False,
        kinds=("preference", "unpaired"),
    )
}
"""Every task that an adapter may be for, as its usage record names it: those of `objective`, and reward models."""
