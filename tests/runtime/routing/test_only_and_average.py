"""Only: an entry in some layers alone. Average: every row under each entry, outputs averaged, also in generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import kitout
from kitout import IA3, Average, Composition, LoRA, Mix, Mixture, Only, PrefixTuning, PromptTuning, Stack
from kitout.errors import KitoutError, NotMergeable, RouteError
from kitout.route import route_from_json, route_to_json
from laws.activate import assert_same, kit_with, run
from zoo import ZOO


def test_only_is_the_adapter_of_these_layers() -> None:
    kit, batch = kit_with(
        "llama", a=LoRA(rank=2), b=IA3(), p=PrefixTuning(length=3), late=PrefixTuning(length=3, layers="last:1")
    )
    for site in kit["late"].sites:
        kit["late"].delta(site).load_state_dict(kit["p"].delta(site).state_dict())
    with torch.no_grad(), kit.use(Only("p", layers="last:1")):
        value = run(kit, batch)
    with kit.use("late"):
        assert_same(value, run(kit, batch))
    with kit.use([Only("p", "last:1"), "p"]):
        assert_same(run(kit, batch)[:1], value[:1])
    with kit.use("a"):
        whole = run(kit, batch)
    with kit.use(Stack(Only("a", "0"), Only("a", "1"))):
        assert_same(run(kit, batch), whole)
    kit.add("m", Mixture(of=("a", "b")))
    kit.add("c", Composition(route=Only(Stack("m", "a"), layers="0")))
    with kit.use("c"):
        value = run(kit, batch)
    with kit.use(Stack(Only(Mix({"a": 0.5, "b": 0.5}), "0"), Only("a", "0"))):
        assert_same(run(kit, batch), value)
    kit.merge("c")
    assert_same(run(kit, batch), value)
    kit.unmerge()


def test_only_refuses_what_is_in_no_layer() -> None:
    kit, _ = kit_with("llama", a=LoRA(rank=2, layers="0"), t=PromptTuning(length=2))
    for entry, message in (
        (Only("t", "last:1"), "tokens in the sequence"),
        (Only("a", "1"), "leaves nothing"),
        (Only("a", "7"), "no layer 7"),
    ):
        with pytest.raises(RouteError, match=message):
            kit.use(entry)
    with pytest.raises(RouteError, match="write Only"):
        Only("a", "")


def averaged(kit: object, batch: dict[str, torch.Tensor], of: str) -> torch.Tensor:
    logits = []
    for entry in ("a", Stack("b", "p")):
        with kit.use(entry):
            logits.append(run(kit, batch))
    if of == "logits":
        return 0.7 * logits[0] + 0.3 * logits[1]
    return (0.7 * logits[0].softmax(-1) + 0.3 * logits[1].softmax(-1)).log()


@pytest.mark.parametrize("species", ["llama", "bert", "t5"])
def test_an_average_is_that_of_the_outputs(species: str) -> None:
    kit, batch = kit_with(species, a=LoRA(rank=2), b=IA3(), p=PromptTuning(length=2))
    for of in ("probabilities", "logits"):
        route = Average({"a": 0.7, Stack("b", "p"): 0.3}, of=of)
        kit.add(of, Composition(route=route))
        want = averaged(kit, batch, of)
        for what in (route, of):
            with kit.use(what):
                assert_same(run(kit, batch), want, tolerance=2e-5)
    with kit.use(Average({"a": 1.0, "b": 0.0})):
        value = run(kit, batch)
    with kit.use("a"):
        assert torch.equal(run(kit, batch), value)


def test_an_average_generates_token_by_token() -> None:
    kit, batch = kit_with("llama", a=LoRA(rank=2), b=IA3(), p=PromptTuning(length=2))
    ids = batch["input_ids"][:, :4]
    tokens = ids
    for _ in range(5):
        step = averaged(kit, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, "probabilities")[:, -1]
        tokens = torch.cat((tokens, step.argmax(-1, keepdim=True)), 1)
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    kit.base.generation_config.eos_token_id = None
    with kit.use(Average({"a": 0.7, Stack("b", "p"): 0.3})):
        assert torch.equal(kit.generate(ids, **how), tokens)
        likeliest = kit.generate(ids, do_sample=True, top_k=1, num_return_sequences=2, **how)
        assert torch.equal(likeliest, tokens.repeat_interleave(2, 0))
        with pytest.raises(RouteError, match="num_beams=2"):
            kit.generate(ids, num_beams=2, **how)
        with pytest.raises(RouteError, match="no loss"):
            kit(**batch, labels=batch["input_ids"])


def test_an_average_has_masks_by_kind_of_attention_in_a_static_cache() -> None:
    kit, batch = kit_with("qwen3", a=LoRA(rank=2), b=IA3())
    how = {"max_new_tokens": 4, "min_new_tokens": 4, **batch}
    with kit.use(Average({"a": 0.7, "b": 0.3})):
        assert torch.equal(kit.generate(**how, cache_implementation="static"), kit.generate(**how))


def test_an_average_merges_with_nothing() -> None:
    kit, batch = kit_with("llama", a=LoRA(rank=2), b=IA3())
    kit.add("m", Composition(route=Average({"a": 0.7, "b": 0.3})))
    kit.add("deep", Composition(route="m"))
    for merge in (kit.merge, kit.merged_copy):
        with pytest.raises(NotMergeable, match="'deep' averages whole outputs"):
            merge("deep")
    for route in (Stack("deep", "a"), ["deep", None]):
        with pytest.raises(RouteError, match="'deep' averages whole outputs"), kit.use(route):
            run(kit, batch)


def test_an_average_generates_with_an_encoder() -> None:
    kit, batch = kit_with("t5", a=LoRA(rank=2, targets="attn.*"), b=IA3(), p=PrefixTuning(length=2))
    ids, mask = batch["input_ids"], torch.ones_like(batch["input_ids"])
    mask[0, 4:] = 0
    kit.base.generation_config.eos_token_id = None
    start = kit.base.config.decoder_start_token_id
    tokens = torch.full((2, 1), 0 if start is None else start)
    for _ in range(4):
        call = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": tokens}
        step = averaged(kit, call, "probabilities")[:, -1]
        tokens = torch.cat((tokens, step.argmax(-1, keepdim=True)), 1)
    how = {"attention_mask": mask, "max_new_tokens": 4, "min_new_tokens": 4}
    with torch.no_grad(), kit.use(Average({"a": 0.7, Stack("b", "p"): 0.3})):
        assert torch.equal(kit.generate(ids, **how), tokens)
        assert torch.equal(kit.generate(input_ids=ids, **how), tokens)
        likeliest = kit.generate(ids, do_sample=True, top_k=1, num_return_sequences=2, **how)
        assert torch.equal(likeliest, tokens.repeat_interleave(2, 0))


def test_what_is_no_average() -> None:
    for weights, of in (({"a": 0.5}, "logits"), ({"a": 1.5, "b": -0.5}, "probabilities"), ({"a": 1.0}, "votes")):
        with pytest.raises(RouteError):
            Average(weights, of)
    half = Average({"a": 0.5, "b": 0.5})
    kit, _ = kit_with("llama", a=LoRA(rank=2), b=IA3())
    kit.add("half", Composition(route=half))
    for route in (lambda: Stack(half), lambda: [half, None], lambda: Stack("half"), lambda: ["half", "a"]):
        with pytest.raises(RouteError, match="route by itself"):
            kit.use(route())
    for route in (half, Only(Mix({"a": 0.5}), "0"), Stack("a", Mix({Stack("b"): 2.0}))):
        assert route_from_json(route_to_json(route)) == route


def test_a_name_for_a_named_average_has_no_strength_either() -> None:
    kit, batch = kit_with("llama", a=LoRA(rank=2), b=LoRA(rank=2))
    kit.add("average", Composition(route=Average({"a": 0.5, "b": 0.5})))
    kit.add("outer", Composition(route="average"))
    with kit.use("outer"):
        run(kit, batch)
    kit.strength("outer", 0.0)
    with pytest.raises(RouteError, match="no strength"):
        kit.use("outer")


def test_a_head_that_an_only_leaves_out_does_not_set_the_width_of_a_loss() -> None:
    model: Any = ZOO["bert"].build()
    config = model.config
    config.num_labels = 3
    torch.manual_seed(0)
    kit = kitout.attach(transformers.BertForSequenceClassification(config)).eval()
    kit.add("a", LoRA(rank=2), heads={"classifier": torch.nn.Linear(config.hidden_size, 7)}, seed=0)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with kit.use(Only("a", layers="last:1")):
        out = kit(input_ids=ids, labels=torch.tensor([0, 1]))
    assert out.logits.shape == (2, 3)
    assert out.loss.isfinite()
    with kit.use("a"):
        assert kit(input_ids=ids, labels=torch.tensor([0, 6])).logits.shape == (2, 7)


def test_an_entry_of_json_that_is_none_or_stands_twice() -> None:
    for value in ({"mix": [[{"bad": 1}, 0.5]]}, {"average": [[["a"], 0.5]]}, {"mix": [["a", 0.5], ["a", 0.1]]}):
        with pytest.raises(KitoutError):
            Composition(route=value)
