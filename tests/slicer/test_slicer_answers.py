"""What the Slicer module reads of a detection is what the published schema promises."""

import json
from pathlib import Path

import pytest
import slicer_paths  # noqa: F401 - puts the module on the path
from PulmonaryEmbolismLib.answers import Detection as Read

from pe_app.ct.quality import Reason
from pe_app.model.detection import Candidate, Detection, Evidence, ExtentEstimate, ImageIdentity, ModelIdentity

SCHEMA = json.loads(
    (Path(__file__).resolve().parents[2] / "docs" / "schemas" / "pe-detection-2.json").read_text(encoding="utf-8")
)
WRITTEN = Detection(
    "analysed",
    (Reason("weak_contrast", "weak contrast: 150 HU", refuses=False),),
    0.71,
    0.5,
    (Evidence(0, -300.0, 2, 0.8, 1.25, (1.0, 2.0, -300.0)), Evidence(1, -294.0, 4, 0.1, 0.0, None)),
    (
        Candidate(
            1, -300.0, 2, (1.0, 2.0, -300.0), (22.0, 11.0, 6.0), 1.0, 0.8, 22.0, (1, 3), 2.5, "left", "peripheral"
        ),
    ),
    ImageIdentity((40, 64, 64), (2.5, 0.8, 0.8), "ab" * 32),
    ModelIdentity("starter", "1", "cd" * 32, trained=True, date="2026-01-02"),
    extent_estimate=ExtentEstimate(2.5, 0.1),
)


class Watched(dict):
    """A JSON object that notes which of its keys are looked at."""

    def __init__(self, content, place, seen):
        super().__init__(content)
        self.place, self.seen = place, seen

    def __getitem__(self, key):
        return self.get(key)

    def get(self, key, default=None):
        self.seen.add((*self.place, key))
        value = super().get(key, default)
        if isinstance(value, dict):
            return Watched(value, (*self.place, key), self.seen)
        if isinstance(value, list):
            place = (*self.place, key)
            return [Watched(entry, place, self.seen) if isinstance(entry, dict) else entry for entry in value]
        return value


def promised(place):
    """The part of the schema at a place of property names."""
    part = SCHEMA
    for name in place:
        part = part["properties"][name]
        part = part.get("items", part)
        if "$ref" in part:
            part = SCHEMA["$defs"][part["$ref"].rpartition("/")[2]]
    return part


def test_every_field_that_slicer_reads_is_in_the_published_schema():
    seen = set()
    Read.from_json(Watched(WRITTEN.to_json(), (), seen))
    assert {("status",), ("candidates", "size_mm"), ("model", "sha256"), ("reasons", "message")} <= seen
    for place in seen:
        assert promised(place), place


def test_slicer_reads_the_values_that_were_written():
    read = Read.from_json(json.loads(json.dumps(WRITTEN.to_json())))
    assert (read.status, read.probability, read.threshold) == ("analysed", 0.71, 0.5)
    assert [(slab.slice_index, slab.z_mm, slab.probability) for slab in read.evidence] == [
        (2, -300, 0.8),
        (4, -294, 0.1),
    ]
    (candidate,) = read.candidates
    assert (candidate.side, candidate.level, candidate.size_mm) == ("left", "peripheral", 22.0)
    assert candidate.centre_lps_mm == (1.0, 2.0, -300.0)
    assert (read.model.name, read.model.trained) == ("starter", True)


@pytest.mark.parametrize("status", SCHEMA["properties"]["status"]["enum"])
def test_slicer_knows_every_status(status):
    assert Read.from_json({"status": status}).refused == (status == "refused")
