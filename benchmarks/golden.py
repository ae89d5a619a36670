"""Golden numbers: results of seeded `kitout.train` runs on tiny models, which no refactoring may change.

    python benchmarks/golden.py record [--only NAME]    runs every case and writes golden.json
    python benchmarks/golden.py check [--only NAME]     runs them again; one line per case, exit 1 on any difference

Kept per case: every loss, grad norm, learning rate and metric of metrics.jsonl as float.hex(), the test losses of
results.json, and two digests of every adapter: "named" over key, shape, dtype and bytes of
its tensors, "values" over the bytes alone, which renamed keys do not change. Models, tokenizer and data are made here,
offline, on one CPU thread in float32. The same bits can be expected only of the processor and the versions that
golden.json names. Only the public surface is used: `kitout.train`, methods by name, and the files of a run's folder.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import io
import json
import random
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import tokenizers
import torch
import transformers
from PIL import Image
from tokenizers import decoders, pre_tokenizers, processors

import kitout

GOLDEN = Path(__file__).with_name("golden.json")
Rows = list[dict[str, Any]]
Settings = dict[str, Any]

# --- settings and cases: every config key of this file is in this section, with dots for sections --------------------

COMMON: Settings = {
    "model.dtype": "float32",
    "model.device": "cpu",
    "train.batch_size": 6,
    "train.micro_batch_size": 4,
    "train.steps": 5,
    "train.seed": 3,
    "evaluate.steps": 3,
    "evaluate.generate_examples": 3,
}
TRAIN, VALIDATION, TEST, MODEL, FOLDER = "data.train", "data.validation", "data.test", "model.name", "output.folder"
SPLIT: Settings = {VALIDATION: 0.1, TEST: 0.2}  # by kitout itself; otherwise each split has its own file

# A data set by name, or several of them as a mixture, each with the settings of its source.
Data = str | list[tuple[str, Settings]]
# One case: a model, its data and the other settings of the run.
CASES: dict[str, tuple[str, Data, Settings]] = {
    "causal": ("llama", "completions", {}),
    "causal-instructions": ("llama", "instructions", SPLIT),
    "causal-chats": ("llama", "chats", {"data.train_on": "last"}),
    "causal-plain-text": ("llama", "texts", {"data.train_on": "all"}),
    "causal-gpt2": ("gpt2", "completions", {"method": {"name": "LoRA", "targets": "all-linear", "rank": 4}}),
    "causal-packed": ("llama", "completions", {"train.packing": True, "data.max_length": 96}),
    "causal-recomputed": ("llama", "completions", {"train.activation_checkpointing": True}),
    "causal-streamed": ("llama", "completions", {"data.streaming": True}),
    "causal-truncated": ("llama", "chats", {"data.max_length": 32}),
    "causal-mixture": ("llama", [("completions", {"weight": 2.0}), ("instructions", {})], {}),
    "causal-labels": ("llama", [("labels", {"system_prompt": "say good or bad"})], {}),
    "causal-by-epochs": ("llama", "completions", {"train.epochs": 0.75, "train.steps": None, **SPLIT}),
    "causal-optimizer": (
        "llama", "completions",
        {"train.loraplus_lr_ratio": 16.0, "train.max_grad_norm": 0.1, "train.weight_decay": 0.1,
         "train.lr_schedule": "linear", "train.warmup_ratio": 0.4, "train.lr": 2e-3, "train.group_by_length": False},
    ),
    "causal-best": ("llama", "completions", {"evaluate.best_metric": "token_accuracy",
                                             "train.early_stopping_patience": 1, "evaluate.steps": 1,
                                             "train.lr": 1e-2, "train.lr_schedule": "constant"}),
    "classification": ("bert", "labels", {"train.head_lr": 5e-3}),
    "classification-split": ("bert", "labels", SPLIT),
    "classification-own-head": ("bert-classifier", "labels", {}),
    "classification-decoder": ("llama", "labels", {}),
    "regression": ("bert", "numbers", {}),
    "multilabel": ("bert", "label-sets", {}),
    "tokens": ("bert", "tags", {}),
    "seq2seq": ("t5", "summaries", {}),
    "seq2seq-prefix": ("t5", "summaries", {"method": {"name": "PrefixTuning", "length": 3}}),
    "seq2seq-prompt": ("t5", "summaries", {"method": {"name": "PromptTuning", "length": 3}}),
    "images": ("vit", "image-classes", {}),
    "images-split": ("vit", "image-classes", {VALIDATION: 4, TEST: 6}),
    "joint": ("llama", "completions", {"jobs": [
        {"name": "low", "method": {"name": "LoRA", "rank": 2}, "train.steps": 3, "train.seed": 1},
        {"name": "scale", "method": "IA3", "train.lr": 2e-2, "train.batch_size": 4},
        {"name": "front", "method": {"name": "PrefixTuning", "length": 3}, "train.lr_schedule": "constant"},
        {"name": "prompt", "method": {"name": "PromptTuning", "length": 2}, "train.max_grad_norm": 0.1},
        {"name": "drop", "method": {"name": "LoRA", "dropout": 0.3}, "train.steps": 4},
        {"name": "serial", "method": {"name": "Houlsby", "width": 4}, "data": "instructions"},
        {"name": "shift", "method": {"name": "BitFit", "everywhere": True}, "train.batch_size": 8},
    ]}),
    "joint-classification": ("bert", "labels", {"jobs": [
        {"name": "two", "method": "BitFit"},
        {"name": "three", "method": {"name": "LoRA", "dora": True}, "data": "three-labels"},
        {"name": "also", "method": "SSF", "train.batch_size": 5},
    ]}),
    "joint-images": ("vit", "image-classes", {"jobs": [
        {"name": "prompt", "method": {"name": "VPT", "length": 2}},
        {"name": "low", "method": "LoRA", "train.steps": 3},
    ]}),
}  # fmt: skip

# The registered methods, with settings that fit tiny models. A method that has no case yet is named in a warning.
METHODS: dict[str, tuple[str, Data, Settings]] = {
    "AdaptFormer": ("vit", "image-classes", {"width": 4}),
    "BitFit": ("bert", "labels", {}),
    "BitFit+everywhere": ("llama", "completions", {"everywhere": True}),
    "FullFineTuning": ("llama", "completions", {}),
    "Houlsby": ("bert", "labels", {"width": 4}),
    "IA3": ("llama", "completions", {}),
    "LoRA": ("llama", "completions", {"targets": "all-linear", "rank": {"attn.*": 2, "mlp.*": 4}, "rslora": True}),
    "LoRA+dropout": ("llama", "completions", {"dropout": 0.2}),
    "LoRA+dora": ("llama", "completions", {"dora": True}),
    "LoRA+pissa": ("llama", "completions", {"rank": 4, "init": "pissa"}),
    "ParallelAdapter": ("llama", "completions", {"width": 8, "scale": "learned"}),
    "PartialFineTuning": ("bert", "labels", {"last": 1}),
    "PartialFineTuning+head": ("bert", "labels", {"part": "head"}),
    "Pfeiffer": ("llama", "completions", {"width": 4, "layers": "last:1"}),
    "PrefixTuning": ("llama", "completions", {"length": 3}),
    "PrefixTuning+encoder": ("llama", "completions", {"length": 3, "encoder": 8}),
    "PromptTuning": ("llama", "completions", {"length": 3}),
    "PromptTuning+bert": ("bert", "labels", {"length": 3}),
    "SSF": ("vit", "image-classes", {}),
    "VPT": ("vit", "image-classes", {"length": 3}),
    "VPT+deep": ("vit", "image-classes", {"length": 2, "deep": True, "dropout": 0.1}),
}
for _name, (_model, _data, _settings) in METHODS.items():
    CASES[f"method-{_name}"] = (_model, _data, {"method": {"name": _name.partition("+")[0], **_settings}})


def config(case: str, root: Path) -> Settings:
    """A case as `kitout.train` takes it, over the models and data below root."""
    model, data, more = CASES[case]
    settings = COMMON | {MODEL: str(root / model), FOLDER: str(root / "runs" / case)} | sources(root, data) | more
    jobs = [nested(job | sources(root, job.pop("data", data))) for job in map(dict, settings.pop("jobs", ()))]
    return nested(settings) | ({"jobs": jobs} if jobs else {})


def sources(root: Path, data: Data) -> Settings:
    """Paths of a data set: texts have a file per split (a mixture those of its first), images a folder."""
    mixture = [(data, {})] if isinstance(data, str) else data
    first = root / mixture[0][0]
    if first.name not in ROWS:
        return {TRAIN: str(first), VALIDATION: 5, TEST: 5}
    train = [{"path": str(root / name / "train.jsonl"), **more} for name, more in mixture]
    return {TRAIN: train, VALIDATION: str(first / "validation.jsonl"), TEST: str(first / "test.jsonl")}


def nested(dotted: Mapping[str, Any]) -> Settings:
    """{"train.lr": 1} as {"train": {"lr": 1}}; None: left out."""
    sections: Settings = {}
    for key, value in dotted.items():
        section, _, name = key.rpartition(".")
        if value is not None:
            (sections.setdefault(section, {}) if section else sections)[name] = value
    return sections


# --- models ----------------------------------------------------------------------------------------------------------

SPECIALS = ["<pad>", "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY = {token: i for i, token in enumerate(SPECIALS + sorted(pre_tokenizers.ByteLevel.alphabet()))}
SIDE = 32  # pixels


def tokenizer(chat: bool) -> transformers.PreTrainedTokenizerFast:
    """One token per byte, so that nothing depends on how a vocabulary is trained."""
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=VOCABULARY, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    if not chat:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", bos_token="<s>",
        eos_token="<|im_end|>" if chat else "</s>",
    )  # fmt: skip
    if chat:
        fast.chat_template = CHATML
    return fast


def models() -> dict[str, Callable[[], Any]]:
    """Model folders by name: how each model is built, its weights still as transformers initializes them."""
    ids = {"vocab_size": len(VOCABULARY), "pad_token_id": 0}
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**ids, **size, "max_position_embeddings": 256}
    gpt = {**ids, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 2, "eos_token_id": 5}
    llama = transformers.LlamaConfig(
        **text, num_key_value_heads=2, bos_token_id=2, eos_token_id=5, tie_word_embeddings=True
    )
    bert = transformers.BertConfig(**text)
    own = transformers.BertConfig(**text, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    t5 = transformers.T5Config(
        **ids, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, eos_token_id=3, decoder_start_token_id=0
    )
    vit = transformers.ViTConfig(**size, image_size=SIDE, patch_size=8)
    return {
        "llama": lambda: transformers.LlamaForCausalLM(llama),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt)),
        "bert": lambda: transformers.BertModel(bert),
        "bert-classifier": lambda: transformers.BertForSequenceClassification(own),
        "t5": lambda: transformers.T5ForConditionalGeneration(t5),
        "vit": lambda: transformers.ViTModel(vit, add_pooling_layer=False),
    }


def save_model(name: str, folder: Path) -> None:
    """Noise on every parameter: biases at 0 and gains at 1 hide mistakes, small matrices leave attention uniform."""
    torch.manual_seed(0)
    model = models()[name]()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape) * 0.15)
    model.save_pretrained(folder)
    if name != "vit":
        tokenizer(chat=name in ("llama", "gpt2")).save_pretrained(folder)
        return
    processor = {
        "image_processor_type": "ViTImageProcessor", "size": {"height": SIDE, "width": SIDE}, "do_resize": True,
        "do_rescale": True, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.4] * 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")


# --- data ------------------------------------------------------------------------------------------------------------

KINDS = {"good": ["love", "great", "sunny"], "bad": ["hate", "awful", "rainy"], "odd": ["weird", "strange"]}
WORDS = ["the", "cat", "dog", "tree", "walk", "today", "again"]
SIZES = {"train": 40, "validation": 6, "test": 8}


def texts(number: int, rng: random.Random, kinds: int = 2) -> Iterator[tuple[str, str]]:
    """Distinct texts with their label, which one word decides."""
    for i in range(number):
        kind = list(KINDS)[i % kinds]
        words = rng.choices(WORDS, k=rng.randint(2, 5))
        words.insert(rng.randrange(len(words)), rng.choice(KINDS[kind]))
        yield " ".join([*words, str(rng.randrange(10_000))]), kind


def chat(text: str, kind: str) -> Rows:
    turns = [("user", text), ("assistant", "why"), ("user", "well"), ("assistant", kind)]
    return [{"role": role, "content": content} for role, content in turns]


ROWS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "completions": lambda text, kind: {"prompt": f"{text}:", "completion": f" {kind}"},
    "instructions": lambda text, kind: {"instruction": "good or bad?", "input": text, "output": kind},
    "chats": lambda text, kind: {"messages": chat(text, kind)},
    "texts": lambda text, kind: {"text": f"{text} {kind}"},
    "labels": lambda text, kind: {"text": text, "label": kind},
    "three-labels": lambda text, kind: {"text": text, "label": kind},
    "numbers": lambda text, _kind: {"text": text, "label": len(text) / 10},
    "label-sets": lambda text, kind: {"text": text, "labels": [kind, "long" if len(text) > 25 else "short"]},
    "tags": lambda text, _kind: {"tokens": text.split(), "tags": ["O" if w in WORDS else "B-X" for w in text.split()]},
    "summaries": lambda text, kind: {"document": text, "summary": kind},
}


def save_texts(name: str, folder: Path) -> None:
    folder.mkdir()
    rng = random.Random(0)
    for split, number in SIZES.items():
        rows = [ROWS[name](text, kind) for text, kind in texts(number, rng, 3 if name == "three-labels" else 2)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def save_images(root: Path, each: int, seed: int) -> None:
    """Noise around one color per class, larger than the model's input, so that they are resized."""
    for number, (name, color) in enumerate({"red": (200, 30, 30), "green": (30, 180, 40)}.items()):
        (root / name).mkdir(parents=True)
        for i in range(each):
            noise = np.random.default_rng([seed, number, i]).integers(-30, 31, (40, 36, 3))
            pixels = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")


def prepare(root: Path) -> None:
    """Every model and every data set, as folders below root."""
    for name in models():
        save_model(name, root / name)
    for name in ROWS:
        save_texts(name, root / name)
    save_images(root / "image-classes", each=12, seed=9)


# --- what a run yields -----------------------------------------------------------------------------------------------

VOLATILE = re.compile("second|memory|runtime|flos|epoch")  # time and memory differ from run to run
MEASURED = re.compile("eval_")  # of an evaluation only the loss is kept


def run(case: str, root: Path) -> dict[str, str]:
    """Everything that is kept of one case, in the order in which it arose."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kitout.train(config(case, root))
    folder = root / "runs" / case
    kept: dict[str, str] = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for key, value in row.items():
            if key != "step" and not VOLATILE.search(key) and (not MEASURED.search(key) or key.endswith("eval_loss")):
                kept[f"step {row['step']} {key}"] = exact(value)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for adapter, changes in results["comparisons"].items():
        # A head that the base lacks is drawn from the global random state: the base is at chance level there.
        losses = [change["tuned"]["value"] for change in changes if change["name"] == "loss"]
        kept |= {f"test {adapter} loss": exact(value) for value in losses}
    files = sorted((folder / "adapter").rglob("*.safetensors"))
    for file in files:
        place = file.parent.relative_to(folder).as_posix()
        kept |= {f"{place} {what}": digest for what, digest in digests(file).items()}
    if not files or not any(" loss" in key or "/loss" in key for key in kept):
        raise RuntimeError(f"{folder} holds no adapter or no loss: nothing was compared")
    return kept


def exact(value: Any) -> str:
    return float(value).hex() if isinstance(value, int | float) else json.dumps(value)


def digests(file: Path) -> dict[str, str]:
    tensors = sorted(safetensors.deserialize(file.read_bytes()))
    named, values = hashlib.sha256(), hashlib.sha256()
    for key, tensor in tensors:
        named.update(json.dumps([key, tensor["shape"], tensor["dtype"]]).encode() + bytes(tensor["data"]))
    for digest in sorted(hashlib.sha256(bytes(tensor["data"])).digest() for _, tensor in tensors):
        values.update(digest)
    return {"named": named.hexdigest(), "values": values.hexdigest()}


def machine() -> dict[str, str]:
    """What bits depend on besides the code."""
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    lines = [re.search(rf"^{key}\s*:\s*(.*)$", cpu, re.M) for key in ("model name", "flags")]
    model, flags = (line.group(1) if line else "unknown" for line in lines)
    return {
        "cpu": f"{model}, {torch.backends.cpu.get_cpu_capability()}",
        "flags": hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:16],
        **{lib.__name__: lib.__version__ for lib in (torch, transformers, np)},
    }


# --- record and check ------------------------------------------------------------------------------------------------


def first_difference(golden: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    differing = [key for key in golden if now.get(key) != golden[key]]
    if not differing:
        return None
    key = differing[0]
    before, after = (readable(side.get(key, "missing")) for side in (golden, now))
    return f"{len(differing)} of {len(golden)} differ, first {key!r}: {before} -> {after}"


def readable(kept: str) -> str:
    return repr(float.fromhex(kept)) if "0x" in kept else kept[:16]


def methods() -> set[str]:
    public = [getattr(kitout, name) for name in kitout.__all__]
    return {m.__name__ for m in public if isinstance(m, type) and issubclass(m, kitout.Method)} - {"Method"}


def main() -> int:
    parser = argparse.ArgumentParser(description="golden numbers of seeded training runs on tiny models")
    parser.add_argument("verb", choices=("record", "check"))
    parser.add_argument("--only", metavar="NAME", default="*", help="one case, or a pattern such as 'method-*'")
    options = parser.parse_args()
    names = fnmatch.filter(CASES, options.only)
    if not names:
        parser.error(f"no case is named {options.only!r}; there are {', '.join(CASES)}")
    if missing := methods() - {name.partition("+")[0] for name in METHODS}:
        print(f"METHODS has no case for {', '.join(sorted(missing))}")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    golden = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {"machine": machine(), "cases": {}}
    same_machine = golden["machine"] == machine()
    warning = f"ANOTHER MACHINE: recorded on {golden['machine']}, this is {machine()}: bits may differ for that alone"
    if not same_machine and options.verb == "record":
        golden = {"machine": machine(), "cases": {}}  # numbers of two machines are never mixed
    elif not same_machine:
        print(warning)
    start, num_failed = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root)
        for name in names:
            case_start = time.perf_counter()
            try:
                kept = run(name, root)
            except Exception as error:  # a case that fails must not hide the others
                num_failed += 1
                print(f"{name}: FAILED, {type(error).__name__}: {error}")
                continue
            if options.verb == "record":
                golden["cases"][name] = kept
                outcome = f"{len(kept)} values"
            elif name not in golden["cases"]:
                num_failed += 1
                outcome = "NOT RECORDED"
            else:
                difference = first_difference(golden["cases"][name], kept)
                num_failed += difference is not None
                outcome = "equal" if difference is None else f"DIFFERENT, {difference}"
            print(f"{name}: {outcome} ({time.perf_counter() - case_start:.1f} s)", flush=True)
    if options.verb == "record" and not num_failed:
        golden["cases"] = {name: golden["cases"][name] for name in CASES if name in golden["cases"]}
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
    print(f"{len(names) - num_failed} of {len(names)} cases {options.verb}ed without a difference or failure, "
          f"{time.perf_counter() - start:.0f} s")  # fmt: skip
    if num_failed and not same_machine and options.verb == "check":
        print(warning)
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
