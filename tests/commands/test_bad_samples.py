"""Bad samples in `craft-ds train`: one line and status 2, or a replacement that every resume repeats."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from runs import assert_same_bits, losses, metrics, trained

from craft_ds.checkpoints import verify_checkpoint
from craft_ds.data.batch_partition import partition_step
from craft_ds.data.task_data import StepSampler
from craft_ds.testing.damaged_samples import damage

pytestmark = pytest.mark.slow

FRAMES, CHUNK = 20, 8
RUN = ["--steps=6", "--save_freq=2", "--seed=7"]
# In 80 frames one outlier is more than a hundredth, at which the data report stops.
FEW = "--data_report.far_error=0.1"
SKIP = [*RUN, "--on_bad_sample=skip", FEW]


def with_workers(count: int) -> list[str]:
    return [f"--num_workers={count}", "--dataloader_multiprocessing_context=fork"]


def drawn(first: int, last: int) -> list[int]:
    """Samples at these positions of the stream of a run of 80 samples."""
    return StepSampler(80, partition_step(2, 1, 2, "samples"), 0, 7).draw(range(first, last))


def reads(sample: int) -> set[int]:
    """Frames that a sample reads: LeRobot reads a complete chunk with its pictures."""
    return set(range(sample, min(sample + CHUNK, (sample // FRAMES + 1) * FRAMES)))


@pytest.fixture(scope="module")
def frame() -> tuple[int, int]:
    """Episode and frame of the first sample to be bad: met in step 5 or 6, after the second checkpoint."""
    before = set().union(*map(reads, [0, *drawn(0, 8)]))  # the first sample is read at the start
    after = set().union(*map(reads, drawn(8, 12)))
    return divmod(min(after - before), FRAMES)


@pytest.fixture(scope="module")
def damaged(inputs, frame, tmp_path_factory) -> Path:
    """The new task's data with a cut picture, met late in the run."""
    root = shutil.copytree(inputs.new, tmp_path_factory.mktemp("damaged") / "new")
    damage(root, "cut picture", *frame)
    return root


@pytest.fixture(scope="module")
def many(inputs, tmp_path_factory) -> Path:
    """The new task's data with damage of all kinds in every episode."""
    root = shutil.copytree(inputs.new, tmp_path_factory.mktemp("many") / "new")
    for episode, name in enumerate(("cut picture", "nan action", "small picture", "far state")):
        damage(root, name, episode, 10)
    return root


def error_line(ended) -> str:
    assert ended.status == 2, ended
    assert ended.errors.startswith("error: ")
    assert ended.errors.count("\n") == 1
    assert "Traceback" not in ended.output + ended.errors
    return ended.errors


# --- error ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "layout"), [(2, []), (0, ["--checkpoint.background=true"])], ids=["workers", "background"]
)
def test_a_bad_picture_is_one_line_and_status_2(train, damaged, frame, tmp_path, workers, layout):
    run, (episode, at) = tmp_path / "run", frame
    flags = [*RUN, f"--dataset.root={damaged}", *with_workers(workers), *layout]
    line = error_line(train(run, *flags, "--resume=auto"))
    assert f"data set craft-ds/test, episode {episode}, frame {at}: it cannot be read" in line
    assert "--on_bad_sample=skip" in line
    for step in (2, 4):
        verify_checkpoint(run / f"step_{step:06d}", 0, 1)
    content = (run / "step_000004" / "model.safetensors").read_bytes()
    again = train(run, *flags, "--resume=auto")
    assert error_line(again) == line
    assert "resuming from" in again.output
    assert (run / "step_000004" / "model.safetensors").read_bytes() == content
    assert not (run / "final").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nan state", "observation.state[1] is nan"),
        ("infinite action", "action[0] is inf"),
        ("far state", "observation.state[1] is 1e+06, far outside of the usual"),
    ],
)
def test_a_bad_value_is_found_before_the_model_is_built(refuses, inputs, tmp_path, monkeypatch, name, reason):
    root = shutil.copytree(inputs.new, tmp_path / "new")
    damage(root, name, 2, 13)
    monkeypatch.setattr("craft_ds.training.build.build_fp32_policy", None)
    line = refuses(tmp_path / "run", f"--dataset.root={root}")
    assert f"data set craft-ds/test, episode 2, frame 13: {reason}" in line


def test_a_larger_outlier_factor_admits_a_value(train, refuses, inputs, tmp_path):
    root = shutil.copytree(inputs.new, tmp_path / "new")
    damage(root, "state in degrees", 2, 13)
    assert "frame 13: observation.state[0] is 90, far" in refuses(tmp_path / "no", f"--dataset.root={root}")
    for number, factor in enumerate((200, 0)):
        flags = [f"--dataset.root={root}", f"--outlier_factor={factor}", "--steps=1", FEW]
        assert train(tmp_path / f"run{number}", *flags).status == 0


@pytest.mark.parametrize(
    ("flag", "words"),
    [("--on_bad_sample=drop", "--on_bad_sample=drop"), ("--outlier_factor=-1", "must be at least 0")],
)
def test_a_bad_flag_is_named(refuses, tmp_path, flag, words):
    assert words in refuses(tmp_path / "run", flag)


# --- skip -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def skipped(inputs, many, tmp_path_factory) -> Path:
    """An uninterrupted CRaFT run over the data with many bad samples."""
    from craft_ds.config.parser import parse_arguments
    from craft_ds.training.trainer import train_craft

    output = tmp_path_factory.mktemp("runs") / "skipped"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.argv", ["train_craft.py"])
        flags = [*inputs.flags(output), *inputs.craft_flags(), *SKIP, f"--dataset.root={many}"]
        train_craft(parse_arguments(flags))
    return output


def replaced_by(steps: int) -> int:
    """Samples of the first steps that read a bad frame, the tenth of each episode.

    Pictures and actions of the chunk are read; the state is that of the sample's own frame.
    """
    of_chunk = {FRAMES * episode + 10 for episode in (0, 1)}
    bad = [
        sample
        for sample in drawn(0, 2 * steps)
        if of_chunk & reads(sample) or sample in (2 * FRAMES + 10, 3 * FRAMES + 10)
    ]
    return len(bad)


def test_bad_samples_are_counted_and_logged_once(train, many, skipped, tmp_path):
    rows = [row["train/bad_samples"] for row in metrics(skipped) if "train/bad_samples" in row]
    assert rows == [replaced_by(step) for step in range(1, 7)]
    assert rows[-1] > rows[1] > 0
    ended = train(tmp_path / "run", *SKIP, f"--dataset.root={many}")
    said = [line for line in ended.output.splitlines() if "bad sample replaced: " in line]
    assert said
    assert len(said) == len(set(said)) <= 4
    assert all("data set craft-ds/test, episode " in line and "frame 10: " in line for line in said)
    assert "2 of 80 frames have a bad state or action and will be replaced" in ended.output


@pytest.mark.parametrize(("workers", "step"), [(2, 2), (0, 4)])
def test_a_resumed_run_has_the_same_bits(train, skipped, tmp_path, workers, step):
    run = tmp_path / "run"
    config = f"--config_path={skipped}/step_{step:06d}/train_config.json"
    ended = train(None, config, "--resume=true", f"--output_dir={run}", *with_workers(workers))
    assert ended.status == 0, ended.errors
    assert_same_bits(run / "final", skipped / "final")
    assert losses(run) == losses(skipped)[step:]
    assert metrics(run)[-2]["train/bad_samples"] == replaced_by(6)


def test_a_run_that_met_a_bad_sample_resumes_with_skip(train, damaged, tmp_path):
    run, flags = tmp_path / "run", [*RUN, f"--dataset.root={damaged}", "--resume=auto"]
    error_line(train(run, *flags))
    ended = train(run, *flags, "--on_bad_sample=skip")
    assert ended.status == 0, ended.errors
    assert train(tmp_path / "other", *SKIP, f"--dataset.root={damaged}").status == 0
    one, other = trained(run / "final"), trained(tmp_path / "other" / "final")
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_run_resumes_after_a_repair(train, inputs, damaged, tmp_path):
    root = shutil.copytree(damaged, tmp_path / "new")
    flags = [*RUN, f"--dataset.root={root}", "--resume=auto"]
    error_line(train(tmp_path / "run", *flags))
    shutil.rmtree(root)
    shutil.copytree(inputs.new, root)
    ended = train(tmp_path / "run", *flags)
    assert ended.status == 0, ended.errors
    assert train(tmp_path / "good", *RUN, f"--dataset.root={root}").status == 0
    assert_same_bits(tmp_path / "run" / "final", tmp_path / "good" / "final")


def test_without_bad_samples_nothing_changes(train, tmp_path):
    assert train(tmp_path / "error", *RUN).status == 0
    assert train(tmp_path / "skip", *SKIP).status == 0
    assert_same_bits(tmp_path / "skip" / "final", tmp_path / "error" / "final")
    assert all(row.get("train/bad_samples", 0) == 0 for row in metrics(tmp_path / "skip"))


# --- evaluation -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad_heldout(inputs, tmp_path_factory) -> list[str]:
    root = shutil.copytree(inputs.new, tmp_path_factory.mktemp("heldout") / "new")
    damage(root, "cut picture", 3, 19)
    return [f"--dataset.root={root}", "--eval_freq=2", "--steps=2", "--dataset.eval_split=0.25"]


def test_a_bad_held_out_sample_is_an_error(train, bad_heldout, tmp_path):
    line = error_line(train(tmp_path / "run", *bad_heldout))
    assert "data set craft-ds/test, episode 3, frame 19: it cannot be read" in line


def test_a_bad_held_out_sample_is_replaced(train, bad_heldout, tmp_path):
    ended = train(tmp_path / "run", *bad_heldout, "--on_bad_sample=skip")
    assert ended.status == 0, ended.errors
    assert ended.output.count("bad sample replaced: data set craft-ds/test, episode 3, frame 19: ") == 1
    (loss,) = [row["eval/task_loss"] for row in metrics(tmp_path / "run") if "eval/task_loss" in row]
    assert np.isfinite(loss)
    assert all(row.get("train/bad_samples", 0) == 0 for row in metrics(tmp_path / "run"))


# --- videos -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Two episodes of 20 frames with a camera as video, in one file each."""
    root = tmp_path_factory.mktemp("videos") / "data"
    picture = {"dtype": "video", "shape": (64, 64, 3), "names": ["height", "width", "channels"]}
    vector = {"dtype": "float32", "shape": (4,), "names": None}
    features = {"observation.images.top": picture, "observation.state": vector, "action": vector}
    dataset = LeRobotDataset.create(
        "craft-ds/test", fps=10, features=features, root=root, video_backend="pyav"
    )
    dataset.meta.update_chunk_settings(video_files_size_in_mb=0.001)
    rng = np.random.default_rng(0)
    for _ in range(2):
        for frame in range(FRAMES):
            values = np.sin(0.3 * frame + np.arange(4)).astype(np.float32)
            picture = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            dataset.add_frame(
                {
                    "observation.images.top": picture,
                    "observation.state": values,
                    "action": values,
                    "task": "press",
                }
            )
        dataset.save_episode()
    dataset.finalize()
    return root


def cut(root: Path) -> None:
    file = sorted((root / "videos").rglob("*.mp4"))[-1]
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def empty(root: Path) -> None:
    sorted((root / "videos").rglob("*.mp4"))[-1].write_bytes(b"")


def shift(root: Path) -> None:
    """Move the time stamps of episode 1 by half a frame."""
    (file,) = (root / "data").rglob("*.parquet")
    table = pq.read_table(file)
    late = table["episode_index"].to_numpy() == 1
    times = table["timestamp"].to_numpy() + np.where(late, 0.05, 0).astype(np.float32)
    at = table.schema.get_field_index("timestamp")
    pq.write_table(table.set_column(at, table.schema.field("timestamp"), pa.array(times)), file)


@pytest.mark.parametrize(("spoil", "workers"), [(cut, 0), (empty, 0), (shift, 2)])
def test_a_bad_video_is_an_error_or_is_replaced(train, videos, tmp_path, spoil, workers):
    root = shutil.copytree(videos, tmp_path / "data")
    spoil(root)
    flags = [f"--dataset.root={root}", "--dataset.video_backend=pyav", *with_workers(workers)]
    line = error_line(train(tmp_path / "run", *flags, "--steps=8"))
    assert "data set craft-ds/test, episode 1, frame " in line
    ended = train(tmp_path / "skip", *flags, "--steps=8", "--on_bad_sample=skip")
    assert ended.status == 0, ended.errors
    assert "bad sample replaced: data set craft-ds/test, episode 1, frame " in ended.output
    assert "episode 0, frame" not in ended.output
    assert metrics(tmp_path / "skip")[-2]["train/bad_samples"] > 0


# --- two ranks --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(inputs, damaged, many, bad_heldout, fork_server, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("ranks")
    fsdp = ["--engine=fsdp", "--batch_size=1"]
    own = {
        "error": [*RUN, *fsdp, f"--dataset.root={damaged}"],
        "error_in_evaluation": [*fsdp, *bad_heldout],
        "skip": [
            *inputs.craft_flags(),
            *SKIP,
            *fsdp,
            "--craft.anchor_batch_size=1",
            f"--dataset.root={many}",
        ],
    }
    commands = {name: [*inputs.flags(scratch / name), *flags] for name, flags in own.items()}
    (scratch / "commands.json").write_text(json.dumps(commands))
    program = Path(__file__).with_name("training_ranks.py")
    fork_server.run([scratch / "commands.json", scratch], 2, program=program, timeout=240).check()
    return scratch, [json.loads((scratch / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["error", "error_in_evaluation"])
def test_all_ranks_end_with_the_same_line(two_ranks, frame, name):
    scratch, ranks = two_ranks
    place = frame if name == "error" else (3, 19)
    assert [rank[name]["status"] for rank in ranks] == [2, 2], ranks
    main, other = (rank[name]["errors"] for rank in ranks)
    assert f"episode {place[0]}, frame {place[1]}: it cannot be read" in main
    assert main.count("\n") == 1
    assert other == ""
    if name == "error":
        verify_checkpoint(scratch / name / "step_000004", 0, 1)


@pytest.mark.distributed
def test_two_ranks_train_the_samples_of_one(two_ranks, skipped):
    scratch, ranks = two_ranks
    assert [rank["skip"]["status"] for rank in ranks] == [0, 0], ranks
    assert losses(scratch / "skip") == pytest.approx(losses(skipped), rel=1e-5)
    one, two = (
        torch.cat([tensor.flatten() for _, tensor in sorted(trained(run / "final").items())])
        for run in (skipped, scratch / "skip")
    )
    assert (one - two).norm() <= 1e-4 * one.norm()  # Adam magnifies rounding where a gradient is zero
    counted = [
        [row["train/bad_samples"] for row in metrics(run) if "train/bad_samples" in row]
        for run in (skipped, scratch / "skip")
    ]
    assert counted[0] == counted[1]
