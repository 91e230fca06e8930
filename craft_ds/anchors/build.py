"""Build an anchor cache: encode old data with the teacher's own processors and write it to disk.

The build works in a hidden sibling of the output directory, which is renamed when it is complete:

    .NAME.partial/plan.json            the plan of the build; a rerun must have the same
    .NAME.partial/shard_00000.json     checksum and teacher losses of a finished shard
    .NAME.partial/cache/               the cache, renamed to NAME at the end
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.policies.common.vla_utils import resize_with_pad_torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.collate import lerobot_collate_fn
from lerobot.utils.constants import ACTION_TOKEN_MASK, ACTION_TOKENS
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from craft_ds.anchors.build_plan import BuildOptions, Teacher, check_plan_matches, make_plan
from craft_ds.anchors.cache import (
    METADATA_FILE,
    SPLITS,
    metadata_sha256,
    partial_directory,
    read_metadata,
    shard_name,
)
from craft_ds.anchors.choose_frames import choose_frames
from craft_ds.anchors.sampler import to_policy_batch
from craft_ds.anchors.schema import DTYPES, ORIGIN_FIELDS, TOKEN_FIELDS, target_fields
from craft_ds.anchors.selection import AnchorSelection
from craft_ds.anchors.vision import fp16_vision_features, read_vision_tower
from craft_ds.data.checked_samples import NamedSamples, sample_loader
from craft_ds.data.lerobot_dataset import camera_keys, open_dataset
from craft_ds.errors import UserError
from craft_ds.lora.adapters import weights_directory
from craft_ds.lora.weights import load_trained_policy
from craft_ds.policies.changes import policy_changes
from craft_ds.policies.loading import (
    build_policy,
    check_action_steps,
    load_policy_config,
    load_processors,
    resolve_policy_path,
)
from craft_ds.policies.pi0_fast.retention import RETENTION_LOSSES, teacher_tokens
from craft_ds.policies.pi0_fast.vision import features_key
from craft_ds.policies.statistics import check_statistics
from craft_ds.policies.support import check_craft_policy
from craft_ds.tensor_io.filesystem import atomic_file, file_sha256, publish_directory
from craft_ds.tensor_io.output_lock import locked_output


class AnchorEncoder:
    """Turn data set samples into stored anchors by the teacher's processors; images stay 8-bit."""

    def __init__(
        self,
        config: PreTrainedConfig,
        preprocessor: PolicyProcessorPipeline,
        meta: LeRobotDatasetMetadata,
        image_size: str,
    ) -> None:
        self.preprocessor = preprocessor
        # The policy masks a camera that is not in the batch.
        self.cameras = camera_keys(config, preprocessor, meta.camera_keys)
        self.resolution = None
        if image_size == "model":
            self.resolution = getattr(config, "image_resolution", None)
            if self.resolution is None:
                raise UserError(f"--image_size=model: a policy of type {config.type} has no image resolution")

    def __call__(self, raw: dict[str, Any]) -> dict[str, Tensor]:
        """Encode a collated batch of the data set.

        Raises:
            UserError: The processors change the images, so stored images cannot replace them.
        """
        stored = {name: torch.round(raw[key] * 255).to(torch.uint8) for name, key in self.cameras.items()}
        origin = {name: raw[f"{name}_index"].to(torch.int32) for name in ORIGIN_FIELDS}
        batch = self.preprocessor(raw)
        for name, image in stored.items():
            if not torch.equal(batch[name], image.to(torch.float32) / 255.0):
                raise UserError(
                    f"the teacher's processors change the images of {name}, so an anchor cache "
                    "cannot hold them: use a teacher whose processors keep images"
                )
            if self.resolution is not None and image.shape[2:] != tuple(self.resolution):
                stored[name] = _resize(batch[name], self.resolution)
        for name in TOKEN_FIELDS:
            stored[name] = batch[name] if batch[name].dtype == torch.bool else batch[name].to(torch.int32)
        return stored | origin


def build_anchor_cache(options: BuildOptions) -> bool:
    """Build an anchor cache, or finish an interrupted build.

    Peak memory depends on `shard_size` and `batch_size`, not on `num_samples`. The same options give
    the same bytes.

    Returns:
        True if anything was built, False if the cache was complete already.

    Raises:
        UserError: An option, the data set or the policy is unusable, or the output directory holds
            something else or is being built by another process.
    """
    output = Path(options.output_dir)
    if output.exists() and not (output / METADATA_FILE).is_file():
        raise UserError(f"--output_dir={output} exists and is not an anchor cache: choose another directory")
    with locked_output(output):
        return _build(options, output)


def _build(options: BuildOptions, output: Path) -> bool:
    directory = resolve_policy_path(options.policy_path)
    config = load_policy_config(directory)
    check_craft_policy(config, f"the teacher {options.policy_path}")
    check_action_steps(config)
    for old, new in (options.rename_map or {}).items():
        if new not in config.input_features:
            raise UserError(f"--rename_map: the policy reads no {new}, to which {old} would be renamed")
    renamed = policy_changes(config, config, rename_map=options.rename_map)
    preprocessor, postprocessor = load_processors(config, directory, changes=renamed)
    check_statistics(options.policy_path, config, preprocessor, postprocessor)
    dataset = open_dataset(
        options.dataset_repo_id, options.dataset_root, config, preprocessor, options.allow_missing_cameras
    )
    for old in options.rename_map or {}:
        if old not in dataset.meta.features:
            raise UserError(f"--rename_map: data set {options.dataset_repo_id} has no {old} to be renamed")
    samples = NamedSamples(dataset)
    encoder = AnchorEncoder(config, preprocessor, dataset.meta, options.image_size)
    selection, entries = choose_frames(options, dataset, preprocessor)
    example = _example(options, samples, int(selection.frames[0]), encoder)
    fingerprint = None
    if options.vision_features:
        tower = read_vision_tower(config, weights_directory(directory))
        fingerprint = tower.fingerprint
        empty = torch.empty(0, *tower.shape, dtype=torch.float16)
        example |= {features_key(camera): empty for camera in encoder.cameras}
    example |= _empty_targets(options.targets, example, config, directory)
    teacher = Teacher(directory, config, fingerprint, preprocessor)
    plan = make_plan(options, teacher, dataset, selection, entries, example)
    partial = partial_directory(output)
    if output.exists():
        check_plan_matches(plan, read_metadata(output), f"--output_dir={output} holds another anchor cache")
        shutil.rmtree(partial, ignore_errors=True)
        return False
    _start_or_resume(partial, plan)
    policy = load_trained_policy(config, directory, device=options.device)
    _write_shards(options, partial, samples, selection, encoder, policy)
    _publish(output, partial, plan)
    return True


def _empty_targets(
    targets: Sequence[str], example: dict[str, Tensor], config: PreTrainedConfig, directory: Path
) -> dict[str, Tensor]:
    """Return the fields of targets, without anchors."""
    if not targets:
        return {}
    decoder = build_policy(config, directory).model.paligemma_with_expert.paligemma.model.language_model
    length, width = example[ACTION_TOKENS].shape[1], decoder.config.hidden_size
    return {
        name: torch.empty(0, *shape, dtype=DTYPES[dtype])
        for target in targets
        for name, (dtype, shape) in target_fields(target, length, width).items()
    }


def _example(
    options: BuildOptions, dataset: NamedSamples, frame: int, encoder: AnchorEncoder
) -> dict[str, Tensor]:
    """Encode one sample, to see that data and processors fit before the policy is loaded."""
    try:
        return encoder(lerobot_collate_fn([dataset[frame]]))
    except UserError:
        raise
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the processors of {options.policy_path} cannot take {options.dataset_repo_id}: {reason}"
        ) from error


def _start_or_resume(partial: Path, plan: dict[str, Any]) -> None:
    """Make the work directory, or check that the existing one belongs to the same build."""
    (partial / "cache").mkdir(parents=True, exist_ok=True)
    if (partial / "plan.json").is_file():
        started = json.loads((partial / "plan.json").read_text(encoding="utf-8"))
        check_plan_matches(
            plan, started, f"{partial} holds an interrupted build; delete it or repeat its flags"
        )
    else:
        _write_json(partial / "plan.json", plan)


def _write_shards(
    options: BuildOptions,
    partial: Path,
    samples: NamedSamples,
    selection: AnchorSelection,
    encoder: AnchorEncoder,
    policy: PreTrainedPolicy,
) -> None:
    """Write every missing shard, and its record after it."""
    starts = range(0, len(selection.frames), options.shard_size)
    missing = [number for number in range(len(starts)) if not _record_file(partial, number).is_file()]
    groups = {number: list(_uniform_batches(selection, starts[number], options)) for number in missing}
    batch_sampler = [selection.frames[batch].tolist() for batches in groups.values() for batch in batches]
    loader = sample_loader(
        samples, batch_sampler, num_workers=options.num_workers, collate_fn=lerobot_collate_fn
    )
    done = len(selection.frames) - sum(len(batch) for batches in groups.values() for batch in batches)
    with tqdm(total=len(selection.frames), initial=done, unit="sample", desc="anchors") as bar:
        for number, batches in groups.items():
            parts, losses = [], []
            for batch in batches:
                first = batch[0]
                task = int(selection.task[first])
                raw = next(loader)
                if options.instructions:
                    raw["task"] = [options.instructions[task]] * len(batch)
                    raw["task_index"] = torch.full((len(batch),), task)
                part, measured = _label(options, encoder(raw), policy)
                parts.append(part)
                origin = {"split": SPLITS[int(selection.heldout[first])], "task": task}
                losses += [{"loss": name, **origin, **loss} for name, loss in measured.items()]
                bar.update(len(batch))
            shard = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            _write_shard(partial, number, shard, losses)


def _label(
    options: BuildOptions, anchors: dict[str, Tensor], policy: PreTrainedPolicy
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Add what the teacher computes to encoded anchors.

    Returns:
        The anchors with the features and targets that the options ask for, and the teacher's own losses by
        name, each as its sum and its count.
    """
    own = {}
    if options.instructions:
        own = teacher_tokens(policy, to_policy_batch(anchors, options.device))
        anchors |= dict(zip((ACTION_TOKENS, ACTION_TOKEN_MASK), own.values(), strict=True))
    batch = to_policy_batch(anchors, options.device)
    if options.vision_features:
        anchors |= fp16_vision_features(policy, batch)
    losses = {}
    for name in ("token_ce", *options.targets):
        retention = RETENTION_LOSSES[name]
        with torch.inference_mode():
            if own and name == "teacher_tokens":
                targets = own
            else:
                targets = retention.targets(policy, batch) if retention.targets else {}
            loss = retention.loss(policy, batch | to_policy_batch(targets, options.device))
        anchors |= targets
        losses[name] = {"total": float(loss.total), "tokens": int(loss.count)}
    return anchors, losses


def _uniform_batches(selection: AnchorSelection, start: int, options: BuildOptions) -> Iterator[np.ndarray]:
    """Yield the positions of one shard in batches that do not mix splits or tasks: each has its own loss."""
    positions = np.arange(start, min(start + options.shard_size, len(selection.frames)))
    kind = 2 * selection.task[positions] + selection.heldout[positions]
    for run in np.split(positions, np.flatnonzero(np.diff(kind)) + 1):
        for first in range(0, len(run), options.batch_size):
            yield run[first : first + options.batch_size]


def _write_shard(partial: Path, number: int, shard: dict[str, Tensor], losses: list[dict[str, Any]]) -> None:
    file = partial / "cache" / shard_name(number)
    with atomic_file(file) as temporary:
        save_file(shard, temporary)
        temporary.chmod(0o644)  # safetensors makes files readable by their owner alone
    record = {
        "samples": len(shard["task"]),
        "bytes": file.stat().st_size,
        "sha256": file_sha256(file),
        "losses": losses,
    }
    _write_json(_record_file(partial, number), record)


def _publish(output: Path, partial: Path, plan: dict[str, Any]) -> None:
    """Write the metadata and rename the cache to its final name."""
    count = -(-plan["num_samples"] // plan["request"]["shard_size"])
    records = [json.loads(_record_file(partial, number).read_text()) for number in range(count)]
    losses = [loss for record in records for loss in record.pop("losses")]
    by_name: dict[str, list[dict[str, Any]]] = {}
    for loss in losses:
        by_name.setdefault(loss.get("loss", "token_ce"), []).append(loss)  # craft-ds 0.1 had no names
    means = {name: _teacher_loss(own, plan["dataset"]["tasks"]) for name, own in by_name.items()}
    metadata = {**plan, "teacher_loss": means.pop("token_ce"), "shards": records}
    metadata |= {"targets": means} if means else {}
    _write_json(partial / "cache" / METADATA_FILE, {**metadata, "sha256": metadata_sha256(metadata)})
    publish_directory(partial / "cache", output)
    shutil.rmtree(partial)


def _teacher_loss(losses: list[dict[str, Any]], tasks: list[str]) -> dict[str, Any]:
    """Return L0 by split and task: mean loss per token, rounded to six digits to hide the batch size."""

    def mean(part: list[dict[str, Any]]) -> float:
        return float(f"{sum(loss['total'] for loss in part) / sum(loss['tokens'] for loss in part):.6g}")

    summary = {}
    for split in (*SPLITS, "all"):
        part = [loss for loss in losses if split in (loss["split"], "all")]
        by_task = {
            text: mean(of_task)
            for index, text in enumerate(tasks)
            if (of_task := [loss for loss in part if loss["task"] == index])
        }
        summary[split] = {
            "overall": mean(part) if part else None,
            "by_task": by_task,
            "tokens": sum(loss["tokens"] for loss in part),
        }
    return summary


def _resize(image: Tensor, resolution: tuple[int, int]) -> Tensor:
    """Resize float images (B, C, H, W) as the policy does, rounded to 8 bits."""
    resized = resize_with_pad_torch(image.permute(0, 2, 3, 1), *resolution).permute(0, 3, 1, 2)
    return torch.round(resized * 255).to(torch.uint8).contiguous()


def _record_file(partial: Path, number: int) -> Path:
    return partial / Path(shard_name(number)).with_suffix(".json")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    with atomic_file(file) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
