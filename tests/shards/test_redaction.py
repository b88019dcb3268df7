"""The one redactor and the one escaper: what they hide, and what they leave."""

from __future__ import annotations

import json
import pickle
import sys

import pytest

from shards.common import redaction, streams
from shards.common.command_line import run
from shards.common.errors import OneRankError, UserError
from shards.common.messages import say, tell, warn
from shards.common.plain_yaml import read_yaml
from shards.common.redaction import one_line, printable, remember, without_secrets

SECRET = "S3nt1nel-w0rd"


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(redaction, "_remembered", set())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"s3://me:{SECRET}@bucket/d", "s3://bucket/d"),
        (f"proxy http://me:{SECRET}@proxy:3128, refused", "proxy http://proxy:3128, refused"),
        (f"https://me:a/{SECRET}@host/d", "https://host/d"),
        (f"https://me:a@{SECRET}@host/d#{SECRET}", "https://host/d"),
        (f"https//me:{SECRET}@host/d", "https//***@host/d"),
        (f"no data set at me:{SECRET}@host/d?sig={SECRET}&x=1", "no data set at ***@host/d?sig=***&x=***"),
        (f"got {{'path': 'pipe:curl -H \"Authorization: {SECRET}\" {{}}'}}", "got {'path': 'pipe:***"),
        (f"no data set at pipe:command curl {SECRET}", "no data set at pipe:***"),
        (f"no data set at PIPE:curl {SECRET}", "no data set at pipe:***"),
        (f"> Authorization: Basic {SECRET}", "> Authorization: ***"),
        (f"-H 'Proxy-Authorization: {SECRET}' x", "-H 'Proxy-Authorization: ***' x"),
        (f"Bearer {SECRET}", "Bearer ***"),
        (f"AWS_SECRET_ACCESS_KEY={SECRET} aws", "AWS_SECRET_ACCESS_KEY=*** aws"),
        ("{'Authorization': 'Basic abc==', 'a': 1}", "{'Authorization': '***', 'a': 1}"),
        (f'{{"api_key": "{SECRET}", "a": 1}}', '{"api_key": "***", "a": 1}'),
        ("token hf_abcdefghijklmnopqrstuv is refused", "token *** is refused"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl", "***"),
    ],
)
def test_secrets_are_known_by_their_form(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert without_secrets(shown) == shown  # what is printed may be read, and printed again


@pytest.mark.parametrize(
    "text",
    [
        "https://host:8080/@scope/a:b@c",
        "http://[::1]:80/data: refused",
        "allow `pipe:COMMAND` as a path",
        "pipe:***: the command ends with status 22",
        "[Errno 32] Broken pipe: 'x'",
        "its key a0b1 came before, sha256: 0a1b",
        "rank 0: it ended at 12:30:05",
        "runs/a@b/c: sound, step 5, 40 tensors",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize(
    ("given", "message", "shown"),
    [
        (f"--data=https://h/d?sig={SECRET}%2B1", f"url: /d/x.tar?a=1 ({SECRET}+1)", "url: /d/x.tar?a=*** (***)"),
        (f"https://me:{SECRET} 1@h/d", f"401 for {SECRET} 1", "401 for ***"),
        (f"https://{SECRET * 2}@h/d", f"user {SECRET * 2}", "user ***"),
        (f"pipe:curl -H 'X-Mine: {SECRET}' https://h/{{}}", f"> X-Mine: {SECRET}", "> X-Mine: ***"),
        ("pipe:curl --user me:hunter2 -H 'Authorization: Basic abcdef=' {}", "for hunter2, abcdef=", "for ***, ***"),
        ({"data": [{"path": f"https://h/d?{SECRET * 2}"}]}, SECRET * 2, "***"),
    ],
)
def test_what_was_given_as_a_secret_is_known_by_its_value(given: object, message: str, shown: str) -> None:
    remember(given)
    assert without_secrets(message) == shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"name": f"a://u:{SECRET}@h"}, f"warning: {SECRET}"),  # no location of data
        ({"data": {"path": "a://u:warning:@h"}}, "warning: the disk is full"),
        ({"data": {"path": "a://u:step-00000005@h"}}, "remove step-00000005"),
        ({"data": {"path": "a://h?sig=SHA-256"}}, "its SHA-256 is 0"),
        ({"data": {"path": "a://u:its SHA-256 is of another archive@h"}}, "its SHA-256 is of another archive"),
        ({"data": {"path": "pipe:W&B is turned off since step 1"}}, "W&B is turned off since step 1"),
        ({"data": {"path": "pipe:curl --user warning:warning {}"}}, "warning: x"),
    ],
)
def test_a_configuration_of_others_masks_no_word_of_its_choice(
    content: object, message: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(json.dumps(content))
    assert read_yaml(file) == content
    assert without_secrets(message) == message


@pytest.mark.parametrize(
    "path", [f"https://h/d?sig={SECRET}", f"https://me:{SECRET}@h", f"pipe:get --as {SECRET} {{}}"]
)
def test_a_secret_in_a_configuration_is_known_by_its_value(path: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(json.dumps({"data": {"path": path}}))
    read_yaml(file)
    assert without_secrets(f"refused: {SECRET}") == "refused: ***"


def test_secrets_of_the_environment_are_known_by_their_value(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "WANDB_API_KEY": SECRET,
        "HF_TOKEN": "T0k3n-of-hf",
        "HTTPS_PROXY": "http://me:Pr0xy-word@h",
        "SSH_KEY": "/home/me/key",
        "MONKEY": "bananas-and-more",
    }.items():
        monkeypatch.setenv(name, value)
    found = without_secrets(f"{SECRET} T0k3n-of-hf Pr0xy-word /home/me/key bananas-and-more")
    assert found == "*** *** *** /home/me/key bananas-and-more"


def test_an_ordinary_location_hides_no_word_of_a_message() -> None:
    remember(["--data", "https://host/bedroom_train?versionId=latest", "--data", "pipe:aws s3 cp s3://bucket/d/{} -"])
    remember("pipe:ssh gpu-node-12 cat /mnt/bedroom_64/{}")
    text = "no bedroom_train, latest, in bucket: aws s3 cp failed on gpu-node-12: /mnt/bedroom_64/manifest.json: Bearer"
    assert without_secrets(text) == text


HOSTILE = "a\x1b[2J\x1b]0;t\x07b\r\nerror: c\x00\x9b\u202ed\u2066\u200b\u200d\ufeff\u2028\u00ad\u034f\u3164\ufe0f\udcff"


def test_everything_that_moves_hides_or_reorders_text_is_escaped() -> None:
    found = printable(HOSTILE + "ä漢 ")
    assert found.isprintable() and found.isascii() is False and found.endswith("ä漢 ")
    assert found.startswith("a\\x1b[2J\\x1b]0;t\\x07b\\r\\nerror: c\\x00\\x9b\\u202ed\\u2066\\u200b\\u200d\\ufeff")
    assert found.encode().decode() == found and "\u034f" not in found and "\u3164" not in found


def test_an_error_is_one_clean_line_wherever_it_goes() -> None:
    remember(f"https://h/?sig={SECRET}")
    for kind in (UserError, OneRankError):
        error = kind(f"{HOSTILE} {SECRET}")
        assert str(error).isprintable() and SECRET not in repr(error)
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_messages_are_one_clean_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    for function in (say, tell, warn):
        function(f"{HOSTILE} https://me:{SECRET}@h")
    output, errors = capsys.readouterr()
    lines = [*output.splitlines(), *errors.splitlines()]
    assert len(lines) == 3 and all(line.isprintable() and SECRET not in line for line in lines)
    assert [line[:10] for line in lines] == ["a\\x1b[2J\\x", "a\\x1b[2J\\x", "warning: a"]


def test_a_traceback_has_no_secret_and_no_line_that_passes_for_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: object) -> None:
        try:
            raise OSError(f"https://me:{SECRET}@h\nerror: the disk is full")
        except OSError as error:
            raise RuntimeError(f"{HOSTILE}\nwarning: x") from error

    with pytest.raises(RuntimeError) as raised:
        run(main, [])
    sys.excepthook(RuntimeError, raised.value, None)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.isprintable() for line in lines) and SECRET not in "".join(lines)
    starts = {line.split(":")[0] for line in lines if line[:1] != " "}
    assert starts == {"Traceback (most recent call last)", "OSError", "RuntimeError", ""}
    assert "OSError: https://h" in lines and "  error: the disk is full" in lines and "  warning: x" in lines


def test_a_message_of_any_length_is_printed_in_short() -> None:
    assert len(one_line("a b" * 10**6)) < 21_000
    assert SECRET not in one_line("a " * 9_990 + f"https://me:{SECRET * 9}@h" + " b" * 10**5)


def test_what_libraries_print_loses_secrets_and_controls_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    with (tmp_path_factory.mktemp("out") / "f").open("w+b") as file:
        text = streams._guarded(None, None, streams.Stream(file.fileno(), is_result=True))
        written = text.write(f"\r 5%\x1b[31m\ta\n  b {'https://me:' + SECRET + '@h'}\u202e\n")
        text.flush()
        file.seek(0)
        assert file.read().decode() == "\r 5%\\x1b[31m\ta\n  b https://h\\u202e\n"
        assert written == len(f"\r 5%\x1b[31m\ta\n  b https://me:{SECRET}@h\u202e\n")
