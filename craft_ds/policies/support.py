"""What the types of policies need and support, checked from their configuration before anything is loaded."""

from importlib.util import find_spec

from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig

from craft_ds.errors import UserError

# The package that a type needs besides those of craft-ds; also the name of LeRobot's extra.
_PACKAGES = {"diffusion": "diffusers", "smolvla": "num2words"}


def check_packages(config: PreTrainedConfig) -> None:
    """Check that the packages of a policy type are installed.

    Raises:
        UserError: One is missing.
    """
    package = _PACKAGES.get(config.type)
    if package is not None and find_spec(package) is None:
        raise UserError(
            f"a policy of type {config.type} needs the package {package}: "
            f"pip install 'lerobot[{config.type}]'"
        )


def check_craft_policy(config: PreTrainedConfig, asked_by: str) -> None:
    """Check that a policy can be trained with anchors, which hold what pi0_fast's loss needs.

    Args:
        config: The policy's configuration.
        asked_by: The flag or command that needs it, for the error message.

    Raises:
        UserError: The policy is of another type.
    """
    if not isinstance(config, PI0FastConfig):
        raise UserError(
            f"{asked_by}: CRaFT is for policies of type pi0_fast, and this one is of type {config.type}: "
            "train it without CRaFT, or choose a pi0_fast policy"
        )
