"""Import this first: it lets tests import the Slicer module's library and the helpers in tests/slicer."""

import sys
from pathlib import Path

MODULE = Path(__file__).parents[1] / "slicer_module" / "PulmonaryEmbolism"

sys.path[:0] = [str(Path(__file__).parent / "slicer"), str(MODULE)]
