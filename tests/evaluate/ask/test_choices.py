"""Choices are scored as one forward over prompt and choice scores them, for every adapter, padding and batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import kitout
from kitout import IA3, BitFit, Kit, LoRA, PrefixTuning, PromptTuning
from kitout.errors import ConfigError, MergeStateError
from kitout.evaluate.ask import batches, joined_rows, token_likelihood
from kitout.evaluate.ask.choices import CHAT, PLAIN, ChoicePrompt, ChoiceQuestion, choice_likelihoods, read_choices
from kitout.evaluate.ask.harness_tokens import encode_pairs, rolling_windows
from kitout.evaluate.metrics.registry import compute_measures
from zoo import EXTRA, ZOO, tokenizer_of

CHOICES = ("a", "xyz", "yes, of course", "xy", "?", "no", "q" * 11)
QUESTIONS = [
    ChoiceQuestion(f"Is it {'so ' * (i % 4)}{i}?", CHOICES[i % 3 : i % 3 + 2 + i % 4], i % 2) for i in range(9)
]
NAMES = (None, "lora", "ia3", "prompt", "prefix")


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[Kit, Any]:
    """A kit with adapters of several kinds, each far from its start."""
    specimen = ZOO.get(name) or EXTRA[name]
    kit = kitout.attach(specimen.build().to(dtype))
    methods = {"lora": LoRA(rank=2, targets="all-linear"), "ia3": IA3()}
    if name in ("llama", "gpt2", "gemma2"):
        methods |= {"prompt": PromptTuning(length=3, init="normal"), "prefix": PrefixTuning(length=2)}
    generator = torch.Generator().manual_seed(0)
    for key, method in methods.items():
        with torch.no_grad():
            for value in kit.add(key, method, seed=1, dtype=dtype).parameters():
                value.add_(0.3 * torch.randn(value.shape, generator=generator, dtype=dtype))
    return kit, tokenizer_of(specimen)


@torch.no_grad()
def alone(kit: Kit, tokenizer: Any, question: ChoiceQuestion, prompt: ChoicePrompt = PLAIN) -> list[float]:
    """Of each choice, from one forward without cache or padding, under what is active."""
    text = prompt.template.replace("{question}", question.question)
    ids, answers = encode_pairs(
        tokenizer, text, [prompt.delimiter + c for c in question.choices], kit.config.is_encoder_decoder
    )
    scores = []
    for answer in answers:
        if kit.config.is_encoder_decoder:
            start = kit.config.decoder_start_token_id
            inputs = {"input_ids": torch.tensor([ids]), "decoder_input_ids": torch.tensor([[start, *answer[:-1]]])}
        else:
            inputs = {"input_ids": torch.tensor([ids + answer[:-1]])}
        log_probs = kit(**inputs).logits[0, -len(answer) :].log_softmax(-1)
        scores.append(float(log_probs.gather(1, torch.tensor(answer)[:, None]).sum()))
    return scores


def flat(results: Any) -> list[float]:
    return [value for of_name in results for row in of_name for value in row.log_likelihoods]


@pytest.mark.parametrize("species", ["llama", "gpt2", "gemma2", "mpt", "t5"])
def test_a_choice_scores_what_one_forward_gives_it(species: str) -> None:
    in_float32 = species in ("gemma2", "mpt")  # whose masks are made for it
    kit, tokenizer = build(species, torch.float32 if in_float32 else torch.float64)
    kit.eval()
    names = [None, *kit.names]
    expected = []
    for name in names:
        with kit.use(name):
            expected += [value for q in QUESTIONS for value in alone(kit, tokenizer, q)]
    close = pytest.approx(expected, abs=5e-5 if in_float32 else 1e-8)
    assert flat(choice_likelihoods(kit, tokenizer, QUESTIONS, names)) == close
    assert flat(choice_likelihoods(kit, tokenizer, QUESTIONS, names, batch_size=1)) == close


@pytest.mark.parametrize("species", ["llama", "gpt2"])
def test_adapters_as_rows_of_one_batch_score_as_apart(species: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kit, tokenizer = build(species)
    apart = flat(choice_likelihoods(kit, tokenizer, QUESTIONS, NAMES))
    monkeypatch.setenv(joined_rows.VARIABLE, "1000000")
    sizes: list[int] = []
    kit.base.get_input_embeddings().register_forward_hook(lambda _m, _a, out: sizes.append(len(out)))
    assert flat(choice_likelihoods(kit, tokenizer, QUESTIONS, NAMES)) == pytest.approx(apart, abs=1e-8)
    assert max(sizes) > len(QUESTIONS)


def test_what_cannot_be_a_row_runs_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    kit, tokenizer = build("llama")
    kit.add("average", kitout.Composition(route=kitout.Average({"lora": 0.5, "ia3": 0.5})))
    monkeypatch.setenv(joined_rows.VARIABLE, "1000000")
    names = [None, "average", "lora"]
    expected = []
    kit.eval()
    for name in names:
        with kit.use(name):
            expected += [value for q in QUESTIONS for value in alone(kit, tokenizer, q)]
    assert flat(choice_likelihoods(kit, tokenizer, QUESTIONS, names)) == pytest.approx(expected, abs=1e-6)


def test_nothing_changes_and_what_is_active_is_asked_by_default() -> None:
    kit, tokenizer = build("llama", torch.float32)
    kit.use("lora")
    kit.train()
    kit.base.model.layers[1].eval()
    modes = [module.training for module in kit.base.modules()]
    values = [value.clone() for value in (*kit.base.parameters(), *kit.parameters())]
    state = torch.get_rng_state()
    active = flat(choice_likelihoods(kit, tokenizer, QUESTIONS))
    assert active == flat(choice_likelihoods(kit, tokenizer, QUESTIONS, ["lora"]))
    assert kit.active == "lora"
    assert [module.training for module in kit.base.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(values, (*kit.base.parameters(), *kit.parameters()), strict=True))
    kit.merge("lora")
    assert flat(choice_likelihoods(kit, tokenizer, QUESTIONS)) == pytest.approx(active, abs=1e-3)
    with pytest.raises(MergeStateError):
        choice_likelihoods(kit, tokenizer, QUESTIONS, [None])


def test_logits_are_computed_at_needed_positions_and_a_question_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kit, tokenizer = build("llama", torch.float32)
    positions: list[int] = []
    kit.base.lm_head.register_forward_hook(lambda _m, _a, out: positions.append(out.shape[0] * out.shape[1]))
    read: list[int] = []
    kit.base.model.embed_tokens.register_forward_hook(lambda _m, _a, out: read.append(out.shape[0] * out.shape[1]))
    questions = [ChoiceQuestion("How long is it?", ("abcd", "efgh", "ijkl"), 0)] * 40
    choice_likelihoods(kit, tokenizer, questions, ["lora"])
    prompt, (answer, *_) = encode_pairs(tokenizer, f"Question: {questions[0].question}\nAnswer:", [" abcd"])
    # the first tokens come from the prompt's last position, one for all choices
    assert sum(positions) == 40 * (1 + 3 * (len(answer) - 1))
    assert sum(read) == 40 * (len(prompt) + 3 * (len(answer) - 1))
    positions.clear()
    monkeypatch.setattr(token_likelihood, "BATCH_TOKENS", 64)
    monkeypatch.setattr(token_likelihood, "CACHE_TOKENS", 256)
    monkeypatch.setattr(batches, "ENOUGH_TOKENS", 16)
    choice_likelihoods(kit, tokenizer, questions, ["lora"])
    assert max(positions) <= 64
    assert sum(positions) == 40 * (1 + 3 * (len(answer) - 1))


def test_what_is_too_long_loses_its_front() -> None:
    kit, tokenizer = build("gpt2")  # 64 positions
    kit.eval()
    question = ChoiceQuestion("x" * 80, ("a", "bcd"), 0)
    (got,) = choice_likelihoods(kit, tokenizer, [question, *QUESTIONS], [None])
    ids = tokenizer.encode("Question: " + "x" * 80 + "\nAnswer:")
    for choice, value in zip(question.choices, got[0].log_likelihoods, strict=True):
        answer = tokenizer.encode(" " + choice)
        cut = [*ids, *answer][-65:-1]
        with torch.no_grad(), kit.use(None):
            log_probs = kit(input_ids=torch.tensor([cut])).logits[0, -len(answer) :].log_softmax(-1)
        assert value == pytest.approx(float(log_probs.gather(1, torch.tensor(answer)[:, None]).sum()), abs=1e-9)
    (beside_prompt, _) = choice_likelihoods(kit, tokenizer, [question], [None, "prompt"])  # which takes 3 of them
    assert beside_prompt[0].log_likelihoods != got[0].log_likelihoods
    with pytest.raises(ConfigError, match=r"question 0 has a choice of 91 tokens, and the model reads 64"):
        choice_likelihoods(kit, tokenizer, [ChoiceQuestion("?", ("a", "b" * 90), 0)], [None])


def test_prompts_by_chat_template_are_labeled() -> None:
    kit, tokenizer = build("llama")
    kit.eval()
    assert (PLAIN.label, CHAT.label) == ("plain", "chat template")
    (got,) = choice_likelihoods(kit, tokenizer, QUESTIONS[:2], [None], prompt=CHAT)
    start = "<user>Question: Is it 0?\nAnswer:</s><assistant>"
    with kit.use(None):
        expected = alone(kit, tokenizer, QUESTIONS[0], ChoicePrompt(start.replace("Is it 0?", "{question}"), ""))
    assert list(got[0].log_likelihoods) == pytest.approx(expected, abs=1e-9)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template: ask by plain prompts"):
        choice_likelihoods(kit, tokenizer, QUESTIONS, prompt=CHAT)


def test_rows_are_read_with_all_their_errors() -> None:
    row = {"question": "q", "choices": ["a", "b"], "answer": 1}
    assert read_choices([row, {**row, "answer": "0"}])[1] == ChoiceQuestion("q", ("a", "b"), 0)
    bad = [{**row, "answer": 2}, {**row, "choices": ["a"]}, {**row, "question": ""}, {**row, "answer": "B"}, {}]
    with pytest.raises(ConfigError) as raised:
        read_choices(bad, "my.jsonl")
    text = str(raised.value)
    assert "my.jsonl" in text
    for part in ("row 1 has the answer 2, expected an index from 0 to 1", "row 2", "row 3", "row 4", "row 5"):
        assert part in text
    with pytest.raises(ConfigError, match="and 15 more rows"):
        read_choices(bad * 4)
    with pytest.raises(ConfigError, match=r"no \{question\}"):
        ChoicePrompt("Answer:")
    kit, tokenizer = build("llama")
    with pytest.raises(ConfigError, match="no adapter to score"):
        choice_likelihoods(kit, tokenizer, QUESTIONS, [])
    assert choice_likelihoods(kit, tokenizer, [], [None, "lora"]) == [[], []]


def test_a_parameter_of_the_model_itself_cannot_differ_by_row_and_is_scored_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kit, tokenizer = build("llama")
    kit.add("bias", BitFit(), seed=1)
    apart = flat(choice_likelihoods(kit, tokenizer, QUESTIONS, [None, "bias", "lora"]))
    monkeypatch.setenv(joined_rows.VARIABLE, "1000000")
    assert flat(choice_likelihoods(kit, tokenizer, QUESTIONS, [None, "bias", "lora"])) == pytest.approx(apart, abs=1e-8)


def test_where_rows_of_a_cache_cannot_be_selected_whole_rows_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    kit, tokenizer = build("llama")
    expected = flat(choice_likelihoods(kit, tokenizer, QUESTIONS, NAMES))
    monkeypatch.setattr(token_likelihood, "can_select_rows", lambda cache: False)
    assert flat(choice_likelihoods(kit, tokenizer, QUESTIONS, NAMES)) == pytest.approx(expected, abs=1e-8)


def test_windows_score_every_token_once() -> None:
    assert list(rolling_windows(range(5), 9, 10)) == [([9], [0, 1, 2, 3, 4])]
    assert list(rolling_windows(range(7), 9, 3)) == [([9], [0, 1, 2]), ([2], [3, 4, 5]), ([3, 4, 5], [6])]
    assert list(rolling_windows([], 9, 3)) == []


def test_acc_by_hand() -> None:
    from kitout.evaluate.metrics.choice_accuracy import ChoiceSums

    rows = [ChoiceSums((-2.0, -3.0), (1, 10)), ChoiceSums((-5.0, -1.0), (5, 5)), ChoiceSums((-1.0, -1.0), (2, 2))]
    measures = compute_measures("choice", rows, [0, 0, 0])
    assert {k: round(m.value, 9) for k, m in measures.items() if k != "ece"} == {
        "acc": round(2 / 3, 9), "acc_norm": round(1 / 3, 9)
    }  # fmt: skip
    assert rows[0].confidence == pytest.approx(1 / (1 + math.exp(-1)))
    with pytest.raises(ConfigError, match="example 2 is 2, expected an index from 0 to 1"):
        compute_measures("choice", rows, [0, 0, 2])


# ---- lm-evaluation-harness itself ------------------------------------------------------------------------------------

TASKS = {
    "obqa_like": [
        {"question": f"Which of these is {'very ' * (i % 3)}number {i}?", "answer": i % 4,
         "choices": [f"it is {k * i}" for k in range(4)]} for i in range(8)
    ],
    "piqa_like": [
        {"question": f"To open door {i}", "choices": ["push it", "wait until it opens by itself"], "answer": i % 2}
        for i in range(8)
    ],
    "uneven": [
        {"question": "Café? " * (1 + i), "choices": ["A", "B or C", "naïve"][: 2 + i % 2], "answer": 1}
        for i in range(8)
    ],
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_acc_and_acc_norm_are_lm_evals_own(model: str, task: str, tmp_path: Any) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from tiny_models import jsonl

    kit, tokenizer = build(model, torch.float32)
    rows = TASKS[task]
    config = {
        "task": task, "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(jsonl(tmp_path / f"{task}.jsonl", rows))}},
        "doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    questions = read_choices(rows)
    manager = TaskManager(include_defaults=False)  # reading every task it has takes a minute
    names, window = [None, *kit.names], 60  # virtual tokens take some of 64 positions, and all are asked the same
    assert len(names) == 5
    found = choice_likelihoods(kit, tokenizer, questions, names, max_length=window)
    for name, sums in zip(names, found, strict=True):
        with kit.use(name):
            lm = huggingface.HFLM(
                pretrained=kit, tokenizer=tokenizer, device="cpu", batch_size=3, max_length=window,
                softmax_dtype="float32",
            )  # fmt: skip
            result = simple_evaluate(lm, tasks=[config], log_samples=True, bootstrap_iters=0, task_manager=manager)
        samples = sorted(result["samples"][task], key=lambda sample: sample["doc_id"])
        for row, sample, question in zip(sums, samples, questions, strict=True):
            theirs = [float(response[0]) for response in sample["filtered_resps"]]
            assert list(row.log_likelihoods) == pytest.approx(theirs, abs=2e-4)
            assert (row.choice == question.answer) == bool(sample["acc"])
            assert (row.choice_by_length == question.answer) == bool(sample["acc_norm"])
        measures = compute_measures("choice", sums, [q.answer for q in questions])
        assert measures["acc"].value == pytest.approx(result["results"][task]["acc,none"], abs=1e-12)
        assert measures["acc_norm"].value == pytest.approx(result["results"][task]["acc_norm,none"], abs=1e-12)


def test_pairs_are_cut_as_lm_eval_cuts_them() -> None:
    tasks = pytest.importorskip("lm_eval.models.huggingface")
    kit, tokenizer = build("llama")
    lm = tasks.HFLM(pretrained=kit, tokenizer=tokenizer, device="cpu")
    for prompt in ("Answer:", "Answer: ", "Answer:  \n ", "<s>Answer:"):
        for choice in (" yes", "yes", "  no"):
            ids, (answer,) = encode_pairs(tokenizer, prompt, [choice])
            assert (ids, answer) == lm._encode_pair(prompt, choice)
