"""Answers and likelihoods are those of each prompt alone, whatever else is in the batch; no state is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import kitout
from kitout import IA3, Average, Composition, Kit, LoRA, Mix, PrefixTuning, PromptTuning
from kitout.errors import ConfigError
from kitout.evaluate.ask.decoding import stop_token_ids
from kitout.evaluate.ask.generate import generate, generate_under
from kitout.evaluate.ask.label_likelihood import label_likelihoods
from zoo import EXTRA, ZOO, tokenizer_of

PROMPTS = [[7, 8, 9], [5], [0, 0, 17, 0, 22, 33, 4], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49], [6, 6]]


def with_active_adapter(name: str, method: Any = None) -> tuple[Kit, PreTrainedTokenizerFast]:
    """A model of the zoo with an active adapter that changes what it generates."""
    specimen = ZOO.get(name) or EXTRA[name]
    kit = kitout.attach(specimen.build())
    adapter = kit.add("a", LoRA(targets="all-linear") if method is None else method, seed=1)
    with torch.no_grad():
        for value in adapter.parameters():
            value.add_(torch.randn_like(value), alpha=0.3)
    kit.use("a")
    return kit, tokenizer_of(specimen)


def generate_alone(kit: Kit, tokenizer: Any, prompt: list[int], max_new_tokens: int) -> str:
    """Token by token, without a batch, a cache or `generate`."""
    stop_ids, generated = stop_token_ids(kit, tokenizer), []
    for _ in range(max_new_tokens):
        if kit.config.is_encoder_decoder:
            decoder_ids = torch.tensor([[kit.config.decoder_start_token_id, *generated]])
            logits = kit(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder_ids).logits
        else:
            logits = kit(input_ids=torch.tensor([prompt + generated])).logits
        token = int(logits[0, -1].argmax())
        if token in stop_ids:
            break
        generated.append(token)
    return tokenizer.decode(generated, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "t5", "bart", "opt"])
@torch.no_grad()
def test_an_answer_is_that_of_the_prompt_alone(name: str) -> None:
    kit, tokenizer = with_active_adapter(name)
    kit.eval()
    expected = [generate_alone(kit, tokenizer, p, 8) for p in PROMPTS]
    assert generate(kit, tokenizer, PROMPTS, 8, batch_size=3) == expected
    with kit.use(None):
        base = generate(kit, tokenizer, PROMPTS, 8)
    assert base != expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize(
    "method", [PromptTuning(length=3), PrefixTuning(length=4), IA3()], ids=lambda m: type(m).__name__
)
@torch.no_grad()
def test_every_kind_of_adapter_is_active(method: Any) -> None:
    kit, tokenizer = with_active_adapter("llama", method)
    answers = generate(kit, tokenizer, PROMPTS, 6, batch_size=2)
    assert answers == [generate_alone(kit.eval(), tokenizer, p, 6) for p in PROMPTS]


@torch.no_grad()
def test_answers_end_at_any_stop_token_and_padding_is_no_answer() -> None:
    kit, tokenizer = with_active_adapter("llama")
    tokenizer.pad_token = None  # so an end token is the padding, and id 0 is an ordinary token
    long = generate(kit, tokenizer, PROMPTS, 12, batch_size=5)
    last = max(range(5), key=lambda i: len(long[i]))
    ids = tokenizer(long[last], add_special_tokens=False).input_ids
    cut = generate(kit, tokenizer, PROMPTS, 12, batch_size=5, stop_ids=[ids[4]])
    assert cut[last] == tokenizer.decode(ids[: ids.index(ids[4])]).strip()
    assert cut == [generate(kit, tokenizer, [p], 12, stop_ids=[ids[4]])[0] for p in PROMPTS]
    kit.base.generation_config.eos_token_id = [2, ids[4]]  # as a chat model's own list
    assert stop_token_ids(kit, tokenizer) == {2, ids[4]}
    assert generate(kit, tokenizer, PROMPTS, 12) == cut


@torch.no_grad()
def test_id_0_as_a_stop_token_is_not_padding_of_the_prompt() -> None:
    kit, tokenizer = with_active_adapter("llama")
    tokenizer.pad_token = tokenizer.eos_token = None
    kit.base.generation_config.eos_token_id = 0
    answers = generate(kit, tokenizer, PROMPTS, 8, batch_size=5)
    assert answers == [generate_alone(kit.eval(), tokenizer, p, 8) for p in PROMPTS]


@torch.no_grad()
def test_the_models_generation_config_is_replaced_and_restored(caplog: pytest.LogCaptureFixture) -> None:
    kit, tokenizer = with_active_adapter("llama")
    greedy = generate(kit, tokenizer, PROMPTS, 8)
    own = kit.base.generation_config
    own.update(do_sample=True, temperature=0.6, top_p=0.9, min_p=0.05, num_beams=2, repetition_penalty=1.5)
    own.update(max_length=9, min_length=4, no_repeat_ngram_size=2)
    settings = own.to_dict()
    assert generate(kit, tokenizer, PROMPTS, 8) == greedy
    assert kit.base.generation_config is own
    assert own.to_dict() == settings
    assert not caplog.records


@torch.no_grad()
def test_generation_keeps_modes_random_state_and_tokenizer() -> None:
    kit, tokenizer = with_active_adapter("llama", LoRA(dropout=0.5))
    kit.train()
    kit.base.model.layers[0].eval()
    modes = {n: m.training for n, m in [*kit.base.named_modules(), *kit.named_modules(prefix="kit")]}
    tokenizer.padding_side = "right"
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = generate(kit, tokenizer, PROMPTS, 6)
    label_likelihoods(kit, PROMPTS, [[7], [8]], end_id=2)
    assert torch.equal(torch.rand(4), expected)
    assert {n: m.training for n, m in [*kit.base.named_modules(), *kit.named_modules(prefix="kit")]} == modes
    assert kit.training
    assert tokenizer.padding_side == "right"
    assert generate(kit, tokenizer, PROMPTS, 6) == first  # no dropout during generation


def out_of_memory_error() -> RuntimeError:
    """What torch raises on this machine when memory runs out."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50)
    return raised.value


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_that_runs_out_halves_the_batch(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    error = out_of_memory_error() if device == "cpu" else torch.OutOfMemoryError("CUDA out of memory.")
    kit, tokenizer = with_active_adapter("llama")
    expected = generate(kit, tokenizer, PROMPTS, 6)
    original, sizes = kit.base.generate, []

    def generate_with_little_memory(**inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 1:
            raise error
        return original(**inputs)

    monkeypatch.setattr(kit.base, "generate", generate_with_little_memory)
    progress: list[tuple[int, int]] = []
    assert generate(kit, tokenizer, PROMPTS, 6, batch_size=4, on_progress=lambda *n: progress.append(n)) == expected
    assert sizes == [4, 2, 1, 1, 1, 1, 1]
    assert progress[-1] == (5, 5)
    monkeypatch.setattr(kit.base, "generate", lambda **inputs: (_ for _ in ()).throw(error))
    with pytest.raises(RuntimeError, match="memory"):
        generate(kit, tokenizer, PROMPTS, 6)
    other_error = RuntimeError("something else")
    monkeypatch.setattr(kit.base, "generate", lambda **inputs: (_ for _ in ()).throw(other_error))
    with pytest.raises(RuntimeError, match="something else"):
        generate(kit, tokenizer, PROMPTS, 6)


def test_errors_name_the_prompt_or_label() -> None:
    kit, tokenizer = with_active_adapter("llama")
    assert generate(kit, tokenizer, [], 6) == []
    with pytest.raises(ConfigError, match="2 have no token, the first is number 1"):
        generate(kit, tokenizer, [[5], [], []], 6)
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        generate(kit, tokenizer, [[5]], 0)
    with pytest.raises(ConfigError, match="BertForSequenceClassification cannot generate"):
        generate(kitout.attach(ZOO["bert"].build()), tokenizer, [[5]], 3)
    with pytest.raises(ConfigError, match="1 given, expected at least 2"):
        label_likelihoods(kit, PROMPTS, [[5]], end_id=2)
    with pytest.raises(ConfigError, match="number 1 has no token"):
        label_likelihoods(kit, PROMPTS, [[5], []], end_id=2)
    with pytest.raises(ConfigError, match="number 2 has the same tokens"):
        label_likelihoods(kit, PROMPTS, [[5], [6], [5]], end_id=2)


def log_likelihood(kit: Kit, prompt: list[int], answer: list[int]) -> float:
    """Log-likelihood of the answer, from one forward without cache or padding."""
    if kit.config.is_encoder_decoder:
        decoder_ids = torch.tensor([[kit.config.decoder_start_token_id, *answer[:-1]]])
        logits = kit(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder_ids).logits[0]
    else:
        logits = kit(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 :]
    return float(sum(logits[i].log_softmax(-1)[token] for i, token in enumerate(answer)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mpt", "gemma2", "t5", "bart"])
@pytest.mark.parametrize(
    ("labels", "ended"), [([[7], [8]], False), ([[7, 9, 11], [8], [7, 10]], False), ([[0], [0, 7], [9]], True)]
)
@torch.no_grad()
def test_a_likelihood_is_that_of_one_forward(name: str, labels: list[list[int]], ended: bool) -> None:
    kit, _ = with_active_adapter(name)
    kit.eval()
    answers = [[*label, 2] for label in labels] if ended else labels
    expected = torch.tensor([[log_likelihood(kit, p, a) for a in answers] for p in PROMPTS])
    torch.testing.assert_close(
        label_likelihoods(kit, PROMPTS, labels, end_id=2, batch_size=2), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("method", [PromptTuning(length=3), PrefixTuning(length=4)], ids=lambda m: type(m).__name__)
@torch.no_grad()
def test_likelihoods_of_prompts_and_prefixes(method: Any) -> None:
    kit, _ = with_active_adapter("llama", method)
    kit.eval()
    labels = [[7, 9, 11], [8], [7, 10]]
    expected = torch.tensor([[log_likelihood(kit, p, a) for a in labels] for p in PROMPTS])
    torch.testing.assert_close(label_likelihoods(kit, PROMPTS, labels, end_id=2), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [None, PrefixTuning(length=4), PromptTuning(length=4, init="normal")])
@pytest.mark.parametrize("name", ["gpt2", "opt"])
@torch.no_grad()
def test_an_answer_ends_where_the_models_positions_do_alone_and_in_any_batch(name: str, method: Any) -> None:
    kit, tokenizer = with_active_adapter(name, method)
    kit.eval()
    limit = 64 if method is None else 60
    prompts = [[7 + i % 80 for i in range(length)] for length in (5, limit - 3, limit, limit - 3, limit - 12)]
    expected = [generate_alone(kit, tokenizer, p, min(12, limit - len(p) + 1)) for p in prompts]
    assert generate(kit, tokenizer, prompts, 12) == expected
    assert generate(kit, tokenizer, prompts, 12, batch_size=1) == expected
    message = rf"prompt number 1 has {limit + 2} tokens, and the model reads {limit}.*shorten it by 2"
    with pytest.raises(ConfigError, match=message):
        generate(kit, tokenizer, [[5, 6], [7] * (limit + 2)], 3)
    label_likelihoods(kit, [[7] * (limit - 1)], [[8, 9], [10]], 2)
    with pytest.raises(ConfigError, match=r"and 1 tokens of an answer behind it.*shorten it by 1"):
        label_likelihoods(kit, [[7] * limit], [[8, 9], [10]], 2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "opt"])
def test_routes_answer_together_as_one_after_the_other(name: str) -> None:
    kit, tokenizer = with_active_adapter(name)
    methods = {"scales": IA3(), "prompt": PromptTuning(length=3), "prefix": PrefixTuning(length=2)}
    for number, (adapter, method) in enumerate(methods.items()):
        kit.add(adapter, method, seed=number)
        with torch.no_grad():
            for value in kit[adapter].parameters():
                value.add_(torch.randn_like(value), alpha=0.5)
    routes: list[Any] = ["a", None, Mix({"a": 0.5, "scales": 1.0}), *methods]
    expected = []
    for route in routes:
        with kit.use(route):
            expected.append(generate(kit, tokenizer, PROMPTS, 8))
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    handle = kit.base.register_forward_pre_hook(count)
    found = generate_under(kit, tokenizer, PROMPTS, 8, routes, batch_size=30)
    handle.remove()
    assert found == expected
    assert calls <= 8, "all routes are rows of one batch"
    assert kit.active == "a"


def test_routes_that_take_no_rows_run_one_after_the_other() -> None:
    kit, tokenizer = with_active_adapter("llama")
    kit.add("b", IA3())
    kit.add("both", Composition(route=Average({"a": 0.5, "b": 0.5})))
    found = generate_under(kit, tokenizer, PROMPTS, 4, ["both", "a"])
    for route, texts in zip(("both", "a"), found, strict=True):
        with kit.use(route):
            assert texts == generate(kit, tokenizer, PROMPTS, 4)
