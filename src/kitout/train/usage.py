"""What adapter.json says of how a trained adapter is used: written here from the run, read by `kitout.predict`.

Task and labels, the preprocessing that its examples had, and the base under a name that holds on any machine. It knows
a prepared run, and neither folders nor predictions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from kitout.assets.catalog import ASSETS
from kitout.assets.store import asset_folder
from kitout.data.encode.tokenizer_digest import template_digest, tokenizer_digest
from kitout.files.portable_name import name_without_folder, portable_name
from kitout.files.usage_record import BaseRecord, ImagesRecord, TextRecord, UsageRecord
from kitout.train.config.schema import ModelConfig, RunConfig
from kitout.train.measure.predict import default_max_new_tokens
from kitout.train.setup.job_datasets import Datasets
from kitout.train.setup.prepare import PreparedRun

PRIVATE_SETTINGS = ("name_or_path", "processor_class", "image_processor_type")  # of a processor: not how it works


def usage_of(run: PreparedRun, config: RunConfig, number: int) -> UsageRecord:
    """Of one job of a run."""
    dataset, job = run.datasets[number], config.per_job()[number]
    return UsageRecord(
        task=run.task.used_as or run.objective,
        labels=list(dataset.label_names),
        base=base_record(run, config.model),
        text=None if run.tokenizer is None else _text_record(run, job, number, dataset),
        images=None if run.tokenizer is not None else _images_record(run, job, number),
    )


def base_record(run: PreparedRun, config: ModelConfig) -> BaseRecord:
    """The base of all jobs, as it was loaded."""
    name, source = _name_and_source(config.name)
    attention = str(getattr(run.kit.base.config, "_attn_implementation", None))
    known = get_args(ModelConfig.model_fields["attention"].annotation)
    return BaseRecord(
        name=name,
        source=source,
        revision=config.revision,
        dtype=str(run.kit.dtype).removeprefix("torch."),  # type: ignore[arg-type]  # checked by the record
        attention=attention if attention in known else "auto",
        quantization=config.quantization,
    )


def _name_and_source(name_or_path: str) -> tuple[str, Literal["hub", "built-in", "folder"]]:
    """A folder is one whatever it is called, but for those of the built-in models themselves."""
    name = name_without_folder(name_or_path)
    if name is not None:
        return name, "built-in" if name in ASSETS else "hub"
    path = Path(name_or_path).expanduser().resolve()
    is_asset = path.name in ASSETS and path == asset_folder(path.name).resolve()
    return portable_name(name_or_path), "built-in" if is_asset else "folder"


def _text_record(run: PreparedRun, job: RunConfig, number: int, dataset: Datasets) -> TextRecord:
    data, reading, answers, languages = job.data, dataset.reading, dataset.answers, dataset.languages
    lengths = run.lengths[number]
    asked_format, columns = (None, {}) if reading is None else reading.as_asked()
    return TextRecord(
        tokenizer=tokenizer_digest(run.tokenizer),
        chat_template=template_digest(run.tokenizer),
        format=asked_format,
        columns=columns,
        system_prompt=None if reading is None else reading.system_prompt,
        chat_template_kwargs=json.loads(json.dumps(data.chat_template_kwargs)),
        template_date=data.template_date,
        max_length=lengths.text.tokens,
        max_new_tokens=_max_new_tokens(job, dataset) if run.task.generates_text else None,
        src_lang=None if languages is None else languages.source,
        tgt_lang=None if languages is None else languages.target,
        answers=[] if answers is None else list(answers.names),
        answer_tokens=[] if answers is None else [list(ids) for ids in answers.token_ids],
        end_token=None if answers is None else answers.end_token_id,
    )


def _max_new_tokens(job: RunConfig, dataset: Datasets) -> int:
    """As the run's own evaluation has it; of the training examples where nothing was evaluated."""
    with_reference: Sequence[Any] = [item for item in dataset.test if item.reference]
    examples = with_reference or dataset.preview or dataset.train
    return job.evaluate.max_new_tokens or default_max_new_tokens(examples)


def _images_record(run: PreparedRun, job: RunConfig, number: int) -> ImagesRecord:
    pixels = run.jobs[number].objective.pixels  # type: ignore[attr-defined]  # of an objective that reads images
    settings = {
        name: value
        for name, value in json.loads(json.dumps(pixels.processor.to_dict(), default=str)).items()
        if not name.startswith("_") and name not in PRIVATE_SETTINGS
    }
    return ImagesRecord(size=job.data.image_size, processor=settings)
