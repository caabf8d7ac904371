"""A detection as files that people open: JSON, attention volume, pictures, web page."""

from __future__ import annotations

from pathlib import Path

from pe_app.common.files import write_durably
from pe_app.common.schema import json_text
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import resample_like, write_volume
from pe_app.model.detector import DetectionResult
from pe_app.results.pictures import thumbnails
from pe_app.results.review_picture import review_picture
from pe_app.results.study_page import study_page

THUMBNAILS = "thumbnails.jpg"


def write_result(
    result: DetectionResult, volume: Volume | None, folder: Path, name: str, *, full_resolution: bool = False
) -> None:
    """Write detection.json, review.png, thumbnails.jpg and index.html; with an attention volume also attention.nrrd.

    Args:
        result: what the model said.
        volume: the CT it was said of; None where the files made none: then there are no pictures.
        folder: made where missing; the same files of an earlier detection are replaced, each all or nothing.
        name: what the page calls the study.
        full_resolution: also write attention_full.nrrd, the attention on the CT's own grid.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in ("detection.json", "attention.nrrd", "attention_full.nrrd", "review.png", THUMBNAILS):
        (folder / stale).unlink(missing_ok=True)
    if volume is not None:
        if result.attention is not None:
            write_volume(result.attention, folder / "attention.nrrd")
            if full_resolution:
                write_volume(resample_like(result.attention, volume), folder / "attention_full.nrrd")
        write_durably(folder / "review.png", review_picture(result, volume, name))
        write_durably(folder / THUMBNAILS, thumbnails(result, volume))
    write_durably(folder / "index.html", study_page(result, volume, name))
    write_durably(folder / "detection.json", json_text(result.detection.to_json(), indent=1))
