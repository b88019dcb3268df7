"""Preset, file and command line become one object; every mistake is named with its remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from dist_dcgan.config import (
    Config,
    differences,
    from_command_line,
    make_plan,
    preset_names,
    to_yaml,
)
from shards.common.command_line import build
from shards.common.errors import UserError
from shards.common.plain_yaml import read_yaml


def test_the_default_is_the_paper_stabilised() -> None:
    config, invocation = from_command_line([])
    assert config == Config()
    assert (config.width, config.global_batch, config.optimizer.lr_g, config.optimizer.beta1) == (128, 128, 2e-4, 0.5)
    assert (config.loss, config.noise.sigma, config.data.random_flip) == ("logits", 0.0, False)
    assert (config.data.path, config.run_dir) == (Path("data/bedroom_train"), Path("runs/default"))
    assert invocation.resume == "auto"


def test_the_presets_are_those_of_the_readme() -> None:
    presets = {name: from_command_line(["--preset", name])[0] for name in preset_names()}
    assert list(presets) == ["debug", "few_images", "narrow", "paper", "paper_literal", "quickstart"]
    assert presets["paper_literal"] == Config(loss="sigmoid_bce")
    assert presets["narrow"].width == 64


def test_the_command_line_goes_over_the_preset() -> None:
    flags = ["--preset", "debug", "--width", "24", "--data", "x", "--data.prefetch=2", "--wandb=offline"]
    config, _ = from_command_line(flags)
    assert (config.width, config.global_batch, config.data.path, config.data.prefetch) == (24, 16, Path("x"), 2)
    assert config.wandb.mode == "offline"


def test_a_file_goes_in_place_of_the_preset(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("width: 32\noptimizer: {lr_d: 1.0e-5}\n")
    config, _ = from_command_line(["--config", str(tmp_path / "mine.yaml"), "--optimizer.lr-g", "3e-4"])
    assert (config.width, config.optimizer.lr_d, config.optimizer.lr_g) == (32, 1e-5, 3e-4)


def flags_of(model: BaseModel, prefix: str = "--") -> Iterator[list[str]]:
    """Yield each flag of a configuration with the value that it has."""
    for name, value in model:
        flag = prefix + name.replace("_", "-")
        if isinstance(value, BaseModel):
            yield from flags_of(value, f"{flag}.")
        elif isinstance(value, bool):
            yield [flag if value else flag.replace("--", "--no-", 1)]
        elif type(model).model_fields[name].annotation != bool | None:  # a flag without a value cannot say none
            yield [flag, "none" if value is None else str(value)]


@pytest.mark.parametrize("flags", [*flags_of(Config())], ids=lambda flags: flags[0])
def test_every_flag_takes_its_default(flags: list[str]) -> None:
    assert from_command_line(flags)[0] == Config()


def test_none_is_a_word_where_a_field_may_be_none() -> None:
    config, _ = from_command_line(["--preset", "debug", "--max-steps", "None", "--quality.extractor", "none"])
    assert (config.max_steps, config.quality.extractor) == (None, "none")
    assert from_command_line(["--data", "none"])[0].data.path == Path("none")


@pytest.mark.parametrize("flags", [[], ["--batch-per-rank", "3"], ["--preset", "debug", "--max-steps", "4"]])
def test_the_stored_configuration_reads_back_the_same(flags: list[str], tmp_path: Path) -> None:
    config, _ = from_command_line(flags)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert build(Config, read_yaml(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--widht", "3"], "unknown option --widht; did you mean --width?"),
        (["--optimizer.lr_q=3"], "unknown option --optimizer.lr_q; did you mean --optimizer.lr-"),
        (["--width", "0"], "width: input should be greater than or equal to 1, got '0'"),
        (["--width", "wide"], "width: input should be a valid integer.*got 'wide'"),
        (["--width"], "--width: expected one argument"),
        (["--precision", "fp8"], "precision: input should be 'auto', 'fp64', .* got 'fp8'"),
        (["--preset", "papr"], "unknown preset 'papr'; did you mean paper?"),
        (["--global-batch", "8", "--batch-per-rank", "2"], "global_batch and batch_per_rank exclude each other"),
        (["--epochs", "8", "--max-steps", "2"], "epochs and max_steps exclude each other"),
        (["--epochs", "inf"], "epochs: input should be a finite number"),
        (["--distributed.timeout-seconds", "inf"], "timeout_seconds: input should be a finite number"),
        (["--preset", "debug", "--config", "x.yaml"], "--preset debug and --config x.yaml exclude each other"),
        (["--config", "none.yaml"], "cannot read configuration none.yaml"),
        (["--log.every-steps", "11"], "log.every_steps: input should be less than or equal to 10"),
        (["--model.kernel-size", "3"], "kernel_size: input should be 4 or 5, got 3"),
        (["--run-dir", ""], r"run_dir: a path is needed \(is a variable unset\?\); . is the working directory, got ''"),
        (["--data", ""], "data.path: a path is needed"),
        (["--distributed.timeout-seconds", "1e10"], "timeout_seconds: input should be less than or equal to 10000000"),
        (["--width", "1000000000000"], "width: input should be less than or equal to 10000000"),
        (["--epochs", "1e300"], "epochs: input should be less than or equal to 10000000"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_command_line(flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("widht: 3", "unknown key widht; did you mean width?"),
        ("optimizer: {lr_q: 3}", "unknown key optimizer.lr_q; did you mean lr_"),
        ("width: [1]", "width: input should be a valid integer"),
        ("- 1", "must hold a mapping of configuration keys, not list"),
        ("a: b: c", "is not plain YAML"),
        ("width: !!python/object/apply:os.system ['touch pwned']", "is not plain YAML"),
        ("width: 8\npreset: debug", "unknown key preset"),
        ("data: {path: }", "data.path: a folder or an address is needed, got None"),
    ],
)
def test_a_mistake_in_a_file_is_named_and_nothing_runs(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        from_command_line(["--config", "mine.yaml"])
    assert "mine.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("pwned").exists()


def test_only_what_trained_values_depend_on_counts_as_another_configuration() -> None:
    config = Config()
    same = config.model_copy(update={"max_steps": 7, "run_dir": Path("x"), "compile": True})
    assert differences(config, same) == []
    other, _ = from_command_line(["--width", "64", "--optimizer.lr-d", "1e-4"])
    assert differences(config, other) == ["width: 128 -> 64", "optimizer.lr_d: 0.0002 -> 0.0001"]


def test_the_plan_does_not_depend_on_the_cluster() -> None:
    config = Config()
    plans = [make_plan(config, world_size, 3_033_042) for world_size in (1, 8, 64)]
    assert {plan.global_batch for plan in plans} == {128}
    assert {plan.steps_per_epoch for plan in plans} == {23_695}
    assert {plan.total_steps for plan in plans} == {118_475}
    assert [plan.batch_per_rank for plan in plans] == [128, 16, 2]


def test_a_batch_per_rank_grows_with_the_ranks() -> None:
    config, _ = from_command_line(["--batch-per-rank", "32", "--preset", "debug"])
    assert [make_plan(config, world_size, 10_000).global_batch for world_size in (1, 4)] == [32, 128]


@pytest.mark.parametrize(
    ("flags", "world_size", "samples", "message"),
    [
        ([], 3, 1000, "global_batch 128 is not divisible by 3 ranks: use --global-batch 126 or 129"),
        (["--global-batch", "4"], 8, 1000, "global_batch 4 is not divisible by 8 ranks: use --global-batch 8"),
        ([], 1, 127, "global batch 128 is larger than the data set of 127 images"),
        (["--batch-per-rank", "1"], 1, 1000, "global batch 1 is too small for batch norm"),
    ],
)
def test_sizes_that_do_not_fit_are_named(flags: list[str], world_size: int, samples: int, message: str) -> None:
    config, _ = from_command_line(flags)
    with pytest.raises(UserError, match=message):
        make_plan(config, world_size, samples)


@pytest.mark.parametrize(("flag", "length"), [("--epochs", (None, 3.0)), ("--max-steps", (3, 5.0))])
def test_the_command_line_says_how_long_whatever_the_preset_says(flag: str, length: tuple[int | None, float]) -> None:
    config, _ = from_command_line(["--preset", "few_images", flag, "3"])
    assert (config.max_steps, config.epochs) == length


def test_a_data_set_is_a_path_or_an_address() -> None:
    assert Config(data={"path": "data//x"}).data.path == Path("data/x")
    for address in ("https://example.org/x", "pipe:cat {}"):
        assert Config(data={"path": address}).data.path == address
    with pytest.raises(UserError, match=r"data\.path"):
        build(Config, {"data": {"path": 5}})


def test_help_begins_with_what_the_command_does_and_names_flags_as_people_type_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        from_command_line(["--help"], about="Do it.\n\nexample --data DIR")
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert text.startswith("usage: python -m dist_dcgan.train [OPTIONS]\n\nDo it.\n\nexample --data DIR\n\n")
    assert re.search(r"^  --data( {Path,str})?, --data.path {Path,str}$", text, re.M)  # Python 3.13 says it once
    assert "\nAdam, for both networks:\n  --optimizer.lr-g float" in text
