"""What a model's attention looks like: the studies where it is best and worst, some at random, and false alarms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pe_app.common.errors import InputError
from pe_app.common.progress import Progress, ProgressCallback, silent
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import read_volume, resample_like
from pe_app.evaluation.evaluate import MODEL, ModelEvaluation, Prediction
from pe_app.evaluation.predictions import PredictionFile
from pe_app.evaluation.study_localisation import Look, StudyTruth, read_truth
from pe_app.results.pictures import PE_WINDOW_HU

PER_KIND = 3
"""Studies of each kind that are pictured."""

BACKGROUND, INK, MUTED, OUTLINE = "#14181d", "#e8ecf0", "#8d99a6", "#4fd1ff"


@dataclass(frozen=True, eq=False)
class View:
    """One slice: CT in HU, the outline of the embolism and the attention, each ``(rows, columns)``.

    Attributes:
        title: what slice this is.
        ct_hu: the CT.
        outline: None where no mask is known for this slice.
        attention: attention times slab probability, from 0 to 1.
        aspect: height of a pixel divided by its width.
    """

    title: str
    ct_hu: NDArray[np.generic]
    outline: NDArray[np.bool_] | None
    attention: NDArray[np.float32]
    aspect: float


@dataclass(frozen=True, eq=False)
class StudyPicture:
    """A study in two slices.

    Attributes:
        title: the study, its label and probability, how well the attention fits.
        embolism: the slice with the largest outline; None where no mask is known.
        strongest: the slice where the attention is strongest; None where it is empty.
    """

    title: str
    embolism: View | None
    strongest: View | None


def choose_studies(model: ModelEvaluation, seed: int = 0) -> dict[str, tuple[Prediction, ...]]:
    """Studies worth a picture, by heading; no study twice.

    Positive studies are ranked by the share of the attention inside the mask where masks are known, else by
    probability; of negative ones the most suspicious are taken.
    """
    positive = [prediction for prediction in model.analysed if prediction.positive]
    masked = [prediction for prediction in positive if len(prediction.localisation[MODEL].energy)]
    ranked = sorted(masked or positive, key=_energy if masked else _probability, reverse=True)
    count = min(PER_KIND, max(1, len(ranked) // 3))
    best, rest = ranked[:count], ranked[count:]
    worst = rest[-count:]
    between = rest[: len(rest) - len(worst)]
    order = np.random.default_rng(seed).permutation(len(between))[:PER_KIND]
    negative = sorted((p for p in model.analysed if not p.positive), key=_probability, reverse=True)
    by = "attention inside the mask" if masked else "probability; no masks are known"
    kinds = {
        f"Best with embolism (by {by})": best,
        f"Worst with embolism (by {by})": worst,
        "Drawn at random, with embolism": [between[k] for k in sorted(order)],
        "Without embolism, highest probability": negative[:PER_KIND],
    }
    return {kind: tuple(chosen) for kind, chosen in kinds.items() if chosen}


def draw_pictures(
    model: ModelEvaluation,
    kept: PredictionFile,
    masks: Path | None,
    seed: int = 0,
    progress: ProgressCallback = silent,
) -> dict[str, Figure]:
    """One figure a kind of study, by heading; each row is a study."""
    chosen = choose_studies(model, seed)
    total = sum(map(len, chosen.values()))
    figures, done = {}, 0
    for kind, predictions in chosen.items():
        pictures = []
        for prediction in predictions:
            progress(Progress(f"pictures of {model.name}", done, total, prediction.study.study))
            picture = _picture(model, prediction, kept, masks)
            pictures += [picture] if picture else []
            done += 1
        if pictures:
            figures[kind] = _figure(pictures)
    progress(Progress(f"pictures of {model.name}", total, total))
    return figures


def _energy(prediction: Prediction) -> float:
    return float(prediction.localisation[MODEL].energy.mean())


def _probability(prediction: Prediction) -> float:
    return prediction.probability or 0.0


def _picture(
    model: ModelEvaluation, prediction: Prediction, kept: PredictionFile, masks: Path | None
) -> StudyPicture | None:
    """None where the CT has gone since it was detected."""
    analysis = kept.get(model.sha256, prediction.image_sha256)
    if analysis is None or analysis.maps is None or analysis.grid is None:
        return None
    try:
        volume = read_volume(prediction.study.path)
    except (InputError, OSError):
        return None
    try:
        truth = read_truth(prediction.study, volume, masks)
    except (InputError, OSError):
        truth = None
    look = Look.of_model(analysis.detection, analysis.maps, analysis.grid)
    attention = look.grid.with_voxels(look.maps.astype(np.float32))
    title = f"{prediction.study.study}: labelled {prediction.study.label}, probability {_probability(prediction):.2f}"
    if len(prediction.localisation[MODEL].energy):
        title += f", {_energy(prediction):.0%} of the attention inside the mask"
    embolism = strongest = None
    if truth is not None:
        largest = int(np.count_nonzero(truth.mask.voxels, axis=(1, 2)).argmax())
        embolism = _view("largest outline", largest, volume, attention, truth)
    if look.maps.any():
        slab = int(look.maps.max(axis=(1, 2)).argmax())
        index = volume.nearest_slice(float(look.grid.slice_z_mm[slab]))
        title_of_slab = f"strongest attention, slab probability {look.slab_scores[slab]:.2f}"
        strongest = _view(title_of_slab, index, volume, attention, truth)
    return StudyPicture(title, embolism, strongest)


def _view(what: str, index: int, volume: Volume, attention: Volume, truth: StudyTruth | None) -> View:
    affine = volume.affine.copy()
    affine[:3, 3] = volume.to_lps_mm((index, 0, 0))
    plane = Volume(np.zeros((1, *volume.shape[1:]), np.uint8), affine)
    on_slice = resample_like(attention, plane).voxels[0].astype(np.float32)
    outline = None
    if truth is not None and (truth.reviewed is None or index in truth.reviewed):
        outline = np.greater(truth.mask.voxels[index], 0)
    z_mm = volume.slice_z_mm[index]
    title = f"slice {index}, z {z_mm:.0f} mm: {what}"
    if truth is not None and outline is None:
        title += " (not reviewed)"
    return View(title, volume.voxels[index], outline, on_slice, volume.spacing_mm[1] / volume.spacing_mm[2])


def _figure(pictures: Sequence[StudyPicture]) -> Figure:
    """Rows of studies; columns: CT and its outline and attention on the slice of the embolism, then the strongest."""
    height = 4.35 * len(pictures) + 0.2
    figure = Figure(figsize=(15, height), dpi=80, facecolor=BACKGROUND)
    cells = figure.add_gridspec(
        len(pictures), 4, left=0.005, right=0.995, bottom=0.15 / height, top=1 - 0.65 / height, wspace=0.02, hspace=0.19
    )
    for row, picture in enumerate(pictures):
        columns = [figure.add_subplot(cells[row, column]) for column in range(4)]
        for axes in columns:
            axes.set_axis_off()
        columns[0].text(
            0, 1.115, picture.title, color=INK, fontsize=12, weight="bold", transform=columns[0].transAxes, va="bottom"
        )
        for view, absent, (plain, overlaid) in (
            (picture.embolism, "no mask is known", columns[:2]),
            (picture.strongest, "the attention map is empty", columns[2:]),
        ):
            if view is None:
                plain.text(0.5, 0.5, absent, color=MUTED, fontsize=11, ha="center", transform=plain.transAxes)
                continue
            _draw(plain, view)
            plain.set_title(view.title, color=INK, fontsize=10, loc="left")
            _draw(overlaid, view)
            strength = np.clip(1.2 * view.attention - 0.1, 0, 0.6)
            overlaid.imshow(view.attention, cmap="inferno", vmin=0, vmax=1, alpha=strength, aspect=view.aspect)
            if view.outline is not None and view.outline.any():
                overlaid.contour(view.outline, levels=(0.5,), colors=OUTLINE, linewidths=1.0)
    return figure


def _draw(axes: Axes, view: View) -> None:
    low, high = PE_WINDOW_HU
    axes.imshow(view.ct_hu, cmap="gray", vmin=low, vmax=high, aspect=view.aspect, interpolation="bilinear")
