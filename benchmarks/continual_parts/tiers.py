"""Sizes of the benchmark: worlds, orders of tasks, steps, seeds and budgets."""

from dataclasses import dataclass, replace

from craft_ds.worlds.tasks import CW5, CW10, TASKS


@dataclass(frozen=True)
class Tier:
    """One size of the benchmark.

    Attributes:
        world: World that the policies are run in.
        orders: Orders in which the tasks are learned.
        keeps_old: The start policy's own tasks are to be kept too, and have anchors.
        ships_start: The start policy is the world's shipped teacher; else `craft-ds worlds pretrain` makes
            one.
        steps: Optimizer steps of a stage.
        batch_size: Task samples of a step, and anchors.
        learning_rate: Learning rate at the start of each stage.
        demonstrations: Demonstrations of each task.
        drift: `--drift` of their recording.
        episodes: Evaluation episodes per task.
        budgets: Stored samples per task.
        seeds: Training seeds that are reported.
        tuning_seeds: Training seeds that settings are chosen on, with scenes of their own.
        methods: Methods that the tier compares; empty: all.
        more_seeds: Further training seeds, which are reported of sequential fine-tuning and of the settings
            that tuning chose: intervals of three seeds are wide.
    """

    world: str
    orders: tuple[tuple[str, ...], ...]
    steps: int
    budgets: tuple[int, ...]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...] = (1,)
    keeps_old: bool = False
    ships_start: bool = False
    batch_size: int = 16
    learning_rate: float = 5e-4
    demonstrations: int = 40
    drift: float = 0.0
    episodes: int = 20
    methods: tuple[str, ...] = ()
    more_seeds: tuple[int, ...] = ()


_CW = Tier(
    "cw10",
    (CW5, CW5[::-1]),
    steps=800,
    budgets=(100,),
    seeds=(11, 12, 13),
    demonstrations=60,
    drift=1.5,
    methods=(
        "sequential",
        "joint",
        "ewc",
        "replay_0.1",
        "replay_0.3",
        "replay_1",
        "guide",
        "kl_0.3",
        "kl_1",
        "kl_3",
        "kl_adaptive",
        "kl_every_5",
        "kl_observations_1",
    ),
)
_WITH_TEACHER = {"keeps_old": True, "ships_start": True}
TIERS = {
    # Minutes on two cores: the mechanism, not a result.
    "smoke": Tier(
        "blocks",
        (TASKS["blocks"].new,),
        steps=150,
        budgets=(30,),
        seeds=(11,),
        methods=("sequential", "replay_1", "kl_1"),
        **_WITH_TEACHER,
    ),
    "metaworld": Tier(
        "metaworld",
        (TASKS["metaworld"].new,),
        steps=400,
        budgets=(10, 100),
        seeds=(11, 12, 13),
        tuning_seeds=(1, 2),
        episodes=40,
        more_seeds=(14, 15, 16, 17, 18),
        **_WITH_TEACHER,
    ),
    "cw5": _CW,
    "cw10": replace(_CW, orders=(CW10,), seeds=(11, 12), methods=("sequential", "replay_1", "guide", "kl_1")),
}
