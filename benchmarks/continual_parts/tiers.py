"""Sizes of the benchmark: worlds, orders of tasks, steps, seeds and budgets."""

from dataclasses import dataclass

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
    """

    world: str
    orders: tuple[tuple[str, ...], ...]
    keeps_old: bool
    ships_start: bool
    steps: int
    batch_size: int
    learning_rate: float
    demonstrations: int
    drift: float
    episodes: int
    budgets: tuple[int, ...]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    methods: tuple[str, ...] = ()


TIERS = {
    # Minutes on two cores: the mechanism, not a result.
    "smoke": Tier(
        world="blocks",
        orders=(TASKS["blocks"].new,),
        keeps_old=True,
        ships_start=True,
        steps=150,
        batch_size=16,
        learning_rate=5e-4,
        demonstrations=40,
        drift=0.0,
        episodes=20,
        budgets=(30,),
        seeds=(11,),
        tuning_seeds=(1,),
        methods=("sequential", "replay_1", "kl_1"),
    ),
    "metaworld": Tier(
        world="metaworld",
        orders=(TASKS["metaworld"].new,),
        keeps_old=True,
        ships_start=True,
        steps=400,
        batch_size=16,
        learning_rate=5e-4,
        demonstrations=40,
        drift=0.0,
        episodes=40,
        budgets=(10, 100),
        seeds=(11, 12, 13),
        tuning_seeds=(1, 2),
    ),
    "cw5": Tier(
        world="cw10",
        orders=(CW5, CW5[::-1]),
        keeps_old=False,
        ships_start=False,
        steps=1500,
        batch_size=16,
        learning_rate=5e-4,
        demonstrations=60,
        drift=1.5,
        episodes=20,
        budgets=(100,),
        seeds=(11, 12, 13),
        tuning_seeds=(1,),
    ),
    "cw10": Tier(
        world="cw10",
        orders=(CW10,),
        keeps_old=False,
        ships_start=False,
        steps=1500,
        batch_size=16,
        learning_rate=5e-4,
        demonstrations=60,
        drift=1.5,
        episodes=20,
        budgets=(100,),
        seeds=(11, 12),
        tuning_seeds=(1,),
        methods=("sequential", "replay_1", "guide", "kl_1"),
    ),
}
