"""Shards of captioned images, their index, and the loader that turns them into batches.

`shards` writes webdataset tars, `index` finds the usable samples in them, `sampling` fixes the order and
every random draw, `pipeline` decodes with NVIDIA DALI, `text` makes tokens, nouns and prompts.
"""
