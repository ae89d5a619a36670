"""The name of a base as it goes into files: never a path of the machine that wrote them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kitout.files.portable_name import name_without_folder, portable_name


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("minilm", "minilm"),
        ("gpt2", "gpt2"),
        ("org/name-1.5B", "org/name-1.5B"),
        ("/home/me/models/tiny", "tiny"),
        ("/home/me/models/tiny/", "tiny"),
        ("./tiny", "tiny"),
        ("../other/tiny", "tiny"),
        ("~/models/tiny", "tiny"),
        ("a/b/tiny", "tiny"),  # no hub name has two slashes
        ("C:\\Users\\me\\tiny", "tiny"),
        ("D:/models/tiny", "tiny"),
        ("models\\tiny", "tiny"),
        ("/home/me/.cache/kitout/assets/smollm2-135m", "smollm2-135m"),
        ("/home/me/.cache/huggingface/hub/models--org--name/snapshots/0123abcd", "org/name"),
        ("/home/me/.cache/huggingface/hub/models--gpt2/snapshots/0123abcd/", "gpt2"),
        ("", ""),
        ("x" * 5000, "x" * 5000),  # no system can have such a folder
    ],
)
def test_of_a_name_all_of_a_path_its_last_component(given: str, expected: str) -> None:
    assert portable_name(given) == expected


def test_a_folder_is_known_by_its_name_also_where_it_looks_like_a_name_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert portable_name("models/tiny") == "tiny"
    assert portable_name("models/other") == "models/other"
    monkeypatch.chdir(tmp_path / "models" / "tiny")
    assert portable_name(".") == "tiny"
    assert portable_name("..") == "models"


def test_the_name_of_a_portable_name_is_itself(tmp_path: Path) -> None:
    once = portable_name(str(tmp_path / "tiny"))
    assert portable_name(once) == once == "tiny"


def test_a_folder_is_no_name_of_the_hub_whatever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "minilm").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("org/name", "gpt2"):
        assert name_without_folder(name) == name
    assert name_without_folder("/root/.cache/huggingface/hub/models--org--name/snapshots/0123abcd") == "org/name"
    for path in ("models/minilm", str(tmp_path / "models" / "minilm"), "../elsewhere/minilm", "models"):
        assert name_without_folder(path) is None
