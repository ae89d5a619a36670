"""The Predictor: a base with its adapters, the way from an input to the model, and from its outputs to a prediction.

What is computed is what `kit(...)` gives on the same tokens or pixels under the route in force; preprocessing is that
of the adapter that is active. Texts are generated greedily unless sampling is asked for. It finds no base and opens no
adapter folder: `load` does.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import nn

from kitout.base.eval_mode import eval_mode
from kitout.data.encode.languages import Languages, find_languages
from kitout.data.encode.template_date import fix_template_date
from kitout.errors import ConfigError, KitoutError
from kitout.evaluate.ask.decoding import stop_token_ids
from kitout.evaluate.ask.generate import generate
from kitout.evaluate.ask.text_limit import check_prompts, max_tokens
from kitout.files.usage_record import UsageRecord
from kitout.format import short_repr
from kitout.kit import Kit
from kitout.predict.answer_inputs import text_inputs
from kitout.predict.answer_stream import AnswerStream, generation_options
from kitout.predict.prediction import PREDICTIONS, Prediction, class_prediction
from kitout.predict.text_inputs import TextInputs, chat_of, cut_front
from kitout.route import adapter_names
from kitout.train.measure.predict import ProgressFn, answer_likelihoods, plan_forwards
from kitout.train.objectives.objective import LabelObjective, Objective
from kitout.train.objectives.tasks import USES, ObjectiveSettings, Task
from kitout.train.setup.base_model import set_target_language
from kitout.train.setup.closed_answers import ClosedAnswers

DEFAULT_NEW_TOKENS = 256  # of an answer, where training says nothing


@dataclass(frozen=True)
class Preprocessing:
    """From inputs to a model, as one adapter's examples went."""

    usage: UsageRecord
    """What the adapter's folder says."""
    task: Task
    """Its entry in the table of tasks."""
    kit: Kit
    """What is asked."""
    pad_token_id: int | None = None
    """The id rows are padded with; None: of images."""
    texts: TextInputs | None = None
    """Of texts."""
    pixels: Any = None
    """The PixelProcessor of images."""
    languages: Languages | None = None
    """Of a sequence-to-sequence tokenizer that has them."""

    @property
    def answers(self) -> ClosedAnswers | None:
        """The closed set of answers of a language model."""
        text = self.usage.text
        if text is None or not text.answers or text.end_token is None:
            return None
        return ClosedAnswers(tuple(text.answers), tuple(map(tuple, text.answer_tokens)), text.end_token)

    def read(self, inputs: Sequence[Any]) -> tuple[Objective, Sequence[Any]]:
        """The objective that makes batches of these inputs, and the inputs as it takes them."""
        if self.texts is not None:
            return self.task.build_objective(self.kit, ObjectiveSettings(self.pad_token_id)), self.texts(inputs)
        from kitout.predict.image_inputs import image_set, image_sources  # images need pillow

        settings = ObjectiveSettings(images=image_set(image_sources(inputs)), pixels=self.pixels)
        return self.task.build_objective(self.kit, settings), range(len(inputs))


class Predictor:
    """`predictor(inputs)` -> a Prediction, or a list of them for a list of inputs.

    kit: the base with its adapters. tokenizer: None for images. usages: by adapter name; "": of the base itself.
    loaded: the adapters that were asked for, without the parts of compositions. chat_template: the tokenizer's before
    it was set to the day of an adapter. Several threads may call it: they take turns.
    """

    def __init__(
        self, kit: Kit, tokenizer: Any, usages: Mapping[str, UsageRecord], pad_token_id: int | None = None,
        pixels: Callable[[UsageRecord], Any] | None = None, chat_template: Any = None,
    ) -> None:  # fmt: skip
        self.kit, self.tokenizer, self.usages = kit, tokenizer, dict(usages)
        self._pad_token_id, self._pixels, self._chat_template = pad_token_id, pixels, chat_template
        self.loaded = [name for name in self.usages if name]
        self.folders: dict[str, Any] = {}  # of each adapter that was loaded from one: its Path
        self._preprocessing: dict[str, Preprocessing] = {}
        self.untrained_heads: frozenset[str] = frozenset()  # modules of the base that its checkpoint does not hold
        self._lock = threading.Lock()  # languages, generation settings and modes of the model are everybody's

    @property
    def model(self) -> nn.Module:
        """The frozen base, with the kit attached."""
        return self.kit.base

    @property
    def names(self) -> list[str]:
        """The adapters in the order in which they were loaded; parts that compositions brought along come last."""
        return list(dict.fromkeys(name for name in [*self.loaded, *self.kit.names] if name in self.kit))

    @property
    def usage(self) -> UsageRecord:
        """How the active adapter is used; of the first one where none is active."""
        return self.usages[self._active_name]

    def use(self, what: object) -> Any:
        """Activates an adapter, None (the base), a Stack or a Mix, as `kit.use` does."""
        return self.kit.use(what)

    @overload
    def __call__(
        self, inputs: list[Any], *, batch_size: int | None = None, on_progress: ProgressFn | None = None
    ) -> list[Prediction]: ...
    @overload
    def __call__(
        self, inputs: Any, *, batch_size: int | None = None, on_progress: ProgressFn | None = None
    ) -> Prediction: ...
    def __call__(
        self, inputs: Any, *, batch_size: int | None = None, on_progress: ProgressFn | None = None
    ) -> Prediction | list[Prediction]:
        """One input, or a list of inputs.

        An input is a text; a mapping with the columns of the training data (of a reward adapter prompt and completion);
        a tuple of two texts; or an image (a path, a PIL image, an array [H, W, 3] of bytes). batch_size: inputs of one
        forward at most. on_progress: gets the number of inputs done and of all. DataError for one that cannot be read.
        """
        if not isinstance(inputs, list):
            (prediction,) = self([inputs], batch_size=batch_size, on_progress=on_progress)
            return prediction
        if inputs and all(isinstance(each, Mapping) and {"role", "content"} <= each.keys() for each in inputs):
            raise ConfigError("these are messages of one chat: use predictor.chat(messages)")
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}, expected at least 1")
        if not inputs:
            return []
        preprocessing = self.preprocessing
        if self.kit.active is None and (untrained := sorted(self.untrained_heads)):
            raise ConfigError(f"the base has no trained {', '.join(untrained)}: use an adapter, {self.names}")
        with self._lock, eval_mode(self.kit.base, self.kit), torch.no_grad():
            self._set_languages(preprocessing)
            if preprocessing.task.generates_text:
                return self._write(preprocessing, inputs, batch_size, on_progress)
            return self._read_labels(preprocessing, inputs, batch_size, on_progress)

    def chat(
        self, messages: Any, *, max_new_tokens: int | None = None, stream: bool = False,
        tools: Sequence[Any] | None = None, seed: int | None = None, **sampling: Any,
    ) -> Any:  # fmt: skip
        """The answer to a chat: messages as {"role": ..., "content": ...}, or a text for a single question.

        stream: gives an iterator of pieces of text, whose sum is the answer. sampling: temperature, top_p, top_k, ...
        as transformers takes them; without them, or with temperature=0, the answer is the likeliest, token by token.
        seed: of sampling; None: drawn from torch's random numbers. ConfigError for a chat longer than the model reads.
        """
        preprocessing = self._writing("chat")
        chat = chat_of(messages, tools, preprocessing.usage.text)
        with self._lock:
            self._set_languages(preprocessing)
            prompt = preprocessing.texts.encode_chat(chat)
        return self._generate(preprocessing, prompt, max_new_tokens, stream, seed, sampling)

    def generate(
        self, prompt: str, *, max_new_tokens: int | None = None, stream: bool = False, seed: int | None = None,
        **sampling: Any,
    ) -> Any:  # fmt: skip
        """Raw text continued (a decoder), or the output for it (an encoder-decoder). Options: see `chat`."""
        preprocessing = self._writing("generate")
        if not isinstance(prompt, str):
            raise ConfigError(f"found {short_repr(prompt)}, expected text; messages go to predictor.chat")
        with self._lock:
            self._set_languages(preprocessing)
            ids = preprocessing.texts.encode_raw(prompt)
        return self._generate(preprocessing, ids, max_new_tokens, stream, seed, sampling)

    def __repr__(self) -> str:
        usage, adapters = self.usage, ", ".join(self.names) or "none"
        return f"Predictor({usage.task} on {usage.base.name}; adapters: {adapters}; active: {self.kit.active})"

    # ---- what the active adapter needs -------------------------------------------------------------------------

    @property
    def _active_name(self) -> str:
        active = self.kit.active
        entries = active if isinstance(active, tuple) else (active,)
        names = [name for entry in entries for name in adapter_names(entry)]
        return next((name for name in [*names, *self.usages] if name in self.usages), "")

    @property
    def preprocessing(self) -> Preprocessing:
        """Of the active adapter; made once for each."""
        name = self._active_name
        if name not in self._preprocessing:
            self._preprocessing[name] = self._prepare(self.usages[name])
        return self._preprocessing[name]

    def _prepare(self, usage: UsageRecord) -> Preprocessing:
        task = USES[usage.task]
        if task.reads_images:
            assert self._pixels is not None, "the loader gives what reads images"
            return Preprocessing(usage, task, self.kit, pixels=self._pixels(usage))
        languages: Languages | None = None
        if task.name == "seq2seq_lm" and usage.text is not None:
            languages = find_languages(self.tokenizer, usage.text.src_lang, usage.text.tgt_lang)
        texts = text_inputs(task, usage, self._tokenizer_of(usage), languages)
        return Preprocessing(usage, task, self.kit, self._pad_token_id, texts, languages=languages)

    def _tokenizer_of(self, usage: UsageRecord) -> Any:
        """With a chat template that prints the day on which this adapter was trained."""
        day = None if usage.text is None else usage.text.template_date
        if day is None or self._chat_template is None:
            return self.tokenizer
        tokenizer = copy.copy(self.tokenizer)
        tokenizer.chat_template = self._chat_template
        fix_template_date(tokenizer, day)
        return tokenizer

    def _set_languages(self, preprocessing: Preprocessing) -> None:
        """Adapters on one base may translate into different languages."""
        if preprocessing.languages is not None:
            preprocessing.languages.apply(self.tokenizer)
            set_target_language(self.kit, preprocessing.languages)

    # ---- labels and numbers ------------------------------------------------------------------------------------

    def _read_labels(
        self, preprocessing: Preprocessing, inputs: Sequence[Any], batch_size: int | None,
        on_progress: ProgressFn | None,
    ) -> list[Prediction]:  # fmt: skip
        objective, items = preprocessing.read(inputs)
        assert isinstance(objective, LabelObjective), "it does not write"
        results: dict[int, Prediction] = {}
        for rows in plan_forwards(objective, items, range(len(items)), batch_size):
            if on_progress is not None:
                on_progress(len(results), len(items))
            logits = objective.logits(self.kit, objective.collate([items[i] for i in rows], None)).float().cpu()
            for row, i in zip(logits, rows, strict=True):
                results[i] = self._prediction(preprocessing, row, inputs[i], items[i])
        if on_progress is not None:
            on_progress(len(items), len(items))
        return [results[i] for i in range(len(items))]

    def _prediction(self, preprocessing: Preprocessing, logits: torch.Tensor, value: Any, item: Any) -> Prediction:
        labels, texts = preprocessing.usage.labels, preprocessing.texts
        if preprocessing.task.has_labels and len(labels) != logits.shape[-1]:
            raise ConfigError(
                f"the adapter has {logits.shape[-1]} outputs and {len(labels)} label names: its folder does not say "
                "what they mean; train it again, or name them in predictor.usages"
            )
        num_truncated = 0 if texts is None else item.num_truncated
        if preprocessing.task.metric_task == "tokens":
            assert texts is not None, "tokens are of texts"
            example = texts.to_example(value)
            words, tags = texts.tagged(example, logits.argmax(1).tolist())
            return Prediction(words=words, tags=tags, spans=texts.spans(example, tags), num_truncated=num_truncated)
        return PREDICTIONS[preprocessing.task.metric_task](logits, labels, num_truncated)

    # ---- texts -------------------------------------------------------------------------------------------------

    def _write(
        self, preprocessing: Preprocessing, inputs: Sequence[Any], batch_size: int | None,
        on_progress: ProgressFn | None,
    ) -> list[Prediction]:  # fmt: skip
        texts, answers = preprocessing.texts, preprocessing.answers
        assert texts is not None, "it writes"
        num_after = max(map(len, answers.token_ids)) if answers else 0
        items = texts(inputs, num_after)
        prompts = [self._fit(item.input_ids, max(1, num_after), texts.special_ids) for item in items]
        cut = [
            item.num_truncated + len(item.input_ids) - len(prompt) for item, prompt in zip(items, prompts, strict=True)
        ]
        options: dict[str, Any] = {} if batch_size is None else {"batch_size": batch_size}
        if answers is not None:
            scores = answer_likelihoods(self.kit, answers, prompts, on_progress, **options)
            return [class_prediction(row, answers.names, n) for row, n in zip(scores, cut, strict=True)]
        written = generate(
            self.kit, self.tokenizer, prompts, self._new_tokens(preprocessing.usage), on_progress=on_progress,
            stop_ids=texts.stop_ids, **options,
        )  # fmt: skip
        return [Prediction(text=text, num_truncated=n) for text, n in zip(written, cut, strict=True)]

    def _fit(self, prompt: Sequence[int], num_after: int, special_ids: frozenset[int]) -> tuple[int, ...]:
        """A prompt that is longer than the model reads loses its front, as in training, behind a start token."""
        if self.kit.config.is_encoder_decoder:
            return tuple(prompt)  # truncated when it was encoded, at its end
        wanted = len(prompt) + num_after
        return cut_front(prompt, (max_tokens(self.kit, wanted) or wanted) - num_after, special_ids)

    def _writing(self, verb: str) -> Any:
        preprocessing = self.preprocessing
        if not preprocessing.task.generates_text:
            raise ConfigError(
                f"{preprocessing.usage.task} does not write: predictor.{verb} is for language models; call "
                "predictor(inputs) instead (on the command line: kitout predict)"
            )
        return preprocessing

    def _new_tokens(self, usage: UsageRecord) -> int:
        return (usage.text.max_new_tokens if usage.text is not None else None) or DEFAULT_NEW_TOKENS

    def _generate(
        self, preprocessing: Preprocessing, prompt: Sequence[int], max_new_tokens: int | None, stream: bool,
        seed: int | None, sampling: dict[str, Any],
    ) -> Any:  # fmt: skip
        """An answer, or a stream of it. In a chat it may be longer than in training, and is not shorter."""
        texts = preprocessing.texts
        assert texts is not None, "it writes"
        longest = max_new_tokens
        if longest is None:
            longest = max(DEFAULT_NEW_TOKENS, self._new_tokens(preprocessing.usage))
        if longest < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        options = generation_options(sampling)
        if seed is None and options.get("do_sample"):
            seed = int(torch.randint(2**62, ()))  # the next answer is another one, and both follow torch.manual_seed
        route = self.kit.active
        check_prompts(self.kit, [prompt])

        def write(streaming: dict[str, Any]) -> list[str]:
            with self._lock, torch.random.fork_rng(enabled=seed is not None):
                if seed is not None:
                    torch.manual_seed(seed)
                self._set_languages(preprocessing)
                try:
                    return generate(
                        self.kit, self.tokenizer, [prompt], longest, stop_ids=texts.stop_ids,
                        options={**options, **streaming},
                    )  # fmt: skip
                except (ValueError, TypeError) as error:
                    if not sampling or isinstance(error, KitoutError):
                        raise
                    raise ConfigError(f"the model does not generate with {short_repr(sampling)}: {error}") from error

        if not stream:
            return write({})[0]

        def write_elsewhere(streaming: dict[str, Any]) -> list[str]:
            with self.kit.use(list(route) if isinstance(route, tuple) else route):
                return write(streaming)

        stop_ids = stop_token_ids(self.kit, self.tokenizer, texts.stop_ids)
        return AnswerStream(self.tokenizer, stop_ids, write_elsewhere)
