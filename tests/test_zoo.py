"""The zoo itself: every specimen can serve as a test of the laws.

Deterministic, rows independent of each other, nothing at its initial value, quick to build, and the facts in its fields
(layers, tied, positions, which side may be padded) are true. It knows nothing of kitout.
"""

from __future__ import annotations

import socket

import pytest
import torch

from zoo import EXTRA, LENGTH, VOCAB, ZOO, Specimen, out, padded, rows_of, tokenizer_of

ALL = ZOO | EXTRA
TOLERANCE = 1e-5


@pytest.fixture(params=ALL.values(), ids=ALL.keys())
def any_specimen(request: pytest.FixtureRequest) -> Specimen:
    return request.param


@torch.no_grad()
def test_is_deterministic_and_leaves_the_random_state_alone(any_specimen: Specimen) -> None:
    before = torch.get_rng_state()
    first, second = any_specimen.build(), any_specimen.build()
    assert torch.equal(torch.get_rng_state(), before)
    batch = any_specimen.batch(2, 0)
    assert torch.equal(out(first(**batch)), out(second(**batch)))
    assert all(torch.equal(batch[k], v) for k, v in any_specimen.batch(2, 0).items())
    assert not torch.allclose(out(first(**batch)), out(first(**any_specimen.batch(2, 1))), atol=1e-3)


@torch.no_grad()
def test_rows_are_independent_and_differ(any_specimen: Specimen) -> None:
    model, batch = any_specimen.build(), any_specimen.batch(3, 0)
    together = out(model(**batch))
    alone = torch.cat([out(model(**rows_of(batch, i))) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=TOLERANCE, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_nothing_is_at_its_initial_value(any_specimen: Specimen) -> None:
    for name, value in any_specimen.build().named_parameters():
        assert value.dtype is torch.float32, name
        if value.numel() > 1:
            assert value.std() > 0.02, f"{name} is constant"
        assert not (value == 0).any(), f"{name} has zeros"
        assert not (value == 1).any(), f"{name} has ones"


def test_is_small_and_in_eval_mode(any_specimen: Specimen) -> None:
    model = any_specimen.build()
    assert sum(p.numel() for p in model.parameters()) < 200_000
    assert not any(module.training for module in model.modules())


@torch.no_grad()
def test_training_mode_computes_the_same(any_specimen: Specimen) -> None:
    model, batch = any_specimen.build(), any_specimen.batch(2, 0)
    assert torch.equal(out(model(**batch)), out(model.train()(**batch)))


def test_states_true_facts(any_specimen: Specimen) -> None:
    model = any_specimen.build()
    names = [type(m).__name__ for m in model.modules()]  # in every family here a block is a ...Layer or a ...Block
    blocks = [n for n in names if n.endswith(("Layer", "Block")) and not n.endswith(("MoeBlock", "LaurelBlock"))]
    assert len(blocks) == any_specimen.layers
    if any_specimen.kind != "vision":
        tied = model.get_output_embeddings() is not None and (
            model.get_output_embeddings().weight is model.get_input_embeddings().weight
        )
        assert tied == any_specimen.tied
        assert model.get_input_embeddings().weight.shape[-1] in (
            any_specimen.width,
            24,
        )  # 24: ALBERT's factorized table
        assert model.config.pad_token_id == any_specimen.pad_id
    assert any_specimen.generates == bool(getattr(model, "can_generate", bool)())


@torch.no_grad()
def test_only_left_padding_can_change_logits_and_only_as_stated(any_specimen: Specimen) -> None:
    if not any_specimen.is_text:
        pytest.skip("images have no padding")
    model, batch, lengths = any_specimen.build(), any_specimen.batch(3, 0), [LENGTH, 4, 3]

    def max_difference(side: str) -> float:
        inputs = padded(batch, lengths, side, any_specimen.pad_id)
        logits, largest = out(model(**inputs)), 0.0
        for row, n in enumerate(lengths):
            alone = rows_of(batch, row)
            alone |= {k: alone[k][:, :n] for k in ("input_ids", "attention_mask")}
            real = logits[row][inputs["attention_mask"][row].bool()] if any_specimen.kind == "decoder" else logits[row]
            largest = max(largest, (real - out(model(**alone))[0]).abs().max().item())
        return largest

    assert max_difference("right") < TOLERANCE
    assert (max_difference("left") < TOLERANCE) == any_specimen.left_pads


@torch.no_grad()
def test_eager_attention_is_the_sdpa_one(specimen: Specimen) -> None:
    model, batch = specimen.build(), specimen.batch(2, 0)
    if not hasattr(model, "set_attn_implementation"):
        pytest.skip("not a transformers model")
    assert model.config._attn_implementation == "sdpa"
    fused = out(model(**batch))
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(out(model(**batch)), fused, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("any_specimen", [s for s in ALL.values() if s.generates], ids=lambda s: s.name)
def test_generates_alone_as_in_a_batch(any_specimen: Specimen) -> None:
    model = any_specimen.build()
    batch = {k: v for k, v in any_specimen.batch(2, 0).items() if k != "decoder_input_ids"}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    together = model.generate(**batch, **options)
    for row in range(2):
        assert torch.equal(model.generate(**rows_of(batch, row), **options)[0], together[row])


def test_its_tokenizer_reads_and_writes_text(any_specimen: Specimen) -> None:
    if not any_specimen.is_text:
        pytest.skip("images have no words")
    tokenizer, text = tokenizer_of(any_specimen), "So, 2 + 2 = {4}?\nYes!"
    assert len(tokenizer) == VOCAB
    assert tokenizer.pad_token_id == any_specimen.pad_id
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    rows = tokenizer(["ab", "abcd"], padding=True, return_tensors="pt")
    assert rows["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<user>hi</s><assistant>"


def test_the_network_is_closed() -> None:
    with socket.socket() as s, pytest.raises(AssertionError, match="offline"):
        s.connect(("192.0.2.1", 80))
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
