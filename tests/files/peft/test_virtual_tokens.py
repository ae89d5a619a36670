"""PEFT's prompts and prefixes, both ways: its folders compute the same here, ours the same there, and they train on.

Logits, gradients, generated tokens and the tensors' bits. The cases and the paddings at which PEFT itself is right are
in `peft_prompts.py`, what is refused and what PEFT cannot do in `test_peft_prompts_bad.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import kitout
import zoo
from kitout import PrefixTuning, PromptTuning
from peft_prompts import (
    CASES,
    LENGTHS,
    OF_TASKS,
    SPECIES,
    Case,
    in_kitout,
    in_peft,
    logits,
    of_text,
    randomize,
    same,
    saved_by_peft,
)
from zoo import ZOO, out, padded

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning"
)  # peft's own


@pytest.fixture(params=CASES, ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


# --- the laws --------------------------------------------------------------------------------------------------------


def test_a_folder_of_peft_computes_the_same_here(case: Case, tmp_path: Path) -> None:
    model = saved_by_peft(case, tmp_path)
    kit = in_kitout(case, tmp_path)
    with kit.use(None):
        off = logits(kit, case)
    assert (logits(kit, case) - off).abs().max() > 1e-2  # or the comparison would say nothing
    same(case, kit, model)
    cls = PromptTuning if case.kind == "prompt" else PrefixTuning
    assert kit["a"].method == cls(length=4, **case.facts)
    assert all(p.requires_grad for p in kit["a"].parameters())


def test_our_folder_computes_the_same_in_peft_after_training_on(case: Case, tmp_path: Path) -> None:
    """Which PEFT cannot do itself: it refuses to load such an adapter for training."""
    saved_by_peft(case, tmp_path / "theirs")
    kit = in_kitout(case, tmp_path / "theirs")
    batch = case.batch("right" if "right" in case.sides else "none")
    key = "decoder_input_ids" if case.task == "SEQ_2_SEQ_LM" else "input_ids"
    labels = torch.tensor([0, 1, 2]) if case.task == "SEQ_CLS" else batch[key]
    optimizer = torch.optim.SGD(kit["a"].parameters(), lr=0.02)
    before = {n: p.detach().clone() for n, p in kit["a"].named_parameters()}
    losses = []
    for _ in range(3):
        loss = kit(**batch, labels=labels).loss
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(set(losses)) == 3
    assert losses[-1] < losses[0]
    changed = [n for n, p in kit["a"].named_parameters() if not torch.equal(p, before[n])]
    assert changed == list(before)
    kitout.save_peft(kit, "a", tmp_path / "ours")
    same(case, kit, in_peft(case, tmp_path / "ours"))
    back = in_kitout(case, tmp_path / "ours")
    for name, value in back["a"].state_dict().items():
        assert torch.equal(value, kit["a"].state_dict()[name]), name


@pytest.mark.parametrize("name", OF_TASKS)
def test_every_task_both_ways(name: str, tmp_path: Path) -> None:
    """Hidden states, token labels and spans: those of the text, which PEFT returns after those of its prompts."""
    case = OF_TASKS[name]
    model = saved_by_peft(case, tmp_path / "theirs")
    kit = in_kitout(case, tmp_path / "theirs")
    with kit.use(None):
        off = logits(kit, case)
    assert (logits(kit, case) - off).abs().max() > 1e-2
    same(case, kit, model)
    cls = PromptTuning if case.kind == "prompt" else PrefixTuning
    assert kit["a"].method == cls(length=4, **case.facts)
    randomize(kit["a"], seed=5)
    kitout.save_peft(kit, "a", tmp_path / "ours")
    same(case, kit, in_peft(case, tmp_path / "ours"))


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.task == "CAUSAL_LM" and n != "llama-zeros"])
def test_the_tensors_are_the_same_bit_by_bit(name: str, tmp_path: Path) -> None:
    saved_by_peft(CASES[name], tmp_path / "theirs")
    kit = in_kitout(CASES[name], tmp_path / "theirs")
    kitout.save_peft(kit, "a", tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "ours"))
    assert list(theirs) == list(ours) == ["prompt_embeddings"]
    theirs, ours = theirs["prompt_embeddings"], ours["prompt_embeddings"]
    if any(s.shares_kv_of for s in kit.survey.kv_sites):  # the last two layers' own values, which nobody reads
        theirs, ours = (t.chunk(2, 1)[0] for t in (theirs, ours))
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.task != "SEQ_CLS"])
def test_generated_tokens_are_the_same(name: str, beams: int, tmp_path: Path) -> None:
    """Padded at the left where PEFT is right then, which it is for prefixes."""
    case = CASES[name]
    model = saved_by_peft(case, tmp_path / "theirs")
    kit = in_kitout(case, tmp_path / "theirs")
    batch = case.batch("left" if "left" in case.sides else "none")
    batch.pop("decoder_input_ids", None)
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
    how |= {"return_dict_in_generate": True, "output_logits": True}
    kitout.save_peft(kit, "a", tmp_path / "ours")
    here = kit.generate(**batch, **how)
    for there in (m.generate(**batch, **how) for m in (model, in_peft(case, tmp_path / "ours"))):
        assert torch.equal(there.sequences[:, -6:], here.sequences[:, -6:])
        torch.testing.assert_close(torch.stack(here.logits), torch.stack(there.logits), rtol=1e-5, atol=1e-5)
    with kit.use(None):
        off = kit.generate(**batch, **how)
    assert (off.logits[0] - here.logits[0]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "name", ["llama-prompt", "gpt2-prompt", "qwen3-prefix", "bert-prompt", "bert-prefix", "roberta-prompt", "t5-prompt"]
)
def test_gradients_are_the_same(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = saved_by_peft(case, tmp_path)
    kit = in_kitout(case, tmp_path)
    batch = case.batch("right")
    for m in (model, kit):  # in fp64, though some norms compute in fp32, prompts alone or with the text
        got = out(m.double()(**batch))
        of_text(got, batch, case).square().mean().backward()
    values = [p.grad for p in kit["a"].deltas.parameters()]
    ours = torch.stack(values, 1).flatten(1) if case.kind == "prefix" else values[0]
    theirs = model.prompt_encoder["default"].embedding.weight.grad[: len(ours)]
    assert theirs.abs().max() > 1e-4
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
    for path, head in kit["a"].heads.items():
        there = model.base_model.get_submodule(path).modules_to_save["default"]
        for own, value in head.module.named_parameters():
            torch.testing.assert_close(value.grad, there.get_parameter(own).grad, rtol=1e-5, atol=1e-8)


def test_token_types_are_those_of_peft(tmp_path: Path) -> None:
    """Prompts are of type 0, whatever the text is."""
    case = CASES["bert-prompt"]
    model = saved_by_peft(case, tmp_path)
    kit = in_kitout(case, tmp_path)
    batch = case.batch("right")
    batch["token_type_ids"] = batch["attention_mask"].clone()
    with torch.no_grad():
        torch.testing.assert_close(out(kit(**batch)), out(model(**batch)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("species", "task", "method"),
    [
        ("llama", "CAUSAL_LM", PrefixTuning(length=3, encoder=10)),
        ("llama", "CAUSAL_LM", PrefixTuning(length=3, encoder=10, shared=False, dropout=0.1)),
        ("qwen3", "CAUSAL_LM", PrefixTuning(length=3, init=(7, 8, 9, 10))),
        ("gpt2", "CAUSAL_LM", PromptTuning(length=5, init=(7, 8))),
        ("bert", "SEQ_CLS", PrefixTuning(length=3, encoder=10)),
        ("bert", "SEQ_CLS", PromptTuning(length=3, pooled="prompt")),
        ("t5", "SEQ_2_SEQ_LM", PromptTuning(length=3)),
        ("t5", "SEQ_2_SEQ_LM", PrefixTuning(length=3, places="decoder", encoder=10)),
        ("bart", "SEQ_2_SEQ_LM", PrefixTuning(length=3, places="decoder")),
    ],
)
def test_what_is_trained_here_computes_the_same_in_peft(
    species: str, task: str, method: kitout.Method, tmp_path: Path
) -> None:
    kind = "prompt" if isinstance(method, PromptTuning) else "prefix"
    case = Case(species, kind, task, sides=("none", "right"))  # type: ignore[arg-type]
    kit = kitout.attach(case.base())
    kit.add("a", method, seed=0)
    randomize(kit["a"])
    kit.eval()
    kit.use("a")
    kitout.save_peft(kit, "a", tmp_path)
    same(case, kit, in_peft(case, tmp_path))
    same(case, kit, in_kitout(case, tmp_path))


def test_a_head_is_saved_too_and_the_base_keeps_its_own(tmp_path: Path) -> None:
    case = CASES["bert-prefix"]
    kit = kitout.attach(case.base())
    kit.add("a", PrefixTuning(length=3), heads={"classifier": nn.Linear(48, zoo.LABELS)})
    kit.use("a")
    kitout.save_peft(kit, "a", tmp_path / "with")
    same(case, kit, in_peft(case, tmp_path / "with"))
    kit.add("bare", PrefixTuning(length=3))
    kit.use("bare")
    kitout.save_peft(kit, "bare", tmp_path / "without")  # PEFT wants one in the file: the base's own
    same(case, kit, in_peft(case, tmp_path / "without"))
    held = load_file(tmp_path / "without" / "adapter_model.safetensors")
    assert torch.equal(held["base_model.classifier.weight"], case.base().classifier.weight)


def test_half_precision_is_read_as_fp32(tmp_path: Path) -> None:
    saved_by_peft(CASES["llama-prompt"], tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({"prompt_embeddings": load_file(file)["prompt_embeddings"].bfloat16()}, file)
    kit = in_kitout(CASES["llama-prompt"], tmp_path)
    assert [p.dtype for p in kit["a"].parameters()] == [torch.float32]


# --- the heads of encoders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("species", ["bert", "roberta", "distilbert"])
def test_pooled_says_what_an_encoders_head_reads(species: str) -> None:
    """Our default is the text's first token; PEFT's prompts stand before it. Rows of both go together."""
    kit = kitout.attach(SPECIES[species].build())
    kit.add("text", PromptTuning(length=3), seed=0)
    kit.add("prompt", PromptTuning(length=3, pooled="prompt"), seed=0)
    batch = padded(SPECIES[species].batch(3, 1), LENGTHS, "right", SPECIES[species].pad_id)
    alone = {}
    for name in ("text", "prompt", None):
        with torch.no_grad(), kit.use(name):
            alone[name] = out(kit(**batch))
    assert (alone["text"] - alone["prompt"]).abs().max() > 1e-2
    order = ["prompt", "text", None]
    with torch.no_grad(), kit.use(order):
        mixed = out(kit(**batch))
    torch.testing.assert_close(mixed, torch.stack([alone[n][i] for i, n in enumerate(order)]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("species", ["llama", "t5"])
def test_pooled_is_refused_where_no_head_reads_it(species: str) -> None:
    kit = kitout.attach(ZOO[species].build())
    with pytest.raises(kitout.errors.TargetError, match="an encoder that stands alone"):
        kit.add("a", PromptTuning(pooled="prompt"))
    with pytest.raises(kitout.errors.ConfigError, match="needs place='before'"):
        PromptTuning(pooled="prompt", place="after")
