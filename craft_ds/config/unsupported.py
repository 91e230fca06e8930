"""LeRobot's flags that craft-ds does not honour, with what to use instead. Does not import LeRobot."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from craft_ds.errors import UserError


@dataclass(frozen=True)
class Unsupported:
    """A flag, or a group of flags, that has no effect here.

    Attributes:
        instead: What to use, or to do, instead.
        accepted: Values that ask for what happens anyway.
    """

    instead: str
    accepted: tuple[object, ...] = ()


_NO_PUSH = "upload final/ after the run, with `hf upload`"
_WORLD = "--eval_freq with --world.name evaluates in an embedded world; use lerobot-eval on the saved policy"

UNSUPPORTED = {
    "--env": Unsupported(_WORLD),
    "--env_eval_freq": Unsupported(_WORLD, (0,)),
    "--eval": Unsupported(_WORLD),
    "--reward_model": Unsupported("craft-ds trains policies"),
    "--sample_weighting": Unsupported("omit it"),
    "--save_checkpoint_to_hub": Unsupported(_NO_PUSH, (False,)),
    "--dataset.streaming": Unsupported("download the data set first", (False,)),
    "--dataset.repo_type": Unsupported("download the data set first", ("dataset",)),
    "--persistent_workers": Unsupported("workers always live as long as the run", (True,)),
    "--job": Unsupported("start it on the machine that trains", ("local",)),
    "--wandb.disable_artifact": Unsupported("no artifact is ever uploaded", (True,)),
    "--policy.push_to_hub": Unsupported(_NO_PUSH, (False,)),
    "--policy.repo_id": Unsupported(_NO_PUSH),
    "--policy.private": Unsupported(_NO_PUSH),
    "--policy.use_amp": Unsupported("--engine.dtype=bfloat16 trains in bfloat16", (False,)),
    "--policy.use_peft": Unsupported("--lora.enabled=true trains adapters", (False,)),
    "--policy.compile_model": Unsupported("--engine.compile=true compiles the layers in training", (False,)),
    "--policy.compile_mode": Unsupported("--engine.compile=true compiles the layers in training"),
    "--policy.use_relative_actions": Unsupported(
        "the policy's statistics are those of its own actions; train a policy that was made with it"
    ),
    "--policy.relative_exclude_joints": Unsupported(
        "the policy's statistics are those of its own actions; train a policy that was made with it"
    ),
    "--policy.action_feature_names": Unsupported("they are those of the policy"),
}
"""Flags without an effect, by name; a group stands for all flags below it."""

NO_EFFECT_IN_PI0_FAST = ("n_obs_steps", "max_state_dim", "max_action_dim", "action_expert_variant")
"""Fields of pi0_fast's configuration that its model never reads."""

# Computed from the number of cores, so that a file of another machine may hold another value.
_COMPUTED = ("eval.batch_size",)


def refuse_unsupported(
    values: Mapping[str, Any], defaults: Mapping[str, Any], given: Collection[str], *, from_file: bool
) -> None:
    """Check that no flag was set that would have no effect.

    Args:
        values: All values by name, such as `dataset.streaming`.
        defaults: Their defaults.
        given: Names of the flags on the command line.
        from_file: Also check values of a configuration file or of Python, which differ from the default.

    Raises:
        UserError: Names the flag and what to use instead.
    """
    for name, value in values.items():
        entry = next((UNSUPPORTED[flag] for flag in _above(name) if flag in UNSUPPORTED), None)
        if entry is None or value in entry.accepted:
            continue
        differs = from_file and name not in _COMPUTED and value != defaults.get(name)
        if name in given or differs:
            raise UserError(f"--{name}={_shown(value)} is not supported by craft-ds: {entry.instead}")


def _above(name: str) -> Iterator[str]:
    """Yield a flag and the groups that it is in."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        yield "--" + ".".join(parts[:count])


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
