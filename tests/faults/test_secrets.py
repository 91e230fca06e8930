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

from craft_ds.config.secret_scan import redact, refuse_secrets
from craft_ds.config.train_config import TrainConfig
from craft_ds.errors import UserError

ROOT = Path(__file__).parents[2]
KEY = "5ec2e7" + "0123456789abcdef" * 2 + "aa"
SENTINELS = {
    "WANDB_API_KEY": KEY,
    "HF_TOKEN": "hf_SentinelOfTheHubTokenAbcdefghijklm",
    "HUGGING_FACE_HUB_TOKEN": "hf_SentinelOfTheOldTokenAbcdefghijkl",
    "AWS_SECRET_ACCESS_KEY": "SentinelOfTheStoreAbcdefghijklmnopqrstuv",
}
SECRET_NAME = re.compile(
    r"^(key|token|auth)$|(api|hub|hf|auth|access|private|wandb)_(key|token)|secret|password|credential"
)
NETRC = "ce5e1100" * 5


def occurrences(secrets: list[str], directory: Path, *printed: str) -> list[str]:
    """Return the files and streams that contain a secret, or most of it."""
    contents = {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    contents |= {f"stream {number}": text.encode() for number, text in enumerate(printed)}
    parts = [secret[6:-6].encode() for secret in secrets]
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
    assert "--wandb.api_key=…" in line
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
