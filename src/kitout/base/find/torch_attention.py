"""The projections of `nn.MultiheadAttention`: it multiplies by its parameters, and no module of its runs.

Query, key and value are one weight `in_proj_weight` of the attention itself, thirds of its rows; `out_proj` is a linear
whose weight is read and whose forward is never called. Both become sites at the port "weight". An attention with keys
or values of another width holds three weights and one bias, and has no such sites. It knows torch's class and nothing
of blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from kitout.base.find.module_tree import ModuleTree
from kitout.base.site import Site


def reads_its_parameters(module: nn.Module | None) -> bool:
    """torch's own attention, as it is."""
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


def torch_attention_sites(tree: ModuleTree, sites: Iterable[Site], role_of: Mapping[str, str]) -> Iterator[Site]:
    """All sites, with those of torch's attentions in the place of their unused output projections."""
    for site in sites:
        owner, _, name = site.path.rpartition(".")
        attention = tree.modules.get(owner)
        if name != "out_proj" or not reads_its_parameters(attention):
            yield site
            continue
        assert isinstance(attention, nn.MultiheadAttention)
        if attention.in_proj_weight is not None:
            yield from _input_sites(owner, attention, site, role_of)
        yield site.replace(port="weight", reader=owner, batch_axis=0 if attention.batch_first else 1)


def _input_sites(path: str, attention: nn.MultiheadAttention, output: Site, role_of: Mapping[str, str]) -> list[Site]:
    """The whole input projection, and where the attention has a role its three parts."""
    width = attention.embed_dim
    kind, dot, _ = role_of.get(output.path, "").partition(".")
    whole = output.replace(
        path=path,
        role=f"{kind}.qkv" if dot else "other",
        d_in=width,
        d_out=3 * width,
        port="weight",
        reader=path,
        weight_name="in_proj_weight",
        # With a new bias and none elsewhere torch would take its fast path, which needs all of them.
        bias_name="in_proj_bias" if attention.in_proj_bias is not None else "",
        batch_axis=0 if attention.batch_first else 1,
        module=attention,
    )
    if not dot:
        return [whole]
    thirds = [tuple(range(i * width, (i + 1) * width)) for i in range(3)]
    parts = [whole.replace(role=f"{kind}.{p}", channels=c, d_out=width) for p, c in zip("qkv", thirds, strict=True)]
    return [whole, *parts]
