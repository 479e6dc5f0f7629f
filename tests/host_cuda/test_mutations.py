"""The tests notice when a kernel is broken (mutations.py has the whole list, and runs it)."""

from __future__ import annotations

import pytest
from host_cuda_backend import available
from mutations import MUTATIONS, Mutation, caught_by, mutated

pytestmark = pytest.mark.skipif(not available(), reason="no host compiler")
# One of each kind. The first two are always run: they compile one source and fail within seconds.
FEW = {
    "attention: missing barrier between work items": (),
    "attention: tile edge of the tokens": (),
    "assign gradient: sign of D": pytest.mark.slow,
    "noise: wrong counter": pytest.mark.slow,
}
CHOSEN = {mutation.name: mutation for mutation in MUTATIONS if mutation.name in FEW}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_each_mutation_can_be_made(mutation: Mutation, tmp_path):
    mutated(mutation, tmp_path)


def test_names_are_unique():
    assert len(CHOSEN) == len(FEW)
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks) for name, marks in FEW.items()])
def test_a_broken_kernel_is_noticed(name: str):
    assert caught_by(CHOSEN[name]) is not None


@pytest.mark.slow
def test_a_sound_kernel_is_not():
    """The control: a change that means nothing passes the same tests."""
    first = CHOSEN["attention: tile edge of the tokens"]
    assert caught_by(Mutation("nothing", first.file, "#pragma once", "#pragma once\n", first.tests)) is None
