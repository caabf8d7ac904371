"""Secondary Capture series: a summary and the strongest slices with attention, for viewers that show nothing else."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

import numpy as np
from highdicom.sc import SCImage
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.sr.codedict import codes

from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import resample_like
from pe_app.model.detection import CANDIDATE_THRESHOLD, NOTICE, Detection
from pe_app.model.detector import DetectionResult
from pe_app.results.dicom.origin import FIRST_SERIES_NUMBER, Origin, derived_uid, describe, equipment
from pe_app.results.dicom.report import has_numbers
from pe_app.results.pictures import PE_WINDOW_HU, strongest_slices
from pe_app.results.words import verdict

SIDE = 512
"""Pixels of a picture, as of a CT: no viewer has to shrink it, and its letters stay readable."""

OVERLAID_SLICES = 5

_PAPER, _INK, _ACCENT, _WARNING = "#101418", "#f2f5f8", "#ffb000", "#ff8a7a"
_TINT = LinearSegmentedColormap.from_list("tint", [(1, 0.69, 0, 0), (1, 0.35, 0, 0.3)])
"""Transparent to orange: the artery beneath must stay readable."""


def picture_series(result: DetectionResult, origin: Origin, key: str) -> list[SCImage]:
    """A summary, and the strongest slices with attention; of a refused study or an untrained model the summary only."""
    detection = result.detection
    frames: list[tuple[NDArray[np.uint8], int | None]] = [(_summary(detection), None)]
    if has_numbers(detection):
        frames += list(_overlaid(result, origin.volume))
    series = []
    for number, (pixels, slice_index) in enumerate(frames, start=1):
        own = equipment(detection.model)
        picture = SCImage.from_ref_dataset(
            ref_dataset=origin.images[0],
            pixel_array=pixels,
            photometric_interpretation="RGB",
            bits_allocated=8,
            coordinate_system="PATIENT",
            patient_orientation=("L", "P"),
            series_instance_uid=derived_uid(key, "pictures"),
            series_number=FIRST_SERIES_NUMBER + 4,
            sop_instance_uid=derived_uid(key, "pictures", number),
            instance_number=number,
            manufacturer=own["manufacturer"],
            transfer_syntax_uid="1.2.840.10008.1.2.1",
        )
        picture.ManufacturerModelName = own["manufacturer_model_name"]
        picture.SoftwareVersions = own["software_versions"]
        picture.DeviceSerialNumber = own["device_serial_number"]
        describe(picture, detection, "PE pictures")
        picture.ImageComments = NOTICE
        picture.BurnedInAnnotation = "NO"  # of the patient: the text names no one
        picture.SourceImageSequence = Items([_reference(origin, slice_index or 0)])
        if slice_index is None:
            picture.PatientOrientation = ""
        series.append(picture)
    return series


def _reference(origin: Origin, slice_index: int) -> Dataset:
    item, purpose = Dataset(), Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID, frame = origin.reference(slice_index)
    if frame is not None:
        item.ReferencedFrameNumber = frame
    source = codes.DCM.SourceImageForImageProcessingOperation
    purpose.CodeValue, purpose.CodingSchemeDesignator, purpose.CodeMeaning = source.value, "DCM", source.meaning
    item.PurposeOfReferenceCodeSequence = Items([purpose])
    return item


def _overlaid(result: DetectionResult, volume: Volume) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """The strongest slices, from the feet to the head, one tinted where attention lies."""
    detection, attention = result.detection, result.attention
    if attention is None:
        return
    low, high = PE_WINDOW_HU
    for slice_index in sorted(strongest_slices(detection, volume, OVERLAID_SLICES)):
        affine = volume.affine.copy()
        affine[:3, 3] = volume.to_lps_mm((slice_index, 0, 0))
        plane = Volume(np.zeros((1, *volume.shape[1:]), np.uint8), affine)
        strength = resample_like(attention, plane).voxels[0].astype(np.float32) / 255
        figure, axes = _page()
        aspect = volume.spacing_mm[1] / volume.spacing_mm[2]
        axes.imshow(volume.voxels[slice_index], cmap="gray", vmin=low, vmax=high, aspect=aspect)
        axes.imshow(strength, cmap=_TINT, vmin=0, vmax=1, aspect=aspect)
        if strength.max() >= CANDIDATE_THRESHOLD:
            axes.contour(strength, levels=[CANDIDATE_THRESHOLD], colors=[_ACCENT], linewidths=1.0)
        nearest = min(detection.evidence, key=lambda slab: abs(slab.slice_index - slice_index))
        z_mm = volume.slice_z_mm[slice_index]
        _banner(figure, detection)
        lines = (
            f"{detection.image.slice_name(slice_index)}, z {z_mm:.1f} mm",
            f"slab probability {nearest.probability:.2f}, W {high - low} L {(high + low) // 2}",
        )
        _write(figure, 0.02, 0.03, "\n".join(lines), _INK, "bottom")
        bar = 50 / volume.spacing_mm[2]
        end, level = 0.97 * volume.shape[2], 0.965 * volume.shape[1]
        axes.plot((end - bar, end), (level, level), color=_INK, linewidth=2)
        _write(figure, 0.9, 0.045, "5 cm", _INK, "bottom")
        _write(figure, 0.02, 0.5, "R", _INK, "center")
        _write(figure, 0.965, 0.5, "L", _INK, "center")
        yield _pixels(figure), slice_index


def _summary(detection: Detection) -> NDArray[np.uint8]:
    """The verdict or the reasons in words, and how the slabs' probability runs from the feet to the head."""
    figure, axes = _page()
    figure.patch.set_facecolor(_PAPER)
    _banner(figure, detection)
    numbers = has_numbers(detection)
    said = verdict(detection) if numbers or detection.probability is None else "No result: the model is untrained"
    lines = [(line, _ACCENT) for line in textwrap.wrap(said, 46)]
    model = f"Model {detection.model.name} {detection.model.version}"
    lines += [(line, _INK) for line in textwrap.wrap(model, 58)]
    for reason in detection.reasons:
        lines += [(line, _WARNING) for line in textwrap.wrap(f"{reason.code}: {reason.message}", 58)]
    step = 0.042
    room = 11 if numbers else 20
    if len(lines) > room:
        lines[room - 1 :] = [("... all reasons are in the report", _INK)]
    for k, (line, colour) in enumerate(lines):
        _write(figure, 0.03, 0.87 - k * step, line, colour, "top")
    if numbers:
        axes.set_position((0.12, 0.1, 0.84, 0.28))
        axes.set_axis_on()
        axes.set_facecolor(_PAPER)
        heights = [slab.z_mm for slab in detection.evidence]
        probabilities = [slab.probability for slab in detection.evidence]
        axes.fill_between(heights, 0, probabilities, color=_ACCENT, alpha=0.4, linewidth=0)
        axes.plot(heights, probabilities, color=_ACCENT, linewidth=1.5)
        axes.set_ylim(0, 1)
        axes.set_xlim(heights[0], heights[-1])
        axes.tick_params(colors=_INK, labelsize=8)
        axes.set_xlabel("slab probability over z in mm, feet to head", color=_INK, fontsize=9)
        for spine in axes.spines.values():
            spine.set_color(_INK)
    return _pixels(figure)


def _page() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(SIDE / 100, SIDE / 100), dpi=100, facecolor="black")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    return figure, axes


def _banner(figure: Figure, detection: Detection) -> None:
    _write(figure, 0.02, 0.985, NOTICE, _WARNING, "top")
    if detection.caution:
        _write(figure, 0.02, 0.94, detection.caution, _WARNING, "top")


def _write(figure: Figure, x: float, y: float, text: str, colour: str, anchor: str) -> None:
    """Letters of about 12 pixels with a dark rim, readable on lung and bone."""
    rim = [withStroke(linewidth=2.5, foreground="black")]
    figure.text(x, y, text, color=colour, fontsize=10, weight="bold", va=anchor, path_effects=rim)


def _pixels(figure: Figure) -> NDArray[np.uint8]:
    canvas = figure.canvas
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[:, :, :3])  # type: ignore[attr-defined]
