"""`craft-ds train`: fine-tune a policy under a retention constraint."""

import contextlib
import io
import sys
from collections.abc import Sequence

from craft_ds.config.arguments import TRAIN_CONFIG_NAME, normalise_arguments
from craft_ds.config.help import train_help, without_refused
from craft_ds.config.presets import preset_line
from craft_ds.config.suggestions import refuse_misspelt_flags
from craft_ds.config.versions import untested_versions
from craft_ds.distributed.env import is_local_rank0, launched_rank
from craft_ds.errors import UserError


def main(arguments: Sequence[str]) -> None:
    """Train with the given flags. Collective under a launcher: call on all ranks."""
    if "--help=all" in arguments:
        _print_all_flags([argument for argument in arguments if argument != "--help=all"])
        return
    if "--help" in arguments or "-h" in arguments:
        print(train_help())
        return
    given = normalise_arguments(arguments)
    switches = ("--print_config", "--print_config=true")
    print_only = not set(switches).isdisjoint(given)
    given = [argument for argument in given if argument not in switches]
    refuse_misspelt_flags(given)
    if print_only and not {"--resume=true", "--resume=auto"}.isdisjoint(given):
        raise UserError(
            "--print_config prints the configuration of a new run: omit --resume, or read "
            f"{TRAIN_CONFIG_NAME} of the checkpoint"
        )
    # Imported here: LeRobot and torch take seconds, and their import errors become one line too.
    from craft_ds.config.parser import parse_arguments
    from craft_ds.config.secret_scan import refuse_secrets
    from craft_ds.distributed.collectives import destroy_process_group, process_group_is_initialized
    from craft_ds.training.exclusive_run import exclusive_run
    from craft_ds.training.finished import finished_line, repair_links
    from craft_ds.training.resume import join_ranks, resolve_resume, resumed_output
    from craft_ds.training.start_report import first_line
    from craft_ds.training.trainer import train_craft

    for package in untested_versions() if is_local_rank0() else ():
        print(f"warning: craft-ds was not tested with {package}", file=sys.stderr, flush=True)
    created_by_caller = process_group_is_initialized()
    if print_only:
        config = parse_arguments(given)
        config.validate()
        if launched_rank() == 0:
            print(config.to_yaml(), end="")
        return
    with contextlib.ExitStack() as stack:
        if (output := resumed_output(given)) is not None:  # may rename checkpoints that another run writes
            join_ranks(given)
            stack.enter_context(exclusive_run(output, to_write=False))
        chosen = resolve_resume(given)
        for line in chosen.messages if is_local_rank0() else ():
            print(line, flush=True)
        config = parse_arguments(chosen.arguments)
        refuse_secrets(config.to_dict())  # before anything is printed
        if launched_rank() == 0:
            print(first_line(config), flush=True)
            if preset := preset_line(chosen.arguments):
                print(preset, flush=True)
        config.verified_checkpoint = chosen.checkpoint
        if chosen.checkpoint is not None and (reason := finished_line(chosen, config)):
            if launched_rank() == 0:
                repair_links(chosen.checkpoint, config)
                print(reason)
        else:
            train_craft(config)
    if not created_by_caller:
        destroy_process_group()


def _print_all_flags(arguments: Sequence[str]) -> None:
    from craft_ds.config.parser import parse_arguments  # imports LeRobot, which takes seconds

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        parse_arguments(["--help", *arguments])
    print(without_refused(shown.getvalue()))
