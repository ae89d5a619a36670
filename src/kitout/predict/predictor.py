"""The Predictor: a base with its adapters, the way from an input to the model, and from its outputs to a prediction.

What is computed is what `kit(...)` gives on the same tokens or pixels under the route in force; preprocessing is that
of the adapter that is active. Texts are generated greedily unless sampling is asked for. It finds no base and opens no
adapter folder: `load` does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from queue import SimpleQueue
from typing import Any, overload

import torch
from torch import nn

from kitout.base.eval_mode import eval_mode
from kitout.data.encode.languages import Languages, find_languages
from kitout.data.encode.prompts import PromptEncoder
from kitout.data.examples.examples import Turn
from kitout.errors import ConfigError
from kitout.evaluate.ask.generate import generate
from kitout.evaluate.ask.text_limit import max_tokens
from kitout.files.usage_record import UsageRecord
from kitout.kit import Kit
from kitout.predict.prediction import PREDICTIONS, Prediction, class_prediction
from kitout.predict.text_inputs import ANSWER, TextInputs, chat_of
from kitout.runtime.routing.route import adapter_names
from kitout.train.measure.predict import ProgressFn, answer_likelihoods, plan_forwards
from kitout.train.objectives.objective import LabelObjective, Objective
from kitout.train.objectives.tasks import TASKS, ObjectiveSettings, Task
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
    """

    def __init__(
        self, kit: Kit, tokenizer: Any, usages: Mapping[str, UsageRecord], pad_token_id: int | None = None,
        pixels: Callable[[UsageRecord], Any] | None = None,
    ) -> None:  # fmt: skip
        self.kit, self.tokenizer, self.usages = kit, tokenizer, dict(usages)
        self._pad_token_id, self._pixels = pad_token_id, pixels
        self._preprocessing: dict[str, Preprocessing] = {}

    @property
    def model(self) -> nn.Module:
        """The frozen base, with the kit attached."""
        return self.kit.base

    @property
    def names(self) -> list[str]:
        """The adapters, in the order in which they were loaded."""
        return list(self.kit.names)

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

        An input is a text; a mapping with the columns of the training data; a tuple of two texts; or an image (a path,
        a PIL image, an array [H, W, 3] of bytes). batch_size: inputs of one forward at most. on_progress: is called
        with the number of inputs done and of all. DataError for an input that cannot be read.
        """
        if not isinstance(inputs, list):
            (prediction,) = self([inputs], batch_size=batch_size, on_progress=on_progress)
            return prediction
        if inputs and all(isinstance(each, Mapping) and {"role", "content"} <= each.keys() for each in inputs):
            raise ConfigError("these are messages of one chat: use predictor.chat(messages)")
        preprocessing = self.preprocessing
        with eval_mode(self.kit.base, self.kit), torch.no_grad():
            if preprocessing.task.generates_text:
                return self._write(preprocessing, inputs, batch_size, on_progress)
            return self._read_labels(preprocessing, inputs, batch_size, on_progress)

    def chat(
        self, messages: Any, *, max_new_tokens: int | None = None, stream: bool = False,
        tools: Sequence[Any] | None = None, **sampling: Any,
    ) -> Any:  # fmt: skip
        """The answer to a chat: messages as {"role": ..., "content": ...}, or a text for a single question.

        stream: gives an iterator of pieces of text, whose sum is the answer. sampling: temperature, top_p, top_k, ...
        as transformers takes them; without them the answer is the likeliest, token by token.
        """
        preprocessing = self._writing("chat")
        text = preprocessing.usage.text
        chat = chat_of(messages, tools, text)
        if preprocessing.task.packable:
            prompt = self._prompts.encode_chat(chat)
        else:
            assert preprocessing.texts is not None, "it writes"
            (item,) = preprocessing.texts.encode(
                [replace(chat, turns=(*chat.turns, Turn({"role": "assistant", "content": ANSWER})))]
            )
            prompt = item.input_ids
        return self._generate(prompt, max_new_tokens, stream, sampling)

    def generate(
        self, prompt: str, *, max_new_tokens: int | None = None, stream: bool = False, **sampling: Any
    ) -> Any:  # fmt: skip
        """Raw text continued (a decoder), or the output for it (an encoder-decoder). Options: see `chat`."""
        preprocessing = self._writing("generate")
        if preprocessing.task.packable:
            return self._generate(self._prompts.encode_text(prompt), max_new_tokens, stream, sampling)
        return self._generate(tuple(self.tokenizer(prompt)["input_ids"]), max_new_tokens, stream, sampling)

    def __repr__(self) -> str:
        usage = self.usage
        adapters = ", ".join(self.names) or "none"
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
        task = TASKS[usage.task]
        if task.reads_images:
            assert self._pixels is not None, "the loader gives what reads images"
            return Preprocessing(usage, task, self.kit, pixels=self._pixels(usage))
        languages: Languages | None = None
        if task.name == "seq2seq_lm" and usage.text is not None:
            languages = find_languages(self.tokenizer, usage.text.src_lang, usage.text.tgt_lang)
        texts = TextInputs(task, usage, self.tokenizer, languages)
        return Preprocessing(usage, task, self.kit, self._pad_token_id, texts)

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
        num_truncated = 0 if texts is None else item.num_truncated
        if preprocessing.task.metric_task == "tokens":
            assert texts is not None, "tokens are of texts"
            words, tags = texts.tagged(texts.to_example(value), logits.argmax(1).tolist())
            return Prediction(words=words, tags=tags, num_truncated=num_truncated)
        return PREDICTIONS[preprocessing.task.metric_task](logits, labels, num_truncated)

    # ---- texts -------------------------------------------------------------------------------------------------

    def _write(
        self, preprocessing: Preprocessing, inputs: Sequence[Any], batch_size: int | None,
        on_progress: ProgressFn | None,
    ) -> list[Prediction]:  # fmt: skip
        assert preprocessing.texts is not None, "it writes"
        prompts = [item.input_ids for item in preprocessing.texts(inputs)]
        if not prompts:
            return []
        answers, num_new = preprocessing.answers, self._new_tokens(preprocessing.usage)
        fitted = [self._fit(prompt, max(map(len, answers.token_ids)) if answers else 1) for prompt in prompts]
        cut = [len(prompt) - len(kept) for prompt, kept in zip(prompts, fitted, strict=True)]
        if answers is not None:
            scores = answer_likelihoods(self.kit, answers, fitted, on_progress)
            return [class_prediction(row, answers.names, n) for row, n in zip(scores, cut, strict=True)]
        options: dict[str, Any] = {} if batch_size is None else {"batch_size": batch_size}
        texts = generate(self.kit, self.tokenizer, fitted, num_new, on_progress=on_progress, **options)
        return [Prediction(text=text, num_truncated=n) for text, n in zip(texts, cut, strict=True)]

    def _fit(self, prompt: Sequence[int], num_after: int) -> tuple[int, ...]:
        """A prompt that is longer than the model reads loses its front, as in training, behind its first token."""
        wanted = len(prompt) + num_after
        room = (max_tokens(self.kit, wanted) or wanted) - num_after
        return tuple(prompt) if len(prompt) <= room else (*prompt[:1], *prompt[len(prompt) - room + 1 :])

    @cached_property
    def _prompts(self) -> PromptEncoder:
        text = self.usage.text
        return PromptEncoder(self.tokenizer, text.chat_template_kwargs if text is not None else None)

    def _writing(self, verb: str) -> Preprocessing:
        preprocessing = self.preprocessing
        if not preprocessing.task.generates_text:
            raise ConfigError(
                f"{preprocessing.usage.task} does not write: predictor.{verb} is for language models; call "
                "predictor(inputs) instead"
            )
        return preprocessing

    def _new_tokens(self, usage: UsageRecord) -> int:
        return (usage.text.max_new_tokens if usage.text is not None else None) or DEFAULT_NEW_TOKENS

    def _generate(
        self, prompt: Sequence[int], max_new_tokens: int | None, stream: bool, sampling: dict[str, Any]
    ) -> Any:
        longest = max_new_tokens or DEFAULT_NEW_TOKENS
        options = ({"do_sample": True} | sampling) if sampling else {}
        if stream:
            return self._stream(prompt, longest, options)
        (text,) = generate(self.kit, self.tokenizer, [prompt], longest, options=options)
        return text

    def _stream(self, prompt: Sequence[int], max_new_tokens: int, options: dict[str, Any]) -> Iterator[str]:
        """Pieces of the answer as they are written. Generation ends with the iterator."""
        from transformers import StoppingCriteriaList, TextStreamer

        pieces: SimpleQueue[str | BaseException | None] = SimpleQueue()
        is_abandoned = threading.Event()

        class Pieces(TextStreamer):  # type: ignore[misc]  # transformers is not typed
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                if text:
                    pieces.put(text)

        streamer = Pieces(self.tokenizer, skip_prompt=not self.kit.config.is_encoder_decoder, skip_special_tokens=True)
        stop = StoppingCriteriaList([lambda ids, _scores, **_: torch.full((len(ids),), is_abandoned.is_set())])
        options = {**options, "streamer": streamer, "stopping_criteria": stop}
        route = self.kit.active

        def write() -> None:
            try:
                with self.kit.use(route if route is None or not isinstance(route, tuple) else list(route)):
                    generate(self.kit, self.tokenizer, [prompt], max_new_tokens, options=options)
                pieces.put(None)
            except BaseException as error:  # raised where the pieces are read
                pieces.put(error)

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            is_abandoned.set()
            thread.join()
