"""Detections with their maps, kept as they are made: what takes hours is done once, what it means is asked often."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import pe_app
from pe_app.common.files import append_durably
from pe_app.ct.volume import Volume
from pe_app.model.detection import Detection
from pe_app.model.detector import DetectionResult


@dataclass(frozen=True, eq=False)
class Analysis:
    """A detection with its maps as they are kept.

    Attributes:
        detection: the numbers.
        maps: ``(slabs, grid, grid)``, each slab's map divided by its maximum; None when the study was refused.
        grid: the coarse grid of the maps in patient space; None when the study was refused.
    """

    detection: Detection
    maps: NDArray[np.float64] | None
    grid: Volume | None


class PredictionFile:
    """Detections with their maps, one JSON line each, found by the SHA-256 of model and image; only ever appended to.

    A line that an interruption tore, or of another version of the program, is passed over and made again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: dict[tuple[str, str], int] = {}
        if path.exists():
            with path.open("rb") as file:
                place = 0
                for line in file:
                    analysis = _decoded(line)
                    if analysis is not None:
                        self._places[analysis.detection.model.sha256, analysis.detection.image.sha256] = place
                    place += len(line)

    def get(self, model_sha256: str, image_sha256: str) -> Analysis | None:
        """What is kept of this model and image."""
        place = self._places.get((model_sha256, image_sha256))
        if place is None:
            return None
        with self._path.open("rb") as file:
            file.seek(place)
            return _decoded(file.readline())

    def add(self, result: DetectionResult) -> Analysis:
        """Keep a detection; returns it as ``get`` will, so that a continued evaluation gives the same figures."""
        line = _encoded(result)
        place = append_durably(self._path, line)
        analysis = _decoded(line)
        if analysis is None:
            raise ValueError("a detection cannot be read back from its own line")
        self._places[analysis.detection.model.sha256, analysis.detection.image.sha256] = place
        return analysis


def _encoded(result: DetectionResult) -> bytes:
    payload: dict[str, object] = {"program": pe_app.__version__, "detection": result.detection.to_json(), "maps": None}
    if result.maps is not None and result.attention is not None:
        # float16 keeps a map to 0.05%; as text, 20 to 40 kB a study at full size
        packed = zlib.compress(result.maps.astype("<f2").tobytes(), 6)
        payload["maps"] = {
            "shape": list(result.maps.shape),
            "affine": result.attention.affine.tolist(),
            "float16_zlib_base64": base64.b64encode(packed).decode(),
        }
    return json.dumps(payload).encode() + b"\n"


def _decoded(line: bytes) -> Analysis | None:
    """None for a line that is torn or not of this version."""
    try:
        payload = json.loads(line)
        if payload["program"] != pe_app.__version__:
            return None
        detection = Detection.from_json(payload["detection"])
        kept = payload["maps"]
        if (kept is None) != (detection.status == "refused"):
            return None
        if kept is None:
            return Analysis(detection, None, None)
        values = np.frombuffer(zlib.decompress(base64.b64decode(kept["float16_zlib_base64"])), "<f2")
        maps = values.reshape(kept["shape"]).astype(np.float64)
        return Analysis(detection, maps, Volume(maps, np.array(kept["affine"]), "attention"))
    except (ValueError, KeyError, TypeError, zlib.error):
        return None
