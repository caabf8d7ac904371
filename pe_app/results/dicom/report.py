"""Structured report (TID 1500): probability, threshold, evidence, candidates, model, and why there is no number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from highdicom.sr import (
    AlgorithmIdentification,
    CodedConcept,
    Comprehensive3DSR,
    CoordinatesForMeasurement3D,
    DeviceObserverIdentifyingAttributes,
    FindingSite,
    ImageRegion3D,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    PlanarROIMeasurementsAndQualitativeEvaluations,
    QualitativeEvaluation,
    RelationshipTypeValues,
    SourceImageForMeasurement,
    TextContentItem,
    TrackingIdentifier,
)
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from pe_app.model.detection import NOT_CLINICAL, NOTICE, Candidate, Detection, Evidence, Point
from pe_app.results.dicom.origin import (
    FIRST_SERIES_NUMBER,
    MANUFACTURER,
    Origin,
    code,
    derived_uid,
    describe,
    equipment,
)
from pe_app.results.dicom.outlines import shown_by, tracking_uid

UNTRAINED = "untrained_model"

_SIDES = {"left": codes.SCT.Left, "right": codes.SCT.Right, "midline": codes.SCT.Midline}
_LEVELS = {"central": codes.SCT.Central, "peripheral": codes.SCT.Peripheral}


def structured_report(
    detection: Detection, origin: Origin, key: str, others: Sequence[Dataset] = ()
) -> Comprehensive3DSR:
    """What the model says of a study, or why it says nothing.

    A refused study and an untrained model have no probability, no evidence and no candidates here: only the reasons.

    Args:
        detection: the model's word.
        origin: the CT.
        key: the identity of the detection (``content_key``).
        others: the segmentation and the parametric map, listed as evidence.
    """
    report = MeasurementReport(
        observation_context=ObservationContext(
            observer_device_context=ObserverContext(
                codes.DCM.Device,
                DeviceObserverIdentifyingAttributes(
                    uid=derived_uid("device", detection.model.sha256),
                    name="pe-app",
                    manufacturer_name=MANUFACTURER,
                    model_name=f"{detection.model.name} {detection.model.version}"[:64],
                    serial_number=detection.model.sha256,
                ),
            )
        ),
        procedure_reported=codes.SCT.ComputedTomography,
        imaging_measurements=_groups(detection, origin, key),
        title=_title(detection),
    )
    sr = Comprehensive3DSR(
        evidence=[*origin.images, *others],
        content=report[0],
        series_instance_uid=derived_uid(key, "report"),
        series_number=FIRST_SERIES_NUMBER + 3,
        sop_instance_uid=derived_uid(key, "report", 1),
        instance_number=1,
        manufacturer=MANUFACTURER,
        is_complete=True,
    )
    own = equipment(detection.model)
    sr.ManufacturerModelName, sr.SoftwareVersions = own["manufacturer_model_name"], own["software_versions"]
    sr.DeviceSerialNumber = own["device_serial_number"]
    refused = detection.probability is None
    describe(sr, detection, "PE report, refused" if refused else "PE report")
    return sr


def has_numbers(detection: Detection) -> bool:
    """Whether the numbers may leave in a report: never those of a model with random weights."""
    return detection.probability is not None and not any(reason.code == UNTRAINED for reason in detection.reasons)


def _title(detection: Detection) -> Code | CodedConcept:
    if not detection.caution:
        return codes.DCM.ImagingMeasurementReport
    return code("NOTCLINICAL", f"{detection.caution}; report")


def _groups(detection: Detection, origin: Origin, key: str) -> list[MeasurementsAndQualitativeEvaluations]:
    groups = [_study(detection, key)]
    if has_numbers(detection):
        groups.append(_evidence(detection, origin, key))
        groups += [_candidate(detection, candidate, origin, key) for candidate in detection.candidates]
    return groups


def _study(detection: Detection, key: str) -> MeasurementsAndQualitativeEvaluations:
    """The study as a whole: probability and threshold, or that it was not analysed; every reason, and the notice."""
    measurements = []
    evaluations = [
        QualitativeEvaluation(
            codes.DCM.SummaryOfAnalyses,
            codes.DCM.Succeeded if detection.status == "analysed" else codes.DCM.NotAttempted,
        )
    ]
    if has_numbers(detection) and detection.probability is not None:
        measurements = [
            Measurement(
                codes.DCM.Probability, detection.probability, codes.UCUM.NoUnits, algorithm_id=_model(detection)
            ),
            Measurement(codes.DCM.ThresholdValue, detection.threshold, codes.UCUM.NoUnits),
        ]
        extent = detection.extent_estimate
        if extent is not None:
            name = code("EXTENT", "Extent estimate of attention, no clot burden")
            measurements.append(Measurement(name, extent.volume_ml, codes.UCUM.CubicCentimeter))
        side = code("ATORABOVE", "At or above") if detection.positive else code("BELOW", "Below")
        evaluations.append(QualitativeEvaluation(code("VSTHRESHOLD", "Probability against threshold"), side))
    if any(not reason.refuses and reason.code not in NOT_CLINICAL for reason in detection.reasons):
        evaluations.append(QualitativeEvaluation(codes.DCM.ImagingStudyQuality, codes.RADLEX.LimitedQuality))
    evaluations += [
        QualitativeEvaluation(
            code("REFUSAL", "Why it was not analysed") if reason.refuses else codes.DCM.QualityFinding,
            code(reason.code, reason.code.replace("_", " ")),
        )
        for reason in detection.reasons
    ]
    group = MeasurementsAndQualitativeEvaluations(
        TrackingIdentifier(derived_uid(key, "study"), "study"),
        finding_type=shown_by(detection) if has_numbers(detection) else None,
        algorithm_id=_model(detection),
        measurements=measurements or None,
        qualitative_evaluations=evaluations,
    )
    for text in (NOTICE, *(f"{reason.code}: {reason.message}" for reason in detection.reasons)):
        group[0].ContentSequence.append(
            TextContentItem(codes.DCM.Comment, text, relationship_type=RelationshipTypeValues.CONTAINS)
        )
    return group


def _evidence(detection: Detection, origin: Origin, key: str) -> MeasurementsAndQualitativeEvaluations:
    """Every slab's probability, with its slice and, where attention has one, the place of its maximum."""
    return MeasurementsAndQualitativeEvaluations(
        TrackingIdentifier(derived_uid(key, "evidence"), "evidence of every slab, feet to head"),
        finding_type=code("SLABEVIDENCE", "Evidence of slabs"),
        algorithm_id=_model(detection),
        measurements=[_slab(slab, origin, key) for slab in detection.evidence],
    )


def _slab(slab: Evidence, origin: Origin, key: str) -> Measurement:
    place = [_coordinates(slab.peak_lps_mm, origin)] if slab.peak_lps_mm else None
    return Measurement(
        codes.DCM.Probability,
        slab.probability,
        codes.UCUM.NoUnits,
        tracking_identifier=TrackingIdentifier(derived_uid(key, "slab", slab.slab), f"slab {slab.slab}"),
        referenced_images=[_slice(slab.slice_index, origin)],
        referenced_coordinates=place,
    )


def _candidate(
    detection: Detection, candidate: Candidate, origin: Origin, key: str
) -> PlanarROIMeasurementsAndQualitativeEvaluations:
    """Where to look: a point in the patient, which its segment shares the tracking UID with."""
    sideways, front_back, upwards = candidate.extent_mm
    numbers: list[tuple[Code | CodedConcept, float, Code]] = [
        (codes.DCM.Probability, candidate.slab_probability, codes.UCUM.NoUnits),
        (codes.DCM.Saliency, candidate.peak, codes.UCUM.NoUnits),
        (codes.SCT.Width, sideways, codes.UCUM.Millimeter),
        (codes.SCT.Depth, front_back, codes.UCUM.Millimeter),
        (codes.DCM.Height, upwards, codes.UCUM.Millimeter),
    ]
    return PlanarROIMeasurementsAndQualitativeEvaluations(
        TrackingIdentifier(tracking_uid(key, candidate), f"candidate {candidate.rank}"),
        referenced_region=ImageRegion3D(
            "POINT", np.array([candidate.centre_lps_mm]), origin.source.frame_of_reference_uid
        ),
        finding_type=shown_by(detection),
        finding_sites=[
            FindingSite(codes.SCT.Lung, _SIDES.get(candidate.side or ""), _LEVELS.get(candidate.level or ""))
        ],
        algorithm_id=_model(detection),
        measurements=[
            Measurement(name, value, unit, referenced_images=[_slice(candidate.slice_index, origin)])
            for name, value, unit in numbers
        ],
    )


def _model(detection: Detection) -> AlgorithmIdentification:
    model = detection.model
    return AlgorithmIdentification(
        f"pe-app {model.name}", model.version or "0", [f"SHA-256 {model.sha256}"], manufacturer=MANUFACTURER
    )


def _slice(slice_index: int, origin: Origin) -> SourceImageForMeasurement:
    sop_class, sop_instance, frame = origin.reference(slice_index)
    return SourceImageForMeasurement(sop_class, sop_instance, None if frame is None else [frame])


def _coordinates(place: Point, origin: Origin) -> CoordinatesForMeasurement3D:
    return CoordinatesForMeasurement3D("POINT", np.array([place]), origin.source.frame_of_reference_uid)
