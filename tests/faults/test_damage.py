"""Damaged files of checkpoints and anchor caches: one error that names a file, never a silent load."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from file_damage import Damage, damaged, damages, files_of, refused, seal, verify_checkpoint

from craft_ds.anchors.cache import AnchorCache
from craft_ds.config.parser import parse_arguments
from craft_ds.training.trainer import train_craft

KINDS = ("full training", "LoRA", "anchors")


class Pair(NamedTuple):
    """A directory to damage, and the same of another run."""

    mine: Path
    other: Path

    def read(self) -> None:
        """Validate the directory as a command does before use."""
        if self.mine.name == "anchors":
            AnchorCache.open(self.mine)
        else:
            verify_checkpoint(self.mine, 0, 1)


def checkpoint_of(inputs, output: Path, *flags: str) -> Path:
    """Return the checkpoint after the first of two steps."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.argv", ["train_craft.py"])
        train_craft(parse_arguments([*inputs.flags(output), "--steps=2", "--save_freq=1", *flags]))
    return output / "step_000001"


@pytest.fixture(scope="module")
def pairs(inputs, tmp_path_factory) -> dict[str, Pair]:
    root = tmp_path_factory.mktemp("damage")
    for name, seed in (("anchors", 0), ("anchors2", 7)):
        inputs.build_anchors(root / name, shard_size=10, seed=seed)
    full, lora = inputs.craft_flags(), ["--lora=attention_mlp"]
    return {
        "full training": Pair(
            checkpoint_of(inputs, root / "full", *full),
            checkpoint_of(inputs, root / "full2", *full, "--seed=7"),
        ),
        "LoRA": Pair(
            checkpoint_of(inputs, root / "lora", *lora),
            checkpoint_of(inputs, root / "lora2", *lora, "--seed=7"),
        ),
        "anchors": Pair(root / "anchors", root / "anchors2"),
    }


@pytest.fixture(scope="module")
def generated(pairs, faults_seed) -> dict[str, list[Damage]]:
    """Every damage to every file."""
    return {kind: list(damages(*pair, faults_seed)) for kind, pair in pairs.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_damage_is_one_error_naming_a_file(pairs, generated, kind, fault_table):
    pair = pairs[kind]
    pair.read()
    series = fault_table.series("damage", kind)
    for damage in generated[kind]:
        with series.case(f"{damage.file}: {damage.how}"), damaged(pair.mine, damage):
            message = refused(pair.read)
            assert str(pair.mine) in message
            # A manifest or metadata of another run is found by the first file that does not match it.
            if damage.how != "another run's":
                assert damage.file in message or damage.file in ("manifest.json", "metadata.json")
    series.check()
    pair.read()


def test_every_file_is_damaged_in_every_way(pairs, generated):
    assert sum(map(len, generated.values())) >= 200
    for kind, pair in pairs.items():
        by_file = {
            name: {d.how.split()[0] for d in generated[kind] if d.file == name}
            for name in files_of(pair.mine)
        }
        assert all({"cut", "bit", "removed"} <= how for how in by_file.values()), by_file
        swapped = {name for name, how in by_file.items() if "another" in how}
        own = {
            "full training": {"model.safetensors", "craft_state.pt"},
            "LoRA": {"adapter_model.safetensors"},
            "anchors": {"metadata.json", "shard_00000.safetensors"},
        }
        assert own[kind] <= swapped, swapped
        if kind != "anchors":
            assert {"manifest.json", "optimizer.safetensors", "train_config.json"} <= swapped, swapped


@pytest.fixture
def resume(pairs, refuses, tmp_path):
    """Resume a copy of a run whose only checkpoint is damaged; return the error."""

    def resume(kind: str, damage: Damage) -> str:
        run = tmp_path / "run"
        shutil.copytree(pairs[kind].mine, run / "step_000001")
        with damaged(run / "step_000001", damage):
            config = run / "step_000001" / "train_config.json"
            flags = [f"--config_path={config}", "--resume=true", f"--output_dir={run}"]
            line = refuses(None, *flags, untouched=run)
        assert str(run / "step_000001") in line
        return line

    return resume


@pytest.mark.parametrize(
    ("kind", "file", "how"),
    [
        ("full training", "model.safetensors", "bit"),
        ("full training", "model.safetensors", "another"),
        ("full training", "train_config.json", "another"),
        ("full training", "craft_state.pt", "cut by"),
        ("full training", "manifest.json", "another"),
        ("full training", "policy_preprocessor.json", "removed"),
        ("LoRA", "adapter_model.safetensors", "another"),
        ("LoRA", "adapter_config.json", "removed"),
    ],
)
def test_resuming_from_a_damaged_checkpoint(resume, generated, kind, file, how):
    damage = next(d for d in generated[kind] if d.file == file and d.how.startswith(how))
    line = resume(kind, damage)
    assert file in line or how != "bit"


@pytest.mark.parametrize("how", ["cut by", "bit", "another", "removed"])
@pytest.mark.parametrize("file", ["metadata.json", "shard_00000.safetensors"])
def test_training_with_a_damaged_cache(refuses, inputs, pairs, generated, tmp_path, file, how):
    anchors = pairs["anchors"].mine
    damage = next(d for d in generated["anchors"] if d.file == file and d.how.startswith(how))
    flags = [*inputs.craft_flags(), f"--craft.anchor_cache_dir={anchors}"]
    with damaged(anchors, damage):
        assert str(anchors) in refuses(tmp_path / "run", *flags)


def test_a_sealed_forged_checkpoint_loads(pairs, tmp_path):
    """Without this, the tests of forged files could only show that checksums are compared."""
    copy = shutil.copytree(pairs["full training"].mine, tmp_path / "step_000001")
    shutil.copy(pairs["full training"].other / "model.safetensors", copy)
    assert "model.safetensors" in refused(lambda: verify_checkpoint(copy, 0, 1))
    seal(copy)
    verify_checkpoint(copy, 0, 1)
