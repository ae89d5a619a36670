"""Texts have the likelihood of plain forwards over lm-eval's windows; KL is that of both models' predictions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import kitout
from kitout import Kit, LoRA, PrefixTuning
from kitout.errors import ConfigError
from kitout.evaluate.ask import joined_rows, token_likelihood
from kitout.evaluate.ask.divergence import logit_divergence
from kitout.evaluate.ask.harness_tokens import encode_text, rolling_windows, start_token_id
from kitout.evaluate.ask.text_likelihood import text_likelihoods
from kitout.evaluate.metrics.registry import compute_measures
from kitout.evaluate.metrics.texts import TextSums
from zoo import ZOO, tokenizer_of

TEXTS = ["Hello, world", "", "It rained. " * 14, "é ü", "<s>a text that begins with its start token", "x"]
NAMES = (None, "a", "b")


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[Kit, Any]:
    kit = kitout.attach(ZOO[name].build().to(dtype))
    generator = torch.Generator().manual_seed(0)
    for key, method in {"a": LoRA(rank=2, targets="all-linear"), "b": PrefixTuning(length=2)}.items():
        with torch.no_grad():
            for value in kit.add(key, method, seed=1, dtype=dtype).parameters():
                value.add_(0.3 * torch.randn(value.shape, generator=generator, dtype=dtype))
    return kit, tokenizer_of(ZOO[name])


@torch.no_grad()
def by_hand(kit: Kit, tokenizer: Any, text: str, name: str | None, limit: int) -> TextSums:
    nll = kl = 0.0
    ids = encode_text(tokenizer, text)
    for context, scored in rolling_windows(ids, start_token_id(tokenizer), limit):
        inputs = torch.tensor([[*context, *scored][:-1]])
        with kit.use(None):
            base = kit(input_ids=inputs).logits[0, -len(scored) :].log_softmax(-1)
        with kit.use(name):
            tuned = kit(input_ids=inputs).logits[0, -len(scored) :].log_softmax(-1)
        nll -= float(tuned.gather(1, torch.tensor(scored)[:, None]).sum())
        kl += float((base.exp() * (base - tuned)).sum())
    return TextSums(nll, len(ids), len(text.encode()), kl)


@pytest.mark.parametrize("species", ["llama", "gpt2"])
@pytest.mark.parametrize("joined", [False, True])
def test_likelihood_and_divergence_are_those_of_plain_forwards(
    species: str, joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit, tokenizer = build(species)
    kit.eval()
    monkeypatch.setenv(joined_rows.VARIABLE, "1000000" if joined else "0")
    limit = 62  # the prefix takes two of 64 positions, and all are asked the same
    results = text_likelihoods(kit, tokenizer, TEXTS, ["b", None, "a"], divergence=True)
    for name, sums in zip(("b", None, "a"), results, strict=True):
        for text, found in zip(TEXTS, sums, strict=True):
            expected = by_hand(kit, tokenizer, text, name, limit)
            assert (found.num_tokens, found.num_bytes) == (expected.num_tokens, expected.num_bytes)
            assert found.nll == pytest.approx(expected.nll, abs=1e-8)
            assert found.divergence == pytest.approx(expected.divergence, abs=1e-8)
    assert all(found.divergence == 0.0 for found in results[1])
    measures = compute_measures("text", results[2])
    total = sum(by_hand(kit, tokenizer, text, "a", limit).nll for text in TEXTS)
    assert measures["bits_per_byte"].value == pytest.approx(total / math.log(2) / sum(len(t.encode()) for t in TEXTS))
    assert measures["kl"].value > 0


def test_one_pass_of_the_base_and_of_each_adapter_and_no_more_logits_than_a_batch_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kit, tokenizer = build("llama", torch.float32)
    positions: list[int] = []
    kit.base.lm_head.register_forward_hook(lambda _m, _a, out: positions.append(out.shape[0] * out.shape[1]))
    monkeypatch.setattr(token_likelihood, "BATCH_TOKENS", 100)
    kit.use("a")
    kit.train()
    state, values = torch.get_rng_state(), [v.clone() for v in (*kit.base.parameters(), *kit.parameters())]
    text_likelihoods(kit, tokenizer, ["twenty letters long!"] * 30, ["a", "b"], divergence=True)
    assert sum(positions) == 3 * 30 * 20
    assert max(positions) == 100
    positions.clear()
    text_likelihoods(kit, tokenizer, ["twenty letters long!"] * 30, max_length=8)
    assert sum(positions) == 30 * (8 + 8 + 8)  # the last four tokens see four before them
    assert kit.active == "a"
    assert kit.base.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(values, (*kit.base.parameters(), *kit.parameters()), strict=True))


def test_a_divergence_is_exact_where_it_has_to_be() -> None:
    logits = torch.randn(5, 7)
    assert torch.equal(logit_divergence(logits, logits), torch.zeros(5))
    assert torch.equal(logit_divergence(logits, logits + 3.0), torch.zeros(5)) or float(
        logit_divergence(logits, logits + 3.0).max()
    ) < 1e-6  # fmt: skip
    ruled_out = torch.tensor([[0.0, -torch.inf, 0.0]])
    assert float(logit_divergence(ruled_out, torch.tensor([[0.0, 5.0, 0.0]]))) == pytest.approx(
        math.log((2 + math.exp(5)) / 2)
    )  # fmt: skip
    assert logit_divergence(logits.bfloat16(), logits.bfloat16() + 1).dtype == torch.float32


def test_what_has_no_likelihood_is_refused() -> None:
    encoder_decoder = kitout.attach(ZOO["t5"].build())
    with pytest.raises(ConfigError, match="a text has no likelihood under it"):
        text_likelihoods(encoder_decoder, tokenizer_of(ZOO["t5"]), ["a"])
    kit, tokenizer = build("llama")
    assert text_likelihoods(kit, tokenizer, [], NAMES) == [[], [], []]
    kit.merge("a")
    with pytest.raises(ConfigError, match="a merged into the base"):
        text_likelihoods(kit, tokenizer, ["x"], divergence=True)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="neither a start nor an end token"):
        text_likelihoods(kit, tokenizer, ["x"])
    with pytest.raises(ConfigError, match="all of the 1 texts are empty"):
        compute_measures("text", [TextSums(0.0, 0, 0)])


TASKS = {
    "words": [" ".join(f"{word}{i * k % 17}" for k, word in enumerate(("so", "many", "words") * 5)) for i in range(6)],
    "longer than the window": ["It rained. " * 9 * i for i in range(1, 5)],
    "other scripts": ["Café, naïve — Übung", "  two spaces\n\nand lines\n", "東京は日本の首都です。", "🙂 é"],
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_bits_per_byte_are_lm_evals_own(model: str, task: str, tmp_path: Any) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from tiny_models import jsonl

    kit, tokenizer = build(model, torch.float32)
    texts = TASKS[task]
    config = {
        "task": "wiki_like", "dataset_path": "json", "output_type": "loglikelihood_rolling", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(jsonl(tmp_path / "texts.jsonl", [{"text": t} for t in texts]))}},
        "doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": [{"metric": "bits_per_byte"}],
    }  # fmt: skip
    manager = TaskManager(include_defaults=False)  # reading every task it has takes a minute
    window = 60  # the prefix takes two of 64 positions, and all are asked the same
    for name, sums in zip(NAMES, text_likelihoods(kit, tokenizer, texts, NAMES, max_length=window), strict=True):
        with kit.use(name):
            lm = huggingface.HFLM(
                pretrained=kit, tokenizer=tokenizer, device="cpu", batch_size=2, max_length=window,
                softmax_dtype="float32",
            )  # fmt: skip
            result = simple_evaluate(lm, tasks=[config], log_samples=True, bootstrap_iters=0, task_manager=manager)
        samples = sorted(result["samples"]["wiki_like"], key=lambda sample: sample["doc_id"])
        for found, sample in zip(sums, samples, strict=True):
            assert -found.nll == pytest.approx(float(sample["bits_per_byte"][0]), rel=1e-5)
            assert found.num_bytes == sample["bits_per_byte"][1]
        expected = result["results"]["wiki_like"]["bits_per_byte,none"]
        assert compute_measures("text", sums)["bits_per_byte"].value == pytest.approx(expected, rel=1e-5)
