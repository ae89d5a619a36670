"""Generation through a Predictor: streams, sampling, what ends an answer, and what several adapters need apart."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import kitout
from kitout.data.encode.prompts import PromptEncoder
from kitout.errors import BadRows, ConfigError
from kitout.files.usage_record import BaseRecord, TextRecord, UsageRecord
from kitout.predict.answer_stream import THREAD, AnswerStream, generation_options
from kitout.predict.predictor import Predictor
from kitout.predict.text_inputs import TextInputs, cut_front
from kitout.train.objectives.tasks import TASKS
from tiny_models import both, decoder, tokenizer


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return kitout.load(base=decoder(tmp_path_factory.mktemp("decoder")), dtype="float32")


def test_pieces_add_up_to_the_answer(predictor: Predictor) -> None:
    for seed in range(6):
        options = {"temperature": 3.0, "seed": seed, "max_new_tokens": 30}
        stream = predictor.chat("the cat", stream=True, **options)
        assert "".join(stream) == predictor.chat("the cat", **options)
        assert stream.num_tokens <= 30
        assert stream.has_ended or stream.num_tokens == 30


def test_a_character_comes_whole(predictor: Predictor) -> None:
    ids = predictor.tokenizer("  né 東🙂 x \n", add_special_tokens=False)["input_ids"]

    def write(streaming: dict[str, Any]) -> None:
        for token in (0, *ids, 5):
            streaming["streamer"].put(torch.tensor([token]))

    stream = AnswerStream(predictor.tokenizer, {5}, write)
    pieces = list(stream)
    assert "".join(pieces) == "né 東🙂 x"
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.has_ended


def test_sampling_is_another_one_each_time_and_follows_the_seed(predictor: Predictor) -> None:
    def ask(**options: Any) -> str:
        return str(predictor.chat("the cat", max_new_tokens=12, **options))

    torch.manual_seed(0)
    first, second = ask(temperature=3.0), ask(temperature=3.0)
    assert first != second
    torch.manual_seed(0)
    assert [ask(temperature=3.0), ask(temperature=3.0)] == [first, second]
    assert ask(temperature=3.0, seed=4) == ask(temperature=3.0, seed=4) != first
    assert ask(temperature=0) == ask() == ask(repetition_penalty=1.0)


def test_options_that_cannot_be(predictor: Predictor) -> None:
    assert "do_sample" not in generation_options({"repetition_penalty": 1.2})
    assert generation_options({"top_k": 5})["do_sample"]
    for options, message in (
        ({"temprature": 1.0}, "did you mean 'temperature'"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 3}, "from 0 to 1"),
        ({"max_new_tokens": 0}, "expected at least 1"),
        ({"top_k": -3}, "does not generate with"),
    ):
        with pytest.raises(ConfigError, match=message):
            predictor.chat("the cat", **options)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        predictor(["a"], batch_size=0)
    assert predictor([]) == []


def test_a_stream_that_is_dropped_ends(predictor: Predictor) -> None:
    stream = predictor.chat("the cat", max_new_tokens=200, stream=True, temperature=3.0, seed=0)
    next(stream)
    del stream
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join(5)
    assert isinstance(predictor.chat("the cat", max_new_tokens=2), str)


def test_threads_take_turns(predictor: Predictor) -> None:
    expected = [predictor.chat(text, max_new_tokens=8) for text in ("the cat", "the dog")]
    settings = predictor.model.generation_config
    found: dict[int, list[str]] = {}

    def ask(number: int) -> None:
        found[number] = [predictor.chat(text, max_new_tokens=8) for text in ("the cat", "the dog")]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found.values()) == [expected] * 3
    assert predictor.model.generation_config is settings


def test_the_end_that_the_template_writes_ends_an_answer() -> None:
    """A base model's tokenizer may end texts with another token than its template ends turns with."""
    fast = tokenizer()
    fast.eos_token = "</s>"
    assert PromptEncoder(fast).turn_end_ids == (fast.convert_tokens_to_ids("<|im_end|>"),)
    fast.chat_template = None
    assert PromptEncoder(fast).turn_end_ids == ()


def test_a_long_prompt_keeps_its_end_and_its_start_token() -> None:
    assert cut_front((2, 7, 8, 9), 3, frozenset({2})) == (2, 8, 9)
    assert cut_front((7, 7, 8, 9), 3, frozenset({2})) == (7, 8, 9)
    assert cut_front((2, 7), 3, frozenset({2})) == (2, 7)


def test_prompts_are_truncated_as_in_training(tmp_path: Path) -> None:
    """max_length of the record, for decoders the front; of an encoder-decoder's source the end; both are counted."""
    for make, task in ((decoder, "causal_lm"), (both, "seq2seq_lm")):
        folder = tmp_path / task
        p = kitout.load(base=make(folder), dtype="float32", task=task)
        usage = p.usages[""]
        text = usage.text.model_copy(update={"max_length": 30, "max_new_tokens": 2})
        short = Predictor(p.kit, p.tokenizer, {"": usage.model_copy(update={"text": text})}, 0)
        assert short("cat " * 50).num_truncated > 20
        assert short("cat").num_truncated == 0


def test_entities_come_as_characters_where_training_had_them_so() -> None:
    base = BaseRecord(name="x", source="hub")
    text = TextRecord(tokenizer="", format="spans", columns={"text": "note", "spans": "entities"}, max_length=20)
    labels = ["B-PER", "I-PER"]  # a set without O
    usage = UsageRecord(task="token_classification", labels=labels, base=base, text=text)
    inputs = TextInputs(TASKS["token_classification"], usage, tokenizer(template=False))
    example = inputs.to_example({"note": "So Ada Byron came."})
    assert inputs([{"note": "So Ada Byron came."}])
    found = inputs.spans(example, ["O", "B-PER", "I-PER", None, "O"])
    assert found == ({"start": 3, "end": 12, "label": "PER", "text": "Ada Byron"},)


def test_every_bad_input_is_named(predictor: Predictor) -> None:
    with pytest.raises(BadRows) as error:
        predictor(["a", "", "b", 3])
    assert sorted(error.value.messages) == [1, 3]


def test_each_adapter_has_its_own_preprocessing(tmp_path: Path) -> None:
    """The day and the settings of the chat template are those that the adapter was trained with."""
    fast = tokenizer()
    fast.chat_template = "{{ strftime_now('%Y') }}{{ mood }}" + fast.chat_template
    folder = decoder(tmp_path / "model")
    kit = kitout.attach(transformers.AutoModelForCausalLM.from_pretrained(folder).eval())
    base = kitout.load(base=folder, dtype="float32").usages[""]
    usages: dict[str, UsageRecord] = {}
    for name, year in (("a", "1999"), ("b", "2012")):
        kit.add(name, kitout.LoRA(), seed=0)
        update = {"template_date": f"{year}-01-01", "chat_template_kwargs": {"mood": name}}
        usages[name] = base.model_copy(update={"text": base.text.model_copy(update=update)})
    p = Predictor(kit, fast, usages, 0, chat_template=fast.chat_template)
    seen = []
    for name in ("a", "b"):
        p.use(name)
        (item,) = p.preprocessing.texts([{"instruction": "x"}])
        seen.append(fast.decode(item.input_ids)[:5])
    assert seen == ["1999a", "2012b"]
