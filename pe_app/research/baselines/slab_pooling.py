"""The baseline without a stage II: a study is as suspicious as its slabs on average, or as its worst slab.

Source: section 3.3 of the paper, which finds both little better than chance.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def mean_of_slabs(probabilities: ArrayLike) -> float:
    """Mean of the slab probabilities ``(slabs,)`` of one study."""
    return float(_checked(probabilities).mean())


def maximum_of_slabs(probabilities: ArrayLike) -> float:
    """Maximum of the slab probabilities ``(slabs,)`` of one study."""
    return float(_checked(probabilities).max())


def _checked(probabilities: ArrayLike) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    values = np.asarray(probabilities, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"expected probabilities of one study's slabs, from 0 to 1, got {values}")
    return values
