"""What is compared: every system as a change of one plan, so that nothing but the change differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from pe_app.common.errors import InputError
from pe_app.ct.slabs import SlabConfig
from pe_app.model.losses import AttentionLoss
from pe_app.model.slab_encoder import EncoderConfig
from pe_app.research.baselines.cnn3d import CNN3DConfig
from pe_app.research.baselines.penet import PENetConfig
from pe_app.studies import Study
from pe_app.training.fine_tuning import FineTuning
from pe_app.training.stages import ClassifierTraining, EncoderTraining

Kind = Literal["two stages", "mean of slabs", "maximum of slabs", "end to end", "PENet", "3D CNN"]

PAPER_NEGATIVES = 0.355
"""Negative studies of stage I per annotated positive one: 593 of 1,670 in section 3.1 of the paper."""


_ENHANCED_HU = (-100.0, 300.0)
"""The small plan's HU window: clot and enhanced blood, whose difference fills half of it."""


@dataclass(frozen=True)
class Plan:
    """Everything that decides a system's training.

    Attributes:
        slabs, network, filters, directions: shapes of both stages.
        encoder, classifier: trainings of both stages.
        fine_tuning: of both stages together.
        penet, cnn3d: shapes of the 3D networks. They look at as many slices as both stages together.
        window_batch, study_batch: windows of PENet and studies of the 3D CNN a step.
        label_only: whether stage II also learns from studies without reviewed slices.
    """

    slabs: SlabConfig = field(default_factory=SlabConfig)
    network: EncoderConfig = field(default_factory=EncoderConfig)
    filters: int = 96
    directions: Literal["parallel", "serial"] = "parallel"
    encoder: EncoderTraining = field(default_factory=lambda: EncoderTraining(negative_slabs="matched"))
    classifier: ClassifierTraining = field(default_factory=ClassifierTraining)
    fine_tuning: FineTuning = field(default_factory=FineTuning)
    penet: PENetConfig = field(default_factory=PENetConfig)
    cnn3d: CNN3DConfig = field(default_factory=CNN3DConfig)
    window_batch: int = 8
    study_batch: int = 4
    label_only: bool = True

    def seeded(self, seed: int) -> Plan:
        """The same with other first weights, order and draws; the split stays."""
        return replace(
            self,
            encoder=replace(self.encoder, seed=seed),
            classifier=replace(self.classifier, seed=seed),
            fine_tuning=replace(self.fine_tuning, seed=seed),
        )

    def baseline(self, batch: int, epochs: int) -> ClassifierTraining:
        """The training of a 3D network: all but its length is that of stage II."""
        return replace(self.classifier, epochs=epochs, batch=batch, pooled=False)


def small_plan(matrix: int = 256, crop: int = 192, slab_count: int = 16) -> Plan:
    """A plan for two processor cores: a quarter of the pixels, a quarter of the channels, a third of the slabs [ours].

    Slices of a slab lie 2.5 mm apart in both stages, because with few slabs the paper's way would put stage II's far
    from stage I's; the learning rate is higher and falls, and the statistics of batch normalisation are estimated
    anew, because so few steps are made. All networks look through a window in which clot and blood differ: what the
    full one learns from thousands of slices, a small one from a few hundred does not.

    Raises:
        InputError: if the crop is no multiple of 64 or larger than the matrix, or the number of slabs is odd.
    """
    if crop % 64 or not 0 < crop <= matrix or slab_count % 2:
        raise InputError(
            f"a crop of {crop} from {matrix} pixels and {slab_count} slabs: the crop must be a multiple of 64 and fit "
            "the matrix (both stages halve it), the number of slabs even (the 3D CNN halves the slices three times)"
        )
    return Plan(
        SlabConfig(matrix=matrix, crop=crop, slab_count=slab_count, slab_spacing="physical", hu_window=_ENHANCED_HU),
        EncoderConfig(width=16),
        filters=16,
        encoder=EncoderTraining(
            learning_rate=1e-3, batch=16, epochs=12, negative_slabs="matched", schedule="cosine", fresh_statistics=True
        ),
        classifier=ClassifierTraining(
            learning_rate=1e-3, batch=8, epochs=8, schedule="cosine", fresh_statistics=True
        ),
        fine_tuning=FineTuning(learning_rate=1e-5, batch=4, epochs=4, gradient_slabs=6),
        penet=PENetConfig(resize=crop // 2 + 8, crop=crop // 2, width=16, groups=8, hu_window=_ENHANCED_HU, mean=0.0),
        cnn3d=CNN3DConfig(width=16, filters=16),
    )  # fmt: skip


@dataclass(frozen=True)
class System:
    """One row of the comparison.

    Attributes:
        name: word on the command line and folder.
        title: in tables.
        kind: how a study's probability comes about.
        change: what differs from scenario 3.
        paper_auc: what the paper measured on its own studies, None where it did not.
        beyond: whether it is an option beyond the paper.
    """

    name: str
    title: str
    kind: Kind = "two stages"
    change: Callable[[Plan], Plan] = lambda plan: plan
    paper_auc: float | None = None
    beyond: bool = False


def _attention_weight(weight: float) -> Callable[[Plan], Plan]:
    return lambda plan: replace(plan, encoder=replace(plan.encoder, attention_weight=weight))


def _other_spacing(plan: Plan) -> Plan:
    other: Literal["lung", "physical"] = "physical" if plan.slabs.slab_spacing == "lung" else "lung"
    return replace(plan, slabs=replace(plan.slabs, slab_spacing=other))


REFERENCE = "scenario3"
"""What every other system is compared with: the paper's proposal."""

SYSTEMS = (
    System(REFERENCE, "scenario 3, the proposal: attention loss, label-only studies", paper_auc=0.812),
    System(
        "scenario1", "scenario 1: attention loss, no label-only studies",
        change=lambda plan: replace(plan, label_only=False), paper_auc=0.739,
    ),
    System(
        "scenario2", "scenario 2: no attention loss, label-only studies", change=_attention_weight(0.0),
        paper_auc=0.643,
    ),
    System("slab_mean", "mean of the slab probabilities", "mean of slabs"),
    System("slab_maximum", "maximum of the slab probabilities", "maximum of slabs"),
    System("penet", "PENet", "PENet"),
    System("cnn3d", "3D CNN", "3D CNN", paper_auc=0.787),
    System("end_to_end", "both stages fine-tuned together", "end to end", beyond=True),
    System(
        "densenet121", "DenseNet121 encoder",
        change=lambda plan: replace(plan, network=replace(plan.network, architecture="densenet121")), beyond=True,
    ),
    System("lambda_0.1", "attention weight 0.1", change=_attention_weight(0.1), beyond=True),
    System("lambda_0.3", "attention weight 0.3", change=_attention_weight(0.3), beyond=True),
    System("lambda_3", "attention weight 3", change=_attention_weight(3.0), beyond=True),
    System("spacing", "the other slab spacing", change=_other_spacing, beyond=True),
    System(
        "soft_dice", "soft Dice attention loss",
        change=lambda plan: replace(
            plan, encoder=replace(plan.encoder, attention_loss=AttentionLoss("soft_dice"))
        ), beyond=True,
    ),
    System("serial", "serial ConvLSTM", change=lambda plan: replace(plan, directions="serial"), beyond=True),
)  # fmt: skip


def choose_systems(names: Sequence[str] = ()) -> tuple[System, ...]:
    """The named systems in their order, all of them where none is named; the reference is always among them.

    Raises:
        InputError: if a name is unknown.
    """
    known = [system.name for system in SYSTEMS]
    for name in names:
        if name not in known:
            raise InputError(f"unknown system {name!r}: the systems are {', '.join(known)}")
    return tuple(system for system in SYSTEMS if not names or system.name in {*names, REFERENCE})


def core_studies(studies: Sequence[Study]) -> tuple[Study, ...]:
    """What scenario 1 and every stage I learn from: annotated studies, and negative ones for their slabs.

    Where few negative studies are annotated, label-only ones join, on either side of the split as many as the paper
    had for its annotated positive studies (0.355 to 1).
    """
    chosen = {study.study for study in studies if study.annotation is not None}
    for side in ("train", "validation"):
        here = [study for study in studies if study.split == side]
        positive = sum(study.study in chosen and study.label == "positive" for study in here)
        negative = sum(study.study in chosen and study.label == "negative" for study in here)
        others = [study.study for study in here if study.label == "negative" and study.study not in chosen]
        chosen |= set(others[: max(round(PAPER_NEGATIVES * positive), 1) - negative]) if negative == 0 else set()
    return tuple(study for study in studies if study.study in chosen)
