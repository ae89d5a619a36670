"""An answer as it is written: pieces of text from a thread that generates, and the options of sampling.

The pieces add up to the answer that the same call gives as a whole. Closing the iterator ends the generation at the
next token. It knows how transformers streams token ids, and no prompt, adapter or terminal.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from queue import SimpleQueue
from typing import Any

import torch

from kitout.errors import ConfigError, suggest
from kitout.format import short_repr

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")
SEARCH = (
    "do_sample", "repetition_penalty", "no_repeat_ngram_size", "num_beams", "length_penalty", "early_stopping",
    "min_new_tokens", "stop_strings", "bad_words_ids", "max_time",
)  # fmt: skip
THREAD = "kitout answer"
BROKEN = "\ufffd"  # a character of which not all bytes are there yet


def generation_options(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """As the model's `generate` takes them. temperature=0 is the likeliest answer; sampling starts only where asked."""
    unknown = [name for name in sampling if name not in (*SAMPLING, *SEARCH)]
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is no option of generation: {suggest(unknown[0], (*SAMPLING, *SEARCH), 20)}")
    options = {name: value for name, value in sampling.items() if value is not None}
    for name, low, high in (("temperature", 0.0, 100.0), ("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0)):
        value = options.get(name)
        if value is not None and not (isinstance(value, int | float) and low <= value <= high):
            raise ConfigError(f"{name} is {short_repr(value)}, expected a number from {low:g} to {high:g}")
    if options.get("temperature") == 0:
        options = {name: value for name, value in options.items() if name not in SAMPLING}
        return {**options, "do_sample": False}
    if any(name in SAMPLING for name in options):
        options.setdefault("do_sample", True)
    return options


WriteFn = Callable[[dict[str, Any]], object]  # generates, with the streamer and the stopping criterion it is given


class AnswerStream(Iterator[str]):
    """Pieces of an answer, without white space around it. stop_ids: the tokens that end one."""

    def __init__(self, tokenizer: Any, stop_ids: set[int], write: WriteFn) -> None:
        self.num_tokens = 0
        """Tokens written so far."""
        self.has_ended = False
        """Whether the model has ended the answer, not a limit."""
        self._tokenizer, self._stop_ids, self._write = tokenizer, stop_ids, write
        self._queue: SimpleQueue[list[int] | BaseException | None] = SimpleQueue()
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._ids: list[int] = []
        self._num_shown = 0  # characters of the text so far
        self._is_done = self._has_prompt = False

    def __next__(self) -> str:
        if self._thread is None and not self._is_done:
            # The thread holds no reference to this object: a stream that nobody reads any longer ends.
            arguments = (self._queue, self._is_closed, self._write)
            self._thread = threading.Thread(target=_write_into, args=arguments, daemon=True, name=THREAD)
            self._thread.start()
        while not self._is_done:
            received = self._queue.get()
            if received is None or isinstance(received, BaseException):
                self.close()
                if received is not None:
                    raise received
                if piece := self._new_text(is_last=True):
                    return piece
            elif not self._has_prompt:  # of an encoder-decoder: its start token
                self._has_prompt = True
            elif not self.has_ended:
                self._take(received)
                if piece := self._new_text():
                    return piece
        raise StopIteration

    def close(self) -> None:
        """Ends the generation, and returns when the model is free again."""
        self._is_done = True
        self._is_closed.set()
        if self._thread is not None:
            self._thread.join()

    def __del__(self) -> None:
        self._is_closed.set()

    def _take(self, ids: list[int]) -> None:
        self.num_tokens += len(ids)
        stop = next((i for i, one in enumerate(ids) if one in self._stop_ids), None)
        self.has_ended = stop is not None
        self._ids += ids[:stop]

    def _new_text(self, is_last: bool = False) -> str:
        """What is new in the text; the start of a character and white space at the end wait for what follows."""
        text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True)).lstrip()
        end = len(text.rstrip())
        if end <= self._num_shown or (text.endswith(BROKEN) and not is_last):
            return ""
        piece, self._num_shown = text[self._num_shown : end], end
        return piece


class _TokenQueue:
    """A streamer of transformers that hands tokens on."""

    def __init__(self, queue: SimpleQueue[list[int] | BaseException | None]) -> None:
        self.queue = queue

    def put(self, ids: torch.Tensor) -> None:
        """Is called with the prompt, and then with each token."""
        self.queue.put(ids.flatten().tolist())

    def end(self) -> None:
        """The caller of `generate` says when it has returned."""


def _write_into(
    queue: SimpleQueue[list[int] | BaseException | None], is_closed: threading.Event, write: WriteFn
) -> None:
    from transformers import StoppingCriteriaList

    def should_stop(ids: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
        return torch.full((len(ids),), is_closed.is_set(), device=ids.device)

    stop = StoppingCriteriaList([should_stop])
    try:
        write({"streamer": _TokenQueue(queue), "stopping_criteria": stop})
        queue.put(None)
    except BaseException as error:  # raised where the pieces are read
        queue.put(error)
