"""The study in Slicer's scene, with Slicer's own MRML libraries: paint and marks, views, and nothing left behind."""

import gc
import os
import re
import weakref
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
from PulmonaryEmbolismLib.scene import StudyScene
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


def test_paint_is_replaced_and_removed_slice_by_slice(study):
    mask = ball()[CLOT_SLICE]
    study.paint({CLOT_SLICE: mask, 3: mask})
    study.paint({CLOT_SLICE: mask})
    assert list(study.masks()) == [CLOT_SLICE]
    study.paint({})
    assert study.masks() == {}


def test_slicers_history_brings_back_paint_and_what_is_kept_with_it(study):
    history = slicer.vtkSegmentationHistory()
    history.SetSegmentation(study.segmentation.GetSegmentation())
    study.keep_review_text("before")
    history.SaveState()
    study.paint({3: ball()[CLOT_SLICE]})
    study.keep_review_text("after")
    history.RestorePreviousState()
    assert (study.masks(), study.review_text()) == ({}, "before")
    history.RestoreNextState()
    assert (list(study.masks()), study.review_text()) == ([3], "after")


def test_slicer_computes_no_mask_for_a_stroke(study):
    assert study.editor.GetMaskMode() == slicer.vtkMRMLSegmentationNode.EditAllowedEverywhere
    assert not study.editor.GetSourceVolumeIntensityMask()


def test_the_readers_segment_table_holds_one_segment(study):
    study.show_proposal({5: ball()[CLOT_SLICE]})
    assert study.segmentation.GetSegmentation().GetNumberOfSegments() == 1


def test_all_views_are_centred_on_a_place_and_the_axial_one_on_its_slice(study, app):
    nodes = [app.view(*view).node for view in (("Red", "Axial"), ("Green", "Coronal"), ("Yellow", "Sagittal"))]
    lps = chest(0)[2] @ (CLOT_SLICE + 0.4, 40, 30, 1)
    study.centre(nodes, CLOT_SLICE, tuple(lps[:3]))
    there = [[node.GetSliceToRAS().GetElement(row, 3) for row in range(3)] for node in nodes]
    assert there == [pytest.approx((-lps[0], -lps[1], study._image.slice_z_mm[CLOT_SLICE]))] * 3
    assert study.current_slice(nodes[0]) == CLOT_SLICE


def test_a_place_in_a_view_is_a_voxel(study):
    lps = chest(0)[2] @ (7, 40, 30, 1)
    assert study.place((-lps[0], -lps[1], lps[2])) == (7, 40, 30)


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
    size = app.view().size[0]
    fit = size / SHAPE[1]  # the view shows the whole slice
    assert np.abs(red.mean(0) - np.array([rows + 0.5, columns + 0.5]) * fit).max() < 0.12 * size


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


def test_ten_studies_one_after_the_other_leave_no_node_and_no_growing_memory_behind(app):
    hu, clot, affine = chest(0)
    voxels, coarse = attention(clot, affine)
    editor = app.scene.AddNewNodeByClass("vtkMRMLSegmentEditorNode")
    held, nodes = [], []
    for number in range(10):
        image = Image(hu.copy(), affine)
        held.append(weakref.ref(image.voxels))
        study = StudyScene(app.scene, image, f"study {number}", editor)
        study.show([app.view().node])
        study.paint({CLOT_SLICE: clot[CLOT_SLICE]})
        study.show_proposal({5: clot[CLOT_SLICE]})
        study.show_attention(Image(voxels.copy(), coarse))
        study.show_candidates(Detection.from_json(detection(clot, affine)).candidates)
        app.view().render()
        study.close()
        app.view().render()
        del image, study
        nodes.append(app.scene.GetNumberOfNodes())
    gc.collect()
    assert len(set(nodes)) == 1
    still = [number for number, voxels in enumerate(held) if voxels() is not None]
    assert still in ([], [9])  # a slice view keeps the last CT that it drew, until it draws another
    assert app.view().render().max() < 30


def test_a_scene_that_the_reader_saves_holds_nothing_of_the_review(study, app):
    study.show_proposal({5: ball()[CLOT_SLICE]})
    study.show_candidates(())
    app.scene.SetSaveToXMLString(True)
    app.scene.Commit()
    kinds = set(re.findall(r"<(\w+)", app.scene.GetSceneXMLString()))
    assert "Slice" in kinds
    assert not {kind for kind in kinds if kind.startswith(("Segmentation", "Volume", "Markups"))}
