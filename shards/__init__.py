"""The shard format and its tools: an LMDB of images becomes WebDataset tar shards under one manifest.

Nothing here imports torch, so that data can be prepared on machines without it. `README.md` defines the
format.
"""
