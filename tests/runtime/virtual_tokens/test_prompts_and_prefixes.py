"""What lies in front of text, whoever put it there: rows of one batch, limits of positions, kernels without masks.

Each row of a mixed batch equals the same row alone; positions count real tokens, and one too many is refused with how
many; a kernel that cannot see added keys is refused when it is called, and nothing else breaks.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from full_text import HOW, alone, real, text
from kitout import Kit, LoRA, Method, Mix, PrefixTuning, PromptTuning, Stack
from kitout.errors import RouteError
from laws.activate import assert_same, fresh_kit, pristine, put_on, run, set_attention
from zoo import EXTRA, FIRST_TOKEN, VOCAB, ZOO, padded

SPECIES = {**ZOO, **EXTRA}
LIMIT = 64  # max_position_embeddings in the zoo
IDS = (11, 29, 13, 47, 15, 21, 33, 8)
FRONTS = {
    "prefix": PrefixTuning(length=8, init=IDS),
    "before": PromptTuning(length=8, init=IDS),
    "after": PromptTuning(length=8, init=IDS, place="after"),
}


def kit_for(name: str, method: Method, attention: str = "") -> Kit:
    kit = fresh_kit(SPECIES[name])
    if attention:
        set_attention(kit.base, attention)
    kit.add("p", method)
    kit.use("p")
    return kit


def long_batch(lengths: list[int], columns: int) -> dict[str, Tensor]:
    ids = torch.randint(FIRST_TOKEN, VOCAB, (len(lengths), columns), generator=torch.Generator().manual_seed(3))
    return padded({"input_ids": ids}, lengths, "left")


# --- rows -------------------------------------------------------------------------------------------------------------


LENGTHS = [7, 4, 6, 5, 3, 7, 2, 4, 6, 1, 5]


def mixed(kit: Kit, place: str = "after") -> list[object]:
    """Everything that can lie in front of a row, and rows with nothing there."""
    put_on(kit, PrefixTuning(length=8), "long", seed=1)
    put_on(kit, PrefixTuning(length=3), "short", seed=2)
    put_on(kit, PromptTuning(length=4), "prompt", seed=3)
    put_on(kit, LoRA(rank=3, targets="all-linear"), "lora", seed=4)
    put_on(kit, PromptTuning(length=5, place=place), "other", seed=5)
    mix = Mix({"long": 0.5, "short": 2.0, "lora": 0.7})
    stacks = [Stack("lora", "long"), Stack("short", "lora", "prompt"), Stack("prompt", "short")]
    return ["long", "short", None, "prompt", "lora", *stacks, mix, "long", "other"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "qwen3", "opt", "gpt-neox", "falcon", "bert", "roberta", "t5", "bart"]
)
def test_each_row_of_a_batch_is_the_row_alone(name: str, attention: str) -> None:
    specimen, kit = SPECIES[name], fresh_kit(SPECIES[name])
    set_attention(kit.base, attention)
    routes = mixed(kit)
    for side in ("left", "right"):
        if side == "left" and specimen.kind == "encoder":
            continue  # its classifier reads the first column
        batch = padded(specimen.batch(len(routes), 0), LENGTHS, side, specimen.pad_id)
        with kit.use(routes):
            together = run(kit, batch)
        for row, route in enumerate(routes):
            mask = batch["attention_mask"][row].bool()
            one = {k: v[row : row + 1] for k, v in batch.items()}
            if side == "right" or specimen.left_pads or route not in (None, "lora"):  # else the base itself minds pads
                one |= {k: one[k][:, mask] for k in ("input_ids", "attention_mask")}
            with kit.use(route):
                expected = run(kit, one)[0]
            mine = together[row]
            if specimen.kind == "decoder":
                mine, expected = mine[mask], expected[-int(mask.sum()) :]
            assert_same(mine, expected, what=f"{route}, padded at the {side}")


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "t5", "bart"])
def test_each_row_generates_what_it_does_alone(name: str, cache: str | None) -> None:
    specimen, kit = SPECIES[name], fresh_kit(SPECIES[name])
    routes = mixed(kit, "before" if cache else "after")
    batch = padded(specimen.batch(len(routes), 0), LENGTHS, "left", specimen.pad_id)
    batch.pop("decoder_input_ids", None)
    for beams in (1, 3):
        how = HOW | {"cache_implementation": cache, "num_beams": beams}
        with kit.use(routes):
            together = kit.generate(**batch, **how)[:, -6:]
        for row, route in enumerate(routes):
            mask = batch["attention_mask"][row].bool()
            with kit.use(route):
                made = kit.generate(**{k: v[row : row + 1, mask] for k, v in batch.items()}, **how)[:, -6:]
            assert torch.equal(together[row : row + 1], made), f"{route}, {beams} beams"


# --- positions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_text_fills_the_positions_to_the_last(name: str, front: str) -> None:
    """Rows are counted by their real tokens: the longest has as many as there is room for, pads come on top."""
    kit, after = kit_for(name, FRONTS[front]), front == "after"
    for columns in (LIMIT - 8, LIMIT):
        batch = long_batch([LIMIT - 8, 3], columns)
        made = kit(**batch).logits
        for row, mask in enumerate(real(batch)):
            assert_same(made[row, mask], alone(pristine(name), batch["input_ids"][row, mask], IDS, after))
    bare = {"input_ids": long_batch([LIMIT - 8], LIMIT - 8)["input_ids"]}
    assert_same(kit(**bare).logits[0], alone(pristine(name), bare["input_ids"][0], IDS, after))


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_positions_too_many_are_counted(name: str, front: str) -> None:
    kit = kit_for(name, FRONTS[front])
    for over in (1, 5):
        batches = [
            long_batch([LIMIT - 8 + over, 3], LIMIT),
            {"input_ids": long_batch([LIMIT - 8 + over], LIMIT - 8 + over)["input_ids"]},
        ]
        for batch in batches:
            with pytest.raises(RouteError, match=rf"{over} positions too long.*shorten the text by {over}"):
                kit(**batch)
    batch = long_batch([LIMIT - 10, 3], LIMIT - 10)
    assert kit.generate(**batch, max_new_tokens=3, min_new_tokens=3).shape == (2, LIMIT - 7)  # the last is not read
    with pytest.raises(RouteError, match="1 positions too long"):
        kit.generate(**batch, max_new_tokens=4, min_new_tokens=4)
    with kit.use(None):
        run(kit, long_batch([LIMIT, 3], LIMIT))


def test_a_widened_text_is_counted_too() -> None:
    for method in (FRONTS["before"], FRONTS["after"], FRONTS["prefix"]):
        kit = kit_for("bert", method)
        run(kit, long_batch([LIMIT - 8, 3], LIMIT - 8))
        with pytest.raises(RouteError, match=r"2 positions too long.*shorten the text by 2"):
            kit(**long_batch([LIMIT - 6, 3], LIMIT - 6))
        run(kit, {"input_ids": long_batch([3], 3)["input_ids"]})


def t5_encoder(model: nn.Module, ids: Tensor, fronts: list[tuple[list[Tensor], float]]) -> Tensor:
    """T5's encoder on one row [1, T]. fronts: prefixes [m, 2, H, d_h] by block, each ending at the text, weighted."""
    table = model.block[0].layer[0].SelfAttention
    keys = torch.cat([*(torch.arange(-len(f[0]), 0) for f, _ in fronts), torch.arange(ids.shape[1])])
    distance = keys[None] - torch.arange(ids.shape[1])[:, None]
    bucket = table._relative_position_bucket(distance, bidirectional=True, num_buckets=8, max_distance=20)
    bias = table.relative_attention_bias(bucket).permute(2, 0, 1)[None]
    log = torch.cat([*(torch.full((len(f[0]),), math.log(w)) for f, w in fronts), torch.zeros(ids.shape[1])])
    x = model.embed_tokens(ids)
    for i, block in enumerate(model.block):
        own, h = block.layer[0].SelfAttention, block.layer[0].layer_norm(x)
        q, k, v = (f(h).unflatten(-1, (4, 16)).transpose(1, 2) for f in (own.q, own.k, own.v))
        k = torch.cat([*(f[i][:, 0].transpose(0, 1)[None] for f, _ in fronts), k], 2)
        v = torch.cat([*(f[i][:, 1].transpose(0, 1)[None] for f, _ in fronts), v], 2)
        y = torch.softmax(q @ k.transpose(2, 3) + bias + log, -1) @ v
        x = block.layer[1](x + own.o(y.transpose(1, 2).flatten(2)))
    return model.final_layer_norm(x)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["ones", "left", "right"])
def test_relative_positions_count_back_from_the_text(padding: str) -> None:
    """A prefix ends where the text begins, also under a longer one of a Mix, and before the other in a Stack."""
    kit, batch = fresh_kit(ZOO["t5"]), text(ZOO["t5"], padding)
    for name, length in {"p": 3, "r": 5}.items():
        put_on(kit, PrefixTuning(length=length, places="encoder"), name)
    held = {n: [kit[n].delta(s).prefix for s in kit[n].sites] for n in kit.names}
    both = [torch.cat(pair) for pair in zip(held["p"], held["r"], strict=True)]
    routes = {
        "p": [(held["p"], 1.0)],
        Mix({"p": 0.5, "r": 2.0}): [(held["p"], 0.5), (held["r"], 2.0)],
        Stack("p", "r"): [(both, 1.0)],
    }
    with kit.use([*routes]):
        together = kit(**batch).encoder_last_hidden_state
    for row, (route, fronts) in enumerate(routes.items()):
        mask = real(batch)[row]
        expected = t5_encoder(pristine("t5").encoder, batch["input_ids"][row][mask][None], fronts)[0]
        assert_same(together[row, mask], expected, what=f"{route} among others")
        with kit.use(route):
            assert_same(kit(**batch).encoder_last_hidden_state[row, mask], expected, what=f"{route}")


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["flex_attention", "flash_attention_2"])
@pytest.mark.parametrize("case", ["llama prefix", "llama before", "llama after", "gpt2 prefix", "bert prefix"])
def test_a_kernel_without_masks_is_named(case: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS, "flex_attention", lambda *_, **__: None)  # compiles for seconds
    name, front = case.split()
    kit, batch = kit_for(name, FRONTS[front]), text(ZOO[name], "ones")
    before = run(kit, batch)
    with kit.use(None):
        base = run(kit, batch)
    config = kit.base.config
    config._attn_implementation = kernel
    with pytest.raises(RouteError, match=rf"attention kernel '{kernel}' takes no mask.*set_attn_implementation"):
        kit(**batch)
    config._attn_implementation = "sdpa"
    assert torch.equal(run(kit, batch), before)
    with kit.use(None):
        assert torch.equal(run(kit, batch), base)
