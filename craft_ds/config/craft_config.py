"""The flags `--craft.*` as a dataclass. Imports neither torch nor LeRobot."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from craft_ds.config.checks import check_choice, require
from craft_ds.config.craft_rules import check_rules

RetentionLossName = Literal["token_ce", "teacher_tokens", "teacher_kl", "hidden"]
ProjectionMode = Literal["weighted", "equal", "task_priority"]
Merging = Literal["guide", "pcgrad", "agem", "cagrad", "mgda", "upgrad"]
MultiplierRule = Literal["ascent", "nupi", "dynamic_barrier", "fixed"]
EpsilonSchedule = Literal["linear", "cosine", "exponential"]
ConstraintSplit = Literal["heldout", "train"]
SurgeryScope = Literal["global", "layer"]
MultiplierScope = Literal["global", "task"]
RetentionScale = Literal["none", "freq"]
AnchorAugmentationName = Literal["none", "lerobot"]
GradientBuffer = Literal["device", "bf16", "cpu"]


def split_directories(text: str) -> list[str]:
    """Return the directories of a list that is separated by commas, with a leading `~` expanded."""
    return [str(Path(part.strip()).expanduser()) for part in text.split(",") if part.strip()]


@dataclass
class CraftConfig:
    """Constrained Retention Fine-Tuning: the flags `--craft.*`."""

    enabled: bool = False
    """Run CRaFT; false is the plain baseline (the same loop without anchors)."""
    anchor_cache_dir: str = ""
    """Directory of the anchor cache that `craft-ds anchors` wrote, or several, separated by commas: the tasks
    of all of them are preserved."""
    retention_loss: RetentionLossName = "token_ce"
    """Loss on anchors: `token_ce` (cross-entropy of the recorded action tokens), or a distance from the
    teacher's own outputs, which the cache must hold (`craft-ds anchors --targets`): `teacher_tokens`
    (cross-entropy of its greedy tokens), `teacher_kl` (KL divergence from its next-token distributions, in
    nats) or `hidden` (squared distance of pooled features, relative). ε is in the unit of this loss."""
    anchor_batch_size: int = 16
    """Anchors per rank and retention step for the retention gradient."""
    retention_freq: int = 5
    """K: every K-th step is a retention step. Between them λ has no effect, so the mean retention weight
    is λ/K where gradients are not clipped; see `retention_scale`."""
    initial_lambda: float = 1.0
    """λ before the first retention step."""
    lambda_lr: float = 0.01
    """Step size of the dual ascent, in λ per unit of loss."""
    lambda_max: float = 10.0
    """Upper bound of λ."""
    epsilon_start: float = 1.0
    """ε at step 0; see `epsilon_relative` for its unit."""
    epsilon_end: float = 0.1
    """ε after `epsilon_decay_steps`."""
    epsilon_decay_steps: int = 0
    """Optimizer steps over which ε falls; 0 means all training steps."""
    use_grad_projection: bool = True
    """Project the task gradient g_t off the retention gradient g_r when they conflict."""
    conflict_threshold: float = -0.1
    """The two gradients conflict when their cosine is below this."""
    projection_mode: ProjectionMode = "weighted"
    """Rule that merges g_t and g_r: `weighted`, `equal` or `task_priority`."""
    epsilon_schedule: EpsilonSchedule = "linear"
    """Shape of the decay of ε: `linear`, `cosine` or `exponential`."""
    epsilon_relative: bool = False
    """Give ε in multiples of the teacher's own loss on the anchors that measure the constraint, as the
    anchor cache records it: 1.1 allows a tenth more than the teacher's loss."""
    constraint_split: ConstraintSplit = "heldout"
    """Anchors that measure L_ret: `heldout` (episodes that are never trained on; one more forward pass per
    retention step) or `train` (the anchors just drawn)."""
    constraint_freq: int = 1
    """m: L_ret is measured in every m-th retention step, and λ and an adaptive interval change in these steps
    alone. With `constraint_split=heldout` the measurement is one more forward pass."""
    merging: Merging = "guide"
    """Rule that merges g_t and g_r: `guide` (`projection_mode` and `use_grad_projection`), or as published
    `pcgrad`, `agem`, `cagrad`, `mgda` or `upgrad`. `agem` and `mgda` have no λ."""
    cagrad_c: float = 0.5
    """c of `--craft.merging=cagrad`: distance of the merged gradient from the mean, relative to its norm."""
    multiplier: MultiplierRule = "ascent"
    """Rule for λ: `ascent` (dual ascent), `nupi` (a PI controller), `dynamic_barrier` (computed in every
    retention step from the gradients) or `fixed` (always `initial_lambda`)."""
    nupi_nu: float = 0.0
    """ν of `--craft.multiplier=nupi`: smoothing of L_ret − ε, in (-1, 1); 0: none."""
    nupi_kp: float = 1.0
    """κp of `--craft.multiplier=nupi`: proportional gain, which damps λ."""
    nupi_ki: float = 1.0
    """κi of `--craft.multiplier=nupi`: integral gain."""
    barrier_beta: float = 1.0
    """β of `--craft.multiplier=dynamic_barrier`: decrease of L_ret that is asked for, as a squared gradient
    norm per unit of loss above ε."""
    surgery_scope: SurgeryScope = "global"
    """Merge the complete gradients as one (`global`), or each layer by its own Gram triple (`layer`):
    conflict, projection and weights are those of the layer, clipping is of all layers together."""
    gradient_buffer: GradientBuffer = "device"
    """Where g_t waits during the second backward pass: `device` (4 bytes per trainable parameter / ranks),
    `bf16` (half of that; g_t of retention steps is rounded to 8 bits of mantissa) or `cpu` (in host memory,
    with the same result)."""
    multiplier_scope: MultiplierScope = "global"
    """One λ for all old tasks (`global`), or one for each (`task`): each task's loss is weighted by its λ,
    which follows the task's own L_ret and ε (with `epsilon_relative`, a multiple of its own L0)."""
    retention_scale: RetentionScale = "none"
    """`freq` multiplies what λ adds to the gradient by the steps since the last retention step, after the
    factor of clipping is computed: the mean retention weight is that of K = 1. `none`: a retention step is
    clipped like any other and weighs no more than a task step."""
    retention_freq_max: int = 0
    """Upper bound of an adaptive interval between retention steps, above `retention_freq`; 0: off. The
    interval doubles while L_ret ≤ ε and is `retention_freq` again after a violation."""
    vision_features: bool = False
    """Read the vision tower's features of the anchors' images from the cache instead of running the tower.
    The cache must hold them (`craft-ds anchors --vision_features`) for this policy's tower, and the tower
    must be frozen."""
    anchor_augmentation: AnchorAugmentationName = "none"
    """Augmentation of the images of anchors that give the gradient: `none`, or `lerobot` (the transforms of
    `--dataset.image_transforms.*`, whether or not they are enabled for the task data)."""

    @property
    def anchor_caches(self) -> list[str]:
        """Directories of the anchor caches."""
        return split_directories(self.anchor_cache_dir)

    @property
    def adds_losses(self) -> bool:
        """True if the weights of g_t and g_r are known before a retention step.

        Both losses then accumulate in one gradient. `retention_scale` needs the norms of both.
        """
        known = self.merging == "guide" and not self.use_grad_projection
        return known and self.multiplier != "dynamic_barrier" and self.retention_scale == "none"

    def validate(self) -> None:
        """Check every field that CRaFT would use.

        Raises:
            UserError: Names the flag, its value and what it must be.
        """
        if not self.enabled:
            return
        require(
            bool(self.anchor_caches),
            "--craft.enabled=true needs --craft.anchor_cache_dir (`craft-ds anchors` builds one)",
        )
        for name in ("anchor_batch_size", "retention_freq", "constraint_freq"):
            value = getattr(self, name)
            require(value >= 1, f"--craft.{name}={value} must be at least 1")
        for name in ("initial_lambda", "lambda_lr", "lambda_max", "epsilon_end", "epsilon_decay_steps"):
            value = getattr(self, name)
            require(value >= 0, f"--craft.{name}={value} must not be negative")
        require(
            self.initial_lambda <= self.lambda_max,
            f"--craft.initial_lambda={self.initial_lambda} exceeds --craft.lambda_max={self.lambda_max}",
        )
        require(
            self.epsilon_start >= self.epsilon_end,
            f"--craft.epsilon_start={self.epsilon_start} is below --craft.epsilon_end={self.epsilon_end}: "
            "the constraint may only tighten, so set epsilon_start >= epsilon_end",
        )
        require(
            -1.0 <= self.conflict_threshold <= 1.0,
            f"--craft.conflict_threshold={self.conflict_threshold} is a cosine and must lie in [-1, 1]",
        )
        check_choice("--craft.retention_loss", self.retention_loss, RetentionLossName)
        require(
            not (self.epsilon_relative and self.retention_loss in ("teacher_kl", "hidden")),
            f"--craft.epsilon_relative=true: the teacher's own {self.retention_loss} is 0 and ε cannot be a "
            "multiple of it; give an absolute ε, such as --craft.epsilon_start=0.1 --craft.epsilon_end=0.1",
        )
        check_choice("--craft.projection_mode", self.projection_mode, ProjectionMode)
        check_choice("--craft.epsilon_schedule", self.epsilon_schedule, EpsilonSchedule)
        check_choice("--craft.constraint_split", self.constraint_split, ConstraintSplit)
        require(
            self.epsilon_schedule != "exponential" or self.epsilon_end > 0,
            "--craft.epsilon_schedule=exponential needs --craft.epsilon_end above 0",
        )
        check_choice("--craft.anchor_augmentation", self.anchor_augmentation, AnchorAugmentationName)
        if self.anchor_augmentation != "none":
            flag = f"--craft.anchor_augmentation={self.anchor_augmentation}"
            require(
                not self.vision_features,
                f"{flag} changes images, which --craft.vision_features=true does not read: omit one of them",
            )
            require(
                self.constraint_split == "heldout",
                f"{flag} with --craft.constraint_split=train would measure the constraint on changed images: "
                "omit one of them",
            )
        check_choice("--craft.merging", self.merging, Merging)
        check_choice("--craft.multiplier", self.multiplier, MultiplierRule)
        check_choice("--craft.surgery_scope", self.surgery_scope, SurgeryScope)
        check_choice("--craft.gradient_buffer", self.gradient_buffer, GradientBuffer)
        check_choice("--craft.multiplier_scope", self.multiplier_scope, MultiplierScope)
        check_choice("--craft.retention_scale", self.retention_scale, RetentionScale)
        require(
            self.retention_freq_max == 0 or self.retention_freq_max > self.retention_freq,
            f"--craft.retention_freq_max={self.retention_freq_max} must be 0 (off) or above "
            f"--craft.retention_freq={self.retention_freq}",
        )
        check_rules(self)
