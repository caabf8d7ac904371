"""What people open: the pictured slices, and a page that no study name can break."""

import html.parser
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pe_app.ct.quality import Reason
from pe_app.ct.volume import Volume, axial_affine
from pe_app.model.detection import Candidate, Detection, Evidence, ExtentEstimate, ImageIdentity, ModelIdentity
from pe_app.model.detector import DetectionResult
from pe_app.results.pictures import APART_MM, strongest_slices, thumbnails
from pe_app.results.result_files import write_result
from pe_app.results.study_page import study_page
from pe_app.results.words import verdict

VOLUME = Volume(np.full((40, 32, 32), -1000, np.int16), axial_affine((4.0, 10.0, 10.0)))


def detection(probability: float | None = 0.7, candidates: tuple[int, ...] = (), name: str = "m") -> Detection:
    evidence = tuple(
        Evidence(k, 4.0 * k, k, float(p), 0.5, (0.0, 0.0, 4.0 * k)) for k, p in enumerate(np.linspace(0, 0.9, 40))
    )
    listed = tuple(
        Candidate(rank, 4.0 * k, k, (0.0, 0.0, 4.0 * k), (10.0, 10.0, 4.0), 1.0, 0.9)
        for rank, k in enumerate(candidates, start=1)
    )
    refused = probability is None
    reasons = (Reason("no_contrast", "blood of 40 HU", refuses=True),) if refused else ()
    return Detection(
        "refused" if refused else "analysed",
        reasons,
        probability,
        0.5,
        () if refused else evidence,
        listed,
        ImageIdentity.of(VOLUME),
        ModelIdentity(name, "1", "ab" * 32, trained=True),
        {"total": 1.0},
    )


def test_pictured_slices_are_those_of_candidates_then_of_slabs_and_lie_apart():
    chosen = strongest_slices(detection(candidates=(10, 11, 20)), VOLUME)
    assert chosen[:2] == (10, 20)
    assert chosen[2] == 39  # the strongest slab
    assert all(abs(a - b) * 4.0 >= APART_MM for a in chosen for b in chosen if a != b)


def test_a_refused_study_is_pictured_too_and_says_why(tmp_path):
    write_result(DetectionResult(detection(None), None), VOLUME, tmp_path, "study")
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"detection.json", "review.png", "thumbnails.jpg", "index.html"}
    assert "no_contrast" in (tmp_path / "index.html").read_text()
    assert verdict(detection(None)) == "Not analysed: no_contrast"


@pytest.mark.parametrize(("code", "words"), [("untrained_model", "Untrained model"), ("demo_model", "Demonstration")])
def test_the_verdict_of_a_model_that_saw_no_real_embolism_begins_with_a_caution(code, words):
    said = replace(detection(), reasons=(Reason(code, "it saw none", refuses=False),))
    assert verdict(said).startswith(words)
    assert ": not a clinical result. Probability" in verdict(said)
    assert verdict(detection()).startswith("Probability")


def test_an_attention_volume_of_an_earlier_detection_does_not_outlive_a_refusal(tmp_path):
    attention = Volume(np.zeros((5, 4, 4), np.uint8), axial_affine((30.0, 80.0, 80.0)))
    write_result(DetectionResult(detection(), attention), VOLUME, tmp_path, "study")
    assert (tmp_path / "attention.nrrd").exists()
    write_result(DetectionResult(detection(None), None), VOLUME, tmp_path, "study")
    assert not (tmp_path / "attention.nrrd").exists()


def test_a_study_whose_files_make_no_ct_gets_a_page_with_the_reason_and_no_picture(tmp_path):
    (tmp_path / "review.png").write_bytes(b"of an earlier detection")
    unread = replace(detection(None), image=ImageIdentity((0, 0, 0), (0.0, 0.0, 0.0), ""))
    write_result(DetectionResult(unread, None), None, tmp_path, "study")
    assert {path.name for path in tmp_path.iterdir()} == {"detection.json", "index.html"}
    page = (tmp_path / "index.html").read_text()
    assert "blood of 40 HU" in page
    assert "<img" not in page


def test_thumbnails_show_each_pictured_slice_with_attention_where_it_is():
    hu = np.full((40, 64, 64), -1000, np.int16)
    hu[:, 8:56, 8:56] = 100  # the body
    volume = Volume(hu, axial_affine((4.0, 5.0, 5.0)))
    attention = np.zeros((40, 4, 4), np.uint8)
    attention[10, 1, 1] = 255
    grid = Volume(attention, volume.affine @ np.array([[1, 0, 0, 0], [0, 16, 0, 7.5], [0, 0, 16, 7.5], [0, 0, 0, 1.0]]))
    found = replace(detection(candidates=(10, 20)), evidence=())
    strip = np.asarray(Image.open(io.BytesIO(thumbnails(DetectionResult(found, grid), volume))), dtype=int)
    height, width = strip.shape[0], strip.shape[1] // 3
    first, second = strip[:, :width], strip[:, width : 2 * width]
    coloured = np.abs(first[..., 0] - first[..., 2]) > 30  # gray has no colour
    rows, columns = np.nonzero(coloured)
    assert 0.2 < rows.mean() / height < 0.5
    assert 0.2 < columns.mean() / width < 0.5
    assert not (np.abs(second[..., 0] - second[..., 2]) > 30).any()


def test_the_page_says_side_level_and_size_and_names_the_extent_an_estimate():
    placed = replace(
        detection(candidates=(10,)).candidates[0],
        size_mm=22.0, slices=(8, 12), volume_ml=1.5, side="left", level="peripheral",
    )  # fmt: skip
    found = replace(detection(), candidates=(placed,), extent_estimate=ExtentEstimate(1.5, 0.06))
    page = study_page(DetectionResult(found, None), VOLUME, "study")
    assert "left, segmental artery or beyond" in page
    assert "region of attention 22 mm" in page
    assert "slice 9 of 40 from the feet to slice 13 of 40 from the feet" in page
    assert "Extent estimate" in page
    assert "Not a clot burden" in page


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", "{name}", '"><img src=x onerror=alert(1)>', "a&b"])
def test_no_name_breaks_the_page(hostile):
    class Tags(html.parser.HTMLParser):
        def __init__(self):
            super().__init__()
            self.seen, self.text = [], ""

        def handle_starttag(self, tag, attrs):
            self.seen.append((tag, dict(attrs).get("onerror")))

        def handle_data(self, data):
            self.text += data

    page = Tags()
    page.feed(study_page(DetectionResult(detection(name=hostile), None), None, hostile))
    assert not any(tag == "script" or onerror for tag, onerror in page.seen)
    assert hostile in page.text
