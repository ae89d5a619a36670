"""What runs and measures models with a kit as the model: pipelines, lm_eval's HFLM, sentence-transformers.

The last two are not among the packages of the tests: they are skipped unless installed, and passed with lm_eval 0.4.13
and sentence-transformers 6.2.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import kitout
from interop.fixtures import bits, same
from kitout import Kit, LoRA
from tiny_vision import PROCESSOR
from zoo import IMAGE, ZOO, tokenizer_of


def random_kit(model: nn.Module) -> Kit:
    kit = kitout.attach(model)
    kit.add("a", LoRA(rank=2), seed=1)
    with torch.no_grad():
        for parameter in kit.parameters():
            parameter.normal_(std=0.5)
    return kit


@pytest.mark.parametrize(
    ("task", "species"),
    [("text-generation", "llama"), ("text-classification", "bert"), ("image-classification", "vit")],
)
def test_a_pipeline_is_that_of_the_merged_model(task: str, species: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(message: str, *_: Any) -> None:
        raise AssertionError(message)  # "The model ... is not supported for ..."

    monkeypatch.setattr(transformers.pipelines.base.logger, "error", refuse)
    kit = random_kit(ZOO[species].build())
    is_text = ZOO[species].is_text
    reader: Any = {"tokenizer": tokenizer_of(ZOO[species])} if is_text else {"image_processor": PROCESSOR}
    from PIL import Image

    question = "hello" if is_text else Image.new("RGB", (IMAGE, IMAGE), "red")
    options = {"do_sample": False, "max_new_tokens": 6} if task == "text-generation" else {}
    answers: dict[str, list[Any]] = {}
    for name, model in (("kit", kit), ("merged", kit.merged_copy("a")), ("base", kit)):
        kit.use(None if name == "base" else "a")
        entries = transformers.pipeline(task, model=model, device="cpu", **reader)(question, **options)
        answers[name] = [[e["label"], round(e["score"], 3)] if "score" in e else e for e in entries]
    assert answers["kit"] == answers["merged"]
    assert answers["kit"] != answers["base"]


def test_lm_eval_measures_what_is_active() -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    kit = random_kit(ZOO["llama"].build())
    texts = [("hello", " world"), ("good", " day")]
    until = {"max_gen_toks": 4, "until": ["zz"], "do_sample": False}

    def measure(model: nn.Module) -> tuple[list[float], list[str]]:
        lm = huggingface.HFLM(pretrained=model, tokenizer=tokenizer_of(ZOO["llama"]), device="cpu", max_length=64)
        scores = lm.loglikelihood([Instance("loglikelihood", {}, text, i) for i, text in enumerate(texts)])
        return [s for s, _ in scores], lm.generate_until([Instance("generate_until", {}, ("hello", until), 0)])

    kit.use("a")
    scores, answer = measure(kit)
    merged_scores, merged_answer = measure(kit.merged_copy("a"))
    assert scores == pytest.approx(merged_scores, abs=1e-3)
    assert answer == merged_answer
    kit.use(None)
    assert measure(kit)[0] != pytest.approx(scores, abs=1e-3)


def test_sentence_transformers_train_a_kit(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    losses = pytest.importorskip("sentence_transformers.losses")
    from datasets import Dataset

    build = lambda: transformers.BertModel(ZOO["bert"].build().config)  # noqa: E731
    torch.manual_seed(0)
    build().save_pretrained(tmp_path / "bert")
    tokenizer_of(ZOO["bert"]).save_pretrained(tmp_path / "bert")
    sentences = library.SentenceTransformer(str(tmp_path / "bert"), device="cpu")
    before = sentences.encode(["hello", "world"])
    kit = kitout.attach(sentences[0].model)
    kit.add("a", LoRA(rank=2), seed=1)
    kit.use("a")
    sentences[0].model = kit
    assert (sentences.encode(["hello", "world"]) == before).all()
    args = library.SentenceTransformerTrainingArguments(
        str(tmp_path / "out"), max_steps=2, save_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True
    )
    rows = Dataset.from_dict({"anchor": ["a b", "c", "d"], "positive": ["a", "c d", "e"]})
    loss = losses.MultipleNegativesRankingLoss(sentences)
    start = bits(kit, "a")
    library.SentenceTransformerTrainer(model=sentences, args=args, train_dataset=rows, loss=loss).train()
    assert not same(bits(kit, "a"), start)
    other = kitout.attach(transformers.BertModel.from_pretrained(tmp_path / "bert"))
    other.load(tmp_path / "out" / "checkpoint-2")
    assert same(bits(other, "a"), bits(kit, "a"))
