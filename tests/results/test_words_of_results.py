"""What a model reports is never called a finding: "no finding" is a result to a radiologist, a normal study."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text
from small_series import detection_of, read_turned
from test_result_files import VOLUME, detection
from test_worklist_page import CONTRAST, DEMO, UNTRAINED, Page, analysed, failed

from pe_app.ct.volume import Volume, axial_affine
from pe_app.model.detector import DetectionResult
from pe_app.results.dicom import detection_objects
from pe_app.results.result_files import write_result
from pe_app.results.study_page import study_page
from pe_app.results.worklist_page import worklist_page

ROOT = Path(__file__).resolve().parents[2]
BANNED = re.compile(r"\bfindings?\b|\bmeaningless\b", re.IGNORECASE)
CODED_BY_DICOM = {"Finding", "Finding Site", "Quality Finding"}
"""Concept names of TID 1500 and TID 1419, fixed by the standard."""
MODELS = pytest.mark.parametrize("reasons", [(), (DEMO,), (UNTRAINED,)], ids=["trained", "demo", "untrained"])


def with_reasons(*reasons):
    return replace(detection(candidates=(10, 20)), reasons=reasons)


@MODELS
def test_no_page_calls_what_a_model_reports_a_finding(reasons):
    study = Page(study_page(DetectionResult(with_reasons(*reasons), None), VOLUME, "study")).words
    outcomes = [analysed("a", 0.97, *reasons), analysed("b", 0.2, *reasons), analysed("c", None, CONTRAST), failed("d")]
    worklist = Page(worklist_page(outcomes, Path("nowhere"))).words
    for words in (study, worklist):
        assert not BANNED.search(words)
        assert ("not a clinical result" in words) == bool(reasons)


@MODELS
def test_no_picture_calls_what_a_model_reports_a_finding(reasons, tmp_path, monkeypatch, write_series):
    drawn = []
    set_text = Text.set_text
    monkeypatch.setattr(Text, "set_text", lambda self, text: (drawn.append(str(text)), set_text(self, text))[1])
    attention = Volume(np.full((5, 4, 4), 200, np.uint8), axial_affine((30.0, 80.0, 80.0)))
    write_result(DetectionResult(with_reasons(*reasons), attention), VOLUME, tmp_path, "study")
    _, volume = read_turned(write_series)
    detection_objects(detection_of(volume, *reasons), volume)
    assert not [text for text in drawn if BANNED.search(text)]
    assert any("not a clinical result" in text for text in drawn) == bool(reasons)


@MODELS
def test_no_dicom_object_calls_what_a_model_reports_a_finding(reasons, write_series):
    _, volume = read_turned(write_series)
    for dataset in detection_objects(detection_of(volume, *reasons), volume).values():
        words = [str(element.value) for element in dataset.iterall() if element.VR != "SQ"]
        assert not [value for value in words if BANNED.search(value) and value not in CODED_BY_DICOM]


def test_no_text_in_slicer_calls_what_a_model_reports_a_finding():
    texts = {}
    for path in sorted((ROOT / "slicer_module").rglob("*")):
        if path.suffix == ".py":
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            texts[path] = [
                node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)
            ]
        elif path.suffix in (".ui", ".md", ".txt"):
            texts[path] = [path.read_text(encoding="utf-8")]
    assert len(texts) > 10
    assert not [(path.name, text) for path, found in texts.items() for text in found if BANNED.search(text)]
