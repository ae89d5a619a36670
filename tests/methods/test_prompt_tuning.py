"""Prompt tuning: real tokens in front are the whole text, and what no tokens can say is the model fed by hand.

Decoders are compared with the bare model on the whole text; encoders and encoder-decoders, whose sequence is widened,
with the bare model that is given inputs_embeds, a wider mask, token types and positions written out here. Then how a
prompt starts, and Stacks of it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kitout
from full_text import FRONT, HOW, PADDINGS, assert_decodes, assert_generates, assert_whole, real, text
from kitout import LoRA, Mix, PromptTuning, Stack
from kitout.errors import NotMergeable, RouteError, TargetError
from laws.activate import assert_same, fresh_kit, pristine, put_on, set_attention
from zoo import EXTRA, ZOO

TOKENS = PromptTuning(length=len(FRONT), init=FRONT)
AFTER = PromptTuning(length=len(FRONT), init=FRONT, place="after")
PLACED = pytest.mark.parametrize("method", [TOKENS, AFTER], ids=["before", "after"])
DECODERS = pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "opt"])


def active_kit(name: str, method: PromptTuning = TOKENS, attention: str = "") -> kitout.Kit:
    kit = fresh_kit({**ZOO, **EXTRA}[name])
    if attention:
        set_attention(kit.base, attention)
    kit.add("p", method, seed=0)
    kit.use("p")
    return kit


def rows(kit: kitout.Kit) -> Tensor:
    (value,) = kit["p"].parameters()
    return value.detach()


# --- real tokens before blocks that do not look ahead -----------------------------------------------------------------


@PLACED
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", PADDINGS)
@DECODERS
def test_a_prompt_of_real_tokens_is_the_whole_text(name, padding, attention, method) -> None:
    kit, specimen = active_kit(name, method, attention), {**ZOO, **EXTRA}[name]
    assert_whole(kit, pristine(name), text(specimen, padding), after=method is AFTER)


@PLACED
@DECODERS
def test_a_prompt_of_real_tokens_generates_the_whole_text(name, method) -> None:
    kit, bare, specimen = active_kit(name, method), pristine(name), {**ZOO, **EXTRA}[name]
    for padding in ("none", "ones", "left"):
        batch = text(specimen, padding)
        for how in ({}, {"num_beams": 3, "num_return_sequences": 2}):
            assert_generates(kit, bare, batch, after=method is AFTER, **how)
        if padding != "left" or method is TOKENS:
            assert_generates(kit, bare, batch, after=method is AFTER, cache_implementation="static")


@PLACED
@DECODERS
def test_a_prompt_of_real_tokens_in_a_loop_of_ones_own(name, method) -> None:
    for padding in ("none", "ones", "left"):
        batch = text({**ZOO, **EXTRA}[name], padding)
        assert_decodes(active_kit(name, method), pristine(name), batch, after=method is AFTER, first=4)


@PLACED
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_without_head_takes_one_too(name, method) -> None:
    bare, kit = pristine(name).base_model, kitout.attach(ZOO[name].build().base_model)
    kit.add("p", method)
    kit.use("p")
    for padding in PADDINGS:
        assert_whole(kit, bare, text(ZOO[name], padding), after=method is AFTER)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_assisted_generation_is_greedy(name: str) -> None:
    batch = {k: v[:1].repeat(1, 3) for k, v in text(ZOO[name], "ones").items()}
    for method in (TOKENS, AFTER):
        kit, how = active_kit(name, method), {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(kit.generate(**batch, **how, prompt_lookup_num_tokens=3), kit.generate(**batch, **how))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_loss_is_that_of_the_text_alone(name: str) -> None:
    """The whole text with -100 on the prompt, as long as the text's first token is not asked of the prompt's last."""
    kit, bare, batch = active_kit(name), pristine(name), text(ZOO[name], "right")
    labels = batch["input_ids"].masked_fill(~real(batch), -100)
    front = torch.tensor(FRONT).expand(3, -1)
    long = {"input_ids": torch.cat((front, batch["input_ids"]), 1)}
    long["attention_mask"] = torch.cat((torch.ones_like(front), batch["attention_mask"]), 1)
    first = labels.clone()
    first[:, 0] = -100  # nothing of the caller's text comes before its first token
    expected = bare(**long, labels=torch.cat((torch.full_like(front, -100), first), 1)).loss
    assert_same(kit(**batch, labels=labels).loss, expected)


# --- stacks -----------------------------------------------------------------------------------------------------------


@PLACED
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_stack_on_a_lora_is_the_whole_text_under_the_lora(name, method) -> None:
    kit = active_kit(name, method)
    put_on(kit, LoRA(rank=3, targets="all-linear"), "l")
    bare = kit.merged_copy("l")
    for route in (Stack("l", "p"), Stack("p", "l")):
        kit.use(route)
        for padding in PADDINGS:
            assert_whole(kit, bare, text(ZOO[name], padding), after=method is AFTER)
        assert_generates(kit, bare, text(ZOO[name], "left"), after=method is AFTER)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_stack_of_prompts_is_one_text_after_the_other(name: str) -> None:
    kit, bare, more = active_kit(name), pristine(name), (50, 61, 72)
    kit.add("q", PromptTuning(length=3, init=more))
    kit.add("prefix", kitout.PrefixTuning(length=3, init=more))
    for route, front in {
        Stack("p", "q"): FRONT + more,
        Stack("q", "p"): more + FRONT,
        Stack("prefix", "p"): more + FRONT,  # the prompt reads the prefix
    }.items():
        kit.use(route)
        for padding in PADDINGS:
            assert_whole(kit, bare, text(ZOO[name], padding), front)
        assert_generates(kit, bare, text(ZOO[name], "left"), front)


def test_what_is_in_the_sequence_has_no_weight() -> None:
    for name, method in (("llama", TOKENS), ("bert", TOKENS), ("vit", kitout.VPT(length=2, deep=True))):
        kit = fresh_kit(ZOO[name])
        kit.add("front", method)
        put_on(kit, LoRA(rank=2), "l")
        with pytest.raises(RouteError, match=r"'front' has tokens in the sequence"):
            kit.strength("front", 0.5)
        for mix in (Mix({"front": 1.0}), Mix({"l": 0.5, "front": 0.5}), Mix({Stack("l", "front"): 1.0})):
            with pytest.raises(RouteError, match=r"'front' in a Mix"):
                kit.use(mix)
        with pytest.raises(NotMergeable) as error:
            kit.merge("front")
        assert kit["front"].sites[0].path in str(error.value)
        assert kit["front"].strength == 1.0
        assert kit.active is None


# --- widened sequences ------------------------------------------------------------------------------------------------


def by_hand(table: nn.Module, prompt: Tensor, batch: dict[str, Tensor], after: bool) -> list[dict[str, Tensor]]:
    """Each row alone, unpadded: its embedded text with the prompt in it, and its token types with 0 for the prompt."""
    made = []
    for row, mask in enumerate(real(batch)):
        x = table(batch["input_ids"][row][mask])
        inputs = {"inputs_embeds": torch.cat((x[:after], prompt, x[after:]))[None]}
        inputs["attention_mask"] = torch.ones(inputs["inputs_embeds"].shape[:2], dtype=torch.long)
        if "token_type_ids" in batch:
            types = batch["token_type_ids"][row][mask]
            inputs["token_type_ids"] = torch.cat((types[:after], torch.zeros_like(prompt[:, 0]).long(), types[after:]))[
                None
            ]
        made.append(inputs)
    return made


def without(y: Tensor, length: int, after: bool) -> Tensor:
    return torch.cat((y[:after], y[length + after :]))


@torch.no_grad()
@PLACED
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_an_encoder_is_fed_as_by_hand(padding, attention, method) -> None:
    specimen, bare, after = ZOO["bert"], pristine("bert").bert, method.place == "after"
    kit = kitout.attach(specimen.build().bert)
    set_attention(kit.base, attention)
    put_on(kit, method, "p")
    kit.use("p")
    batch = text(specimen, padding)
    batch["token_type_ids"] = torch.tensor([0, 0, 1, 1, 0, 1, 1]).expand(3, -1)
    whole = kit(**batch, output_hidden_states=True)
    assert [h.shape for h in whole.hidden_states] == [(3, 7, 48)] * 4
    for row, inputs in enumerate(by_hand(bare.embeddings.word_embeddings, rows(kit), batch, after)):
        expected, mask = bare(**inputs).last_hidden_state[0], real(batch)[row]
        assert_same(whole.last_hidden_state[row, mask], without(expected, len(FRONT), after), what=f"row {row}")


@torch.no_grad()
def test_the_first_token_is_still_what_a_head_reads() -> None:
    bare, kit = pristine("bert"), active_kit("bert")
    for padding in ("none", "right"):
        batch = text(ZOO["bert"], padding)
        made = kit(**batch).logits
        for row, inputs in enumerate(by_hand(bare.bert.embeddings.word_embeddings, rows(kit), batch, False)):
            cls = bare.bert(**inputs).last_hidden_state[:, len(FRONT)]
            assert_same(made[row], bare.classifier(bare.bert.pooler(cls[:, None]))[0], what=f"row {row}")


@torch.no_grad()
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_is_fed_as_by_hand(name: str, padding: str) -> None:
    """The decoder reads the prompts' states as well; the caller gets his own columns back."""
    specimen, bare, kit = ZOO[name], pristine(name), fresh_kit(ZOO[name])
    put_on(kit, TOKENS, "p")
    kit.use("p")
    batch = text(specimen, padding)
    whole = kit(**batch, output_hidden_states=True)
    assert whole.encoder_last_hidden_state.shape == (3, 7, 48)
    assert {h.shape for h in whole.encoder_hidden_states} == {(3, 7, 48)}
    generated = kit.generate(**{k: v for k, v in batch.items() if k != "decoder_input_ids"}, **HOW)
    for row, inputs in enumerate(by_hand(bare.get_encoder().get_input_embeddings(), rows(kit), batch, False)):
        expected = bare(**inputs, decoder_input_ids=batch["decoder_input_ids"][row : row + 1])
        assert_same(whole.logits[row], expected.logits[0], what=f"row {row}")
        mine = whole.encoder_last_hidden_state[row, real(batch)[row]]
        assert_same(mine, expected.encoder_last_hidden_state[0, len(FRONT) :], what=f"row {row}")
        assert torch.equal(generated[row], bare.generate(**inputs, **HOW)[0])


# --- how it starts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_a_prompt_is_one_matrix(name: str) -> None:
    kit = active_kit(name, PromptTuning(length=6))
    assert [tuple(p.shape) for p in kit.parameters()] == [(6, 48)]
    assert kit.num_parameters("p").total == 6 * 48


def test_it_starts_from_the_vocabulary_without_repeating_itself() -> None:
    kit = active_kit("llama", PromptTuning(length=60))
    table = kit.base.get_input_embeddings().weight
    where = (rows(kit)[:, None] == table).all(-1)
    assert where.sum(1).tolist() == [1] * 60
    assert len(set(where.int().argmax(1).tolist())) == 60


def test_it_starts_from_noise_as_wide_as_the_table() -> None:
    kit = active_kit("gpt2", PromptTuning(length=400, init="normal"))
    assert rows(kit).std() == pytest.approx(kit.base.get_input_embeddings().weight.std().item(), rel=0.03)
    assert rows(kit).mean() == pytest.approx(0.0, abs=0.01)


def test_it_starts_from_text_and_from_labels() -> None:
    table = pristine("llama").get_input_embeddings().weight
    assert torch.equal(rows(active_kit("llama", PromptTuning(length=5, init=(7, 8)))), table[[7, 8, 7, 8, 7]])
    assert torch.equal(rows(active_kit("llama", PromptTuning(length=2, init=(7, 8, 9)))), table[[7, 8]])
    labels = rows(active_kit("llama", PromptTuning(length=4, init=((7, 8, 9), (5,)))))
    torch.testing.assert_close(labels[0], (table[7] + table[8] + table[9]) / 3)
    assert torch.equal(labels[1], table[5])
    assert (labels[2:, None] == table).all(-1).any(1).all()


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_foreign_cache_has_no_first_token() -> None:
    batch = text(ZOO["llama"], "none")
    cache = pristine("llama")(**batch, use_cache=True).past_key_values
    kit = active_kit("llama", AFTER)
    with pytest.raises(RouteError, match="needs that token"):
        kit(input_ids=batch["input_ids"][:, -1:], past_key_values=cache)
    with pytest.raises(RouteError, match="give input_ids"):
        kit(inputs_embeds=kit.base.get_input_embeddings()(batch["input_ids"]))
    assert_whole(kit, pristine("llama"), batch, after=True)


@pytest.mark.parametrize("name", ["vit", "timm-vit", "swin"])
def test_images_have_no_token_table(name: str) -> None:
    with pytest.raises(TargetError, match="needs a stack fed from a token table"):
        fresh_kit(ZOO[name]).add("p", PromptTuning(length=3))
