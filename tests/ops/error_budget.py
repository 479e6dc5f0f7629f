"""How wrong a kernel may be: not more than plain PyTorch in the same dtype is, and a little for rounding.

The truth is the reference in float64 on the same (exactly widened) inputs; the yardstick is the reference in
the dtype under test. No constant is tuned to a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


def widened(tensor: Tensor | None) -> Tensor | None:
    """The same values in float64 on the CPU, as a leaf that takes a gradient."""
    return None if tensor is None else tensor.detach().cpu().double().requires_grad_()


def leaf(tensor: Tensor | None) -> Tensor | None:
    """The same tensor, memory layout included, as a leaf that takes a gradient."""
    return None if tensor is None else tensor.detach().requires_grad_()


def rounding(dtype: torch.dtype) -> float:
    """Two roundings; in float64, where the truth is as inexact as the result, the errors of some sums too."""
    return 2 * torch.finfo(dtype).eps * (50 if dtype == torch.float64 else 1)


def assert_close(
    name: str, result: Tensor, truth: Tensor, eager: Tensor, *, factor: float = 2.0, floor: float = 0.0
) -> None:
    """Every element is within `factor` times the worst error of `eager`, two roundings and `floor`."""
    result, truth, eager = (t.detach().cpu() for t in (result, truth, eager))
    assert result.shape == truth.shape, f"{name}: shape {list(result.shape)}, wanted {list(truth.shape)}"
    if result.numel() == 0:
        return
    allowed = factor * (eager.double() - truth).abs().max().item() + floor
    allowed += rounding(result.dtype) * truth.abs().max().item()
    error = (result.double() - truth).abs()
    if not bool((error <= allowed).all()):
        worst = error.nan_to_num(nan=torch.inf).argmax()
        where = tuple(int(i) for i in torch.unravel_index(worst, error.shape))
        got, wanted = result[where].item(), truth[where].item()
        raise AssertionError(f"{name}{list(where)}: got {got}, wanted {wanted}, allowed error {allowed:.3g}")


def gradients(output: Tensor, grad_output: Tensor, inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of the inputs that are given; inputs are leaves."""
    given = [i for i in inputs if i is not None]
    results = iter(torch.autograd.grad(output, given, grad_output.to(output)))
    return [None if i is None else next(results) for i in inputs]


def check_budget(
    kernel: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Mapping[str, Tensor | None],
    grad_output: Tensor,
    floors: Mapping[str, float] | None = None,
) -> None:
    """Compare output and gradients of `kernel` with `reference`; both take leaves and return the output.

    `floors` are rounding errors that follow from the data: by the name of an input for its gradient, and
    "output".
    """
    floors = floors or {}
    own = [leaf(i) for i in inputs.values()]
    exact = [widened(i) for i in inputs.values()]
    plain = [leaf(i if i is None else i.detach().cpu()) for i in inputs.values()]
    output, truth, eager = kernel(*own), reference(*exact), reference(*plain)
    assert output.dtype == grad_output.dtype
    assert_close("output", output, truth, eager, floor=floors.get("output", 0.0))
    results = (gradients(o, grad_output, i) for o, i in ((output, own), (truth, exact), (eager, plain)))
    for name, own_grad, exact_grad, plain_grad in zip(inputs, *results, strict=True):
        if own_grad is not None:
            label = f"gradient of {name}"
            assert_close(label, own_grad, exact_grad, plain_grad, factor=3.0, floor=floors.get(name, 0.0))
