"""`kitout merge`: adapters folded into their base and written as a plain transformers folder, which needs no kitout.

Weights, config with label names, generation settings, tokenizer or image processor. Before the folder appears it is
loaded by transformers alone and compared with the kit on a batch; a difference that rounding cannot explain is an error
and leaves nothing. Several adapters act as a Stack in the order given.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kitout.base.eval_mode import eval_mode
from kitout.errors import ConfigError, Errors, FileError, KitoutError, NotMergeable
from kitout.export.new_folder import check_new_folder, folder_bytes, write_new_folder
from kitout.export.output_difference import OutputDifference, output_difference
from kitout.export.sample_batch import image_batch, logits_of, text_batch
from kitout.export.stored_dtype import stored_dtype
from kitout.files.system_errors import as_path
from kitout.files.usage_record import UsageRecord
from kitout.format import format_bytes, short_repr
from kitout.peft_folders import save_peft
from kitout.predict.answer_stream import SAMPLING
from kitout.predict.load import load
from kitout.predict.predictor import Predictor
from kitout.predict.saved_adapters import adapters_in
from kitout.route import Stack
from kitout.train.objectives.tasks import TASKS, Task

# What a classifier's config calls its loss, from which transformers' pipelines also choose softmax or sigmoid.
PROBLEM_TYPES = {
    "classification": "single_label_classification",
    "multilabel": "multi_label_classification",
    "regression": "regression",
}
PIPELINE_INPUTS = {
    "text-classification": "The parcel never came",
    "token-classification": "Anna lives in Paris",
    "text-generation": "Once upon a time",
}
LogFn = Callable[[str], None]


@dataclass(frozen=True)
class MergedFolder:
    """A plain transformers folder that was written and compared."""

    folder: Path
    """The folder."""
    adapters: tuple[str, ...]
    """The adapters in it, in order."""
    auto_model: str
    """The class of transformers that loads it."""
    pipeline: str
    """The pipeline of transformers for its task, by the hub's name."""
    dtype: str
    """Of its weights."""
    num_bytes: int
    """Of its files."""
    difference: OutputDifference
    """Between the kit and the folder as transformers alone loads it."""
    notes: tuple[str, ...] = ()
    """What the folder cannot hold and whoever uses it has to do."""

    def __str__(self) -> str:
        what = " then ".join(self.adapters)
        lines = [
            f"merged   {what} into {self.folder}: {format_bytes(self.num_bytes)}, {self.dtype}",
            "checked  loaded by transformers alone, against the kit on one batch:",
            *(f"         {line}" for line in self.difference.lines),
            *(f"note     {note}" for note in self.notes),
            "",
            "use it:",
            *(f"  {line}" for line in self.python_lines),
        ]
        return "\n".join(lines)

    @property
    def python_lines(self) -> tuple[str, ...]:
        """What uses the folder without kitout, and runs as it stands."""
        folder = str(self.folder)
        # pipelines of transformers write texts with decoders alone
        if self.pipeline in PIPELINE_INPUTS and self.auto_model != TASKS["seq2seq_lm"].auto_model:
            call = f"pipeline({self.pipeline!r}, {folder!r})({PIPELINE_INPUTS[self.pipeline]!r})"
            return "from transformers import pipeline", f"print({call})"
        loader = f"{self.auto_model}.from_pretrained({folder!r})"
        return f"from transformers import {self.auto_model}", f"model = {loader}"


def merge_to_folder(
    folders: Sequence[str | PathLike[str]],
    out: str | PathLike[str],
    *,
    base: str | PathLike[str] | nn.Module | None = None,
    tokenizer: Any = None,
    task: str | None = None,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    verify: bool = True,
    log: LogFn = lambda _line: None,
) -> MergedFolder:
    """Merges adapters, in this order, into `out`, a new or empty folder; base, ..., verify: as `kitout.load` has them.

    dtype: of the weights that are written; None: of the base's own files. log: is called with what is done.
    Raises NotMergeable for adapters without an exact form in weights, FileError, WrongBase, PathError; nothing is
    written then.
    """
    path = check_new_folder(out)
    check_one_each(folders)
    log("loading the base and the adapters")
    if dtype is None:
        dtype = stored_dtype(folders, base, device, verify)
    predictor = load(*folders, base=base, tokenizer=tokenizer, task=task, device=device, dtype=dtype, verify=verify)
    return write_merged(predictor, path, log)


def check_one_each(folders: Sequence[str | PathLike[str]]) -> None:
    """ConfigError for what is no list of adapters: an empty one, one of them twice, a run that holds several."""
    if not folders:
        raise ConfigError("nothing to merge: give adapter folders")
    errors, seen = Errors(ConfigError, "cannot merge"), set()
    for folder in map(as_path, folders):
        found = adapters_in(folder)
        if len(found) > 1:
            each = ", ".join(map(str, found))
            errors.add(f"{folder} holds several adapters: name the one to merge, or those to stack in order: {each}")
        if found[0].resolve() in seen:
            errors.add(f"{folder} is given twice")
        seen.add(found[0].resolve())
    errors.raise_if_any()


def write_merged(predictor: Predictor, path: Path, log: LogFn = lambda _line: None) -> MergedFolder:
    """The adapters of a predictor, merged in their order into a new or empty folder."""
    kit, names = predictor.kit, tuple(predictor.loaded)
    usage = _usage_of_outputs(predictor)
    if usage.task not in TASKS:
        raise NotMergeable(
            f"{names[0]} is a reward adapter: its head of one value stands in the place of the output head, so no "
            "model of transformers is what a merge would give; use it as it is: kitout align ppo --reward FOLDER"
        )
    used_task = TASKS[usage.task]
    log(f"merging {' then '.join(names)}")
    with _labels_in_config(kit.config, usage, used_task):
        try:
            merged: list[Any] = [kit.merged_copy(*names)]
        except NotMergeable as error:
            raise NotMergeable(f"{error}\n  {_instead(predictor)}") from error
    num_bytes = sum(value.numel() * value.element_size() for value in merged[0].parameters())
    expected: list[OutputDifference] = []

    def write_into(folder: Path) -> None:
        log(f"writing {format_bytes(num_bytes)}")
        model = merged.pop()
        _save_model(model, folder)
        _save_preprocessing(predictor, used_task, model.config, folder)
        del model  # one copy less while the folder is loaded
        log("loading it by transformers alone, and comparing it with the kit")
        difference = compare_with_folder(predictor, used_task, folder)
        if not difference.is_rounding:
            raise FileError(
                f"the merged model computes something else than the kit ({difference}), so nothing was written: "
                + ("please report it" if difference.dtype == "float32" else "merge in float32 (--dtype float32)")
            )
        expected.append(difference)

    write_new_folder(path, num_bytes, write_into)
    dtype = str(kit.dtype).removeprefix("torch.")
    notes = [*expected[0].notes, *_notes(predictor, usage)]
    return MergedFolder(
        path, names, used_task.auto_model, used_task.hub_task, dtype, folder_bytes(path), expected[0], tuple(notes)
    )


def compare_with_folder(predictor: Predictor, task: Task, folder: Path) -> OutputDifference:
    """The kit with its adapters stacked, against what transformers alone makes of a folder."""
    import transformers

    kit = predictor.kit
    auto_model = getattr(transformers, task.auto_model)
    loaded, info = auto_model.from_pretrained(
        folder, dtype="auto", attn_implementation=kit.config._attn_implementation, output_loading_info=True
    )
    if wrong := [f"{kind} {', '.join(map(str, sorted(keys)[:3]))}" for kind, keys in _bad_keys(info)]:
        raise FileError(f"transformers does not load the merged model as it is ({'; '.join(wrong)}): please report it")
    loaded.to(kit.device)
    if task.reads_images:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        own_processor = predictor.preprocessing.pixels.standalone()
        inputs, others = image_batch(kit, own_processor), image_batch(loaded, processor)
    else:
        reloaded = transformers.AutoTokenizer.from_pretrained(folder)
        pad_id = predictor.preprocessing.pad_token_id
        inputs = text_batch(kit, predictor.tokenizer, pad_id)
        others = text_batch(loaded, reloaded, pad_id)
    with eval_mode(kit.base, kit, loaded):
        with kit.use(None):
            base = logits_of(kit, inputs)
        with kit.use(Stack(*predictor.loaded)):
            expected = logits_of(kit, inputs)
        return output_difference(expected, logits_of(loaded, others), base, kit.dtype)


def _bad_keys(info: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := [str(key[0] if isinstance(key, tuple) else key) for key in info.get(kind) or ()]:
            yield kind.replace("_", " "), keys


def _usage_of_outputs(predictor: Predictor) -> UsageRecord:
    """Of the adapter whose head gives the outputs: the last one that has one."""
    with_heads = _with_heads(predictor)
    return predictor.usages[with_heads[-1] if with_heads else predictor.loaded[0]]


def _with_heads(predictor: Predictor) -> list[str]:
    """The adapters that have a head, or a part that has one."""
    kit = predictor.kit
    return [name for name in predictor.loaded if any(kit[each].heads for each in kit.state.names_with_parts([name]))]


@contextmanager
def _labels_in_config(config: Any, usage: UsageRecord, task: Task) -> Iterator[None]:
    """Inside, the config has the labels of the adapter's head, as the copy shall have them."""
    names = ("id2label", "label2id", "problem_type")
    before = {name: getattr(config, name, None) for name in names}
    try:
        if not task.generates_text:
            if usage.labels:
                config.id2label = dict(enumerate(usage.labels))
                config.label2id = {label: number for number, label in enumerate(usage.labels)}
            if not task.reads_images and task.metric_task in PROBLEM_TYPES:
                config.problem_type = PROBLEM_TYPES[task.metric_task]
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def _instead(predictor: Predictor) -> str:
    """What to do with adapters that do not merge: what is possible with these."""
    advice = "use the adapter beside its base: kitout.load(FOLDER), `kitout predict FOLDER`"
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name in predictor.loaded:
                save_peft(predictor.kit, name, Path(folder) / name)
    except KitoutError:
        return advice
    return f"{advice}; or write it for PEFT: `kitout export FOLDER --to peft`"


def _save_model(model: Any, folder: Path) -> None:
    generation_config = getattr(model, "generation_config", None)
    if generation_config is not None:
        try:
            generation_config.validate(strict=True)
        except (
            ValueError
        ):  # settings of sampling beside do_sample=False: without effect, and refused by save_pretrained
            for name in SAMPLING:
                setattr(generation_config, name, None)
    model.save_pretrained(folder)


def _save_preprocessing(predictor: Predictor, task: Task, config: Any, folder: Path) -> None:
    if task.reads_images:
        predictor.preprocessing.pixels.standalone().save_pretrained(folder)
        return
    tokenizer = copy.deepcopy(predictor.tokenizer)
    pad_token_id = config.get_text_config().pad_token_id
    if tokenizer.pad_token is None and pad_token_id is not None and pad_token_id >= 0:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_token_id)
    tokenizer.save_pretrained(folder)


def _notes(predictor: Predictor, usage: UsageRecord) -> Iterator[str]:
    kit, text, images = predictor.kit, usage.text, usage.images
    with_heads = _with_heads(predictor)
    if len(with_heads) > 1:
        *others, last = with_heads
        yield f"its outputs are those of the head of {last}; the head of {', '.join(others)} is not in it"
    if text is not None and text.system_prompt:
        yield f"trained with the system prompt {short_repr(text.system_prompt, 80)}: put it in front of every chat"
    if text is not None and text.chat_template_kwargs:
        yield f"trained with the template's arguments {text.chat_template_kwargs}: give them to apply_chat_template"
    if text is not None and text.format and text.format not in ("messages", "sharegpt", "label"):
        yield f"trained on rows of the format {text.format!r}: prompts are made as `kitout predict` makes them"
    if images is not None and images.size is not None:
        kwargs = image_batch(kit, predictor.preprocessing.pixels.standalone())
        if arguments := [f"{name}=True" for name in kwargs if name != "pixel_values"]:
            yield f"images of {images.size} pixels: call the model with {', '.join(arguments)}"
