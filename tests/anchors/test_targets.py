"""The teacher's targets in an anchor cache: built, read back, and missed where they are needed."""

import copy
import json
import re

import pytest
import torch
from builds import Killed, contents, refuses

from craft_ds.anchors import build
from craft_ds.anchors.build import build_anchor_cache
from craft_ds.anchors.cache import AnchorCache, partial_directory, read_metadata
from craft_ds.anchors.sampler import to_policy_batch
from craft_ds.anchors.schema import TARGETS, check_metadata
from craft_ds.anchors.stream import AnchorStream
from craft_ds.commands.anchors import parse_arguments
from craft_ds.config.craft_config import CraftConfig
from craft_ds.data.batch_partition import partition_step
from craft_ds.errors import UserError
from craft_ds.policies.loading import load_policy, load_policy_config
from craft_ds.policies.pi0_fast.retention import RETENTION_LOSSES


@pytest.fixture(scope="module")
def with_targets(options, tmp_path_factory):
    path = tmp_path_factory.mktemp("targets") / "cache"
    assert build_anchor_cache(options(path, targets=TARGETS))
    return path


@pytest.mark.parametrize("name", TARGETS)
def test_targets_are_those_of_the_teacher(with_targets, teacher, name):
    cache = AnchorCache.open(with_targets)
    policy = load_policy(load_policy_config(teacher), teacher)
    anchors = cache.read(range(len(cache)), retention_loss=name)
    expected = RETENTION_LOSSES[name].targets(policy, to_policy_batch(anchors, "cpu"))
    assert set(expected) == set(RETENTION_LOSSES[name].fields) == {key for key in anchors if "teacher" in key}
    for field, tensor in expected.items():
        assert anchors[field].dtype == tensor.dtype
        if tensor.dtype == torch.float32:
            torch.testing.assert_close(anchors[field], tensor, rtol=1e-4, atol=1e-4)
    loss = RETENTION_LOSSES[name].loss(policy, to_policy_batch(anchors, "cpu"))
    found = cache.loss_of(name)["all"]
    assert found["overall"] == pytest.approx(loss.total.item() / loss.count.item(), rel=1e-4, abs=1e-6)
    assert found["tokens"] == loss.count.item()
    assert set(found["by_task"]) == set(cache.teacher_loss["all"]["by_task"])


@pytest.mark.parametrize("name", RETENTION_LOSSES)
def test_numbers_of_terms_are_known_without_a_pass(with_targets, teacher, name):
    cache = AnchorCache.open(with_targets)
    policy, loss = load_policy(load_policy_config(teacher), teacher), RETENTION_LOSSES[name].loss
    for indices in ([0], [3, 1, 7], range(len(cache))):
        anchors = to_policy_batch(cache.read(indices, retention_loss=name), "cpu")
        assert cache.term_counts(name)[list(indices)].sum() == loss(policy, anchors).count


def test_the_rest_of_the_cache_is_as_without_targets(built, with_targets):
    without, has = (json.loads((path / "metadata.json").read_text()) for path in (built, with_targets))
    assert "targets" not in without
    assert set(has.pop("targets")) == set(TARGETS)
    assert has["request"].pop("targets") == sorted(TARGETS)
    for name in [name for name in has["fields"] if name.startswith("teacher.")]:
        has["fields"].pop(name)
    assert {**has, "shards": 0, "sha256": 0} == {**without, "shards": 0, "sha256": 0}
    one, other = (AnchorCache.open(path).read(range(22)) for path in (built, with_targets))
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_interrupted_build_is_continued(with_targets, options, tmp_path, monkeypatch):
    output, calls, original = tmp_path / "cache", [], build._write_shard

    def die(*args):
        calls.append(args)
        if len(calls) == 3:
            raise Killed
        return original(*args)

    monkeypatch.setattr(build, "_write_shard", die)
    with pytest.raises(Killed):
        build_anchor_cache(options(output, targets=TARGETS))
    monkeypatch.undo()
    refuses(options(output), "interrupted", "request.targets differs")
    assert build_anchor_cache(options(output, targets=TARGETS))
    assert contents(output) == contents(with_targets)


@pytest.mark.parametrize("name", TARGETS)
def test_missing_targets_are_an_error_that_says_how_to_make_them(built, name):
    cache = AnchorCache.open(built)
    craft = CraftConfig(enabled=True, retention_loss=name)
    share = partition_step(4, 1, 2, "anchors")
    with pytest.raises(UserError) as caught:
        AnchorStream(cache, craft, share, device=torch.device("cpu"), rank=0, seed=0)
    assert f"--craft.retention_loss={name}" in str(caught.value)
    assert f"craft-ds anchors --targets {name}" in str(caught.value)


def test_options_name_the_targets(options, tmp_path):
    with pytest.raises(UserError, match="--targets=logits: choose from teacher_tokens, teacher_kl, hidden"):
        options(tmp_path / "cache", targets=["logits"])
    with pytest.raises(UserError, match="--targets names hidden more than once"):
        options(tmp_path / "cache", targets=["hidden", "teacher_kl", "hidden"])


@pytest.mark.parametrize("target", TARGETS)
def test_the_command_offers_every_target(target):
    flags = ["--dataset_repo_id=a", "--policy_path=b", "--output_dir=c"]
    assert parse_arguments([*flags, "--targets", target]).targets == [target]


@pytest.mark.parametrize("name", ["teacher.tokens", "teacher.top_ids", "teacher.top_log_probs"])
def test_metadata_with_another_length_of_targets_is_refused(with_targets, name):
    metadata = read_metadata(with_targets)
    check_metadata(metadata)
    for change in (1, -1):
        changed = copy.deepcopy(metadata)
        changed["fields"][name]["shape"][0] += change
        with pytest.raises(ValueError, match=f"the shape of {re.escape(name)}"):
            check_metadata(changed)


def test_a_build_that_an_earlier_version_began_is_completed(options, built, tmp_path, monkeypatch):
    """Its records of finished shards do not name the loss, which was always that of the tokens."""
    output = tmp_path / "cache"

    def die(*_):
        raise Killed

    monkeypatch.setattr(build, "_publish", die)
    with pytest.raises(Killed):
        build_anchor_cache(options(output))
    monkeypatch.undo()
    for file in partial_directory(output).glob("*.json"):
        record = json.loads(file.read_text())
        for loss in record.get("losses", []):
            assert loss.pop("loss") == "token_ce"
        file.write_text(json.dumps(record))
    assert build_anchor_cache(options(output))
    assert contents(output) == contents(built)
