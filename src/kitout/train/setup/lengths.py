"""How long an example may be: what is asked for, what the tokenizer says, what the model reads; and who has set it.

Before a model is loaded only the first two are known. Afterwards each adapter's virtual tokens count as well, and what
is too long for it is encoded again. It knows tokenizers and kits, and no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kitout.base.token_limit import trained_length
from kitout.data.encode.generation import MIN_MAX_LENGTH
from kitout.data.encode.item import EncodedExample
from kitout.errors import ConfigError
from kitout.evaluate.ask.text_limit import Part, max_tokens, num_virtual_tokens, position_table
from kitout.kit import Kit
from kitout.train.config.schema import DataConfig

DEFAULT_MAX_LENGTH = 1024
NO_LIMIT = 10**9  # a tokenizer without a limit says a number beyond all texts


@dataclass(frozen=True)
class MaxLength:
    """Tokens of one text at most."""

    tokens: int
    """How many."""
    owner: str
    """Who has set it, in words."""
    is_model_limit: bool = False
    """The model reads no more."""


@dataclass(frozen=True)
class TextLengths:
    """Of one job's examples."""

    text: MaxLength
    """Of an example, or of the source of a sequence-to-sequence model."""
    target: MaxLength
    """Of what a sequence-to-sequence model writes."""
    new_tokens: int = 0
    """Of a text's tokens, those that are kept free for what is written behind it."""

    @property
    def at_model_limit(self) -> bool:
        """The model, not a setting, ends a text or a target."""
        return self.text.is_model_limit or self.target.is_model_limit

    def describe(self, has_targets: bool) -> str:
        """In words, for the pre-flight."""
        text = f"at most {self.text.tokens:,} tokens an example: {self.text.owner}"
        if not has_targets or self.target == self.text:
            return text
        return f"{text}; at most {self.target.tokens:,} of an answer: {self.target.owner}"


def requested_lengths(config: DataConfig, tokenizer: Any, new_tokens: int = 0) -> TextLengths:
    """What config and tokenizer say. A length that is asked for holds whatever the tokenizer says.

    new_tokens: written behind each text.
    """
    if config.max_length is not None:
        length = MaxLength(config.max_length, "data.max_length")
    elif (own := tokenizer_length(tokenizer)) is not None and own < DEFAULT_MAX_LENGTH:
        length = MaxLength(own, "the tokenizer's model_max_length")
    else:
        length = MaxLength(DEFAULT_MAX_LENGTH, "the default of data.max_length")
    return TextLengths(length, length, new_tokens)


def tokenizer_length(tokenizer: Any) -> int | None:
    """The tokenizer's `model_max_length`; None where it says none."""
    length = tokenizer.model_max_length
    return length if isinstance(length, int) and 0 < length < NO_LIMIT else None


def fit_lengths(
    kit: Kit, name: str, requested: TextLengths, items: Sequence[EncodedExample], streams: bool
) -> TextLengths:
    """What an adapter's texts may be: as requested, or as many tokens as the model reads beside its virtual ones.

    items: all that are encoded so far. streams: more are to come.
    """
    with kit.use(name):
        new_tokens = requested.new_tokens
        longest = max((len(item.input_ids) + new_tokens for item in items), default=0)
        text = _fit(kit, name, requested.text, "text", longest, streams)
        if new_tokens and text.tokens < new_tokens + MIN_MAX_LENGTH:
            raise ConfigError(
                f"{name}: {text.owner}, {text.tokens:,} tokens a text, and an answer of up to {new_tokens:,} leaves "
                f"{max(0, text.tokens - new_tokens):,} for its prompt: write fewer new tokens, "
                f"rollout.max_new_tokens={text.tokens // 2}"
            )
        if not kit.config.is_encoder_decoder:
            return TextLengths(text, text, new_tokens)
        longest_target = max((len(item.target_ids) for item in items), default=0)
        return TextLengths(text, _fit(kit, name, requested.target, "target", longest_target, streams))


def _fit(kit: Kit, name: str, requested: MaxLength, part: Part, longest: int, streams: bool) -> MaxLength:
    table, num_virtual = position_table(kit, part), num_virtual_tokens(kit, part)
    wanted = requested.tokens if streams or table is not None else min(longest, requested.tokens)
    fitting = max_tokens(kit, wanted, part) if wanted else 0
    if table is not None and fitting < MIN_MAX_LENGTH:
        raise ConfigError(
            f"{name}: {num_virtual} virtual tokens leave {fitting} of the model's {table:,} positions for a text: "
            "choose a smaller method.length"
        )
    if fitting in (0, wanted):  # a model that runs on no text has another problem
        return requested
    if table is None:
        beside = f" beside {num_virtual} virtual ones" if num_virtual else ""
        return MaxLength(fitting, f"the model runs on no more{beside}", True)
    of_which = f", of which {num_virtual} are virtual tokens" if num_virtual else ""
    return MaxLength(fitting, f"the model has {table:,} positions{of_which}", True)


def are_too_long(items: Sequence[EncodedExample], lengths: TextLengths) -> bool:
    """Whether an example has more tokens than that."""
    longest = lengths.text.tokens - lengths.new_tokens
    return any(len(item.input_ids) > longest or len(item.target_ids) > lengths.target.tokens for item in items)


def warn_of_lengths(kit: Kit, name: str, items: Sequence[EncodedExample], tokenizer: Any) -> list[str]:
    """A warning where texts run that are longer than those the model was trained on."""
    if kit.config.is_encoder_decoder or not items:
        lengths = {"tokenizer's model_max_length": tokenizer_length(tokenizer)}
    else:
        lengths = {
            "model's config": trained_length(kit.base),
            "tokenizer's model_max_length": tokenizer_length(tokenizer),
        }
    known = {owner: length for owner, length in lengths.items() if length is not None}
    with kit.use(name):
        num_virtual = num_virtual_tokens(kit)
    longest = max((len(item.input_ids) for item in items), default=0) + num_virtual
    over = {owner: length for owner, length in known.items() if longest > length}
    if not over or position_table(kit) is not None:
        return []
    owner, length = min(over.items(), key=lambda pair: pair[1])
    number = sum(len(item.input_ids) + num_virtual > length for item in items)
    message = (
        f"{name}: {number:,} examples have more tokens than the model was trained on ({length:,}, by the {owner}; the "
        f"longest have {longest:,}): it runs, and may understand less of what is beyond; data.max_length="
        f"{length - num_virtual} truncates them"
    )
    return [message]


def check_vocabulary(kit: Kit, tokenizer: Any) -> None:
    """ConfigError where the tokenizer may give ids that the model's token table has no row for."""
    base: Any = kit.base
    try:
        rows = int(base.get_input_embeddings().weight.shape[0])
    except (NotImplementedError, AttributeError):  # a model that computes its ids' vectors
        return
    vocabulary = tokenizer.get_vocab()
    beyond = sorted((token_id, token) for token, token_id in vocabulary.items() if token_id >= rows)
    if beyond:
        shown = ", ".join(f"{token!r} ({token_id})" for token_id, token in beyond[:4])
        raise ConfigError(
            f"the tokenizer has {max(vocabulary.values()) + 1:,} entries and the model's token table {rows:,} rows: "
            f"{len(beyond):,} have none, such as {shown}. Load both with transformers, call "
            f"model.resize_token_embeddings({max(vocabulary.values()) + 1}), save both into one folder and give it as "
            "model.name; or take the tokenizer that belongs to the model"
        )
