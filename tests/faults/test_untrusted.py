"""Foreign pickles and programs never run: checked in the package's source, and by planting live ones."""

import ast
import importlib
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from file_damage import refused, seal, verify_checkpoint
from lerobot.configs import PreTrainedConfig
from lerobot.processor import IdentityProcessorStep, ProcessorStepRegistry
from transformers import AutoTokenizer

from craft_ds.anchors.cache import file_sha256
from craft_ds.config.parser import parse_arguments
from craft_ds.policies import loading, remote_code
from craft_ds.policies.loading import (
    build_policy,
    load_policy_config,
    load_processors,
    tokenizer_fingerprint,
)
from craft_ds.testing.datasets import edit_metadata
from craft_ds.training.trainer import train_craft

ROOT = Path(__file__).parents[2]
PICKLERS = {
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "jsonpickle",
    "marshal",
    "shelve",
}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.full_load_all"),
    *("pd.read_pickle", "pandas.read_pickle", "torch.jit.load", "torch.package.PackageImporter"),
}


def unsafe(source: str) -> list[str]:
    """Return the expressions in a program that could run code from a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [name.name for name in names if name.name.split(".")[0] in PICKLERS]
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in PICKLERS:
                found.append(module)
            case ast.Call(func=function, keywords=keywords):
                name = ast.unparse(function)
                given = {word.arg: ast.unparse(word.value) for word in keywords}
                loads = name == "torch.load" and given.get("weights_only") != "True"
                pickles = name.endswith(".load") and given.get("allow_pickle", "False") != "False"
                if loads or pickles or name in FORBIDDEN_CALLS or given.get("shell", "False") != "False":
                    found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import torch, dill.source",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "exec(compile(text, '', 'exec'))",
        "os.system(command)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_unsafe_code_is_found(source):
    assert unsafe(f"def f():\n    {source}")


@pytest.mark.parametrize(
    "source",
    ["torch.load(path, weights_only=True)", "policy.eval()", "re.compile(text)", "yaml.safe_load(text)"],
)
def test_safe_code_is_accepted(source):
    assert not unsafe(source)


def test_package_and_scripts_contain_no_unsafe_code():
    sources = [*(ROOT / "craft_ds").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    assert len(sources) > 80
    found = {str(path.relative_to(ROOT)): unsafe(path.read_text()) for path in sources}
    assert not {path: what for path, what in found.items() if what}


# --- live pickles in the place of files -------------------------------------------------------------------


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    """A path that exists only after foreign code has run."""
    return tmp_path / "it_ran"


def plant(path: Path, marker: Path, form: str) -> None:
    if form == "pickle":
        path.write_bytes(pickle.dumps({"multiplier": Bomb(marker)}))
    else:
        torch.save({"multiplier": Bomb(marker)}, path, _use_new_zipfile_serialization=form == "torch")


@pytest.mark.parametrize("form", ["pickle", "torch", "old torch"])
def test_the_pickles_are_live(tmp_path, marker, form):
    plant(tmp_path / "x", marker, form)
    if form == "pickle":
        pickle.loads((tmp_path / "x").read_bytes())
    else:
        torch.load(tmp_path / "x", weights_only=False)
    assert marker.exists()


@pytest.fixture(scope="module")
def checkpoints(inputs, tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of full training and of adapters, after the first of two steps."""
    root, made = tmp_path_factory.mktemp("checkpoints"), {}
    kinds = {"full": inputs.craft_flags(), "lora": ["--lora=attention_mlp"]}
    for kind, special in kinds.items():
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("sys.argv", ["train_craft.py"])
            flags = [*inputs.flags(root / kind), "--steps=2", "--save_freq=1", *special]
            train_craft(parse_arguments(flags))
        made[kind] = root / kind / "step_000001"
    return made


@pytest.fixture
def forged(checkpoints, refuses, tmp_path):
    """Resume a run whose only checkpoint was changed, with a matching manifest; return the error."""

    def forged(kind: str, change) -> str:
        run = tmp_path / "run"
        checkpoint = shutil.copytree(checkpoints[kind], run / "step_000001")
        change(checkpoint)
        seal(checkpoint)
        verify_checkpoint(checkpoint, 0, 1)
        config = checkpoint / "train_config.json"
        return refuses(None, f"--config_path={config}", "--resume=true", f"--output_dir={run}", untouched=run)

    return forged


@pytest.mark.parametrize(
    ("kind", "file", "form"),
    [
        ("full", "craft_state.pt", "pickle"),
        ("full", "craft_state.pt", "torch"),
        ("full", "craft_state.pt", "old torch"),
        ("full", "scheduler.pt", "torch"),
        ("full", "model.safetensors", "pickle"),
        ("full", "optimizer.safetensors", "torch"),
        ("full", "policy_preprocessor.json", "pickle"),
        ("lora", "craft_state.pt", "torch"),
        ("lora", "adapter_model.safetensors", "pickle"),
        ("lora", "optimizer.safetensors", "pickle"),
    ],
)
def test_a_pickle_in_a_checkpoint(forged, marker, kind, file, form):
    line = forged(kind, lambda checkpoint: plant(checkpoint / file, marker, form))
    assert not marker.exists()
    assert file in line


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("craft_state.pt", [1, 2]),
        ("craft_state.pt", {}),
        ("craft_state.pt", {"multiplier": "x", "history": []}),
        ("craft_state.pt", {"multiplier": float("nan"), "history": []}),
        ("craft_state.pt", {"multiplier": 1.0, "history": [{"step": 1}]}),
        ("scheduler.pt", 5),
        ("scheduler.pt", {"last_epoch": "x"}),
    ],
)
def test_state_files_with_unexpected_contents(forged, file, content):
    def write(checkpoint):
        sound = torch.load(checkpoint / file, weights_only=True)
        torch.save(sound | content if content and isinstance(content, dict) else content, checkpoint / file)

    line = forged("full", write)
    assert f"{file} is damaged" in line


@pytest.mark.parametrize("form", ["pickle", "torch"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_pickle_in_an_anchor_cache(refuses, inputs, marker, tmp_path, form, verify, monkeypatch):
    anchors = shutil.copytree(inputs.anchors, tmp_path / "anchors")
    shard = anchors / "shard_00000.safetensors"
    plant(shard, marker, form)
    shards = json.loads((anchors / "metadata.json").read_text())["shards"]
    shards[0] |= {"bytes": shard.stat().st_size, "sha256": file_sha256(shard)}
    edit_metadata(anchors, shards=shards)
    monkeypatch.setattr("craft_ds.training.preflight.is_local_rank0", lambda: verify)
    line = refuses(tmp_path / "run", *inputs.craft_flags(), f"--craft.anchor_cache_dir={anchors}")
    assert not marker.exists()
    assert str(shard) in line


# --- programs in a policy directory -----------------------------------------------------------------------


@pytest.fixture
def policy(inputs, tmp_path):
    """A copy of the policy that tests change."""
    return shutil.copytree(inputs.policy, tmp_path / "policy")


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["policy_preprocessor.json", "policy_postprocessor.json"])
@pytest.mark.parametrize("way", ["call", "import"])
def test_a_processor_that_names_a_class(refuses, policy, marker, tmp_path, monkeypatch, name, way):
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    step = {"class": "evil.Step"}
    if way == "call":
        step = {"class": "os.mkdir", "config": {"path": str(marker)}}
    edit(policy / name, lambda content: content["steps"].append(step))
    line = refuses(tmp_path / "run", f"--policy.path={policy}")
    assert not marker.exists()
    assert name in line
    assert step["class"] in line


@pytest.fixture
def with_code(policy, marker, monkeypatch, tmp_path):
    """A policy whose action tokenizer contains a program."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = policy / "action_tokenizer"
    source = (folder / "fast_tokenizer.py").read_text()
    (folder / "evil.py").write_text(f"{source}\nimport os\nos.mkdir({str(marker)!r})\n")
    program = {"auto_map": {"AutoProcessor": "evil.FastActionProcessor"}, "processor_class": "EvilProcessor"}
    edit(folder / "processor_config.json", lambda content: content.update(program))
    yield policy
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def test_a_tokenizer_that_is_a_program(refuses, inputs, with_code, marker, tmp_path):
    line = refuses(tmp_path / "run", *inputs.craft_flags(), f"--policy.path={with_code}")
    assert not marker.exists()
    assert str(with_code / "action_tokenizer" / "processor_config.json") in line
    assert remote_code.TRUST_VARIABLE in line


def test_every_way_to_load_a_tokenizer_is_checked(inputs, with_code, marker):
    config = load_policy_config(inputs.policy)
    config.action_tokenizer_name = str(with_code / "action_tokenizer")
    for use in (
        lambda: load_policy_config(with_code),
        lambda: tokenizer_fingerprint(config),
        lambda: build_policy(config, inputs.policy),
        lambda: load_processors(config, inputs.policy),
    ):
        assert "processor_config.json" in refused(use)
    config = load_policy_config(inputs.policy)
    step = {"registry_name": "action_tokenizer_processor"}
    step["config"] = {"action_tokenizer_name": str(with_code / "action_tokenizer")}
    edit(with_code / "policy_postprocessor.json", lambda content: content["steps"].append(step))
    assert "processor_config.json" in refused(lambda: load_processors(config, with_code))
    assert not marker.exists()


def test_a_tokenizer_program_runs_if_trusted(with_code, marker, monkeypatch):
    monkeypatch.setenv(remote_code.TRUST_VARIABLE, "1")
    tokenizer_fingerprint(load_policy_config(with_code))
    assert marker.exists()


def test_a_hub_tokenizer_of_an_unknown_owner(policy):
    edit(policy / "config.json", lambda content: content.update(action_tokenizer_name="stranger/fast"))
    shutil.rmtree(policy / "action_tokenizer")
    assert "stranger/fast" in refused(lambda: load_policy_config(policy))
    for owner in ("physical-intelligence", "lerobot"):
        edit(
            policy / "config.json", lambda content, o=owner: content.update(action_tokenizer_name=f"{o}/fast")
        )
        assert load_policy_config(policy).action_tokenizer_name == f"{owner}/fast"


# --- what LeRobot's own classes would load ----------------------------------------------------------------

LOADS_MORE = {
    "reward_classifier_processor": {"pretrained_path": "{evil}", "device": "cpu"},
    "add_teleop_action_as_info": {"teleop_device": "{evil}"},
    "gripper_penalty_processor": {},
    "image_crop_resize_processor": {"crop_params_dict": {}},
    "groot_n1_7_vlm_encode_v1": {"model_name": "{evil}"},
    "eo1_qwen_processor": {"processor_name": "{evil}"},
    "molmoact2_pack_inputs": {"checkpoint_path": "{evil}"},
}


@pytest.mark.parametrize("name", sorted(LOADS_MORE))
@pytest.mark.parametrize("file", ["policy_preprocessor.json", "policy_postprocessor.json"])
def test_a_step_that_loads_another_model(refuses, policy, tmp_path, monkeypatch, name, file):
    for module in ("groot.processor_groot", "eo1.processor_eo1", "molmoact2.processor_molmoact2"):
        importlib.import_module(f"lerobot.policies.{module}")  # registers its steps
    evil = tmp_path / "evil"
    evil.mkdir()
    config = {key: str(value).replace("{evil}", str(evil)) for key, value in LOADS_MORE[name].items()}
    step = {"registry_name": name, "config": config}
    edit(policy / file, lambda content: content["steps"].append(step))
    built = []
    monkeypatch.setattr(ProcessorStepRegistry.get(name), "__init__", lambda *_, **__: built.append(1))
    line = refuses(tmp_path / "run", f"--policy.path={policy}")
    assert name in line
    assert remote_code.TRUST_VARIABLE in line
    assert not built


@pytest.mark.parametrize(
    "kind", ["gaussian_actor", "groot", "wall_x", "eo1", "vla_jepa", "xvla", "molmoact2"]
)
def test_a_policy_type_that_loads_another_model(refuses, policy, tmp_path, kind):
    edit(policy / "config.json", lambda content: content.update(type=kind))
    line = refuses(tmp_path / "run", f"--policy.path={policy}")
    assert f"a policy of type {kind}" in line
    assert remote_code.TRUST_VARIABLE in line


def test_types_and_steps_that_are_allowed_exist():
    assert set(remote_code._POLICIES) <= set(PreTrainedConfig.get_known_choices())
    for module in ("evo1.processor_evo1", "xvla.processor_xvla", "pi05.processor_pi05"):
        importlib.import_module(f"lerobot.policies.{module}")
    assert set(remote_code._STEPS) <= set(ProcessorStepRegistry.list())


def test_a_step_and_a_policy_of_the_user_are_allowed(tmp_path):
    @ProcessorStepRegistry.register("my_step")
    class MyStep(IdentityProcessorStep):
        pass

    remote_code.check_step({"registry_name": "my_step"}, tmp_path)
    remote_code.check_policy_type("tiny_pi0_fast", tmp_path)
    ProcessorStepRegistry.unregister("my_step")


@pytest.mark.parametrize("field", remote_code.NAMES)
def test_every_name_in_a_configuration_is_checked(with_code, field):
    class Config:
        pass

    config = Config()
    setattr(config, field, str(with_code / "action_tokenizer"))
    assert "processor_config.json" in refused(lambda: loading._check_tokenizers(config))


def test_transformers_never_asks_on_the_terminal(tmp_path, marker, monkeypatch):
    """A tokenizer with code is an error for transformers itself, which would otherwise ask for 15 s."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    program = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "EvilTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(program))
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoTokenizer.from_pretrained(tmp_path)
    assert not marker.exists()
