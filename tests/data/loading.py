"""A small training loader, and batches from it."""

import itertools

from groupvit_fast.data.pipeline import TrainLoader


def make_loader(shards, **options):
    options = {"batch_size": 8, "image_size": 16, "num_threads": 1, "quiet": True} | options
    return TrainLoader(shards, **options)


def take(loader, count):
    """The next `count` batches, with the loader's thread ended."""
    iterator = iter(loader)
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()
