"""One model on several processes: batch norm over all of them, gradients averaged; layers recomputed.

`nn.SyncBatchNorm` works on GPUs only and DDP gets in the way of accumulation, so both have a plain companion.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from groupvit_fast.console import UserError
from groupvit_fast.model.groupvit import GroupViT
from groupvit_fast.training import sharding
from groupvit_fast.training.apex import use_fused_layer_norm
from groupvit_fast.training.config import TrainConfig
from groupvit_fast.training.distributed import World, gather, sum_over_processes, world_size

BUCKET = 2**25
"""Numbers that are averaged over processes in one go: 128 MiB of float32."""


class _Normalised(torch.autograd.Function):
    """Rows [N,C] less the mean, over the deviation, of the rows of all processes, times weight, plus bias.

    Inside it is float64, because the gradient of a batch's features is small beside its terms: float32
    statistics, added up in another order, moved the encoder's gradient by 1.4e-6 of its length.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        wide = rows.double()
        variance, mean = torch.var_mean(wide, 0, correction=0)
        if world_size() > 1:  # every process has as many rows
            means, variances = gather(torch.stack([mean, variance])[None]).unbind(1)
            mean, variance = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        slope = (variance + eps).rsqrt()
        ctx.save_for_backward(rows, weight, mean, slope)
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        return torch.addcmul(bias, wide - mean, slope * weight).to(rows.dtype), mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        rows, weight, mean, slope = ctx.saved_tensors
        wide, normal = gradient.double(), (rows.double() - mean).mul_(slope)
        own = torch.stack([wide.sum(0), (wide * normal).sum(0)])
        shift, stretch = sum_over_processes(own.clone()) / (world_size() * rows.shape[0])
        to_rows = wide.sub_(shift).sub_(normal.mul_(stretch)).mul_(slope * weight)
        return to_rows.to(rows.dtype), own[1].to(weight.dtype), own[0].to(weight.dtype), None


class SyncedBatchNorm(nn.BatchNorm1d):
    """Batch norm of rows [N,C] whose statistics in training are those of the rows of all processes."""

    def forward(self, rows: Tensor) -> Tensor:
        if not self.training:
            return super().forward(rows)
        normal, mean, variance = _Normalised.apply(rows, self.weight, self.bias, self.eps)
        self._remember(mean, variance, rows.shape[0] * world_size())
        return normal

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: int) -> None:
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        unbiased = variance * (count / max(count - 1, 1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)


def synchronise_batch_norms(model: nn.Module) -> None:
    """Give the batch norms of the projectors the statistics of all processes; same parameters.

    On a CPU one process computes them as several do, so that the number of processes makes no difference.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is not nn.BatchNorm1d:
                continue
            if not child.weight.is_cuda:
                setattr(module, name, _synced(child))
            elif world_size() > 1:
                setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))


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
    synchronise_batch_norms(model)
    if world.size > 1:
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
