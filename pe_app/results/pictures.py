"""Slices of a study as pictures that a radiologist can place: sides, window, scale and position stand on each."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import resample_like
from pe_app.model.detection import Detection
from pe_app.model.detector import DetectionResult

PE_WINDOW_HU = (-250, 450)
"""Width 700 at level 100: emboli stay dark next to enhanced arteries (the reading window for PE)."""

WINDOWS_HU = (("PE", *PE_WINDOW_HU), ("Lung", -1350, 150), ("Mediastinum", -160, 240))
"""Windows of the stack: name, lowest and highest HU."""

PICTURED_SLICES = 3
APART_MM = 12.0
"""Pictured slices lie at least this far apart, so that one embolus does not fill the page."""

BODY_HU = -300
"""Tissue is above, air and lung are below."""

THUMBNAIL_PX = 220
"""Width of one picture in a list of studies."""
KEY_PX = 560
"""Width of a key slice."""
STACK_PX = 320
"""Width of a slice of the stack: 50 of them make about 1 MB."""
STACK_SLICES = 50

STACK_GRAYS = ((0, -1350), (100, -260), (240, 460), (255, 1500))
"""Gray of the stack's JPEGs and the HU it stands for, straight lines between: fine where the windows need it."""

_INFERNO = ((0, 0, 4), (40, 11, 84), (101, 21, 110), (159, 42, 99), (212, 72, 66), (245, 125, 21), (250, 193, 39))
ATTENTION_COLOURS = (*_INFERNO, (252, 255, 164))
"""Of attention from 0 to 1, evenly spaced: inferno, dark to bright in print as well."""
Number = TypeVar("Number", np.uint8, np.float32)

_INK = (242, 245, 248)


@dataclass(frozen=True)
class Box:
    """The part of a slice that holds the chest: first and last row and column, the last one not included."""

    top: int
    bottom: int
    left: int
    right: int

    @classmethod
    def around_body(cls, volume: Volume, slices: tuple[int, ...]) -> Box:
        """Around the body on these slices, so that no picture is wasted on air."""
        rows, columns = volume.shape[1:]
        body = ndimage.binary_opening(volume.voxels[list(slices), ::4, ::4].max(axis=0) > BODY_HU, iterations=3)
        if not body.any():
            return cls(0, rows, 0, columns)
        (top, bottom), (left, right) = (
            (4 * side.start - 6, 4 * side.stop + 6) for side in ndimage.find_objects(body.astype(np.uint8))[0]
        )
        return cls(max(top, 0), min(bottom, rows), max(left, 0), min(right, columns))

    def size_px(self, volume: Volume, width: int) -> tuple[int, int]:
        """Width and height of a picture of it, with square pixels."""
        height_mm = (self.bottom - self.top) * volume.spacing_mm[1]
        return width, max(1, round(width * height_mm / ((self.right - self.left) * volume.spacing_mm[2])))

    def cut(self, plane: NDArray[Number]) -> NDArray[Number]:
        """What of a slice lies in it."""
        return plane[self.top : self.bottom, self.left : self.right]


@dataclass(frozen=True)
class KeySlice:
    """A slice that is worth a look.

    Attributes:
        slice_index: which one.
        caption: what it is called, and its slab's probability.
        jpeg: the picture with attention.
        plain: the same picture without.
    """

    slice_index: int
    caption: str
    jpeg: bytes
    plain: bytes


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


def key_slices(result: DetectionResult, volume: Volume) -> tuple[KeySlice, ...]:
    """The strongest slices as pictures in the window for PE."""
    detection = result.detection
    chosen = strongest_slices(detection, volume)
    box = Box.around_body(volume, chosen)
    found = []
    for slice_index in chosen:
        caption = detection.image.slice_name(slice_index)
        if detection.evidence:
            nearest = min(detection.evidence, key=lambda slab: abs(slab.slice_index - slice_index))
            caption += f", slab probability {nearest.probability:.2f}"
        plain = _picture(volume, None, slice_index, box, KEY_PX)
        tinted = _picture(volume, result.attention, slice_index, box, KEY_PX)
        where = f"{detection.image.slice_name(slice_index)}\nz {volume.slice_z_mm[slice_index]:.0f} mm"
        for picture in (plain, tinted):
            _annotate(picture, where, (box.right - box.left) * volume.spacing_mm[2])
        found.append(KeySlice(slice_index, caption, _jpeg(tinted, 85), _jpeg(plain, 85)))
    return tuple(found)


def thumbnails(result: DetectionResult, volume: Volume) -> bytes:
    """A JPEG of the strongest slices with attention, side by side, strongest first; for lists of many studies."""
    chosen = strongest_slices(result.detection, volume)
    box = Box.around_body(volume, chosen)
    width, height = box.size_px(volume, THUMBNAIL_PX)
    strip = Image.new("RGB", (width * len(chosen), height))
    for place, slice_index in enumerate(chosen):
        picture = _picture(volume, result.attention, slice_index, box, width)
        _sides(picture, ImageFont.load_default(13))
        strip.paste(picture, (place * width, 0))
    return _jpeg(strip, 80)


def stack(result: DetectionResult, volume: Volume) -> dict[str, object]:
    """What the page's script needs to scroll through a study: slices, attention, windows and how they are called."""
    detection, attention = result.detection, result.attention
    slices = [slab.slice_index for slab in detection.evidence]
    if not slices:
        count = min(STACK_SLICES, volume.shape[0])
        slices = [int(k) for k in np.linspace(0, volume.shape[0] - 1, count).round()]
    box = Box.around_body(volume, tuple(slices))
    width, height = box.size_px(volume, min(STACK_PX, box.right - box.left))
    grays, hu = zip(*STACK_GRAYS, strict=True)
    pictures = []
    for slice_index in slices:
        gray = np.interp(box.cut(volume.voxels[slice_index].astype(np.float32)), hu, grays)
        picture = Image.fromarray(np.rint(gray).astype(np.uint8)).resize((width, height), Image.Resampling.LANCZOS)
        pictures.append(base64.b64encode(_jpeg(picture, 78)).decode())
    content: dict[str, object] = {
        "width": width,
        "height": height,
        "pictures": pictures,
        "names": [detection.image.slice_name(slice_index) for slice_index in slices],
        "z_mm": [f"{volume.slice_z_mm[slice_index]:.0f}" for slice_index in slices],
        "slices": slices,
        "probability": [round(slab.probability, 3) for slab in detection.evidence],
        "mm_per_pixel": (box.right - box.left) * volume.spacing_mm[2] / width,
        "grays": STACK_GRAYS,
        "windows": WINDOWS_HU,
        "colours": ATTENTION_COLOURS,
        "attention": None,
    }
    if attention is not None:
        corners = volume.to_index(attention.to_lps_mm(np.array([(0, 0, 0), attention.shape]) - 0.5))
        left, right = ((corners[k, 2] - box.left + 0.5) / (box.right - box.left) for k in (0, 1))
        top, bottom = ((corners[k, 1] - box.top + 0.5) / (box.bottom - box.top) for k in (0, 1))
        planes = [attention.nearest_slice(float(volume.slice_z_mm[slice_index])) for slice_index in slices]
        content["attention"] = {
            "rows": attention.shape[1],
            "columns": attention.shape[2],
            "box": [round(float(side), 4) for side in (left, top, right - left, bottom - top)],
            "cells": base64.b64encode(attention.voxels[planes].tobytes()).decode(),
        }
    return content


def attention_on(volume: Volume, attention: Volume, slice_index: int) -> NDArray[np.float32]:
    """``(rows, columns)``: attention from 0 to 1 on one slice of the CT."""
    affine = volume.affine.copy()
    affine[:3, 3] = volume.to_lps_mm((slice_index, 0, 0))
    plane = Volume(np.zeros((1, *volume.shape[1:]), np.uint8), affine)
    strength: NDArray[np.float32] = resample_like(attention, plane).voxels[0].astype(np.float32) / 255
    return strength


def opacity(strength: NDArray[np.float32]) -> NDArray[np.float32]:
    """Transparent where attention is weak, so that the CT stays readable beneath."""
    opaque: NDArray[np.float32] = np.clip(1.2 * strength - 0.1, 0, 0.6)
    return opaque


def _picture(volume: Volume, attention: Volume | None, slice_index: int, box: Box, width: int) -> Image.Image:
    low, high = PE_WINDOW_HU
    gray = np.clip((volume.voxels[slice_index].astype(np.float32) - low) / (high - low), 0, 1)
    colour = np.repeat(gray[..., None], 3, axis=2)
    if attention is not None:
        strength = attention_on(volume, attention, slice_index)
        opaque = opacity(strength)[..., None]
        steps = np.linspace(0, 1, len(ATTENTION_COLOURS))
        tint = np.stack([np.interp(strength, steps, band) for band in np.array(ATTENTION_COLOURS).T / 255], axis=-1)
        colour = (1 - opaque) * colour + opaque * tint
    picture = Image.fromarray(np.asarray(box.cut(np.rint(255 * colour).astype(np.uint8))))
    return picture.resize(box.size_px(volume, width), Image.Resampling.LANCZOS)


def _annotate(picture: Image.Image, where: str, width_mm: float) -> None:
    """The corners of a radiologist's picture: position, window, scale, sides."""
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(17)
    width, height = picture.size
    low, high = PE_WINDOW_HU
    rim = (0, 0, 0)
    draw.multiline_text((8, 6), where, _INK, font, stroke_width=2, stroke_fill=rim)
    window = f"W {high - low} L {(high + low) // 2}"
    draw.text((8, height - 8), window, _INK, font, anchor="ls", stroke_width=2, stroke_fill=rim)
    bar = 50 * width / width_mm
    right = width - 10
    draw.line([(right - bar, height - 12), (right, height - 12)], _INK, 3)
    draw.text((right, height - 18), "5 cm", _INK, font, anchor="rs", stroke_width=2, stroke_fill=rim)
    _sides(picture, ImageFont.load_default(22))


def _sides(picture: Image.Image, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> None:
    """R and L: columns run to the patient's left, as on every axial CT."""
    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    for x, letter, anchor in ((6, "R", "lm"), (width - 6, "L", "rm")):
        draw.text((x, height / 2), letter, _INK, font, anchor=anchor, stroke_width=2, stroke_fill=(0, 0, 0))


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()
