"""`training_ranks.py` for the small policies of other types, with pinned random draws."""

from training_ranks import main

from craft_ds.cli import exit_without_teardown
from craft_ds.engines.deepspeed import init_distributed
from craft_ds.testing.small_policies import pinned_draws, small_sizes


def run() -> None:
    init_distributed()  # once: DeepSpeed keeps the group of its first run
    with small_sizes(), pinned_draws():
        main()


if __name__ == "__main__":
    exit_without_teardown(run)
