"""A detection or an annotation as DICOM objects for a PACS: segmentation, parametric map, report and pictures.

All lie in the source's study, patient and frame of reference and refer to its instances. What is the same content has
the same UIDs, so that an archive that holds them needs no second copy. Research use only: every object says so, and
one of a model that is untrained or has seen no real embolism is described as not a clinical result.
"""

from __future__ import annotations

from pathlib import Path

from pydicom import Dataset

import pe_app
from pe_app.annotation.sparse import SparseAnnotation
from pe_app.common.files import replacing
from pe_app.ct.volume import Volume
from pe_app.model.detector import DetectionResult
from pe_app.results.dicom.attention import attention_map
from pe_app.results.dicom.origin import Origin, content_key
from pe_app.results.dicom.outlines import candidate_segmentation, reader_segmentation
from pe_app.results.dicom.pictures import OVERLAID_SLICES, picture_series
from pe_app.results.dicom.report import structured_report


def detection_objects(result: DetectionResult, volume: Volume) -> dict[str, Dataset]:
    """A detection's objects by file name.

    A report and a summary picture always; candidates (if there are any), attention and overlaid slices only where the
    study was analysed.

    Raises:
        InputError: where the CT is not known to come from DICOM, or does not lie on its series.
    """
    origin = Origin.of(volume)
    detection = result.detection
    payload = {name: value for name, value in detection.to_json().items() if name != "seconds"}
    attention = b"" if result.attention is None else result.attention.voxels.tobytes()
    key = content_key(payload, attention, origin.source.series_uid.encode(), pe_app.__version__.encode())
    objects: dict[str, Dataset] = {}
    candidates = candidate_segmentation(result, origin, key)
    if candidates is not None:
        objects["candidates.dcm"] = candidates
    attention_object = attention_map(result, origin, key)
    if attention_object is not None:
        objects["attention.dcm"] = attention_object
    objects["report.dcm"] = structured_report(detection, origin, key, list(objects.values()))
    for number, picture in enumerate(picture_series(result, origin, key)):
        objects[f"picture-{number}.dcm"] = picture
    return objects


def write_dicom_results(result: DetectionResult, volume: Volume, folder: Path) -> tuple[Path, ...]:
    """Write a detection's objects to a folder, each all or nothing; those of an earlier detection are removed.

    Raises:
        InputError: as ``detection_objects``.
    """
    objects = detection_objects(result, volume)
    paths = tuple(_write(dataset, folder / name) for name, dataset in objects.items())
    for name in ("candidates.dcm", "attention.dcm", *(f"picture-{k}.dcm" for k in range(OVERLAID_SLICES + 1))):
        if name not in objects:
            (folder / name).unlink(missing_ok=True)
    return paths


def write_reader_segmentation(annotation: SparseAnnotation, volume: Volume, path: Path) -> Path | None:
    """Write a reader's outlines as a segmentation; None where nothing is outlined.

    Raises:
        InputError: if the annotation belongs to another CT, or that is not known to come from DICOM.
    """
    segmentation = reader_segmentation(annotation, Origin.of(volume))
    return None if segmentation is None else _write(segmentation, path)


def _write(dataset: Dataset, path: Path) -> Path:
    with replacing(path) as unfinished:
        dataset.save_as(unfinished, enforce_file_format=True)
    return path
