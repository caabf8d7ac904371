"""Finding pulmonary embolism on chest CT with few annotations: what scripts and notebooks need, in one place.

Each name is imported when it is first used (PEP 562), so that ``import pe_app`` itself loads neither torch nor
SimpleITK. Research use only, not for diagnosis.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pe_app.annotation.sparse import SparseAnnotation as SparseAnnotation
    from pe_app.common.errors import InputError as InputError
    from pe_app.ct.volume import Volume as Volume
    from pe_app.ct.volume_io import read_volume as read_volume
    from pe_app.ct.volume_io import write_volume as write_volume
    from pe_app.evaluation.evaluate import evaluate as evaluate
    from pe_app.model.detect import detect as detect
    from pe_app.model.detection import Detection as Detection
    from pe_app.model.detector import Detector as Detector
    from pe_app.phantom import make_phantom as make_phantom
    from pe_app.reports.report_labels import label_report as label_report
    from pe_app.studies import Study as Study
    from pe_app.studies import read_studies as read_studies
    from pe_app.training.stages import train_classifier as train_classifier
    from pe_app.training.stages import train_encoder as train_encoder

__version__ = "0.1.0"

_HOMES = {
    "detect": "pe_app.model.detect",
    "read_volume": "pe_app.ct.volume_io",
    "write_volume": "pe_app.ct.volume_io",
    "Volume": "pe_app.ct.volume",
    "Detector": "pe_app.model.detector",
    "Detection": "pe_app.model.detection",
    "SparseAnnotation": "pe_app.annotation.sparse",
    "Study": "pe_app.studies",
    "read_studies": "pe_app.studies",
    "train_encoder": "pe_app.training.stages",
    "train_classifier": "pe_app.training.stages",
    "evaluate": "pe_app.evaluation.evaluate",
    "label_report": "pe_app.reports.report_labels",
    "make_phantom": "pe_app.phantom",
    "InputError": "pe_app.common.errors",
}
"""The public names and the modules that define them."""


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'pe_app' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # the next use is a plain lookup
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
