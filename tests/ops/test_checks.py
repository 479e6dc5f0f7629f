"""Bad arguments: one clear line that names the argument, what was wanted and what came."""

from __future__ import annotations

import math

import pytest
import torch
from backends import BACKENDS

from groupvit_fast import ops
from groupvit_fast.ops import library


def good():
    query, key, value = torch.randn(2, 5, 8), torch.randn(2, 7, 8), torch.randn(2, 7, 8)
    return {"query": query, "key": key, "value": value}


ASSIGN_ERRORS = [
    ({"query": torch.randn(5, 8)}, r"query must be \[B, S, C\], got shape \[5, 8\]"),
    ({"query": [1.0]}, "query must be a tensor, got list"),
    ({"key": torch.randn(3, 7, 8)}, r"key must be \[B, L, C\] with B = 2 as in query, got shape \[3, 7, 8\]"),
    ({"key": torch.randn(2, 7, 9)}, "with C = 8 as in query"),
    ({"value": torch.randn(2, 6, 8)}, "value must be .* with L = 7 as in key"),
    ({"bias": torch.randn(2, 4)}, r"bias must be \[B, S\] with S = 5 as in query"),
    ({"value": torch.randn(2, 7, 8).double()}, "value must have the dtype of query, torch.float32, got"),
    (
        {"query": torch.ones(2, 5, 8).int()},
        "query must be float32, float64, bfloat16 or float16, got torch.int32",
    ),
    ({"key": torch.randn(2, 7, 8, device="meta")}, "key must be on the device of query, cpu, got meta"),
    ({"query": torch.randn(2, 0, 8)}, "query must have S >= 1, got S = 0"),
    ({"scale": math.nan}, "scale must be finite, got nan"),
    ({"scale": torch.tensor(1.0)}, "scale must be a Python number"),
    ({"tau": 0.0}, "tau must be above 0, got 0"),
    ({"tau": -1.0}, "tau must be above 0, got -1"),
    ({"tau": math.inf}, "tau must be finite"),
    ({"eps": -0.5}, "eps must be at least 0, got -0.5"),
    ({"noise_key": torch.tensor([1, 2, 3])}, r"noise_key must be a tensor int64\[2\], key and offset, got"),
    ({"noise_key": torch.tensor([1.0, 2.0])}, "noise_key must be .* got torch.float32"),
    ({"noise_key": 7}, "noise_key must be .* got 7"),
    ({"noise_key": torch.zeros(2, dtype=torch.int64, device="meta")}, "noise_key must be on cpu, got meta"),
]


@pytest.mark.parametrize(("change", "message"), ASSIGN_ERRORS, ids=[m[:40] for _, m in ASSIGN_ERRORS])
@pytest.mark.parametrize("name", library.BACKENDS if library.HAS_CPU else ["reference"])
def test_gumbel_assign_names_the_argument(name, change, message):
    arguments = good() | change
    with ops.use_backend(name), pytest.raises(ValueError, match=message):
        ops.gumbel_assign(arguments.pop("query"), arguments.pop("key"), arguments.pop("value"), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.randn(2, 5, 8)}, r"query must be \[B, H, S, D\], got shape \[2, 5, 8\]"),
        ({"key": torch.randn(2, 4, 7, 8)}, r"key must be \[B, H, L, D\] with H = 3 as in query"),
        ({"value": torch.randn(2, 3, 6, 8)}, "value must be .* with L = 7 as in key"),
        ({"value": torch.randn(2, 3, 7, 8).half()}, "value must have the dtype of query"),
        ({"query": torch.randn(2, 3, 5, 0), "key": torch.randn(2, 3, 7, 0)}, "with D = 0"),
        ({"scale": math.inf}, "scale must be finite, got inf"),
    ],
)
def test_group_attention_names_the_argument(change, message):
    arguments = {"query": torch.randn(2, 3, 5, 8)} | dict.fromkeys(("key", "value"), torch.randn(2, 3, 7, 8))
    arguments |= change
    with pytest.raises(ValueError, match=message):
        ops.group_attention(arguments.pop("query"), arguments.pop("key"), arguments.pop("value"), **arguments)


@pytest.mark.skipif(not any(b.compiled for b in BACKENDS), reason="nothing was compiled")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.randn(2, 5)}, r"query must be \[B, S, C\]"),
        ({"key": torch.randn(2, 7, 9)}, r"key must be \[B, L, C\] with sizes \[2, any, 8\]"),
        ({"value": torch.randn(2, 6, 8)}, "value must be"),
        ({"key": torch.randn(2, 7, 8).half()}, "key must have the dtype of query"),
        ({"bias": torch.randn(5)}, "bias must be"),
        ({"noise_key": torch.tensor([1, 2], dtype=torch.int32)}, "noise_key must be int64"),
        ({"tau": 0.0}, "tau must be above 0"),
        ({"query": torch.randn(2, 0, 8)}, "query must have S, C >= 1"),
    ],
)
def test_the_operators_themselves_check_too(change, message):
    """Called through torch.ops, without the public function in front: an error, never a crash."""
    numbers = {"scale": 1.0, "tau": 1.0, "eps": 1.0, "hard": True}
    arguments = good() | {"bias": None, "noise_key": None} | numbers | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.groupvit_fast.gumbel_assign_forward(*arguments.values())


@pytest.mark.skipif(not any(b.compiled for b in BACKENDS), reason="nothing was compiled")
@pytest.mark.parametrize("position", [*range(8), 9])  # 8 and 10, index and lse, are read on a GPU only
def test_the_backward_operators_check_every_tensor(position):
    query, key, value = good().values()
    arguments = [query, key, value, torch.randn(2, 5), None]
    results = torch.ops.groupvit_fast.gumbel_assign_forward(*arguments, 1.0, 1.0, 1.0, True)
    arguments = [torch.randn_like(query), torch.randn(2, 5), *arguments, *results]
    if arguments[position] is None:
        arguments[position] = torch.tensor([1.0])
    arguments[position] = (
        arguments[position][:1, :-1] if arguments[position].dim() > 1 else arguments[position]
    )
    with pytest.raises(RuntimeError, match="must be"):
        torch.ops.groupvit_fast.gumbel_assign_backward(*arguments, 1.0, 1.0, 1.0, True)
