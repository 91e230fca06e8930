"""Building an anchor cache: old data through the teacher's own processors, onto disk.

The build works in a hidden sibling of the output directory and renames it when whole:

    .NAME.partial/plan.json            what is being built; a rerun must want the same
    .NAME.partial/shard_00000.json     checksum and teacher losses of a finished shard
    .NAME.partial/cache/               what becomes NAME
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.common.vla_utils import resize_with_pad_torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.collate import lerobot_collate_fn
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from craft_ds.anchors.build_plan import BuildOptions, check_same, make_plan
from craft_ds.anchors.cache import (
    METADATA_FILE,
    SPLITS,
    file_sha256,
    metadata_sha256,
    partial_directory,
    read_metadata,
    shard_name,
)
from craft_ds.anchors.sampler import to_policy_batch
from craft_ds.anchors.schema import ORIGIN_FIELDS, TOKEN_FIELDS
from craft_ds.anchors.selection import AnchorSelection, select_anchors
from craft_ds.anchors.vision import half_features, read_tower
from craft_ds.data.lerobot_dataset import camera_keys, open_dataset
from craft_ds.errors import UserError
from craft_ds.lora.adapters import weights_directory
from craft_ds.lora.weights import load_trained_policy
from craft_ds.policies.loading import load_policy_config, load_processors, resolve_policy_path
from craft_ds.policies.pi0_fast.vision import features_key
from craft_ds.policies.token_loss import token_loss
from craft_ds.tensor_io.filesystem import fsync


class Encoder:
    """Data set samples to stored anchors: the teacher's processors, with images kept as 8-bit pictures."""

    def __init__(
        self, config: PreTrainedConfig, preprocessor: PolicyProcessorPipeline, image_size: str
    ) -> None:
        self.preprocessor = preprocessor
        self.cameras = camera_keys(config, preprocessor)
        self.resolution = None
        if image_size == "model":
            self.resolution = getattr(config, "image_resolution", None)
            if self.resolution is None:
                raise UserError(f"--image_size=model: a policy of type {config.type} has no image resolution")

    def __call__(self, raw: dict[str, Any]) -> dict[str, Tensor]:
        """Encode a collated batch of the data set.

        Raises:
            UserError: The processors change the images, so a stored picture cannot stand for them.
        """
        stored = {name: torch.round(raw[key] * 255).to(torch.uint8) for name, key in self.cameras.items()}
        origin = {name: raw[f"{name}_index"].to(torch.int32) for name in ORIGIN_FIELDS}
        batch = self.preprocessor(raw)
        for name, image in stored.items():
            if not torch.equal(batch[name], image.to(torch.float32) / 255.0):
                raise UserError(
                    f"the teacher's processors change the images of {name}: this cache cannot hold them"
                )
            if self.resolution is not None and image.shape[2:] != tuple(self.resolution):
                stored[name] = _resize(batch[name], self.resolution)
        for name in TOKEN_FIELDS:
            stored[name] = batch[name] if batch[name].dtype == torch.bool else batch[name].to(torch.int32)
        return stored | origin


def build_anchor_cache(options: BuildOptions) -> bool:
    """Build an anchor cache, or finish an interrupted build of it.

    Peak memory depends on ``shard_size`` and ``batch_size``, not on ``num_samples``. The same options give
    the same bytes.

    Returns:
        True if something was built, False if this very cache was there already.

    Raises:
        UserError: Bad options; a data set or policy that is missing, unfinished or does not fit; an output
            directory that holds something else.
    """
    output = Path(options.output_dir)
    if output.exists() and not (output / METADATA_FILE).is_file():
        raise UserError(f"--output_dir={output} exists and is no anchor cache: name another directory")
    teacher = resolve_policy_path(options.policy_path)
    config = load_policy_config(teacher)
    preprocessor, _ = load_processors(config, teacher, device="cpu")
    encoder = Encoder(config, preprocessor, options.image_size)
    dataset = open_dataset(options.dataset_repo_id, options.dataset_root, config, preprocessor)
    draw, task = _draw(options, dataset)
    example = _example(options, dataset, int(draw.rows[0]), encoder)
    tower = read_tower(config, weights_directory(teacher)) if options.vision_features else None
    if tower is not None:
        empty = torch.empty(0, *tower.shape, dtype=torch.float16)
        example |= {features_key(camera): empty for camera in encoder.cameras}
    plan = make_plan(options, teacher, config, dataset, draw, example, tower and tower.fingerprint)
    partial = partial_directory(output)
    if output.exists():
        check_same(plan, read_metadata(output), f"--output_dir={output} holds another anchor cache")
        shutil.rmtree(partial, ignore_errors=True)
        return False
    _begin(partial, plan)
    policy = load_trained_policy(config, teacher, device=options.device)
    _write_shards(options, partial, dataset, draw, task, encoder, policy)
    _finish(output, partial, plan)
    return True


def _draw(options: BuildOptions, dataset: LeRobotDataset) -> tuple[AnchorSelection, np.ndarray]:
    """The draw, and the task of every drawn frame."""
    columns = dataset.hf_dataset.data
    task, episode = columns.column("task_index").to_numpy(), columns.column("episode_index").to_numpy()
    if options.num_samples > len(task):
        raise UserError(
            f"--num_samples={options.num_samples} is more than the {len(task)} frames of "
            f"{options.dataset_repo_id}"
        )
    draw = select_anchors(task, episode, options.num_samples, options.heldout_fraction, options.seed)
    return draw, task[draw.rows]


def _example(options: BuildOptions, dataset: LeRobotDataset, row: int, encoder: Encoder) -> dict[str, Tensor]:
    """One encoded sample: shows whether data and processors fit before the policy is loaded."""
    try:
        return encoder(lerobot_collate_fn([dataset[row]]))
    except UserError:
        raise
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the processors of {options.policy_path} cannot take {options.dataset_repo_id}: {reason}"
        ) from error


def _begin(partial: Path, plan: dict[str, Any]) -> None:
    """Make the work directory, or check that the one there is of the same build."""
    (partial / "cache").mkdir(parents=True, exist_ok=True)
    if (partial / "plan.json").is_file():
        started = json.loads((partial / "plan.json").read_text(encoding="utf-8"))
        check_same(plan, started, f"{partial} holds an interrupted build; delete it or repeat its flags")
    else:
        _write_json(partial / "plan.json", plan)


def _write_shards(
    options: BuildOptions,
    partial: Path,
    dataset: LeRobotDataset,
    draw: AnchorSelection,
    task: np.ndarray,
    encoder: Encoder,
    policy: PreTrainedPolicy,
) -> None:
    """Write every shard that is not there yet, and the record of each behind it."""
    starts = range(0, len(draw.rows), options.shard_size)
    missing = [number for number in range(len(starts)) if not _record_file(partial, number).is_file()]
    groups = {number: list(_uniform_batches(draw, task, starts[number], options)) for number in missing}
    loader = iter(
        torch.utils.data.DataLoader(
            dataset,
            batch_sampler=[draw.rows[batch].tolist() for batches in groups.values() for batch in batches],
            num_workers=options.num_workers,
            collate_fn=lerobot_collate_fn,
        )
    )
    done = len(draw.rows) - sum(len(batch) for batches in groups.values() for batch in batches)
    with tqdm(total=len(draw.rows), initial=done, unit="sample", desc="anchors") as bar:
        for number, batches in groups.items():
            parts, losses = [], []
            for batch in batches:
                parts.append(encoder(next(loader)))
                seen = to_policy_batch(parts[-1], options.device)
                if options.vision_features:
                    parts[-1] |= half_features(policy, seen)
                with torch.inference_mode():
                    loss = token_loss(policy, seen)
                first = batch[0]
                losses.append(
                    {
                        "split": SPLITS[int(draw.heldout[first])],
                        "task": int(task[first]),
                        "total": float(loss.total),
                        "tokens": int(loss.count),
                    }
                )
                bar.update(len(batch))
            shard = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            _write_shard(partial, number, shard, losses)


def _uniform_batches(
    draw: AnchorSelection, task: np.ndarray, start: int, options: BuildOptions
) -> Iterator[np.ndarray]:
    """Positions of one shard in batches that do not mix splits or tasks, so that each has its own loss."""
    positions = np.arange(start, min(start + options.shard_size, len(draw.rows)))
    kind = 2 * task[positions] + draw.heldout[positions]
    for run in np.split(positions, np.flatnonzero(np.diff(kind)) + 1):
        for first in range(0, len(run), options.batch_size):
            yield run[first : first + options.batch_size]


def _write_shard(partial: Path, number: int, shard: dict[str, Tensor], losses: list[dict[str, Any]]) -> None:
    file = partial / "cache" / shard_name(number)
    temporary = file.with_suffix(".tmp")
    save_file(shard, temporary)
    temporary.chmod(0o644)  # safetensors makes files that only their owner can read
    fsync(temporary)
    temporary.rename(file)
    record = {
        "samples": len(shard["task"]),
        "bytes": file.stat().st_size,
        "sha256": file_sha256(file),
        "losses": losses,
    }
    _write_json(_record_file(partial, number), record)


def _finish(output: Path, partial: Path, plan: dict[str, Any]) -> None:
    """Write the metadata and give the cache its name."""
    count = -(-plan["num_samples"] // plan["request"]["shard_size"])
    records = [json.loads(_record_file(partial, number).read_text()) for number in range(count)]
    losses = [loss for record in records for loss in record.pop("losses")]
    metadata = {**plan, "teacher_loss": _teacher_loss(losses, plan["dataset"]["tasks"]), "shards": records}
    _write_json(partial / "cache" / METADATA_FILE, {**metadata, "sha256": metadata_sha256(metadata)})
    (partial / "cache").rename(output)
    shutil.rmtree(partial)


def _teacher_loss(losses: list[dict[str, Any]], tasks: list[str]) -> dict[str, Any]:
    """L0 by split and task: mean loss a token, to six digits so that the batch size does not show."""

    def mean(part: list[dict[str, Any]]) -> float:
        return float(f"{sum(one['total'] for one in part) / sum(one['tokens'] for one in part):.6g}")

    summary = {}
    for split in (*SPLITS, "all"):
        part = [one for one in losses if split in (one["split"], "all")]
        by_task = {
            text: mean(of_task)
            for index, text in enumerate(tasks)
            if (of_task := [one for one in part if one["task"] == index])
        }
        summary[split] = {
            "overall": mean(part) if part else None,
            "by_task": by_task,
            "tokens": sum(one["tokens"] for one in part),
        }
    return summary


def _resize(image: Tensor, resolution: tuple[int, int]) -> Tensor:
    """The policy's own resize of float images (B, C, H, W), rounded to 8 bits."""
    resized = resize_with_pad_torch(image.permute(0, 2, 3, 1), *resolution).permute(0, 3, 1, 2)
    return torch.round(resized * 255).to(torch.uint8).contiguous()


def _record_file(partial: Path, number: int) -> Path:
    return partial / Path(shard_name(number)).with_suffix(".json")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a file that is whole or not there."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    fsync(temporary)
    temporary.rename(file)
