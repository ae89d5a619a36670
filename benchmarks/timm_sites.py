"""Surveys thirty timm vision models on the meta device: blocks labelled, or refused with a reason.

`python benchmarks/timm_sites.py` prints one line a model. The names are fixed and cover plain, windowed, pyramid,
convolutional and hybrid designs; a pure convnet is right to be refused. It measures labels only, no forward runs.
timm needs torchvision, which has no build beside a CPU torch; the tests' stand-in is lent to it.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from pathlib import Path
from types import ModuleType

from torch import nn

from kitout.base.find.find import find_sites
from kitout.base.survey import Survey
from kitout.cli.inspect import on_meta
from kitout.errors import NoBlocksFound

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from torchvision_stub import import_timm

NAMES = [
    "vit_base_patch16_224",
    "deit3_small_patch16_224",
    "beit_base_patch16_224",
    "eva02_base_patch14_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "cait_xxs24_224",
    "xcit_nano_12_p8_224",
    "pvt_v2_b0",
    "mvitv2_tiny",
    "twins_pcpvt_small",
    "crossvit_9_240",
    "coat_tiny",
    "volo_d1_224",
    "vit_small_patch14_dinov2",
    "vit_base_patch16_siglip_224",
    "convnext_tiny",
    "maxvit_nano_rw_256",
    "hiera_tiny_224",
    "davit_tiny",
    "gcvit_xxtiny",
    "tnt_s_patch16_224",
    "deit_base_distilled_patch16_224",
    "vit_base_patch32_clip_224",
    "vit_giant_patch14_clip_224",
    "vitamin_small_224",
    "efficientformer_l1",
    "levit_128",
    "nest_tiny",
    "pit_ti_224",
]
LEAST = 28


def main() -> None:
    warnings.simplefilter("ignore")
    timm = import_timm()
    verdicts = Counter()
    for name in NAMES:
        model = build(timm, name)
        try:
            verdict, text = judge(find_sites(model))
        except NoBlocksFound as refusal:
            verdict, text = "refused", str(refusal).splitlines()[0]
        verdicts[verdict] += 1
        print(f"{name:34} {verdict:9} {text}", flush=True)
    print(f"{dict(verdicts)} of {len(NAMES)}")
    if verdicts["resolved"] + verdicts["refused"] < LEAST:
        raise SystemExit(f"fewer than {LEAST} resolved or refused with a reason")


def build(timm: ModuleType, name: str) -> nn.Module:
    """On the meta device, or with real weights where the model needs real numbers to be built."""
    try:
        with on_meta():
            return timm.create_model(name)
    except (NotImplementedError, RuntimeError):
        return timm.create_model(name)


def judge(found: Survey) -> tuple[str, str]:
    """resolved: every block that attends is; part: some are not, the first of which is shown."""
    attending = [block for block in found.blocks if block.has_attention]
    bad = [block for block in attending if not block.resolved]
    text = f"{len(attending) - len(bad)}/{len(attending)} blocks in {len(found.towers)} stacks"
    if others := len(found.blocks) - len(attending):
        text += f", {others} blocks without attention"
    if bad:
        has = sorted(s.role for s in found.sites if s.tower == bad[0].tower and s.layer == bad[0].index)
        text += f"; {bad[0].path} has {', '.join(dict.fromkeys(has))}; loose {bad[0].unlabeled[:4]}"
    return ("part" if bad else "resolved"), text


if __name__ == "__main__":
    main()
