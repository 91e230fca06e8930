"""Choice of the frames that become anchors, and what the metadata record of it."""

from typing import Any

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import ACTION, OBS_STATE

from craft_ds.anchors.build_plan import BuildOptions
from craft_ds.anchors.phases import motion_phases
from craft_ds.anchors.selection import AnchorSelection, select_anchors
from craft_ds.data.lerobot_dataset import rename_map
from craft_ds.data.tabular import feature_names, read_tabular
from craft_ds.errors import UserError


def choose_frames(
    options: BuildOptions, dataset: LeRobotDataset, preprocessor: PolicyProcessorPipeline
) -> tuple[AnchorSelection, dict[str, Any]]:
    """Select the frames of a build.

    Args:
        options: Options of the build.
        dataset: The data set.
        preprocessor: The teacher's preprocessor, which may rename the state.

    Returns:
        The selection, and entries of the metadata's `dataset`: `tasks` and `task_frames`; with instructions
        also `observed_tasks`, the data set's own; with motion phases also `phases`.

    Raises:
        UserError: More anchors are asked for than there are frames, fewer than tasks, or a gripper that the
            actions do not have.
    """
    columns = dataset.hf_dataset.data
    task, episode = columns.column("task_index").to_numpy(), columns.column("episode_index").to_numpy()
    own = list(dataset.meta.tasks.sort_values("task_index").index)
    if options.instructions:
        tasks, frames = list(options.instructions), [len(task)] * len(options.instructions)
        entries: dict[str, Any] = {"tasks": tasks, "task_frames": frames, "observed_tasks": own}
    else:
        entries = {"tasks": own, "task_frames": np.bincount(task, minlength=len(own)).tolist()}
    _check_number(options, entries["task_frames"])
    phase = None
    if options.selection == "phases":
        key = _data_key(preprocessor, dataset, OBS_STATE)
        tabular = read_tabular(dataset, [key, ACTION])
        for name in (key, ACTION):
            if tabular.non_finite(name)[0]:
                raise UserError(
                    f"--selection=phases: {name} of data set {options.dataset_repo_id} has NaN or Inf: "
                    "remove their episodes (`craft-ds data-report` names them), or use "
                    "--selection=uniform"
                )
        names = _action_names(dataset)
        gripper = find_grippers(options.gripper, names)
        phase = motion_phases(tabular.fields[key], tabular.fields[ACTION], episode, task, gripper)
    selection = select_anchors(
        task,
        episode,
        options.num_samples,
        options.heldout_fraction,
        options.seed,
        phase=phase,
        instructions=len(options.instructions),
    )
    if phase is not None:
        of_task = [selection.frames[selection.task == one] for one in range(len(entries["tasks"]))]
        anchors = [np.bincount(phase[frames]).tolist() for frames in of_task]
        entries["phases"] = {"gripper": [names[one] for one in gripper], "anchors": anchors}
    return selection, entries


def find_grippers(asked: tuple[str, ...], names: tuple[str, ...]) -> list[int]:
    """Return the dimensions of the action that move grippers.

    Args:
        asked: Their names or indices; `none`: there is none; empty: those whose name contains "grip", else
            the last.
        names: Names of the dimensions.

    Raises:
        UserError: The actions have no such dimension.
    """
    if asked == ("none",):
        return []
    if not asked:
        return [index for index, name in enumerate(names) if "grip" in name.lower()] or [len(names) - 1]
    indices = {str(index): index for index in range(len(names))} | {
        name: index for index, name in enumerate(names)
    }
    for name in asked:
        if name not in indices:
            raise UserError(
                f"--gripper {name}: the actions have the dimensions {', '.join(names)}: name one of them, "
                "give its index, or none"
            )
    return sorted({indices[name] for name in asked})


def _check_number(options: BuildOptions, task_frames: list[int]) -> None:
    """Check that every task can have an anchor, and that there are frames enough."""
    available = sum(task_frames)
    if options.num_samples > available:
        under = f", under {len(options.instructions)} instructions" if options.instructions else ""
        raise UserError(
            f"--num_samples={options.num_samples} is more than the {available} frames of "
            f"{options.dataset_repo_id}{under}"
        )
    tasks = sum(count > 0 for count in task_frames)
    if options.num_samples < tasks:
        of = "--instructions" if options.instructions else options.dataset_repo_id
        raise UserError(
            f"--num_samples={options.num_samples} is less than the {tasks} tasks of {of}"
            ": give each task anchors, at least two to have one held out"
        )


def _data_key(preprocessor: PolicyProcessorPipeline, dataset: LeRobotDataset, key: str) -> str:
    """Return the data set's name of a policy's feature."""
    renamed = rename_map(preprocessor)
    return next((name for name in dataset.meta.features if renamed.get(name, name) == key), key)


def _action_names(dataset: LeRobotDataset) -> tuple[str, ...]:
    """Return the names of the actions' dimensions; their indices where they have none."""
    feature = dataset.meta.features[ACTION]
    return feature_names(feature) or tuple(map(str, range(feature["shape"][0])))
