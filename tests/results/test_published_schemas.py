"""docs/schemas is what the code reads and writes."""

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from small_series import detection_of, read_turned
from test_worklist_page import DEMO, analysed, failed

from pe_app.annotation.sparse import SparseAnnotation
from pe_app.ct.source_series import source_path, write_source
from pe_app.results.published_schemas import published_schemas

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "schemas"


def validator(name: str) -> jsonschema.Draft7Validator:
    schema = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    detection = json.loads((FOLDER / "pe-detection-2.json").read_text(encoding="utf-8"))
    if name == "pe-result-1.json":  # refers to the other file
        schema["$defs"] = {**schema["$defs"], **detection.pop("$defs"), "Detection": detection}
        schema["properties"]["detection"]["anyOf"][0]["$ref"] = "#/$defs/Detection"
    return jsonschema.Draft7Validator(schema)


def test_the_published_schemas_are_fresh():
    written = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json")}
    assert written == published_schemas(), "run python -m pe_app.results.published_schemas docs/schemas"


def test_every_file_that_is_written_follows_its_published_schema(write_series, tmp_path):
    _, volume = read_turned(write_series)
    detection = detection_of(volume, DEMO).detection
    annotation = SparseAnnotation.empty(volume)
    write_source(replace(volume.source, instances=volume.source.instances[:3]), source_path(tmp_path / "ct.nrrd"))
    written = {
        "pe-detection-2.json": detection.to_json(),
        "pe-result-1.json": analysed("a", 0.7, DEMO).to_json(),
        "pe-annotation-2.json": annotation.to_json(),
        "pe-source-1.json": json.loads(source_path(tmp_path / "ct.nrrd").read_text()),
    }
    for name, payload in written.items():
        validator(name).validate(json.loads(json.dumps(payload)))
    validator("pe-result-1.json").validate(failed("f").to_json())


@pytest.mark.parametrize(
    ("place", "value"),
    [("status", "banana"), ("probability", "high"), ("threshold", None), ("schema", "pe-detection/3")],
)
def test_a_wrong_value_breaks_the_published_schema(place, value):
    payload = analysed("a", 0.7).to_json()
    assert not validator("pe-result-1.json").is_valid({**payload, "detection": {**payload["detection"], place: value}})
