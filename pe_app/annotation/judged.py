"""What readers' decisions on candidates teach: places where no embolism is, and emboli that the model did not see."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pe_app.annotation.record import CandidateDecision
from pe_app.annotation.sparse import SparseAnnotation
from pe_app.ct.volume import Volume

REACH_MM = 12.0
"""How far from an outline an accepted candidate may lie that found it: a cell of the attention map, half a slab."""


def rejected_places(annotation: SparseAnnotation, volume: Volume) -> dict[int, NDArray[np.bool_]]:
    """``(rows, columns)`` by slice: the boxes of rejected candidates on the slices of their strongest slabs.

    What is outlined as embolism on that slice is no part of them. A candidate of unknown extent is a square of one
    cell of the attention map.
    """
    places: dict[int, NDArray[np.bool_]] = {}
    for decision in annotation.decisions:
        if decision.decision != "rejected":
            continue
        index = decision.slice_index
        place = places.setdefault(index, np.zeros(volume.shape[1:], dtype=bool))
        place[_box(decision, volume)] = True
        if index in annotation.masks:
            place &= ~annotation.masks[index]
    return {index: place for index, place in places.items() if place.any()}


def missed_slices(annotation: SparseAnnotation, volume: Volume) -> tuple[int, ...]:
    """The outlined slices on which no candidate lies that a reader accepted; none where no candidate was judged."""
    if not annotation.decisions:
        return ()
    found = [decision for decision in annotation.decisions if decision.lies_on_embolism]
    centres = volume.to_index(np.array([decision.centre_lps_mm for decision in found]).reshape(-1, 3))
    spacing = np.array(volume.spacing_mm)
    missed = []
    for index, outline in annotation.masks.items():
        pixels = np.argwhere(outline)
        for centre in centres:
            apart_mm = np.linalg.norm((pixels - centre[1:]) * spacing[1:], axis=1).min()
            if abs(centre[0] - index) * spacing[0] <= REACH_MM and apart_mm <= REACH_MM:
                break
        else:
            missed.append(index)
    return tuple(missed)


def _box(decision: CandidateDecision, volume: Volume) -> tuple[slice, slice]:
    """Rows and columns of a candidate's box, at least one cell wide, inside the CT."""
    _, row, column = volume.to_index(np.array([decision.centre_lps_mm]))[0]
    wide, high, _ = decision.extent_mm or (REACH_MM,) * 3
    _, row_mm, column_mm = volume.spacing_mm
    parts = []
    for centre, length, count in ((row, high / row_mm, volume.shape[1]), (column, wide / column_mm, volume.shape[2])):
        first, last = round(centre - length / 2), round(centre + length / 2)
        parts.append(slice(min(max(first, 0), count - 1), max(min(last, count - 1), 0) + 1))
    return parts[0], parts[1]
