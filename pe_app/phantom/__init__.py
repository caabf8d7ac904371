"""Synthetic chest CT with emboli of known place, and emboli painted into real enhanced CT."""

from pe_app.phantom.emboli import Embolus
from pe_app.phantom.painting import PaintedStudy, find_arteries, paint_emboli
from pe_app.phantom.scan import Phantom, PhantomConfig, make_phantom
from pe_app.phantom.studies import write_phantom_studies

__all__ = [
    "Embolus",
    "PaintedStudy",
    "Phantom",
    "PhantomConfig",
    "find_arteries",
    "make_phantom",
    "paint_emboli",
    "write_phantom_studies",
]
