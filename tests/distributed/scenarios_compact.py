"""Moments in bf16 and 8 bits: steps, a checkpoint, and resuming from those of others."""

from lab import Lab, Output, masters, moments
from scenarios import _steps, load_from, save_and_resume

from craft_ds.engines.compact_adam import CompactAdam


def compact_steps(lab: Lab, state: str) -> Output:
    """Six steps of both kinds of a tiny pi0_fast."""
    engine, output = lab.pi0_engine(persistence=0, lr=1e-3, optimizer_state=state), Output()
    assert isinstance(engine.optimizer, CompactAdam)
    output.add("start", masters(engine))
    _steps(
        engine,
        lambda step: lab.pi0_batches(step, 2),
        lambda step: lab.pi0_batches(step + 100, 2),
        output,
        "TRTRRT",
        max_norm=1.0,
    )
    output.add("parameters", masters(engine))
    output.add("moments", moments(engine))
    stored = [values for each in engine.optimizer.state.values() for values in each.values()]
    output.values["masters"] = [part.double().sum().item() for part in engine.masters()]
    output.values["dtypes"] = sorted({str(values.dtype) for values in stored if not isinstance(values, int)})
    engine.close()
    return output


def compact_resume(lab: Lab, state: str) -> Output:
    """`save_and_resume` with these moments."""
    return save_and_resume(lab, state, f"{state}_")


def compact_load_from(lab: Lab, written_by: str, state: str) -> Output:
    """`load_from` with these moments."""
    return load_from(lab, written_by, state)
