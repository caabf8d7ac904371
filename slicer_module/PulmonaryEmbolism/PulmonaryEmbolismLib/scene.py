"""One study in Slicer's scene: CT, paint, guard, overlay, marks. MRML only: no Qt, no application, no file.

Slices are named by their index in the canonical order, feet to head; the CT is put into the scene in that order, so
that its K is the slice index whatever the file was.
"""

from __future__ import annotations

from typing import Dict, Iterable, Optional, Tuple

import numpy as np
import slicer
import vtk
from vtk.util import numpy_support

from PulmonaryEmbolismLib.images import Image

WINDOWS = {"PE": (700, 100), "Lung": (1500, -600), "Mediastinum": (400, 40)}
"""HU width and level of the window presets."""

EMBOLISM = "embolism"
GUARD = "_guard"
PROPOSAL = "proposal"

BINARY_LABELMAP = "Binary labelmap"
"""Slicer's name of a segment's voxels; the function that returns it was renamed between 5.8 and 5.10."""

_COLOURS = {EMBOLISM: (0.95, 0.25, 0.2), GUARD: (0.5, 0.5, 0.5), PROPOSAL: (1.0, 0.85, 0.2)}
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

Masks = Dict[int, np.ndarray]


class StudyScene:
    """The nodes of the open study; ``close`` takes them out of the scene again.

    Args:
        scene: the vtkMRMLScene.
        image: the CT in canonical order.
        name: what the CT is called in Slicer: the study's id.
        editor: the vtkMRMLSegmentEditorNode whose masking confines the paint.
    """

    def __init__(self, scene, image: Image, name: str, editor) -> None:
        self._scene = scene
        self._editor = editor
        self._image = image
        self.volume = _volume_node(scene, image, name)
        self._show_window(*WINDOWS["PE"])
        self.segmentation = scene.AddNewNodeByClass("vtkMRMLSegmentationNode", f"{name} embolism")
        self.segmentation.CreateDefaultDisplayNodes()
        self.segmentation.SetReferenceImageGeometryParameterFromVolumeNode(self.volume)
        display = self.segmentation.GetDisplayNode()
        display.SetOpacity2DFill(0.25)
        for segment in (EMBOLISM, PROPOSAL, GUARD):
            self.segmentation.GetSegmentation().AddEmptySegment(segment, segment, _COLOURS[segment])
        display.SetSegmentVisibility(GUARD, False)
        display.SetSegmentOpacity2DFill(PROPOSAL, 0.0)
        self._attention = None
        self._candidates = None
        self._guarded: Optional[int] = None
        self._prepare_editor()

    def close(self) -> None:
        """Remove what was added; the views show nothing."""
        for composite in _nodes(self._scene, "vtkMRMLSliceCompositeNode"):
            composite.SetBackgroundVolumeID(None)
            composite.SetForegroundVolumeID(None)
        self._editor.SetAndObserveSegmentationNode(None)
        self._editor.SetAndObserveSourceVolumeNode(None)
        for node in (self._candidates, self._attention, self.segmentation, self.volume):
            if node is not None:
                self._scene.RemoveNode(node)

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

    # --- paint

    def masks(self) -> Masks:
        """Every painted slice: (rows, columns) where there is paint."""
        return self._masks_of(EMBOLISM)

    def paint(self, masks: Masks) -> None:
        """Replace all paint."""
        self._replace(EMBOLISM, masks)

    def paint_slice(self, k: int, mask: Optional[np.ndarray]) -> None:
        """Replace the paint of one slice; None takes it away."""
        masks = self.masks()
        before = masks.pop(k, None)
        if mask is not None and mask.any():
            if before is not None and np.array_equal(before, mask):
                return
            masks[k] = mask
        elif before is None:
            return
        self._replace(EMBOLISM, masks)

    def select_paint(self) -> None:
        """The brush paints embolism, whichever segment was chosen in the Segment Editor's table or by its keys."""
        if self._editor.GetSegmentationNode() is self.segmentation and self._editor.GetSelectedSegmentID() != EMBOLISM:
            self._editor.SetSelectedSegmentID(EMBOLISM)

    def guard(self, k: Optional[int]) -> None:
        """Confine the Segment Editor's paint to slice ``k``; None forbids paint everywhere."""
        if k == self._guarded and self._guard_is_whole():
            return
        self._guarded = k
        whole = np.ones(self._image.voxels.shape[1:], bool)
        self._replace(GUARD, {} if k is None else {k: whole})
        self.segmentation.GetDisplayNode().SetSegmentVisibility(GUARD, False)

    def set_clot_range(self, on: bool, low: float, high: float) -> None:
        """Confine paint to Hounsfield units from ``low`` to ``high``, or not."""
        self._editor.SetSourceVolumeIntensityMask(on)
        self._editor.SetSourceVolumeIntensityMaskRange(low, high)

    def show_proposal(self, masks: Masks) -> None:
        """Outlines that are a proposal: in a segment of their own, never sent."""
        self._replace(PROPOSAL, masks)

    def proposal(self) -> Masks:
        return self._masks_of(PROPOSAL)

    # --- the detection

    def show_attention(self, image: Image) -> None:
        """The attention volume (0 to 255) on its own coarse grid, as foreground; invisible until ``set_overlay``."""
        if self._attention is not None:
            self._scene.RemoveNode(self._attention)
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

    def _prepare_editor(self) -> None:
        """Paint only inside the guard, and never at the cost of another segment: "overwrite" would eat the guard."""
        editor = self._editor
        editor.SetAndObserveSegmentationNode(self.segmentation)
        editor.SetAndObserveSourceVolumeNode(self.volume)
        editor.SetSelectedSegmentID(EMBOLISM)
        editor.SetMaskMode(slicer.vtkMRMLSegmentationNode.EditAllowedInsideSingleSegment)
        editor.SetMaskSegmentID(GUARD)
        editor.SetOverwriteMode(slicer.vtkMRMLSegmentEditorNode.OverwriteNone)

    def _representation(self, segment: str):
        return self.segmentation.GetSegmentation().GetSegment(segment).GetRepresentation(BINARY_LABELMAP)

    def _guard_is_whole(self) -> bool:
        """Whether the guard is what it was set to: undo in the Segment Editor may have brought an older one back."""
        return sorted(self._masks_of(GUARD)) == ([] if self._guarded is None else [self._guarded])

    def _masks_of(self, segment: str) -> Masks:
        """Read a segment's own labelmap, which covers only the part of the CT that holds something."""
        labelmap = self._representation(segment)
        scalars = labelmap.GetPointData().GetScalars() if labelmap is not None else None
        if scalars is None or scalars.GetNumberOfTuples() == 0:
            return {}
        i0, i1, j0, j1, k0, k1 = labelmap.GetExtent()
        value = self.segmentation.GetSegmentation().GetSegment(segment).GetLabelValue()
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

    def _replace(self, segment: str, masks: Masks) -> None:
        """Give a segment a labelmap of its own, as large as its paint: quick, and no other segment is touched."""
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
        node = self.segmentation.GetSegmentation().GetSegment(segment)
        node.SetLabelValue(1)
        node.AddRepresentation(BINARY_LABELMAP, labelmap)
        self.segmentation.Modified()


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
    return scene.AddNode(node)


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
        node = scene.AddNode(node)
    return node


def _nodes(scene, kind: str) -> Tuple:
    return tuple(scene.GetNthNodeByClass(i, kind) for i in range(scene.GetNumberOfNodesByClass(kind)))
