"""Closed-loop success during training, as the flags ``--world.*`` configure it."""

from lerobot.configs import PreTrainedConfig
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.random_utils import get_rng_state, set_rng_state

from craft_ds.config.configs import WorldEvalConfig
from craft_ds.distributed.env import is_local_rank0
from craft_ds.errors import UserError
from craft_ds.policies.loading import policy_cameras
from craft_ds.worlds import gl_problem, make_world
from craft_ds.worlds.base import ACTION, CAMERA, STATE
from craft_ds.worlds.evaluation import Act, ClosedLoopPolicy, evaluate
from craft_ds.worlds.tasks import RENDERED


def check_world(config: WorldEvalConfig, policy: PreTrainedConfig) -> None:
    """Check that the world runs on this machine, has the tasks, and fits the policy.

    Args:
        config: A validated configuration.
        policy: The policy's configuration.

    Raises:
        UserError: A flag does not fit, or the world cannot run; names the flag and the fix.
    """
    if not config.name:
        return
    world = make_world(config.name)
    for task in config.tasks:
        if task not in world.tasks("all"):
            known = ", ".join(world.tasks("all"))
            raise UserError(f"--world.tasks: {config.name} has no task {task}: choose among {known}")
    if policy_cameras(policy) != [CAMERA]:
        raise UserError(
            f"--world.name={config.name} has one camera, {CAMERA}, but the policy uses "
            f"{', '.join(policy_cameras(policy))}: leave --world.name out"
        )
    if (steps := getattr(policy, "n_obs_steps", 1)) > 1:
        raise UserError(
            f"--world.name={config.name} shows one observation at a time, but the policy uses "
            f"n_obs_steps={steps}: leave --world.name out"
        )
    features = {**policy.input_features, **policy.output_features}
    for key, names in ((STATE, world.state_names), (ACTION, world.action_names)):
        if key in features and tuple(features[key].shape) != (len(names),):
            raise UserError(
                f"--world.name={config.name} has {len(names)} numbers in {key}, but the policy has "
                f"{list(features[key].shape)}: leave --world.name out"
            )
    # Rendering a test frame takes seconds: once per node.
    if config.name in RENDERED and is_local_rank0() and (problem := gl_problem()):
        raise UserError(f"--world.name={config.name}: {problem}")


def evaluate_in_world(
    config: WorldEvalConfig,
    act: Act,
    preprocessor: PolicyProcessorPipeline,
    postprocessor: PolicyProcessorPipeline,
    rank: int,
    world_size: int,
) -> dict[str, float]:
    """Measure the closed-loop success of a policy in training. Collective: call on all ranks.

    Evaluation does not affect training: the scenes have generators of their own, and the global ones of
    Python, numpy and torch are restored.

    Args:
        config: A checked configuration.
        act: The engine's ``act``.
        preprocessor: From observations to the policy's input.
        postprocessor: From the policy's output to actions.
        rank: This process among ``world_size``.
        world_size: Number of processes.

    Returns:
        ``eval/success/<task>`` by task, the same on all ranks; empty without a world.
    """
    if not config.name:
        return {}
    world = make_world(config.name)
    tasks = config.tasks or world.tasks("all")
    state = get_rng_state()
    try:
        success = evaluate(
            ClosedLoopPolicy(act, preprocessor, postprocessor),
            world,
            tasks,
            episodes=config.episodes,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
        )
    finally:
        set_rng_state(state)
    return {f"eval/success/{task}": rate for task, rate in success.items()}
