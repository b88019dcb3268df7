"""What a checkpoint, a generator or its description of others may hold: refused before memory is taken."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import pytest
import torch
from safetensors.torch import save

from dist_dcgan import train
from dist_dcgan.run import checkpoint
from dist_dcgan.run.checkpoint import Retention, load_newest, save_checkpoint
from dist_dcgan.run.export import load_generator
from shards.common.errors import UserError
from shards.common.files import content_sha256
from tests.run.test_disks import command, finished, run_dir
from tests.run.test_disks import save as save_one
from tests.support.exports import as_older_version, describe, embed
from tests.support.mistakes import refusal

__all__ = ["finished", "run_dir"]


def signed(values: object, tensors_sha256: str = "") -> bytes:
    """A checkpoint's JSON whose checksum is right."""
    content: dict[str, Any] = {"format_version": 3, "tensors_sha256": tensors_sha256, "values": values}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return json.dumps(content | {"sha256": hashlib.sha256(text.encode()).hexdigest()}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"[]",
        b"null",
        b"1" * 10_000,
        b"\xff\xfe",
        signed([]),
        signed({"step": "2"}),
        signed({"step": 10**400}),
    ],
)
def test_older_checkpoints_are_tried_whatever_the_newest_holds(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, {"a": torch.tensor(step)}, {"step": step}, Retention(2))
    (tmp_path / "step-00000002" / "values.json").write_bytes(content)
    found = load_newest(tmp_path)
    assert found is not None and found.values["step"] == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: checkpoint {tmp_path}/step-00000002 is passed over: ")


def test_a_description_without_end_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, {"a": torch.tensor(step)}, {"step": step}, Retention(2))
    os.truncate(tmp_path / "step-00000002" / "values.json", 17 << 20)
    assert load_newest(tmp_path).values["step"] == 1  # type: ignore[union-attr]
    assert "larger than 16,777,216 bytes" in capsys.readouterr().err


def stretch(path: Path, size: int) -> None:
    """Have the header of a safetensors file say that a tensor of zeros, which take no room, fills it to `size`."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: os.truncate(path, 1 << 43), "8,796,093,022,208 bytes of tensors, more than 68,719,476,736"),
        (lambda path: os.truncate(path, 1 << 35), r"34,359,738,368 bytes, \d\d by the header"),
        (lambda path: stretch(path, 1 << 40), "more than 68,719,476,736"),
        (lambda path: path.write_bytes(b"\xff" * 100), "a header of 18,446,744,073,709,551,615 bytes"),
        (lambda path: path.write_bytes(b"\x02" + b"\0" * 7 + b"[]"), "no safetensors file: AttributeError"),
        (lambda path: path.write_bytes(b"\x08" + b"\0" * 7 + b'{"a":{}}'), "no safetensors file: KeyError"),
        (lambda path: path.write_bytes(b"\x02"), "a header of 2 bytes"),
        (lambda path: path.write_bytes(b""), "0 bytes|no safetensors|Expecting value"),
    ],
)
def test_tensors_without_end_are_not_read(
    change: Callable[[Path], object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, {"a": torch.tensor(step)}, {"step": step}, Retention(2))
    change(tmp_path / "step-00000002" / "tensors.safetensors")
    monkeypatch.setattr(
        checkpoint, "content_sha256", lambda file: content_sha256(file) if "1/" in path_of(file) else never()
    )
    assert load_newest(tmp_path).values["step"] == 1  # type: ignore[union-attr]
    assert re.search(message, capsys.readouterr().err)


def path_of(file: BinaryIO) -> str:
    return os.readlink(f"/proc/self/fd/{file.fileno()}")


def never(*_: object) -> NoReturn:
    pytest.fail("it is read")


def test_a_run_reads_no_more_than_its_state_may_take(
    demo_shards: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stretch(run_dir / "checkpoints" / "step-00000002" / "tensors.safetensors", 1 << 30)
    monkeypatch.setattr(checkpoint, "content_sha256", never)
    message = refusal(train.main, *command(demo_shards, run_dir, 4))
    assert message.startswith(f"none of the 1 checkpoints in {run_dir}/checkpoints is sound")
    assert re.search(r"passed over: 1,073,741,\d+ bytes of tensors, more than \d,\d+,\d+\n", capsys.readouterr().err)


def test_a_generator_without_end_is_not_read(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run_dir / "generator_ema.safetensors"
    as_older_version(path)
    size = path.stat().st_size
    monkeypatch.setattr("dist_dcgan.run.export.content_sha256", never)
    for change, message in (
        (lambda: os.truncate(path, 1 << 32), f"4,294,967,296 bytes, {size:,} by the header"),
        (lambda: os.truncate(path, 1 << 43), "8,796,093,022,208 bytes of tensors, more than 8,589,934,592"),
        (lambda: stretch(path, 1 << 32), "the weights are not of the architecture that it describes"),
        (lambda: os.truncate(path.with_suffix(".json"), 1 << 21), "larger than 1,048,576 bytes"),
    ):
        change()
        with pytest.raises(UserError, match=message):
            load_generator(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, values: values.pop("wandb_run_id"),
        lambda tensors, values: values.pop("manifest_digest"),
        lambda tensors, values: values.pop("config"),
        lambda tensors, values: values.pop("watchdog"),
        lambda tensors, values: tensors.update(more=torch.zeros(1)),
        lambda tensors, values: tensors.update({"generator.layers.0.weight": torch.zeros(1)}),
    ],
)
def test_a_sound_checkpoint_of_something_else_is_one_line(
    change: Callable[[dict[str, Any], dict[str, Any]], object], demo_shards: Path, run_dir: Path
) -> None:
    tensors, values = load_newest(run_dir / "checkpoints") or pytest.fail("no checkpoint")
    change(tensors, values)
    shutil.rmtree(run_dir / "checkpoints")
    save_checkpoint(run_dir / "checkpoints", tensors, values, Retention(1))
    message = refusal(train.main, *command(demo_shards, run_dir, 4))
    assert message.startswith(f"the newest checkpoint in {run_dir}/checkpoints is none of this run: ")


BAD_VALUES = [
    ("step", True),
    ("step", -3),
    ("step", 3),
    ("step", 10**30),
    ("skipped_steps", "a"),
    ("skipped_steps", -1),
    ("skipped_steps", 10**30),
    ("global_batch", 0),
    ("wandb_run_id", 7),
    ("best_kid", "a"),
    ("best_kid", float("nan")),
    ("best_kid_extractor", []),
    ("precision", None),
    ("manifest_digest", 1),
    ("config", []),
    ("watchdog", []),
    ("watchdog.level", "a"),
    ("watchdog.level.fading", "a"),
    ("watchdog.since", {}),
    ("watchdog.named.fading", 1),
    ("watchdog.trend", "a"),
    ("watchdog.trend.steps", "a"),
    ("watchdog.trend.gradient", True),
    ("watchdog.trend.more", 1.0),
    ("scaler_g.scale", "a"),
    ("scaler_g.scale", 1e300),
    ("scaler_d._growth_tracker", 2**31),
    ("precision", "fp16"),  # without a scale of D
]


@pytest.mark.parametrize(("key", "value"), BAD_VALUES)
def test_values_that_training_never_writes_are_damage(
    key: str, value: object, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_value(run_dir, key, value)
    assert "1 of the 1 checkpoints" in refusal(checkpoint.main, "verify", run_dir)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("step-00000002: DAMAGED, ") and len(line) < 600


def test_training_passes_over_values_that_it_never_writes(
    demo_shards: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_value(run_dir, "watchdog.trend.steps", "a")
    message = refusal(train.main, *command(demo_shards, run_dir, 4))
    assert message.startswith(f"none of the 1 checkpoints in {run_dir}/checkpoints is sound")
    assert "passed over: watchdog.trend.steps: input should be a valid integer, got 'a'" in capsys.readouterr().err


def replace_value(run_dir: Path, key: str, value: object) -> None:
    """Replace a value of the checkpoint of step 2, with the checksum that goes with it."""
    path = run_dir / "checkpoints" / "step-00000002" / "values.json"
    content = json.loads(path.read_bytes())
    if value == "fp16":
        del content["values"]["scaler_d"]
    *outer, name = key.split(".")
    reduce(dict.__getitem__, outer, content["values"])[name] = value
    path.write_bytes(signed(content["values"], content["tensors_sha256"]))


def test_older_and_newer_checkpoints_of_the_format_are_loaded(
    demo_shards: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_dir / "checkpoints" / "step-00000002" / "values.json"
    content = json.loads(path.read_bytes())
    values = content["values"]
    del values["best_kid_extractor"], values["precision"], values["watchdog"]["trend"]
    values |= {"scaler_g": {}, "scaler_d": {}, "added_later": [1], "best_kid": 1}
    for part in ("level", "since"):
        values["watchdog"][part]["a rule of another version"] = 7
    values["watchdog"]["named"]["a rule of another version"] = True
    path.write_bytes(signed(values, content["tensors_sha256"]))
    assert load_newest(run_dir / "checkpoints").values == values  # type: ignore[union-attr]
    checkpoint.main(["verify", str(run_dir)])
    train.main(command(demo_shards, run_dir, 4))
    assert "passed over" not in capsys.readouterr().err
    assert load_newest(run_dir / "checkpoints").values["step"] == 4  # type: ignore[union-attr]


def test_names_that_are_no_steps_are_no_checkpoints(tmp_path: Path) -> None:
    save_one(tmp_path, 1)
    for name in ("step-" + "9" * 200, "step-٠٠٠٠٠٠٠٩"):
        (tmp_path / name).mkdir()
    assert load_newest(tmp_path).values["step"] == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": {"width": 20_000}}, "not of the architecture"),
        ({"architecture": {"width": 10**9}}, "cannot be used"),
        ({"architecture": {"width": 4, "latent_dim": 10**12}}, "cannot be used"),
        ({"architecture": {"width": 10**30}}, "cannot be used"),
        ({"architecture": {"width": 0}}, "width"),
        ({"architecture": {"norm": "os.system"}}, "norm"),
        ({"architecture": {"kernel_size": 10**6}}, "kernel_size"),
        ({"architecture": {"image_size": "64"}}, "image_size"),
        ({"step": "\x1b[2J"}, "step"),
        ({"latent": "cauchy"}, "latent"),
        ({"sha256": 7}, "sha256"),
    ],
)
def test_a_description_of_another_generator_is_refused_before_memory_is_taken(
    changes: dict[str, Any], message: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_dir / "generator_ema.safetensors"
    description = json.loads(path.with_suffix(".json").read_bytes())
    if "architecture" in changes:
        changes = {"architecture": description["architecture"] | changes["architecture"]}
    older = run_dir / "older.safetensors"
    for suffix in (".safetensors", ".json"):
        shutil.copyfile(path.with_suffix(suffix), older.with_suffix(suffix))
    as_older_version(older)
    older.with_suffix(".json").write_text(json.dumps(description | changes))
    describe(path, **changes)
    monkeypatch.setattr("dist_dcgan.run.export.load_file", lambda _: pytest.fail("weights are loaded"))
    for file in (path, older):
        with pytest.raises(UserError, match=message) as caught:
            load_generator(file)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"[" * 200_000, b"[]", b"7", b"", b"{}"])
def test_what_is_no_description_is_refused(content: bytes, run_dir: Path) -> None:
    path = run_dir / "generator_ema.safetensors"
    as_older_version(path)
    path.with_suffix(".json").write_bytes(content)
    with pytest.raises(UserError, match="cannot be used: "):
        load_generator(path)
    embed(path, content.decode())
    with pytest.raises(UserError, match="cannot be used: "):
        load_generator(path)


def test_weights_of_other_shapes_are_refused_by_their_header(run_dir: Path) -> None:
    path = run_dir / "generator_ema.safetensors"
    path.write_bytes(save({"layers.0.weight": torch.zeros(3)}))
    as_older_version(path)
    with pytest.raises(UserError, match="not of the architecture"):
        load_generator(path)
