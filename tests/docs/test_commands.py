"""The commands in the documents: every one is parsed by its own parser, or listed below with the reason.

Nothing is started. The flags of `craft-ds train` go through the parser of a training run, those of the other
subcommands and of the benchmarks through their argparse parsers; scripts must exist. `…` and capitals stand
for values that the reader chooses, `…` also for further flags.
"""

import argparse
import contextlib
import importlib
import io
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from craft_ds.cli import COMMANDS
from craft_ds.config.arguments import normalise_arguments
from craft_ds.config.help import train_help, without_refused
from craft_ds.config.parser import parse_arguments
from craft_ds.config.suggestions import refuse_misspelt_flags
from craft_ds.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *sorted(ROOT.glob("README*.md")),
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "ds_configs" / "README.md",
]
NOT_PARSED = {
    "pip install": "needs a package registry",
    "lerobot-eval": "LeRobot's program; needs its simulators",
    "lerobot-record": "LeRobot's program; needs a robot",
    "python -m lerobot.": "commands of the guide's own package, shown beside ours",
    "bash .ci/run": "runs the tests themselves",
}
"""Beginnings of the commands that are not ours to parse, with the reason."""

DEEPSPEED_FLAGS = {"--hostfile", "--num_gpus", "--num_nodes"}
"""Flags of DeepSpeed's launcher that the documents use."""

TEST_FLAGS = {"--quick", "--all"}
"""Flags of scripts/test.sh that the documents use."""

SCRIPTS: dict[str, str] = {"demo.sh": "demo", "train_craft.sh": "train", "train_craft_lora.sh": "train"}
"""Shell scripts that hand their arguments to a subcommand."""


@dataclass(frozen=True)
class Command:
    """One command of a document; `complete` is false where it is only mentioned or holds `…`."""

    place: str
    words: tuple[str, ...]
    complete: bool

    def __str__(self):
        return self.place


class WrongCommand(Exception):
    """A command of a document that does not exist or does not parse."""


def read_commands(name: str, text: str) -> Iterator[Command]:
    """Yield the commands of the bash blocks, then those that are mentioned between backquotes."""
    blocks = r"^ *```(?:bash|sh|shell|console)\n(.*?)^ *```"
    for block in re.finditer(blocks, text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, block.start(1))
        for row in re.finditer(r"(?:[^\n\\]|\\.)+", block[1], re.DOTALL):
            place = f"{name}:{line + 1 + block[1].count('\n', 0, row.start())}"
            yield from _commands_of_line(place, row[0].replace("\\\n", " "), complete=True)
    prose = re.sub(r"^ *```.*?^ *```", lambda found: "\n" * found[0].count("\n"), text, flags=re.M | re.S)
    programs = r"`((?:craft-ds|torchrun|deepspeed|lerobot-\w+|bash|python3?) [^`\n]+)`"
    for mention in re.finditer(programs, prose):
        place = f"{name}:{1 + prose.count('\n', 0, mention.start())}"
        yield from _commands_of_line(place, mention[1].replace("\\|", "|"), complete=False)


def _commands_of_line(place: str, line: str, *, complete: bool) -> Iterator[Command]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set(";&|"):
            if words:
                kept = tuple(word for word in words if word not in ("…", "..."))
                yield Command(place, kept, complete and len(kept) == len(words))
            words = []
        elif words or not re.fullmatch(r"[A-Z_]+=.*", word):  # not the variables before a command
            words.append(word)


def check(command: Command) -> None:
    """Raise `WrongCommand` unless the command is listed above or parses."""
    program, *rest = command.words
    line = " ".join(command.words)
    if any(line.startswith(start) for start in NOT_PARSED):
        return
    if program == "craft-ds":
        check_subcommand(rest, complete=command.complete)
    elif program in ("torchrun", "deepspeed"):
        check_launch(program, rest, complete=command.complete)
    elif program in ("python", "python3"):
        check_python(rest, complete=command.complete)
    elif program in ("bash", "source"):
        check_shell_script(rest, complete=command.complete)
    else:
        raise WrongCommand(f"{line}: in no class; add it to NOT_PARSED with the reason, or a check here")


def check_subcommand(words: list[str], *, complete: bool) -> None:
    """Check the words after `craft-ds`."""
    name, *arguments = words or ["--help"]
    if name in ("--help", "--version"):
        return
    if name not in COMMANDS:
        raise WrongCommand(f"craft-ds {name}: no such command")
    if name == "train":
        check_training(arguments)
        return
    module = COMMANDS[name][0]
    if name == "worlds" and arguments[:1] in (["record"], ["pretrain"]):
        module = f"worlds_{arguments.pop(0)}"
    main = importlib.import_module(f"craft_ds.commands.{module}").main
    fields = "--policy." if name == "plan" else None
    check_parses(parser_of(lambda: main([])), arguments, complete=complete, fields=fields)


def check_launch(launcher: str, words: list[str], *, complete: bool) -> None:
    """Check the flags of torchrun or deepspeed, then the program that it starts."""
    start = next((place for place, word in enumerate(words) if word == "-m" or word.endswith(".py")), None)
    if start is None and complete:
        raise WrongCommand(f"{launcher} {' '.join(words)}: starts nothing")
    known = DEEPSPEED_FLAGS if launcher == "deepspeed" else set(get_args_parser()._option_string_actions)
    check_names(words[:start], known)
    if start is not None:
        check_python(words[start:], complete=complete)


def check_python(words: list[str], *, complete: bool) -> None:
    """Check what python is asked to run, with its arguments."""
    if words[:2] == ["-m", "craft_ds"]:
        check_subcommand(words[2:], complete=complete)
        return
    path, *arguments = words
    folder, _, file = path.rpartition("/")
    source = existing(path).read_text(encoding="utf-8")
    if folder == "scripts":
        called = re.search(r"main\(\[(.+), \*sys\.argv\[1:\]\]\)", source)[1]
        check_subcommand([*called.replace('"', "").split(", "), *arguments], complete=complete)
    elif folder == "benchmarks":
        sys.path.insert(0, str(ROOT / folder))
        try:
            parse = importlib.import_module(file.removesuffix(".py")).parse_arguments
        finally:
            sys.path.remove(str(ROOT / folder))
        check_parses(parser_of(parse), arguments, complete=complete)
    elif folder in ("docs", "examples"):
        check_names(arguments, set())
    else:
        raise WrongCommand(f"python {path}: in no class")


def check_shell_script(words: list[str], *, complete: bool) -> None:
    """Check that a shell script exists, and the arguments that it hands on."""
    path, *arguments = words
    existing(path)
    name = path.removeprefix("scripts/")
    if name in SCRIPTS:
        check_subcommand([SCRIPTS[name], *arguments], complete=complete)
    elif name == "train_craft_dryrun.sh":
        check_training(arguments)
    elif name == "test.sh":
        check_names(arguments, TEST_FLAGS)
        for argument in arguments:
            if argument.startswith("tests"):
                existing(argument.partition("::")[0])
    elif arguments:
        raise WrongCommand(f"{path} takes no arguments")


def check_training(words: list[str]) -> None:
    """Check the names of the flags of a run, and parse those whose value is known."""
    given = list(join_values(words))
    check_names(given, training_flags())
    known = [flag for flag in given if not is_placeholder(flag.partition("=")[2]) and "=" in flag]
    left_out = ("--policy.path=", "--policy.type=", "--resume=auto", "--help=all")
    known = [flag for flag in known if not flag.startswith(left_out) and not is_run_config(flag)]
    if not known:
        return
    with pytest.MonkeyPatch.context() as patched, contextlib.chdir(ROOT):
        patched.setattr(sys, "argv", ["craft-ds train"])
        try:
            refuse_misspelt_flags(normalise_arguments(known))
            parse_arguments(["--policy.type=pi0_fast", "--dataset.repo_id=me/new_task", *known])
        except UserError as error:
            raise WrongCommand(str(error)) from error


def check_parses(
    parser: argparse.ArgumentParser, arguments: list[str], *, complete: bool, fields: str | None = None
) -> None:
    """Check the names of the arguments, and parse them if the command is complete.

    Args:
        parser: Parser of the command.
        arguments: Words after the command's name.
        complete: Whether required arguments must be there.
        fields: Start of further flags of the form `--start.name=value`, which another parser reads.
    """
    known = set(parser._option_string_actions)
    own = [
        word
        for word in arguments
        if not (fields and word.startswith(fields) and "=" in word and word.partition("=")[0] not in known)
    ]
    check_names(own, known)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            if complete and "--help" not in own:
                parser.parse_args(own)
    except SystemExit:
        raise WrongCommand(said.getvalue().splitlines()[-1]) from None


def check_names(words: list[str], known: set[str]) -> None:
    """Check that every flag among the words is known."""
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("-") and name not in known:
            raise WrongCommand(f"{name}: no such flag")


def join_values(words: list[str]) -> Iterator[str]:
    """Yield `--name value` as `--name=value`."""
    for word, following in zip(words, [*words, "--"][1:], strict=True):
        if word.startswith("--"):
            yield word if "=" in word or following.startswith("--") else f"{word}={following}"


def is_placeholder(value: str) -> bool:
    return "…" in value or re.match(r"[A-Z_]+(/|$)", value) is not None


def is_run_config(flag: str) -> bool:
    """Return whether a flag names the configuration of a run, which exists only after the run."""
    return flag.startswith("--config_path=outputs/")


def existing(path: str) -> Path:
    if not (ROOT / path).exists():
        raise WrongCommand(f"{path}: no such file")
    return ROOT / path


@cache
def training_flags() -> set[str]:
    """Return every flag of a training run of pi0_fast, those of LeRobot included."""
    shown = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patched,
        contextlib.redirect_stdout(shown),
        contextlib.suppress(SystemExit),
    ):
        patched.setattr(sys, "argv", ["craft-ds train"])
        parse_arguments(["--help", "--policy.type=pi0_fast"])
    found = re.findall(r"^  (--[\w.]+)", without_refused(shown.getvalue()) + train_help(), re.MULTILINE)
    return {*found, "--engine", "--ds_config", "--lora", "--help", "--policy.path"}


def parser_of(action: Callable[[], object]) -> argparse.ArgumentParser:
    """Return the parser that an action makes, which ends with its first use."""

    class Found(Exception):
        pass

    def found(parser, *_):
        raise Found(parser)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_known_args", found)
        with pytest.raises(Found) as caught:
            action()
    return caught.value.args[0]


COMMANDS_OF_DOCUMENTS = [
    command
    for path in DOCUMENTS
    if path.exists()
    for command in read_commands(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("command", COMMANDS_OF_DOCUMENTS, ids=str)
def test_command_of_a_document_parses(command):
    check(command)


def test_documents_have_commands_of_every_class():
    programs = {command.words[0] for command in COMMANDS_OF_DOCUMENTS if command.complete}
    assert {"craft-ds", "torchrun", "bash"} <= programs
    assert len(COMMANDS_OF_DOCUMENTS) > 30


@pytest.mark.parametrize("start", NOT_PARSED)
def test_exceptions_are_used(start):
    assert any(" ".join(command.words).startswith(start) for command in COMMANDS_OF_DOCUMENTS)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_blocks_of_commands_are_marked_as_bash(path):
    fence = None
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            fence = line.strip().removeprefix("```") if fence is None else None
        elif fence == "":
            assert not re.match(r" *(\$ |craft-ds |torchrun |deepspeed |bash |python )", line), line


@pytest.mark.parametrize(
    "line",
    [
        "curl example.org",
        "craft-ds trian",
        "craft-ds train --craft.enable=true",
        "craft-ds train --steps=many",
        "craft-ds train --env.type=libero …",
        "craft-ds train --optimizer_lr=1e-4 …",
        "craft-ds train --engine=zero3",
        "craft-ds train --ds_config zero9",
        "craft-ds export outputs/run/final",
        "craft-ds export outputs/run/final --output x --dtype int8",
        "craft-ds plan --policy.type=pi0_fast --ranks=2",
        "craft-ds worlds record --world mars --output_dir x",
        "craft-ds worlds draw",
        "python scripts/export_checkpoint.py … --merge",
        "python scripts/none.py",
        "python benchmarks/bench_surgery.py --none",
        "bash scripts/demo.sh --seed 0",
        "bash scripts/test.sh tests/none",
        "bash scripts/setup.sh --all",
        "torchrun --nproc-per-node 2",
        "torchrun --ranks 2 -m craft_ds train …",
        "torchrun --nproc-per-node 2 -m craft_ds train --craft.lambda=1",
        "deepspeed --gpus 2 scripts/train_craft.py …",
        "true && \\\n  craft-ds trian",
    ],
)
def test_wrong_command_is_found(line):
    found = read_commands("page.md", f"```bash\n{line}  # a comment\n```\n")
    with pytest.raises(WrongCommand):
        check(list(found)[-1])


def test_commands_are_read_from_blocks_and_prose():
    text = "Run `craft-ds doctor --json`:\n```bash\n# 1\nA=1 bash x.sh && craft-ds \\\n version  # 2\n```\n"
    found = [(entry.place, " ".join(entry.words), entry.complete) for entry in read_commands("p", text)]
    assert found == [
        ("p:4", "bash x.sh", True),
        ("p:4", "craft-ds version", True),
        ("p:1", "craft-ds doctor --json", False),
    ]
