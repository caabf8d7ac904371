"""One study in Slicer's scene: CT, paint and marks, proposal, overlay. MRML only: no Qt, no application, no file.

Slices are named by their index in the canonical order, feet to head; the CT is put into the scene in that order, so
that its K is the slice index whatever the file was. Nothing here is saved with Slicer's scene: the review lives on the
server and in the drafts, and a scene opened another day would show paint that reaches neither.
"""

from __future__ import annotations

from typing import Dict, Iterable, Tuple

import numpy as np
import slicer
import vtk
from vtk.util import numpy_support

from PulmonaryEmbolismLib.images import Image

WINDOWS = {"PE": (700, 100), "Lung": (1500, -600), "Mediastinum": (400, 40)}
"""HU width and level of the window presets."""

EMBOLISM = "embolism"
PROPOSAL = "proposal"

REVIEW_TAG = "PE.Review"
"""Tag of the segment that keeps what is not paint: Slicer's undo brings back tags and voxels together."""

BINARY_LABELMAP = "Binary labelmap"
"""Slicer's name of a segment's voxels; the function that returns it was renamed between 5.8 and 5.10."""

_COLOURS = {EMBOLISM: (0.95, 0.25, 0.2), PROPOSAL: (1.0, 0.85, 0.2)}
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

Masks = Dict[int, np.ndarray]


class StudyScene:
    """The nodes of the open study; ``close`` takes them out of the scene again.

    Args:
        scene: the vtkMRMLScene.
        image: the CT in canonical order.
        name: what the CT is called in Slicer: the study's id.
        editor: the vtkMRMLSegmentEditorNode with which the reader paints.
    """

    def __init__(self, scene, image: Image, name: str, editor) -> None:
        self._scene = scene
        self._editor = editor
        self._image = image
        self.volume = _volume_node(scene, image, name)
        self._show_window(*WINDOWS["PE"])
        self.segmentation = self._segmentation_node(EMBOLISM, 0.25)
        self._proposal = None
        self._attention = None
        self._candidates = None
        self._prepare_editor()

    def close(self) -> None:
        """Remove what was added, displays included: an orphaned display holds its whole CT. The views show nothing."""
        for composite in _nodes(self._scene, "vtkMRMLSliceCompositeNode"):
            composite.SetBackgroundVolumeID(None)
            composite.SetForegroundVolumeID(None)
        self._editor.SetAndObserveSegmentationNode(None)
        self._editor.SetAndObserveSourceVolumeNode(None)
        for node in (self._candidates, self._attention, self._proposal, self.segmentation, self.volume):
            if node is not None:
                _remove(self._scene, node)
        self._candidates = self._attention = self._proposal = self.segmentation = self.volume = self._image = None

    # --- looking

    def show(self, slice_nodes: Iterable) -> None:
        """The CT in every slice view, cut parallel to its own slices."""
        for composite in _nodes(self._scene, "vtkMRMLSliceCompositeNode"):
            composite.SetBackgroundVolumeID(self.volume.GetID())
        for node in slice_nodes:
            node.RotateToVolumePlane(self.volume)

    def jump(self, slice_node, k: int) -> None:
        """Show slice ``k``."""
        rows, columns = self._image.voxels.shape[1:]
        lps = self._image.affine @ (k, (rows - 1) / 2, (columns - 1) / 2, 1)
        slice_node.JumpSliceByOffsetting(*(_LPS_TO_RAS @ lps)[:3])

    def current_slice(self, slice_node) -> int:
        """The slice that a view shows now; the nearest one beyond the ends of the CT."""
        to_ras = slice_node.GetSliceToRAS()
        ras = np.array([to_ras.GetElement(row, 3) for row in range(3)] + [1.0])
        k = np.linalg.solve(self._image.affine, _LPS_TO_RAS @ ras)[0]
        return int(np.clip(round(float(k)), 0, len(self._image.voxels) - 1))

    def set_window(self, name: str) -> None:
        """One of ``WINDOWS``."""
        self._show_window(*WINDOWS[name])

    def hounsfield(self, k: int) -> np.ndarray:
        """The CT's slice ``k``: (rows, columns)."""
        return self._image.voxels[k]

    def place(self, ras: Tuple[float, float, float]) -> Tuple[int, int, int]:
        """Slice, row and column nearest to a place in RAS mm; they may lie outside of the CT."""
        index = np.linalg.solve(self._image.affine, _LPS_TO_RAS @ (*ras, 1.0))[:3]
        return tuple(int(n) for n in np.rint(index))

    def centre(self, slice_nodes: Iterable, k: int, lps_mm: Tuple[float, float, float]) -> None:
        """All views on one place: on slice ``k``, above or below ``lps_mm``."""
        index = np.linalg.solve(self._image.affine, (*lps_mm, 1.0))
        index[0] = k
        ras = (_LPS_TO_RAS @ self._image.affine @ index)[:3]
        for node in slice_nodes:
            node.JumpSliceByCentering(*ras)

    # --- paint and marks

    def masks(self) -> Masks:
        """Every painted slice: (rows, columns) where there is paint."""
        return self._masks_of(self.segmentation, EMBOLISM)

    def paint(self, masks: Masks) -> None:
        """Replace all paint, where it differs."""
        present = self.masks()
        same = {k: mask for k, mask in masks.items() if k in present and np.array_equal(mask, present[k])}
        if not len(same) == len(masks) == len(present):
            self._replace(self.segmentation, EMBOLISM, masks)

    def review_text(self) -> str:
        """What was kept with the paint; "" before anything was."""
        text = vtk.reference("")
        held = self.segmentation.GetSegmentation().GetSegment(EMBOLISM).GetTag(REVIEW_TAG, text)
        return str(text) if held else ""

    def keep_review_text(self, text: str) -> None:
        self.segmentation.GetSegmentation().GetSegment(EMBOLISM).SetTag(REVIEW_TAG, text)

    def show_proposal(self, masks: Masks) -> None:
        """Outlines that are a proposal: in a segmentation of their own, never edited, never sent."""
        if self._proposal is None:
            self._proposal = self._segmentation_node(PROPOSAL, 0.0)
        self._replace(self._proposal, PROPOSAL, masks)

    def proposal(self) -> Masks:
        return {} if self._proposal is None else self._masks_of(self._proposal, PROPOSAL)

    # --- the detection

    def show_attention(self, image: Image) -> None:
        """The attention volume (0 to 255) on its own coarse grid, as foreground; invisible until ``set_overlay``."""
        if self._attention is not None:
            _remove(self._scene, self._attention)
        self._attention = _volume_node(self._scene, image, f"{self.volume.GetName()} attention")
        display = self._attention.GetDisplayNode()
        display.SetAndObserveColorNodeID(_heat(self._scene).GetID())
        display.SetInterpolate(True)
        display.SetWindowLevelMinMax(0, 255)
        display.SetApplyThreshold(True)

    def set_overlay(self, visible: bool, opacity: float, threshold: float) -> None:
        """Show or hide attention above ``threshold`` (0 to 1) and the candidates' numbers."""
        shown = self._attention if visible else None
        if self._attention is not None:
            self._attention.GetDisplayNode().SetThreshold(max(255 * threshold, 1), 255)
        for composite in _nodes(self._scene, "vtkMRMLSliceCompositeNode"):
            composite.SetForegroundVolumeID(shown.GetID() if shown else None)
            composite.SetForegroundOpacity(opacity)
        if self._candidates is not None:
            self._candidates.SetDisplayVisibility(visible)

    def show_candidates(self, candidates: Iterable) -> None:
        """A number at the centre of every candidate, shown with the overlay."""
        if self._candidates is None:
            self._candidates = self._scene.AddNewNodeByClass(
                "vtkMRMLMarkupsFiducialNode", f"{self.volume.GetName()} candidates"
            )
            self._candidates.CreateDefaultDisplayNodes()
            self._candidates.SetLocked(True)
            _keep_out_of_files(self._candidates)
            self._candidates.SetDisplayVisibility(False)
            display = self._candidates.GetDisplayNode()
            display.SetGlyphScale(1.6)
            display.SetTextScale(3.2)
            display.SetSelectedColor(0.35, 0.9, 1.0)
        self._candidates.RemoveAllControlPoints()
        for candidate in candidates:
            ras = (_LPS_TO_RAS @ (*candidate.centre_lps_mm, 1.0))[:3]
            self._candidates.AddControlPoint(vtk.vtkVector3d(*ras), str(candidate.rank))

    # --- how

    def _show_window(self, width: float, level: float) -> None:
        self.volume.GetDisplayNode().SetWindowLevel(width, level)

    def _segmentation_node(self, segment: str, fill: float):
        """An empty segmentation on the CT's grid with one segment."""
        node = self._scene.AddNewNodeByClass("vtkMRMLSegmentationNode", f"{self.volume.GetName()} {segment}")
        node.CreateDefaultDisplayNodes()
        node.SetReferenceImageGeometryParameterFromVolumeNode(self.volume)
        node.GetDisplayNode().SetOpacity2DFill(fill)
        node.GetSegmentation().AddEmptySegment(segment, segment, _COLOURS[segment])
        _keep_out_of_files(node)
        return node

    def _prepare_editor(self) -> None:
        """Paint goes wherever the brush does: Slicer computes a mask of the whole CT anew for every stroke.

        What lies off the slice is taken away afterwards, at no cost (``panel/annotate``).
        """
        editor = self._editor
        editor.SetAndObserveSegmentationNode(self.segmentation)
        editor.SetAndObserveSourceVolumeNode(self.volume)
        editor.SetSelectedSegmentID(EMBOLISM)
        editor.SetMaskMode(slicer.vtkMRMLSegmentationNode.EditAllowedEverywhere)
        editor.SetSourceVolumeIntensityMask(False)
        editor.SetOverwriteMode(slicer.vtkMRMLSegmentEditorNode.OverwriteNone)

    def _masks_of(self, node, segment: str) -> Masks:
        """Read a segment's own labelmap, which covers only the part of the CT that holds something."""
        labelmap = node.GetSegmentation().GetSegment(segment).GetRepresentation(BINARY_LABELMAP)
        scalars = labelmap.GetPointData().GetScalars() if labelmap is not None else None
        if scalars is None or scalars.GetNumberOfTuples() == 0:
            return {}
        i0, i1, j0, j1, k0, k1 = labelmap.GetExtent()
        value = node.GetSegmentation().GetSegment(segment).GetLabelValue()
        part = numpy_support.vtk_to_numpy(scalars).reshape(k1 - k0 + 1, j1 - j0 + 1, i1 - i0 + 1)
        slices, rows, columns = self._image.voxels.shape
        masks = {}
        for k in range(max(k0, 0), min(k1, slices - 1) + 1):
            painted = part[k - k0] == value
            if painted.any():
                mask = np.zeros((rows, columns), bool)
                mask[j0 : j1 + 1, i0 : i1 + 1] = painted
                masks[k] = mask
        return masks

    def _replace(self, owner, segment: str, masks: Masks) -> None:
        """Give a segment a labelmap of its own, as large as its paint."""
        painted = {k: mask for k, mask in masks.items() if mask.any()}
        labelmap = slicer.vtkOrientedImageData()
        labelmap.SetImageToWorldMatrix(_ijk_to_ras(self._image.affine))
        if painted:
            either = np.logical_or.reduce(list(painted.values()))
            rows, columns = np.flatnonzero(either.any(1)), np.flatnonzero(either.any(0))
            box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
            low, high = min(painted), max(painted)
            labelmap.SetExtent(*(int(n) for n in (columns[0], columns[-1], rows[0], rows[-1], low, high)))
            labelmap.AllocateScalars(vtk.VTK_UNSIGNED_CHAR, 1)
            part = numpy_support.vtk_to_numpy(labelmap.GetPointData().GetScalars())
            part = part.reshape(high - low + 1, rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1)
            part[:] = 0
            for k, mask in painted.items():
                part[k - low] = mask[box]
        else:
            labelmap.SetExtent(0, -1, 0, -1, 0, -1)
            labelmap.AllocateScalars(vtk.VTK_UNSIGNED_CHAR, 1)
        held = owner.GetSegmentation().GetSegment(segment)
        held.SetLabelValue(1)
        held.AddRepresentation(BINARY_LABELMAP, labelmap)
        owner.Modified()


def _volume_node(scene, image: Image, name: str):
    """A scalar volume node round the array, which is shared and not copied."""
    voxels = image.voxels
    data = vtk.vtkImageData()
    data.SetDimensions(*voxels.shape[::-1])
    data.GetPointData().SetScalars(numpy_support.numpy_to_vtk(voxels.ravel(), deep=False))
    node = slicer.vtkMRMLScalarVolumeNode()
    node.SetName(name)
    node.SetIJKToRASMatrix(_ijk_to_ras(image.affine))
    node.SetAndObserveImageData(data)
    display = scene.AddNewNodeByClass("vtkMRMLScalarVolumeDisplayNode")
    display.SetAutoWindowLevel(False)
    display.SetAndObserveColorNodeID("vtkMRMLColorTableNodeGrey")
    node.SetAndObserveDisplayNodeID(display.GetID())
    scene.AddNode(node)
    _keep_out_of_files(node)
    return node


def _keep_out_of_files(node) -> None:
    """Leave a node and its displays out of a scene that the reader saves."""
    for held in (node, *_displays(node)):
        held.SetSaveWithScene(False)


def _remove(scene, node) -> None:
    """A node with its displays and its storage, which Slicer would leave behind."""
    storage = node.GetStorageNode()
    if node.IsA("vtkMRMLVolumeNode"):
        node.SetAndObserveImageData(None)  # what the views drew last would hold it
    for held in (*_displays(node), storage, node):
        if held is not None:
            scene.RemoveNode(held)


def _displays(node) -> Tuple:
    return tuple(node.GetNthDisplayNode(i) for i in range(node.GetNumberOfDisplayNodes()))


def _ijk_to_ras(affine: np.ndarray) -> vtk.vtkMatrix4x4:
    """(slice, row, column) -> LPS as Slicer's (column, row, slice) -> RAS."""
    matrix = vtk.vtkMatrix4x4()
    ras = _LPS_TO_RAS @ affine[:, [2, 1, 0, 3]]
    for row in range(4):
        for column in range(4):
            matrix.SetElement(row, column, ras[row, column])
    return matrix


def _heat(scene):
    """The overlay's colours: dark red over orange to pale yellow."""
    node = scene.GetFirstNodeByName("PE attention")
    if node is None:
        node = slicer.vtkMRMLColorTableNode()
        node.SetName("PE attention")
        node.SetTypeToUser()
        node.SetNumberOfColors(256)
        for i in range(256):
            t = i / 255
            node.SetColor(i, f"{i}", min(1.0, 0.35 + 1.1 * t), max(0.0, 1.4 * t - 0.35), max(0.0, 2.0 * t - 1.3), 1.0)
        node.HideFromEditorsOn()
        node.SetSaveWithScene(False)
        node = scene.AddNode(node)
    return node


def _nodes(scene, kind: str) -> Tuple:
    return tuple(scene.GetNthNodeByClass(i, kind) for i in range(scene.GetNumberOfNodesByClass(kind)))
