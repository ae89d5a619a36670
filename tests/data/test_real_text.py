"""The real tokenizer and the real sets: every row is read, every answer ends, nothing leaks. Needs the assets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from kitout.assets import store
from kitout.data.encode.answers import PairEncoder
from kitout.data.encode.generation import CausalEncoder
from kitout.data.encode.item import IGNORE_INDEX, digest
from kitout.data.read.sources import load_examples
from kitout.data.split import split_examples
from kitout.data.streaming import encode_stream, open_stream

pytestmark = pytest.mark.assets
SETS = {"tweets": 38_158, "boolq": 9_427, "chat": 1_399, "xsum": 1_000, "asdiv": 2_305, "privacy": 10_923}
SENTIMENT = "Classify the sentiment of this tweet as negative, neutral or positive."


@pytest.fixture(scope="module")
def smollm() -> Any:
    return AutoTokenizer.from_pretrained(store.fetch_asset("smollm2-135m"))


def folder(name: str) -> Path:
    return Path(store.fetch_asset(name))


@pytest.mark.parametrize("name", SETS)
def test_every_row_becomes_an_example_that_ends(smollm: Any, name: str) -> None:
    loaded = load_examples(folder(name), system_prompt=SENTIMENT if name == "tweets" else None)
    examples = loaded.splits.get("train", loaded.splits.get("", ()))
    assert len(examples) == SETS[name]
    items = CausalEncoder(smollm, 512)(examples[:2000])
    assert len(items) == min(len(examples), 2000)
    for example, item in zip(examples, items, strict=False):
        trained = [label for label in item.labels if label != IGNORE_INDEX]
        assert trained[-1] == item.input_ids[-1] == smollm.eos_token_id
        assert not item.num_truncated_targets
        assert smollm.decode(trained[:-1]) == item.reference == example.answer_text()
        assert item.input_ids[: item.prompt_length][-4:] == tuple(smollm("<|im_start|>assistant\n").input_ids)


def test_the_prompt_is_the_tokenizers_own(smollm: Any) -> None:
    for example in load_examples(f"{folder('boolq')}/train.jsonl#200").splits[""]:
        (item,) = CausalEncoder(smollm, 4096)([example])
        turns = [dict(turn.message) for turn in example.turns[:-1]]  # type: ignore[attr-defined]
        whole = smollm.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert list(item.input_ids[: item.prompt_length]) == whole


@pytest.mark.parametrize(("name", "num_pairs"), [("nq-pairs", 4149), ("piqa-pairs", 1500), ("factual-pairs", 368)])
def test_every_pair_of_the_built_in_sets_is_read(smollm: Any, name: str, num_pairs: int) -> None:
    (pairs,) = load_examples(folder(name)).splits.values()
    encoder = PairEncoder(smollm, 512)
    items = encoder(pairs[:400])
    assert (len(pairs), len(items), encoder.dropped) == (num_pairs, min(400, num_pairs), [])
    for item in items:
        prompts = [row.input_ids[: row.prompt_length] for row in item.rows]
        assert prompts[0] == prompts[1]
        assert all(row.input_ids[-1] == smollm.eos_token_id == row.labels[-1] for row in item.rows)
    splits = split_examples({"": pairs}, seed=3)
    inputs = [{e.input_key for e in split} for split in (splits.train, splits.validation, splits.test)]
    assert not inputs[0] & inputs[2] | inputs[1] & inputs[2] | inputs[0] & inputs[1]


@pytest.mark.parametrize("name", ["tweets", "20newsgroups", "reuters-r8", "boolq"])
def test_splits_share_no_text(name: str) -> None:
    splits = split_examples(load_examples(folder(name)).splits, seed=3)
    train, validation, test = ({e.input_key for e in p} for p in (splits.train, splits.validation, splits.test))
    assert not train & test
    assert not (train | test) & validation
    assert min(map(len, (train, validation, test))) > 200
    assert splits.majority_accuracy is not None


def test_a_stream_of_tweets_is_the_whole_set(smollm: Any) -> None:
    path = folder("tweets") / "tweets.jsonl"
    encode = CausalEncoder(smollm, 256)
    stream = open_stream(path, system_prompt=SENTIMENT, seed=1)[""]
    first = [item for item, _ in zip(encode_stream(stream, encode), range(1000), strict=False)]
    again = [item for item, _ in zip(encode_stream(stream, encode, skip=400), range(600), strict=False)]
    assert digest(first[400:]) == digest(again)
