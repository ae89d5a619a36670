"""The suites: how many of each set, by the seed, plain and by the chat template; the real sets are read as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from kitout.errors import AssetError, ConfigError
from kitout.evaluate.sets import suites
from kitout.evaluate.sets.choice_set import ChoiceSet
from kitout.evaluate.sets.suites import CHOICES, fetch_suite, suite_sets
from kitout.evaluate.sets.text_set import TextSet
from tiny_models import tokenizer
from tiny_suites import use_tiny_suites


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Built-in sets with 210 questions, 310 texts and 110 chats, of which the first two begin alike."""
    use_tiny_suites(tmp_path / "sets", monkeypatch, 210, 310, 110)
    return tmp_path


def test_quick_is_a_sample_by_the_seed(small: Path) -> None:
    sets = suite_sets("quick", tokenizer(), 0, lambda _: None)
    sizes = {one.name: len(one) for one in sets}
    assert sizes == {**dict.fromkeys(CHOICES, 200), "wiki": 300, "chat prompts (chat template)": 100}
    again = suite_sets("quick", tokenizer(), 0, lambda _: None)
    other = suite_sets("quick", tokenizer(), 1, lambda _: None)
    assert [one.digest for one in sets] == [one.digest for one in again]
    assert all(one.digest != two.digest for one, two in zip(sets, other, strict=True))
    assert all(one.divergence for one in sets if isinstance(one, TextSet))


def test_full_is_all_of_them_plain_and_by_the_template(small: Path) -> None:
    sets = suite_sets("full", tokenizer(), 0, lambda _: None)
    assert [one.name for one in sets if isinstance(one, ChoiceSet)] == [
        name for each in CHOICES for name in (each, f"{each} (chat template)")
    ]
    sizes = {one.name: len(one) for one in sets}
    assert (sizes["obqa"], sizes["wiki"], sizes["chat prompts (chat template)"]) == (210, 310, 110)
    (prompts,) = (one for one in sets if one.name.startswith("chat prompts"))
    assert isinstance(prompts, TextSet)
    assert all(text.endswith("<|im_start|>assistant\n") for text in prompts.texts)


def test_without_a_template_prompts_are_plain(small: Path) -> None:
    names = [one.name for one in suite_sets("full", tokenizer(template=False), 0, lambda _: None)]
    assert names == [*CHOICES, "wiki", "chat prompts"]


def test_none_reads_nothing_and_another_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, log: object) -> Path:
        raise AssetError(name)

    monkeypatch.setattr(suites, "fetch_asset", refuse)
    assert suite_sets("none", None, 0, print) == []
    fetch_suite("none", print)
    for call in (lambda: suite_sets("quik", None, 0, print), lambda: fetch_suite("quik", print)):
        with pytest.raises(ConfigError, match="did you mean 'quick'"):
            call()


@pytest.mark.assets
def test_the_real_sets_are_read_whole() -> None:
    sets = suite_sets("full", tokenizer(), 0, lambda _: None)
    sizes = {one.name: len(one) for one in sets}
    assert all(sizes[name] >= 100 for name in (*CHOICES, "wiki"))
    quick = {one.name: len(one) for one in suite_sets("quick", tokenizer(), 0, lambda _: None)}
    assert all(quick[name] == min(200, sizes[name]) for name in CHOICES)
    assert quick["wiki"] == min(300, sizes["wiki"])
