"""Every parameter that the model's forward reads, as sites that name it: where fine-tuning can go.

Parameters of linears, convolutions, tables and norms sit at their module's output, so rows can have their own. All
others (class and position tokens, a LayerScale kept in a block, stacked experts) sit at the port "param" of the module
whose forward reads them. A tied parameter has one key wherever it is used. It works on the meta device and knows no
architecture: the survey says what is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from kitout.base.parametrized import is_computed
from kitout.base.site import Site
from kitout.base.survey import Survey
from kitout.errors import Errors, TargetError

LEAVES = ("linear", "embedding", "conv", "norm")


def parameter_sites(survey: Survey, include_non_trainable: bool = False) -> list[Site]:
    """Sites with `parameter_names` and `tied_keys`, in module order. TargetError for packed or quantized parameters.

    include_non_trainable: also those that the model itself never trains.
    """
    leaves = {s.path: s for s in survey.sites if s.channels is None and s.path not in survey.unused and _is_leaf(s)}
    errors = Errors(TargetError, "these parameters cannot be trained")
    groups: dict[tuple[str, bool], list[str]] = {}  # (module path, at port "param") -> names relative to the module
    keys: dict[int, str] = {}
    for path, name, p in sorted(_iter_parameters(survey.model), key=lambda item: item[0] not in leaves):
        full_name, is_leaf = f"{path}.{name}" if path else name, path in leaves
        if full_name in survey.non_trainable and not include_non_trainable:
            continue
        if not is_leaf and (id(p) in keys or full_name in survey.unread_parameters):
            continue  # it is used elsewhere, or nowhere
        if not p.is_floating_point() or type(p.data) is not Tensor or p.dtype.itemsize < 2:
            errors.add(f"{full_name} is held as {p.dtype} in a {type(p.data).__name__}")
        keys.setdefault(id(p), full_name)
        owner = path if is_leaf else _reading_module(path, survey)
        at_param_port = not is_leaf or not _supports_rows(leaves[path])
        groups.setdefault((owner, at_param_port), []).append(full_name.removeprefix(f"{owner}." if owner else ""))
    errors.raise_if_any()
    order = {path: i for i, (path, _) in enumerate(survey.model.named_modules())}
    sites = [
        _make_site(survey, leaves, owner, at_param_port, names, keys)
        for (owner, at_param_port), names in groups.items()
    ]
    return sorted(sites, key=lambda s: order[s.path])


def _iter_parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(module path, name, parameter), a tied one once per module that holds it."""
    for path, module in model.named_modules():
        yield from ((path, name, p) for name, p in module._parameters.items() if p is not None)


def _is_leaf(site: Site) -> bool:
    """Its parameters are read at its own call. A weight that is computed of others may be computed before it."""
    is_part = site.role == "block" or site.role.startswith("sub.")
    return not is_part and site.reader is None and not _is_computed(site.module)


def _is_computed(module: nn.Module) -> bool:
    return is_computed(module, "weight") or is_computed(module, "bias")


def _supports_rows(site: Site) -> bool:
    """Its value passes at one place and follows the batch there, so rows may have values of their own."""
    if isinstance(site.module, nn.modules.conv._ConvTransposeNd):
        return False
    return site.kind in LEAVES or site.batch_relation == "batch"


def _reading_module(path: str, survey: Survey) -> str:
    """The module whose forward reads a parameter that no leaf's forward does: its own, unless that never runs, or
    not before the parameter is read.
    """
    never_called = survey.unused | {s.path for s in survey.sites if s.reader not in (None, s.path)}
    if path not in never_called and not _is_computed(survey.model.get_submodule(path)):
        return path
    in_a_block = any(path.startswith(f"{block.path}.") for block in survey.blocks)
    return path.rpartition(".")[0] if in_a_block else ""


def _make_site(
    survey: Survey,
    leaves: Mapping[str, Site],
    path: str,
    at_param_port: bool,
    names: Sequence[str],
    keys: Mapping[int, str],
) -> Site:
    module = survey.model.get_submodule(path)
    tied_keys = tuple(keys[id(module.get_parameter(n))] for n in names)
    if path in leaves and not at_param_port:
        return leaves[path].replace(parameter_names=tuple(names), tied_keys=tied_keys)
    block = next((b for b in survey.blocks if path == b.path or path.startswith(f"{b.path}.")), None)
    return Site(
        path=path,
        role=leaves[path].role if path in leaves else "other",
        tower=block.tower if block else "",
        layer=block.index if block else None,
        d_in=0,
        d_out=0,
        port="param",
        batch_relation="none",
        kind="other",
        parameter_names=tuple(names),
        tied_keys=tied_keys,
        module=module,
    )
