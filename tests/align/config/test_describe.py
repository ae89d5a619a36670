"""Help and examples say what the schema has, of a kind only what it has; the examples are runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kitout.align.config import describe
from kitout.align.config.foreign_keys import ELSEWHERE
from kitout.align.config.kinds import KINDS
from kitout.align.config.load import load_align
from kitout.align.config.unfit_settings import unfit_settings
from kitout.train.config import yaml_file


def names(kind: str) -> dict[str, str]:
    """Dotted name -> default, of what the help of a kind shows."""
    return {
        f"{section.name}.{setting.name}".lstrip("."): setting.default
        for section in describe.kind_sections(kind)
        for setting in section.settings
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_shows_what_it_has_and_nothing_else(kind: str) -> None:
    shown, entry = names(kind), KINDS[kind]
    assert not shown.keys() & unfit_settings(kind).keys()
    assert {"name", "from", "method", "model.name", "data.train", "train.lr", "output.folder"} <= shown.keys()
    loss = {name.removeprefix("loss.") for name in shown if name.startswith("loss.")}
    fields = {} if entry.loss is None else entry.loss.model_fields
    assert loss == {field.alias or name for name, field in fields.items()}
    assert ("rollout.samples" in shown) == ("reward" in shown) == ("reward.0.weight" in shown) == entry.takes_reward
    assert shown["name"] == kind
    assert shown.get("rollout.samples", "0") == str(entry.samples)


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_says_what_it_is(kind: str) -> None:
    for section in describe.kind_sections(kind):
        assert section.text
        for setting in section.settings:
            assert setting.kind
            assert setting.kind != "settings"
            assert setting.text or section.name == "", f"{section.name}.{setting.name}"
    text = next(s.text for d in describe.kind_sections(kind) if d.name == "train" for s in d.settings if s.name == "lr")
    assert f"{KINDS[kind].lr_factor:g} times" in text or KINDS[kind].lr_factor == 1


def test_all_stages_show_every_loss() -> None:
    sections = describe.align_sections()
    losses = [section.text for section in sections if section.name == "stages.0.loss"]
    assert [text.split(" ")[1].rstrip(".") for text in losses] == [k for k, kind in KINDS.items() if kind.loss]
    shown = {f"{section.name}.{setting.name}" for section in sections for setting in section.settings}
    assert {"stages.0.kind", "stages.0.rollout.top_k", "stages.0.reward.0.source", "stages.0.train.lr"} <= shown
    assert not {"stages.0.train.head", "stages.0.data.labels", "stages.0.data.augment"} & shown


@pytest.mark.parametrize("kind", KINDS)
def test_the_example_of_a_kind_is_a_stage(kind: str) -> None:
    text = describe.kind_yaml(kind)
    (stage,) = load_align(yaml_file.parse_yaml(text, "example")).stages
    assert stage.kind == kind
    assert max(map(len, text.splitlines())) <= 120
    written = [line.replace("#", "") for line in text.splitlines()]
    assert any(line.strip().startswith("max_new_tokens:") for line in written) == (kind != "reward")


def test_the_example_of_stages_is_a_run_and_so_it_is_with_its_comments() -> None:
    text = describe.stages_yaml()
    config = load_align(yaml_file.parse_yaml(text, "example"))
    assert [stage.kind for stage in config.stages] == ["sft", "reward", "ppo"]
    assert max(map(len, text.splitlines())) <= 120
    opened = text.replace("    #  ", "      ").replace("    #", "    ")
    assert load_align(yaml_file.parse_yaml(opened, "opened")) == config


def test_other_names_lead_to_settings_that_exist() -> None:
    shown = {name for kind in KINDS for name in names(kind)} | {"kind", "stages"}
    settings: list[Any] = [setting.split(" ")[0].split("=")[0] for setting in ELSEWHERE]
    assert [one for one in settings if one not in shown and one != "method.dropout"] == []


def test_the_page_has_every_setting_as_it_is() -> None:
    page = (Path(__file__).parents[3] / "docs" / "align.md").read_text(encoding="utf-8")
    for kind in KINDS:
        docs = {section.name: section.settings for section in describe.kind_sections(kind)}
        for number, setting in enumerate(docs.get("loss", ())):
            values = setting.kind.replace("|", "or")
            row = f"| `{setting.name}` | {values} | {setting.default} | {setting.text} |"
            assert (f"\n| {kind} {row}" if number == 0 else f"\n|  {row}") in page, f"{kind}: {row}"
    for setting in docs["rollout"]:
        default = "8" if setting.name == "samples" else setting.default
        assert f"| `{setting.name}` | {setting.kind} | {default} | {setting.text} |" in page


def test_the_stages_of_the_page_are_a_run() -> None:
    page = (Path(__file__).parents[3] / "docs" / "align.md").read_text(encoding="utf-8")
    text = page.split("```yaml\n")[1].split("```")[0]
    assert [stage.kind for stage in load_align(yaml_file.parse_yaml(text, "page")).stages] == ["sft", "reward", "ppo"]
