import sys
import tempfile

import pytest
import yaml

from craft_ds.config.parser import normalise_arguments, parse_arguments
from craft_ds.errors import UserError, exits_as_user_error


@pytest.fixture(autouse=True)
def own_argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_craft.py"])


@pytest.mark.parametrize(
    ("given", "understood"),
    [
        (["--steps", "3"], ["--steps=3"]),
        (["--engine=zero"], ["--engine.name=zero"]),
        (["--engine", "zero"], ["--engine.name=zero"]),
        (["--ds_config", "a.json"], ["--engine.ds_config=a.json"]),
        (["--optimizer.state", "int8"], ["--engine.optimizer_state=int8"]),
        (["--engine.dtype=bfloat16"], ["--engine.dtype=bfloat16"]),
        (["--local_rank=1", "--steps=3"], ["--steps=3"]),
        (["--local-rank", "1", "--steps=3"], ["--steps=3"]),
        (["--craft.conflict_threshold", "-0.1"], ["--craft.conflict_threshold=-0.1"]),
        (["--rename_map={'a=b': 1}"], ["--rename_map={'a=b': 1}"]),
        (["-h", "--policy.type=act"], ["-h", "--policy.type=act"]),
        (["stray", "--steps=3"], ["stray", "--steps=3"]),
        # The last one counts, also for the flag that LeRobot reads itself.
        (["--policy.path=a", "--steps=1", "--policy.path", "b"], ["--steps=1", "--policy.path=b"]),
        (["--engine=zero", "--engine.name=single"], ["--engine.name=single"]),
    ],
)
def test_arguments_are_normalised(given, understood):
    assert normalise_arguments(given) == understood
    assert normalise_arguments(understood) == understood


def test_a_checkpoint_directory_means_its_config(tmp_path):
    assert normalise_arguments([f"--config_path={tmp_path}"]) == [
        f"--config_path={tmp_path}/train_config.json"
    ]


@pytest.mark.parametrize("given", ["--data_check=off", "--data_check off", "--data_check=warn"])
def test_data_check_is_read_and_written_as_text(given, tmp_path):
    config = parse_arguments(["--policy.type=pi0_fast", "--dataset.repo_id=me/new", *given.split()])
    assert config.data_check == given.replace("=", " ").split()[-1]
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    read = parse_arguments([f"--config_path={tmp_path}/run.yaml"])
    assert read.data_check == config.data_check


def test_flags_reach_their_fields():
    config = parse_arguments(
        [
            "--dataset.repo_id=a/b",
            "--steps",
            "7",
            "--craft.retention_freq=3",
            "--ds_config",
            "x.json",
            "--seed=null",
        ]
    )
    assert (config.dataset.repo_id, config.steps, config.seed) == ("a/b", 7, None)
    assert config.craft.retention_freq == 3
    assert config.engine.ds_config == "x.json"
    # LeRobot reads sys.argv again at validation.
    assert "--engine.ds_config=x.json" in sys.argv


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonsense=1"], r"unrecognized arguments: --nonsense=1 \(see --help\)"),
        (
            ["--craft.nonsense=1"],
            r"unrecognized arguments: --craft.nonsense=1; did you mean --craft.enabled\? \(see --help\)",
        ),
        (
            ["--craft.enable=true"],
            r"unrecognized arguments: --craft.enable=true; did you mean --craft.enabled\? \(see --help\)",
        ),
        (["nonsense"], r"unrecognized arguments: nonsense \(see --help\)"),
        (["--steps=abc"], r"--steps: Couldn't parse 'abc' into an int \(see --help\)"),
        (["--craft.enabled=maybe"], r"--craft.enabled: Couldn't parse 'maybe' into a bool \(see --help\)"),
        (["--steps"], r"argument --steps: expected one argument \(see --help\)"),
        (["--dataset.eval_split=2"], r"eval_split must be in \[0.0, 1.0\), got 2.0 \(see --help\)"),
        (["--config_path=none.json"], r"--config_path=none.json: no such file"),
        (["--config_path=none"], r"--config_path=none: no such file; must be a .json or .yaml file, .*"),
    ],
)
def test_an_error_is_one_line(arguments, message, capfd):
    with pytest.raises(UserError, match=f"^{message}$"):
        parse_arguments(["--dataset.repo_id=a/b", *arguments])
    assert capfd.readouterr() == ("", "")


def test_the_data_set_is_required():
    with pytest.raises(UserError, match=r"--dataset.repo_id is missing"):
        parse_arguments(["--steps=1"]).validate()


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("broken.json", "{", "not readable"),
        ("broken.yaml", "a: [1\nb: {", "not readable"),
        ("text.yaml", "steps", "must hold a mapping"),
        ("unknown.yaml", "craft: {nonsense: 1}", "`nonsense`"),
        ("value.yaml", "steps: many", "--steps: Couldn't parse 'many' into an int"),
    ],
)
def test_a_bad_config_file_is_named(tmp_path, name, text, reason):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        parse_arguments([f"--config_path={path}", "--dataset.repo_id=a/b"])
    message = str(raised.value)
    assert "\n" not in message
    assert reason in message
    assert f"--config_path={path}" in message


def test_flags_override_the_file_and_do_not_leak_to_the_next_call(tmp_path):
    path = tmp_path / "run.yaml"
    content = {"steps": 5, "seed": 3, "policy": {"path": "teacher", "optimizer_lr": 0.1}}
    path.write_text(yaml.dump({**content, "dataset": {"repo_id": "a/b"}, "craft": {"lambda_lr": 0.5}}))
    config = parse_arguments([f"--config_path={path}", "--steps=6", "--craft.lambda_max=2"])
    assert (config.steps, config.seed, config.dataset.repo_id) == (6, 3, "a/b")
    assert (config.craft.lambda_lr, config.craft.lambda_max) == (0.5, 2.0)

    from lerobot.configs import parser

    assert parser.get_path_arg("policy") == "teacher"
    parse_arguments(["--dataset.repo_id=a/b"])
    assert parser.get_path_arg("policy") is None
    assert parser.get_yaml_overrides("policy") == []


def test_help_shows_the_craft_flags(capsys):
    with pytest.raises(SystemExit) as left:
        parse_arguments(["--help"])
    assert left.value.code in (0, None)
    shown = capsys.readouterr().out
    for flag in ("--craft.enabled", "--craft.epsilon_schedule", "--engine.name", "--eval_freq", "--steps"):
        assert flag in shown


def test_an_exit_is_an_error_and_other_output_is_kept(capsys):
    with exits_as_user_error():
        print("warning: kept", file=sys.stderr)
    assert capsys.readouterr().err == "warning: kept\n"

    def exit_with_usage() -> None:
        with exits_as_user_error():
            print("usage: a\n  b\nprog: error: one\nmore line", file=sys.stderr)
            sys.exit(2)

    with pytest.raises(UserError, match=r"^one more line$"):
        exit_with_usage()
    assert capsys.readouterr().err == ""

    with pytest.raises(SystemExit), exits_as_user_error():
        sys.exit(0)


def test_no_temporary_file_is_left_behind(inputs, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    (tmp_path / "run.yaml").write_text("steps: 3\n")
    config = parse_arguments([*inputs.flags(tmp_path / "run"), f"--config_path={tmp_path / 'run.yaml'}"])
    config.validate()
    assert list(scratch.iterdir()) == []
    assert tempfile.gettempdir() == str(scratch)


@pytest.mark.parametrize(
    "text", ["a: [1\nkey: hf_SECRETSECRET", "key: hf_SECRETSECRET: {", "\tkey: hf_SECRETSECRET"]
)
def test_an_unreadable_yaml_file_is_not_quoted(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=r"not readable .* in line \d") as raised:
        parse_arguments([f"--config_path={tmp_path / 'run.yaml'}"])
    assert "SECRET" not in str(raised.value)
