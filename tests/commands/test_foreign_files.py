"""Configurations and runs of others: what their files may cause at most, and that mistakes in them stay one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_dcgan import doctor, evaluate, train
from dist_dcgan.config import Config, from_command_line, read_preset, to_values
from dist_dcgan.run.directory import RunDirectory, require_fitting
from shards.common.command_line import build
from shards.common.errors import UserError
from shards.common.plain_yaml import read_yaml

DEBUG = read_preset("debug") | {"width": 4, "max_steps": 2, "wandb": {"mode": "disabled"}}
DEBUG |= {"quality": {"extractor": "none"}}
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join(9 * [f'*a{n - 1}'])}]\n" for n in range(1, 9)
)
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 60))


@pytest.fixture
def foreign(demo_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A configuration whose data set is a command that leaves `pwned` in the working directory, and consents to it."""
    monkeypatch.chdir(tmp_path)
    data = {"path": f"pipe:touch pwned; cat {demo_shards}/{{}}", "cache_dir": "cache", "allow_commands": True}
    return DEBUG | {"data": data, "run_dir": "run"}


@pytest.mark.parametrize("command", [train.main, doctor.main])
@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_no_file_can_consent_to_commands(
    command: Callable[[list[str]], None],
    flags: list[str],
    foreign: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("theirs.yaml").write_text(yaml.safe_dump(foreign))
    with pytest.raises(UserError) as refused:
        command(["--config", "theirs.yaml", *flags])
    told = str(refused.value) + capsys.readouterr().out
    assert "runs a shell command: only --data.allow-commands on the command line allows it" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs.yaml"]


def test_the_command_line_consents_for_a_file(foreign: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    Path("theirs.yaml").write_text(yaml.safe_dump(foreign))
    train.main(["--config", "theirs.yaml", "--data.allow-commands", "--dry-run"])
    assert Path("pwned").exists() and "96 images" in capsys.readouterr().out


def test_consent_is_not_stored_so_that_nobody_inherits_it(foreign: dict[str, Any]) -> None:
    Path("theirs.yaml").write_text(yaml.safe_dump(foreign))
    config, invocation = from_command_line(["--config", "theirs.yaml", "--data.allow-commands"])
    assert invocation.allow_commands and "allow_commands" not in str(to_values(config))


def test_a_run_that_stored_consent_goes_on_but_gives_none(foreign: dict[str, Any], tmp_path: Path) -> None:
    """Older versions stored it in config.yaml and in checkpoints."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(foreign))
    require_fitting(RunDirectory(tmp_path / "run"), build(Config, foreign), "auto")
    with pytest.raises(UserError, match="runs a shell command"):
        train.main(["--config", "run/config.yaml"])
    assert not Path("pwned").exists()


def test_evaluate_takes_consent_from_the_command_line_alone(foreign: dict[str, Any]) -> None:
    options = [f"--data={foreign['data']['path']}", "--data.cache-dir=cache"]
    assert build(evaluate.Evaluate, {"run_dir": "run", "data": foreign["data"]}).allow_commands is False
    with pytest.raises(UserError, match=r"unknown option --config"):
        evaluate.main(["run", *options, "--config", "theirs.yaml"])


def test_a_stored_configuration_names_no_file_that_a_resumed_run_reads_or_writes(
    demo_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A resumed run takes folders from its own command line; those in the folder's config.yaml are not even opened."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(yaml.safe_dump(DEBUG | {"run_dir": "run", "data": {"path": str(demo_shards)}}))
    data = {"path": "pipe:touch pwned; cat {}", "cache_dir": "cache", "allow_commands": True}
    theirs = DEBUG | {"run_dir": "elsewhere", "data": data, "quality": {"extractor": "inception", "weights": "fifo"}}
    os.mkfifo("fifo")
    Path("run").mkdir()
    Path("run/config.yaml").write_text(yaml.safe_dump(theirs))
    train.main(["--config", "mine.yaml"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "mine.yaml", "run"]
    assert read_yaml(Path("run/config.yaml"))["run_dir"] == "run"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{LAUGHS}width: *a8", "more than 65,536 characters once its aliases are expanded"),
        (MERGES, "more than 65,536 characters once its aliases are expanded"),
        (f"a: &a {'x' * 5000}\nwidth: [{', '.join(50 * ['*a'])}]", "more than 65,536 characters once"),
        ("data: &a {path: *a}", "it contains itself"),
        ("#" * 70_000, "larger than 65,536 bytes"),
        (f"width: {'[' * 5000}", "nested too deeply"),
        (f"seed: {'9' * 5000}", "a number of 5000 digits"),
        (f"seed: 0x{'f' * 60_000}", "a number of 60002 digits"),
        (f"epochs: 1{':59' * 5000}.5", "a number of 15003 digits"),
        ("epochs: !!timestamp x", "is not plain YAML"),
        ("compile: !!bool x", "is not plain YAML: 'x'"),
        ("width: !!int ''", "is not plain YAML"),
        (f"width: {'x' * 60_000}", "width: input should be a valid integer"),
        (f"width: [{', '.join(20_000 * ['1'])}]", "width: input should be a valid integer"),
        (f"? {'x' * 60_000}\n: 1", "unknown key xxx"),
        ("\n".join(f"key{n}: 1" for n in range(5000)), "; and 4995 more"),
        (f"run_dir: !{'x' * 60_000} 1", "is not plain YAML: could not determine a constructor"),
        (f"run_dir: *{'x' * 900}", "is not plain YAML: found undefined alias"),
    ],
    ids=range(18),
)
def test_a_mistake_in_a_file_is_one_short_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text(text)
    with pytest.raises(UserError) as refused:
        from_command_line(["--config", str(tmp_path / "theirs.yaml")])
    told = str(refused.value)
    assert message in told and "\n" not in told and len(told) < 2000


def test_anchors_of_a_sound_file_are_expanded(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("optimizer: {lr_g: &rate 1.0e-4, lr_d: *rate}\nlog: &log {samples: 9}\n")
    config, _ = from_command_line(["--config", str(tmp_path / "mine.yaml")])
    assert (config.optimizer.lr_g, config.optimizer.lr_d, config.log.samples) == (1e-4, 1e-4, 9)


def test_only_a_file_is_read_as_a_configuration(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (("pipe", "not a plain file"), (".", "not a plain file"), ("none", "No such file")):
        with pytest.raises(UserError, match=f"cannot read configuration .*{reason}"):
            read_yaml(tmp_path / path)
    with pytest.raises(UserError, match="not a plain file"):
        read_yaml(Path("/dev/zero"))


def test_the_output_of_a_command_of_the_shell_is_a_configuration() -> None:
    code = "import sys; from pathlib import Path; from shards.common.plain_yaml import read_yaml as r; "
    code += "print(r(Path(sys.argv[1])))"
    shell = ["bash", "-c", '"$0" -c "$1" <(sleep 0.3; echo width: 8)', sys.executable, code]
    assert subprocess.run(shell, capture_output=True, text=True, check=True).stdout == "{'width': 8}\n"
