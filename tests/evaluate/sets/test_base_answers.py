"""The base's answers are taken from what is kept only where nothing they depend on has changed, and never at a cost."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

import kitout
from kitout import LoRA
from kitout.evaluate.sets import base_digest
from kitout.evaluate.sets.base_answers import base_answers
from kitout.evaluate.sets.base_digest import digest_of_values
from kitout.evaluate.sets.evaluation_set import Asked
from zoo import ZOO, tokenizer_of


@dataclass
class CountedSet:
    """Answers by counting how often it was asked."""

    digest: str = "d"
    name: str = "counted"
    kind: str = "text"
    groups: tuple[str, ...] = ()
    asked: list[Any] = field(default_factory=list)

    def __len__(self) -> int:
        return 3

    def ask(self, asked: Asked, routes: Sequence[Any], on_progress: Any) -> list[Any]:
        self.asked.append(list(routes))
        return [[len(self.asked), 0.1, None]]

    def constant(self) -> None:
        return None

    def measures(self, answers: Any) -> dict[str, Any]:
        return {}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KITOUT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "base-answers"


def asked_of(species: str = "llama", seed: int = 0) -> Asked:
    torch.manual_seed(seed)
    return Asked(kitout.attach(ZOO[species].build()), tokenizer_of(ZOO[species]), 0)


def again(asked: Asked, what: CountedSet) -> bool:
    """Whether it is asked, by what is new of the same kit."""
    before = len(what.asked)
    base_answers(replace(asked), what)  # a new run reads the values anew
    return len(what.asked) > before


def test_the_same_is_asked_once() -> None:
    asked, what = asked_of(), CountedSet()
    first = base_answers(asked, what)
    assert what.asked == [[None]]
    assert base_answers(replace(asked), what) == first == [1, 0.1, None]
    asked.kit.add("a", LoRA())
    asked.kit.use("a")
    assert not again(asked, what), "adapters are not the base"


def test_what_the_answers_depend_on_is_asked_anew() -> None:
    asked, what = asked_of(), CountedSet()
    assert again(asked, what)
    assert again(asked, replace(what, digest="other"))
    assert again(replace(asked, max_new_tokens=3), what)
    assert again(replace(asked, pad_token_id=1), what)
    with torch.no_grad():  # less than bfloat16 keeps, in one value, of the head
        asked.kit.base.lm_head.weight[3, 5] += 1e-6
    assert again(asked, what)
    asked.kit.base.model.layers[0].self_attn.q_proj.weight.data[0, 0] += 1e-6  # behind the version counter
    assert again(asked, what)
    asked.kit.config.rms_norm_eps = 1e-3
    assert again(asked, what)
    asked.kit.base.generation_config.eos_token_id = 7
    assert again(asked, what)
    asked.kit.base.generation_config.suppress_tokens = [3]
    assert again(asked, what)
    asked.tokenizer.bos_token = "the"  # what the first word of a text is predicted from
    assert again(asked, what)
    asked.tokenizer.model_max_length = 9
    assert again(asked, what)
    asked.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="the $A", special_tokens=[("the", asked.tokenizer.bos_token_id)]
    )
    assert again(asked, what)
    assert not again(asked, what)


def test_what_cannot_be_read_is_asked_anew(cache: Path) -> None:
    asked, what = asked_of(), CountedSet()
    base_answers(asked, what)
    (file,) = cache.iterdir()
    for broken in ("", "{broken", "[]", "null", '{"answers": 1}', '{"examples": 4, "answers": []}'):
        file.write_text(broken, encoding="utf-8")
        assert again(asked, what), broken
    assert json.loads(file.read_text(encoding="utf-8"))["examples"] == 3


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KITOUT_CACHE", str(tmp_path / "file"))
    asked, what = asked_of(), CountedSet()
    with pytest.warns(UserWarning, match="cannot be kept, and are asked again next time"):
        assert base_answers(asked, what) == [1, 0.1, None]


def test_nothing_is_kept_where_it_is_not_wanted_or_the_base_cannot_be_read(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, what = asked_of(), CountedSet()
    assert base_answers(asked, what, keep=False) == [1, 0.1, None]
    with torch.device("meta"):
        model = ZOO["llama"].build()
    assert digest_of_values(model) is None
    monkeypatch.setattr(base_digest, "_sums", lambda _: (_ for _ in ()).throw(NotImplementedError()))
    assert base_answers(replace(asked), what) == [2, 0.1, None]
    assert not cache.exists()


def test_several_at_once_leave_one_whole_file(cache: Path) -> None:
    asked, what = asked_of(), CountedSet()
    threads = [threading.Thread(target=base_answers, args=(replace(asked), CountedSet())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (file,) = cache.iterdir()
    assert json.loads(file.read_text(encoding="utf-8"))["answers"] == [1, 0.1, None]
    assert not again(asked, what)


def test_a_digest_sees_every_value_and_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_digest, "CHUNK", 7)
    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=11, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
        )
    )
    found = {digest_of_values(model)}
    assert {digest_of_values(model)} == found
    weight = model.encoder.layer[0].attention.self.query.weight.data
    weight[0, 0], weight[3, 3] = weight[3, 3].clone(), weight[0, 0].clone()
    found.add(digest_of_values(model))
    model.embeddings.position_ids[0, 0] = 5  # no value of the checkpoint
    found.add(digest_of_values(model.half()))
    assert len(found) == 3
