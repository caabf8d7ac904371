"""The study in Slicer's scene, with Slicer's own MRML libraries: paint stays where it may, views show what is asked."""

import os
from pathlib import Path

import numpy as np
import pytest
import slicer_paths  # noqa: F401
from phantoms import CLOT_SLICE, SHAPE, attention, chest, detection

pytest.importorskip("slicer_core", reason="slicer-core is not installed")

import headless
import slicer
import vtk
from PulmonaryEmbolismLib.answers import Detection
from PulmonaryEmbolismLib.images import Image
from PulmonaryEmbolismLib.scene import GUARD, StudyScene, _ijk_to_ras
from vtk.util import numpy_support


@pytest.fixture
def app():
    app = headless.instance()
    yield app
    app.clear()


@pytest.fixture
def study(app):
    hu, _clot, affine = chest(0)
    editor = app.scene.AddNewNodeByClass("vtkMRMLSegmentEditorNode")
    study = StudyScene(app.scene, Image(hu, affine), "study 1", editor)
    study.show([app.view().node])
    app.view().fit()
    study.editor = editor
    return study


def ball(centre=(CLOT_SLICE, 57, 76), radius_mm=22):
    z, y, x = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    return ((z - centre[0]) * 5) ** 2 + ((y - centre[1]) * 2.6) ** 2 + ((x - centre[2]) * 2.6) ** 2 <= radius_mm**2


def brush(study, app, mask):
    """Paint through the Segment Editor's own logic, as its brush does."""
    if not hasattr(slicer, "vtkSlicerSegmentEditorLogic"):
        pytest.skip("this slicer-core has no Segment Editor logic")
    logic = slicer.vtkSlicerSegmentEditorLogic()
    logic.SetMRMLScene(app.scene)
    logic.SetSegmentEditorNode(study.editor)
    dab = slicer.vtkOrientedImageData()
    dab.SetDimensions(*SHAPE[::-1])
    dab.AllocateScalars(vtk.VTK_UNSIGNED_CHAR, 1)
    dab.SetImageToWorldMatrix(_ijk_to_ras(chest(0)[2]))
    numpy_support.vtk_to_numpy(dab.GetPointData().GetScalars())[:] = mask.astype(np.uint8).ravel()
    logic.UpdateReferenceGeometryImage()
    logic.ResetModifierLabelmapToDefault()
    logic.ModifySegmentByLabelmap(study.segmentation, "embolism", dab, logic.ModificationModeAdd, False, False)


def test_a_view_goes_to_a_slice_and_says_where_it_is(study, app):
    node = app.view().node
    for k in (0, 7, SHAPE[0] - 1):
        study.jump(node, k)
        assert study.current_slice(node) == k
        assert node.GetSliceOffset() == pytest.approx(study._image.slice_z_mm[k])


def test_slicer_lays_the_ct_where_the_file_says(study):
    matrix = vtk.vtkMatrix4x4()
    study.volume.GetIJKToRASMatrix(matrix)
    lps = chest(0)[2] @ (10, 20, 30, 1)
    assert matrix.MultiplyPoint((30, 20, 10, 1))[:3] == pytest.approx((-lps[0], -lps[1], lps[2]))
    assert study.volume.GetImageData().GetScalarComponentAsDouble(30, 20, 10, 0) == chest(0)[0][10, 20, 30]


def test_the_brush_paints_on_the_guarded_slice_only_and_leaves_the_guard_whole(study, app):
    study.guard(CLOT_SLICE)
    brush(study, app, ball())
    masks = study.masks()
    assert list(masks) == [CLOT_SLICE]
    assert np.array_equal(masks[CLOT_SLICE], ball()[CLOT_SLICE])
    assert study._masks_of(GUARD)[CLOT_SLICE].all()


def test_off_the_list_the_brush_paints_nothing(study, app):
    study.guard(None)
    brush(study, app, ball())
    assert study.masks() == {}


def test_the_clot_range_keeps_paint_between_0_and_100_hu(study, app):
    hu = chest(0)[0][CLOT_SLICE]
    study.guard(CLOT_SLICE)
    study.set_clot_range(True, 0, 100)
    brush(study, app, ball())
    assert np.array_equal(study.masks()[CLOT_SLICE], ball()[CLOT_SLICE] & (hu >= 0) & (hu <= 100))


def test_a_guard_that_undo_brought_back_is_set_right(study):
    study.guard(4)
    study._replace(GUARD, {9: np.ones(SHAPE[1:], bool)})
    study.guard(4)
    assert list(study._masks_of(GUARD)) == [4]


def test_paint_is_replaced_and_removed_slice_by_slice(study):
    mask = ball()[CLOT_SLICE]
    study.paint({CLOT_SLICE: mask, 3: mask})
    study.paint_slice(3, None)
    assert list(study.masks()) == [CLOT_SLICE]
    study.paint_slice(CLOT_SLICE, None)
    assert study.masks() == {}


def test_a_proposal_never_reaches_the_readers_segment(study):
    study.show_proposal({5: ball()[CLOT_SLICE]})
    assert study.masks() == {}
    assert list(study.proposal()) == [5]


def test_paint_read_by_slicers_own_exporter_is_the_same(study, app):
    mask = ball()[CLOT_SLICE]
    study.paint({CLOT_SLICE: mask})
    labels = app.scene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode")
    ids = vtk.vtkStringArray()
    ids.InsertNextValue("embolism")
    logic = app.logics["segmentations"]
    logic.ExportSegmentsToLabelmapNode(study.segmentation, ids, labels, study.volume)
    voxels = numpy_support.vtk_to_numpy(labels.GetImageData().GetPointData().GetScalars()).reshape(SHAPE)
    app.scene.RemoveNode(labels)
    assert np.array_equal(voxels[CLOT_SLICE] > 0, mask)
    assert (voxels > 0).sum() == mask.sum()


def test_the_overlay_glows_on_the_clot_when_asked_and_only_then(study, app):
    _hu, clot, affine = chest(0)
    voxels, coarse = attention(clot, affine)
    study.jump(app.view().node, CLOT_SLICE)
    study.show_attention(Image(voxels, coarse))
    study.show_candidates(Detection.from_json(detection(clot, affine)).candidates)
    study.set_overlay(False, 0.5, 0.3)
    plain = app.view().render().astype(int)
    study.set_overlay(True, 0.5, 0.3)
    folder = os.environ.get("PE_SCREENSHOTS")
    glowing = app.view().render(Path(folder) / "slice-overlay.png" if folder else None).astype(int)
    assert np.ptp(plain, axis=2).max() < 8  # grey
    red = np.argwhere(glowing[..., 0] - glowing[..., 2] > 40)
    rows, columns = np.argwhere(clot[CLOT_SLICE]).mean(0)
    fit = 512 / (SHAPE[1])  # the view shows the whole slice
    assert np.abs(red.mean(0) - np.array([rows + 0.5, columns + 0.5]) * fit).max() < 0.12 * 512


def test_a_higher_threshold_shows_less(study, app):
    _hu, clot, affine = chest(0)
    voxels, coarse = attention(clot, affine)
    study.jump(app.view().node, CLOT_SLICE)
    study.show_attention(Image(voxels, coarse))
    coloured = []
    for threshold in (0.1, 0.8):
        study.set_overlay(True, 0.5, threshold)
        pixels = app.view().render().astype(int)
        coloured.append(int((np.ptp(pixels, axis=2) > 40).sum()))
    assert coloured[0] > coloured[1] > 0


def test_closing_a_study_leaves_nothing_of_it_in_the_scene(study, app):
    count = app.scene.GetNumberOfNodesByClass
    study.show_candidates(())
    study.close()
    for kind in ("vtkMRMLScalarVolumeNode", "vtkMRMLSegmentationNode", "vtkMRMLMarkupsNode"):
        assert count(kind) == 0
    assert app.view().render().max() < 30
