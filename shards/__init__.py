"""The shard format and its tools: convert encoded images to WebDataset tar shards with one manifest.

No module imports torch, so data can be prepared on machines without it. `README.md` defines the format.
"""
