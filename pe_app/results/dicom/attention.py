"""DICOM Parametric Map of the attention, on its own coarse grid in the patient, as numbers from 0 to 1."""

from __future__ import annotations

import highdicom
import numpy as np
from highdicom import VOILUTTransformation
from highdicom.pm import ParametricMap, RealWorldValueMapping
from pydicom.sr.codedict import codes

from pe_app.model.detector import DetectionResult
from pe_app.results.dicom.origin import FIRST_SERIES_NUMBER, Origin, derived_uid, describe, described, equipment


def attention_map(result: DetectionResult, origin: Origin, key: str) -> ParametricMap | None:
    """The attention, weighted with each slab's probability; None where there is none.

    One frame a slab, of 24 x 24 cells, each with its place: about 0.1 MB, where the CT's grid would take as much as
    the CT twice over and pretend a sharpness that the map does not have. Numbers are 32-bit floats, the kind of
    parametric map that viewers' readers (dcmqi, OHIF) know.
    """
    detection, attention = result.detection, result.attention
    if attention is None:
        return None
    grid = highdicom.Volume(
        attention.voxels.astype(np.float32) / 255,
        attention.affine,
        coordinate_system="PATIENT",
        frame_of_reference_uid=origin.source.frame_of_reference_uid,
    )
    parametric_map = ParametricMap(
        source_images=origin.images,
        pixel_array=grid,
        series_instance_uid=derived_uid(key, "attention"),
        series_number=FIRST_SERIES_NUMBER + 2,
        sop_instance_uid=derived_uid(key, "attention", 1),
        instance_number=1,
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[
            RealWorldValueMapping(
                lut_label="ATTENTION",
                lut_explanation="Attention x slab probability",
                unit=codes.UCUM.NoUnits,
                value_range=(0.0, 1.0),
                slope=1.0,
                intercept=0.0,
                quantity_definition=codes.DCM.Saliency,
            )
        ],
        voi_lut_transformations=[VOILUTTransformation(window_center=0.5, window_width=1.0)],
        content_label="PE_ATTENTION",
        content_description=described(detection, "PE attention"),
        **equipment(detection.model),
    )
    describe(parametric_map, detection, "PE attention")
    return parametric_map
