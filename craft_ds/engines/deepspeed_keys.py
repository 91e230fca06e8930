"""Keys of DeepSpeed's configuration that are supported, and the values that each takes.

Checked before anything is built: DeepSpeed reports a wrong value by a traceback when the policy is in memory,
or in the first step, and takes some that cannot work (a bucket of no elements divides by zero).
"""

import json
import math
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from craft_ds.errors import UserError


class Kind(NamedTuple):
    """Values of a key: of a type, and within bounds or of a set of words."""

    says: str
    type: type
    minimum: float = -math.inf
    maximum: float = math.inf
    words: tuple[str, ...] = ()

    def accepts(self, value: object) -> bool:
        """Return True if the value is of this kind; `true` is not a number."""
        if self.words:
            return value in self.words
        if self.type is int and type(value) is float:  # 5e8 in a file is a float
            value = int(value) if math.isfinite(value) and value == int(value) else None
        if self.type is float and type(value) is int:
            return self.minimum <= value <= self.maximum
        if type(value) is not self.type:
            return False
        return not isinstance(value, int | float) or self.minimum <= value <= self.maximum


def _count(minimum: int, maximum: int = (1 << 63) - 1) -> Kind:
    bounds = f"from {minimum} to {maximum:,}" if maximum < 1 << 62 else f"of at least {minimum}"
    return Kind(f"an integer {bounds}", int, minimum, maximum)


def _words(*words: str) -> Kind:
    return Kind(" or ".join(json.dumps(word) for word in words), str, words=words)


_SWITCH = Kind("true or false", bool)
# DeepSpeed allocates buckets of this many elements.
_BUCKET = _count(1, 1 << 40)
_POSITIVE = _count(1)
_SIZE = _count(0)
_NUMBER = Kind("a number of at least 0", float, 0.0, 1e300)
_SECTION = Kind("a JSON object", dict)

_TOP = {
    "bf16": _SECTION,
    "comms_logger": _SECTION,
    "communication_data_type": Kind(
        '"fp32" or "bf16" (in fp16, sums of gradients overflow, and no loss is scaled here)',
        str,
        words=("fp32", "bf16"),
    ),
    "data_types": _SECTION,
    "dump_state": _SWITCH,
    "fp16": _SECTION,
    "gradient_accumulation_steps": _POSITIVE,
    "gradient_clipping": _NUMBER,
    "memory_breakdown": _SWITCH,
    "steps_per_print": _POSITIVE,
    "train_batch_size": _POSITIVE,
    "train_micro_batch_size_per_gpu": _POSITIVE,
    "wall_clock_breakdown": _SWITCH,
    "zero_allow_untested_optimizer": _SWITCH,
    "zero_force_ds_cpu_optimizer": _SWITCH,
    "zero_optimization": _SECTION,
}
_BOTH_STAGES = {
    "allgather_partitions": _SWITCH,
    "contiguous_gradients": _SWITCH,
    "offload_optimizer": _SECTION,
    "offload_param": _SECTION,
    "overlap_comm": _SWITCH,
    "reduce_bucket_size": _BUCKET,
    "reduce_scatter": _SWITCH,
    "stage": _count(2, 3),
}
_ZERO = {
    2: _BOTH_STAGES
    | {
        "allgather_bucket_size": _BUCKET,
        "round_robin_gradients": _SWITCH,
        "use_multi_rank_bucket_allreduce": _SWITCH,
    },
    3: _BOTH_STAGES
    | {
        "memory_efficient_linear": _SWITCH,
        "stage3_gather_16bit_weights_on_model_save": _SWITCH,
        "stage3_max_live_parameters": _SIZE,
        "stage3_max_reuse_distance": _SIZE,
        "stage3_model_persistence_threshold": _SIZE,
        "stage3_param_persistence_threshold": _SIZE,
        "stage3_prefetch_bucket_size": _SIZE,
        "sub_group_size": _POSITIVE,
    },
}
_SECTIONS = {
    "bf16": {"enabled": _SWITCH, "check_grad_overflow": _SWITCH},
    "comms_logger": {
        "enabled": _SWITCH,
        "verbose": _SWITCH,
        "prof_all": _SWITCH,
        "prof_ops": Kind("a list of names", list),
        "debug": _SWITCH,
    },
    "fp16": {
        "enabled": _SWITCH,
        "loss_scale": _NUMBER,
        "initial_scale_power": _SIZE,
        "loss_scale_window": _POSITIVE,
        "hysteresis": _POSITIVE,
        "min_loss_scale": _SIZE,
    },
    "data_types": {"grad_accum_dtype": _words("fp32", "bf16", "fp16")},
    "zero_optimization.offload_optimizer": {
        "device": _words("cpu", "none"),
        "pin_memory": _SWITCH,
        "buffer_count": _SIZE,
        "fast_init": _SWITCH,
    },
    "zero_optimization.offload_param": {"device": _words("none")},
}


def supported_keys(stage: int) -> dict[str, dict[str, Kind]]:
    """Return the keys of each section at a ZeRO stage; the section of the top level is the empty string."""
    return {"": _TOP, "zero_optimization": _ZERO[stage], **_SECTIONS}


def check_keys(config: dict[str, Any], file: str) -> None:
    """Refuse keys and values that this trainer was not tested with; whole floats such as 5e8 become integers.

    Args:
        config: Content of the file, without `"auto"`; integers are replaced in it.
        file: Names the file in messages.

    Raises:
        UserError: Names the file, the key, its value, and what it takes.
    """
    zero = _section(config, "zero_optimization", file)
    stage = zero.get("stage")
    if type(stage) is not int or stage not in _ZERO:
        why = ": stage 2 also partitions gradients, at the same traffic" if stage == 1 else ""
        raise UserError(f"{file} says zero_optimization.stage={_shown(stage)}: choose 2 or 3{why}")
    if _section(zero, "offload_param", file, "zero_optimization.").get("device", "none") != "none":
        raise UserError(
            f"{file}: zero_optimization.offload_param is not supported, remove it; offload_optimizer is"
        )
    sections = supported_keys(stage)
    for section, known in sections.items():
        content = _section(config, section, file)
        for key in sorted(content):
            dotted = f"{section}.{key}" if section else key
            if key not in known:
                raise UserError(f"{file}: {dotted} is not supported{_instead(section, key, stage)}")
            kind, value = known[key], content[key]
            if not kind.accepts(value):
                raise UserError(f"{file} says {dotted}={_shown(value)}: it must be {kind.says}")
            if kind.type is int:
                content[key] = int(value)


def _instead(section: str, key: str, stage: int) -> str:
    """Return what to do with an unknown key: move it, correct it, or remove it."""
    sections = supported_keys(stage)
    at_stage = f" at stage {stage}" if section == "zero_optimization" else ""
    for other, known in sections.items():
        if key in known and other != section and key != "enabled":
            return f" there, move it to {other or 'the top level'}"
    nearest = get_close_matches(key, sections[section], n=1, cutoff=0.75)
    return f"{at_stage}, did you mean {nearest[0]}?" if nearest else f"{at_stage}, remove it"


def _section(config: Mapping[str, Any], dotted: str, file: str, before: str = "") -> dict[str, Any]:
    node: Any = config
    for key in filter(None, dotted.split(".")):
        node = node.get(key)
        if node is None:
            return {}
    if not isinstance(node, dict):
        raise UserError(f"{file}: {before}{dotted} must be a JSON object")
    return node


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
