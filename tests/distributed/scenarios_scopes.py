"""Surgery by layer, λ per task, a scaled retention part, and both losses in one gradient, on all ranks."""

from lab import Lab, Output, craft_config, masters, moments
from scenarios_lora import PLAIN, adapters_of
from toy import toy_loss_by_task

from craft_ds.engines.base import Engine, Loss
from craft_ds.engines.single import SingleEngine
from craft_ds.policies.pi0_fast.retention import by_task
from craft_ds.policies.token_loss import token_loss
from craft_ds.training.joint_step import joint_step
from craft_ds.training.train_step import retention_step, task_step

SOME = -0.15  # some layers of the toy policy conflict, others do not


def _train(
    engine: Engine, task, anchors, loss: Loss, multipliers: tuple[float, ...], max_norm: float
) -> Output:
    """Four steps; every other one measures the constraint on separate anchors."""
    output = Output()
    for step in range(4):
        if step == 1:
            result = task_step(engine, task(step), max_norm)
            output.values[f"step{step}"] = [result.loss, result.grad_norm]
            continue
        result = retention_step(
            engine,
            task=task(step),
            anchors=anchors(step),
            constraint=anchors(step + 50) if step % 2 else None,
            multiplier=multipliers,
            craft=craft_config(threshold=SOME, surgery_scope="layer"),
            max_norm=max_norm,
            anchor_loss=loss,
            retention_scale=3.0,
        )
        assert result.applied
        output.values[f"retention{step}"] = [result.retention_loss, *result.triple]
        output.values[f"step{step}"] = [result.loss, *result.task_losses, *result.merged]
    output.add("parameters", (part for part in masters(engine)))
    output.add("moments", moments(engine))
    engine.close()
    return output


def scopes(lab: Lab) -> Output:
    """Train the toy policy."""
    return _train(
        lab.toy_engine(persistence=0),
        lambda step: lab.toy_batches(step, 2),
        lambda step: lab.toy_batches(step, 3, retention=True),
        toy_loss_by_task,
        (0.5, 2.0, 0.1),
        max_norm=0.05,
    )


def joint(lab: Lab, dtype: str = "float32") -> Output:
    """Train the toy policy with both losses in one gradient; on the reference in two."""
    engine, output = lab.toy_engine(persistence=0, dtype=dtype), Output()
    for step in range(5):
        if step == 1:
            assert task_step(engine, lab.toy_batches(step, 2), 0.05).applied
            continue
        anchors = lab.toy_batches(step, 3, retention=True)
        by_tasks = step == 3
        given = {
            "task": lab.toy_batches(step, 2),
            "anchors": anchors,
            "constraint": lab.toy_batches(step + 50, 1, retention=True) if step % 2 else None,
            "multiplier": (0.5, 2.0, 0.1) if by_tasks else 0.7,
            "craft": craft_config(
                "equal" if step == 2 else "weighted",
                use_grad_projection=False,
                multiplier_scope="task" if by_tasks else "global",
            ),
            "max_norm": 0.05 if step else 0.0,
            "anchor_loss": toy_loss_by_task if by_tasks else token_loss,
        }
        if isinstance(engine, SingleEngine):
            result = retention_step(engine, **given)
        else:
            tokens = sum(int(batch["mask"].sum()) for batch in anchors)
            result = joint_step(engine, anchor_tokens=tokens, **given)
        assert result.applied
        output.values[f"step{step}"] = [
            *(result.loss, result.grad_norm, result.retention_loss),
            *result.task_losses,
            *result.merged[:2],
        ]
    output.add("parameters", (part for part in masters(engine)))
    output.add("moments", moments(engine))
    engine.close()
    return output


def lora_scopes(lab: Lab) -> Output:
    """Train adapters of the tiny pi0_fast."""
    engine, _ = lab.lora_engine(PLAIN, adapters_of(lab, "plain"), persistence=0)
    return _train(
        engine,
        lambda step: lab.pi0_batches(step, 1),
        lambda step: lab.pi0_batches(step + 100, 2),
        by_task("token_ce", 2),
        (0.5, 2.0),
        max_norm=1.0,
    )
