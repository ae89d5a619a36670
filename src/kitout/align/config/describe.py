"""Every setting of a stage in words, by kind: for --help, for a run.yaml to begin with.

Names, types, defaults and texts are the schema's own, as `train.config.describe` has them; what a kind has not is left
out. It knows no screen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kitout.align.config.kinds import KINDS, Kind
from kitout.align.config.schema import AlignConfig, RolloutConfig, StageConfig
from kitout.align.config.unfit_settings import OF_ALL, unfit_settings
from kitout.train.config.describe import SectionDoc, SettingDoc, example_yaml, section_docs, sections
from kitout.train.config.method_field import DEFAULT_METHOD

OF_SAMPLING_ONLY = ("reward", "rollout")
EXAMPLE_DATA = {
    "auto": "chats.jsonl",
    "preference": "pairs.jsonl",
    "unpaired": "labeled.jsonl",
    "prompts": "gym:chain_sum",
}
EXAMPLE_STAGES = (  # of a file with several
    {"kind": "sft", "data": "chats.jsonl"},
    {"kind": "reward", "data": "pairs.jsonl", "from": "sft"},
    {"kind": "ppo", "data": "prompts.jsonl", "from": "sft", "reward": "reward"},
)


def align_sections() -> tuple[SectionDoc, ...]:
    """The sections of a file with stages; the settings of a loss once for each kind."""
    docs = [doc for doc in sections(AlignConfig) if not doc.name.startswith("stages.0")]
    for doc in section_docs("stages.0", StageConfig):
        docs.append(_fitting(doc, "stages.0.", OF_ALL))
        if doc.name == "stages.0":
            docs += [
                replace(one, text=f"kind: {name}. {one.text}") for name in KINDS for one in _loss(name, "stages.0.")
            ]
            docs += section_docs("stages.0.rollout", RolloutConfig)
    return tuple(doc for doc in docs if doc.settings)


def kind_sections(kind: str) -> tuple[SectionDoc, ...]:
    """The sections of a file or a command line with one stage of this kind, whose settings stand at the top."""
    entry, unfit = KINDS[kind], unfit_settings(kind)
    of_stage = list(section_docs("", StageConfig))
    named = {doc.name.lstrip("."): replace(doc, name=doc.name.lstrip(".")) for doc in of_stage}
    top = [one for one in named.pop("").settings if one.name not in ("kind", "loss", "rollout", *_sections_in(named))]
    top = [replace(one, default=kind) if one.name == "name" else one for one in top]
    if not entry.takes_reward:
        named = {name: doc for name, doc in named.items() if not name.startswith(OF_SAMPLING_ONLY)}
        top = [one for one in top if one.name not in OF_SAMPLING_ONLY]
    shared = {doc.name: doc for doc in sections(AlignConfig)}
    rollout = section_docs("rollout", RolloutConfig) if entry.takes_reward else ()
    docs = [
        SectionDoc("", f"{entry.title}.", tuple(top)),
        shared["model"],
        *(doc for name, doc in named.items() if name.startswith(("data", "reward"))),
        *_loss(kind, ""),
        *rollout,
        *(doc for name, doc in named.items() if not name.startswith(("data", "reward"))),
        shared["output"],
    ]
    fitting = (_with_defaults(_fitting(one, "", unfit), entry) for one in docs)
    return tuple(doc for doc in fitting if doc.settings)


def _sections_in(named: dict[str, SectionDoc]) -> Iterator[str]:
    """Sections whose name is a setting of the stage too; a list of them is written as a setting."""
    return (name for name in named if "." not in name)


def _loss(kind: str, at: str) -> Iterator[SectionDoc]:
    settings = KINDS[kind].loss
    return iter(()) if settings is None else section_docs(f"{at}loss", settings)


def _with_defaults(doc: SectionDoc, kind: Kind) -> SectionDoc:
    """A section with the defaults of the kind."""
    changes: dict[str, dict[str, str]] = {"rollout.samples": {"default": str(kind.samples)}}
    if kind.lr_factor != 1:
        text = f"Learning rate of AdamW; default: {kind.lr_factor:g} times the method's own (`kitout methods`)."
        changes["train.lr"] = {"text": text}
    settings = (replace(one, **changes.get(f"{doc.name}.{one.name}", {})) for one in doc.settings)
    return replace(doc, settings=tuple(settings))


def _fitting(doc: SectionDoc, at: str, unfit: dict[str, str]) -> SectionDoc:
    """A section without what the kind has not; without any setting where it has not the section itself."""
    name = doc.name.removeprefix(at)
    kept = tuple(one for one in doc.settings if f"{name}.{one.name}" not in unfit and name not in unfit)
    return replace(doc, settings=kept)


def kind_yaml(kind: str) -> str:
    """A run.yaml of one stage to begin with: every setting, as a comment with its default."""
    entry = KINDS[kind]
    values = {
        "model.name": "smollm2-135m",
        "data.train": [{"path": EXAMPLE_DATA[entry.data_format]}],
        "output.folder": f"runs/{kind}",
        "reward": EXAMPLE_DATA["prompts"],
    }
    first_lines = (f"# {entry.title}:  kitout align run.yaml", "", f"kind: {kind}")
    top, *others = kind_sections(kind)
    settings = tuple(replace(one, default=DEFAULT_METHOD) if one.name == "method" else one for one in top.settings)
    docs = (replace(top, settings=settings), *(doc for doc in others if doc.name != "reward.0"))
    return example_yaml(docs, values, first_lines)


def stages_yaml() -> str:
    """A run.yaml of three stages to begin with, each with the settings of its kind as comments with their defaults."""
    lines = [
        "# Stages on one base, one after the other:  kitout align run.yaml",
        "# A setting after '#' has its default: remove the '#' to change it.",
        "# `kitout align KIND --example` has every setting of a kind.",
        "model:",
        "  name: smollm2-135m",
        "output:",
        "  folder: runs/align",
        "stages:",
    ]
    for stage in EXAMPLE_STAGES:
        entry = KINDS[stage["kind"]]
        lines += [f"  # {entry.title}"]
        lines += [f"  {'- ' if i == 0 else '  '}{name}: {value}" for i, (name, value) in enumerate(stage.items())]
        for doc in kind_sections(stage["kind"]):
            if doc.name in ("loss", "rollout"):
                lines += [f"    #{doc.name}:", *(_commented(one) for one in doc.settings)]
    return "\n".join(lines) + "\n"


def _commented(setting: SettingDoc) -> str:
    return f"    #  {setting.name}: {setting.default}"
