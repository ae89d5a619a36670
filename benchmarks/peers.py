"""What Hugging Face PEFT does where kitout claims a difference: each line is run on both, on tiny random models.

`python benchmarks/peers.py` prints the table of the README; it takes seconds and needs the `bench` extra. A line that
PEFT comes to pass shows here as passed. Speed and memory against TRL are in `training.py`.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM

import kitout
from kitout.errors import KitoutError

VOCAB, WIDTH = 64, 32
BATCH = torch.tensor([[5, 9, 14, 33, 7], [8, 2, 40, 11, 19], [3, 3, 21, 60, 12]])
Row = tuple[str, Callable[[], str], Callable[[], str]]


def build(seed: int = 0, tied: bool = False) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def moved(module: Any, seed: int = 1) -> None:
    """Values off their start, so that every adapter has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            if value.requires_grad:
                value.add_(0.3 * torch.randn(value.shape, generator=generator).to(value.dtype))


def apart(a: torch.Tensor, b: torch.Tensor) -> str:
    return f"{float((a.float() - b.float()).abs().max()):.0e} apart"


def refusal(call: Callable[[], Any]) -> str:
    """What a call says when it is refused; "accepted" where it is not."""
    try:
        call()
    except Exception as error:
        return f"refused ({type(error).__name__})"
    return "accepted without a word"


@torch.no_grad()
def peft_rows() -> str:
    """Two IA3 adapters, one per row, against each alone."""
    model = get_peft_model(build(), IA3Config(task_type="CAUSAL_LM"), adapter_name="a")
    moved(model, 1)
    model.add_adapter("b", IA3Config(task_type="CAUSAL_LM"))
    model.set_adapter("b")
    moved(model, 2)
    alone = model(BATCH[:1]).logits
    model.set_adapter("a")
    together = model(BATCH[:2].flip(0), adapter_names=["a", "b"]).logits
    return apart(together[1:], alone)


@torch.no_grad()
def kitout_rows() -> str:
    """LoRA, IA3, prefix and prompt in one batch, against each alone."""
    kit = kitout.attach(build()).eval()
    methods = {"a": kitout.LoRA(), "b": kitout.IA3(), "c": kitout.PrefixTuning(length=3)}
    for seed, (name, method) in enumerate(methods.items()):
        moved(kit.add(name, method, seed=seed), seed)
    with kit.use(list(methods)):
        together = kit(BATCH).logits
    worst = torch.zeros(1)
    for row, name in enumerate(methods):
        with kit.use(name):
            worst = torch.maximum(worst, (kit(BATCH[row : row + 1]).logits - together[row]).abs().max())
    return f"{float(worst):.0e} apart, LoRA, IA3 and prefix in one batch"


def peft_kinds() -> str:
    model = get_peft_model(build(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), adapter_name="a")
    return refusal(lambda: model.add_adapter("b", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)))


@torch.no_grad()
def kitout_kinds() -> str:
    """Each, stacked and mixed, all in one batch."""
    kit = kitout.attach(build()).eval()
    for name, method in {"a": kitout.LoRA(), "b": kitout.PrefixTuning(length=3), "c": kitout.Houlsby()}.items():
        kit.add(name, method, seed=0)
    with kit.use(["b", kitout.Stack("a", "c"), kitout.Mix({"a": 0.5, "c": 0.5})]):
        kit(BATCH)
    return f"{len(kit.names)} kinds on one base, switched, stacked, mixed"


@torch.no_grad()
def peft_padding() -> str:
    """A prompt before a text that is padded on the left, against the text alone."""
    model = get_peft_model(build(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    moved(model)
    alone = model(input_ids=BATCH[:1], attention_mask=torch.ones(1, 5, dtype=torch.long)).logits[:, -1]
    return apart(_padded(model), alone)


@torch.no_grad()
def kitout_padding() -> str:
    kit = kitout.attach(build()).eval()
    moved(kit.add("a", kitout.PromptTuning(length=4), seed=0))
    kit.use("a")
    return apart(_padded(kit), kit(input_ids=BATCH[:1]).logits[:, -1])


def _padded(model: Any) -> torch.Tensor:
    ids = torch.cat((torch.zeros(1, 3, dtype=torch.long), BATCH[:1]), dim=1)
    mask = (torch.arange(8) >= 3).long()[None]
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits[:, -1]
    return logits


@torch.no_grad()
def peft_unmerge() -> str:
    model = get_peft_model(build().bfloat16(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    moved(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    for _ in range(10):
        model.merge_adapter()
        model.unmerge_adapter()
    drift = max(float((p.float() - before[n].float()).abs().max()) for n, p in model.named_parameters())
    return "bit-identical" if drift == 0 else f"weights {drift:.0e} off after 10 times, bf16"


@torch.no_grad()
def kitout_unmerge() -> str:
    kit = kitout.attach(build().bfloat16()).eval()
    moved(kit.add("a", kitout.LoRA(), seed=0))
    before = {n: p.clone() for n, p in kit.base.named_parameters()}
    for _ in range(10):
        kit.merge("a")
        kit.unmerge()
    same = all(torch.equal(p, before[n]) for n, p in kit.base.named_parameters())
    return "bit-identical after 10 times, bf16" if same else "not bit-identical"


@torch.no_grad()
def peft_sum() -> str:
    """The mean of two LoRAs against the mean of their changes."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4)
    model = get_peft_model(build(), config, adapter_name="a")
    moved(model, 1)
    model.add_adapter("b", config)
    model.set_adapter("b")
    moved(model, 2)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c", combination_type="linear")
    layer: Any = next(m for m in model.modules() if isinstance(m, LoraLayer))
    wanted = 0.5 * layer.get_delta_weight("a") + 0.5 * layer.get_delta_weight("b")
    off = float((layer.get_delta_weight("c") - wanted).norm() / wanted.norm())
    return f"{100 * off:.0f} % off the mean of the changes (linear)"


@torch.no_grad()
def kitout_sum() -> str:
    kit = kitout.attach(build().double()).eval()
    weights = {}
    for seed, name in enumerate(("a", "b")):
        moved(kit.add(name, kitout.LoRA(rank=4, targets="attn.q"), seed=seed), seed)
        weights[name] = _changes(kit, kit.merged_copy(name))
    mixed = _changes(kit, kit.merged_copy(kitout.Mix({"a": 0.5, "b": 0.5})))
    wanted = 0.5 * weights["a"] + 0.5 * weights["b"]
    return f"{float((mixed - wanted).norm() / wanted.norm()):.0e} relative"


def _changes(kit: Any, copy: Any) -> torch.Tensor:
    base = dict(kit.base.named_parameters())
    return torch.cat([(p - base[n]).flatten() for n, p in copy.named_parameters()])


def peft_other_base() -> str:
    with tempfile.TemporaryDirectory() as folder:
        get_peft_model(build(0), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(folder)
        return refusal(lambda: PeftModel.from_pretrained(build(1), folder))


def kitout_other_base() -> str:
    with tempfile.TemporaryDirectory() as folder:
        kit = kitout.attach(build(0))
        kit.add("a", kitout.LoRA(), seed=0)
        kit.save("a", Path(folder) / "a")
        return refusal(lambda: kitout.attach(build(1)).load(Path(folder) / "a"))


def peft_typo() -> str:
    target = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "vproj"])
    layer = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], layers_to_transform=[0, 99])
    return "; ".join(refusal(lambda config=config: get_peft_model(build(), config)) for config in (target, layer))


def kitout_typo() -> str:
    kit, lora = kitout.attach(build()), kitout.LoRA
    methods = (lambda: lora(targets="attn.q vproj"), lambda: lora(targets="attn.q", layers="0,99"))
    return "; ".join(refusal(lambda method=method: kit.add("a", method())) for method in methods)


def peft_frozen() -> str:
    with tempfile.TemporaryDirectory() as folder:
        get_peft_model(build(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(folder)
        model = PeftModel.from_pretrained(build(), folder, adapter_name="a")
        model.load_adapter(folder, adapter_name="b")
        before = sum(p.requires_grad for p in model.parameters())
        model.set_adapter("b")
        after = sum(p.requires_grad for p in model.parameters())
    return f"trainable tensors {before} -> {after} by switching"


def kitout_frozen() -> str:
    kit = kitout.attach(build())
    for name in ("a", "b"):
        kit.add(name, kitout.LoRA(), seed=0)
        kit[name].requires_grad_(False)
    kit.use("b")
    return f"trainable tensors 0 -> {sum(p.requires_grad for p in kit.parameters())} by switching"


@torch.no_grad()
def peft_tied() -> str:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])
    model = get_peft_model(build(tied=True), config)
    moved(model)
    attached = model(BATCH).logits
    return apart(model.merge_and_unload()(BATCH).logits, attached)


@torch.no_grad()
def kitout_tied() -> str:
    kit = kitout.attach(build(tied=True)).eval()
    moved(kit.add("a", kitout.LoRA(targets="head"), seed=0))
    kit.use("a")
    attached = kit(BATCH).logits
    return apart(kit.merged_copy("a", check_saveable=False)(BATCH).logits, attached)


ROWS: list[Row] = [
    ("rows of a batch with different adapters", peft_rows, kitout_rows),
    ("methods of different kinds on one base", peft_kinds, kitout_kinds),
    ("a soft prompt before a left-padded text, against the text alone", peft_padding, kitout_padding),
    ("merge and unmerge", peft_unmerge, kitout_unmerge),
    ("the mean of two LoRAs", peft_sum, kitout_sum),
    ("merging into a tied output head", peft_tied, kitout_tied),
    ("an adapter loaded on another base", peft_other_base, kitout_other_base),
    ("a misspelled target and a layer that is not there", peft_typo, kitout_typo),
    ("switching adapters of a frozen model", peft_frozen, kitout_frozen),
]


def table() -> str:
    """As Markdown."""
    head = f"| on a tiny random Llama | PEFT {peft.__version__} | kitout |\n|---|---|---|"
    return "\n".join([head, *(f"| {what} | {_quiet(theirs)} | {_quiet(ours)} |" for what, theirs, ours in ROWS)])


def _quiet(case: Callable[[], str]) -> str:
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        try:
            return case()
        except KitoutError:
            raise
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:80]}"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(table())
