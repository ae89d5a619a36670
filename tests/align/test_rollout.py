"""Sampled answers follow the model's own distribution, and each answer's draws are its own."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import kitout
from kitout import IA3, Average, BitFit, Composition, Houlsby, Kit, LoRA, Method, PrefixTuning, PromptTuning
from kitout.align.rollout import Rollout, SamplingSettings, TokenDraws, sample_answers
from kitout.data.encode.item import IGNORE_INDEX
from kitout.errors import ConfigError, TrainingDiverged
from zoo import EXTRA, VOCAB, ZOO, tokenizer_of

PROMPTS = [[7, 8, 9], [5, 6], [0, 0, 17, 0, 22, 33, 4], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49]]
SHORT = SamplingSettings(max_new_tokens=6)


def kit_and_tokenizer(
    name: str = "llama", dtype: torch.dtype = torch.float64, **methods: Any
) -> tuple[Kit, PreTrainedTokenizerFast]:
    """A model of the zoo, in float64 so that padding changes no draw, and adapters that change its answers."""
    specimen = ZOO.get(name) or EXTRA[name]
    kit = kitout.attach(specimen.build().to(dtype))
    generator = torch.Generator().manual_seed(0)
    for adapter_name, method in methods.items():
        adapter = kit.add(adapter_name, method, seed=1)
        with torch.no_grad():
            for value in adapter.parameters():
                value.add_(torch.randn(value.shape, generator=generator, dtype=value.dtype), alpha=0.3)
    return kit, tokenizer_of(specimen)


def next_token_probabilities(kit: Kit, prompt: list[int], temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        logits = kit(input_ids=torch.tensor([prompt])).logits[0, -1]
    return (logits.double() / temperature).softmax(-1)


def first_tokens(kit: Kit, tokenizer: Any, prompt: list[int], settings: SamplingSettings, number: int) -> Counter[int]:
    found = sample_answers(kit, tokenizer, [prompt], settings, seed=3, step=0, samples=number, chunk_size=1000)
    return Counter(rollout.answer_ids[0] for rollout in found)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_frequencies_are_the_models_own_whatever_its_generation_config(temperature: float) -> None:
    kit, tokenizer = kit_and_tokenizer(dtype=torch.float32)
    own = kit.base.generation_config
    own.update(do_sample=True, temperature=0.2, top_k=3, top_p=0.5, repetition_penalty=2.0, suppress_tokens=[7, 8])
    number = 8000
    expected = next_token_probabilities(kit.eval(), PROMPTS[0], temperature)
    settings = SamplingSettings(max_new_tokens=1, temperature=temperature)
    counts = first_tokens(kit, tokenizer, PROMPTS[0], settings, number)
    for token, p in enumerate(expected.tolist()):
        assert abs(counts[token] - number * p) <= 4 * math.sqrt(number * p * (1 - p)) + 1, token
    assert len(counts) > 50  # more than transformers' default top_k
    assert kit.base.generation_config is own


def test_a_bandit_of_two_tokens() -> None:
    """Logits that differ by 1: the arms are pulled e to 1."""
    kit, tokenizer = kit_and_tokenizer("llama", torch.float32)
    with torch.no_grad():
        hidden = kit.base.model(torch.tensor([PROMPTS[0]])).last_hidden_state[0, -1]
        kit.base.lm_head.weight.zero_()
        for token, logit in ((11, 31.0), (12, 30.0)):  # all others have 0
            kit.base.lm_head.weight[token] = hidden * logit / hidden.square().sum()
    number, p = 4000, 1 / (1 + math.exp(-1))
    counts = first_tokens(kit, tokenizer, PROMPTS[0], SamplingSettings(max_new_tokens=1), number)
    assert set(counts) == {11, 12}
    assert abs(counts[11] - number * p) <= 4 * math.sqrt(number * p * (1 - p))


def test_top_k_and_top_p_leave_the_likeliest_tokens() -> None:
    kit, tokenizer = kit_and_tokenizer(dtype=torch.float32)
    order = next_token_probabilities(kit.eval(), PROMPTS[0]).sort(descending=True)
    likeliest = order.indices.tolist()
    settings = SamplingSettings(max_new_tokens=1, top_k=3)
    assert set(first_tokens(kit, tokenizer, PROMPTS[0], settings, 500)) == set(likeliest[:3])
    nucleus = int((order.values.cumsum(0) < 0.5).sum()) + 1
    settings = SamplingSettings(max_new_tokens=1, top_p=0.5)
    assert set(first_tokens(kit, tokenizer, PROMPTS[0], settings, 1000)) <= set(likeliest[:nucleus])


def test_the_same_seed_gives_the_same_answers_and_no_random_state_changes() -> None:
    kit, tokenizer = kit_and_tokenizer(a=LoRA(dropout=0.5))
    kit.use("a")
    kit.train()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = sample_answers(kit, tokenizer, PROMPTS, SHORT, seed=1, step=2, samples=3)
    assert torch.equal(torch.rand(4), expected)
    assert kit.training
    torch.manual_seed(99)
    assert sample_answers(kit, tokenizer, PROMPTS, SHORT, seed=1, step=2, samples=3) == first
    assert sample_answers(kit, tokenizer, PROMPTS, SHORT, seed=1, step=3, samples=3) != first
    assert sample_answers(kit, tokenizer, PROMPTS, SHORT, seed=2, step=2, samples=3) != first
    assert [r.prompt_index for r in first] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert len({r.input_ids for r in first}) == 12  # samples of a prompt differ


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_answer_is_the_same_alone_beside_longer_prompts_and_in_any_chunk(name: str) -> None:
    kit, tokenizer = kit_and_tokenizer(name, a=LoRA(targets="all-linear"))
    kit.use("a")
    prompts = [*PROMPTS, [5]] if name == "gpt2" else PROMPTS  # a prompt of one token is shared by none
    together = sample_answers(kit, tokenizer, prompts, SHORT, seed=1, step=0, samples=3, chunk_size=100)
    for chunk_size in (1, 5):
        assert (
            sample_answers(kit, tokenizer, prompts, SHORT, seed=1, step=0, samples=3, chunk_size=chunk_size) == together
        )
    for i, prompt in enumerate(prompts):
        alone = sample_answers(kit, tokenizer, [prompt], SHORT, seed=1, step=0, samples=3, keys=[i])
        assert [r.input_ids for r in alone] == [r.input_ids for r in together if r.prompt_index == i]


@pytest.mark.parametrize(
    ("name", "method", "is_shared"),
    [(name, LoRA(targets="all-linear"), True) for name in ("gpt2", "opt", "falcon", "gemma2", "mpt", "mixtral")]
    + [("llama", m, True) for m in (PrefixTuning(length=3), PromptTuning(length=3), Houlsby(), BitFit())]
    + [("gemma3", PrefixTuning(length=3), True), ("jamba", BitFit(), False)],
    ids=lambda value: type(value).__name__ if isinstance(value, Method) else str(value),
)
def test_a_prompt_with_several_answers_is_computed_once(name: str, method: Method, is_shared: bool) -> None:
    """And its answers are those of rows that each compute it."""
    kit, tokenizer = kit_and_tokenizer(name, torch.float32, a=method)
    kit.use("a")
    settings, shapes = SamplingSettings(max_new_tokens=4), []
    kit.base.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    together = sample_answers(kit, tokenizer, PROMPTS, settings, seed=1, step=0, samples=3)
    assert shapes[0] == (4, 9)
    assert (shapes[1] == (12, 1)) == is_shared
    assert sample_answers(kit, tokenizer, PROMPTS, settings, seed=1, step=0, samples=3, chunk_size=1) == together


def test_memory_that_runs_out_changes_no_answer() -> None:
    kit, tokenizer = kit_and_tokenizer()
    expected = sample_answers(kit, tokenizer, PROMPTS, SHORT, seed=1, step=0, samples=2)
    tried: list[int] = []

    def fail_on_many(_: object, args: Any, kwargs: Any) -> None:
        tried.append(len(kwargs["input_ids"]))
        if tried[-1] > 4:
            raise MemoryError

    kit.base.register_forward_pre_hook(fail_on_many, with_kwargs=True)
    assert sample_answers(kit, tokenizer, PROMPTS, SHORT, seed=1, step=0, samples=2) == expected
    assert [number for number in tried if number > 4] == [8]


def test_an_answer_ends_with_its_end_token_or_at_the_limit() -> None:
    kit, tokenizer = kit_and_tokenizer()
    stop_ids = list(range(50, 70))  # so that some answers end
    settings = SamplingSettings(max_new_tokens=5, stop_ids=tuple(stop_ids))
    rollouts = sample_answers(kit, tokenizer, PROMPTS, settings, seed=0, step=0, samples=16)
    ends = {*stop_ids, 2}
    for rollout in rollouts:
        answer = list(rollout.answer_ids)
        assert list(rollout.input_ids[: rollout.prompt_length]) == PROMPTS[rollout.prompt_index]
        assert [i for i, token in enumerate(answer) if token in ends] == ([len(answer) - 1] if rollout.ended else [])
        assert rollout.ended or len(answer) == 5
        assert 1 <= len(answer) <= 5
        text = answer[:-1] if rollout.ended else answer
        assert rollout.text == tokenizer.decode(text, skip_special_tokens=True).strip()
        row = rollout.encode("prompts.jsonl:1")
        assert row.input_ids == rollout.input_ids
        assert row.labels == (IGNORE_INDEX,) * row.prompt_length + rollout.answer_ids
        assert row.num_targets == len(answer)
        assert Rollout.from_values(json.loads(json.dumps(rollout.to_values()))) == rollout
    assert {r.ended for r in rollouts} == {True, False}
    lengths = {len(r.answer_ids) for r in rollouts if r.ended}
    assert min(lengths) == 1  # an end token alone is an answer
    assert 5 in lengths  # an end token at the limit still ends


def test_rows_of_several_adapters_answer_as_each_alone() -> None:
    kit, tokenizer = kit_and_tokenizer(a=LoRA(targets="all-linear"), b=PrefixTuning(length=4), c=IA3())
    routes = ["a", "b", None, "c"]
    found = sample_answers(kit, tokenizer, PROMPTS, SHORT, seed=1, step=0, samples=2, routes=routes)
    for i, route in enumerate(routes):
        with kit.use(route):
            alone = sample_answers(kit, tokenizer, [PROMPTS[i]], SHORT, seed=1, step=0, samples=2, keys=[i])
        assert [r.answer_ids for r in alone] == [r.answer_ids for r in found if r.prompt_index == i]
    base = sample_answers(kit, tokenizer, PROMPTS, SHORT, seed=1, step=0, samples=2)
    assert [r.answer_ids for r in base] != [r.answer_ids for r in found]
    assert kit.active is None


def test_routes_that_take_no_rows_answer_one_after_the_other() -> None:
    kit, tokenizer = kit_and_tokenizer(a=LoRA(targets="all-linear"), b=IA3())
    kit.add("both", Composition(route=Average({"a": 0.5, "b": 0.5})))
    found = sample_answers(kit, tokenizer, PROMPTS, SHORT, seed=1, step=0, routes=["both", "a", "both", "a"])
    for i, route in enumerate(["both", "a", "both", "a"]):
        with kit.use(route):
            (alone,) = sample_answers(kit, tokenizer, [PROMPTS[i]], SHORT, seed=1, step=0, keys=[i])
        assert alone.answer_ids == found[i].answer_ids


def test_progress_counts_all_answers() -> None:
    kit, tokenizer = kit_and_tokenizer()
    seen: list[tuple[int, int]] = []
    sample_answers(
        kit, tokenizer, PROMPTS, SHORT, seed=1, step=0, samples=2, chunk_size=4,
        on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(0, 8), (4, 8), (8, 8)]


def test_no_draw_leaves_the_distribution_at_the_ends_of_the_unit_interval() -> None:
    scores = torch.full((3, VOCAB), -math.inf)
    scores[:, 20], scores[:, 30] = 0.0, 1.0
    uniforms = torch.tensor([[0.0], [0.5], [1 - 2**-53]], dtype=torch.float64)
    assert TokenDraws(uniforms, SamplingSettings())(torch.zeros(3, 1), scores).argmax(-1).tolist() == [20, 30, 30]


def test_every_token_has_a_number_of_its_own() -> None:
    scores = torch.zeros(2, 4)
    draws = TokenDraws(torch.tensor([[0.1, 0.3, 0.9], [0.6, 0.2, 0.8]], dtype=torch.float64), SamplingSettings())
    assert [draws(torch.zeros(2, 1), scores).argmax(-1).tolist() for _ in range(3)] == [[0, 2], [1, 0], [3, 3]]
    assert torch.equal(scores, torch.zeros(2, 4))


def test_what_cannot_be_sampled_is_refused() -> None:
    with pytest.raises(ConfigError, match="sampling: 4 errors") as found:
        SamplingSettings(temperature=0, top_p=0, top_k=-1, max_new_tokens=0)
    assert "temperature is 0, expected a number above 0" in str(found.value)
    kit, tokenizer = kit_and_tokenizer("t5")
    with pytest.raises(ConfigError, match="reads prompts with an encoder"):
        sample_answers(kit, tokenizer, PROMPTS, SHORT, seed=0, step=0)
    kit, tokenizer = kit_and_tokenizer()
    with pytest.raises(ConfigError, match="sampling: 3 errors") as found:
        sample_answers(kit, tokenizer, PROMPTS, SHORT, seed=0, step=0, samples=0, keys=[1], routes=[None])
    assert "1 keys for 4 prompts: give one per prompt" in str(found.value)
    own = kit.base.generation_config
    with torch.no_grad():
        kit.base.lm_head.weight.fill_(math.nan)
    with pytest.raises(TrainingDiverged, match="logits are not finite"):
        sample_answers(kit, tokenizer, PROMPTS, SHORT, seed=0, step=0)
    assert kit.base.generation_config is own


def test_an_answer_ends_where_the_models_positions_do() -> None:
    kit, tokenizer = kit_and_tokenizer("gpt2")
    limit = int(kit.config.n_positions)
    prompts = [[7] * (limit - 1), [7, 8]]
    long, short = sample_answers(kit, tokenizer, prompts, SHORT, seed=0, step=0)
    assert len(long.answer_ids) == 2  # the last one is written and not read
    assert not long.ended
    alone: list[Rollout] = sample_answers(kit, tokenizer, [[7, 8]], SHORT, seed=0, step=0, keys=[1])
    assert short.answer_ids == alone[0].answer_ids
