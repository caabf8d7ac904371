"""Blinded reading, over the real server: what a reader is sent before and after submitting."""

import json

import pytest
from app_server import running_server, write_phantoms

from pe_app.ct.slabs import SlabConfig
from pe_app.model.detector import Detector
from pe_app.model.slab_encoder import EncoderConfig
from pe_app.model.study_classifier import ClassifierConfig
from pe_app.phantom import PhantomConfig

SLABS = SlabConfig(matrix=64, crop=64, slab_count=10)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blinded")
    write_phantoms(folder / "studies", {"alpha": True, "beta": False, "gamma": True}, PhantomConfig(64, spacing_mm=5.0))
    network = ClassifierConfig(feature_channels=64, grid=SLABS.grid, filters=4)
    Detector.untrained(0, SLABS, EncoderConfig(width=8), network).save(folder / "model.safetensors")
    with running_server(folder / "studies", folder / "model.safetensors", "--blinded") as running:
        yield running


def label(server, study, word, reader, **more):
    info = json.dumps({"pe_label": word, "reader": reader, **more})
    return server.request("PUT", f"/datastore/image/info?image={study}", data={"info": info})


def row(server, study, reader):
    rows = server.json("GET", f"/pe/worklist?reader={reader}")["studies"]
    return next(row for row in rows if row["study"] == study)


def detect(server, study, reader):
    params = json.dumps({"reader": reader})
    return server.request("POST", f"/infer/detection?image={study}&output=json", data={"params": params})


def test_no_result_of_the_model_reaches_a_reader_before_the_label_and_all_of_it_after(server):
    assert server.json("GET", "/info/")["pe"]["blinded"]
    refused = detect(server, "alpha", "ann")
    assert refused.status_code == 403
    assert "after you have submitted" in refused.json()["detail"]
    assert label(server, "alpha", "positive", "ann", based_on=None).ok
    assert detect(server, "alpha", "ann").ok
    assert row(server, "alpha", "ann")["probability"] is not None
    assert server.json("GET", "/pe/studies/alpha?reader=ann")["detection"]["probability"] is not None
    for other in ("bo", ""):
        hidden = row(server, "alpha", other)
        assert (hidden["probability"], hidden["label"], hidden["label_reader"]) == (None, "", "")
        assert hidden["state"] == "not_started"
        assert server.request("GET", f"/pe/studies/alpha?reader={other}").status_code == 403


def test_suspicious_slices_and_telling_orders_are_kept_back(server):
    label(server, "beta", "negative", "ann", based_on=None)
    detect(server, "beta", "ann")
    shown = server.json("GET", "/pe/studies/beta?reader=ann")["schedule"]
    revision = row(server, "beta", "ann")["label_revision"]
    assert {entry["why"] for entry in shown} == {"schedule", "suspicious"}
    label(server, "beta", "", "ann", based_on=revision)
    assert server.request("GET", "/pe/studies/beta?reader=ann").ok  # seen is seen
    assert server.request("POST", "/activelearning/most_uncertain", json={"reader": "bo"}).status_code in (403, 404)


def test_the_label_tells_whether_it_was_given_blind_and_since_when_results_were_shown(server):
    first = label(server, "gamma", "negative", "ann", based_on=None).json()
    label(server, "gamma", "positive", "ann", based_on=first["label_revision"])
    folder = server.studies / ".pe" / "history" / "gamma" / "study-label"
    saved = [json.loads(path.read_text())["info"] for path in sorted(folder.glob("*.version"))]
    assert saved[0]["blinded"] is True
    assert saved[1]["unblinded"] == first["label_time"]
    assert "blinded" not in saved[1]


def test_a_study_of_another_reader_is_neither_offered_nor_told_by_stock_routes(server):
    label(server, "gamma", "uncertain", "ann")
    offered = server.json("POST", "/activelearning/random", json={"reader": "bo", "work": "slices"}).get("id")
    assert offered not in ("alpha", "gamma")
    for path in ("/datastore/image/info?image=gamma", "/datastore/?output=all", "/pe/studies/gamma/history"):
        assert server.request("GET", path).status_code == 403, path
    assert server.request("GET", "/datastore/image?image=gamma").ok
