"""The tests notice when a kernel is broken (mutations.py has the whole list, and runs it)."""

from __future__ import annotations

import pytest
from host_cuda_backend import available
from mutations import MUTATIONS, Mutation, caught_by, mutated

pytestmark = pytest.mark.skipif(not available(), reason="no host compiler")
# One of each kind: a barrier, an edge, a sign, a counter.
FEW = [
    "attention: missing barrier between work items",
    "attention: tile edge of the tokens",
    "assign gradient: sign of D",
    "noise: wrong counter",
]
CHOSEN = [mutation for mutation in MUTATIONS if mutation.name in FEW]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_each_mutation_can_be_made(mutation: Mutation, tmp_path):
    mutated(mutation, tmp_path)


def test_names_are_unique():
    assert len(CHOSEN) == len(FEW)
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", CHOSEN, ids=lambda mutation: mutation.name)
def test_a_broken_kernel_is_noticed(mutation: Mutation):
    assert caught_by(mutation) is not None


@pytest.mark.slow
def test_a_sound_kernel_is_not():
    """The control: a change that means nothing passes the same tests."""
    first = CHOSEN[0]
    assert caught_by(Mutation("nothing", first.file, "#pragma once", "#pragma once\n", first.tests)) is None
