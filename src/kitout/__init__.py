"""kitout: parameter-efficient fine-tuning (PEFT) of large frozen transformers, text and vision.

The public names and nothing else. `attach(model)` gives a kit; methods (LoRA, IA3, ...) say what to add where; Stack
and Mix say how adapters act together. A name is imported when it is first used, so `import kitout` loads neither torch
nor transformers; the types of the names are in `__init__.pyi`.
"""

import importlib

PUBLIC_NAMES = {
    "__version__": "kitout.version",
    "attach": "kitout.kit",
    "attention": "kitout.evaluate.part_weights",
    "check": "kitout.model_check.check",
    "Kit": "kitout.kit",
    "combine": "kitout.fuse.arithmetic",
    "compile": "kitout.runtime.graphs.compile_blocks",
    "compiled": "kitout.runtime.graphs.compile_blocks",
    "convert": "kitout.fuse.convert",
    "extract": "kitout.fuse.extract",
    "load": "kitout.predict.load",
    "load_peft": "kitout.peft_folders",
    "save_peft": "kitout.peft_folders",
    "reference": "kitout.interop.reference",
    "Stack": "kitout.route",
    "Mix": "kitout.route",
    "Only": "kitout.route",
    "Average": "kitout.route",
    "Delta": "kitout.delta",
    "Method": "kitout.method",
    "register": "kitout.method",
    "AdaptFormer": "kitout.methods.adaptformer",
    "BitFit": "kitout.methods.bitfit",
    "Composition": "kitout.methods.compositions.composition",
    "Fusion": "kitout.methods.compositions.fusion",
    "Gated": "kitout.methods.compositions.gated",
    "FullFineTuning": "kitout.methods.full_finetuning",
    "Houlsby": "kitout.methods.houlsby",
    "IA3": "kitout.methods.ia3",
    "LoRA": "kitout.methods.lora",
    "MAM": "kitout.methods.compositions.mam",
    "Mixture": "kitout.methods.compositions.mixture",
    "ParallelAdapter": "kitout.methods.parallel_adapter",
    "PartialFineTuning": "kitout.methods.partial_finetuning",
    "Pfeiffer": "kitout.methods.pfeiffer",
    "PrefixTuning": "kitout.methods.prefix_tuning",
    "PromptTuning": "kitout.methods.prompt_tuning",
    "SSF": "kitout.methods.ssf",
    "VPT": "kitout.methods.vpt",
}
"""Name -> the module it is defined in. A new method adds one line."""

PUBLIC_MODULES = ("align", "assess", "errors", "search", "train")
"""Submodules that are public by themselves; `kitout.align` and `kitout.train` can also be called."""

__all__ = [*PUBLIC_NAMES, *PUBLIC_MODULES]  # noqa: PLE0604 - the table is the list


def __getattr__(name: str) -> object:
    if name in PUBLIC_NAMES:
        value = getattr(importlib.import_module(PUBLIC_NAMES[name]), name)
        globals()[name] = value  # the next access is an ordinary one
        return value
    if name in PUBLIC_MODULES:
        return importlib.import_module(f"kitout.{name}")
    raise AttributeError(f"module 'kitout' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
