"""One step is one sum: however it is cut, packed or retried, its gradients are those of a loss written out by hand."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification

import kitout
from kitout import Kit, LoRA, Method, PrefixTuning, PromptTuning
from kitout.data.encode.item import IGNORE_INDEX, EncodedExample
from kitout.data.images.augment import Augment
from kitout.data.images.image_set import ImageSet
from kitout.data.images.pixels import PixelProcessor
from kitout.errors import ConfigError
from kitout.train.loop.batch_plan import plan_batches
from kitout.train.loop.step import StepRunner, combine_seeds
from kitout.train.objectives.causal_lm import PackingLeak
from kitout.train.objectives.image_classification import ImageClassification
from kitout.train.objectives.objective import Objective
from kitout.train.objectives.seq2seq_lm import Seq2SeqLM
from kitout.train.objectives.sequence import SequenceClassification, SequenceTask
from kitout.train.objectives.token_classification import TokenClassification
from train import subprocess_runs as runs
from train.fixtures import ALL, add, causal, far, gradients, grads_of, job, kit_of, nothing, texts, trained, values
from train.other_processes import apart
from zoo import IMAGE, LABELS, ZOO, D, out

Hand = Callable[[Kit, Any], Tensor]  # the loss of one example, summed, by the plain model


def ids_of(item: EncodedExample) -> dict[str, Tensor]:
    return {
        "input_ids": torch.tensor([item.input_ids]),
        "attention_mask": torch.ones(1, len(item.input_ids), dtype=torch.long),
    }


def of_text(kit: Kit, item: EncodedExample) -> Tensor:
    logits = kit(**ids_of(item)).logits[0, :-1]
    return F.cross_entropy(logits, torch.tensor(item.labels[1:]), ignore_index=IGNORE_INDEX, reduction="sum")


def of_target(kit: Kit, item: EncodedExample) -> Tensor:
    read = torch.tensor([(kit.config.decoder_start_token_id, *item.target_ids[:-1])])
    logits = kit(**ids_of(item), decoder_input_ids=read).logits[0]
    return F.cross_entropy(logits, torch.tensor(item.target_ids), reduction="sum")


def of_class(kit: Kit, item: EncodedExample) -> Tensor:
    return F.cross_entropy(kit(**ids_of(item)).logits, torch.tensor([item.label]))


def of_number(kit: Kit, item: EncodedExample) -> Tensor:
    return (kit(**ids_of(item)).logits[0, 0] - item.label) ** 2


def of_several(kit: Kit, item: EncodedExample) -> Tensor:
    return F.binary_cross_entropy_with_logits(kit(**ids_of(item)).logits[0], torch.tensor(item.label))


def of_tokens(kit: Kit, item: EncodedExample) -> Tensor:
    logits = kit(**ids_of(item)).logits[0]
    return F.cross_entropy(logits, torch.tensor(item.labels), ignore_index=IGNORE_INDEX, reduction="sum")


def valued(kind: SequenceTask) -> list[EncodedExample]:
    draw = torch.Generator().manual_seed(0)
    values: dict[str, Callable[[], Any]] = {
        "classification": lambda: int(torch.randint(0, 3, (), generator=draw)),
        "regression": lambda: float(torch.randn((), generator=draw)),
        "multilabel": lambda: tuple(torch.randint(0, 2, (3,), generator=draw).float().tolist()),
    }
    return [EncodedExample(item.input_ids, label=values[kind]()) for item in texts(7)]


def targeted() -> list[EncodedExample]:
    return [
        EncodedExample(item.input_ids, target_ids=other.input_ids[:5])
        for item, other in zip(texts(7), texts(7, seed=1), strict=True)
    ]


def tagged() -> list[EncodedExample]:
    return [
        EncodedExample(
            item.input_ids, tuple(IGNORE_INDEX if i % 3 == 0 else i % LABELS for i in range(len(item.input_ids)))
        )
        for item in texts(7)
    ]


def labelled(species: str, kind: SequenceTask) -> tuple[Kit, Objective, list[EncodedExample], Hand]:
    width = {"classification": 3, "regression": 1, "multilabel": 3}[kind]
    if species == "llama":
        kit, head, filler = kitout.attach(llama_classifier()).eval(), "score", 0
    else:
        kit, head, filler = kit_of(species), "classifier", ALL[species].pad_id
    add(kit, "low", LoRA(rank=2), heads={head: nn.Linear(D, width)})
    hand: dict[str, Hand] = {"classification": of_class, "regression": of_number, "multilabel": of_several}
    return kit, SequenceClassification(kit, kind, filler), valued(kind), hand[kind]


def llama_classifier() -> nn.Module:
    from transformers import LlamaForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(ZOO["llama"].build().config)


def made(kind: str) -> tuple[Kit, Objective, Sequence[Any], Hand]:
    form, _, species = kind.partition(" ")
    if form in ("classification", "regression", "multilabel"):
        return labelled(species, form)  # type: ignore[arg-type]
    if form == "tagging":
        kit = kitout.attach(AutoModelForTokenClassification.from_config(ZOO["bert"].build().config).float()).eval()
        add(kit, "low", LoRA(rank=2))
        return kit, TokenClassification(kit, 0), tagged(), of_tokens
    kit = kit_of(species)
    add(kit, "low", LoRA(rank=2, targets="all-linear"))
    if form == "seq2seq":
        objective = Seq2SeqLM(kit, ALL[species].pad_id)
        with kit.use("low"):
            objective.choose_head_loss(["low"], targeted())
        return kit, objective, targeted(), of_target
    if form == "images":
        return *pictured(kit), of_picture
    items = texts(7)
    return kit, causal(kit, ["low"], items, pack=30 if form == "packed" else 0), items, of_text


class Plain:
    """A processor that has nothing to do."""

    size = None

    def __call__(self, pictures: Sequence[Any], **_: Any) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.stack([torch.tensor(np.array(p)).float().permute(2, 0, 1) / 255 for p in pictures])
        }


def pictured(kit: Kit) -> tuple[Kit, Objective, Sequence[int]]:
    draw = np.random.default_rng(0)
    pictures = tuple(draw.integers(0, 255, (IMAGE, IMAGE, 3), dtype=np.uint8) for _ in range(7))
    images = ImageSet(pictures, tuple(i % 3 for i in range(7)), ("a", "b", "c"), ("",) * 7, ("",) * 7)
    return kit, ImageClassification(kit, images, PixelProcessor(Plain(), augment=Augment(min_crop=0.5))), range(7)


def of_picture(kit: Kit, item: int) -> Tensor:
    """As the seed of this step and example changes it."""
    _, objective, _ = pictured(kit)
    batch = objective.collate([item], [combine_seeds(0, 0, item)])
    return F.cross_entropy(out(kit(batch.inputs["pixel_values"])), batch.targets["values"])


KINDS = [
    "causal llama", "causal gpt2", "causal gemma2", "packed llama", "packed gpt2", "seq2seq t5", "seq2seq bart",
    "classification bert", "classification llama", "regression bert", "multilabel distilbert", "tagging", "images vit",
    "images timm-vit",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_however_cut_a_step_is_the_loss_written_by_hand(kind: str) -> None:
    kit, objective, items, hand = made(kind)
    one = job("low", objective, items, steps=1, batch=7)
    for micro in (1, 3, 7):
        found = gradients(kit, [one], micro)
        if micro == 1:
            kit["low"].zero_grad()
            with kit.use("low"):
                (sum(hand(kit, items[i]) for i in one.batches[0]) / one.num_targets(0)).backward()
            wanted = grads_of(kit, [one])
        assert far(found, wanted) <= 2e-6, f"micro {micro}"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("species", ["llama", "qwen3", "gpt2", "gpt-neox", "phi3", "gemma2"])
def test_packed_rows_learn_what_single_ones_learn(species: str, attention: str) -> None:
    if species == "gemma2" and attention == "sdpa":
        pytest.skip("transformers has none for it")
    kit, items = kit_of(species, attention), texts(9)
    add(kit, "low", LoRA(rank=2, targets="all-linear"))
    packed = job("low", causal(kit, ["low"], items, pack=26), items, steps=1, batch=9)
    batch = packed.objective.collate(items, None)
    assert batch.inputs["input_ids"].shape[0] < len(items) == batch.num_examples
    alone = job("low", causal(kit, ["low"], items), items, steps=1, batch=9)
    assert far(gradients(kit, [packed], 9), gradients(kit, [alone], 9)) <= 1e-6


@pytest.mark.parametrize("method", [PromptTuning(length=3), PrefixTuning(length=3)], ids=["prompt", "prefix"])
def test_what_stands_in_front_of_a_text_is_not_packed(method: Method) -> None:
    kit, items = kit_of("llama"), texts(9)
    add(kit, "front", method)
    with pytest.raises(PackingLeak):  # given positions are those of texts that nothing stands in front of
        causal(kit, ["front"], items, pack=26)


@pytest.mark.parametrize("species", ["mpt", "opt", "falcon"])
def test_a_model_that_does_not_part_packed_rows_is_refused(species: str) -> None:
    kit, items = kit_of(species), texts(9)
    add(kit, "low", LoRA(rank=2))
    with pytest.raises(PackingLeak, match=r"train\.packing=false"):
        causal(kit, ["low"], items, pack=26)


def test_a_mask_that_forgets_positions_is_noticed() -> None:
    kit, items = kit_of("llama"), texts(9)
    add(kit, "low", LoRA(rank=2))
    inner: Any = kit.base
    forward = inner.model.forward
    inner.model.forward = lambda **asked: forward(
        **asked | {"attention_mask": torch.ones_like(asked["input_ids"])}
    )  # a mask of ones says: all of one piece
    with pytest.raises(PackingLeak):
        causal(kit, ["low"], items, pack=26)


# ---- memory that runs out ------------------------------------------------------------------------------------------


def test_after_memory_ran_out_the_run_is_the_one_of_smaller_batches_bit_for_bit(tmp_path: Any) -> None:
    def run(micro: int, most: int) -> tuple[Kit, Any]:
        kit, items = kit_of("llama"), texts(12)
        add(kit, "low", LoRA(rank=2))
        one = job("low", causal(kit, ["low"], items), items, steps=3, batch=8)

        def full(_module: nn.Module, args: Any, kwargs: Any) -> None:
            if kwargs["input_ids"].shape[0] > most:
                raise torch.OutOfMemoryError("CUDA out of memory")

        kit.base.register_forward_pre_hook(full, with_kwargs=True)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", RuntimeWarning)
            loop = trained(kit, [one], tmp_path / str(micro), micro=micro)
        return kit, (loop, [str(w.message) for w in told if w.category is RuntimeWarning])

    halved, (loop, told) = run(8, 2)
    small, (other, silent) = run(2, 8)
    assert loop.work.micro == 2 == loop.work.halved
    assert told == [f"memory ran out: going on with train.micro_batch_size={n}" for n in (4, 2)]
    assert silent == []
    assert all(
        torch.equal(a, b) for a, b in zip(values(halved, "low").values(), values(small, "low").values(), strict=True)
    )
    assert [r["loss"] for r in loop.state.log_history if "loss" in r] == [
        r["loss"] for r in other.state.log_history if "loss" in r
    ]
    assert (loop.work.tokens, loop.work.sums) == (other.work.tokens, other.work.sums)


def test_one_row_that_does_not_fit_is_an_error() -> None:
    kit, items = kit_of("llama"), texts(4)
    add(kit, "low", LoRA(rank=2))
    one = job("low", causal(kit, ["low"], items), items, steps=1)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    kit.base.register_forward_pre_hook(full)
    warnings.simplefilter("ignore", RuntimeWarning)  # of each half; pytest puts the filters back
    with pytest.raises(torch.OutOfMemoryError):
        gradients(kit, [one], 4)


def test_another_error_is_not_taken_for_memory() -> None:
    kit, items = kit_of("llama"), texts(4)
    add(kit, "low", LoRA(rank=2))
    one = job("low", causal(kit, ["low"], items), items, steps=1)

    def wrong(*_: Any) -> None:
        raise RuntimeError("shapes do not fit")

    kit.base.register_forward_pre_hook(wrong)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        gradients(kit, [one], 4)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space")
def test_memory_that_really_runs_out() -> None:
    (off,) = apart(runs.out_of_memory)
    assert off <= 5e-6


# ---- the plan ------------------------------------------------------------------------------------------------------


def test_a_mixture_is_drawn_by_weight_and_size() -> None:
    sets = [range(100), range(100, 400)]
    order = plan_batches([5] * 400, 10, 1000, seed=0, ranges=sets, weights=[3.0, 1.0])
    drawn = [i for rows in order for i in rows]
    assert abs(sum(i < 100 for i in drawn) / len(drawn) - 0.5) < 0.02
    first = [i for i in drawn if i < 100]
    assert {first.count(i) for i in range(100)} <= {len(first) // 100 + k for k in (-1, 0, 1, 2)}, "epoch by epoch"


def test_the_plan_follows_from_its_seed_and_groups_lengths() -> None:
    sizes = [(7 * i) % 50 + 1 for i in range(320)]
    one, again, other = (plan_batches(sizes, 8, 40, seed) for seed in (0, 0, 1))
    assert one == again != other
    assert sorted(i for rows in one for i in rows) == list(range(320)), "one epoch: each exactly once"
    spread = [max(sizes[i] for i in rows) - min(sizes[i] for i in rows) for rows in one]
    assert max(spread) <= 10, "of 50"
    assert all(sizes[rows[0]] == max(sizes[i] for i in rows) for rows in one)
    assert len({sizes[rows[0]] // 10 for rows in one[:10]}) > 1, "not from short to long"


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(ConfigError, match="without an example"):
        plan_batches([], 2, 1, 0)
    with pytest.raises(ConfigError, match=r"\[3, 0\]"):
        plan_batches([1, 2, 3], 2, 1, 0, ranges=[range(3), range(3, 3)])


def test_processor_seconds_add_up_over_a_resume() -> None:
    kit, items = kit_of("llama"), texts(8)
    add(kit, "low", LoRA(rank=2))
    one = job("low", causal(kit, ["low"], items), items, steps=2)
    rows = [(0, i) for i in one.batches[0]]
    first = StepRunner(kit, [one], 4)
    first.step(kit, rows, 0, Tensor.backward, nothing)
    assert first.processor_seconds > 0
    again = StepRunner(kit, [one], 4)
    again.restore(first.state())
    assert again.processor_seconds == first.processor_seconds
    kit["low"].zero_grad()
    again.step(kit, rows, 0, Tensor.backward, nothing)
    assert again.processor_seconds > first.processor_seconds
