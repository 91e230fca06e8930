"""The data report of pi0_fast: generated situations with the right numbers in the line."""

import copy
import json
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lerobot.processor import ActionTokenizerProcessorStep, TokenizerProcessorStep
from robot_data import JOINTS, TEXT, Robot, waves

from craft_ds.config.data_report import DataReportConfig
from craft_ds.data.data_measure import measure_dataset
from craft_ds.data.data_report_text import as_json, summary, table
from craft_ds.data.data_verdicts import compare, enforce, judge
from craft_ds.errors import UserError
from craft_ds.policies.loading import load_policy_config, load_processors

STATE, ACTION = "observation.state", "action"


@pytest.fixture(scope="module")
def policy(inputs):
    """Configuration and processors. The statistics are ±(1, 2, *, 0.5), and -1 to 3 in the third entry."""
    config = load_policy_config(inputs.policy)
    return config, *load_processors(config, inputs.policy)


def measured(policy, robot: Robot, **options):
    return measure_dataset(robot.dataset(), "me/new", *policy, DataReportConfig(**options))


def findings(policy, robot: Robot, **options):
    return judge(measured(policy, robot, **options), DataReportConfig(**options))


def only(found, level: str) -> str:
    """The text of the only finding of a level."""
    texts = [finding.text for finding in found if finding.level == level]
    assert len(texts) == 1, found
    return texts[0]


def errors(found) -> list[str]:
    return [finding.text for finding in found if finding.level == "error"]


def with_values(values: np.ndarray, joint: int, new) -> np.ndarray:
    """The same movements with one joint replaced."""
    changed = values.copy()
    changed[..., joint] = new
    return changed


# --- what is right --------------------------------------------------------------------------------------


def test_data_within_the_statistics_pass_in_silence(policy):
    assert findings(policy, Robot()) == []


def test_numbers_are_those_of_the_data(policy):
    robot = Robot()
    report = measured(policy, robot)
    assert (report.episodes, report.frames, report.measured, report.fps) == (4, 120, 120, 10)
    for key, values in ((STATE, robot.state), (ACTION, robot.action)):
        flat = values.reshape(-1, 4)
        for joint, one in enumerate(report.field(key).dimensions):
            assert one.name == JOINTS[joint]
            found = (one.min, one.max, one.mean, one.std)
            column = flat[:, joint]
            assert found == pytest.approx((column.min(), column.max(), column.mean(), column.std()), abs=1e-6)
    assert [(one.low, one.high) for one in report.field(STATE).dimensions] == [
        (-1, 1),
        (-2, 2),
        (-1, 3),
        (-0.5, 0.5),
    ]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), smooth=st.floats(0.02, 0.2))
def test_perfect_tokens_decode_to_the_recorded_actions(policy, seed, smooth):
    steps = np.random.default_rng(seed).normal(scale=smooth, size=(3, 20, 4)).cumsum(axis=1)
    report = measured(policy, Robot(state=waves(3, 20), action=np.clip(steps, -0.4, 0.4).astype(np.float32)))
    # Half a step of the quantised transform is 0.5 / scale in normalised units; ranges are 2, 4, 4 and 1.
    scale = next(
        s for s in policy[1].steps if isinstance(s, ActionTokenizerProcessorStep)
    ).action_tokenizer.scale
    for one, half_range in zip(report.field(ACTION).dimensions, (1, 2, 2, 0.5), strict=True):
        assert one.saturated == 0
        assert 0 < one.error <= 0.5 / scale * half_range * 1.01
    assert report.tokens.saturated == 0


def test_decoding_is_that_of_the_policy_itself(policy, inputs):
    from craft_ds.data.token_samples import _encode
    from craft_ds.policies.lerobot_internals import detokenize_actions
    from craft_ds.policies.loading import load_policy

    config, preprocessor, _ = policy
    robot = Robot()
    import torch

    batch = {
        STATE: torch.from_numpy(robot.state[:, 0]),
        ACTION: torch.from_numpy(robot.action[:, :8]),
        "task": [TEXT] * 4,
    }
    _, tokens = _encode(preprocessor, batch)
    step = next(step for step in preprocessor.steps if isinstance(step, ActionTokenizerProcessorStep))
    expected = load_policy(config, inputs.policy).detokenize_actions(tokens[:, 1:], 8, 4)
    assert torch.equal(detokenize_actions(config, step, tokens[:, 1:]), expected.float())


def test_tokens_are_those_that_the_policy_trains_on(policy):
    import torch

    from craft_ds.data.token_samples import _encode

    robot, preprocessor = Robot(), policy[1]
    batch = {
        STATE: torch.from_numpy(robot.state[:, 0]),
        ACTION: torch.from_numpy(robot.action[:, :8]),
        "task": [TEXT] * 4,
    }
    lengths, tokens = _encode(preprocessor, batch)
    trained = preprocessor(batch)
    assert torch.equal(tokens, trained["action.tokens"])
    assert lengths["prompts"].max == int(trained["observation.language.attention_mask"].sum(1).max())
    assert lengths["actions"].max == int(trained["action.token_mask"].sum(1).max())


def test_ten_thousand_frames_take_less_than_ten_seconds(policy):
    wide = waves(20, 500, 4)
    dataset = Robot(state=wide, action=wide).dataset()
    started = time.process_time()
    report = measure_dataset(dataset, "me/new", *policy, DataReportConfig())
    assert time.process_time() - started < 10
    assert (report.measured, report.tokens.samples) == (10_000, 250)


def test_more_frames_than_the_limit_are_sampled_evenly(policy):
    report = measured(policy, Robot(), frames=50, samples=7)
    assert (report.frames, report.measured, report.tokens.samples) == (120, 40, 7)


def test_every_task_has_a_sample(policy):
    robot = Robot(
        tasks=(TEXT, "Push and close a drawer", "Rotate the faucet clockwise " * 3, TEXT + " twice")
    )
    assert measured(policy, robot, samples=1).tokens.samples == 4
    assert (
        measured(policy, robot, samples=1).tokens.prompts.max > measured(policy, Robot()).tokens.prompts.max
    )


# --- ranges ---------------------------------------------------------------------------------------------


def test_degrees_against_radians_are_an_error(policy):
    found = findings(policy, Robot(state=np.rad2deg(waves()), action=np.rad2deg(waves())))
    first, second = errors(found)[:2]
    assert re.match(
        r"data set me/new, observation.state\[gripper\]: 9\d% of the values are outside of the policy's "
        r"range of -0.5 to 0.5 \(data -22.\d+ to 22.\d+\); likewise pan, lift, elbow: ",
        first,
    )
    assert second.startswith("data set me/new, action[gripper]: ")
    for text in (first, second):
        assert "--normalization=dataset" in text
        assert "`craft-ds statistics`" in text


def test_radians_against_degrees_are_an_error(policy):
    (text,) = errors(findings(policy, Robot(action=np.deg2rad(waves()))))
    assert "action" in text
    assert "round the movement away" in text
    assert "100% of its standard deviation" in text or "9" in text


def test_one_joint_in_other_units_is_an_error(policy):
    state = with_values(waves(), 1, np.rad2deg(waves()[..., 1]))
    text = only(findings(policy, Robot(state=state)), "error")
    assert "observation.state[lift]: " in text
    assert "likewise" not in text


@pytest.mark.parametrize(("key", "field"), [("state", STATE), ("action", ACTION)])
def test_gripper_in_percent_is_an_error(policy, key, field):
    closed = 100.0 * (np.arange(30) % 10 > 4)
    robot = Robot(**{key: with_values(waves(), 3, closed)})
    text = errors(findings(policy, robot))[0]
    assert f"{field}[gripper]: 50% of the values are outside of the policy's range of -0.5 to 0.5" in text
    assert "(data 0 to 100)" in text


def test_a_joint_beyond_its_range_is_a_warning(policy):
    state = with_values(waves(), 3, 2 * waves()[..., 3])
    text = only(findings(policy, Robot(state=state)), "warning")
    share = (np.abs(state[..., 3]) > 0.5).mean()
    assert f"observation.state[gripper]: {share:.0%} of the values are outside" in text


def test_most_values_clipped_are_an_error(policy):
    beyond = np.array([1.5, 3, 5, 0.8]) * np.where(waves() > 0, 1, -1)
    text = only(findings(policy, Robot(state=beyond)), "error")
    assert re.search(r"and 100% of the values of observation.state clip", text)


def test_a_dead_joint_that_moves_is_an_error(policy):
    dead = dead_in(policy, STATE, joint=2, value=0.25)
    robot = Robot(state=with_values(waves(), 2, 0.25))
    assert findings(dead, robot) == []
    moving = findings(dead, Robot())
    text = only(moving, "error")
    assert "observation.state[elbow]: does not move in the policy's statistics (0.25), but is -0.39" in text
    slightly = Robot(state=with_values(waves(), 2, 0.25 + 1e-2 * waves()[..., 0]))
    assert "observation.state[elbow]" in only(findings(dead, slightly), "warning")


def test_a_dead_action_that_moves_is_an_error(policy):
    text = errors(findings(dead_in(policy, ACTION, joint=0, value=0.0), Robot()))[0]
    assert "action[pan]: does not move in the policy's statistics (0), but is -0.39" in text


def dead_in(policy, key: str, joint: int, value: float):
    """The policy with statistics in which a joint has one value."""
    config, preprocessor, postprocessor = copy.deepcopy(policy)
    for step in [*preprocessor.steps, *postprocessor.steps]:
        stats = getattr(step, "stats", None)
        if stats and key in stats:
            for name in ("min", "max"):
                stats[key][name] = np.array(stats[key][name])
                stats[key][name][joint] = value
            step.to()
    return config, preprocessor, postprocessor


def test_actions_beyond_the_coefficients_are_named(policy):
    action = waves() + np.float32(0.6) * np.array([0, 0, 0, 1], dtype=np.float32)
    text = only(findings(policy, Robot(action=action)), "warning")
    assert re.search(r"action\[gripper\]: \d+% of the chunks exceed what the action tokens can say", text)


# --- non-finite values ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "field"), [("state", STATE), ("action", ACTION)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_named_by_episode_and_frame(policy, key, field, value):
    values = waves()
    values[1, 5, 2] = values[3, 29, 0] = value
    found = findings(policy, Robot(**{key: values}))
    text = only(found, "error")
    assert (
        f"data set me/new, {field}: 2 of 120 frames have NaN or Inf (episode 1 frame 5, episode 3 frame 29)"
        in text
    )


def test_many_non_finite_frames_are_counted(policy):
    values = waves()
    values[2] = np.nan
    text = only(findings(policy, Robot(state=values)), "error")
    assert (
        "30 of 120 frames have NaN or Inf (episode 2 frame 0, episode 2 frame 1, episode 2 frame 2, …)"
        in text
    )


def test_nothing_but_nan_is_an_error_like_any(policy):
    text = only(findings(policy, Robot(action=np.full_like(waves(), np.nan))), "error")
    assert "action: 120 of 120 frames" in text


def test_non_finite_values_that_training_skips_are_a_warning(policy):
    values = waves()
    values[0, 0, 0] = np.nan
    options = DataReportConfig()
    found = judge(measured(policy, Robot(state=values)), options, skips_bad_samples=True)
    assert "episode 0 frame 0" in only(found, "warning")


# --- tokens ---------------------------------------------------------------------------------------------


def limited(policy, kind: type, **changes):
    config, preprocessor, postprocessor = policy
    preprocessor = copy.copy(preprocessor)
    preprocessor.steps = [
        changed(step, changes) if isinstance(step, kind) else step for step in preprocessor.steps
    ]
    return config, preprocessor, postprocessor


def changed(step, changes):
    step = copy.copy(step)
    for name, value in changes.items():
        setattr(step, name, value)
    return step


def test_prompts_that_are_cut_are_an_error(policy):
    text = only(findings(limited(policy, TokenizerProcessorStep, max_length=20), Robot()), "error")
    assert "prompts: 100% are longer than --policy.tokenizer_max_length=20 (up to 2" in text
    assert "lose the state" in text


def test_one_long_task_text_is_a_warning(policy):
    robot = Robot(tasks=(TEXT, TEXT, TEXT, "Rotate the faucet clockwise " * 20))
    text = only(findings(policy, robot), "warning")
    assert "prompts: 25% are longer than --policy.tokenizer_max_length=64" in text


def test_action_chunks_that_are_cut_are_an_error(policy):
    found = findings(limited(policy, ActionTokenizerProcessorStep, max_action_tokens=8), Robot())
    text = only(found, "error")
    assert re.search(r"action: \d+% of the chunks are longer than --policy.max_action_tokens=8", text)


def test_fewer_action_steps_than_the_chunk_are_an_error(policy):
    config, *processors = policy
    config = copy.copy(config)
    config.n_action_steps = 4
    text = only(findings((config, *processors), Robot()), "error")
    assert "set --policy.n_action_steps to --policy.chunk_size" in text


# --- features -------------------------------------------------------------------------------------------


def test_another_robots_widths_are_an_error(policy):
    found = findings(policy, Robot(action=waves(width=6), action_names=tuple("abcdef")))
    text = only(found, "error")
    assert "action: 6 entries (a, b, c, d and 2 more), but the policy has 4" in text
    with pytest.raises(UserError) as raised:
        enforce(found, "error")
    assert "--data_check=warn" not in str(raised.value)


def test_widths_are_checked_without_statistics(policy):
    bare = copy.deepcopy(policy)
    for step in [*bare[1].steps, *bare[2].steps]:
        if hasattr(step, "stats"):
            step.stats = {}
            step.to()
    texts = errors(findings(bare, Robot(action=waves(width=5), action_names=tuple("abcde"))))
    assert "action: 5 entries (a, b, c, d and 1 more), but the policy has 4" in texts[1]
    assert [text for text in texts if "has no statistics for it" in text] == [texts[0], texts[2]]


def test_non_finite_statistics_of_the_policy_are_an_error(policy):
    broken = copy.deepcopy(policy)
    for step in broken[1].steps:
        if hasattr(step, "stats"):
            step.stats[ACTION]["max"] = np.array([1.0, 2.0, np.nan, 0.5])
            step.to()
    text = only(findings(broken, Robot()), "error")
    assert "action: the policy normalises it by MIN_MAX, but its statistics are non-finite" in text


def test_stale_statistics_of_the_data_set_are_a_warning(policy):
    values = {"min": waves().min((0, 1)), "max": waves().max((0, 1))}
    assert findings(policy, Robot(stats={STATE: values, ACTION: values})) == []
    values = values | {"max": values["max"] - np.array([0, 0.1, 0, 0])}
    text = only(findings(policy, Robot(stats={STATE: values})), "warning")
    assert "observation.state: values of lift exceed the range in the data set's own meta/stats.json" in text


def test_a_missing_camera_is_a_warning(policy):
    text = only(findings(policy, Robot(cameras=("observation.images.wrist",))), "warning")
    assert "observation.images.top: missing" in text
    assert "it has observation.images.wrist" in text
    assert "--rename_map" in text


def test_a_blank_camera_is_a_warning(policy):
    text = only(findings(policy, Robot(image=lambda row: np.zeros((3, 4, 4)))), "warning")
    assert "observation.images.top: one colour in all of 4 sampled frames" in text


def test_an_unreadable_frame_is_named(policy):
    def image(row):
        if row == 119:
            raise OSError("image file is truncated\nand more")
        return np.arange(12.0).reshape(3, 2, 2)

    text = only(findings(policy, Robot(image=image)), "warning")
    assert "episode 3 frame 29: cannot be read (image file is truncated and more)" in text


# --- two data sets --------------------------------------------------------------------------------------


def compared(policy, old: Robot, new: Robot):
    reports = [
        measure_dataset(robot.dataset(), name, *policy, DataReportConfig())
        for name, robot in (("me/old", old), ("me/new", new))
    ]
    return compare(*reports)


def test_equal_data_sets_compare_in_silence(policy):
    assert compared(policy, Robot(), Robot(state=waves(2, 40), action=waves(2, 40))) == []


def test_other_fps_are_a_warning(policy):
    text = only(compared(policy, Robot(fps=30), Robot(fps=10)), "warning")
    assert "data set me/new: 10 fps, but 30 in me/old, so that an action chunk lasts 3 times as long" in text


def test_other_order_of_actions_is_an_error(policy):
    found = compared(policy, Robot(), Robot(action_names=("pan", "elbow", "lift", "gripper")))
    assert "action: another order than in me/old (entry 1 is elbow, there lift)" in only(found, "error")


def test_other_names_of_actions_are_an_error(policy):
    found = compared(policy, Robot(), Robot(action_names=("x", "y", "z", "gripper")))
    text = only(found, "error")
    assert "action: entries x, y, z, gripper, but me/old has pan, lift, elbow, gripper" in text


def test_other_names_of_states_are_a_warning(policy):
    found = compared(policy, Robot(), Robot(state_names=("x", "y", "z", "gripper")))
    assert "observation.state: entries x, y, z" in only(found, "warning")


def test_names_in_groups_equal_names_in_a_list(policy):
    assert compared(policy, Robot(), Robot(action_names={"motors": list(JOINTS)})) == []


def test_data_without_names_compare_by_place(policy):
    assert compared(policy, Robot(), Robot(action_names=None, state_names=None)) == []


def test_ranges_that_differ_by_units_are_a_warning(policy):
    text = only(compared(policy, Robot(), Robot(state=np.rad2deg(waves()))), "warning")
    assert re.search(r"observation.state\[\w+\]: -22.\d+ to 22.\d+, but -0.\d+ to 0.\d+ in me/old", text)


# --- output ---------------------------------------------------------------------------------------------


def test_enforce_raises_one_line_or_returns_warnings(policy):
    found = findings(policy, Robot(state=np.rad2deg(waves()), action=np.rad2deg(waves())))
    with pytest.raises(UserError) as raised:
        enforce(found, "error")
    line = str(raised.value)
    assert "\n" not in line
    assert "observation.state[gripper]" in line
    assert "(and 2 more: `craft-ds data-report` lists them); --data_check=warn" in line
    lines = enforce(found, "warn")
    assert len(lines) == len(found)
    assert all(line.startswith("warning: data set me/new") for line in lines)


def test_table_and_summary_hold_the_numbers(policy):
    report = measured(policy, Robot())
    text = "\n".join(table(report))
    assert "data set me/new: 4 episodes, 120 frames, 10 fps, 1 task" in text
    assert "observation.state, normalised by MIN_MAX" in text
    assert all(name in text for name in JOINTS)
    assert re.search(r"prompt tokens: max 2\d, 99th percentile 2\d, limit 64; 0.0% cut", text)
    line = summary(report)
    assert "\n" not in line
    assert "120 of 120 frames, 120 tokenized, 4 with images" in line
    assert "observation.state 4 of 4 dimensions within" in line


def test_json_holds_reports_and_findings(policy):
    values = waves()
    values[1, 5, 2] = np.nan
    report = measured(policy, Robot(state=values))
    content = json.loads(json.dumps(as_json([report], judge(report, DataReportConfig()))))
    assert content["datasets"][0]["fields"][0]["non_finite_at"] == [[1, 5]]
    assert content["findings"][0]["level"] == "error"
