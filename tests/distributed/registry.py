"""Registry: the scenarios of each kind of engine and number of ranks.

Ranks are expensive to start (each imports torch, transformers and DeepSpeed), so all kinds of one
family share the spawns of that family.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
from lab import Lab, Output
from scenarios import (
    ALWAYS,
    FOLLOWED_BY,
    NEVER,
    NO_CLIP,
    anchor_stream,
    collectives,
    failing_rank,
    load_from,
    loading,
    memory,
    pi0,
    save_and_resume,
    surgery,
    trajectory,
    untouched,
)
from scenarios_acting import acting
from scenarios_compact import compact_load_from, compact_resume, compact_steps
from scenarios_lora import (
    lora_costs,
    lora_load_from,
    lora_save_and_resume,
    lora_surgery,
    lora_trajectory,
)
from scenarios_non_finite import non_finite
from scenarios_penalty import penalised, penalised_adapters, penalised_load_from, penalised_resume
from scenarios_saving import holes, saving
from scenarios_scopes import SOME, joint, lora_scopes, scopes
from scenarios_waits import host_waits

Scenarios = dict[str, Callable[[Lab], Output]]


class Spawn(NamedTuple):
    """A group of ranks that are started together."""

    family: str
    world_size: int


# The reference runs these too and must give the same results.
CORE: Scenarios = {
    "surgery-weighted-conflict": partial(surgery, mode="weighted", threshold=ALWAYS),
    "trajectory-accumulate1-unclipped": partial(trajectory, accumulation=1, max_norm=NO_CLIP),
    "trajectory-accumulate2-clipped": partial(trajectory, accumulation=2, max_norm=0.05, persistence=0),
    "untouched": untouched,
    "layers": partial(surgery, mode="weighted", threshold=SOME, surgery_scope="layer"),
    "layers-bf16": partial(surgery, mode="weighted", threshold=SOME, surgery_scope="layer", dtype="bfloat16"),
    "scopes": scopes,
    "buffer-bf16": partial(surgery, mode="weighted", threshold=ALWAYS, gradient_buffer="bf16"),
    "buffer-cpu": partial(
        surgery, mode="weighted", threshold=SOME, gradient_buffer="cpu", surgery_scope="layer"
    ),
    "joint": joint,
    "joint-bf16": partial(joint, dtype="bfloat16"),
    "pi0-accumulate2": partial(pi0, accumulation=2),
    "pi0-teacher_kl": partial(pi0, accumulation=2, retention_loss="teacher_kl"),
    "bf16": partial(trajectory, accumulation=2, max_norm=0.05, dtype="bfloat16"),
    "tied": partial(trajectory, accumulation=2, max_norm=0.05, tied=True),
    "save_and_resume": save_and_resume,
    "acting": acting,
    "non_finite": non_finite,
    "penalty-ewc": partial(penalised, name="ewc"),
    "penalty-bf16": partial(penalised, name="ewc", dtype="bfloat16"),
    "compact-int8": partial(compact_steps, state="int8"),
    "compact-resume-int8": partial(compact_resume, state="int8"),
}
COMPLETE: Scenarios = {
    **{
        f"surgery-{mode}-{name}": partial(surgery, mode=mode, threshold=threshold)
        for mode in FOLLOWED_BY
        for name, threshold in (("conflict", ALWAYS), ("agreement", NEVER))
    },
    **CORE,
    "trajectory-accumulate1-clipped": partial(trajectory, accumulation=1, max_norm=0.05, persistence=0),
    "trajectory-accumulate2-unclipped": partial(trajectory, accumulation=2, max_norm=NO_CLIP),
    "pi0-accumulate1": partial(pi0, accumulation=1),
    "anchor_stream": anchor_stream,
    "pi0-hidden": partial(pi0, accumulation=2, retention_loss="hidden"),
    "pi0-recompute": partial(pi0, accumulation=2, recompute=True),
    "five-retention-steps": partial(pi0, accumulation=1, kinds="RRRRR"),
    "penalty-l2": partial(penalised, name="l2"),
    "penalty-resume": penalised_resume,
    "compact-bf16": partial(compact_steps, state="bf16"),
    "compact-resume-bf16": partial(compact_resume, state="bf16"),
}
LORA: Scenarios = {
    "lora-plain": partial(lora_trajectory, kind="plain", accumulation=2),
    "lora-bf16": partial(lora_trajectory, kind="plain", dtype="bfloat16"),
    "lora-resume": lora_save_and_resume,
    "lora-scopes": lora_scopes,
}
COMPLETE_LORA: Scenarios = {
    **{f"lora-surgery-{mode}": partial(lora_surgery, mode=mode) for mode in FOLLOWED_BY},
    **LORA,
    **{f"lora-{kind}": partial(lora_trajectory, kind=kind) for kind in ("dora", "mixed", "vision")},
    "lora-recompute": partial(lora_trajectory, kind="plain", recompute=True),
    "lora-penalty": penalised_adapters,
}
# Sharded engines only.
COSTS: Scenarios = {"collectives": collectives, "loading": loading}
ALL_COSTS: Scenarios = COSTS | {
    "memory": memory,
    "failing_rank": failing_rank,
    "lora-costs": lora_costs,
    "host_waits": host_waits,
    "saving": saving,
    "holes": holes,
}


def _from(*written_by: str) -> Scenarios:
    return {f"load_{directory}": partial(load_from, written_by=directory) for directory in written_by}


def _lora_from(*written_by: str) -> Scenarios:
    return {
        f"lora-load_{directory}": partial(lora_load_from, written_by=directory) for directory in written_by
    }


def _penalised_from(written_by: str) -> Scenarios:
    return {f"penalty-load_{written_by}": partial(penalised_load_from, written_by=written_by)}


def _compact_from(written_by: str, state: str = "int8") -> Scenarios:
    load = partial(compact_load_from, written_by=written_by, state=state)
    return {f"compact-load_{written_by}": load}


# In starting order: a spawn reads the checkpoints of earlier ones.
SPAWNS: dict[Spawn, dict[str, Scenarios]] = {
    Spawn("zero", 2): {
        "zero3": COMPLETE
        | COMPLETE_LORA
        | ALL_COSTS
        | {"untouched-without-zeroing": partial(untouched, zeroing=False)},
    },
    Spawn("zero_more", 2): {
        "zero3_offload": CORE | COSTS,
        "zero3_offload_torch": CORE | LORA | {"memory": memory},
        "zero3_bf16": {"bf16": CORE["bf16"]},
        "zero2": CORE | LORA | COSTS | {"penalty-resume": penalised_resume, "host_waits": host_waits},
        "zero2_offload_torch": CORE,
    },
    Spawn("fsdp", 2): {
        "fsdp": COMPLETE
        | COMPLETE_LORA
        | ALL_COSTS
        | _from("zero3_on2", "zero2_on2")
        | _penalised_from("zero2_on2")
        | _compact_from("int8_zero2_on2", "fp32")
        | _lora_from("zero3_on2"),
        "fsdp_offload": CORE | LORA | COSTS,
        "fsdp_kept": {"trajectory-accumulate2-clipped": CORE["trajectory-accumulate2-clipped"]},
    },
    Spawn("zero", 3): {
        "zero3": COMPLETE
        | COMPLETE_LORA
        | ALL_COSTS
        | {"untouched-without-zeroing": partial(untouched, zeroing=False)}
        | _from("zero3_on2", "fsdp_on2")
        | _penalised_from("fsdp_on2")
        | _compact_from("int8_fsdp_on2")
        | _lora_from("fsdp_on2"),
    },
    Spawn("zero_more", 3): {
        "zero3_offload": CORE | _from("zero3_on2"),
        "zero2": CORE | _from("fsdp_on2") | _penalised_from("zero3_on2") | _compact_from("int8_fsdp_on2"),
        "zero2_offload_torch": CORE,
    },
    Spawn("fsdp", 3): {
        "fsdp": COMPLETE
        | COMPLETE_LORA
        | ALL_COSTS
        | _from("fsdp_on2")
        | _lora_from("zero3_on2")
        | _compact_from("int8_zero3_on2"),
        "fsdp_offload": CORE,
    },
    Spawn("fsdp", 4): {
        "hsdp": CORE
        | COSTS
        | {"penalty-resume": penalised_resume}
        | _from("fsdp_on3")
        | _compact_from("int8_fsdp_on3", "bf16")
        | {"lora-plain": LORA["lora-plain"]}
    },
}
# Checkpoints from which others resume.
LOADED = ("zero3_on2", "zero3_on3", "zero2_on2", "fsdp_on2", "fsdp_on3", "hsdp_on4")
COMPACT_LOADED = ("int8_zero2_on2", "int8_fsdp_on2", "int8_zero3_on2", "int8_fsdp_on3")
LORA_LOADED = ("zero3_on2", "zero3_on3", "fsdp_on2", "fsdp_on3", "zero2_on2")
SINGLE: Scenarios = (
    COMPLETE | COMPLETE_LORA | {"host_waits": host_waits} | _from(*LOADED) | _lora_from(*LORA_LOADED)
)


class Ranks(NamedTuple):
    """A kind of engine on a number of ranks."""

    kind: str
    world_size: int


EVERY = {Ranks(kind, spawn.world_size): spawn for spawn, kinds in SPAWNS.items() for kind in kinds}


WITH_ALL = {
    Ranks("zero3_offload_torch", 2),
    Ranks("zero2_offload_torch", 2),
    Ranks("zero3_offload", 3),
    Ranks("zero2_offload_torch", 3),
    Ranks("fsdp_offload", 3),
}
"""Run with --all only: offload by torch's optimizer, and on three ranks."""
_ON_TWO_RANKS = (
    *(name for name in COMPLETE if name.startswith("surgery-") and name not in CORE),
    *(name for name in COMPLETE_LORA if name not in LORA),
    "trajectory-accumulate1-clipped",
    "trajectory-accumulate2-unclipped",
    "pi0-accumulate1",
    "pi0-hidden",
    "pi0-recompute",
    "layers-bf16",
    "joint-bf16",
    "penalty-l2",
    "penalty-bf16",
    "lora-bf16",
    "saving",
    "holes",
    "compact-bf16",
    "compact-resume-bf16",
    "host_waits",
)
"""Variants of what three ranks run too: with --all on three ranks as well."""


def by_default(ranks: Ranks, name: str) -> bool:
    """Return True for a scenario that runs without --all."""
    return ranks not in WITH_ALL and (ranks.world_size < 3 or name not in _ON_TWO_RANKS)


def every(*scenarios: str):
    """Parametrise a test by `ranks` and `name`: each scenario on every engine that runs it."""
    cases = [
        pytest.param(
            ranks,
            name,
            id=f"{ranks.kind}-on{ranks.world_size}-{name}",
            marks=[pytest.mark.sample(0)] * (not by_default(ranks, name)),
        )
        for ranks, spawn in EVERY.items()
        for name in scenarios
        if name in SPAWNS[spawn][ranks.kind]
    ]
    return pytest.mark.parametrize(("ranks", "name"), cases, indirect=["ranks"])
