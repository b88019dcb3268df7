"""A checkpoint is whole or passed over, and nothing in it runs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from dist_dcgan.training.checkpoint import list_checkpoints, load_checkpoint, load_newest, save_checkpoint
from shards.errors import UserError
from tests.commands import module, one_line_error, succeed


def save(directory: Path, step: int, keep: int = 3) -> Path:
    tensors = {
        "a": torch.full((2, 3, 4, 4), float(step)).contiguous(memory_format=torch.channels_last),
        "b": torch.tensor(step),
    }
    return save_checkpoint(directory, tensors, {"step": step, "scaler_g": {"scale": 1.5}}, keep)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    tensors, values = load_checkpoint(save(tmp_path, 7))
    assert torch.equal(tensors["a"], torch.full((2, 3, 4, 4), 7.0))
    assert (tensors["b"].item(), tensors["b"].dtype) == (7, torch.int64)
    assert values == {"step": 7, "scaler_g": {"scale": 1.5}}


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 99_999_998, 99_999_999, 100_000_000):  # the last has a digit more
        save(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-99999998",
        "step-99999999",
        "step-100000000",
    ]


def test_one_just_written_stays_though_later_ones_are_there(tmp_path: Path) -> None:
    for step in (7, 8, 9, 1, 2):
        save(tmp_path, step, keep=2)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["1", "2", "8", "9"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "values.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        middle = len(content) // 2
        changed = bytes([content[middle] ^ 1])
        path.write_bytes(content[:middle] + (changed + content[middle + 1 :] if damage == "flip" else b""))
    found = load_newest(tmp_path)
    assert found is not None
    assert found[1]["step"] == 1
    assert "step-00000002 is passed over" in capsys.readouterr().err


def test_an_unfinished_checkpoint_is_none_and_is_swept_by_the_next(tmp_path: Path) -> None:
    left = tmp_path / "step-00000002.tmp"
    left.mkdir()
    (left / "tensors.safetensors").write_bytes(b"half")
    assert load_newest(tmp_path) is None
    save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_pickle_in_its_place_does_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "pwned",)  # type: ignore[return-value]

    path = save(tmp_path, 1)
    for name in ("tensors.safetensors", "values.json"):
        (path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(UserError, match=r"none of the 1 checkpoints in .* is sound"):
            load_newest(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_inspect_lists_what_is_sound(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 1)
    values = save(tmp_path / "checkpoints", 2) / "values.json"
    values.write_text(json.dumps(json.loads(values.read_text()) | {"values": {"step": 3}}))
    lines = succeed(module("dist_dcgan.training.checkpoint", "inspect", tmp_path)).stdout.splitlines()
    assert lines[0].startswith("step-00000001: sound, step 1, 2 tensors")
    assert lines[1].startswith("step-00000002: DAMAGED, values.json does not match its checksum")


def test_inspect_of_something_else_says_so(tmp_path: Path) -> None:
    assert "no checkpoints in" in one_line_error(module("dist_dcgan.training.checkpoint", "inspect", tmp_path))
