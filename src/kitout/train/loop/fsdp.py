"""The frozen base sharded among processes: FSDP2 over its blocks, while each process keeps its adapters whole.

The base is not a child of the kit, so whoever wraps a kit (accelerate, DistributedDataParallel) sees the adapters
alone: they are replicated and their gradients averaged as usual. What is frozen has no gradients, so sharding it costs
an all-gather per block and saves its memory. It knows kits and processes, no method and no loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from kitout.base.eval_mode import eval_mode
from kitout.base.probe.dummy_batch import dummy_batch
from kitout.errors import ConfigError, Errors
from kitout.kit import Kit
from kitout.train.loop import distributed

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def shard(kit: Kit) -> None:
    """From now on each process holds its shard of the base's weights. All processes call it, before training.

    Loading still needs the whole base in every process. ConfigError where it cannot be sharded.
    """
    _check_can_shard(kit)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(kit.device.type, (distributed.world_size(),))
    for block in kit.survey.blocks:
        if block.is_one_module:
            fully_shard(kit.base.get_submodule(block.path), mesh=mesh)
    fully_shard(kit.base, mesh=mesh)  # what is outside blocks: embeddings, the last norm, the head
    _check_adapters_run(kit)


def is_sharded(kit: Kit) -> bool:
    """Whether the base is sharded, so that all processes must run each forward together."""
    if distributed.world_size() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(kit.base, FSDPModule)


@contextmanager
def unsharded(kit: Kit) -> Iterator[None]:
    """Every process holds the base's whole weights meanwhile: to save, merge, or work alone.

    All processes enter and leave it together.
    """
    modules = _sharded_modules(kit) if is_sharded(kit) else []
    root: object = kit.base  # its own weights stay unsharded between forward and backward
    try:
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not root, recurse=False)
            module.reshard()


def _sharded_modules(kit: Kit) -> list[FSDPModule]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in kit.base.modules() if isinstance(module, FSDPModule)]


def _check_adapters_run(kit: Kit) -> None:
    """Each adapter forward and backward on a dummy batch: one that uses a block's weights outside of it fails."""
    batch = dummy_batch(kit.base, 2)
    for name in kit.names if batch is not None else ():
        try:
            with eval_mode(kit.base, kit, grad=True), kit.use(name):
                output = kit(**batch or {})
                (output if isinstance(output, Tensor) else output[0]).float().square().mean().backward()
        except RuntimeError as error:
            method = type(kit[name].method).__name__
            raise ConfigError(
                f"train.fsdp: {name!r} ({method}) uses a block's weights outside of that block, where they are "
                f"sharded ({str(error).splitlines()[0][:120]}): choose another method, or write train.fsdp=false"
            ) from error
        finally:
            kit[name].zero_grad()


def _check_can_shard(kit: Kit) -> None:
    errors = Errors(ConfigError, "train.fsdp")
    if distributed.world_size() == 1:
        errors.add("there is one process: start it with torchrun --nproc-per-node=N, or write train.fsdp=false")
    if is_sharded(kit):
        errors.add("the base is already sharded")
    if kit.merged:
        errors.add(f"{kit.state.merged_text} merged into the base: unmerge() first")
    quantized = [name for name, value in kit.base.named_parameters() if not _is_plain_float(value)]
    if quantized:
        errors.add(
            f"{len(quantized)} weights are quantized ({quantized[0]}, ...), which FSDP2 does not shard: write "
            "model.quantization=none, or train.fsdp=false"
        )
    replacing = [name for name in kit.names if any(site.port == "param" for site in kit[name].sites)]
    if replacing:
        errors.add(f"{replacing} replace the base's own parameters: choose another method")
    errors.raise_if_any()


def _is_plain_float(value: Tensor) -> bool:
    return type(value.data) is Tensor and value.is_floating_point() and value.dtype.itemsize > 1
