"""Methods that `bench_fault_tolerance.py` compares: each saves, resumes as documented, and loads by hand.

Every method saves the same state: parameters, two moments, the optimizer's step, the schedule's position and
the run's step. `Subject.set_state` makes it from the step alone, so that a loaded state can be compared with
every state that was saved.
"""

import gc
import zlib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, override

import torch
import torch.distributed.checkpoint as dcp
from harness import TEACHER, init_ranks, make_engine
from lerobot.common.train_utils import (
    get_step_checkpoint_dir,
    load_training_state,
    save_checkpoint,
    update_last_checkpoint,
)
from lerobot.configs.default import DatasetConfig
from lerobot.policies.factory import get_policy_class
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from craft_ds.checkpoints import load_optimizer, prepare_checkpoint, read_states, step_directory
from craft_ds.checkpoints.run_directory import point_last_at
from craft_ds.config.configs import CheckpointConfig
from craft_ds.config.train_config import TrainConfig
from craft_ds.distributed.collectives import rank0_only
from craft_ds.policies.directory import WEIGHTS
from craft_ds.policies.loading import load_policy_config
from craft_ds.policies.meta_init import build_on_meta
from craft_ds.tensor_io.per_rank_file import open_tensors
from craft_ds.training.resume import resolve_resume

MOMENTS = ("exp_avg", "exp_avg_sq")
TOTAL_STEPS = 100
ZERO_MODULES = [
    "craft_ds.engines.deepspeed",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "setuptools.dist",
]


def preload(kind: str) -> None:
    """Import what ranks need, so that forked ones have it."""
    for name in ZERO_MODULES if kind.startswith("zero") else [f"craft_ds.engines.{kind}"]:
        import_module(name)
    build_on_meta(load_policy_config(TEACHER))
    gc.freeze()  # otherwise a rank's first collection copies the pages that it shares


class NothingToLoad(Exception):
    """The method's way to resume finds no checkpoint."""


class Position(NamedTuple):
    """What a method saves beside tensors: the run's step and the schedule's position."""

    step: int
    schedule: int


def values_of(step: int) -> Callable[[str, int, int], Tensor]:
    """Return a `ReadRange` whose values depend on name, position and step."""

    def read(name: str, start: int, stop: int) -> Tensor:
        offset = zlib.crc32(f"{name} {step}".encode())
        return ((torch.arange(start, stop) * 40503 + offset) % 65521).float() / 65521

    return read


class Subject:
    """The policy in training whose state is saved and loaded. Collective: create it on all ranks."""

    def __init__(self, kind: str):
        init_ranks(kind)
        self.policy = build_on_meta(load_policy_config(TEACHER))
        self.policy.config.device = "cpu"  # LeRobot saves the configuration, and reads it again
        self.engine = make_engine(kind, self.policy, values_of(0))
        self.optimizer: Any = self.engine.optimizer  # type: ignore[attr-defined]
        self.position = Position(0, 0)
        self.set_state(0)

    def set_state(self, step: int) -> None:
        """Set everything that is saved to the state of a step. Collective."""
        read = values_of(step)
        self.engine.load_parameters(read)
        self.engine.load_optimizer(read, MOMENTS, step)
        self.position = Position(step, step)

    def fingerprint(self) -> list[Any]:
        """Return a checksum of every tensor of this rank, the optimizer's steps and the position."""
        tensors = {}
        for shard in self.engine.shards():
            for key, values in (("", shard.master), *shard.state.items()):
                content = values.detach().contiguous().view(torch.uint8).numpy()
                tensors[f"{shard.name}.{key}"] = zlib.crc32(content)
        states = self.optimizer.state.values()
        steps = sorted({float(state["step"]) for state in states if "step" in state})
        return [sorted(tensors.items()), steps, list(self.position)]


class Method:
    """A method of saving.

    Attributes:
        label: Name in the table.
        kind: Engine whose state it saves.
        world_size: Number of ranks.
        keeps_older: Whether an older checkpoint remains beside a newer one.
    """

    label: str
    kind = "fsdp"
    world_size = 2
    keeps_older = True

    def __init__(self, subject: Subject):
        self.subject = subject

    def save(self, run: Path, step: int) -> None:
        """Save the state of a step. Collective."""
        raise NotImplementedError

    def newest(self, run: Path) -> Path:
        """Return the checkpoint that the documented way to resume loads. Collective.

        Raises:
            NothingToLoad: There is none.
        """
        raise NotImplementedError

    def checkpoint(self, run: Path, step: int) -> Path:
        """Return where the checkpoint of a step is, to load it by hand and to damage it."""
        raise NotImplementedError

    def load(self, checkpoint: Path) -> None:
        """Load a checkpoint into the subject. Collective."""
        raise NotImplementedError

    def files(self, checkpoint: Path) -> list[Path]:
        """Return the files of a checkpoint."""
        return sorted(path for path in checkpoint.rglob("*") if path.is_file())


class Craft(Method):
    """craft-ds: `save_checkpoint`, and `--resume=auto`."""

    label = "craft-ds, one file"
    layout = "consolidated"

    @override
    def save(self, run: Path, step: int) -> None:
        policy = self.subject.policy
        prepare_checkpoint(
            step_directory(run, step),
            engine=self.subject.engine,
            config=TrainConfig(
                dataset=DatasetConfig(repo_id="none"),
                policy=policy.config,
                output_dir=run,
                checkpoint=CheckpointConfig(layout=self.layout),
            ),
            policy_dir=TEACHER,
            scheduler_state={"last_epoch": self.subject.position.schedule},
            craft_state={"step": step},
            step=step,
        ).write()
        rank0_only(point_last_at)(step_directory(run, step))

    @override
    def newest(self, run: Path) -> Path:
        found = resolve_resume(["--resume=auto", f"--output_dir={run}"]).checkpoint
        if found is None:
            raise NothingToLoad("--resume=auto starts a new run")
        return found

    @override
    def checkpoint(self, run: Path, step: int) -> Path:
        return step_directory(run, step)

    @override
    def load(self, checkpoint: Path) -> None:
        with open_tensors(checkpoint / WEIGHTS) as weights:
            self.subject.engine.load_parameters(weights.read)
        load_optimizer(checkpoint, self.subject.engine)
        scheduler, craft = read_states(checkpoint)
        assert scheduler is not None
        self.subject.position = Position(craft["step"], scheduler["last_epoch"])


class CraftPerRank(Craft):
    """craft-ds with `--checkpoint.layout=per_rank`."""

    label = "craft-ds, per rank"
    layout = "per_rank"


class Dcp(Method):
    """DCP with one directory per step, of which the newest with `.metadata` is loaded, as in torchtitan."""

    label = "DCP save, directory per step"

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.subject.engine.module, self.subject.optimizer)
        position = dict(self.subject.position._asdict())
        return {"model": model, "optimizer": optimizer, "position": position}

    def _set(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.subject.engine.module,
            self.subject.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.subject.position = Position(**state["position"])

    @override
    def save(self, run: Path, step: int) -> None:
        dcp.save(self._state(), checkpoint_id=self.checkpoint(run, step))

    @override
    def newest(self, run: Path) -> Path:
        found = sorted(path for path in run.glob("step-*") if (path / ".metadata").is_file())
        if not found:
            raise NothingToLoad("no directory with .metadata")
        return found[-1]

    @override
    def checkpoint(self, run: Path, step: int) -> Path:
        return run / f"step-{step:06d}"

    @override
    def load(self, checkpoint: Path) -> None:
        state = self._state()
        dcp.load(state, checkpoint_id=checkpoint)
        self._set(state)


class DcpOneDirectory(Dcp):
    """`torch.distributed.checkpoint` as in PyTorch's tutorial: one directory that every save overwrites."""

    label = "DCP save, same directory"
    keeps_older = False

    @override
    def newest(self, run: Path) -> Path:
        return run / "checkpoint"

    @override
    def checkpoint(self, run: Path, step: int) -> Path:
        return run / "checkpoint"


class DcpHuggingFace(Dcp):
    """`HuggingFaceStorageWriter` with consolidation, which takes tensors only; one directory per step."""

    label = "DCP, Hugging Face writer"

    def _tensors(self) -> dict[str, Any]:
        state = self._state()
        moments = {
            f"optimizer.{name}.{key}": value if value.dim() else value.reshape(1)
            for name, values in state["optimizer"]["state"].items()
            for key, value in values.items()
        }
        # The consolidation of torch 2.11 fails on integers.
        position = {
            f"position.{key}": torch.tensor([float(value)]) for key, value in state["position"].items()
        }
        return {f"model.{key}": value for key, value in state["model"].items()} | moments | position

    @override
    def save(self, run: Path, step: int) -> None:
        writer = HuggingFaceStorageWriter(
            str(self.checkpoint(run, step)), save_distributed=True, enable_consolidation=True
        )
        dcp.save(self._tensors(), storage_writer=writer)

    @override
    def newest(self, run: Path) -> Path:
        found = sorted(path for path in run.glob("step-*") if list(path.glob("*.safetensors")))
        if not found:
            raise NothingToLoad("no directory with consolidated files")
        return found[-1]

    @override
    def files(self, checkpoint: Path) -> list[Path]:
        # What is loaded: the shards in `sharded` are what it was consolidated from.
        return sorted(path for path in checkpoint.iterdir() if path.is_file())

    @override
    def load(self, checkpoint: Path) -> None:
        tensors = self._tensors()
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint)))
        state = self._state()
        state["model"] = {key: tensors[f"model.{key}"] for key in state["model"]}
        for name, values in state["optimizer"]["state"].items():
            for key, value in values.items():
                values[key] = tensors[f"optimizer.{name}.{key}"].reshape(value.shape)
        state["position"] = {key: int(tensors[f"position.{key}"]) for key in state["position"]}
        self._set(state)


class DeepSpeed(Method):
    """DeepSpeed's `save_checkpoint` and `load_checkpoint` by the file `latest`, ZeRO-3."""

    label = "DeepSpeed save_checkpoint"
    kind = "zero3"

    def __init__(self, subject: Subject):
        super().__init__(subject)
        self._engine = subject.engine._engine  # type: ignore[attr-defined]

    @override
    def save(self, run: Path, step: int) -> None:
        self._engine.global_steps = step
        state = self.subject.position._asdict()
        self._engine.save_checkpoint(str(run), tag=f"step{step}", client_state={"position": dict(state)})

    @override
    def newest(self, run: Path) -> Path:
        return run

    @override
    def checkpoint(self, run: Path, step: int) -> Path:
        return run / f"step{step}"

    @override
    def files(self, checkpoint: Path) -> list[Path]:
        return [*super().files(checkpoint), checkpoint.parent / "latest"]

    @override
    def load(self, checkpoint: Path) -> None:
        by_hand = checkpoint.name.startswith("step")
        run, tag = (checkpoint.parent, checkpoint.name) if by_hand else (checkpoint, None)
        found, state = self._engine.load_checkpoint(str(run), tag=tag)
        if found is None:
            raise NothingToLoad("load_checkpoint returned None")
        position = Position(**state["position"])
        # DeepSpeed's own count of steps belongs to the position.
        self.subject.position = Position(
            position.step if self._engine.global_steps == position.step else -1, position.schedule
        )


class LeRobot(Method):
    """LeRobot by its own functions and the link `last`; one process saves, as in its DDP."""

    label = "LeRobot save_checkpoint"
    kind = "single"
    world_size = 1

    def __init__(self, subject: Subject):
        super().__init__(subject)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(subject.optimizer, lambda _: 1.0)

    @override
    def save(self, run: Path, step: int) -> None:
        self._scheduler.last_epoch = self.subject.position.schedule
        directory = self.checkpoint(run, step)
        save_checkpoint(
            directory,
            step,
            TrainConfig(dataset=DatasetConfig(repo_id="none"), policy=self.subject.policy.config),
            self.subject.policy,
            self.subject.optimizer,
            self._scheduler,
            num_processes=1,
            batch_size=1,
        )
        update_last_checkpoint(directory)

    @override
    def newest(self, run: Path) -> Path:
        last = run / "checkpoints" / "last"
        if not last.exists():
            raise NothingToLoad("no link `last`")
        return last

    @override
    def checkpoint(self, run: Path, step: int) -> Path:
        return get_step_checkpoint_dir(run, TOTAL_STEPS, step)

    @override
    def load(self, checkpoint: Path) -> None:
        directory = checkpoint / "pretrained_model"
        policy = get_policy_class(self.subject.policy.config.type).from_pretrained(directory)
        loaded = policy.state_dict()
        self.subject.engine.load_parameters(
            lambda name, start, stop: loaded[name].detach().reshape(-1)[start:stop].float()
        )
        step, *_ = load_training_state(checkpoint, self.subject.optimizer, self._scheduler)
        self.subject.position = Position(step, self._scheduler.last_epoch)


METHODS: dict[str, type[Method]] = {
    "craft": Craft,
    "craft_per_rank": CraftPerRank,
    "dcp": Dcp,
    "dcp_one_directory": DcpOneDirectory,
    "dcp_hf": DcpHuggingFace,
    "deepspeed": DeepSpeed,
    "lerobot": LeRobot,
}
