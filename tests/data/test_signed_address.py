"""A data set behind a signed address: the query goes with every file's name, and is never printed or stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dist_dcgan import doctor, evaluate, train
from dist_dcgan.config import Config, LocationOptions, to_yaml
from dist_dcgan.data.storage.opening import open_location
from dist_dcgan.run.checkpoint import load_newest
from shards.__main__ import main as tools
from shards.common.command_line import run
from shards.common.errors import UserError
from shards.common.http import file_address
from shards.common.redaction import public_address, without_secrets
from tests.support.http_server import Answer, serve, signed_server

SECRET = "s3cr3t%2Bs1gn4ture%3D"
SIGNED = f"https://example.org/bedrooms?sv=1&sig={SECRET}"
SMALL = ["--preset", "debug", "--width", "4", "--global-batch", "8", "--wandb", "disabled"]


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("https://a.org/d", "https://a.org/d/x.tar"),
        ("https://a.org/d/", "https://a.org/d/x.tar"),
        ("https://a.org/d?sv=1&sig=a%2Bb%3D", "https://a.org/d/x.tar?sv=1&sig=a%2Bb%3D"),
        ("https://a.org/d/?sig=/", "https://a.org/d/x.tar?sig=/"),
        ("https://a.org?sig=a#b", "https://a.org/x.tar?sig=a"),
    ],
)
def test_a_files_name_goes_before_the_query(folder: str, expected: str) -> None:
    assert file_address(folder, "x.tar") == expected


@pytest.mark.parametrize(
    ("location", "public"),
    [
        (SIGNED, "https://example.org/bedrooms"),
        ("HTTPS://me:pa@ss@example.org:80/d#key=1", "HTTPS://example.org:80/d"),
        ("https:/example.org/d?sig=with 'quotes' and spaces", "https:/example.org/d"),
        ("s3://bucket/d?key=1", "s3://bucket/d"),
        ("data/odd?name#1", "data/odd?name#1"),
        ("pipe:cat /mnt/{}?", "pipe:***"),
    ],
)
def test_the_public_form_of_a_location_has_no_credentials(location: str, public: str) -> None:
    assert public_address(location) == public
    assert LocationOptions(path=location).name == public


def test_the_addresses_in_a_message_have_no_credentials() -> None:
    message = f"Invalid URL '{SIGNED}': is http://me:{SECRET}@b.org/x?y=1 meant? See https://c.org/d."
    expected = "Invalid URL 'https://example.org/bedrooms': is http://b.org/x meant? See https://c.org/d."
    assert without_secrets(message) == expected


def flags(address: str, steps: int, tmp_path: Path, cache: str = "cache") -> list[str]:
    places = ["--run-dir", str(tmp_path / "run"), "--data", address, "--data.cache-dir", str(tmp_path / cache)]
    return [*SMALL, *places, "--max-steps", str(steps)]


def test_a_run_goes_on_with_a_new_signature_and_none_is_left_anywhere(
    demo_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    signatures = [f"sv=1&sig={SECRET}1"]
    with signed_server(demo_shards, signatures) as (address, asked):
        train.main(flags(f"{address}/?{signatures[0]}", 2, tmp_path))
        signatures.append(f"sv=1&sig={SECRET}2")
        train.main(flags(f"{address}?{signatures[1]}", 4, tmp_path, "other cache"))
        train.main([*flags(f"{address}?{signatures[1]}", 4, tmp_path), "--dry-run"])
        with pytest.raises(UserError) as expired:
            train.main(flags(f"{address}?{signatures[0]}", 5, tmp_path))
    output, errors = capfd.readouterr()
    assert str(expired.value).startswith(f"cannot get {address}/manifest.json: the server answers 403 (Forbidden)")
    assert str(expired.value).endswith("and its signature, which may have expired")
    assert {path.partition("?")[2] for path in asked} == set(signatures)
    assert f"data set:          {address}, " in output
    found = load_newest(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert (found.values["step"], found.values["config"]["data"]["path"]) == (4, address)
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert kept == []
    assert SECRET not in output + errors + str(expired.value)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (train.main, ["--data", SIGNED]),
        (train.main, [SIGNED]),
        (train.main, ["--data", SIGNED.replace("https", "s3"), "--data.cache-dir", "cache"]),
        (train.main, ["--data", SIGNED.replace("//", "/")]),
        (train.main, ["--data", SIGNED.replace("https", "HTTPS")]),
        (train.main, ["--data", f"https://[{SIGNED}", "--data.cache-dir", "cache"]),
        (train.main, ["--data.cache-gb", SIGNED]),
        (train.main, ["--config", "config.yaml"]),
        (doctor.main, ["--data", SIGNED]),
        (evaluate.main, ["run", "--data", SIGNED]),
    ],
)
def test_mistakes_with_a_signed_address_do_not_show_it(
    command: Callable[[list[str]], None],
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(f"data: {SIGNED}\n")
    with pytest.raises((UserError, SystemExit)) as raised:
        command(arguments)
    output, errors = capsys.readouterr()
    assert output + str(raised.value) != ""
    assert SECRET not in output + errors + str(raised.value)


def test_where_a_server_redirects_to_is_shown_without_its_signature(tmp_path: Path) -> None:
    moved = Answer(status=302, headers={"Location": f"/bedrooms?sig={SECRET}"})
    with serve(moved, Answer(status=404)) as server:
        options = LocationOptions(path=server.address, cache_dir=tmp_path)
        with pytest.raises(UserError, match=r"cannot get http://[0-9.:]+/bedrooms: the server answers 404"):
            open_location(options)


def test_a_stored_configuration_has_the_address_without_its_signature() -> None:
    config = Config(data={"path": SIGNED})
    assert config.data.path == SIGNED
    assert "path: https://example.org/bedrooms\n" in to_yaml(config)


def test_a_command_that_takes_folders_does_not_show_it_either(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tools, ["verify", SIGNED])
    found = capsys.readouterr().err
    assert found.startswith("error: directory: a path on this machine is needed, not an address, got 'https://example")
    assert SECRET not in found
