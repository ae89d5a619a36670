"""kitout doctor: what is there, and one finding with its fix for each thing that is wrong."""

from __future__ import annotations

import builtins
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from kitout.assets import store
from kitout.doctor import Diagnosis, diagnose, machine, packages

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KITOUT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def found(result: Diagnosis, text: str) -> str:
    (line,) = [str(finding) for finding in result.findings if text in finding.what]
    return line


def test_everything_that_works_is_shown() -> None:
    result = diagnose()
    assert result.ok
    text = str(result)
    for word in ("torch", "transformers", "float32", "bfloat16", "GFLOP/s", "threads on", "KITOUT_CACHE", "train"):
        assert word in text
    assert max(map(len, text.split("\n\n")[0].split("\n"))) < 160
    values = json.loads(json.dumps(result.to_dict()))
    assert values["ok"] is True
    assert values["dtypes"]["auto"] in ("float32", "bfloat16")
    assert {part["name"] for part in values["parts"]} == {*packages.PARTS, *packages.PEERS}


def test_the_parts_are_those_of_the_project_file() -> None:
    declared = packages._declared()
    assert set(packages.PARTS) < set(declared)
    assert {packages._name_of(r) for r in packages._requirements("train")} >= {"accelerate", "pillow", "matplotlib"}
    assert "torch" in {packages._name_of(r) for r in packages._requirements()}


def test_a_part_that_is_missing_has_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    version_of = packages._version_of
    monkeypatch.setattr(packages, "_version_of", lambda name: "" if name in ("datasets", "peft") else version_of(name))
    result = Diagnosis()
    packages.check_parts(result)
    parts = {part.name: part for part in result.parts}
    assert parts["hub"].missing == ("datasets",)
    assert parts["hub"].install.endswith("[hub]'")
    assert parts["peft"].install.endswith("pip install peft")
    assert parts["data"].missing == ()
    assert parts["hub"].install in str(result)
    assert not result.findings, "an optional part that is not there is not wrong"


@pytest.mark.parametrize("version", ["", "1.0"])
def test_a_needed_package_that_is_missing_or_old_is_bad(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    version_of = packages._version_of
    monkeypatch.setattr(packages, "_version_of", lambda name: version if name == "transformers" else version_of(name))
    result = Diagnosis()
    packages.check_versions(result)
    assert not result.ok
    assert "install transformers" in found(result, "transformers>=5 is needed").replace("'", "")


@pytest.mark.parametrize(("module", "is_needed"), [("transformers", True), ("timm", False)])
def test_a_package_that_does_not_import(monkeypatch: pytest.MonkeyPatch, module: str, is_needed: bool) -> None:
    real = importlib.import_module

    def import_module(name: str, *args: Any) -> Any:
        if name == module:
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *args)

    monkeypatch.setattr(packages.importlib, "import_module", import_module)
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: object() if name == module else None)
    result = Diagnosis()
    packages.check_imports(result)
    assert "operator torchvision::nms does not exist" in found(result, f"{module} does not import")
    assert result.ok is not is_needed


def test_a_torch_that_is_broken_does_not_end_the_other_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def broken(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch" or name.startswith("kitout.train"):
            raise OSError("libcudart.so.12: cannot open shared object file")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    monkeypatch.setattr(packages, "check_imports", lambda result: None)
    result = diagnose()
    assert "libcudart" in found(result, "device could not be checked")
    assert result.cache["folder"]
    assert result.parts
    assert str(result)


def test_more_threads_than_processors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    monkeypatch.setattr(machine, "CGROUP_CPU", tmp_path / "cpu.max")
    monkeypatch.setattr("torch.get_num_threads", lambda: 64)
    result = Diagnosis()
    machine.check_system(result)
    assert found(result, "64 threads").endswith("export OMP_NUM_THREADS=1")
    assert result.ok


def test_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kitout.base.memory.available", lambda device: 2**20)
    result = Diagnosis()
    machine.check_system(result)
    assert found(result, "1.0 MiB of memory")


def test_a_gpu_that_this_torch_cannot_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "NVIDIA_DRIVER", tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", None)
    result = Diagnosis()
    machine.check_device(result)
    assert "pytorch.org" in found(result, "torch uses no GPU: it is built without CUDA")


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("KITOUT_CACHE", str(tmp_path / "file" / "cache"))
    result = Diagnosis()
    machine.check_cache(result)
    assert f"{tmp_path / 'file'} is a file" in found(result, "cannot be written")
    assert "KITOUT_CACHE" in found(result, "cannot be written")
    assert not result.ok


def test_assets_with_their_size_and_one_that_is_damaged(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tweets", "chat"):
        (cache / "assets" / name).mkdir(parents=True)
        (cache / "assets" / name / "data").write_bytes(bytes(1000))
    monkeypatch.setattr(store, "is_installed", lambda name: name == "tweets")
    result = Diagnosis()
    machine.check_cache(result)
    assert result.cache["assets"] == {"tweets": 1000}
    assert result.cache["bytes"] == 2000
    assert found(result, "built-in chat").endswith("kitout assets get chat")
    assert result.ok


def test_the_checks_need_no_package_to_be_imported() -> None:
    """So that the one that is missing can be named."""
    import subprocess

    code = "import sys, kitout.doctor; print([m for m in ('torch', 'pydantic', 'filelock') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
