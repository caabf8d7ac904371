"""Every version of a label over REST and with ``pe-app labels``: listed, fetched, restored, never rewritten."""

import json

import nrrd
import numpy as np
import pytest
from app_server import running_server
from small_studies import CLASSIFIER, ENCODER, SLABS, small_chest
from typer.testing import CliRunner

from pe_app.annotation.sparse import SparseAnnotation
from pe_app.cli import app as command_line
from pe_app.common.errors import InputError
from pe_app.ct.volume_io import write_volume
from pe_app.model.detector import Detector

STUDIES = ("one", "two", "three", "four", "five", "six", "seven")


@pytest.fixture(scope="module")
def chest():
    return small_chest(1, emboli=2)


@pytest.fixture(scope="module")
def server(chest, tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    for name in STUDIES:
        write_volume(chest[0], folder / "studies" / f"{name}.nrrd")
    Detector.untrained(0, SLABS, ENCODER, CLASSIFIER).save(folder / "model.safetensors")
    Detector.untrained(1, SLABS, ENCODER, CLASSIFIER).save(folder / "other.safetensors")
    with running_server(folder / "studies", folder / "model.safetensors") as running:
        yield running


@pytest.fixture
def save(server, chest, tmp_path):
    """``save(study, slices, reader)`` saves a review of these slices, and answers what the server says."""

    def save(study, slices, reader="ann", headers=None, **more):
        annotation = SparseAnnotation.from_mask(*chest, slices, reader, "2026-11-02T08:00:00Z")
        annotation.write(tmp_path / "annotation.json", chest[0])
        with (tmp_path / "annotation.seg.nrrd").open("rb") as file:
            return server.json(
                "PUT",
                f"/datastore/label?image={study}",
                headers=headers,
                data={"params": json.dumps({"annotation": annotation.to_json(), "reader": reader, **more})},
                files={"label": ("annotation.seg.nrrd", file)},
            )

    return save


def versions(server, study):
    return server.json("GET", f"/pe/studies/{study}/history")["versions"]


def outlined(content, path):
    path.write_bytes(content)
    return np.flatnonzero(nrrd.read(str(path))[0].any(axis=(0, 1))).tolist()


def command(*words):
    answer = CliRunner().invoke(command_line, ["labels", *map(str, words)])
    if answer.exception and not isinstance(answer.exception, SystemExit):
        raise answer.exception
    return answer.output


def test_every_save_is_listed_with_reader_time_client_model_and_slices(server, save):
    model = server.json("GET", "/info/")["pe"]["model"]["sha256"]
    save("one", [6, 10], "ann", headers={"User-Agent": "3D Slicer 5.8"})
    server.request("POST", "/infer/detection?image=one")
    save("one", [6, 10, 14], "bob", client="stock plugin")
    server.json("PUT", "/datastore/image/info?image=one", data={"info": '{"pe_label": "positive", "reader": "eve"}'})
    found = versions(server, "one")
    assert {entry["kind"] for entry in found} == {"annotation", "study_label"}
    label = next(entry for entry in found if entry["kind"] == "study_label")
    assert (label["label"], label["reader"], label["current"]) == ("positive", "eve", True)
    second, first = [entry for entry in found if entry["kind"] == "annotation"]
    assert (first["reader"], second["reader"]) == ("ann", "bob")
    assert (first["client"], second["client"]) == ("3D Slicer 5.8", "stock plugin")
    assert (first["model_seen"], second["model_seen"]["sha256"]) == (None, model)
    assert (first["current"], second["current"], second["previous"]) == (False, True, first["revision"])
    assert (sum(first["slices"].values()), sum(second["slices"].values())) == (2, 3)
    assert all(entry["time"].startswith("20") for entry in found)


def test_an_earlier_version_is_fetched_as_it_was(server, save, chest, tmp_path):
    drawn = np.flatnonzero(chest[1].voxels.any(axis=(1, 2))).tolist()
    first = save("two", drawn[:2])["revision"]
    second = save("two", drawn)["revision"]
    for revision, slices in ((first, drawn[:2]), (second, drawn)):
        entry = server.json("GET", f"/pe/studies/two/history/{revision}")
        assert [reviewed["slice_index"] for reviewed in entry["annotation"]["slices"]] == slices
        label = server.request("GET", f"/pe/studies/two/history/{revision}/label")
        assert outlined(label.content, tmp_path / "fetched.seg.nrrd") == slices
        assert "two.seg.nrrd" in label.headers["Content-Disposition"]


def test_restoring_makes_a_new_version_and_rewrites_none(server, save, chest, tmp_path):
    first = save("three", [6, 10])["revision"]
    second = save("three", [6, 10, 14])["revision"]
    folder = server.studies / ".pe" / "history" / "three" / "annotation"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "current.json"}
    stale = server.request("POST", f"/pe/studies/three/history/{first}/restore", json={"based_on": first})
    assert stale.status_code == 409
    assert stale.json()["revision"] == second
    restored = server.json(
        "POST", f"/pe/studies/three/history/{first}/restore", json={"based_on": second, "reader": "ada"}
    )
    assert restored["restored_from"] == first
    assert (restored["reader"], restored["previous"], restored["current"]) == ("ada", second, True)
    details = server.json("GET", "/pe/studies/three")
    assert details["revision"] == restored["revision"]
    assert [entry["slice_index"] for entry in details["annotation"]["slices"]] == [6, 10]
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert [entry["revision"] for entry in versions(server, "three")] == [restored["revision"], second, first]
    shown = server.request("GET", "/datastore/label?label=three&tag=draft").content
    assert outlined(shown, tmp_path / "shown.nrrd") == outlined(
        (folder / f"{first}.seg.nrrd").read_bytes(), tmp_path / "first.nrrd"
    )


def test_a_removed_label_and_a_former_study_label_come_back(server, save):
    revision = save("four", [6, 10])["revision"]
    assert server.request("DELETE", "/datastore/label?id=four&tag=draft").ok
    assert server.json("GET", "/pe/studies/four")["annotation"] is None
    removal = versions(server, "four")[0]
    assert removal["kind"] == "removal"
    refused = server.request("POST", f"/pe/studies/four/history/{removal['revision']}/restore", json={})
    assert refused.status_code == 422
    server.json("POST", f"/pe/studies/four/history/{revision}/restore", json={"based_on": None})
    assert server.json("GET", "/pe/studies/four")["tag"] == "draft"
    for label in ("positive", "negative"):
        server.json("PUT", "/datastore/image/info?image=four", data={"info": json.dumps({"pe_label": label})})
    said = [entry for entry in versions(server, "four") if entry["kind"] == "study_label"]
    assert [entry["label"] for entry in said] == ["negative", "positive"]
    server.json("POST", f"/pe/studies/four/history/{said[1]['revision']}/restore")
    assert server.json("GET", "/pe/studies/four")["label"] == "positive"


def put_label(server, study, label, reader, **more):
    info = json.dumps({"pe_label": label, "reader": reader, **more})
    return server.request("PUT", f"/datastore/image/info?image={study}", data={"info": info})


def row(server, study):
    return next(row for row in server.json("GET", "/pe/worklist")["studies"] if row["study"] == study)


def test_a_study_label_has_a_reader_a_time_and_a_version_and_can_be_taken_back(server):
    assert (row(server, "six")["state"], row(server, "six")["label_revision"]) == ("not_started", None)
    first = put_label(server, "six", "positive", "ann", based_on=None).json()
    assert (first["label"], first["label_reader"]) == ("positive", "ann")
    found = row(server, "six")
    assert (found["state"], found["label"], found["label_revision"]) == (
        "labelled",
        "positive",
        first["label_revision"],
    )
    assert found["label_time"].startswith("20")
    back = put_label(server, "six", "", "ann", based_on=first["label_revision"]).json()
    assert (row(server, "six")["state"], row(server, "six")["label"]) == ("not_started", "")
    assert back["label_revision"] != first["label_revision"]


def test_a_label_given_over_another_readers_is_a_conflict_that_shows_it_and_the_same_sent_twice_is_not(server):
    first = put_label(server, "seven", "negative", "bo", based_on=None)
    assert put_label(server, "seven", "negative", "bo", based_on=None).json() == first.json()
    refused = put_label(server, "seven", "positive", "ann", based_on=None)
    assert refused.status_code == 409
    assert refused.json()["label"] == {
        "pe_label": "negative",
        "label_reader": "bo",
        "label_time": first.json()["label_time"],
        "label_revision": first.json()["label_revision"],
    }
    agreed = put_label(server, "seven", "positive", "ann", based_on=first.json()["label_revision"])
    assert agreed.json()["label"] == "positive"


@pytest.mark.parametrize("revision", ["000001-00000000", "current", "..%2Fcurrent", "x" * 300, "%00"])
def test_a_version_is_a_name_and_never_a_path(server, save, revision):
    save("five", [6])
    for method, end in (("GET", ""), ("GET", "/label"), ("POST", "/restore")):
        answer = server.request(method, f"/pe/studies/five/history/{revision}{end}")
        assert answer.status_code in (404, 405)
        assert answer.json()["detail"]
    assert server.request("GET", "/pe/studies/nobody/history").status_code == 404


def test_the_command_line_works_on_the_folder_that_a_server_serves(server, save, tmp_path):
    first = save("five", [6, 10])["revision"]
    second = save("five", [6, 10, 14])["revision"]
    listed = command("list", server.studies, "five")
    assert listed.index(second) < listed.index(first)
    assert "by ann" in listed
    shown = command("show", server.studies, "five", first, "--out", tmp_path / "out")
    assert "slice 6 " in shown
    assert "slice 14 " not in shown
    assert [path.suffixes for path in (tmp_path / "out").iterdir()] == [[".seg", ".nrrd"]]
    assert "from " + first in command("restore", server.studies, "five", first, "--reader", "ada")
    details = server.json("GET", "/pe/studies/five")
    assert [entry["slice_index"] for entry in details["annotation"]["slices"]] == [6, 10]
    assert versions(server, "five")[0]["client"] == "pe-app"
    with pytest.raises(InputError, match="no version"):
        command("show", server.studies, "five", "000009-00000000")
    with pytest.raises(InputError, match="no study"):
        command("list", server.studies, "nobody")


def test_models_are_listed_pinned_and_rolled_back_without_a_restart(server):
    from pe_monailabel.store.models import Models

    start = server.json("GET", "/pe/models")
    assert (start["models"], start["pinned"]) == ([], False)
    new = Models(server.studies / ".pe" / "models", server.studies.parent / "model.safetensors").publish(
        server.studies.parent / "other.safetensors"
    )
    listed = server.json("GET", "/pe/models")
    assert listed["served"]["sha256"] == new.sha256 == server.json("GET", "/info/")["pe"]["model"]["sha256"]
    assert len(listed["models"]) == 2
    assert server.json("POST", "/pe/models/rollback")["served"] == start["served"]
    assert server.request("POST", "/pe/models/rollback").status_code == 422
    pinned = server.json("POST", f"/pe/models/{new.sha256[:12]}/pin")
    assert (pinned["served"]["sha256"], pinned["pinned"]) == (new.sha256, True)
    assert not server.json("DELETE", "/pe/models/pin")["pinned"]
    assert server.request("POST", "/pe/models/nothing/pin").status_code == 422


def test_the_interface_describes_history_models_and_trainings(server):
    paths = server.json("GET", "/openapi.json")["paths"]
    for path, method in {
        "/pe/studies/{study}/history": "get",
        "/pe/studies/{study}/history/{revision}": "get",
        "/pe/studies/{study}/history/{revision}/label": "get",
        "/pe/studies/{study}/history/{revision}/restore": "post",
        "/pe/models": "get",
        "/pe/models/{model}/pin": "post",
        "/pe/models/rollback": "post",
        "/train/": "get",
        "/pe/training": "get",
    }.items():
        assert paths[path][method]["summary"]
        assert paths[path][method]["description"]
