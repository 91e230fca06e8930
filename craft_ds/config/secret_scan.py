"""Detection of keys, tokens and passwords, which would be stored in checkpoints and logged.

A secret is known by the name of its variable or flag, or by its form; docs/security.md states the rule.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from craft_ds.errors import UserError

# A shorter value could occur in a configuration by chance.
_SHORTEST = 8
# Whole words of a name: neither `max_action_tokens` nor `tokenizer_name` has one.
_SECRET_NAME = re.compile(
    r"(?:^|[_.-])(?:secret|[a-z0-9]*(?:password|passwd)|passphrase|pat|credentials?|(?:api|access|private|secret|auth|"
    r"encryption|signing|account|ssh|wandb)[_-]?key|(?:auth|access|hub|hf|api)[_-]?token|token|apikey)$",
    re.IGNORECASE,
)
# The words can be followed by what kind of value it is, unless that is the place or the name of the secret.
_SUFFIX = re.compile(r"[_-](?:value|base64|b64|default|prod|dev|test|old|new|\d+)$", re.IGNORECASE)
# A tokenizer's texts.
_SPECIAL_TOKEN = re.compile(
    r"(?:^|[_.-])(?:bos|eos|pad|unk|cls|sep|mask|image|video|audio|boi|eoi|action|state|start|end|stop|begin|"
    r"special|added|new|last|first|next|prefix|suffix|skip|per|fake|global|decoder|language)[_-]token$",
    re.IGNORECASE,
)
_PATTERNS = (
    (re.compile(r"\bhf_[A-Za-z0-9]{20,}"), "a token of the Hugging Face hub"),
    (re.compile(r"\bwandb_v\d_[A-Za-z0-9_]{20,}"), "a key of Weights & Biases"),
    (re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,})"), "a token of GitHub"),
    (re.compile(r"\bglpat-[\w-]{20,}"), "a token of GitLab"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), "a key of AWS"),
    (re.compile(r"\bAIza[\w-]{35}"), "a key of Google"),
    (re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"), "an API key"),
    (re.compile(r"\bxox[abprs]-[\w-]{10,}"), "a token of Slack"),
    (re.compile(r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+"), "a signed token (JWT)"),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"), "a private key"),
    (re.compile(r"(?<=\w://)[^/@\s:]*:[^/@\s]+(?=@)"), "a password in an address"),
)
_ADDRESS = _PATTERNS[-1][0]
_FLAG = re.compile(r"(--([\w.-]+)=)\S+")


def is_secret_name(name: str) -> bool:
    """Return True if a variable or flag of this name holds a secret.

    Args:
        name: Words joined by underscores, hyphens or dots.
    """
    name = _SUFFIX.sub("", name)
    return bool(_SECRET_NAME.search(name)) and not _SPECIAL_TOKEN.search(name)


def secrets_of(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the secrets in environment variables: their values and where each comes from.

    Args:
        environment: Values by name. Addresses of any variable may contain a password.
    """
    found = {}
    for name, value in environment.items():
        if is_secret_name(name) and len(value) >= _SHORTEST and not _is_path(value):
            found[value] = name
        for match in _ADDRESS.finditer(value):
            password = match[0].partition(":")[2]
            if len(password) >= _SHORTEST:
                found[password] = name
    return found


def _is_path(value: str) -> bool:
    try:
        return Path(value).exists()
    except (OSError, ValueError):
        return False


def refuse_secrets(config: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> None:
    """Check that no value of a configuration contains a key, a token or a password.

    A configuration is written into every checkpoint and sent to Weights & Biases.

    Args:
        config: Plain values by name, nested.
        environment: Environment variables, some of which hold secrets.

    Raises:
        UserError: Names the flag, without the secret.
    """
    secrets = secrets_of(environment)
    for flag, text in _texts(config, ""):
        what = next((kind for pattern, kind in _PATTERNS if pattern.search(text)), None)
        if is_secret_name(flag) and len(text) >= _SHORTEST:
            what = "what its name says is a secret"
        for value, name in secrets.items():
            if value in text:
                what = f"the value of {name}"
        if what:
            raise UserError(
                f"{flag} holds {what}, which would be stored in checkpoints and logs: keep it in the "
                "environment, where wandb and the hub read it"
            )


def refuse_secret_arguments(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> None:
    """Check a command line as `refuse_secrets` checks a configuration.

    Args:
        arguments: `--flag=value` or `--flag value`.
        environment: As for `refuse_secrets`.

    Raises:
        UserError: Names the flag, without the secret.
    """
    flag = "the command line"
    for argument in arguments:
        if argument.startswith("-") and not argument.startswith("-----"):
            flag, _, value = argument.partition("=")
        else:
            value = argument
        refuse_secrets({flag.lstrip("-"): value}, environment)


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return a message without secrets: those of the environment, of known forms and of flags named so."""
    for value in sorted(secrets_of(environment), key=len, reverse=True):
        text = text.replace(value, "…")
    for pattern, _ in _PATTERNS:
        text = pattern.sub("…", text)
    return _FLAG.sub(lambda match: f"{match[1]}…" if is_secret_name(match[2]) else match[0], text)


def _texts(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield every text in a configuration, including keys, with the flag that sets it."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield name or "a configuration file", str(key)
            yield from _texts(entry, f"{name}.{key}" if name else f"--{key}")
    elif isinstance(value, list | tuple | set):
        for entry in value:
            yield from _texts(entry, name)
    elif value is not None:
        yield name, str(value)
