"""The data report of policies without tokenizers, in every normalisation mode."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from lerobot.configs import NormalizationMode
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.processor_act import make_act_pre_post_processors
from lerobot.policies.pi0_fast.processor_pi0_fast import RelativeActionsProcessorStep
from lerobot.utils.constants import ACTION, OBS_STATE
from robot_data import Robot, plain_policy, statistics, waves

from craft_ds.config.data_report import DataReportConfig
from craft_ds.data.data_measure import measure_dataset
from craft_ds.data.data_report_text import table
from craft_ds.data.data_verdicts import judge

MODES = [mode for mode in NormalizationMode if mode is not NormalizationMode.IDENTITY]
OPTIONS = DataReportConfig()


def measured(policy, robot: Robot):
    return measure_dataset(robot.dataset(), "me/new", *policy, OPTIONS)


def errors(policy, robot: Robot) -> list[str]:
    return [finding.text for finding in judge(measured(policy, robot), OPTIONS) if finding.level == "error"]


def heavy_tailed() -> Robot:
    """Values with outliers, and a gripper that is closed most of the time."""
    values = np.random.default_rng(0).standard_t(2, size=(4, 200, 4)).astype(np.float32)
    values[..., 3] = np.arange(200) % 50 > 46
    return Robot(state=values, action=values)


@pytest.mark.parametrize("mode", NormalizationMode)
@pytest.mark.parametrize("robot", [Robot(), heavy_tailed()], ids=["waves", "heavy"])
def test_data_pass_with_their_own_statistics(mode, robot):
    found = judge(measured(plain_policy(mode, robot), robot), OPTIONS)
    if mode is NormalizationMode.QUANTILE10 and robot.state.shape[1] == 200:
        first, second = found  # the gripper is open in 6 % of the frames
        assert (first.level, second.level) == ("warning", "warning")
        assert (
            "action[gripper]: mostly 0, so that QUANTILE10 gives it no range, but 0 to 1 at times"
            in second.text
        )
    else:
        assert found == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("key", ["state", "action"])
def test_degrees_against_radians_are_an_error(mode, key):
    values = np.rad2deg(waves())
    (text,) = errors(plain_policy(mode, Robot()), Robot(**{key: values}))
    assert "of the values are outside of the policy's range of " in text
    assert "likewise" in text


@pytest.mark.parametrize("mode", MODES)
def test_a_dead_joint_that_moves_is_an_error(mode):
    still = waves()
    still[..., 1] = 0.125
    policy = plain_policy(mode, Robot(state=still))
    assert errors(policy, Robot(state=still)) == []
    (text,) = errors(policy, Robot())
    assert "observation.state[lift]: does not move in the policy's statistics (0.125)" in text


@pytest.mark.parametrize("mode", MODES)
def test_a_dead_joint_with_another_value_is_an_error(mode):
    closed, opened = waves(), waves()
    closed[..., 3], opened[..., 3] = 0.0, 1.0
    (text,) = errors(plain_policy(mode, Robot(action=closed)), Robot(action=opened))
    assert "action[gripper]: does not move in the policy's statistics (0), but is 1 to 1 here" in text


@pytest.mark.parametrize("mode", MODES)
def test_limits_are_what_the_normaliser_maps_to_one(mode):
    robot = heavy_tailed()
    stats = statistics(robot.state)
    expected = {
        NormalizationMode.MEAN_STD: (stats["mean"] - stats["std"], stats["mean"] + stats["std"]),
        NormalizationMode.MIN_MAX: (stats["min"], stats["max"]),
        NormalizationMode.QUANTILES: (stats["q01"], stats["q99"]),
        NormalizationMode.QUANTILE10: (stats["q10"], stats["q90"]),
    }[mode]
    report = measured(plain_policy(mode, robot), robot).field(OBS_STATE)
    assert report.mode == mode.value
    for one, low, high in zip(report.dimensions, *expected, strict=True):
        assert (one.low, one.high) == pytest.approx((low, high), abs=1e-6)
        assert one.dead or one.clipped == pytest.approx(one.clipped_own, abs=0.005)


def test_share_outside_is_what_the_quantiles_leave_out():
    robot = heavy_tailed()
    report = measured(plain_policy(NormalizationMode.QUANTILES, robot), robot).field(OBS_STATE)
    assert report.dimensions[0].clipped == pytest.approx(0.02, abs=0.003)


@pytest.mark.parametrize("mode", MODES)
def test_a_policy_without_statistics_is_an_error(mode):
    first, second = errors(plain_policy(mode, None), Robot())
    assert f"observation.state: the policy normalises it by {mode.value}, but has no statistics" in first
    assert "`craft-ds statistics`" in first
    assert "action: the policy normalises it" in second


def test_identity_needs_no_statistics():
    report = measured(plain_policy(NormalizationMode.IDENTITY, None), Robot())
    assert judge(report, OPTIONS) == []
    assert "normalised by IDENTITY" in "\n".join(table(report))


def test_non_finite_values_are_found_without_tokenizers():
    values = waves()
    values[2, 7, 1] = np.nan
    (text,) = errors(plain_policy(NormalizationMode.MEAN_STD, Robot()), Robot(action=values))
    assert "action: 1 of 120 frames have NaN or Inf (episode 2 frame 7)" in text


def test_renamed_state_is_measured_under_its_own_name():
    policy = plain_policy(NormalizationMode.MIN_MAX, Robot(), rename={"observation.joints": OBS_STATE})
    dataset = Robot(state=np.rad2deg(waves())).dataset()
    dataset.hf_dataset = dataset.hf_dataset.rename_column(OBS_STATE, "observation.joints")
    dataset.meta.features["observation.joints"] = dataset.meta.features.pop(OBS_STATE)
    report = measure_dataset(dataset, "me/new", *policy, OPTIONS)
    text = next(finding.text for finding in judge(report, OPTIONS))
    assert text.startswith("data set me/new, observation.joints[")


def test_a_missing_state_is_an_error():
    dataset = Robot().dataset()
    dataset.meta.features.pop(OBS_STATE)
    report = measure_dataset(dataset, "me/new", *plain_policy(NormalizationMode.MIN_MAX, Robot()), OPTIONS)
    (finding,) = judge(report, OPTIONS)
    assert (finding.level, finding.trainable) == ("error", False)
    assert "observation.state: missing, but the policy reads it" in finding.text


def test_one_entry_states_and_single_values():
    robot = Robot(state=waves(width=1), action=waves(width=1), state_names=("x",), action_names=("x",))
    dataset = robot.dataset()
    for key in (OBS_STATE, ACTION):  # LeRobot stores one entry as a number
        flat = [row[0] for row in dataset.hf_dataset[key]]
        dataset.hf_dataset = dataset.hf_dataset.remove_columns(key).add_column(key, flat)
    report = measure_dataset(dataset, "me/new", *plain_policy(NormalizationMode.MIN_MAX, robot), OPTIONS)
    assert judge(report, OPTIONS) == []
    assert [one.name for one in report.field(ACTION).dimensions] == ["x"]


def test_relative_actions_are_measured_as_differences():
    state, action = waves(amplitude=100.0), waves(amplitude=100.0)
    action[..., 0] += 3.0
    relative = Robot(state=state, action=action - state)
    config, before, after = plain_policy(NormalizationMode.MIN_MAX, relative)
    for step in (
        before.steps[1],
        after.steps[0],
    ):  # differences within a chunk reach further than at its start
        bound = np.full(4, 150.0)
        step.stats[ACTION] = {"min": -bound, "max": bound}
        step.to()
    before.steps.insert(1, RelativeActionsProcessorStep(enabled=True))
    before.steps[2].stats[OBS_STATE] = statistics(state)
    before.steps[2].to()
    report = measure_dataset(Robot(state=state, action=action).dataset(), "x", config, before, after, OPTIONS)
    assert judge(report, OPTIONS) == []
    pan = report.field(ACTION).dimensions[0]
    assert pan.max < 130  # a difference over at most 7 frames, not the position
    assert pan.min > -127


def test_a_real_configuration_of_act():
    config = ACTConfig(device="cpu")
    robot = Robot()
    plain, _, _ = plain_policy(NormalizationMode.MEAN_STD, robot)
    config.input_features, config.output_features = plain.input_features, plain.output_features
    stats = {OBS_STATE: statistics(robot.state), ACTION: statistics(robot.action)}
    policy = config, *make_act_pre_post_processors(config, stats)
    report = measured(policy, robot)
    assert report.field(ACTION).mode == "MEAN_STD"
    assert report.tokens.samples == 0
    assert judge(report, OPTIONS) == []
    assert errors(policy, robot.but(state=np.rad2deg(waves())))


def test_actions_that_diffusion_clamps_are_a_warning():
    config, *processors = plain_policy(NormalizationMode.MIN_MAX, Robot())
    config = SimpleNamespace(**vars(config), clip_sample=True)
    found = judge(measured((config, *processors), Robot(action=1.2 * waves())), OPTIONS)
    assert [finding.level for finding in found] == ["warning"]
    assert "action[" in found[0].text


def test_report_of_any_policy_is_json(tmp_path):
    from craft_ds.data.data_report_text import as_json

    report = measured(plain_policy(NormalizationMode.QUANTILE10, Robot()), Robot())
    assert json.loads(json.dumps(as_json([report], [])))["datasets"][0]["tokens"]["prompts"] is None
