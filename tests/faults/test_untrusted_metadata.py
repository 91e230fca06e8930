"""Invalid cache metadata and checkpoint manifests with valid checksums."""

import json
import math
import shutil

import pytest
from file_damage import DEEP, MANIFEST, not_a_file, read_manifest, refused, seal, within
from safetensors.torch import load_file, save_file

from craft_ds.anchors.cache import METADATA_FILE, AnchorCache, file_sha256
from craft_ds.testing.datasets import edit_metadata, write_test_cache


@pytest.fixture(autouse=True)
def bounded_time():
    """Limit the time of every test."""
    with within(20):
        yield


# --- anchor caches ----------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path):
    path = tmp_path / "cache"
    write_test_cache(path, [0, 0, 1, 1, 2, 0], [0, 0, 1, 1, 2, 3], heldout_episodes=[3])
    return path


def changes():
    """Yield entries of the metadata and invalid values for them."""
    odd = (None, True, -1, 0, 2.5, math.inf, 1 << 70, "x", "../../etc", [], {}, [[]])
    for place, allowed in {
        ("num_samples",): (),
        ("request",): (),
        ("request", "shard_size"): (),
        ("request", "image_size"): (),
        ("teacher",): (),
        ("teacher", "path"): ("x", "../../etc"),
        ("tokenizer",): ("x", "../../etc"),
        ("cameras",): (),
        ("dataset",): (),
        ("dataset", "tasks"): (),
        ("dataset", "episodes"): (),
        ("dataset", "episodes", "heldout"): ([],),
        ("fields",): (),
        ("fields", "task"): (),
        ("fields", "observation.images.top", "shape"): (),
        ("fields", "action.tokens", "dtype"): (),
        ("shards",): (),
        ("shards", 0): (),
        ("shards", 0, "samples"): (),
        ("shards", 0, "bytes"): (),
        ("shards", 0, "sha256"): (),
        ("teacher_loss",): (),
        ("teacher_loss", "train", "overall"): (0, 2.5, 1 << 70),
        ("vision_features",): (None,),
        ("missing_cameras",): (None, []),
        ("chunk_size",): (None,),
        ("processors",): (None, {}),
        ("preprocessing",): (None, []),
        ("preprocessing", 0): (),
        ("preprocessing", 0, "features", "action"): (),
        ("preprocessing", 0, "features", "action", "mode"): (),
        ("preprocessing", 0, "features", "action", "eps"): (-1, 0, 2.5, 1 << 70),
        ("preprocessing", 0, "features", "action", "min"): (),
        ("preprocessing", 0, "features", "action", "min", 1): (-1, 0, 2.5, 1 << 70),
        ("dataset", "fps"): (None, 2.5, 1 << 70),
        ("dataset", "features"): (None, {}),
        ("dataset", "features", "action"): (),
        ("dataset", "features", "action", "shape"): ([],),
        ("dataset", "features", "action", "names"): (None, [], {}, [[]]),
        ("dataset", "task_frames"): (None,),
    }.items():
        for value in odd:
            if not any(type(value) is type(other) and value == other for other in allowed):
                yield place, value


def set_entry(metadata, place, value) -> None:
    *way, last = place
    for key in way:
        metadata = metadata[key]
    metadata[last] = value


def test_invalid_metadata_with_a_valid_checksum(cache):
    original = json.loads((cache / METADATA_FILE).read_text())
    cases = list(changes())
    assert len(cases) > 200
    silent = []
    for place, value in cases:
        metadata = json.loads(json.dumps(original))
        set_entry(metadata, place, value)
        (cache / METADATA_FILE).write_text(json.dumps(original))
        edit_metadata(cache, **metadata)
        try:
            line = refused(lambda: AnchorCache.open(cache))
            assert str(cache) in line
        except Exception as error:
            silent.append((place, value, repr(error)))
    assert not silent, "\n".join(map(str, silent))
    (cache / METADATA_FILE).write_text(json.dumps(original))
    assert len(AnchorCache.open(cache)) == 6


@pytest.mark.parametrize(
    "text", ["", "null", "3", DEEP, '{"format": ' + DEEP + "}", '{"format": 1, "format": 2}']
)
def test_metadata_that_is_not_an_object(cache, text):
    (cache / METADATA_FILE).write_text(text)
    assert METADATA_FILE in refused(lambda: AnchorCache.open(cache))


@pytest.mark.parametrize("kind", ["directory", "loop", "pipe"])
@pytest.mark.parametrize("name", [METADATA_FILE, "shard_00000.safetensors"])
def test_a_cache_file_that_is_not_a_regular_file(cache, name, kind):
    not_a_file(cache / name, kind)
    assert str(cache) in refused(lambda: AnchorCache.open(cache))


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("task", lambda tensor: tensor + 7),
        ("task", lambda tensor: -tensor - 1),
        ("task", lambda tensor: tensor.float()),
        ("action.tokens", lambda tensor: tensor.long()),
        ("observation.images.top", lambda tensor: tensor.float()),
    ],
)
def test_invalid_shards_with_valid_checksums(cache, field, change):
    shard = cache / "shard_00000.safetensors"
    tensors = load_file(shard)
    tensors[field] = change(tensors[field])
    save_file(tensors, shard)
    shards = json.loads((cache / METADATA_FILE).read_text())["shards"]
    shards[0] |= {"bytes": shard.stat().st_size, "sha256": file_sha256(shard)}
    edit_metadata(cache, shards=shards)
    assert str(cache) in refused(lambda: AnchorCache.open(cache))


# --- manifests --------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(adapted, tmp_path):
    return shutil.copytree(adapted("attention_mlp"), tmp_path / "run" / "final")


SOUND = {"bytes": 1, "xxh3_128": ["0" * 32]}


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../outside": SOUND}},
        {"files": {"a/../../outside": SOUND}},
        {"files": {"/etc/passwd": SOUND}},
        {"files": {"": SOUND}},
        {"files": {"\0": SOUND}},
        {"files": {MANIFEST: SOUND}},
        {"files": []},
        {"files": None},
        {"files": {"config.json": None}},
        *({"files": {"config.json": SOUND | {"bytes": odd}}} for odd in (-1, 1.5, True, "1", 1 << 70, None)),
        *({"files": {"config.json": SOUND | {"xxh3_128": odd}}} for odd in ("0" * 32, [], [1], ["x"], None)),
        *({"step": odd} for odd in (-1, 1.5, True, "1", 1 << 70, None, [])),
        *({"world_size": odd} for odd in (0, -1, 1.5, "1", None)),
        *({"segment_bytes": odd} for odd in (0, -1, 1.5, "1", None)),
        {"format_version": None},
        {"format_version": [2]},
    ],
    ids=str,
)
def test_an_invalid_manifest_with_a_valid_checksum(checkpoint, change):
    (checkpoint.parent / "outside").write_text("x")
    read_manifest(checkpoint)
    seal(checkpoint, **change)
    assert str(checkpoint) in refused(lambda: read_manifest(checkpoint))


@pytest.mark.parametrize("text", ["", "null", "[]", DEEP, '{"files": ' + DEEP + "}"])
def test_a_manifest_that_is_not_an_object(checkpoint, text):
    (checkpoint / MANIFEST).write_text(text)
    assert str(checkpoint) in refused(lambda: read_manifest(checkpoint))


@pytest.mark.parametrize("kind", ["directory", "loop", "pipe", "empty"])
def test_a_manifest_that_is_not_a_regular_file(checkpoint, kind):
    not_a_file(checkpoint / MANIFEST, kind)
    assert str(checkpoint) in refused(lambda: read_manifest(checkpoint))
