"""The solid parts of a phantom: who the patient is, how the scan was made, and every organ as a layer of one slice.

All shapes are signed distances (mm, positive inside) in nominal coordinates: an average adult, LPS, x to the left,
y to the back, z to the head, the carina at (0, 22, 34).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
LUNG_TOP_MM, LUNG_BOTTOM_MM = 128.0, -134.0
"""Nominal z of the apices and of the lowest recess."""


@dataclass(frozen=True)
class Patient:
    """What stays the same between two studies of one patient; lengths in mm, ratios to the nominal adult."""

    scale: tuple[float, float, float]
    fat_mm: float
    breast_mm: float
    heart: float
    dome_mm: float
    emphysema: float
    calcium: float
    kyphosis: float
    spine_x: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Patient:
        """A random adult."""
        size = rng.uniform(0.88, 1.1)
        scale = tuple(float(size * rng.uniform(0.94, 1.06)) for _ in range(3))
        return cls(
            scale=(scale[0], scale[1], scale[2]),
            fat_mm=float(rng.gamma(3.0, 5.0) + 3),
            breast_mm=float(rng.uniform(14, 40)) if rng.random() < 0.5 else 0.0,
            heart=float(rng.uniform(0.88, 1.15)),
            dome_mm=float(rng.normal(-60, 7)),
            emphysema=float(rng.uniform(0.3, 1)) if rng.random() < 0.2 else 0.0,
            calcium=float(rng.random()),
            kyphosis=float(rng.uniform(6, 18)),
            spine_x=float(rng.normal(0, 2)),
        )


@dataclass(frozen=True)
class Scan:
    """How one study was made and what is in the lungs that day; HU unless the name says otherwise."""

    pulmonary: float
    left_heart: float
    aorta: float
    cava: float
    inferior_cava: float
    veins: float
    arms_up: bool
    mixing: float
    effusion_mm: tuple[float, float]
    consolidation: float
    late: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Scan:
        """A random contrast phase, good enough to read: pulmonary arteries of 220 to 520 HU."""
        pulmonary = float(np.clip(rng.normal(350, 75), 230, 520))
        ratio = float(np.clip(rng.normal(0.85, 0.22), 0.45, 1.25))  # later scans have a bright aorta
        left = max(pulmonary * ratio, 150.0)
        sick = rng.random(2) < 0.16
        return cls(
            pulmonary=pulmonary,
            left_heart=left,
            aorta=left * float(rng.uniform(0.93, 1.05)),
            cava=float(pulmonary * rng.uniform(0.85, 1.2) if rng.random() < 0.5 else rng.uniform(500, 1400)),
            inferior_cava=float(rng.uniform(70, 160)),
            veins=float(0.5 * (pulmonary + left) * rng.uniform(0.85, 1.02)),
            arms_up=bool(rng.random() < 0.85),
            mixing=float(rng.uniform(0.15, 0.7)) if rng.random() < 0.5 else 0.0,
            effusion_mm=(float(sick[0] * rng.uniform(8, 60)), float(sick[1] * rng.uniform(8, 60))),
            consolidation=float(rng.uniform(0.2, 1)) if rng.random() < 0.25 else 0.0,
            late=float(np.clip(ratio, 0.5, 1.2)),
        )


@dataclass(frozen=True, eq=False)
class Layer:
    """One tissue in painter's order: it covers what was painted before wherever its distance is positive."""

    depth_mm: Field
    hu: Field | float


@dataclass(frozen=True, eq=False)
class Grain:
    """Smooth random fields of one slice, about -2 to 2, from the size of an organ to that of a lobule."""

    coarse: Field
    middle: Field
    fine: Field
    finest: Field


def cavity_depth(x: Field, y: Field, z: Field | float) -> Field:
    """Mm inside the rib cage."""
    up = np.clip((np.asarray(z) + 30) / 160, 0, 1.0)
    half_x = 130 * np.sqrt(np.maximum(1 - up**2.9, 0.012))
    half_y = 92 * np.sqrt(np.maximum(1 - 0.86 * up**3, 0.012))
    v = y - 4 - 20 * np.clip((np.asarray(z) - 30) / 100, 0, 1)
    behind = np.clip(v / half_y, 0, 1)
    wide = half_x * (1 + 0.07 * np.clip(v / half_y, -1, 1))  # a kidney bean: widest behind the middle,
    deep = v * (1 + 0.2 * behind * np.exp(-((x / 34) ** 2)))  # notched by the spine
    squares = (x / wide) ** 2, (deep / half_y) ** 2
    q = np.sqrt(np.maximum(squares[0] + squares[1] - 0.22 * squares[0] * squares[1], 1e-3))  # squarer than an ellipse
    return np.asarray(np.hypot(x, v) * (1 / q - 1))


def mediastinum_depth(patient: Patient, x: Field, y: Field, z: Field | float) -> Field:
    """Mm inside the heart and everything else between the lungs, spine and paraspinal tissue included."""
    z = np.asarray(z)
    column = _ellipse(x, y, 0, 2, 25 + 3 * np.clip(z / 60, 0, 1) - 8 * np.clip((z - 70) / 50, 0, 1), 64)
    spine = _ellipse(x, y, patient.spine_x, spine_y(patient, z) + 4, 23, 21)
    depth = _join(column, spine, 8)
    for cx, cy, cz, rx, ry, rz in ((-38, 12, 4, 19, 21, 30), (38, 18, 8, 19, 23, 30), (10, -20, 44, 27, 34, 26)):
        depth = _join(depth, _ellipsoid(x, y, z, (cx, cy, cz), (rx, ry, rz)), 10)
    return _join(depth, heart_depth(patient, x, y, z) + 4, 10)


def heart_depth(patient: Patient, x: Field, y: Field, z: Field | float) -> Field:
    """Mm inside the pericardium."""
    h = patient.heart
    left = _rotated(x, y, z, (26, -26, -50), (0.66, -0.6, -0.45), 66 * h, 44 * h)
    right = _ellipsoid(x, y, z, (-20, -22, -38), (38 * h, 40, 46 * h))
    return _join(left, right, 14)


def diaphragm_z(patient: Patient, x: Field, y: Field) -> tuple[Field, Field]:
    """Height of the diaphragm and the factor from height to distance."""
    u = [((x - cx) / 72) ** 2 + ((y + 12) / 84) ** 2 for cx in (-68, 72)]
    right = patient.dome_mm - np.minimum(50 * u[0], 72)
    left = patient.dome_mm - 9 - np.minimum(50 * u[1], 64)
    tendon = patient.dome_mm - 20 - 45 * ((x / 62) ** 2 + (np.maximum(y + 25, 0) / 60) ** 2)  # carries the heart
    height = np.maximum(np.maximum(right, left), tendon)
    return height, 1 / np.sqrt(1 + 1.9 * np.minimum(np.minimum(u[0], u[1]), 1.4))


def lung_depth(patient: Patient, x: Field, y: Field, z: Field | float) -> Field:
    """Mm inside the lungs."""
    height, slope = diaphragm_z(patient, x, y)
    depth = -_join(-cavity_depth(x, y, z), mediastinum_depth(patient, x, y, z), 6)
    return -_join(-depth, (height - z) * slope, 6)


def spine_y(patient: Patient, z: Field | float) -> Field:
    """Y of the middle of the vertebral bodies."""
    return np.asarray(65 - patient.kyphosis * (np.asarray(z) / 120) ** 2)


def layers(patient: Patient, scan: Scan, x: Field, y: Field, z: float, grain: Grain) -> Iterator[Layer]:
    """Every solid part that one slice may cut, skin first."""
    cavity = cavity_depth(x, y, z)
    media = mediastinum_depth(patient, x, y, z)
    yield from _wall(patient, scan, x, y, z, cavity, grain)
    yield Layer(cavity + 1.5, -100 + 9 * grain.middle)
    yield Layer(np.minimum(np.minimum(cavity, 5 * grain.middle + 4 * grain.fine - 8), media), 30.0)
    if z < patient.dome_mm + 10:
        yield from _abdomen(patient, scan, x, y, z, cavity, grain)
    yield from _lungs(patient, scan, x, y, z, cavity, media, grain)
    if -110 < z < 25:
        yield from _heart(patient, scan, x, y, z, grain)
    yield from _bones(patient, x, y, z, cavity, grain)


def _wall(patient: Patient, scan: Scan, x: Field, y: Field, z: float, cavity: Field, grain: Grain) -> Iterator[Layer]:
    """Skin, fat and muscles."""
    shoulder = float(np.clip((z - 55) / 60, 0, 1)) ** 1.5
    half_x = 152 + 26 * shoulder + patient.fat_mm
    half_y = 108 - 18 * shoulder + 0.8 * patient.fat_mm
    v = y - 4 - 12 * shoulder
    squares = (x / half_x) ** 2, (v / half_y) ** 2
    q = np.sqrt(np.maximum(squares[0] + squares[1] - 0.32 * squares[0] * squares[1], 1e-3))
    body = np.hypot(x, v) * (1 / q - 1) + 1.2 * grain.coarse
    if patient.breast_mm and -110 < z < 70:
        for side in (-1, 1):
            size = patient.breast_mm
            breast = _ellipsoid(x, y, z, (side * 78, -96 - 0.25 * size, -22), (58, 18 + size, 52))
            body = _join(body, breast, 18)
    if not scan.arms_up:
        for side in (-1, 1):
            body = np.maximum(body, _ellipse(x, y, side * (half_x + 44), 8, 42, 46))
    yield Layer(body, 15.0)
    yield Layer(body - 1.8, -106 + 7 * grain.middle)
    if patient.breast_mm and -75 < z < 30:
        gland = np.minimum(np.minimum(body - 10, -cavity - 24), 7 * grain.middle - 3 + 3 * grain.fine)
        yield Layer(np.where(y < -70, gland, -9), 25.0)
    sideways = np.abs(x) / np.maximum(np.hypot(x, y), 1)
    muscle = body - patient.fat_mm * (0.55 + 0.5 * sideways + np.where(y < 0, 0.25, 0)) - 2 - 2 * grain.coarse
    # The wall thins in front below the chest muscles and thickens beside the spine.
    thick = 15 + 14 * np.clip((z + 10) / 60, 0, 1) + 12 * np.clip((y - 30) / 50, 0, 1) + 30 * shoulder * sideways
    muscle = np.minimum(muscle, thick + 3 * grain.coarse + cavity)
    yield Layer(muscle, 55 + 6 * grain.middle)
    plane = 0.9 + 0.5 * grain.fine - np.abs(-cavity - 13.5 - 3.5 * grain.coarse)
    second = 1.0 + 0.6 * grain.fine - np.abs(-cavity - 24 - 4 * grain.middle)
    yield Layer(np.minimum(np.maximum(plane, second), muscle - 1), -75.0)
    if shoulder > 0.05:
        yield Layer(np.minimum(8 * grain.middle + 3 * grain.fine - 5, muscle - 3), -85.0)
    if not scan.arms_up:
        for side in (-1, 1):
            arm = _ellipse(x, y, side * (half_x + 44), 8, 42, 46) - 4 - 0.4 * patient.fat_mm
            bone = _ellipse(x, y, side * (half_x + 46), 8, 12, 12)
            yield Layer(arm, 55.0)
            yield Layer(bone, 1100.0)
            yield Layer(bone - 4, 40.0)


def _abdomen(
    patient: Patient, scan: Scan, x: Field, y: Field, z: float, cavity: Field, grain: Grain
) -> Iterator[Layer]:
    """Diaphragm, liver, spleen, stomach."""
    height, slope = diaphragm_z(patient, x, y)
    under = np.minimum((height - z) * slope, cavity)
    yield Layer(np.minimum(under, 2.6 - np.minimum(under, cavity)), 50.0)
    front = np.clip(-y / 60, 0, 1)
    liver = np.minimum(under - 1.5, (22 + 40 * front - x) * 0.85)
    liver = np.minimum(liver, _ellipse(x, y, -60, 0, 150, 90))
    yield Layer(liver, 62 + 45 * (scan.late - 0.5) + 4 * grain.middle)
    yield Layer(np.minimum(liver - 6, 2.2 - np.abs(3 + 7 * grain.middle)), 62 + 75 * (scan.late - 0.5))
    spleen = np.minimum(under - 2, _ellipsoid(x, y, z, (88, 36, -112), (40, 48, 44)))
    yield Layer(spleen, 105 + 35 * np.sin(4 * grain.middle) * (1.2 - scan.late))
    stomach = np.minimum(under - 2, _ellipsoid(x, y, z, (62, -22, -112), (46, 44, 40)))
    yield Layer(stomach, 55.0)
    yield Layer(stomach - 4.0, 15.0 + 8.0 * grain.fine)
    yield Layer(np.minimum(stomach - 4.5, -28.0 - y), -960.0)
    bowel = np.minimum(np.minimum(under, 8 * grain.fine - 11), _ellipse(x, y, 20, -20, 110, 70))
    yield Layer(np.minimum(bowel, -stomach), 45.0)


def _lungs(
    patient: Patient, scan: Scan, x: Field, y: Field, z: float, cavity: Field, media: Field, grain: Grain
) -> Iterator[Layer]:
    """Air, fissures, emphysema, effusions with the lung they compress, and consolidations."""
    height, slope = diaphragm_z(patient, x, y)
    lung = -_join(-cavity, media, 6)
    lung = -_join(-lung, (height - z) * slope, 6)
    if lung.max() < -6:
        return
    specks = np.clip(grain.finest - 0.9, 0, 1.5)  # vessels too thin to be drawn one by one
    parenchyma = -872 + 0.32 * y + 9 * grain.middle + 5 * grain.fine + 12 * grain.finest + 75 * specks
    if patient.emphysema:
        parenchyma = parenchyma - patient.emphysema * 55 * np.clip(grain.fine + 0.5 * grain.middle, 0, 1)
    yield Layer(lung, parenchyma)
    oblique = (z + 18 - 0.72 * y - 5 * grain.coarse) * 0.81
    horizontal = np.where((x < 0) & (oblique > 0), z - 6 - 6 * grain.coarse, 99)
    fissure = 0.35 - np.minimum(np.abs(oblique), np.abs(horizontal))
    yield Layer(np.minimum(lung, fissure), -640.0)
    if scan.consolidation:
        patch = 14 * scan.consolidation * (grain.middle - 1.15) + 3 * grain.fine + 4 * (y > 0)
        yield Layer(np.minimum(lung, np.where(z < 40, patch + 5, -9)), -520.0)
        yield Layer(np.minimum(lung, np.where(z < 40, patch, -9)), 40.0)
    dependent = (
        np.clip((y - 42) / 40, 0, 1) * 7 - lung + 1.5 * grain.fine - 2
    )  # a rim at the back, as in every supine scan
    yield Layer(np.minimum(lung, np.where(lung > 0, dependent, -9)), -690.0)
    for depth_mm, side in zip(scan.effusion_mm, (-1, 1), strict=True):
        if not depth_mm:
            continue
        here = np.where(x * side > 0, lung, -9)
        level = y - (86 - depth_mm) - 0.16 * (z + 60) + 2 * grain.coarse
        wrap = np.maximum(level, (level + 22) * 0.5 - np.maximum(cavity, 0))
        yield Layer(np.minimum(here, wrap + 9 + 3 * grain.middle), -300 + 70 * grain.fine)
        yield Layer(np.minimum(here, wrap + 6 + 3 * grain.middle), 85.0)
        yield Layer(np.minimum(here, wrap), 10.0)


def _heart(patient: Patient, scan: Scan, x: Field, y: Field, z: float, grain: Grain) -> Iterator[Layer]:
    """Muscle and the four chambers, right and left at their own HU."""
    h = patient.heart
    axis = (0.66, -0.6, -0.45)
    shift = 0.6 * np.sin(1.9 * z) * grain.coarse  # the beat between two slices: stepped borders
    x = x + shift
    height, slope = diaphragm_z(patient, x, y)
    resting = (z - height) * slope + 5
    heart = np.minimum(heart_depth(patient, x, y, z), resting)
    if z < -30:
        yield Layer(np.minimum(heart + 2.4, 0.9 - np.abs(heart + 1.4)), 5.0)  # pericardium
    left = np.minimum(_rotated(x, y, z, (40, -24, -56), axis, 50 * h, 30 * h), resting - 2)
    cavity_left = _rotated(x, y, z, (36, -20, -53), axis, 40 * h, 19 * h) + 1.6 * grain.fine
    right = np.minimum(np.minimum(_rotated(x, y, z, (14, -48, -50), axis, 48 * h, 27 * h), -left - 1), resting - 2)
    atrium_right = _ellipsoid(x, y, z, (-36, -16, -42), (24 * h, 28, 34 * h))
    atrium_left = _ellipsoid(x, y, z, (0, 22, -18), (32 * h, 17, 22 * h))
    muscle = 95 + 25 * (scan.late - 0.5)
    blood = scan.pulmonary * (1 - scan.mixing * np.clip(0.5 + 0.7 * grain.middle + 0.25 * grain.fine, 0, 1))
    dense = scan.cava > 1.4 * scan.pulmonary
    entering = blood + (np.clip(z + 55, 0, 40) / 40 * 0.5 * (scan.cava - scan.pulmonary) if dense else 0)
    entering = np.where(z < -45, blood + (scan.inferior_cava - blood) * min(max((-45 - z) / 45, 0), 0.8), entering)
    yield Layer(_join(right, atrium_right, 6) + 2.5, muscle)
    yield Layer(left, muscle)
    yield Layer(np.minimum(left, left * 0 - 3 + 5 * grain.fine - np.abs(left - 1)), -60.0)  # fat in the grooves
    yield Layer(atrium_left + 2, muscle)
    yield Layer(atrium_right, entering)
    yield Layer(right - 0.8 + 1.4 * grain.fine, 0.5 * (blood + scan.pulmonary))
    yield Layer(cavity_left, scan.left_heart + 8 * grain.middle)
    yield Layer(atrium_left, scan.left_heart)


def _bones(patient: Patient, x: Field, y: Field, z: float, cavity: Field, grain: Grain) -> Iterator[Layer]:
    """Ribs with their cartilage, sternum, scapulae, vertebrae; compact bone outside, marrow inside."""
    outside = -cavity - 6.5
    if z > -150:
        pitch = 25.0
        course = z - 0.62 * y + 3.0 * np.sign(x) + 0.02 * np.abs(x)
        along = (np.mod(course / pitch, 1) - 0.5) * pitch
        rib = (1 - np.sqrt((along / 6.2) ** 2 + (outside / 4.3) ** 2 + 1e-6)) * 4.3
        front = y < -52
        rib = np.where((np.abs(x) < 19) | (front & (z < -85)), -9, rib)
        yield Layer(np.where(front, rib, -9), 95 + 90 * patient.calcium * np.clip(grain.fine, 0, 2))
        yield Layer(np.where(front, -9, rib), 620 + 90 * grain.middle)
        yield Layer(np.where(front, -9, rib - 1.6), 190 + 40 * grain.fine)
    if -75 < z < 100:
        up = np.clip((z + 30) / 160, 0, 1)
        plate = 2 + 20 * np.clip((z - 30) / 100, 0, 1) - 90 * np.sqrt(max(1 - 0.86 * up**3, 0.012)) - 8
        wide = 15 + 11 * np.clip((z - 62) / 20, 0, 1)
        sternum = _ellipse(np.sign(x) * np.maximum(np.abs(x) - wide + 8, 0), y, 0, plate, 8, 6.2)
        yield Layer(sternum, 430.0)
        yield Layer(sternum - 1.7, 130 + 25 * grain.fine)
    if -5 < z < 118:
        blade = 2.1 + 2.5 * np.clip((z - 70) / 40, 0, 1) - np.abs(-cavity - 23 - 0.05 * z - 1.5 * grain.coarse)
        reach = np.minimum(np.abs(x) - 84 + 0.2 * z, y - 8 + 0.25 * z)
        blade = np.minimum(blade, reach)
        yield Layer(blade, 560.0)
        yield Layer(blade - 1.7, 180.0)
        for side in (-1, 1):
            head = _ellipsoid(x, y, z, (side * 172, 4, 112), (25, 25, 26))
            yield Layer(head, 480.0)
            yield Layer(head - 2.5, 190 + 30 * grain.fine)
    yield from _vertebra(patient, x - patient.spine_x, y - spine_y(patient, z), z, grain)


def _vertebra(patient: Patient, x: Field, v: Field, z: float, grain: Grain) -> Iterator[Layer]:
    pitch = 24.5
    level = (z / pitch) % 1.0  # 0 to 0.18 is disc
    waist = 1.4 * np.cos(2 * np.pi * (level - 0.09))
    body = np.minimum(_ellipse(x, v, 0, 0, 17.5 + waist, 14.5 + waist), 12.5 - v)
    if level < 0.18:
        yield Layer(body, 75 + 20 * patient.calcium)
    else:
        yield Layer(body, 430.0)
        end = level < 0.24 or level > 0.94
        yield Layer(body - 1.3, (330.0 if end else 165.0) + 28 * grain.fine)
    ring = _ellipse(x, v, 0, 22, 15.5, 13.5)
    yield Layer(ring, 50.0)
    if level > 0.3:
        arms = np.minimum(6.5 - np.abs(v - 21 - 0.18 * np.abs(x)), 33 - np.abs(x))
        process = np.minimum(3.6 - np.abs(x), 18 - np.abs(v - 47))
        back = _join(np.maximum(np.minimum(arms, np.abs(x) - 9), ring), process, 4)
        yield Layer(back, 480.0)
        yield Layer(back - 1.8, 210 + 30 * grain.fine)
    canal = _ellipse(x, v, 0, 22, 9.5, 8.5)
    yield Layer(canal, -40.0)
    yield Layer(canal - 2, 28.0)


def _ellipse(x: Field, y: Field, cx: float, cy: Field | float, rx: Field | float, ry: Field | float) -> Field:
    u, v = x - cx, y - cy
    q = np.sqrt((u / rx) ** 2 + (v / ry) ** 2 + 1e-4)
    return np.asarray(np.hypot(u, v) * (1 / q - 1))


def _ellipsoid(
    x: Field, y: Field, z: Field | float, centre: tuple[float, float, float], radii: tuple[float, float, float]
) -> Field:
    u, v, w = x - centre[0], y - centre[1], np.asarray(z) - centre[2]
    q = np.sqrt((u / radii[0]) ** 2 + (v / radii[1]) ** 2 + (w / radii[2]) ** 2 + 1e-4)
    return np.asarray(np.sqrt(u * u + v * v + w * w) * (1 / q - 1))


def _rotated(
    x: Field,
    y: Field,
    z: Field | float,
    centre: tuple[float, float, float],
    axis: tuple[float, float, float],
    long_mm: float,
    short_mm: float,
) -> Field:
    """An egg round ``axis``."""
    length = float(np.linalg.norm(axis))
    u, v, w = x - centre[0], y - centre[1], np.asarray(z) - centre[2]
    along = (u * axis[0] + v * axis[1] + w * axis[2]) / length
    square = u * u + v * v + w * w
    across = np.maximum(square - along * along, 0)
    q = np.sqrt((along / long_mm) ** 2 + across / short_mm**2 + 1e-4)
    return np.asarray(np.sqrt(square) * (1 / q - 1))


def _join(a: Field, b: Field, blend_mm: float) -> Field:
    """Union of two shapes with a rounded seam."""
    overlap = np.maximum(blend_mm - np.abs(a - b), 0)
    return np.asarray(np.maximum(a, b) + overlap * overlap / (4 * blend_mm))
