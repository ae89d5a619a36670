"""Adapter folders and PEFT folders that an earlier version wrote still load and compute the same numbers.

`written_before/` was written over the tiny llama of the zoo by the code of commit a2922f5: `kitout-<Method>` by
`kit.save`, `peft-<Method>` by `kitout.save_peft`. `logits.json` holds the first 12 logits of the last token of each
row, as that code computed them. The folders are never written again: a change that they do not survive breaks files
of users.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kitout
from zoo import ZOO, out

FOLDERS = Path(__file__).parent / "written_before"
LOGITS: dict[str, list[list[float]]] = json.loads((FOLDERS / "logits.json").read_text())
STRENGTHS = {"LoRA": 0.5}


@torch.no_grad()
def logits(kit: kitout.Kit) -> Tensor:
    kit.use("a")
    return out(kit(**ZOO["llama"].batch(2, 0)))[:, -1, :12]


def check(kit: kitout.Kit, method: str) -> None:
    assert type(kit["a"].method).__name__ == method
    torch.testing.assert_close(logits(kit), torch.tensor(LOGITS[method]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [path.name.removeprefix("kitout-") for path in sorted(FOLDERS.glob("kitout-*"))])
def test_an_adapter_folder_loads(method: str) -> None:
    kit = kitout.attach(ZOO["llama"].build())
    adapter = kit.load(FOLDERS / f"kitout-{method}")
    assert adapter.seed == list(LOGITS).index(method)
    assert adapter.metadata == {"written": "before"}
    assert adapter.strength == STRENGTHS.get(method, 1.0)
    check(kit, method)


@pytest.mark.parametrize("method", [path.name.removeprefix("peft-") for path in sorted(FOLDERS.glob("peft-*"))])
def test_a_peft_folder_loads(method: str) -> None:
    kit = kitout.attach(ZOO["llama"].build())
    kitout.load_peft(kit, FOLDERS / f"peft-{method}", "a")
    check(kit, method)


def test_every_folder_has_its_logits() -> None:
    names = {path.name.partition("-")[2] for path in FOLDERS.iterdir() if path.is_dir()}
    assert names == set(LOGITS)


@pytest.mark.parametrize("method", list(LOGITS))
def test_an_adapter_is_written_as_before(method: str, tmp_path: Path) -> None:
    """The same bytes of tensors, and the same adapter.json but for version, fingerprint of the base and digest."""
    kit = kitout.attach(ZOO["llama"].build())
    before, after = FOLDERS / f"kitout-{method}", tmp_path / "after"
    kit.load(before)
    kit.save("a", after)
    assert (after / "adapter.safetensors").read_bytes() == (before / "adapter.safetensors").read_bytes()
    records = [json.loads((folder / "adapter.json").read_text()) for folder in (before, after)]
    assert [*records[0], "digest"] == list(records[1])
    for key in records[0].keys() - {"kitout", "base", "settings"}:
        assert records[0][key] == records[1][key]
    settings = [record["settings"] for record in records]
    fields = type(kit["a"].method).model_fields
    added = {key: fields[key].default for key in settings[1].keys() - settings[0].keys()}
    assert {**settings[0], **added} == settings[1]
