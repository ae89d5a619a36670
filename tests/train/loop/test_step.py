"""One step is one sum: however it is cut, packed or retried, its gradients are those of a loss written by hand."""

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
from kitout.errors import ConfigError, PackingLeak
from kitout.train.loop.batch_plan import plan_batches
from kitout.train.loop.step import StepRunner, combine_seeds
from kitout.train.objectives.image_classification import ImageClassification
from kitout.train.objectives.objective import Objective
from kitout.train.objectives.seq2seq_lm import Seq2SeqLM
from kitout.train.objectives.sequence import SequenceClassification, SequenceTask
from kitout.train.objectives.token_classification import TokenClassification
from train import subprocess_runs as runs
from train.fixtures import ALL, add, causal, far, gradients, grads_of, job, kit_of, no_sync, texts, trained, values
from train.other_processes import run_in_processes
from zoo import IMAGE, LABELS, ZOO, D, out

HandLoss = Callable[[Kit, Any], Tensor]  # the loss of one example, summed, by the plain model


def ids_of(item: EncodedExample) -> dict[str, Tensor]:
    return {
        "input_ids": torch.tensor([item.input_ids]),
        "attention_mask": torch.ones(1, len(item.input_ids), dtype=torch.long),
    }


def of_text(kit: Kit, item: EncodedExample) -> Tensor:
    logits = kit(**ids_of(item)).logits[0, :-1]
    return F.cross_entropy(logits, torch.tensor(item.labels[1:]), ignore_index=IGNORE_INDEX, reduction="sum")


def of_target(kit: Kit, item: EncodedExample) -> Tensor:
    decoder_ids = torch.tensor([(kit.config.decoder_start_token_id, *item.target_ids[:-1])])
    logits = kit(**ids_of(item), decoder_input_ids=decoder_ids).logits[0]
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


def labeled_texts(kind: SequenceTask) -> list[EncodedExample]:
    rng = torch.Generator().manual_seed(0)
    values: dict[str, Callable[[], Any]] = {
        "classification": lambda: int(torch.randint(0, 3, (), generator=rng)),
        "regression": lambda: float(torch.randn((), generator=rng)),
        "multilabel": lambda: tuple(torch.randint(0, 2, (3,), generator=rng).float().tolist()),
    }
    return [EncodedExample(item.input_ids, label=values[kind]()) for item in texts(7)]


def source_and_target_texts() -> list[EncodedExample]:
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


def sequence_case(species: str, kind: SequenceTask) -> tuple[Kit, Objective, list[EncodedExample], HandLoss]:
    width = {"classification": 3, "regression": 1, "multilabel": 3}[kind]
    if species == "llama":
        kit, head, pad_token_id = kitout.attach(llama_classifier()).eval(), "score", 0
    else:
        kit, head, pad_token_id = kit_of(species), "classifier", ALL[species].pad_id
    add(kit, "low", LoRA(rank=2), heads={head: nn.Linear(D, width)})
    hand_losses: dict[str, HandLoss] = {"classification": of_class, "regression": of_number, "multilabel": of_several}
    return kit, SequenceClassification(kit, kind, pad_token_id), labeled_texts(kind), hand_losses[kind]


def llama_classifier() -> nn.Module:
    from transformers import LlamaForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(ZOO["llama"].build().config)


def case_of(kind: str) -> tuple[Kit, Objective, Sequence[Any], HandLoss]:
    objective_name, _, species = kind.partition(" ")
    if objective_name in ("classification", "regression", "multilabel"):
        return sequence_case(species, objective_name)  # type: ignore[arg-type]
    if objective_name == "tagging":
        kit = kitout.attach(AutoModelForTokenClassification.from_config(ZOO["bert"].build().config).float()).eval()
        add(kit, "low", LoRA(rank=2))
        return kit, TokenClassification(kit, 0), tagged(), of_tokens
    kit = kit_of(species)
    add(kit, "low", LoRA(rank=2, targets="all-linear"))
    if objective_name == "seq2seq":
        objective = Seq2SeqLM(kit, ALL[species].pad_id)
        with kit.use("low"):
            objective.choose_head_loss(["low"], source_and_target_texts())
        return kit, objective, source_and_target_texts(), of_target
    if objective_name == "images":
        return *image_case(kit), of_picture
    items = texts(7)
    return kit, causal(kit, ["low"], items, pack=30 if objective_name == "packed" else 0), items, of_text


class ScalingProcessor:
    """An image processor that only scales to 0..1."""

    size = None

    def __call__(self, pictures: Sequence[Any], **_: Any) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.stack([torch.tensor(np.array(p)).float().permute(2, 0, 1) / 255 for p in pictures])
        }


def image_case(kit: Kit) -> tuple[Kit, Objective, Sequence[int]]:
    rng = np.random.default_rng(0)
    pictures = tuple(rng.integers(0, 255, (IMAGE, IMAGE, 3), dtype=np.uint8) for _ in range(7))
    images = ImageSet(pictures, tuple(i % 3 for i in range(7)), ("a", "b", "c"), ("",) * 7, ("",) * 7)
    return (
        kit,
        ImageClassification(kit, images, PixelProcessor(ScalingProcessor(), augment=Augment(min_crop=0.5))),
        range(7),
    )


def of_picture(kit: Kit, item: int) -> Tensor:
    """With the augmentation of this step and example."""
    _, objective, _ = image_case(kit)
    batch = objective.collate([item], [combine_seeds(0, 0, item)])
    return F.cross_entropy(out(kit(batch.inputs["pixel_values"])), batch.targets["values"])


KINDS = [
    "causal llama", "causal gpt2", "causal gemma2", "packed llama", "packed gpt2", "seq2seq t5", "seq2seq bart",
    "classification bert", "classification llama", "regression bert", "multilabel distilbert", "tagging", "images vit",
    "images timm-vit",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_cut_in_any_way_equals_the_loss_written_by_hand(kind: str) -> None:
    kit, objective, items, hand_loss = case_of(kind)
    one = job("low", objective, items, steps=1, batch=7)
    for micro in (1, 3, 7):
        results = gradients(kit, [one], micro)
        if micro == 1:
            kit["low"].zero_grad()
            with kit.use("low"):
                (sum(hand_loss(kit, items[i]) for i in one.batches[0]) / one.num_targets(0)).backward()
            references = grads_of(kit, [one])
        assert far(results, references) <= 2e-6, f"micro {micro}"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("species", ["llama", "qwen3", "gpt2", "gpt-neox", "phi3", "gemma2"])
def test_packed_rows_give_the_gradients_of_single_ones(species: str, attention: str) -> None:
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
def test_methods_with_virtual_tokens_are_not_packed(method: Method) -> None:
    kit, items = kit_of("llama"), texts(9)
    add(kit, "front", method)
    with pytest.raises(PackingLeak):  # the position ids of packed rows leave no room for virtual tokens
        causal(kit, ["front"], items, pack=26)


@pytest.mark.parametrize("species", ["mpt", "opt", "falcon"])
def test_a_model_that_does_not_separate_packed_rows_is_refused(species: str) -> None:
    kit, items = kit_of(species), texts(9)
    add(kit, "low", LoRA(rank=2))
    with pytest.raises(PackingLeak, match=r"train\.packing=false"):
        causal(kit, ["low"], items, pack=26)


def test_a_mask_that_ignores_position_ids_is_noticed() -> None:
    kit, items = kit_of("llama"), texts(9)
    add(kit, "low", LoRA(rank=2))
    inner: Any = kit.base
    forward = inner.model.forward
    inner.model.forward = lambda **kwargs: forward(
        **kwargs | {"attention_mask": torch.ones_like(kwargs["input_ids"])}
    )  # a mask of ones: the row is one example
    with pytest.raises(PackingLeak):
        causal(kit, ["low"], items, pack=26)


# ---- out of memory ------------------------------------------------------------------------------------------


def test_a_run_that_ran_out_of_memory_is_bit_identical_to_one_of_smaller_batches(tmp_path: Any) -> None:
    def run(micro: int, max_rows: int) -> tuple[Kit, Any]:
        kit, items = kit_of("llama"), texts(12)
        add(kit, "low", LoRA(rank=2))
        one = job("low", causal(kit, ["low"], items), items, steps=3, batch=8)

        def fail_above_max_rows(_module: nn.Module, args: Any, kwargs: Any) -> None:
            if kwargs["input_ids"].shape[0] > max_rows:
                raise torch.OutOfMemoryError("CUDA out of memory")

        kit.base.register_forward_pre_hook(fail_above_max_rows, with_kwargs=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            loop = trained(kit, [one], tmp_path / str(micro), micro=micro)
        return kit, (loop, [str(w.message) for w in caught if w.category is RuntimeWarning])

    halved, (loop, messages) = run(8, 2)
    small, (other, no_messages) = run(2, 8)
    assert loop.step_runner.micro_batch_size == 2 == loop.step_runner.num_halvings
    assert messages == [f"out of memory: continuing with train.micro_batch_size={n}" for n in (4, 2)]
    assert no_messages == []
    assert all(
        torch.equal(a, b) for a, b in zip(values(halved, "low").values(), values(small, "low").values(), strict=True)
    )
    assert [r["loss"] for r in loop.state.log_history if "loss" in r] == [
        r["loss"] for r in other.state.log_history if "loss" in r
    ]
    assert (loop.step_runner.tokens, loop.step_runner.sums) == (other.step_runner.tokens, other.step_runner.sums)


def test_one_row_that_does_not_fit_is_an_error() -> None:
    kit, items = kit_of("llama"), texts(4)
    add(kit, "low", LoRA(rank=2))
    one = job("low", causal(kit, ["low"], items), items, steps=1)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    kit.base.register_forward_pre_hook(fail)
    warnings.simplefilter("ignore", RuntimeWarning)  # of each half; pytest puts the filters back
    with pytest.raises(torch.OutOfMemoryError):
        gradients(kit, [one], 4)


def test_another_error_is_not_taken_for_out_of_memory() -> None:
    kit, items = kit_of("llama"), texts(4)
    add(kit, "low", LoRA(rank=2))
    one = job("low", causal(kit, ["low"], items), items, steps=1)

    def fail(*_: Any) -> None:
        raise RuntimeError("shapes do not fit")

    kit.base.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        gradients(kit, [one], 4)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space")
def test_a_real_allocation_failure() -> None:
    (difference,) = run_in_processes(runs.train_out_of_memory)
    assert difference <= 5e-6


# ---- the plan ------------------------------------------------------------------------------------------------------


def test_a_mixture_is_sampled_by_weight_and_size() -> None:
    ranges = [range(100), range(100, 400)]
    batches = plan_batches([5] * 400, 10, 1000, seed=0, ranges=ranges, weights=[3.0, 1.0])
    sampled = [i for rows in batches for i in rows]
    assert abs(sum(i < 100 for i in sampled) / len(sampled) - 0.5) < 0.02
    first = [i for i in sampled if i < 100]
    assert {first.count(i) for i in range(100)} <= {len(first) // 100 + k for k in (-1, 0, 1, 2)}, "epoch by epoch"


def test_the_batches_follow_from_the_seed_and_group_lengths() -> None:
    sizes = [(7 * i) % 50 + 1 for i in range(320)]
    one, again, other = (plan_batches(sizes, 8, 40, seed) for seed in (0, 0, 1))
    assert one == again != other
    assert sorted(i for rows in one for i in rows) == list(range(320)), "one epoch: each exactly once"
    ranges = [max(sizes[i] for i in rows) - min(sizes[i] for i in rows) for rows in one]
    assert max(ranges) <= 10, "of 50"
    assert all(sizes[rows[0]] == max(sizes[i] for i in rows) for rows in one)
    assert len({sizes[rows[0]] // 10 for rows in one[:10]}) > 1, "not from short to long"


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(ConfigError, match="a training set has no examples"):
        plan_batches([], 2, 1, 0)
    with pytest.raises(ConfigError, match=r"\[3, 0\]"):
        plan_batches([1, 2, 3], 2, 1, 0, ranges=[range(3), range(3, 3)])


def test_processor_seconds_add_up_over_a_resume() -> None:
    kit, items = kit_of("llama"), texts(8)
    add(kit, "low", LoRA(rank=2))
    one = job("low", causal(kit, ["low"], items), items, steps=2)
    rows = [(0, i) for i in one.batches[0]]
    first = StepRunner(kit, [one], 4)
    first.step(kit, rows, 0, Tensor.backward, no_sync)
    assert first.processor_seconds > 0
    again = StepRunner(kit, [one], 4)
    again.restore(first.state())
    assert again.processor_seconds == first.processor_seconds
    kit["low"].zero_grad()
    again.step(kit, rows, 0, Tensor.backward, no_sync)
    assert again.processor_seconds > first.processor_seconds
