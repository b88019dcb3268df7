"""Random numbers as a function of (seed, stream name, step, slot), the same for every world size and device.

A slot is a position in the global batch. Numbers are not drawn in sequence, so there is no generator state to save, and
a rank computes the numbers of its own slots only. The bits are SplitMix64 (Steele, Lea, Flood 2014) of a counter, in
integer arithmetic that is exact on every device.
"""

from __future__ import annotations

import hashlib
import math
from typing import TypeAlias

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_SLOT_BITS = 32
_UNIT = 2.0**-24  # uniform numbers have 24 bits, what a float32 holds exactly

Key: TypeAlias = int | Tensor
"""64 bits from `stream_seed`: a number, or an int64 scalar on the device that `set_key` filled.

Both give the same numbers. A captured CUDA graph keeps a number constant, but reads a tensor again in each replay.
"""


def stream_seed(seed: int, stream: str, step: int) -> int:
    """Return 64 bits determined by seed, stream and step."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def set_key(key: Tensor, value: int) -> None:
    """Fill `key`, an int64 scalar, with 64 bits; on a GPU they are passed as a kernel argument, without a copy."""
    key.fill_(_signed(value))


def bits(key: Key, slots: range, per_slot: int, device: torch.device | None = None) -> Tensor:
    """Return 64 random bits per element as int64, shape (len(slots), per_slot)."""
    first = torch.arange(slots.start, slots.stop, device=device, dtype=torch.int64) << _SLOT_BITS
    x = first[:, None] + torch.arange(per_slot, device=device, dtype=torch.int64)
    x.mul_(_signed(_GOLDEN)).add_(_signed(key) if isinstance(key, int) else key)
    x.bitwise_xor_(_shift_right(x, 30)).mul_(_signed(_MIX_1))
    x.bitwise_xor_(_shift_right(x, 27)).mul_(_signed(_MIX_2))
    return x.bitwise_xor_(_shift_right(x, 31))


def uniform(key: Key, slots: range, per_slot: int, device: torch.device | None = None) -> Tensor:
    """Return float32 uniform in [0, 1), shape (len(slots), per_slot)."""
    return _shift_right(bits(key, slots, per_slot, device), 40).float().mul_(_UNIT)


def normal(key: Key, slots: range, per_slot: int, device: torch.device | None = None) -> Tensor:
    """Return float32 standard normal, shape (len(slots), per_slot), by Box and Muller's transform."""
    pairs = bits(key, slots, -(-per_slot // 2), device)
    radius = _shift_right(pairs, 40).float().add_(1).mul_(_UNIT).log_().mul_(-2).sqrt_()
    angle = pairs.bitwise_and_(0xFFFFFF).float().mul_(2 * math.pi * _UNIT)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :per_slot]


def permutation(key: Key, size: int) -> Tensor:
    """Return a random order of `range(size)` as int64: the order of `size` random keys."""
    return torch.argsort(bits(key, range(1), size)[0], stable=True)


def _shift_right(x: Tensor, by: int) -> Tensor:
    """Shift right and fill with zeros; torch's `>>` repeats the sign bit."""
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """Return the int64 with the same bits."""
    return value - (1 << 64) if value >> 63 else value
