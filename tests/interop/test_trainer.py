"""transformers.Trainer, Seq2SeqTrainer and accelerate around a kit, as they come: loss, metrics, files, resuming.

Everything goes by `Trainer(model=kit)`: no subclass, no callback, no argument that a plain model would not need.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import kitout
from interop.fixtures import ARGUMENTS, LabeledRows, bits, checkpoint, same
from kitout import IA3, Kit, LoRA, PrefixTuning
from kitout.errors import ConfigError, FileError
from laws.activate import run
from zoo import VOCAB, ZOO, D, randomize_model

pytest.importorskip("accelerate")
FAMILIES = ["llama", "gpt2", "bert", "t5", "bart", "vit"]


def trainer_of(kit: nn.Module, folder: Path, rows: Any, cls: Any = transformers.Trainer, **settings: Any) -> Any:
    arguments = transformers.Seq2SeqTrainingArguments if cls is transformers.Seq2SeqTrainer else None
    extra = {name: settings.pop(name) for name in ("compute_metrics",) if name in settings}
    args = (arguments or transformers.TrainingArguments)(output_dir=str(folder), **{**ARGUMENTS, **settings})
    return cls(model=kit, args=args, train_dataset=rows, eval_dataset=rows, **extra)


def trained_kit(species: str, method: Any = None) -> Kit:
    kit = kitout.attach(ZOO[species].build())
    kit.add("a", method or LoRA(rank=2), seed=1)
    kit.use("a")
    return kit


@pytest.mark.parametrize("species", FAMILIES)
def test_evaluates_trains_and_saves_an_adapter_folder(species: str, tmp_path: Path) -> None:
    """eval_loss and compute_metrics need the labels that Trainer finds by the class; the folder loads."""
    kit, rows = trained_kit(species), LabeledRows(ZOO[species])
    trainer = trainer_of(
        kit, tmp_path, rows, max_steps=3, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, compute_metrics=lambda p: {"rows": len(p.label_ids)},
    )  # fmt: skip
    before = trainer.evaluate()
    assert {"eval_loss", "eval_rows"} <= set(before)
    assert before["eval_rows"] == len(rows)
    bare = trainer_of(ZOO[species].build(), tmp_path, rows).evaluate()
    assert before["eval_loss"] == pytest.approx(bare["eval_loss"], rel=1e-5)  # a new adapter is the identity
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)
    assert trainer.state.best_metric < before["eval_loss"]
    trainer.save_model(str(tmp_path / "final"))
    other = kitout.attach(ZOO[species].build())
    other.load(tmp_path / "final", name="again")
    other.load(checkpoint(tmp_path, trainer.state.best_global_step))  # every checkpoint is one as well
    assert same(bits(other, "again"), bits(kit, "a"))
    batch = ZOO[species].batch(2, 0)
    with other.use("again"), kit.use("a"):
        assert torch.equal(run(other, batch), run(kit, batch))


@pytest.mark.parametrize("method", [LoRA(rank=2, dropout=0.3), PrefixTuning(length=3, encoder=8), IA3()], ids=repr)
def test_a_checkpoint_of_trainer_resumes_bit_for_bit(method: Any, tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "seed": 5}
    kit, rows = trained_kit("llama", method), LabeledRows(ZOO["llama"])
    trainer_of(kit, tmp_path, rows, **settings).train()
    again = trained_kit("llama", method)
    trainer_of(again, tmp_path, rows, **settings).train(resume_from_checkpoint=checkpoint(tmp_path, 2))
    assert same(bits(again, "a"), bits(kit, "a"))
    assert not same(bits(again, "a"), bits(trained_kit("llama", method), "a"))


@pytest.mark.parametrize("species", ["llama", "gpt2", "bert"])
def test_what_trainer_reads_from_the_class_is_the_models_own(species: str, tmp_path: Path) -> None:
    """Label smoothing shifts by class name, items are counted by loss type: the losses equal the bare model's."""
    rows = LabeledRows(ZOO[species])
    losses = []
    for attach in (False, True):
        model: nn.Module = ZOO[species].build()
        if attach:
            model = kitout.attach(model)
            model.add("a", IA3(), seed=1)
            model.use("a")
        trainer = trainer_of(
            model, tmp_path, rows, max_steps=1, label_smoothing_factor=0.3, gradient_accumulation_steps=2,
        )  # fmt: skip
        losses.append((trainer.evaluate()["eval_loss"], trainer.train().training_loss))
        losses[-1] += (trainer.label_names, trainer.model_accepts_loss_kwargs, trainer._loss_shifts_labels)
    assert losses[0][2:] == losses[1][2:]
    assert losses[0][:2] == pytest.approx(losses[1][:2], rel=1e-5)


def test_question_answering_has_its_labels(tmp_path: Path) -> None:
    """Their names are known by the name of the class alone."""
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=D, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80
    )
    kit = kitout.attach(randomize_model(transformers.BertForQuestionAnswering(config), 0))
    kit.add("a", LoRA(rank=2), seed=1)
    kit.use("a")
    batch = ZOO["bert"].batch(4, 0)
    ends = torch.arange(4)
    rows = [{**{k: v[i] for k, v in batch.items()}, "start_positions": ends[i], "end_positions": ends[i]} for i in ends]
    trainer = trainer_of(kit, tmp_path, rows, max_steps=1)
    assert trainer.label_names == ["start_positions", "end_positions"]
    trainer.train()
    assert "eval_loss" in trainer.evaluate()


@pytest.mark.parametrize("species", ["t5", "bart"])
def test_seq2seq_trainer_generates(species: str, tmp_path: Path) -> None:
    """What it generates is the bare model's, until the adapter is trained."""
    kit, rows = trained_kit(species), LabeledRows(ZOO[species])
    settings = {"max_steps": 3, "predict_with_generate": True, "generation_num_beams": 2}
    trainer = trainer_of(kit, tmp_path, rows, transformers.Seq2SeqTrainer, **settings)
    before = trainer.predict(rows, max_length=6)
    bare = trainer_of(ZOO[species].build(), tmp_path, rows, transformers.Seq2SeqTrainer, **settings)
    assert (before.predictions == bare.predict(rows, max_length=6).predictions).all()
    trainer.train()
    after = trainer.predict(rows, max_length=6)
    assert after.metrics["test_loss"] < before.metrics["test_loss"]
    assert (after.predictions != before.predictions).any()
    collator = transformers.DataCollatorForSeq2Seq(transformers.PreTrainedTokenizerFast, model=kit)
    assert collator.model.prepare_decoder_input_ids_from_labels is not None


def test_a_generation_config_goes_to_the_base(tmp_path: Path) -> None:
    kit, rows = trained_kit("t5"), LabeledRows(ZOO["t5"])
    config = transformers.GenerationConfig(max_length=4, decoder_start_token_id=0, pad_token_id=0)
    trainer = trainer_of(kit, tmp_path, rows, transformers.Seq2SeqTrainer, generation_config=config)
    assert kit.generation_config is trainer.model.base.generation_config
    assert kit.base.generation_config.max_length == 4


def test_accelerate_prepares_trains_and_saves_a_kit(tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer of another test has chosen a precision
    kit, batch = trained_kit("llama"), ZOO["llama"].batch(2, 0)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, optimizer = accelerator.prepare(kit, torch.optim.AdamW(kit.parameters(), lr=1e-2))
    start = bits(kit, "a")
    for _ in range(2):
        accelerator.backward(model(**batch, labels=batch["input_ids"]).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert not same(bits(kit, "a"), start)
    accelerator.save_state(str(tmp_path / "state"))
    end = bits(kit, "a")
    with torch.no_grad():
        for parameter in kit.parameters():
            parameter.zero_()
    accelerator.load_state(str(tmp_path / "state"))
    assert same(bits(kit, "a"), end)
    unwrapped = accelerator.unwrap_model(model)
    assert isinstance(unwrapped, Kit)
    unwrapped.save_pretrained(tmp_path / "adapter", is_main_process=accelerator.is_main_process)
    assert same(bits(_loaded(tmp_path / "adapter"), "a"), end)
    kit.eval()
    assert unwrapped(**batch).logits.dtype == torch.float32
    AcceleratorState._reset_state(reset_partial_state=True)


def _loaded(folder: Path) -> Kit:
    kit = kitout.attach(ZOO["llama"].build())
    kit.load(folder)
    return kit


def test_save_pretrained_keeps_other_files_and_says_where_several_adapters_are(tmp_path: Path) -> None:
    kit = trained_kit("llama")
    kit.add("b", IA3(), seed=2)
    (tmp_path / "notes.txt").write_text("mine")
    kit.save_pretrained(tmp_path)
    kit.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter.json", "adapter.safetensors", "model.safetensors", "notes.txt",
    ]  # fmt: skip
    kit.use(None)
    kit.save_pretrained(tmp_path / "both")
    with pytest.raises(FileError, match=r"several adapters: load one of them, '.*both/a'"):
        _loaded(tmp_path / "both")
    assert _loaded(tmp_path / "both" / "b").names == ["b"]
    with pytest.raises(ConfigError, match="has no adapter"):
        kitout.attach(ZOO["llama"].build()).save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_values_without_a_record_are_named(tmp_path: Path) -> None:
    """What Trainer saves of a kit over something that is no transformers model."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FileError, match="load_state_dict"):
        _loaded(tmp_path)
