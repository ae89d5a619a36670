"""The real tokenizer and the real sets: every row is read, every answer ends, nothing leaks. Needs the assets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from kitout.assets import store
from kitout.data.encode.generation import Causal
from kitout.data.encode.item import IGNORED, digest
from kitout.data.read.sources import load
from kitout.data.split import split_examples
from kitout.data.streaming import items, stream

pytestmark = pytest.mark.assets
SETS = {"tweets": 38_158, "boolq": 9_427, "chat": 1_399, "xsum": 1_000, "asdiv": 2_305, "privacy": 10_923}
SENTIMENT = "Classify the sentiment of this tweet as negative, neutral or positive."


@pytest.fixture(scope="module")
def smollm() -> Any:
    return AutoTokenizer.from_pretrained(store.get("smollm2-135m"))


def folder(name: str) -> Path:
    return Path(store.get(name))


@pytest.mark.parametrize("name", SETS)
def test_every_row_becomes_an_item_that_ends(smollm: Any, name: str) -> None:
    loaded = load(folder(name), instruction=SENTIMENT if name == "tweets" else None)
    examples = loaded.parts.get("train", loaded.parts.get("", ()))
    assert len(examples) == SETS[name]
    made = Causal(smollm, 512)(examples[:2000])
    assert len(made) == min(len(examples), 2000)
    for example, item in zip(examples, made, strict=False):
        said = [label for label in item.labels if label != IGNORED]
        assert said[-1] == item.ids[-1] == smollm.eos_token_id
        assert not item.lost
        assert smollm.decode(said[:-1]) == item.reference == example.answer_text()
        assert item.ids[: item.prompt][-4:] == tuple(smollm("<|im_start|>assistant\n").input_ids)


def test_the_prompt_is_the_tokenizers_own(smollm: Any) -> None:
    for example in load(f"{folder('boolq')}/train.jsonl#200").parts[""]:
        (item,) = Causal(smollm, 4096)([example])
        turns = [dict(turn.message) for turn in example.turns[:-1]]  # type: ignore[attr-defined]
        whole = smollm.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert list(item.ids[: item.prompt]) == whole


@pytest.mark.parametrize("name", ["tweets", "20newsgroups", "reuters-r8", "boolq"])
def test_parts_share_no_text(name: str) -> None:
    splits = split_examples(load(folder(name)).parts, seed=3)
    train, validation, test = ({e.input_key for e in p} for p in (splits.train, splits.validation, splits.test))
    assert not train & test
    assert not (train | test) & validation
    assert min(map(len, (train, validation, test))) > 200
    assert splits.majority_accuracy is not None


def test_a_stream_of_tweets_is_the_whole_set(smollm: Any) -> None:
    path = folder("tweets") / "tweets.jsonl"
    encode = Causal(smollm, 256)
    made = stream(path, instruction=SENTIMENT, seed=1)[""]
    first = [item for item, _ in zip(items(made, encode), range(1000), strict=False)]
    again = [item for item, _ in zip(items(made, encode, skip=400), range(600), strict=False)]
    assert digest(first[400:]) == digest(again)
