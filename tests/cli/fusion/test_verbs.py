"""`kitout combine`, `convert` and `extract` on tiny folders: what they write opens again and holds what was asked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

import kitout
from kitout import IA3, LoRA, PromptTuning
from kitout.cli import app
from kitout.cli.fusion import fused
from tiny_models import decoder

pytest.importorskip("accelerate")

ADAPTERS = {
    "a": LoRA(rank=2),
    "b": LoRA(rank=3, targets="all-linear"),
    "scales": IA3(),
    "prompt": PromptTuning(length=3),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fused")
    model = transformers.AutoModelForCausalLM.from_pretrained(decoder(root / "base"))
    kit = kitout.attach(model.eval())
    draw = torch.Generator().manual_seed(0)
    for name, method in ADAPTERS.items():
        for p in kit.add(name, method, seed=0).parameters():
            p.data += 0.1 * torch.randn(p.shape, generator=draw)
        kit.save(name, root / name)
    kit.merged_copy("a").save_pretrained(root / "tuned")
    transformers.AutoTokenizer.from_pretrained(root / "base").save_pretrained(root / "tuned")
    return root


def run(folders: Path, words: Sequence[object]) -> tuple[int, str]:
    base = ["--model", str(folders / "base"), "--task", "causal_lm", "--device", "cpu"]
    result = CliRunner().invoke(app, [*map(str, words), *base])
    return result.exit_code, result.output


def difference(output: str) -> float:
    found = re.search(r"largest logit difference .*: (\S+)", output)
    assert found, output
    return float(found[1])


def test_a_sum_is_the_mix(folders: Path, tmp_path: Path) -> None:
    words = ["combine", f"{folders / 'a'}=0.7", f"{folders / 'b'}=-0.3", "--out", tmp_path / "both"]
    code, output = run(folders, words)
    assert code == 0, output
    assert difference(output) <= 1e-4
    assert "residual 0" in output
    again = kitout.load(tmp_path / "both", base=folders / "base", task="causal_lm")
    assert again.names == ["both"]
    assert again.kit["both"].method.rank == {
        "attn.q": 5,
        "attn.k": 3,
        "attn.v": 5,
        "attn.o": 3,
        "mlp.gate": 3,
        "mlp.up": 3,
        "mlp.down": 3,
    }


def test_a_cut_says_what_it_loses(folders: Path, tmp_path: Path) -> None:
    form = ["--how", "ties", "--density", "0.3", "--to", "lora", "--rank", "2", "--out", tmp_path / "cut"]
    code, output = run(folders, ["combine", folders / "a", f"{folders / 'b'}=0.3", *form])
    assert code == 0, output
    assert re.search(r"residual 0\.\d+: what is lost", output)
    assert re.search(r"  attn\.q +0\.\d+", output)
    assert difference(output) > 1e-4


def test_an_adapter_in_another_form(folders: Path, tmp_path: Path) -> None:
    for source, form in (("b", ["LoRA", "--rank", "5"]), ("scales", ["dense"]), ("prompt", ["PrefixTuning"])):
        code, output = run(folders, ["convert", folders / source, "--to", *form, "--out", tmp_path / source])
        assert code == 0, output
        assert difference(output) <= 1e-4
    code, output = run(
        folders, ["convert", folders / "scales", "--to", "LoRA", "--rank", "2", "--out", tmp_path / "no"]
    )
    assert code == 1
    assert "would do" in output
    assert not (tmp_path / "no").exists()


def test_an_adapter_out_of_a_checkpoint(folders: Path, tmp_path: Path) -> None:
    form = ["--tuned", folders / "tuned", "--rank", "2", "--out", tmp_path / "found"]
    code, output = run(folders, ["extract", *form])
    assert code == 0, output
    assert difference(output) <= 1e-3


def test_what_should_be_exact_and_is_not_ends_with_1(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "TOLERANCE", -1.0)
    code, output = run(folders, ["convert", folders / "b", "--to", "dense", "--out", tmp_path / "dense"])
    assert code == 1
    assert "nothing should be lost" in output


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["combine", "a=x"], "write FOLDER=WEIGHT"),
        (["combine", "a", "--to", "LoRA"], "takes --rank 8 or --energy"),
        (["combine", "a", "--rank", "4"], "write --to LoRA"),
        (["combine", "a", "--to", "DoRA"], "write one of exact, dense, LoRA"),
        (["combine", "nowhere=1"], "there is no such folder"),
    ],
)
def test_refusals(folders: Path, tmp_path: Path, words: list[str], match: str) -> None:
    code, output = run(folders, [*words, "--out", tmp_path / "c"])
    assert code == 1
    assert match in output
