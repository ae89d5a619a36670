"""PEFT files with values for modules that PEFT wraps and that never run: the same function, and they are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kitout
from kitout.errors import FileError
from zoo import EXTRA, out

peft = pytest.importorskip("peft")
PEFTS_OWN = ("ignore::UserWarning:peft", "ignore::RuntimeWarning", "ignore::FutureWarning")


def write(species: str, targets: str | list[str], folder: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A file with random values everywhere, and what PEFT computes with it."""
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(EXTRA[species].build(), config).eval()
    model.save_pretrained(folder)
    batch = EXTRA[species].batch(2, 0)
    with torch.no_grad():
        return out(model(**batch)), batch


@pytest.mark.filterwarnings(*PEFTS_OWN)
def test_a_file_for_modules_that_never_run_loads_and_says_so(tmp_path: Path) -> None:
    expected, batch = write("jamba", ["q_proj", "v_proj", "in_proj", "x_proj", "dt_proj", "up_proj"], tmp_path)
    kit = kitout.attach(EXTRA["jamba"].build())
    with pytest.warns(UserWarning, match=r"dt_proj.*reads its weight and never runs it"):
        adapter = kitout.load_peft(kit, tmp_path, "a")
    assert {path.rpartition(".")[2] for path in adapter.left_out} == {"dt_proj"}
    assert "left out of 'a': model.layers.*.mamba.dt_proj" in str(kit)
    with torch.no_grad(), kit.use("a"):
        assert (out(kit(**batch)) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.filterwarnings(*PEFTS_OWN)
def test_a_file_for_such_modules_alone_is_refused(tmp_path: Path) -> None:
    write("jamba", ["dt_proj"], tmp_path)
    kit = kitout.attach(EXTRA["jamba"].build())
    with pytest.raises(FileError, match=r"nothing in this file has an effect.*dt_proj"):
        kitout.load_peft(kit, tmp_path, "a")
    assert kit.names == []
