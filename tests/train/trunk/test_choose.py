"""Text runs whose frozen trunk is kept: losses and gradients are those of the whole model; where it is off, and why."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import kitout
from kitout import IA3, Kit, LoRA, PartialFineTuning, PrefixTuning, PromptTuning
from kitout.data.encode.item import EncodedExample
from kitout.train.loop.jobs import Job
from kitout.train.measure.predict import predict
from kitout.train.objectives.objective import Objective
from kitout.train.objectives.seq2seq_lm import Seq2SeqLM
from kitout.train.objectives.sequence import SequenceClassification
from kitout.train.trunk import choose, kept_inputs
from kitout.train.trunk.choose import TrunkChoice, choose_trunk
from train.fixtures import ALL, add, causal, far, gradients, job, kit_of, loop_of, losses, texts, trained

pytest.importorskip("accelerate")

# One of each kind: rotary, learned and bucketed positions, tuples passed on, both kinds of head, experts, state space.
SPECIES = ("llama-tied", "gptj", "bert", "bart", "jamba")


@pytest.fixture(autouse=True)
def no_clock_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "MAX_RATIO", float("inf"))


def examples(kit: Kit, number: int = 12, seed: int = 0) -> list[EncodedExample]:
    """As the kit's kind of model takes them."""
    items, rng = texts(number, seed), random.Random(seed)
    if kit.config.is_encoder_decoder:
        return [replace(item, labels=(), target_ids=item.input_ids[: rng.randint(2, 5)]) for item in items]
    if kit.survey.towers[0].causal is False:
        return [replace(item, labels=(), label=rng.randrange(5)) for item in items]
    return items


def objective_of(kit: Kit, names: Sequence[str], items: Sequence[EncodedExample], pack: int = 0) -> Objective:
    pad_id = kit.config.pad_token_id or 0
    if kit.config.is_encoder_decoder:
        return Seq2SeqLM(kit, pad_id)
    return causal(kit, names, items, pack) if items[0].labels else SequenceClassification(kit, "classification", pad_id)


def jobs_of(kit: Kit, methods: dict[str, Any], pack: int = 0, **settings: Any) -> list[Job]:
    items = examples(kit)
    for seed, (name, method) in enumerate(methods.items()):
        add(kit, name, method, seed=seed)
    objective = objective_of(kit, list(methods), items, pack)
    settings = {"trunk": "auto", "steps": 8} | settings
    return [job(name, objective, items, seed=3 + k, **settings) for k, name in enumerate(methods)]


def chosen(kit: Kit, jobs: Sequence[Job], folder: Path, evaluated: Any = None) -> TrunkChoice:
    return choose_trunk(
        kit, jobs, evaluated or [[] for _ in jobs], folder=folder, signature="run", micro_batch_size=4
    )  # fmt: skip


class BlockCounter:
    """Counts the rows that go through a model's first block."""

    def __init__(self, kit: Kit) -> None:
        self.rows = 0
        block = kit.base.get_submodule(kit.survey.blocks[0].path)
        modules = [module for module in block.modules() if isinstance(module, torch.nn.Linear)]
        modules[0].register_forward_hook(lambda _module, args, _output: self._add(args[0]))

    def _add(self, h: torch.Tensor) -> None:
        self.rows += h.shape[0]


@pytest.mark.parametrize("species", SPECIES)
def test_steps_are_those_of_the_whole_model(species: str, tmp_path: Path) -> None:
    kit = kit_of(species)
    jobs = jobs_of(kit, {"a": LoRA(rank=2, layers="last:1")})
    references = [gradients(kit, jobs, 3, step) for step in (0, 1)]
    choice = chosen(kit, jobs, tmp_path)
    assert choice.cuts, choice.text
    for _ in range(2):  # recorded, and then kept
        for step in (0, 1):
            assert far(gradients(kit, jobs, 3, step), references[step]) < 1e-6
    assert not [module for module in kit.base.modules() if "forward" in module.__dict__]


@pytest.mark.parametrize(
    ("method", "cut"),
    [
        (PartialFineTuning(last=1), "model.layers.1"),
        (PartialFineTuning(part="head"), "lm_head"),
        (LoRA(rank=2, targets="mlp.down", layers="last:1", dropout=0.3), "model.layers.1"),
    ],
)
def test_the_cut_is_the_first_changed_block(method: Any, cut: str, tmp_path: Path) -> None:
    """Dropout above the cut draws what it draws without."""
    kit = kit_of("llama")
    jobs = jobs_of(kit, {"a": method})
    reference = gradients(kit, jobs, 4)
    assert chosen(kit, jobs, tmp_path).cuts == {"a": cut}
    assert far(gradients(kit, jobs, 4), reference) < 1e-6


def deep_t5() -> transformers.T5ForConditionalGeneration:
    config = ALL["t5"].build().config
    config.num_layers = config.num_decoder_layers = 4
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("memory_share", [0.0, 0.25])
def test_what_is_kept_has_the_dtype_of_the_hidden_states(
    memory_share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers keeps a projection of T5 in float32 beside float16, so blocks hand on float32, and larger values."""
    monkeypatch.setattr(choose, "MEMORY_SHARE", memory_share)
    model = deep_t5().half()
    for path, module in model.named_modules():
        if path.endswith(".wo"):
            module.float()
    with torch.no_grad():
        model.encoder.block[0].layer[-1].DenseReluDense.wo.weight.mul_(1e7)  # beyond what float16 can hold
    kit = kitout.attach(model)
    jobs = jobs_of(kit, {"a": LoRA(rank=2, targets="decoder.block.3.*.q")})
    reference = gradients(kit, jobs, 4)
    assert chosen(kit, jobs, tmp_path).cuts
    assert [point.dtype for point in kept_inputs._kept[kit].entry.points] == [torch.float32, torch.float32]
    for _ in range(2):  # recorded, and then kept
        assert far(gradients(kit, jobs, 4), reference) < 1e-3


def test_positions_of_deep_relative_attention_come_from_the_first_block(tmp_path: Path) -> None:
    kit = kitout.attach(deep_t5())
    jobs = jobs_of(kit, {"a": LoRA(rank=2, layers="last:1"), "b": LoRA(rank=2, targets="decoder.block.3.*.q")})
    reference = gradients(kit, jobs, 4)
    assert chosen(kit, jobs[:1], tmp_path).cuts == {"a": "encoder.block.3"}
    (both,) = kept_inputs._kept[kit].entry.points
    assert list(both.skipped) == ["encoder.block.1", "encoder.block.2"]  # the first gives the others their bias
    assert far(gradients(kit, jobs[:1], 4), {k: v for k, v in reference.items() if k[0] == "a"}) < 1e-6
    assert chosen(kit, jobs[1:], tmp_path).cuts == {"b": "decoder.block.3"}
    assert [point.source for point in kept_inputs._kept[kit].entry.points] == ["encoder.block.3", "decoder.block.2"]
    assert far(gradients(kit, jobs[1:], 4), {k: v for k, v in reference.items() if k[0] == "b"}) < 1e-6


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_runs_have_the_same_losses(dtype: torch.dtype, checkpointing: bool, tmp_path: Path) -> None:
    curves = []
    for trunk in ("off", "auto"):
        kit = kit_of("llama", dtype=dtype)
        jobs = jobs_of(kit, {"a": LoRA(rank=2, layers="last:1")}, trunk=trunk, activation_checkpointing=checkpointing)
        assert bool(chosen(kit, jobs, tmp_path).cuts) == (trunk == "auto")
        loop = trained(kit, jobs, tmp_path / trunk, gradient_checkpointing=checkpointing)
        curves.append(losses(loop))
    assert curves[0] == pytest.approx(curves[1], rel=1e-6 if dtype == torch.float32 else 1e-2)
    assert curves[0][-1] < curves[0][0]


def test_packed_rows_enter_at_their_places(tmp_path: Path) -> None:
    kit = kit_of("llama", "sdpa")
    jobs = jobs_of(kit, {"a": LoRA(rank=2, layers="last:1")}, pack=24)
    reference = gradients(kit, jobs, 4)
    assert chosen(kit, jobs, tmp_path).cuts
    assert far(gradients(kit, jobs, 4), reference) < 1e-6


def test_jobs_share_what_is_kept_and_so_do_their_evaluations(tmp_path: Path) -> None:
    """The lowest block that any of them changes; every example passes the trunk once."""
    kit = kit_of("llama")
    jobs = jobs_of(kit, {"a": LoRA(rank=2, layers="last:1"), "b": IA3(layers="last:1")})
    validation = examples(kit, 7, seed=5)
    references = gradients(kit, jobs, 8)
    with kit.use("a"):
        expected = predict(kit, jobs[0].objective, validation)
    counter = BlockCounter(kit)
    choice = chosen(kit, jobs, tmp_path, [[validation], [validation]])
    assert choice.cuts == dict.fromkeys("ab", "model.layers.1")
    counter.rows = 0
    for _ in range(2):
        assert far(gradients(kit, jobs, 8), references) < 1e-6
    used = {i for one in jobs for i in one.batches[0]}
    recorded = sum(
        len(group)
        for _, group in kept_inputs._kept[kit].groups
        if used & {jobs[0].examples.index(i) for i in group if i in jobs[0].examples}
    )
    assert counter.rows == recorded
    for name in ("a", "b", None):
        with kit.use(name):
            found = predict(kit, jobs[0].objective, validation)
        if name == "a":
            assert [sums.loss for sums in found.losses] == pytest.approx([s.loss for s in expected.losses], rel=1e-5)
    assert counter.rows == recorded + len(validation)
    kept_inputs.forget(kit)
    gradients(kit, jobs, 8)
    assert counter.rows > recorded + len(validation)


@pytest.mark.parametrize("memory_share", [0.0, 0.25])
def test_what_has_no_room_is_computed_again(
    memory_share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "MEMORY_SHARE", memory_share)
    kit = kit_of("llama")
    jobs = jobs_of(kit, {"a": LoRA(rank=2, layers="last:1")}, trunk_bytes=8000)
    references = [gradients(kit, jobs, 4, step) for step in (0, 1, 2)]
    choice = chosen(kit, jobs, tmp_path)
    assert "others have no room (train.trunk_bytes)" in choice.text
    assert 0 < len(kept_inputs._kept[kit].store.slots) < 12
    for step in (0, 1, 2, 0, 1, 2):
        assert far(gradients(kit, jobs, 4, step), references[step % 3]) < 1e-6
    file = tmp_path / choose.FILE
    assert file.exists() == (memory_share == 0)
    assert not file.exists() or file.stat().st_size < 8500
    kept_inputs.forget(kit)
    assert not file.exists()


@pytest.mark.parametrize("file", ["kept", "damaged", "gone"])
def test_a_resumed_run_ends_with_the_same_bits(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """With the file of the first process, as far as it is whole, or without it."""
    monkeypatch.setattr(choose, "MEMORY_SHARE", 0.0)

    def values_after(folder: Path, checkpoint: str | None) -> dict[str, torch.Tensor]:
        kit = kit_of("llama")
        jobs = jobs_of(kit, {"a": LoRA(rank=2, layers="last:1")})
        assert chosen(kit, jobs, tmp_path).cuts
        loop = loop_of(kit, jobs, folder, run_id="one", save_strategy="steps", save_steps=2, num_checkpoints=9)
        loop.train(checkpoint)
        return {key: value.clone() for key, value in loop.trained_tensors().items()}

    whole = values_after(tmp_path / "run", None)
    trunk = tmp_path / choose.FILE
    if file == "damaged":
        content = trunk.read_bytes()
        trunk.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    elif file == "gone":
        trunk.unlink()
    resumed = values_after(tmp_path / "run", str(tmp_path / "run" / "checkpoint-2"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def refusals() -> Iterator[tuple[str, Any, dict[str, Any], str]]:
    last = LoRA(rank=2, layers="last:1")
    yield "llama", LoRA(rank=2), {}, "no block runs before model.layers.0"
    yield "llama", PromptTuning(length=2), {}, "virtual tokens"
    yield "llama", PrefixTuning(length=2, layers="last:1"), {}, "virtual tokens"
    yield "llama", last, {"trunk_bytes": 100}, "train.trunk_bytes=100 has no room for one example"
    yield "llama", last, {"steps": 2}, "no example is trained on twice"
    yield "albert", last, {}, "no block runs before"
    yield "t5", last, {}, "are not those of the whole model"


@pytest.mark.parametrize(("species", "method", "settings", "reason"), list(refusals()))
def test_it_is_off_with_the_reason(
    species: str, method: Any, settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    kit = kit_of(species)
    jobs = jobs_of(kit, {"a": method}, **settings)
    choice = chosen(kit, jobs, tmp_path)
    assert choice.cuts == {}
    assert choice.text.startswith("off: ")
    assert reason in choice.text
    assert not list(tmp_path.iterdir())


def test_it_is_off_where_it_was_not_asked_for_or_pays_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = kit_of("llama")
    jobs = jobs_of(kit, {"a": LoRA(rank=2, layers="last:1"), "b": LoRA(rank=2, layers="last:1")})
    off = replace(jobs[1], settings=jobs[1].settings.model_copy(update={"trunk": "off"}))
    assert chosen(kit, [off], tmp_path) == TrunkChoice()
    assert "b has train.trunk=off" in chosen(kit, [jobs[0], off], tmp_path).text
    monkeypatch.setattr(choose, "MAX_RATIO", 0.0)
    assert "which is no gain" in chosen(kit, jobs, tmp_path).text
    again = choose_trunk(
        kit, jobs, [[], []], folder=tmp_path, signature="run", micro_batch_size=4, chosen="off: as it was"
    )  # fmt: skip
    assert again.text == "off: as it was"
