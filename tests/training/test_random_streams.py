"""Random numbers belong to (seed, stream, step, slot) and to nothing else.

Promise 3 (randomness) of dist_dcgan/README.md.
"""

from __future__ import annotations

import pytest
import torch

from dist_dcgan.random_streams import bits, normal, permutation, set_key, stream_seed, uniform

MASK = 2**64 - 1


def splitmix64(counter: int, key: int) -> int:
    """Steele, Lea and Flood's generator in plain integers."""
    x = (counter * 0x9E3779B97F4A7C15 + key) & MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
    return x ^ x >> 31


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_bits_are_splitmix64_of_the_counter(seed: int) -> None:
    key = stream_seed(seed, "z", 7)
    drawn = bits(key, range(5, 9), 3)
    expected = [[splitmix64((slot << 32) + i, key) for i in range(3)] for slot in range(5, 9)]
    assert [[value & MASK for value in row] for row in drawn.tolist()] == expected


@pytest.mark.parametrize("draw", [bits, uniform, normal])
def test_a_key_on_the_device_gives_the_numbers_of_the_key(draw) -> None:  # type: ignore[no-untyped-def]
    on_device = torch.zeros((), dtype=torch.int64)
    for key in (0, 1, 2**63 - 1, 2**63, 2**64 - 1, stream_seed(0, "z", 0)):
        set_key(on_device, key)
        assert torch.equal(draw(on_device, range(3, 7), 101), draw(key, range(3, 7), 101))


@pytest.mark.parametrize("draw", [uniform, normal])
def test_slices_of_slots_make_up_the_whole(draw) -> None:  # type: ignore[no-untyped-def]
    key = stream_seed(0, "noise", 3)
    whole = draw(key, range(12), 1001)
    for world_size in (2, 3, 4):
        per_rank = 12 // world_size
        parts = [draw(key, range(rank * per_rank, (rank + 1) * per_rank), 1001) for rank in range(world_size)]
        assert torch.equal(torch.cat(parts), whole)


def test_seed_stream_step_and_slot_all_matter() -> None:
    keys = {stream_seed(seed, stream, step) for seed in range(20) for stream in ("z", "flip") for step in range(20)}
    assert len(keys) == 800
    first, second = uniform(stream_seed(0, "z", 0), range(2), 1000)
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.1


def test_uniform_has_the_moments_of_uniform() -> None:
    drawn = uniform(stream_seed(0, "z", 0), range(100), 10_000).double()
    assert 0 <= float(drawn.min()) < 1e-5
    assert 1 - 1e-5 < float(drawn.max()) < 1
    assert float(drawn.mean()) == pytest.approx(0.5, abs=2e-3)
    assert float(drawn.var()) == pytest.approx(1 / 12, rel=5e-3)


def test_normal_has_the_moments_of_a_gaussian() -> None:
    drawn = normal(stream_seed(0, "z", 0), range(100), 10_001).double()
    assert drawn.shape == (100, 10_001)
    assert float(drawn.mean()) == pytest.approx(0, abs=4e-3)
    assert float(drawn.var()) == pytest.approx(1, rel=5e-3)
    assert float((drawn**3).mean()) == pytest.approx(0, abs=1e-2)
    assert float((drawn**4).mean()) == pytest.approx(3, rel=1e-2)
    halves = drawn[:, :5000], drawn[:, 5001:10_001]  # cosines and sines of the same angles
    assert abs(float(torch.corrcoef(torch.stack([half.flatten() for half in halves]))[0, 1])) < 5e-3


def test_permutation_holds_every_number_once() -> None:
    first, second = permutation(stream_seed(0, "order", 0), 1000), permutation(stream_seed(0, "order", 1), 1000)
    assert sorted(first.tolist()) == list(range(1000))
    assert int((first == second).sum()) < 10
