"""DICOM SEG: a model's candidates, and what readers outlined; binary, and only frames on which something is."""

from __future__ import annotations

import numpy as np
from highdicom.seg import Segmentation, SegmentDescription
from numpy.typing import NDArray
from pydicom.sr.codedict import codes
from scipy import ndimage

from pe_app.annotation.sparse import SparseAnnotation
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import resample_like
from pe_app.model.detection import CANDIDATE_THRESHOLD, Candidate, Detection, candidate_regions
from pe_app.model.detector import DetectionResult
from pe_app.results.dicom.origin import (
    FIRST_SERIES_NUMBER,
    Origin,
    algorithm,
    code,
    content_key,
    derived_uid,
    describe,
    described,
    equipment,
)

LONGEST_TEXT = 1024
"""Of a segment's description, in characters."""


def candidate_segmentation(result: DetectionResult, origin: Origin, key: str) -> Segmentation | None:
    """The candidates as one segment each, in the order of their ranks; None where there are none.

    The segments are regions of attention, wider than any clot, and not its outline; each shares its tracking UID with
    the candidate's entry in the report.
    """
    detection = result.detection
    if not detection.candidates or result.attention is None:
        return None
    ranks = origin.to_stored(candidate_mask(result, origin.volume))
    segments = [
        SegmentDescription(
            segment_number=candidate.rank,
            segment_label=_label(detection, candidate),
            segmented_property_category=_category(detection),
            segmented_property_type=shown_by(detection),
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm(detection.model),
            tracking_uid=tracking_uid(key, candidate),
            tracking_id=f"candidate {candidate.rank}",
            anatomic_regions=[codes.SCT.Lung],
        )
        for candidate in detection.candidates
    ]
    for segment, candidate in zip(segments, detection.candidates, strict=True):
        segment.SegmentDescription = (
            "Region of attention: where to look, not an outline of a clot. "
            f"Attention {candidate.peak:.2f}, slab probability {candidate.slab_probability:.2f}."
        )
    segmentation = Segmentation(
        source_images=origin.images,
        pixel_array=ranks,
        segmentation_type="BINARY",
        segment_descriptions=segments,
        series_instance_uid=derived_uid(key, "candidates"),
        series_number=FIRST_SERIES_NUMBER + 1,
        sop_instance_uid=derived_uid(key, "candidates", 1),
        instance_number=1,
        content_label="PE_CANDIDATES",
        content_description=described(detection, "PE candidates"),
        **equipment(detection.model),
    )
    describe(segmentation, detection, "PE candidates")
    return segmentation


def reader_segmentation(annotation: SparseAnnotation, origin: Origin) -> Segmentation | None:
    """What readers outlined as one segment; None where nothing is outlined.

    A segmentation cannot say which slices were reviewed, so the segment's description does: what is not listed there
    was not looked at.

    Raises:
        InputError: if the annotation belongs to another CT.
    """
    annotation.check_belongs_to(origin.volume)
    if not annotation.masks:
        return None
    voxels = np.zeros(annotation.shape, bool)
    for index, mask in annotation.masks.items():
        voxels[index] = mask
    readers = list(dict.fromkeys(reviewed.reader for reviewed in annotation.slices if reviewed.reader))
    segment = SegmentDescription(
        segment_number=1,
        segment_label="Pulmonary embolism",
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=codes.SCT.PulmonaryEmbolism,
        algorithm_type="MANUAL",
        anatomic_regions=[codes.SCT.Lung],
    )
    segment.SegmentDescription = _reviewed(annotation)
    payload = annotation.to_json()
    key = content_key(payload, np.packbits(voxels).tobytes(), origin.source.series_uid.encode())
    segmentation = Segmentation(
        source_images=origin.images,
        pixel_array=origin.to_stored(voxels),
        segmentation_type="BINARY",
        segment_descriptions=[segment],
        series_instance_uid=derived_uid(key, "reader"),
        series_number=FIRST_SERIES_NUMBER + 5,
        sop_instance_uid=derived_uid(key, "reader", 1),
        instance_number=1,
        content_label="PE_READER",
        content_description="Embolism outlined by a reader, on reviewed slices only",
        content_creator_name=f"{', '.join(readers).translate(_NOT_IN_A_NAME)[:62]}^" if readers else None,
        **equipment(None),
    )
    describe(segmentation, None, "Embolism outlined by a reader (research use only)")
    return segmentation


def candidate_mask(result: DetectionResult, volume: Volume) -> NDArray[np.uint8]:
    """The rank of the candidate that each voxel of the CT belongs to, 0 elsewhere.

    A voxel is a candidate's where attention, interpolated linearly, reaches the threshold on the candidate's cells or
    beside them. A candidate that falls between two slices keeps the cells of its strongest slab on its slice.

    Raises:
        ValueError: if the detection came without its maps.
    """
    detection, attention = result.detection, result.attention
    if attention is None or result.maps is None:
        raise ValueError("a detection without attention has no mask of candidates")
    probability = np.array([slab.probability for slab in detection.evidence], np.float32)
    regions = candidate_regions(result.maps * probability[:, None, None], attention.spacing_mm).astype(np.uint8)
    beside = ndimage.minimum_filter(np.where(regions == 0, 255, regions), 3)
    spread = np.where(regions == 0, np.where(beside == 255, 0, beside), regions)
    strong = np.greater_equal(resample_like(attention, volume).voxels, 255 * CANDIDATE_THRESHOLD)
    slabs, rows, columns = _nearest_cells(volume, attention)
    ranks: NDArray[np.uint8] = np.pad(spread, (0, 1))[np.ix_(slabs, rows, columns)] * strong
    found = np.bincount(ranks.ravel(), minlength=len(detection.candidates) + 1)
    for candidate in detection.candidates:
        if not found[candidate.rank]:
            cells = np.pad(regions[attention.nearest_slice(candidate.z_mm)] == candidate.rank, (0, 1))
            ranks[candidate.slice_index][cells[np.ix_(rows, columns)]] = candidate.rank
    return ranks


def shown_by(detection: Detection) -> object:
    """What a candidate stands for: pulmonary embolism, or only attention of a model that knows no real embolism."""
    if detection.caution:
        return code("ATTENTION", f"Model attention ({detection.not_clinical.lower()})")
    return codes.SCT.PulmonaryEmbolism


def tracking_uid(key: str, candidate: Candidate) -> str:
    """What a candidate is called in the segmentation and in the report alike."""
    return derived_uid(key, "candidate", candidate.rank)


def _nearest_cells(volume: Volume, grid: Volume) -> list[NDArray[np.int64]]:
    """For every slice, row and column of the CT the nearest one of a grid with the same axes; -1 beyond its ends."""
    nearest = []
    for axis, count in enumerate(volume.shape):
        line = np.zeros((count, 3))
        line[:, axis] = np.arange(count)
        cells = np.rint(grid.to_index(volume.to_lps_mm(line))[:, axis]).astype(np.int64)
        nearest.append(np.where((cells >= 0) & (cells < grid.shape[axis]), cells, -1))
    return nearest


def _label(detection: Detection, candidate: Candidate) -> str:
    what = f"Model attention ({detection.not_clinical.lower()})" if detection.caution else "Candidate"
    return f"{what} {candidate.rank}"


def _category(detection: Detection) -> object:
    return codes.SCT.SpatialAndRelationalConcept if detection.caution else codes.SCT.MorphologicallyAbnormalStructure


def _reviewed(annotation: SparseAnnotation) -> str:
    """Which slices were reviewed, in words that fit a description."""
    kinds: dict[str, list[int]] = {"embolism": [], "embolism, not outlined": [], "none": [], "uncertain": []}
    for reviewed in annotation.slices:
        kinds["embolism, not outlined" if reviewed.not_outlined else reviewed.state].append(reviewed.slice_index)
    if not kinds["embolism, not outlined"]:
        del kinds["embolism, not outlined"]
    lists = "; ".join(f"{kind}: {', '.join(map(str, indices)) or '-'}" for kind, indices in kinds.items())
    text = f"Reviewed slices, 0 nearest the feet. {lists}. All others were not reviewed."
    return text if len(text) <= LONGEST_TEXT else f"{len(annotation.slices)} slices were reviewed, all others not."


_NOT_IN_A_NAME = str.maketrans({"^": " ", "=": " ", "\\": " "})
