"""A safetensors file as a stream of bytes, equal to the result of `safetensors.torch.save`.

The library builds the whole file in memory, and before version 0.8 holds the interpreter lock until it is written,
which would stop training. Here each part is small, and writing or hashing it releases the lock.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import torch
from torch import Tensor

_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of the types, in the order of their tensors in the format: larger elements first."""
_ALIGNMENT = 8  # of the first tensor's bytes
_PART = 1 << 20
_MOST_HEADER_BYTES = 1 << 24


def serialised(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of the file, at most 1 MiB at a time after the header.

    Tensors may be on any device and in any memory format; one that is not contiguous on the CPU is copied when it is
    yielded.
    """
    rank = {dtype: index for index, dtype in enumerate(_DTYPES)}
    ordered = dict(sorted(tensors.items(), key=lambda item: (rank[item[1].dtype], item[0])))
    yield _header(ordered)
    for tensor in ordered.values():
        # As bytes, because numpy has no bfloat16; `reshape`, because a scalar cannot be viewed as bytes.
        content = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        for first in range(0, len(content), _PART):
            yield content[first : first + _PART]


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the length of the description, then the description padded with spaces."""
    description, first = {}, 0
    for name, tensor in tensors.items():
        offsets = [first, first + tensor.nbytes]
        description[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        first += tensor.nbytes
    text = json.dumps(description, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def require_size(file: BinaryIO, most_bytes: int) -> None:
    """Raise ValueError unless the size of a file that may come from anybody is what its header says, and no more.

    Terabytes of zeros take no room on a disk, and days to read. The file is read from its beginning afterwards.
    """
    size = os.fstat(file.fileno()).st_size
    if size > most_bytes:
        raise ValueError(f"{size:,} bytes of tensors, more than {most_bytes:,}")
    length = int.from_bytes(file.read(8), "little")
    if length > min(size, _MOST_HEADER_BYTES):
        raise ValueError(f"no safetensors file: a header of {length:,} bytes")
    try:
        tensors = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (AttributeError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"no safetensors file: {error!r}") from None
    if size != expected:
        raise ValueError(f"{size:,} bytes, {expected:,} by the header")
    file.seek(0)
