"""Headers as slicer-core 5.11 writes them; pynrrd writes the files, so that no reader agrees with its own writer."""

from __future__ import annotations

import gzip
import math

import nrrd
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pe_app.annotation.seg_nrrd import read_segment, read_segmentation, write_segment
from pe_app.common.errors import InputError
from pe_app.ct.volume import Volume, axial_affine

SHAPE = (9, 14, 11)
SPACING = (2.5, 0.8, 0.7)
ORIGIN = (-31.0, 12.5, -200.25)
DIRECTIONS = np.diag(SPACING[::-1])  # of the file's axes x, y, z in LPS
CT = Volume(np.zeros(SHAPE, dtype=np.int16), axial_affine(SPACING, ORIGIN), "the CT")
QUICK = settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


def slicer_file(path, voxels, directions, origin, segments, space="left-posterior-superior", master=True):
    """A .seg.nrrd written by pynrrd; ``voxels`` in the file's axis order (list axis first where 4-D)."""
    header = {
        "type": "unsigned char",
        "space": space,
        "kinds": ["list"] * (voxels.ndim - 3) + ["domain"] * 3,
        "space directions": np.vstack([np.full((voxels.ndim - 3, 3), np.nan), directions]),  # nan is written "none"
        "space origin": np.array(origin, float),
        "encoding": "gzip",
    }
    if master:
        header["Segmentation_MasterRepresentation"] = "Binary labelmap"
        header["Segmentation_ContainedRepresentationNames"] = "Binary labelmap|"
        header["Segmentation_ConversionParameters"] = "Smoothing factor|0.5|Smoothing: 0 to 1.&Oversampling|1|x:=y&"
    for number, (name, layer, value) in enumerate(segments):
        header |= {f"Segment{number}_Name": name, f"Segment{number}_ID": f"Segment_{number}"}
        header |= {f"Segment{number}_Layer": str(layer), f"Segment{number}_LabelValue": str(value)}
        header[f"Segment{number}_Tags"] = "TerminologyEntry:Segmentation category~SCT^85756007^Tissue~^^|"
    nrrd.write(str(path), voxels.astype(np.uint8), header, index_order="F")


def truth() -> np.ndarray:
    mask = np.zeros(SHAPE, dtype=np.uint8)
    mask[2, 3:6, 4:6] = 1
    mask[5, 7:10, 2:4] = 1
    return mask


def test_a_cropped_extent_with_its_own_origin_lands_on_the_ct(tmp_path):
    voxels = truth().transpose(2, 1, 0)[1:7, 2:12, 2:6]
    origin = np.array(ORIGIN) + np.array([1, 2, 2]) @ DIRECTIONS
    slicer_file(tmp_path / "s.seg.nrrd", voxels, DIRECTIONS, origin, [("embolism", 0, 1)])
    assert np.array_equal(read_segmentation(tmp_path / "s.seg.nrrd", CT).voxels, truth())


@QUICK
@given(st.permutations(range(3)), st.tuples(st.booleans(), st.booleans(), st.booleans()), st.booleans())
def test_any_order_of_axes_in_either_space_lands_on_the_ct(tmp_path, order, flips, ras):
    voxels, directions, origin = truth().transpose(2, 1, 0), DIRECTIONS.copy(), np.array(ORIGIN)
    for axis in range(3):
        if flips[axis]:
            origin = origin + directions[axis] * (voxels.shape[axis] - 1)
            directions[axis] *= -1
            voxels = np.flip(voxels, axis)
    voxels, directions = voxels.transpose(order), directions[list(order)]
    sign = np.array([-1, -1, 1]) if ras else 1
    space = "right-anterior-superior" if ras else "left-posterior-superior"
    path = tmp_path / "s.seg.nrrd"
    slicer_file(path, voxels, directions * sign, origin * sign, [("embolism", 0, 1)], space)
    assert np.array_equal(read_segmentation(path, CT).voxels, truth())


def test_of_several_segments_in_one_layer_the_embolism_is_taken(tmp_path):
    voxels = np.full(SHAPE, 3)
    voxels[truth() == 1] = 2
    segments = [("_guard", 0, 3), ("embolism", 0, 2), ("lung", 0, 1)]
    slicer_file(tmp_path / "s.seg.nrrd", voxels.transpose(2, 1, 0), DIRECTIONS, ORIGIN, segments)
    assert np.array_equal(read_segmentation(tmp_path / "s.seg.nrrd", CT).voxels, truth())


def test_overlapping_segments_in_layers_are_told_apart(tmp_path):
    voxels = np.stack([np.ones(SHAPE), truth()]).transpose(0, 3, 2, 1)
    slicer_file(tmp_path / "s.seg.nrrd", voxels, DIRECTIONS, ORIGIN, [("_guard", 0, 1), ("embolism", 1, 1)])
    assert nrrd.read_header(str(tmp_path / "s.seg.nrrd"))["dimension"] == 4
    assert np.array_equal(read_segmentation(tmp_path / "s.seg.nrrd", CT).voxels, truth())


def test_the_only_segment_that_is_no_helper_is_taken_whatever_its_name(tmp_path):
    segments = [("_guard", 0, 2), ("Segment_1", 0, 1)]
    slicer_file(tmp_path / "s.seg.nrrd", truth().transpose(2, 1, 0), DIRECTIONS, ORIGIN, segments)
    assert np.array_equal(read_segmentation(tmp_path / "s.seg.nrrd", CT).voxels, truth())


def test_two_segments_without_a_name_for_either_are_refused(tmp_path):
    segments = [("left", 0, 1), ("right", 0, 2)]
    slicer_file(tmp_path / "s.seg.nrrd", truth().transpose(2, 1, 0), DIRECTIONS, ORIGIN, segments)
    with pytest.raises(InputError, match=r"which segment holds the emboli\? found left, right; name one"):
        read_segmentation(tmp_path / "s.seg.nrrd", CT)


def test_a_plain_label_map_counts_as_one_segment(tmp_path):
    labels = truth().transpose(2, 1, 0) * np.arange(1, 15)[:, None]  # any label, not 1 alone
    slicer_file(tmp_path / "s.nrrd", labels, DIRECTIONS, ORIGIN, [], master=False)
    assert np.array_equal(read_segmentation(tmp_path / "s.nrrd", CT).voxels, truth())


def test_a_segment_without_voxels_is_one_voxel_of_any_geometry_and_reads_as_empty(tmp_path):
    slicer_file(tmp_path / "s.seg.nrrd", np.zeros((1, 1, 1)), np.diag((-1, -1, 1)), (0, 0, 0), [("embolism", 0, 1)])
    assert not read_segmentation(tmp_path / "s.seg.nrrd", CT).voxels.any()


def test_oversampled_or_shifted_voxels_are_refused(tmp_path):
    path = tmp_path / "s.seg.nrrd"
    voxels = truth().transpose(2, 1, 0)
    for directions, origin in ((DIRECTIONS / 2, ORIGIN), (DIRECTIONS, np.add(ORIGIN, (0.35, 0, 0)))):
        slicer_file(path, voxels, directions, origin, [("embolism", 0, 1)])
        with pytest.raises(InputError, match="its voxels are not those of the CT"):
            read_segmentation(path, CT)


def test_an_outline_outside_of_the_ct_is_refused(tmp_path):
    path = tmp_path / "s.seg.nrrd"
    slicer_file(path, truth().transpose(2, 1, 0), DIRECTIONS, np.add(ORIGIN, (0, 0, 25.0)), [("embolism", 0, 1)])
    with pytest.raises(InputError, match="outlined outside of the CT"):
        read_segmentation(path, CT)


def test_header_numbers_that_are_none_are_refused(tmp_path):
    path = tmp_path / "s.seg.nrrd"
    slicer_file(path, truth().transpose(2, 1, 0), DIRECTIONS, ORIGIN, [("embolism", 0, "one")])
    with pytest.raises(InputError, match="Segment0_LabelValue must be an integer, got 'one'"):
        read_segmentation(path, CT)
    slicer_file(path, truth().transpose(2, 1, 0), DIRECTIONS, ORIGIN, [("embolism", 5, 1)])
    with pytest.raises(InputError, match="label 1 in layer 5 of 1"):
        read_segmentation(path, CT)
    slicer_file(path, truth().transpose(2, 1, 0), DIRECTIONS, ORIGIN, [("embolism", 0, 0)])
    with pytest.raises(InputError, match="label 0 in layer 0 of 1"):
        read_segmentation(path, CT)


def test_tags_survive(tmp_path):
    tags = {"PE.Review": '{"a":[1.5,"Zo\u00eb: x"]}', "Segmentation.Status": "inprogress"}
    write_segment(CT.with_voxels(truth()), tmp_path / "a.seg.nrrd", tags)
    assert read_segment(tmp_path / "a.seg.nrrd").tags == tags
    assert np.array_equal(read_segment(tmp_path / "a.seg.nrrd").mask.voxels, truth())


# damaged and hostile files


def test_a_truncated_or_foreign_segmentation_is_refused(tmp_path):
    path = tmp_path / "a.seg.nrrd"
    write_segment(CT.with_voxels(truth()), tmp_path / "a.seg.nrrd", {})
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[:300], whole[:-12]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.seg\.nrrd: is damaged or not a segmentation"):
            read_segmentation(path, CT)


def test_a_header_that_points_to_another_file_is_refused(tmp_path):
    write_segment(CT.with_voxels(truth()), tmp_path / "a.seg.nrrd", {})
    header = (tmp_path / "a.seg.nrrd").read_bytes().split(b"\n\n")[0]
    (tmp_path / "secret.raw.gz").write_bytes(gzip.compress(bytes(math.prod(SHAPE))))
    detached = tmp_path / "b.seg.nrrd"
    detached.write_bytes(header + b"\ndata file: " + str(tmp_path / "secret.raw.gz").encode() + b"\n\n")
    with pytest.raises(InputError, match=r"b\.seg\.nrrd: its voxels are in another file"):
        read_segmentation(detached, CT)
