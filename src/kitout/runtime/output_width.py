"""The width of a model's output under a head: config fields and attributes that must say the head's width.

transformers computes its losses by `num_labels` or `vocab_size`, and writes them into a saved config. Where a head has
another width than the module it replaces, these follow it: during a forward under the head, while it is merged, and in
a merged copy. It knows the model and its heads, and nothing of routes or files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from kitout.base.weights import is_conv1d
from kitout.errors import ConfigError

# Attributes of an object, and what some of them were.
AttributesBefore = list[tuple[dict[str, Any], dict[str, Any]]]
CONFIG_FIELDS = ("id2label", "label2id", "problem_type", "vocab_size")


@dataclass(frozen=True)
class OutputWidth:
    """What a head makes of the width that the model's config says."""

    path: str
    """The module that the head replaces."""
    name: Literal["num_labels", "vocab_size"]
    """The field of the config."""
    width: int
    """The head's."""
    config: Any = field(repr=False)
    """The config that has the field."""
    owners: tuple[nn.Module, ...] = field(repr=False)
    """Modules that keep the field as an attribute of their own."""

    def write(self, labels: Tensor | None = None) -> AttributesBefore:
        """Makes config and modules say the head's width; returns what `undo` needs.

        labels: those of the call in progress. Raises ConfigError where a loss over them would broadcast.
        """
        before = [
            (o.__dict__, {k: o.__dict__[k] for k in (*CONFIG_FIELDS, self.name) if k in o.__dict__})
            for o in (self.config, *self.owners)
        ]
        problem_type = self._problem_type(labels) if self.name == "num_labels" else None
        setattr(self.config, self.name, self.width)
        if self.name == "num_labels":
            self.config.problem_type = problem_type
        for owner in self.owners:
            setattr(owner, self.name, self.width)
        return before

    def _problem_type(self, labels: Tensor | None) -> str | None:
        """The config's kind of loss, where it goes with the head's width; None: transformers infers it."""
        kind: str | None = self.config.problem_type
        if labels is not None and labels.is_floating_point():
            values = labels.numel() // max(1, labels.shape[0])
            if (self.width == 1 or kind == "regression") and values != self.width:
                raise ConfigError(
                    f"labels of shape {list(labels.shape)} under a head of width {self.width}: a regression loss takes "
                    f"{self.width} {'value' if self.width == 1 else 'values'} per row; give class numbers as integers"
                )
            if kind == "regression":
                return kind
        conflicts = kind == ("single_label_classification" if self.width == 1 else "regression")
        return None if conflicts else kind


def undo(before: AttributesBefore) -> None:
    """Puts the fields back that `OutputWidth.write` has changed."""
    for attributes, values in before:
        attributes.update(values)


@contextmanager
def output_width_of(width: OutputWidth, labels: Any) -> Iterator[None]:
    """Config and modules say the head's width, for one forward. labels: those of the call, if any."""
    before = width.write(labels if isinstance(labels, Tensor) else None)
    try:
        yield
    finally:
        undo(before)


def output_width(model: nn.Module, heads: Mapping[str, nn.Module]) -> OutputWidth | None:
    """What these heads, by path, make of the model's output; None where its width stays as the config says it."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    for path, head in heads.items():
        replaced = model.get_submodule(path)
        old, new = _width(replaced), _width(head)
        if old is None or new is None or old == new:
            continue
        get_table = getattr(model, "get_output_embeddings", None)
        if get_table is not None and get_table() is replaced:
            text_config = config.get_text_config()
            return OutputWidth(path, "vocab_size", new, text_config, _owners(model, "vocab_size", old))
        if old == getattr(config, "num_labels", None):
            return OutputWidth(path, "num_labels", new, config, _owners(model, "num_labels", old))
    return None


def _owners(model: nn.Module, name: str, value: int) -> tuple[nn.Module, ...]:
    return tuple(m for m in model.modules() if m.__dict__.get(name) == value)


def _width(module: nn.Module) -> int | None:
    """Width of what a head puts out: that of its last linear or convolution, the rows of a table."""
    for layer in reversed(list(module.modules())):
        weight = layer._parameters.get("weight")
        if weight is not None and weight.ndim > 1:
            return weight.shape[1] if is_conv1d(layer) else weight.shape[0]
    return None
