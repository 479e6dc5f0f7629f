"""Shards of captioned images, their index, and the loader that turns them into batches.

`shards` writes webdataset tars; `scan` and `index` find the usable samples in them and `reader` reads them;
`sampling` fixes the order and every random draw; `decode` is the DALI pipeline; `text` makes tokens, nouns
and prompts; `batches` puts one batch together and `pipeline` keeps them coming. `classification` reads
labelled images for zero-shot accuracy.
"""
