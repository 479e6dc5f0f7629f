"""FSDP2: a process keeps its share of parameters, gradients, moments and averaged weights.

Layers are gathered when they are needed, forward and backward, and their gradients averaged in shares. What
is written to a checkpoint is whole, under plain names, so a run goes on with and without `--fsdp` alike.

Shares of tensors that are not sharded are the tensors themselves, so callers need no branches.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from groupvit_fast.console import UserError
from groupvit_fast.model.grouping import GroupingBlock
from groupvit_fast.model.groupvit import GroupViT
from groupvit_fast.model.layers import TransformerBlock
from groupvit_fast.training.config import TrainConfig
from groupvit_fast.training.distributed import gather, rank, world_size

UNITS = (TransformerBlock, GroupingBlock, nn.Embedding)
"""What is gathered and let go as one; the rest of the model stays whole from forward to backward pass.

With the token embedding, a fifth of the published model, among the rest, that would be most of the memory.
"""


def wanted(config: TrainConfig) -> bool:
    """Whether this run shards: alone there is nobody to share with."""
    refuse(config)
    return config.fsdp and world_size() > 1


def refuse(config: TrainConfig) -> None:
    """UserError for what can not go with sharding."""
    others = {
        "--compile": (config.compile, "the graph would hold weights that are there only while they are used"),
        "--cuda-graphs": (config.cuda_graphs, "a recorded graph reads weights where they were when recorded"),
        f"--optimizer {config.optimizer}": (
            config.optimizer != "adamw",
            "it looks at parameters as a whole, and a process has a share of each",
        ),
    }
    for name, (chosen, reason) in others.items():
        if config.fsdp and chosen:
            raise UserError(f"--fsdp and {name} exclude each other: {reason}")


def units(model: nn.Module) -> list[nn.Module]:
    """The parts of a model that are gathered one by one."""
    return [module for module in model.modules() if isinstance(module, UNITS)]


def shard(model: GroupViT, config: TrainConfig, device: str) -> None:
    """Replace the parameters of `model` by shares of them; all processes must hold the same weights.

    The 0-dim temperatures stay whole, and their gradients are each process's own: `unsharded` names them.
    Mixed precision is autocast's, as without sharding: a policy of FSDP would cast norms and embeddings too.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    settings = {
        "mesh": init_device_mesh(device, (world_size(),)),
        "shard_placement_fn": lambda parameter: placement(parameter, world_size()),
        "ignored_params": {parameter for parameter in model.parameters() if parameter.dim() == 0},
    }
    for module in [*units(model), model]:
        fully_shard(module, **settings)
        if device == "cpu":  # gloo can not average
            module.set_force_sum_reduction_for_comms(True)
    for block in model.text_encoder.blocks:
        register_fsdp_forward_method(block, "at_ends")
    # in a step without accumulation these two are called inside of `forward`, which gathers for both
    for method in ("encode", "project") if config.accum_freq > 1 else ():
        register_fsdp_forward_method(model, method)
    # it fears that somebody adds to a result in place
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(\w+\) returned a view")


def placement(parameter: Tensor, size: int):
    """Cut along the first axis that `size` divides; if there is none, along the first, unevenly."""
    from torch.distributed.tensor import Shard

    even = (axis for axis, length in enumerate(parameter.shape) if length % size == 0)
    return Shard(next(even, 0))


def largest_share(parameter: Tensor, size: int) -> int:
    """Numbers of `parameter` that the process with most of it keeps, of `size` processes."""
    if parameter.dim() == 0:
        return 1
    axis = placement(parameter, size).dim
    return parameter.chunk(size, axis)[0].numel()


def sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def unsharded(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter for parameter in parameters if not sharded(parameter)]


@torch.no_grad()
def own(tensor: Tensor) -> Tensor:
    """The share of this process, in the same memory."""
    return tensor.to_local() if sharded(tensor) else tensor


def trainable(parameter: nn.Parameter) -> nn.Parameter:
    """The share of this process as a parameter of its own: what an optimiser changes."""
    return nn.Parameter(own(parameter)) if sharded(parameter) else parameter


@torch.no_grad()
def cut(value: Tensor, like: Tensor) -> Tensor:
    """A whole `value` of every process, sharded as `like` is; nothing is sent."""
    if not sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(device=like.device, dtype=like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def whole(share: Tensor, like: Tensor) -> Tensor:
    """The whole of what `share` is a share of, sharded as `like` is. All processes must call it."""
    if not sharded(like):
        return share
    from torch.distributed.tensor import DTensor

    spread = DTensor.from_local(
        share, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return spread.full_tensor()


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict with whole tensors; on other processes than the main one it is empty.

    All processes must call it. One tensor at a time is whole on the others.
    """
    state = {}
    for name, value in module.state_dict().items():
        full = whole(own(value), value)
        if rank() == 0:
            state[name] = full
    return state


def fill(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of whole tensors, which every process has."""
    here = module.state_dict()
    module.load_state_dict({name: cut(value, here.get(name, value)) for name, value in state.items()})


def whole_model(model: GroupViT) -> GroupViT:
    """The model itself, or a plain one with the weights of a sharded one. All processes must call it."""
    if not any(sharded(parameter) for parameter in model.parameters()):
        return model
    first = next(model.parameters())
    plain = GroupViT(model.config).to(device=first.device, dtype=first.dtype).train(model.training)
    for mine, theirs in zip(plain.state_dict().values(), model.state_dict().values(), strict=True):
        mine.copy_(whole(own(theirs), theirs))
    return plain


def total_norm(gradients: list[Tensor], like: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together; those sharded as in `like` count with all their shares."""
    parts = [gradient for gradient, one in zip(gradients, like, strict=True) if sharded(one)]
    if not parts:
        return nn.utils.get_total_norm(gradients)
    rest = [gradient for gradient, one in zip(gradients, like, strict=True) if not sharded(one)]
    norms = gather(nn.utils.get_total_norm(parts)[None])
    return torch.linalg.vector_norm(torch.cat([norms, *(one.norm()[None] for one in rest)]))
