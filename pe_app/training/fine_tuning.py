"""Both stages learn together from study labels, after stage II has converged: what the authors left for later [ours].

A study's 50 slabs do not fit into memory with their gradients. In every step a few slabs, drawn at random, carry the
gradient into the encoder; the others are looked at without. Batch normalisation of the encoder keeps its statistics.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pe_app.common import distributed
from pe_app.common.device import autocast, best_device
from pe_app.common.errors import InputError
from pe_app.common.progress import ProgressCallback, silent
from pe_app.ct.lungs import lung_range
from pe_app.ct.slabs import study_slabs
from pe_app.ct.volume import Volume
from pe_app.model.detector import SLABS_AT_ONCE, Detector, ModelCard, TrainingRecord
from pe_app.model.slab_encoder import SlabEncoder
from pe_app.model.study_classifier import StudyClassifier
from pe_app.studies import Study
from pe_app.training.datasets import StudyItem, prepare_arrays, read_sources
from pe_app.training.loop import ItemMetrics, fit
from pe_app.training.run import TrainingRun
from pe_app.training.stages import (
    LABELS,
    SIDES,
    ClassifierTraining,
    check_apart,
    check_labels,
    flat_settings,
    labelled_studies,
    network_shapes,
    published,
    run_folder,
    split,
    training_identity,
    training_record,
)


@dataclass(frozen=True)
class FineTuning(ClassifierTraining):
    """How both stages are trained together; all defaults are [ours], the other fields are those of stage II.

    Attributes:
        batch: studies per train step.
        gradient_slabs: slabs per study that carry the gradient into the encoder, anew in every step.
    """

    learning_rate: float = 1e-5
    batch: int = 2
    epochs: int = 5
    gradient_slabs: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradient_slabs < 1:
            raise InputError(f"gradient_slabs must be at least 1, got {self.gradient_slabs}")


class JointNetwork(nn.Module):
    """Both stages as one network; the encoder always in evaluation mode."""

    def __init__(self, encoder: SlabEncoder, classifier: StudyClassifier) -> None:
        super().__init__()
        self.encoder, self.classifier = encoder, classifier

    def train(self, mode: bool = True) -> JointNetwork:
        """As every network, but the running statistics of the encoder stay."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, slabs: Tensor, learning: Tensor) -> Tensor:
        """Logits ``(batch,)`` of studies ``(batch, slabs, slices_per_slab, crop, crop)``.

        ``learning`` numbers the slabs whose gradient reaches the encoder.
        """
        batch, count = slabs.shape[:2]
        quiet = torch.tensor([slab for slab in range(count) if slab not in set(learning.tolist())], dtype=torch.long)
        with torch.no_grad():
            parts = [self._encode(slabs[:, some]) for some in torch.split(quiet, SLABS_AT_ONCE) if len(some)]
        if len(learning):
            parts.append(self._encode(slabs[:, learning]))
        order = torch.cat([quiet, learning]).argsort().to(slabs.device)
        logits: Tensor = self.classifier(torch.cat(parts, 1)[:, order].reshape(batch, count, *parts[0].shape[2:]))
        return logits

    def _encode(self, slabs: Tensor) -> Tensor:
        flat = slabs.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        features: Tensor = self.encoder(flat).features
        return features.reshape(*slabs.shape[:2], *features.shape[1:])


def train_end_to_end(
    studies: Sequence[Study],
    model: str | Path,
    out: str | Path,
    *,
    settings: FineTuning | None = None,
    synthetic: bool = False,
    run_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    device: torch.device | None = None,
    progress: ProgressCallback = silent,
) -> Detector:
    """Go on training a finished model, both stages together, on the label of every study.

    The same call goes on where a former one was interrupted, and returns the result of one that had finished.

    Args:
        studies: the list, the same as for both stages.
        model: file of a detector with both stages trained.
        out: the fine-tuned detector's file.
        settings: of the training.
        synthetic: recorded in the model card: every embolism was simulated or inserted.
        run_dir: metrics, curves and checkpoint; ``out`` with the suffix ``.run`` by default.
        cache_dir: slabs of the studies, 74 MB each at full size; ``studies`` in the run folder by default.
        device: the best one by default.
        progress: told after every step; may raise ``Cancelled``.

    Raises:
        InputError: if the model is not trained, a study cannot be used, or the run folder is another's.
    """
    if distributed.world_size() > 1:
        raise InputError("both stages together are trained by one process: start it without torchrun")
    settings, out = settings or FineTuning(), Path(out)
    device = device or best_device()
    base = Detector.load(model).to(device)
    if base.card.classifier is None:
        raise InputError(f"model {model}: its stage II is not trained: train both stages first")
    if not isinstance(base.classifier, StudyClassifier):
        raise InputError(f"model {model}: its stage II is pooled evidence: train stage II without --pooled first")
    joint = JointNetwork(base.encoder, base.classifier)
    usable = [study for study in split(studies, settings) if study.label in LABELS and study.split in SIDES]
    check_labels(usable)

    def pixels(volume: Volume) -> NDArray[np.float16]:
        return study_slabs(volume, lung_range(volume), base.slabs).pixels.astype(np.float16)

    with TrainingRun(run_folder(out, run_dir), "train end to end", settings.epochs, progress) as run:
        sources = read_sources(usable, annotations=False, progress=run.report)
        optimiser = torch.optim.Adam(joint.parameters(), lr=settings.learning_rate)
        more = {"model": base.sha256, "synthetic": str(synthetic)}
        run.resume(training_identity(settings, network_shapes(base), sources, more), joint, optimiser)
        run.keep_settings((settings,))
        if not run.state.published:
            key = hashlib.sha256(json.dumps(["pixels", asdict(base.slabs)]).encode()).hexdigest()
            kept = Path(cache_dir or run.folder / "studies")
            files = prepare_arrays(sources, "prepare studies", key, pixels, kept, run.report)
            train, validation = (labelled_studies(usable, files, side) for side in SIDES)
            check_apart(train.files, validation.files)

            def score(items: StudyItem, generator: torch.Generator | None) -> ItemMetrics:
                count = items.features.shape[1]
                learning = torch.randperm(count, generator=generator)[: settings.gradient_slabs if generator else 0]
                labels = items.label.to(device)
                with autocast(device, settings.precision):
                    logit = joint(items.features.to(device, torch.float32, non_blocking=True), learning.sort().values)
                loss = F.binary_cross_entropy_with_logits(logit, labels.to(logit.dtype), reduction="none")
                return {"loss": loss, "logit": logit, "label": labels}

            fit(run, joint, optimiser, (train, validation), score, settings)
            used = {"end_to_end": True, **flat_settings(asdict(settings))}
            record_json = training_record(run, used, sources, files, device, synthetic=synthetic, terms=base.card.terms)
            run.publish(record_json, joint, optimiser)

        record = TrainingRecord.from_json(json.loads(run.state.published))
        joint.load_state_dict(dict(run.state.best_weights))
        card = ModelCard(out.stem, record.date[:10], encoder=base.card.encoder, classifier=record)
        return published(Detector(base.encoder, base.classifier, base.slabs, card), device, out)
