"""A data set as a webdataset pipeline, for PyTorch code of your own.

torch and webdataset are imported when it is opened: nothing else in `shards` needs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from shards.common.files import open_plain
from shards.manifest import check_files, read_manifest


def open_webdataset(directory: Path | str, shuffle: int = 0, seed: int = 0) -> Any:
    """Return a `webdataset.WebDataset` of the samples in `directory`, for a `DataLoader`.

    A sample is a dictionary of `__key__` and `image`, a uint8 array (size, size, 3). Shards are divided among the
    ranks of torch.distributed and the workers of the DataLoader, so that each sample comes once per epoch. `len` is the
    number of this rank's samples; ranks have unequal numbers if the shards do not divide evenly. With `shuffle`, the
    shards are shuffled, and samples within a buffer of that size, by `seed` and epoch, which workers count only if they
    are persistent.

    Raises UserError if the folder holds no data set, or files that do not match its manifest.
    """
    import webdataset
    from webdataset.cache import StreamingOpen
    from webdataset.utils import pytorch_worker_info

    directory = Path(directory)
    manifest = read_manifest(directory)
    check_files(directory, manifest)
    rank, world_size, *_ = pytorch_worker_info()
    pipeline: Any = webdataset.WebDataset(
        [str(directory / shard.name) for shard in manifest.shards],
        shardshuffle=len(manifest.shards) if shuffle else False,
        detshuffle=True,
        seed=seed,
        nodesplitter=webdataset.split_by_node,
        empty_check=False,  # a rank or worker may have no shard
    )
    stages = [_open if isinstance(stage, StreamingOpen) else stage for stage in pipeline.pipeline]
    assert _open in stages, stages
    pipeline.pipeline = stages
    if shuffle:
        pipeline = pipeline.compose(webdataset.detshuffle(shuffle, initial=shuffle, seed=seed))
    samples = sum(shard.samples for shard in manifest.shards[rank::world_size])
    return pipeline.decode("rgb8").map(_sample).with_length(samples, silent=True)


def _open(shards: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Open each shard, in place of webdataset's stage: that takes paths for URLs, such as `pipe:COMMAND`."""
    for shard in shards:
        with open_plain(Path(shard["url"])) as stream:
            yield shard | {"stream": stream}


def _sample(fields: dict[str, Any]) -> dict[str, Any]:
    return {"__key__": fields["__key__"], "image": fields["ppm"].copy()}  # writable, as torch asks for
