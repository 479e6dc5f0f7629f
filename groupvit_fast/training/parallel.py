"""One model on several processes: batch norm over all of them, gradients averaged; layers recomputed.

`nn.SyncBatchNorm` works on GPUs only and DDP gets in the way of accumulation, so both have a plain companion.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from groupvit_fast.console import UserError
from groupvit_fast.model.groupvit import GroupViT
from groupvit_fast.training import sharding
from groupvit_fast.training.apex import use_fused_layer_norm
from groupvit_fast.training.config import TrainConfig
from groupvit_fast.training.distributed import World, sum_over_processes, sum_with_grad, world_size

BUCKET = 2**25
"""Numbers that are averaged over processes in one go: 128 MiB of float32."""


class SyncedBatchNorm(nn.BatchNorm1d):
    """Batch norm of rows [N,C] whose statistics in training are those of the rows of all processes.

    Mean first, then the mean square about it: as exact as with all rows in one process.
    """

    def forward(self, rows: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(rows)
        with torch.autocast(rows.device.type, enabled=False):
            wide = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
            count = wide.shape[0] * world_size()
            mean = sum_with_grad(wide.sum(0)) / count
            centred = wide - mean
            variance = sum_with_grad(centred.square().sum(0)) / count
            self._remember(mean.detach(), variance.detach(), count)
            normal = centred * (variance + self.eps).rsqrt() * self.weight + self.bias
        return normal.to(rows.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: int) -> None:
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        unbiased = variance * count / max(count - 1, 1)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)


def synchronise_batch_norms(model: nn.Module) -> None:
    """Give the batch norms of the projectors the statistics of all processes; same parameters."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is not nn.BatchNorm1d:
                continue
            on_gpu = child.weight.is_cuda
            synced = nn.SyncBatchNorm.convert_sync_batchnorm(child) if on_gpu else _synced(child)
            setattr(module, name, synced)


def _synced(norm: nn.BatchNorm1d) -> SyncedBatchNorm:
    synced = SyncedBatchNorm(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    )
    synced.train(norm.training)
    synced._parameters, synced._buffers = norm._parameters, norm._buffers
    return synced


def prepare(model: GroupViT, config: TrainConfig, world: World) -> None:
    """Layers as `config` wants them, with the weights of the main process, before the optimiser is made."""
    checkpoint_stages(model, config.grad_checkpointing)
    prepare_norms(model, config)
    if world.size > 1:
        synchronise_batch_norms(model)
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def prepare_norms(model: nn.Module, config: TrainConfig) -> None:
    """With an optimiser of NVIDIA apex, use its fused layer norm too."""
    if config.optimizer != "adamw":
        use_fused_layer_norm(model)


def wrapped(model: GroupViT, config: TrainConfig, world: World, device: str) -> nn.Module:
    """The model as it is called in a step: compiled if wanted, sharded if wanted, or with averaged gradients.

    Gradients that neither FSDP nor DDP averages are left to `average_gradients`.
    """
    if sharding.wanted(config):
        sharding.shard(model, config, device)
        return model
    forward: nn.Module = model
    if world.size > 1 and config.accum_freq == 1:
        devices = [world.local_rank] if device == "cuda" else None
        frozen = any(not parameter.requires_grad for parameter in model.parameters())
        forward = DistributedDataParallel(
            model,
            device_ids=devices,
            gradient_as_bucket_view=True,
            static_graph=not frozen and not config.compile,
        )
    if config.cuda_graphs:
        if device != "cuda":
            raise UserError("--cuda-graphs needs a GPU: it records what is launched on one")
        if config.accum_freq > 1:
            raise UserError("--cuda-graphs replays into the same memory, so --accum-freq must be 1 with it")
        # The images always have one shape; the number of texts does not, so they stay outside the graph.
        model.image_encoder.compile(mode="reduce-overhead")
        return forward
    return torch.compile(forward) if config.compile else forward


def left_to_average(config: TrainConfig, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Parameters whose gradients are this process's own after the backward pass.

    With DDP none. While gradients are accumulated without FSDP all are, to be averaged once.
    """
    if any(map(sharding.sharded, parameters)):
        return sharding.unsharded(parameters)
    return parameters if config.accum_freq > 1 else []


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace the gradients by their mean over processes, in few large messages."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    bucket: list[Tensor] = []
    for number, gradient in enumerate(gradients):
        bucket.append(gradient)
        if number == len(gradients) - 1 or sum(one.numel() for one in bucket) >= BUCKET:
            flat = sum_over_processes(torch.cat([one.flatten() for one in bucket])) / world_size()
            parts = flat.split([one.numel() for one in bucket])
            for one, part in zip(bucket, parts, strict=True):
                one.copy_(part.view_as(one))
            bucket = []


def checkpoint_stages(model: GroupViT, names: list[str]) -> None:
    """Compute layers of these stages again in the backward pass: all, text, image, or 1, 2, 3 ..."""
    stages = {str(number): stage for number, stage in enumerate(model.image_encoder.stages, 1)}
    for name in names:
        if name not in ("all", "text", "image", *stages):
            known = ", ".join(("all", "text", "image", *stages))
            raise UserError(f"--grad-checkpointing {name}: choose from {known}")
    model.text_encoder.checkpointing = bool({"all", "text"} & {*names})
    for number, stage in stages.items():
        stage.checkpointing = bool({"all", "image", number} & {*names})
