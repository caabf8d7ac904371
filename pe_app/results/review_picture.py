"""A study as one picture, for mails and documents: coronal projection with the curve, and its strongest slices."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pe_app.ct.volume import Volume
from pe_app.model.detection import NOTICE, Detection
from pe_app.model.detector import DetectionResult
from pe_app.results.pictures import PE_WINDOW_HU, PICTURED_SLICES, Box, attention_on, opacity, strongest_slices
from pe_app.results.words import verdict

if TYPE_CHECKING:  # a detection starts without matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

_BACKGROUND, _INK, _MUTED, _ACCENT, _WARNING = "#14181d", "#e8ecf0", "#8d99a6", "#ffb000", "#ff6b5e"


def review_picture(result: DetectionResult, volume: Volume, name: str) -> bytes:
    """A PNG: the study from the front with the evidence beside it, and its strongest slices, plain and overlaid."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 6.9), dpi=100, facecolor=_BACKGROUND)
    canvas = FigureCanvasAgg(figure)
    columns = figure.add_gridspec(
        2, 2 + PICTURED_SLICES, width_ratios=(1.5, 0.62, *(1.25,) * PICTURED_SLICES),
        left=0.012, right=0.992, top=0.82, bottom=0.04, wspace=0.03, hspace=0.03,
    )  # fmt: skip
    detection = result.detection
    chosen = strongest_slices(detection, volume)
    front = figure.add_subplot(columns[:, 0])
    _draw_front(front, volume, result.attention, chosen)
    _draw_evidence(figure, columns[:, 1], front, detection, volume, chosen)
    box = Box.around_body(volume, chosen)
    for column, slice_index in enumerate(chosen):
        plain = figure.add_subplot(columns[0, 2 + column])
        overlaid = figure.add_subplot(columns[1, 2 + column])
        for axes in (plain, overlaid):
            _draw_slice(axes, volume, slice_index)
            axes.set_xlim(box.left - 0.5, box.right - 0.5)
            axes.set_ylim(box.bottom - 0.5, box.top - 0.5)
            _draw_corners(axes, box, volume)
            axes.set_anchor("N")
        plain.set_title(_slice_title(detection, volume, slice_index), color=_INK, fontsize=9)
        if result.attention is not None:
            _overlay(overlaid, volume, result.attention, slice_index)
    _draw_header(figure, detection, name)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def _draw_header(figure: Figure, detection: Detection, name: str) -> None:
    figure.text(0.012, 0.962, name, color=_INK, fontsize=15, weight="bold", va="center")
    figure.text(0.012, 0.918, verdict(detection), color=_ACCENT, fontsize=13, va="center")
    figure.text(0.99, 0.965, NOTICE, color=_WARNING, fontsize=12, weight="bold", va="center", ha="right")
    codes = ", ".join(reason.code for reason in detection.reasons)
    note = f"model {detection.model.name} {detection.model.version}" + (f"   ({codes})" if codes else "")
    figure.text(0.012, 0.876, note, color=_WARNING if codes else _MUTED, fontsize=10, va="center")


def _draw_front(axes: Axes, volume: Volume, attention: Volume | None, chosen: tuple[int, ...]) -> None:
    slices, rows, columns = volume.shape
    middle = slice(int(0.45 * rows), int(0.55 * rows) + 1)
    coronal = volume.voxels[:, middle, :].astype(np.float32).mean(axis=1)
    aspect = volume.spacing_mm[0] / volume.spacing_mm[2]
    axes.imshow(coronal, cmap="gray", vmin=-700, vmax=400, origin="lower", aspect=aspect, interpolation="bilinear")
    if attention is not None:
        outer = np.array([(0, 0, 0), attention.shape]) - 0.5
        corners = volume.to_index(attention.to_lps_mm(outer))
        extent = (corners[0, 2], corners[1, 2], corners[0, 0], corners[1, 0])
        _show_attention(axes, attention.voxels.max(axis=1).astype(np.float32) / 255, extent, aspect)
    for slice_index in chosen:
        axes.axhline(slice_index, color=_ACCENT, linewidth=0.8, alpha=0.8)
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(-0.5, slices - 0.5)
    axes.set_anchor("C")
    axes.text(0.02, 0.99, "R", color=_INK, transform=axes.transAxes, va="top", fontsize=11)
    axes.text(0.98, 0.99, "L", color=_INK, transform=axes.transAxes, va="top", ha="right", fontsize=11)
    axes.set_title("coronal projection of attention", color=_INK, fontsize=10)
    axes.set_axis_off()


def _draw_evidence(
    figure: Figure, place: SubplotSpec, front: Axes, detection: Detection, volume: Volume, chosen: tuple[int, ...]
) -> None:
    """The slab probabilities next to the coronal projection, at the same levels."""
    front.apply_aspect()
    beside, level = place.get_position(figure), front.get_position()
    axes = figure.add_axes((beside.x0 + 0.006, level.y0, beside.width - 0.045, level.height), facecolor=_BACKGROUND)
    z_mm = volume.slice_z_mm
    if detection.evidence:
        levels = [slab.z_mm for slab in detection.evidence]
        probabilities = [slab.probability for slab in detection.evidence]
        axes.fill_betweenx(levels, 0, probabilities, color=_ACCENT, alpha=0.35, linewidth=0)
        axes.plot(probabilities, levels, color=_ACCENT, linewidth=1.5)
    for slice_index in chosen:
        axes.axhline(z_mm[slice_index], color=_ACCENT, linewidth=0.8, alpha=0.8)
    half = volume.spacing_mm[0] / 2
    axes.set_xlim(0, 1)
    axes.set_ylim(z_mm[0] - half, z_mm[-1] + half)
    axes.set_xticks((0, 0.5, 1), ("0", "0.5", "1"))
    axes.yaxis.tick_right()
    axes.tick_params(colors=_MUTED, labelsize=9)
    axes.set_title("slab probability\nover z (mm)", color=_INK, fontsize=10)
    for spine in axes.spines.values():
        spine.set_color(_MUTED)


def _draw_slice(axes: Axes, volume: Volume, slice_index: int) -> None:
    low, high = PE_WINDOW_HU
    aspect = volume.spacing_mm[1] / volume.spacing_mm[2]
    axes.imshow(volume.voxels[slice_index], cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="bilinear")
    axes.set_axis_off()


def _draw_corners(axes: Axes, box: Box, volume: Volume) -> None:
    """Sides, window and scale."""
    low, high = PE_WINDOW_HU
    corners = (
        (0.02, 0.5, "R", "left"),
        (0.98, 0.5, "L", "right"),
        (0.02, 0.04, f"W {high - low} L {(high + low) // 2}", "left"),
    )
    for x, y, words, side in corners:
        axes.text(x, y, words, color=_INK, transform=axes.transAxes, ha=side, va="center", fontsize=9)
    bar = 50 / volume.spacing_mm[2]
    end, level = box.right - 0.03 * (box.right - box.left), box.bottom - 0.03 * (box.bottom - box.top)
    axes.plot((end - bar, end), (level, level), color=_INK, linewidth=2)
    axes.text(end, level, "5 cm ", color=_INK, ha="right", va="bottom", fontsize=9)


def _overlay(axes: Axes, volume: Volume, attention: Volume, slice_index: int) -> None:
    strength = attention_on(volume, attention, slice_index)
    _show_attention(axes, strength, None, volume.spacing_mm[1] / volume.spacing_mm[2])


def _show_attention(
    axes: Axes, strength: NDArray[np.float32], extent: tuple[float, float, float, float] | None, aspect: float
) -> None:
    axes.imshow(
        strength, cmap="inferno", vmin=0, vmax=1, alpha=opacity(strength), aspect=aspect,
        interpolation="bilinear", origin="upper" if extent is None else "lower", extent=extent,
    )  # fmt: skip


def _slice_title(detection: Detection, volume: Volume, slice_index: int) -> str:
    title = f"{detection.image.slice_name(slice_index)}, z {volume.slice_z_mm[slice_index]:.0f} mm"
    if detection.evidence:
        nearest = min(detection.evidence, key=lambda slab: abs(slab.slice_index - slice_index))
        title += f", slab {nearest.probability:.2f}"
    return title
