"""Keys and tokens of the environment never reach a log, a configuration or a checkpoint."""

import dataclasses
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from lerobot.configs import PreTrainedConfig

from craft_ds.config.secret_scan import is_secret_name, redact, refuse_secret_arguments, refuse_secrets
from craft_ds.config.train_config import TrainConfig
from craft_ds.errors import UserError

ROOT = Path(__file__).parents[2]
KEY = "5ec2e7" + "0123456789abcdef" * 2 + "aa"
SENTINELS = {
    "WANDB_API_KEY": KEY,
    "HF_TOKEN": "hf_SentinelOfTheHubTokenAbcdefghijklm",
    "HUGGING_FACE_HUB_TOKEN": "hf_SentinelOfTheOldTokenAbcdefghijkl",
    "AWS_SECRET_ACCESS_KEY": "SentinelOfTheStoreAbcdefghijklmnopqrstuv",
    "MY_LAB_API_KEY": "SentinelOfTheLabAbcdefghijklmnopqrstuv",
    "DB_PASSWORD": "SentinelOfTheDatabaseAbcdefghijklmnop",
    "https_proxy": "http://me:SentinelOfTheProxyAbcdefgh@localhost:1",
}
SECRET_NAME = re.compile(
    r"^(key|token|auth)$|(api|hub|hf|auth|access|private|wandb)_(key|token)|secret|password|credential"
)
NETRC = "ce5e1100" * 5


def occurrences(secrets: list[str], directory: Path, *printed: str) -> list[str]:
    """Return the files and streams that contain a secret, or most of it."""
    contents = {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    contents |= {f"stream {number}": text.encode() for number, text in enumerate(printed)}
    parts = [secret.partition("@")[0].rpartition(":")[2][6:-6].encode() for secret in secrets]
    return [name for name, content in contents.items() if any(part in content for part in parts)]


@pytest.fixture
def home(tmp_path) -> Path:
    """A home directory with a key in `.netrc`, which wandb reads."""
    home = tmp_path / "home"
    home.mkdir()
    (home / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {NETRC}\n")
    (home / ".netrc").chmod(0o600)
    return home


def wandb_flags(inputs) -> list[str]:
    return [
        *inputs.craft_flags(),
        *("--steps=2", "--save_freq=1"),
        *("--wandb.enable=true", "--wandb.mode=offline", "--wandb.project=secrets"),
    ]


def assert_clean(run: Path, *printed: str) -> None:
    assert list((run / "wandb").rglob("*.wandb")), "wandb wrote nothing"
    assert (run / "final" / "train_config.json").is_file()
    assert not occurrences([*SENTINELS.values(), NETRC], run, *printed)


def test_no_output_of_a_run_contains_a_secret_of_its_environment(inputs, tmp_path, home):
    run = tmp_path / "run"
    ended = subprocess.run(
        [sys.executable, ROOT / "scripts" / "train_craft.py", *inputs.flags(run), *wandb_flags(inputs)],
        env={**os.environ, **SENTINELS, "HOME": str(home), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert_clean(run, ended.stdout, ended.stderr)


def test_no_output_of_a_run_contains_a_key_of_netrc(inputs, train, tmp_path, home, monkeypatch):
    monkeypatch.setenv("NETRC", str(home / ".netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run = tmp_path / "run"
    ended = train(run, *wandb_flags(inputs))
    assert ended.status == 0, ended
    assert_clean(run, ended.output, ended.errors)


def test_a_secret_would_be_found(tmp_path):
    (tmp_path / "log").write_bytes(b"\0\1 key=" + KEY.encode())
    assert occurrences([KEY], tmp_path, "nothing", f"Authorization: {KEY}") == [
        str(tmp_path / "log"),
        "stream 1",
    ]


@pytest.mark.parametrize("name", SENTINELS)
def test_a_flag_with_a_secret_is_refused(refuses, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, SENTINELS[name])
    line = refuses(tmp_path / "run", f"--wandb.notes=run with {SENTINELS[name]}")
    assert line.startswith("--wandb.notes holds")
    assert SENTINELS[name] not in line


@pytest.mark.parametrize(
    ("config", "flag"),
    [
        ({"wandb": {"notes": SENTINELS["HF_TOKEN"]}}, "--wandb.notes"),
        ({"dataset": {"root": "https://me:secret@host/set"}}, "--dataset.root"),
        ({"job": {"tags": ["a", f"x={KEY}"]}}, "--job.tags"),
        ({"rename_map": {KEY: "b"}}, "--rename_map"),
    ],
)
def test_a_configuration_with_a_secret_is_refused(config, flag):
    with pytest.raises(UserError, match=f"^{flag} holds") as caught:
        refuse_secrets(config, {"WANDB_API_KEY": KEY})
    assert not any(secret in str(caught.value) for secret in (KEY, SENTINELS["HF_TOKEN"], "me:secret"))


def test_other_values_are_not_refused():
    config = {"dataset": {"repo_id": "me/hf_data", "root": "s3://bucket/a:b/c@d"}, "seed": 1000, "peft": None}
    refuse_secrets(config, {"WANDB_API_KEY": "1000", "HF_TOKEN": ""})


def test_the_value_of_an_unknown_secret_flag_is_not_printed(refuses, tmp_path):
    line = refuses(tmp_path / "run", f"--wandb.api_key={KEY}")
    assert line.startswith("--wandb.api_key holds")
    assert KEY not in line
    assert redact("--policy.action_tokenizer_name=x --a.token=y") == (
        "--policy.action_tokenizer_name=x --a.token=…"
    )


def test_a_configuration_file_cannot_hold_a_secret(refuses, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"wandb:\n  api_key: {KEY}\n")
    line = refuses(tmp_path / "run", f"--config_path={file}")
    assert KEY not in line


def test_no_configuration_field_is_meant_for_a_secret():
    """A later LeRobot may add one, and every checkpoint would contain it."""
    found, seen = [], set()

    def walk(kind: type, where: str) -> None:
        if kind in seen or not dataclasses.is_dataclass(kind):
            return
        seen.add(kind)
        types = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if SECRET_NAME.search(field.name):
                found.append(f"{where}.{field.name}")
            for inner in (types[field.name], *typing.get_args(types[field.name])):
                if isinstance(inner, type):
                    walk(inner, f"{where}.{field.name}")

    walk(TrainConfig, "")
    for choice, kind in PreTrainedConfig.get_known_choices().items():
        walk(kind, choice)
    assert len(seen) > 15
    assert not found


SECRET = [
    *(
        "MY_TOKEN",
        "GITHUB_TOKEN",
        "github_token",
        "DB_PASSWORD",
        "PGPASSWORD_TEST",
        "SECRET",
        "CLIENT_SECRET",
    ),
    *("OPENAI_API_KEY", "OPENAI_APIKEY", "OPENAI_API_KEY_2", "AWS_SECRET_ACCESS_KEY", "SIGNING_KEY"),
    *("GIT_CREDENTIALS", "SSH_PRIVATE_KEY", "SSH_KEY_PASSPHRASE", "--wandb.api_key", "--policy.auth-token"),
    *("TOKEN_BASE64", "AZURE_STORAGE_ACCOUNT_KEY", "GITHUB_PAT"),
]
PLAIN = [
    *("ACTION_TOKENS", "--policy.max_action_tokens", "--policy.tokenizer_name", "TOKENIZERS_PARALLELISM"),
    *("--policy.fast_skip_tokens", "pad_token", "EOS_TOKEN", "--a.image_token", "HF_TOKEN_PATH", "KEY_FILE"),
    *("AWS_WEB_IDENTITY_TOKEN_FILE", "SECRETARY", "KEYBOARD", "--sort.key", "PASSWORD_FILE", "PWD", "PATH"),
    *("AUTHOR", "SSH_AUTH_SOCK", "--tokens_per_second", "HF_HUB_DISABLE_IMPLICIT_TOKEN_WARNING"),
]


@pytest.mark.parametrize("name", SECRET)
def test_names_of_secrets(name):
    assert is_secret_name(name)
    value = "Abcdefgh12345"
    with pytest.raises(UserError, match=f"^--job_name holds the value of {re.escape(name)}") as caught:
        refuse_secrets({"job_name": f"run {value}"}, {name: value})
    assert value not in str(caught.value)
    assert redact(f"at {value}.", {name: value}) == "at ….", name


@pytest.mark.parametrize("name", PLAIN)
def test_names_of_other_values(name):
    assert not is_secret_name(name)
    refuse_secrets(
        {"job_name": "run Abcdefgh12345", name.strip("-"): "Abcdefgh12345"}, {name: "Abcdefgh12345"}
    )


FORMS = [
    *("hf_" + "a1B2" * 8, "ghp_" + "a1B2" * 9, "github_pat_" + "a1B2_" * 6, "glpat-" + "a1B2" * 5),
    *("AKIA" + "A1B2" * 4, "AIza" + "a1B2c" * 7, "sk-proj-" + "a1B2" * 8, "xoxb-" + "12345-" * 3),
    *("eyJ" + "a1B2" * 4 + ".eyJ" + "a1B2" * 4 + ".a1B2", "-----BEGIN OPENSSH PRIVATE KEY-----"),
    *("me:secret", ":a-token-only"),
]


@pytest.mark.parametrize("value", FORMS)
@pytest.mark.parametrize("flags", [["--dataset_root={}"], ["--dataset_root", "{}"], ["--x.y={}"], ["{}"]])
def test_known_forms_are_refused_and_redacted(value, flags):
    text = f"https://{value}@host/x" if value in FORMS[-2:] else value
    with pytest.raises(UserError, match="holds") as caught:
        refuse_secret_arguments([flag.format(text) for flag in flags], {})
    assert value not in str(caught.value)
    assert value not in redact(f"cannot open {text}: no such file", {})


def test_an_address_without_a_password_is_no_secret():
    for text in ("https://host/x@y", "https://user@host/x", "s3://bucket/a:b@c", "git@github.com:a/b"):
        refuse_secret_arguments([f"--dataset_root={text}"], {})
        assert redact(text, {}) == text


def test_every_command_refuses_a_secret(monkeypatch, capsys):
    from craft_ds.cli import COMMANDS, run_command

    monkeypatch.setenv("MY_LAB_API_KEY", KEY)
    for command in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            run_command(command, [f"--some_flag={KEY}"])
        assert ended.value.code == 2
        printed = capsys.readouterr()
        assert "--some_flag holds the value of MY_LAB_API_KEY" in printed.err
        assert KEY not in printed.out + printed.err
