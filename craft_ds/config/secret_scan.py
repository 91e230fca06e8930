"""Detection of keys and tokens in a configuration, which would be stored and logged."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from craft_ds.errors import UserError

SECRET_VARIABLES = (
    "WANDB_API_KEY",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)
# A shorter value could occur in a configuration by chance.
_SHORTEST = 8
_SECRET_FLAG = re.compile(r"(--[\w.-]*(?:key|token|secret|password)=)\S+", re.IGNORECASE)
_PATTERNS = (
    (re.compile(r"\bhf_[A-Za-z0-9]{20,}"), "a token of the Hugging Face hub"),
    (re.compile(r"\bwandb_v\d_[A-Za-z0-9_]{20,}"), "a key of Weights & Biases"),
    (re.compile(r"\w://[^/@\s]*:[^/@\s]+@"), "a password in an address"),
)


def refuse_secrets(config: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> None:
    """Check that no value of a configuration contains a key, a token or a password.

    A configuration is written into every checkpoint and sent to Weights & Biases.

    Args:
        config: Plain values by name, nested.
        environment: Environment variables, some of which hold secrets.

    Raises:
        UserError: Names the flag, without the secret.
    """
    for flag, text in _texts(config, ""):
        what = next((kind for pattern, kind in _PATTERNS if pattern.search(text)), None)
        for name in SECRET_VARIABLES:
            value = environment.get(name, "")
            if len(value) >= _SHORTEST and value in text:
                what = f"the value of {name}"
        if what:
            raise UserError(
                f"{flag} holds {what}, which would be stored in checkpoints and logs: keep it in the "
                "environment, where wandb and the hub read it"
            )


def redact(text: str) -> str:
    """Return a message without the values of flags whose names suggest secrets."""
    return _SECRET_FLAG.sub(r"\1…", text)


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
