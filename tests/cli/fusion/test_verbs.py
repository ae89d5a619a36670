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
from kitout import IA3, Average, Composition, Fusion, Gated, LoRA, Mix, Mixture, Only, PromptTuning, Stack
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
COMPOSITIONS = {
    "loras": Mixture(of=("a", "b"), init=(0.7, 0.4)),
    "only": Composition(route=Only("b", layers="last:1")),
    "scaled": Composition(route=Stack("b", Mix({"scales": 0.5}))),
    "nested": Composition(route=Mix({"loras": 0.5, Stack("scaled", "only"): 0.7})),
    "fusion": Fusion(of=("a", "b")),
    "gated": Gated(of=("a", "scales")),
    "average": Composition(route=Average({"a": 0.5, "b": 0.5})),
    "tokens": Composition(route=Stack("a", "prompt")),
}
WITHOUT_WEIGHTS = {
    "fusion": "a Fusion, which weighs its parts anew.*Mixture of 'a', 'b'",
    "gated": "a Gated, which weighs its parts anew",
    "average": "averages whole outputs.*write a Mix of",
    "tokens": "virtual tokens|the part 'prompt', a PromptTuning",
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
    for name, method in COMPOSITIONS.items():
        kit.add(name, method)
    kit.strength("loras", 0.8)
    for name in COMPOSITIONS:
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


@pytest.mark.parametrize("name", [name for name in COMPOSITIONS if name not in WITHOUT_WEIGHTS])
def test_compositions(folders: Path, tmp_path: Path, name: str) -> None:
    """Also beside one of their own parts, whichever comes first."""
    whole, part = f"{folders / name}=0.7", f"{folders / 'b'}=-0.3"
    for i, sources in enumerate(([whole], [whole, part], [part, whole])):
        code, output = run(folders, ["combine", *sources, "--out", tmp_path / str(i)])
        assert code == 0, output
        assert difference(output) <= 1e-5
        assert ("LoRA(" in output) == (name in ("loras", "only"))
    code, output = run(folders, ["convert", folders / name, "--to", "dense", "--out", tmp_path / "dense"])
    assert code == 0, output
    assert difference(output) <= 1e-5
    code, output = run(folders, ["merge", folders / name, folders / "b", "--out", tmp_path / "merged"])
    assert code == 0, output
    assert f"merging {name} then b\n" in output
    assert float(output.partition("largest difference ")[2].split()[0]) <= 1e-5


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_compositions_that_no_weights_hold(folders: Path, tmp_path: Path, name: str) -> None:
    for words in (["combine"], ["convert", "--to", "dense"], ["merge"]):
        code, output = run(folders, [*words, folders / name, "--out", tmp_path / "no"])
        assert code == 1
        assert re.search(WITHOUT_WEIGHTS[name], output)
        assert not (tmp_path / "no").exists()


def test_another_adapter_under_the_name_of_a_part(folders: Path, tmp_path: Path) -> None:
    """Both are there, the second under a name of its own."""
    other = kitout.load(folders / "a", base=folders / "base", task="causal_lm").kit
    other.strength("a", 0.5)
    other.save("a", tmp_path / "mine" / "a")
    words = ["combine", folders / "loras", tmp_path / "mine" / "a", "--out", tmp_path / "c"]
    code, output = run(folders, words)
    assert code == 0, output
    assert difference(output) <= 1e-5
    fused = kitout.load(tmp_path / "c", base=folders / "base", task="causal_lm").kit["c"].metadata["fused"]
    assert list(fused["weights"]) == ["loras", "mine-a"]


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
