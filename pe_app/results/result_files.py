"""A detection as files that people open: JSON, attention volume, review picture, web page."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from pe_app.common.files import write_durably
from pe_app.common.schema import json_text
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import resample_like, write_volume
from pe_app.model.detection import NOTICE, Detection
from pe_app.model.detector import DetectionResult

if TYPE_CHECKING:  # a detection starts without matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

PE_WINDOW_HU = (-250, 450)
"""Width 700 at level 100: emboli stay dark beside enhanced arteries (the reading window for PE)."""

PICTURED_SLICES = 3
APART_MM = 12.0
"""Pictured slices lie at least this far apart, so that one embolus does not fill the page."""

THUMBNAILS = "thumbnails.jpg"
THUMBNAIL_PX = 220
"""Width of one of them."""

BODY_HU = -300
"""Tissue is above, air and lung are below."""

_BACKGROUND, _INK, _MUTED, _ACCENT, _WARNING = "#14181d", "#e8ecf0", "#8d99a6", "#ffb000", "#ff6b5e"


def write_result(
    result: DetectionResult, volume: Volume | None, folder: Path, name: str, *, full_resolution: bool = False
) -> None:
    """Write detection.json, review.png, thumbnails.jpg and index.html; with an attention volume also attention.nrrd.

    Args:
        result: what the model said.
        volume: the CT it was said of; None where the files made none: then there are no pictures.
        folder: made where missing; the same files of an earlier detection are replaced, each all or nothing.
        name: what the page calls the study.
        full_resolution: also write attention_full.nrrd, the attention on the CT's own grid.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in ("detection.json", "attention.nrrd", "attention_full.nrrd", "review.png", THUMBNAILS):
        (folder / stale).unlink(missing_ok=True)
    picture = b""
    if volume is not None:
        if result.attention is not None:
            write_volume(result.attention, folder / "attention.nrrd")
            if full_resolution:
                write_volume(resample_like(result.attention, volume), folder / "attention_full.nrrd")
        picture = review_picture(result, volume, name)
        write_durably(folder / "review.png", picture)
        write_durably(folder / THUMBNAILS, thumbnails(result, volume))
    write_durably(folder / "index.html", review_page(result.detection, picture, name))
    write_durably(folder / "detection.json", json_text(result.detection.to_json(), indent=1))


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
    rows, columns_shown = _body_box(volume, chosen)
    for column, slice_index in enumerate(chosen):
        plain = figure.add_subplot(columns[0, 2 + column])
        overlaid = figure.add_subplot(columns[1, 2 + column])
        for axes in (plain, overlaid):
            _draw_slice(axes, volume, slice_index)
            axes.set_xlim(columns_shown)
            axes.set_ylim(rows[::-1])
            axes.set_anchor("N")
        plain.set_title(_slice_title(detection, volume, slice_index), color=_INK, fontsize=10)
        if result.attention is not None:
            _overlay(overlaid, volume, result.attention, slice_index)
    _draw_header(figure, detection, name)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def thumbnails(result: DetectionResult, volume: Volume) -> bytes:
    """A JPEG of the strongest slices with attention, side by side, strongest first; for lists of many studies."""
    from matplotlib import colormaps

    chosen = strongest_slices(result.detection, volume)
    (top, bottom), (left, right) = ((int(low), int(high) + 1) for low, high in _body_box(volume, chosen))
    height_mm, width_mm = (bottom - top) * volume.spacing_mm[1], (right - left) * volume.spacing_mm[2]
    size = THUMBNAIL_PX, max(1, round(THUMBNAIL_PX * height_mm / width_mm))
    low, high = PE_WINDOW_HU
    strip = Image.new("RGB", (size[0] * len(chosen), size[1]))
    for place, slice_index in enumerate(chosen):
        gray = np.clip((volume.voxels[slice_index].astype(np.float32) - low) / (high - low), 0, 1)
        colour = np.repeat(gray[..., None], 3, axis=2)
        if result.attention is not None:
            strength = _attention_on(volume, result.attention, slice_index)
            opaque = _opacity(strength)[..., None]
            colour = (1 - opaque) * colour + opaque * colormaps["inferno"](strength)[..., :3]
        picture = Image.fromarray(np.rint(255 * colour).astype(np.uint8)).crop((left, top, right, bottom))
        strip.paste(picture.resize(size, Image.Resampling.LANCZOS), (place * size[0], 0))
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def strongest_slices(detection: Detection, volume: Volume, count: int = PICTURED_SLICES) -> tuple[int, ...]:
    """CT slices worth a picture, strongest first: of candidates, then of slabs; evenly spread where there are none."""
    slabs = sorted(detection.evidence, key=lambda evidence: -evidence.probability)
    wanted = [candidate.slice_index for candidate in detection.candidates] + [slab.slice_index for slab in slabs]
    wanted += [int(k) for k in np.linspace(0, volume.shape[0] - 1, count + 2)[1:-1]]
    chosen: list[int] = []
    for slice_index in wanted:
        if all(abs(slice_index - other) * volume.spacing_mm[0] >= APART_MM for other in chosen):
            chosen.append(slice_index)
    return tuple(chosen[:count])


def review_page(detection: Detection, picture: bytes, name: str) -> str:
    """A self-contained HTML page of one detection: no script, nothing loaded from elsewhere, every text escaped."""
    reasons = "".join(
        f"<li class={'stop' if reason.refuses else 'warn'}><code>{html.escape(reason.code)}</code> "
        f"{html.escape(reason.message)}</li>"
        for reason in detection.reasons
    )
    candidates = _table(
        (
            *("rank", "place", "slice", "slices", "z (mm)", "size (mm)"),
            *("centre L, P, S (mm)", "attention", "slab probability"),
        ),
        [
            (
                str(candidate.rank),
                candidate.place,
                str(candidate.slice_index),
                f"{candidate.slices[0]} to {candidate.slices[1]}" if candidate.slices else "",
                f"{candidate.z_mm:.1f}",
                " x ".join(f"{value:.0f}" for value in candidate.extent_mm),
                ", ".join(f"{value:.0f}" for value in candidate.centre_lps_mm),
                f"{candidate.peak:.2f}",
                f"{candidate.slab_probability:.2f}",
            )
            for candidate in detection.candidates
        ],
    )
    evidence = _table(
        ("slab", "z (mm)", "slice", "probability", "attention maximum"),
        [
            (
                str(slab.slab),
                f"{slab.z_mm:.1f}",
                str(slab.slice_index),
                f"{slab.probability:.3f}",
                f"{slab.attention_peak:.3g}",
            )
            for slab in detection.evidence
        ],
    )
    model, image = detection.model, detection.image
    size, spacing = " x ".join(map(str, image.size)), " x ".join(f"{value:.2f}" for value in image.spacing_mm)
    return _PAGE.format(
        name=html.escape(name),
        notice=html.escape(NOTICE),
        verdict=html.escape(verdict(detection)),
        reasons=f"<ul>{reasons}</ul>" if reasons else "",
        picture=_PICTURE.format(base64.b64encode(picture).decode()) if picture else "",
        candidates=_where(detection, candidates),
        evidence=evidence if detection.evidence else "<p>None: the study was not analysed.</p>",
        model=html.escape(f"{model.name} {model.version}"),
        model_sha=html.escape(model.sha256),
        image=html.escape(f"{size} voxels of {spacing} mm (slice, row, column)" if image.sha256 else "not read"),
        image_sha=html.escape(image.sha256),
        seconds=f"{detection.seconds.get('total', 0.0):.1f}",
    )


def extent_words(detection: Detection) -> str:
    """One sentence on how far attention reaches; empty where nothing is strong enough or it is not known."""
    extent = detection.extent_estimate
    if extent is None or not extent.volume_ml:
        return ""
    return (
        f"Extent estimate: attention over {extent.volume_ml:.0f} ml in {100 * extent.slab_share:.0f}% of the lung's "
        "height. Not a clot burden: attention is wider than a clot."
    )


def verdict(detection: Detection) -> str:
    """One line on the study: its probability against the threshold or why there is none, after any caution."""
    if detection.probability is None:
        return "Not analysed: " + "; ".join(reason.code for reason in detection.reasons if reason.refuses)
    side = "at or above" if detection.positive else "below"
    said = f"Probability of embolism {detection.probability:.3f}, {side} the threshold of {detection.threshold:.2f}"
    return f"{detection.caution}. {said}" if detection.caution else said


def _where(detection: Detection, table: str) -> str:
    if detection.status == "refused":
        return "<p>Nowhere: the study was not analysed.</p>"
    if not detection.candidates:
        return "<p>No region of attention is strong enough to list.</p>"
    return f'{table}<p class="muted">{html.escape(extent_words(detection))}</p>'


def _draw_header(figure: Figure, detection: Detection, name: str) -> None:
    figure.text(0.012, 0.962, name, color=_INK, fontsize=15, weight="bold", va="center")
    figure.text(0.012, 0.918, verdict(detection), color=_ACCENT, fontsize=13, va="center")
    figure.text(0.99, 0.965, NOTICE, color=_WARNING, fontsize=12, weight="bold", va="center", ha="right")
    codes = ", ".join(reason.code for reason in detection.reasons)
    note = f"model {detection.model.name} {detection.model.version}" + (f"   ({codes})" if codes else "")
    figure.text(0.99, 0.925, note, color=_WARNING if codes else _MUTED, fontsize=10, va="center", ha="right")


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
    axes.set_title("from the front, attention projected", color=_INK, fontsize=10)
    axes.set_axis_off()


def _draw_evidence(
    figure: Figure, place: SubplotSpec, front: Axes, detection: Detection, volume: Volume, chosen: tuple[int, ...]
) -> None:
    """The slab probabilities beside the view from the front, at the same heights."""
    front.apply_aspect()
    beside, level = place.get_position(figure), front.get_position()
    axes = figure.add_axes((beside.x0 + 0.006, level.y0, beside.width - 0.045, level.height), facecolor=_BACKGROUND)
    z_mm = volume.slice_z_mm
    if detection.evidence:
        heights = [slab.z_mm for slab in detection.evidence]
        probabilities = [slab.probability for slab in detection.evidence]
        axes.fill_betweenx(heights, 0, probabilities, color=_ACCENT, alpha=0.35, linewidth=0)
        axes.plot(probabilities, heights, color=_ACCENT, linewidth=1.5)
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


def _body_box(volume: Volume, chosen: tuple[int, ...]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Rows and columns that hold the chest on the pictured slices, so that no picture is wasted on air."""
    body = ndimage.binary_opening(volume.voxels[list(chosen), ::4, ::4].max(axis=0) > BODY_HU, iterations=3)
    if not body.any():
        return (-0.5, volume.shape[1] - 0.5), (-0.5, volume.shape[2] - 0.5)
    largest = ndimage.find_objects(body.astype(np.uint8))[0]
    (top, bottom), (left, right) = ((4 * side.start - 6, 4 * side.stop + 6) for side in largest)
    return (top, bottom), (left, right)


def _draw_slice(axes: Axes, volume: Volume, slice_index: int) -> None:
    low, high = PE_WINDOW_HU
    aspect = volume.spacing_mm[1] / volume.spacing_mm[2]
    axes.imshow(volume.voxels[slice_index], cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="bilinear")
    axes.set_axis_off()


def _overlay(axes: Axes, volume: Volume, attention: Volume, slice_index: int) -> None:
    strength = _attention_on(volume, attention, slice_index)
    _show_attention(axes, strength, None, volume.spacing_mm[1] / volume.spacing_mm[2])


def _attention_on(volume: Volume, attention: Volume, slice_index: int) -> NDArray[np.float32]:
    """``(rows, columns)``: attention from 0 to 1 on one slice of the CT."""
    affine = volume.affine.copy()
    affine[:3, 3] = volume.to_lps_mm((slice_index, 0, 0))
    plane = Volume(np.zeros((1, *volume.shape[1:]), np.uint8), affine)
    strength: NDArray[np.float32] = resample_like(attention, plane).voxels[0].astype(np.float32) / 255
    return strength


def _opacity(strength: NDArray[np.float32]) -> NDArray[np.float32]:
    """Transparent where attention is weak, so that the CT stays readable beneath."""
    opaque: NDArray[np.float32] = np.clip(1.2 * strength - 0.1, 0, 0.6)
    return opaque


def _show_attention(
    axes: Axes, strength: NDArray[np.float32], extent: tuple[float, float, float, float] | None, aspect: float
) -> None:
    axes.imshow(
        strength, cmap="inferno", vmin=0, vmax=1, alpha=_opacity(strength), aspect=aspect,
        interpolation="bilinear", origin="upper" if extent is None else "lower", extent=extent,
    )  # fmt: skip


def _slice_title(detection: Detection, volume: Volume, slice_index: int) -> str:
    title = f"slice {slice_index}, z {volume.slice_z_mm[slice_index]:.0f} mm"
    if detection.evidence:
        nearest = min(detection.evidence, key=lambda slab: abs(slab.slice_index - slice_index))
        title += f", slab {nearest.probability:.2f}"
    return title


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


_PICTURE = '<img alt="Strongest slices with attention, and the evidence of every slab" src="data:image/png;base64,{}">'

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{name}</title><style>
body {{ background: #14181d; color: #e8ecf0; font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1500px;
  padding: 1rem 1.5rem 3rem; }}
.notice {{ background: #5c1f1a; color: #fff; font-weight: 600; padding: .5rem 1rem; border-radius: 6px; }}
h1 {{ font-size: 1.5rem; margin: 1rem 0 .2rem; }} h2 {{ font-size: 1.1rem; margin: 1.6rem 0 .4rem; }}
.verdict {{ color: #ffb000; font-size: 1.2rem; margin: 0; }} li.warn {{ color: #ffb000; }} li.stop {{ color: #ff6b5e; }}
img {{ width: 100%; border-radius: 6px; margin-top: 1rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .2rem .9rem .2rem 0; text-align: left; border-bottom: 1px solid #2b333c; }} th {{ color: #8d99a6; }}
code {{ background: #232a32; padding: .1rem .3rem; border-radius: 4px; }} .muted {{ color: #8d99a6; }}
summary {{ cursor: pointer; }}
</style></head><body>
<p class="notice">{notice}</p>
<h1>{name}</h1>
<p class="verdict">{verdict}</p>
{reasons}
{picture}
<h2>Where to look</h2>
{candidates}
<h2>Evidence</h2>
<details><summary>All slabs, feet to head</summary>{evidence}</details>
<p class="muted">Model {model}, SHA-256 <code>{model_sha}</code><br>
Image {image}, SHA-256 <code>{image_sha}</code><br>Analysed in {seconds} s</p>
</body></html>
"""
