"""`craft-ds train`: fine-tune a policy under a retention constraint."""

from collections.abc import Sequence

from craft_ds.distributed.env import is_local_rank0, launched_rank


def main(arguments: Sequence[str]) -> None:
    """Train with the given flags. Collective under a launcher: call on all ranks."""
    # Imported here: LeRobot and torch take seconds, and their failures become one line too.
    from craft_ds.checkpoints.run_directory import repair_last_link
    from craft_ds.config.parser import normalise_arguments, parse_arguments
    from craft_ds.distributed.collectives import destroy_process_group, process_group_is_initialized
    from craft_ds.training.resume import resolve_resume
    from craft_ds.training.trainer import train_craft

    created_by_caller = process_group_is_initialized()
    chosen = resolve_resume(normalise_arguments(arguments))
    for line in chosen.messages if is_local_rank0() else ():
        print(line, flush=True)
    config = parse_arguments(chosen.arguments)
    config.verified_checkpoint = chosen.checkpoint
    if chosen.checkpoint is not None and chosen.is_finished(config.steps):
        if launched_rank() == 0:
            repair_last_link(chosen.checkpoint)
            print(f"{chosen.checkpoint} has done all --steps={config.steps}: nothing left to do")
    else:
        train_craft(config)
    if not created_by_caller:
        destroy_process_group()
