"""The problems of the kernel benchmark: inputs, candidates, the check of ours, the bytes that must move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import eager
import sdpa
import torch
from torch import Tensor

from groupvit_fast import ops
from groupvit_fast.console import UserError
from groupvit_fast.ops import reference


@dataclass
class Case:
    """One operator at one shape. Candidates take no arguments; "ours" is among them, "eager" the first."""

    operator: str
    shape: str
    candidates: dict[str, Callable[[], Tensor]]
    check: Callable[[], None]
    read: Sequence[Tensor]  # what the forward must read
    written: Sequence[Tensor]  # and write
    leaves: Sequence[Tensor] = ()  # differentiable inputs; none: the operator has no backward
    compilable: Callable[[], Tensor] | None = None  # the eager code, for torch.compile
    saved: int = 0  # bytes that the backward of ours reads beside inputs and outputs
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))

    def forward_bytes(self) -> int:
        return sum(t.nbytes for t in (*self.read, *self.written))

    def backward_bytes(self) -> int:
        """Inputs, output and its gradient read, gradients of the inputs written, each once."""
        return sum(2 * t.nbytes for t in self.leaves) + 2 * self.gradient.nbytes + self.saved

    def with_backward(self, candidate: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(candidate(), self.leaves, self.gradient)


def check_equal(
    name: str, result: Tensor, wanted: Tensor, tolerance: float, *, cancelling: float = 0.0
) -> None:
    """A kernel that is wrong gets no time; the tolerance is relative to the largest value.

    `cancelling` is the size of the terms where they may cancel: the softmax of one token has no gradient.
    """
    error = (result.double() - wanted.double()).abs().max().item() if result.numel() else 0.0
    largest = max(wanted.abs().max().item() if result.numel() else 0.0, cancelling)
    if not error <= tolerance * max(largest, 1e-30):
        raise UserError(f"{name}: error {error:.3g}, allowed {tolerance * largest:.3g}")


def tolerance_of(dtype: torch.dtype) -> float:
    return {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]


def _random(*shape: int, device: str, dtype: torch.dtype, gradient: bool = True) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype).requires_grad_(gradient)


def attention_case(
    batch: int, heads: int, groups: int, tokens: int, depth: int, device: str, dtype: torch.dtype
) -> Case:
    """query, key and value in the layout that projections leave: heads side by side in a row."""
    rows = (groups, tokens, tokens)
    flat = [_random(batch, r, heads * depth, device=device, dtype=dtype) for r in rows]
    query, key, value = (t.unflatten(-1, (heads, depth)).transpose(1, 2) for t in flat)
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    gradient = torch.randn_like(leaves[0])

    def check() -> None:
        results = []
        for function in (
            ops.group_attention,
            lambda q, k, v: reference.group_attention(q, k, v, scale=depth**-0.5),
        ):
            output = function(*leaves)
            results.append([output, *torch.autograd.grad(output, leaves, gradient)])
        for name, own, wanted in zip(("output", "query", "key", "value"), *results, strict=True):
            terms = 1.0 if name in ("query", "key") else 0.0
            check_equal(f"group_attention {name}", own, wanted, tolerance_of(dtype), cancelling=terms)

    return Case(
        operator="group_attention",
        shape=f"B{batch} H{heads} {groups}x{tokens} D{depth}",
        candidates={
            "eager": lambda: eager.attention(*leaves),
            **sdpa.candidates(leaves),
            "ours": lambda: ops.group_attention(*leaves),
        },
        check=check,
        read=leaves,
        written=[gradient],
        leaves=leaves,
        compilable=lambda: eager.attention(*leaves),
        saved=4 * batch * heads * groups,
        gradient=gradient,
    )


def assign_case(batch: int, groups: int, tokens: int, channels: int, device: str, dtype: torch.dtype) -> Case:
    """Training: hard assignment with noise, the tokens being keys and values at once."""
    query = _random(batch, groups, channels, device=device, dtype=dtype)
    key = _random(batch, tokens, channels, device=device, dtype=dtype)
    noise_key = torch.tensor([7, 1], device=device)
    gradient = torch.randn_like(query)
    result = ops.gumbel_assign(query.detach(), key.detach(), key.detach(), noise_key=noise_key)
    return Case(
        operator="gumbel_assign",
        shape=f"B{batch} {groups}x{tokens} C{channels}",
        candidates={
            "eager": lambda: eager.assign(query, key, key),
            "ours": lambda: ops.gumbel_assign(query, key, key, noise_key=noise_key).output,
        },
        check=lambda: _check_assign(query, key, noise_key, gradient),
        read=[query, key],
        written=[result.output, result.index, result.count],
        leaves=[query, key],
        compilable=lambda: eager.assign(query, key, key),
        saved=4 * batch * groups + (12 * batch * tokens if device == "cuda" else 0),
        gradient=gradient,
    )


def _check_assign(query: Tensor, key: Tensor, noise_key: Tensor, gradient: Tensor) -> None:
    """Samples in which a tie fell the other way, by rounding, are left out; they must be few."""
    results = []
    for backend in (ops.backend(), "reference"):
        with ops.use_backend(backend):
            result = ops.gumbel_assign(query, key, key, noise_key=noise_key)
            results.append(
                [result.index, result.output, *torch.autograd.grad(result.output, (query, key), gradient)]
            )
    (own_index, *own), (index, *wanted) = results
    same = (own_index == index).all(dim=1)
    if (own_index != index).double().mean() > 1e-4:
        raise UserError("gumbel_assign: the indices differ from those of the reference")
    for name, one, other in zip(("output", "query", "key"), own, wanted, strict=True):
        tolerance = 5 * tolerance_of(query.dtype)
        check_equal(
            f"gumbel_assign {name}", one[same], other[same], tolerance, cancelling=float(name == "query")
        )


def upsample_case(batch: int, groups: int, side: int, size: int, device: str, dtype: torch.dtype) -> Case:
    maps = _random(batch, groups, side, side, device=device, dtype=dtype, gradient=True)
    target = (size, size)
    wanted = eager.upsample(maps.detach(), target)
    return Case(
        operator="upsample_masks",
        shape=f"B{batch} G{groups} {side}->{size}",
        candidates={
            "eager": lambda: eager.upsample(maps, target),
            "ours": lambda: ops.upsample_masks(maps, target),
        },
        check=lambda: check_equal(
            "upsample_masks", ops.upsample_masks(maps, target), wanted, tolerance_of(dtype)
        ),
        read=[maps],
        written=[wanted],
        leaves=[maps],
        gradient=torch.randn_like(wanted),
    )


def decode_case(
    batch: int, classes: int, grid: tuple[int, int], size: tuple[int, int], device: str, dtype: torch.dtype
) -> Case:
    """Labels of evaluation windows: eight groups and a threshold; the first stage's 64 maps unused."""
    stages = [_random(batch, groups, *grid, device=device, dtype=dtype, gradient=False) for groups in (64, 8)]
    maps = stages[-1]
    scores = _random(batch, 8, classes, device=device, dtype=dtype, gradient=False).softmax(dim=-1)
    threshold = scores.amax(dim=-1).median().item()
    wanted = eager.lean_decode(maps, scores, size, threshold)

    def ours() -> Tensor:
        return ops.decode_masks(maps, scores, size, background_threshold=threshold)

    def check() -> None:
        """In float32, as ours computes: rounded to bf16, the two best groups of many pixels are equal."""
        exact = eager.lean_decode(maps.float(), scores.float(), size, threshold)
        differing = (ours() != exact).double().mean().item()
        if differing > 1e-4:
            raise UserError(f"decode_masks: {differing:.2%} of the labels differ")

    return Case(
        operator="decode_masks",
        shape=f"B{batch} K{classes} {grid[0]}x{grid[1]}->{size[0]}x{size[1]}",
        candidates={
            "eager": lambda: eager.decode(stages, scores, size, threshold),
            "lean": lambda: eager.lean_decode(maps, scores, size, threshold),
            "ours": ours,
        },
        check=check,
        read=[maps, scores],
        written=[wanted],
        compilable=lambda: eager.decode(stages, scores, size, threshold),
    )


def official_cases(device: str, dtype: torch.dtype, *, full: bool) -> list[Callable[[], Case]]:
    """Both grouping stages at 224 px, with `full` at 448 px too; made one at a time, to keep memory free."""
    batches = (256, 1024) if device == "cuda" else (32,)
    token_cases: list[list[Callable[[], Case]]] = []
    for batch in batches:
        stages = [(batch, 64, 196), (batch, 8, 64)] + ([(batch // 4, 64, 784)] if full else [])
        token_cases.append(
            [lambda s=s: attention_case(s[0], 6, s[1], s[2], 64, device, dtype) for s in stages]
            + [lambda s=s: assign_case(*s, 384, device, dtype) for s in stages]
        )
    windows = 64 if device == "cuda" else 1
    makers = [lambda: upsample_case(batches[0] // 4, 8, 14, 224, device, dtype)]
    makers += [lambda: decode_case(windows, 20, (28, 28), (448, 448), device, dtype)]
    if full:
        makers += [lambda: upsample_case(batches[0] // 16, 8, 28, 448, device, dtype)]
        makers += [lambda: decode_case(windows, 80, (28, 37), (448, 597), device, dtype)]
    first, *larger = token_cases  # the larger batches last: a run that is cut off has every operator
    return [*first, *makers, *(make for batch in larger for make in batch)]
