"""The manifest is the complete list of a checkpoint: nothing else in the directory is ever used."""

import json
import os
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craft_ds.checkpoints import verify_checkpoint
from craft_ds.checkpoints.manifest import MANIFEST, read_manifest
from craft_ds.errors import UserError
from craft_ds.testing.checkpoints import renew_manifest


@pytest.fixture(scope="session")
def saved(inputs, tmp_path_factory):
    """A final checkpoint of each layout, by layout."""
    from craft_ds.config.parser import parse_arguments
    from craft_ds.training.trainer import train_craft

    root = tmp_path_factory.mktemp("manifests")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.argv", ["train_craft.py"])
        for layout in ("consolidated", "per_rank"):
            flags = [*inputs.flags(root / layout), "--steps=1", f"--checkpoint.layout={layout}"]
            train_craft(parse_arguments(flags))
    return {layout: root / layout / "final" for layout in ("consolidated", "per_rank")}


@pytest.fixture(params=["consolidated", "per_rank"])
def checkpoint(saved, request, tmp_path):
    return shutil.copytree(saved[request.param], tmp_path / "step_000001")


STRAY = [
    "model.safetensors",
    "model.rank_00000.safetensors",
    "model.rank_00007.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.safetensors",
    "optimizer.rank_00000.safetensors",
    "policy_preprocessor_step_9_normalizer_processor.safetensors",
    "tokenizer.json",
    "text_tokenizer/added_tokens.json",
    "action_tokenizer/processing.py",
    "new/folder/config.json",
    "pytorch_model.bin",
]


# Names that the layout itself has.
OWN = {
    "consolidated": {"model.safetensors", "optimizer.safetensors"},
    "per_rank": {"model.rank_00000.safetensors", "optimizer.rank_00000.safetensors"},
}


@pytest.mark.parametrize(
    ("layout", "name"), [(layout, name) for layout, own in OWN.items() for name in STRAY if name not in own]
)
def test_a_file_that_is_not_listed_is_refused(saved, tmp_path, layout, name):
    checkpoint = shutil.copytree(saved[layout], tmp_path / "step_000001")
    file = checkpoint / name
    assert not file.exists()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"{}")
    with pytest.raises(UserError, match=f"{name} is not a file of the checkpoint"):
        read_manifest(checkpoint)


@settings(max_examples=40, deadline=None)
@given(name=st.from_regex(r"[a-z_0-9]{1,12}\.(json|safetensors|pt|py|bin|txt|model)", fullmatch=True))
def test_any_name_that_something_could_read_is_refused(saved, tmp_path_factory, name):
    source = saved["consolidated"]
    if (source / name).exists():
        return
    root = tmp_path_factory.mktemp("any") / "step_000001"
    shutil.copytree(source, root, copy_function=os.link)
    (root / name).write_bytes(b"")
    with pytest.raises(UserError, match="is not a file of the checkpoint"):
        read_manifest(root)


@pytest.mark.parametrize("name", [".DS_Store", ".nfs0001", "README.md", ".cache/huggingface/x.json"])
def test_notes_and_hidden_files_do_not_matter(checkpoint, name):
    (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
    (checkpoint / name).write_text("note")
    verify_checkpoint(checkpoint, 0, 1)


def test_a_resigned_manifest_must_have_every_file_of_its_layout(checkpoint):
    files = [name for name in json.loads((checkpoint / MANIFEST).read_text())["files"] if "/" not in name]
    needed = [name for name in files if not name.startswith(("lambda_", "policy_pre", "policy_post"))]
    needed += ["policy_preprocessor.json", "policy_postprocessor.json"]
    for name in needed:
        kept = (checkpoint / name).read_bytes()
        (checkpoint / name).unlink()
        renew_manifest(checkpoint)
        with pytest.raises(UserError, match=f"does not list {name}"):
            read_manifest(checkpoint)
        (checkpoint / name).write_bytes(kept)
    renew_manifest(checkpoint)
    verify_checkpoint(checkpoint, 0, 1)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.rank_00001.safetensors", "optimizer.rank_00003.safetensors"]
)
def test_a_resigned_manifest_cannot_mix_layouts(saved, tmp_path, name):
    checkpoint = shutil.copytree(saved["per_rank"], tmp_path / "step_000001")
    (checkpoint / name).write_bytes(b"x")
    renew_manifest(checkpoint)
    with pytest.raises(UserError, match=r"does not list|does not belong to its layout"):
        read_manifest(checkpoint)


def test_a_forged_number_of_ranks_costs_nothing(checkpoint):
    renew_manifest(checkpoint, world_size=(1 << 62) - 1)
    if (checkpoint / "model.safetensors").exists():
        read_manifest(checkpoint)
    else:
        with pytest.raises(UserError, match="does not list"):
            read_manifest(checkpoint)


@pytest.mark.parametrize("target", ["inside", "outside"])
def test_links_are_refused(checkpoint, tmp_path, target):
    (tmp_path / "key").write_bytes((checkpoint / "config.json").read_bytes())
    file = checkpoint / "config.json"
    file.rename(checkpoint / ".kept")
    file.symlink_to(checkpoint / ".kept" if target == "inside" else tmp_path / "key")
    with pytest.raises(UserError, match=r"config.json is a link"):
        read_manifest(checkpoint)
