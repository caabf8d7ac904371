"""The app behind MONAI Label's interface: the real server, the stock client, and what must never happen."""

import json
import sys
import threading
import time
import uuid
from pathlib import Path

import nrrd
import numpy as np
import pytest
import requests
from app_server import review, running_server, write_phantoms
from requests_toolbelt import MultipartDecoder

from pe_app.ct.slabs import SlabConfig
from pe_app.ct.volume_io import write_volume
from pe_app.model.detector import Detector
from pe_app.model.slab_encoder import EncoderConfig
from pe_app.model.study_classifier import ClassifierConfig
from pe_app.phantom import PhantomConfig

pytestmark = pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="MONAI Label's own client needs cgi of Python < 3.13"
)

CONFIG = PhantomConfig(matrix=64, spacing_mm=5.0)
STUDIES = {"alpha": True, "beta": False, "gamma": True, "delta": False, "epsilon": True, "zeta": False, "eta": True}
QUICK = SlabConfig(matrix=64, crop=64, slab_count=10)
SLOW = SlabConfig(matrix=512, crop=384, slab_count=50)


def small_detector(seed, slabs=QUICK, width=8):
    network = ClassifierConfig(feature_channels=8 * width, grid=slabs.grid, filters=4)
    return Detector.untrained(seed, slabs, EncoderConfig(width=width), network)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp("app") / "studies", STUDIES, CONFIG)


@pytest.fixture(scope="module")
def server(phantoms, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "app0"
    model = folder / "model.safetensors"
    small_detector(0).save(model)
    plain = phantoms["beta"].volume
    write_volume(plain.with_voxels(np.minimum(plain.voxels, 60)), folder / "studies" / "unenhanced.nrrd")
    whole = (folder / "studies" / "alpha.nrrd").read_bytes()
    (folder / "studies" / "truncated.nrrd").write_bytes(whole[: len(whole) // 2])
    with running_server(folder / "studies", model) as running:
        yield running


@pytest.fixture
def saves(server, phantoms, tmp_path):
    """``saves(study, slices)`` sends a review of these slices, as the Slicer module does."""

    def save(study, slice_indices, ok=True, **more):
        annotation = review(server.studies / f"{study}.nrrd", phantoms[study], slice_indices, tmp_path)
        params = {"annotation": annotation.to_json(), "reader": "ann", **more}
        with (tmp_path / "annotation.seg.nrrd").open("rb") as file:
            answer = server.request(
                "PUT",
                f"/datastore/label?image={study}&tag=final",
                data={"params": json.dumps(params)},
                files={"label": ("annotation.seg.nrrd", file)},
            )
        assert answer.ok == ok, answer.text
        return answer.json()

    return save


def schedule(server, study):
    entries = server.json("GET", f"/pe/studies/{study}")["schedule"]
    return [entry["slice_index"] for entry in entries if entry["why"] == "schedule"]


def row(server, study):
    return next(row for row in server.json("GET", "/pe/worklist")["studies"] if row["study"] == study)


def multipart(answer):
    parts = MultipartDecoder.from_response(answer).parts
    params, image = (
        next(p for p in parts if name in p.headers[b"Content-Disposition"]) for name in (b'"params"', b'"image"')
    )
    return json.loads(params.content), image.content


# --- what a reader's day needs


def test_the_stock_client_gets_a_study_detects_and_saves(server, phantoms, tmp_path):
    from monailabel.client import MONAILabelClient

    client = MONAILabelClient(server.address, tmpdir=str(tmp_path), client_id="stock")
    info = client.info()
    assert {"detection", "candidates"} <= info["models"].keys()
    assert {"encoder", "classifier"} == info["trainers"].keys()
    assert info["pe"]["research_use_only"]

    sample = client.next_sample("next_unreviewed", {"reader": "rita"})
    study = sample["id"]
    assert Path(sample["path"]) == (server.studies / f"{study}.nrrd").resolve()
    slices = [entry["slice_index"] for entry in sample["slices"]]
    assert slices == schedule(server, study)

    attention, detection = client.infer("detection", study, {})
    assert detection["schema"] == "pe-detection/2"
    assert detection["model"]["sha256"] == info["pe"]["model"]["sha256"]
    values, header = nrrd.read(attention)
    assert sorted(values.shape) == [4, 4, 10]
    assert header["space"] == "left-posterior-superior"
    label_map, _ = client.infer("candidates", study, {})
    assert nrrd.read(label_map)[0].shape == phantoms[study].volume.shape[::-1]

    annotation = review(server.studies / f"{study}.nrrd", phantoms[study], slices[:5], tmp_path)
    saved = client.save_label(
        study, str(tmp_path / "annotation.seg.nrrd"), "final", {"annotation": annotation.to_json(), "reader": "rita"}
    )
    assert (saved["tag"], saved["accepted"], saved["open"]) == ("draft", 5, slices[5:])
    stored, _ = nrrd.read(client.download_label(study, "draft"))
    sent, _ = nrrd.read(str(tmp_path / "annotation.seg.nrrd"))
    np.testing.assert_array_equal(stored, sent)
    assert study in client.datastore()["objects"]


def test_a_study_stays_in_the_pool_until_its_whole_schedule_is_reviewed(server, saves):
    slices = schedule(server, "beta")
    draft = saves("beta", slices[:-1])
    assert draft["tag"] == "draft"
    assert draft["open"] == slices[-1:]
    assert row(server, "beta")["state"] == "in_progress"
    sample = server.json("POST", "/activelearning/next_unreviewed", json={"reader": "rob"})
    assert sample["id"] != "beta" or [entry["slice_index"] for entry in sample["slices"]] == slices[-1:]
    completed = server.json("GET", "/info/")["datastore"]["completed"]

    final = saves("beta", slices, based_on=draft["revision"])
    assert (final["tag"], final["open"], final["accepted"]) == ("final", [], len(slices))
    assert row(server, "beta")["state"] == "complete"
    assert row(server, "beta")["held_by"] is None
    assert server.json("GET", "/info/")["datastore"]["completed"] == completed + 1
    assert server.request("GET", "/datastore/label?label=beta&tag=draft").status_code == 404
    asked = [server.json("POST", "/activelearning/random", json={"reader": "rob"}).get("id") for _ in range(10)]
    assert "beta" not in asked


def test_the_annotation_comes_back_as_it_was_sent(server, saves, phantoms):
    slices = schedule(server, "gamma")
    drawn = np.flatnonzero(phantoms["gamma"].emboli_mask.voxels.any(axis=(1, 2))).tolist()
    saves("gamma", sorted({*slices[:3], *drawn}))
    details = server.json("GET", "/pe/studies/gamma")
    states = {entry["slice_index"]: entry["state"] for entry in details["annotation"]["slices"]}
    assert [index for index, state in states.items() if state == "embolism"] == drawn
    info = server.json("GET", "/datastore/label/info?label=gamma&tag=draft")
    assert info["annotation"] == details["annotation"]
    (server.studies / ".." / "back.nrrd").write_bytes(
        server.request("GET", "/datastore/label?label=gamma&tag=draft").content
    )
    back, _ = nrrd.read(str(server.studies / ".." / "back.nrrd"))
    np.testing.assert_array_equal(back.T > 0, phantoms["gamma"].emboli_mask.voxels > 0)


def test_a_save_over_a_version_that_the_reader_has_not_seen_is_refused_with_that_version(server, saves):
    slices = schedule(server, "delta")
    first = saves("delta", slices[:2], based_on=None)
    second = saves("delta", slices[:3], based_on=first["revision"])
    conflict = saves("delta", slices[:4], ok=False, based_on=first["revision"])
    assert conflict["revision"] == second["revision"]
    assert [entry["slice_index"] for entry in conflict["annotation"]["slices"]] == slices[:3]
    assert row(server, "delta")["revision"] == second["revision"]
    saves("delta", slices[:4], ok=False, based_on=None)


def test_a_save_that_is_sent_again_because_the_answer_was_lost_is_no_conflict(server, saves):
    slices = schedule(server, "epsilon")
    first = saves("epsilon", slices[:2], based_on=None)
    again = saves("epsilon", slices[:2], based_on=None)
    assert again == first


def test_former_versions_are_kept_on_disk(server, saves):
    slices = schedule(server, "eta")
    revisions = [saves("eta", slices[:count])["revision"] for count in (1, 2, 3)]
    folder = server.studies / ".pe" / "history" / "eta" / "annotation"
    reviewed = [len(json.loads((folder / f"{revision}.json").read_text())["slices"]) for revision in revisions]
    assert reviewed == [1, 2, 3]


def test_the_next_study_to_label_has_none_and_one_is_fetched_ahead_while_another_is_held(server):
    wanted = {"reader": "lea", "work": "labels"}
    first = server.json("POST", "/activelearning/next_unreviewed", json=wanted)["id"]
    ahead = {**wanted, "skip": [first], "ahead": True}
    second = server.json("POST", "/activelearning/next_unreviewed", json=ahead)["id"]
    assert second != first
    assert {row(server, study)["held_by"] for study in (first, second)} == {"lea"}
    info = json.dumps({"pe_label": "uncertain", "reader": "lea"})
    labelled = server.json("PUT", f"/datastore/image/info?image={first}", data={"info": info})
    third = server.json("POST", "/activelearning/random", json={**wanted, "skip": [second]})["id"]
    assert third not in (first, second)
    back = json.dumps({"pe_label": "", "reader": "lea", "based_on": labelled["label_revision"]})
    server.json("PUT", f"/datastore/image/info?image={first}", data={"info": back})
    server.request("DELETE", f"/pe/studies/{third}/lease", json={"reader": "lea"})
    refused = server.request("POST", "/activelearning/random", json={"reader": "lea", "work": "everything"})
    assert refused.status_code == 422


def test_two_readers_who_ask_at_once_get_different_studies(server):
    answers = {}

    def ask(reader):
        answers[reader] = server.json("POST", "/activelearning/next_unreviewed", json={"reader": reader})

    threads = [threading.Thread(target=ask, args=(reader,)) for reader in ("ida", "jon")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers["ida"]["id"] != answers["jon"]["id"]
    study = answers["ida"]["id"]
    assert row(server, study)["held_by"] == "ida"
    assert answers["ida"]["lease_until"] > time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    refused = server.request("POST", f"/pe/studies/{study}/lease", json={"reader": "jon"})
    assert refused.status_code == 409
    assert "ida" in refused.json()["detail"]
    server.json("DELETE", f"/pe/studies/{study}/lease", json={"reader": "jon"})
    assert row(server, study)["held_by"] == "ida"
    for reader, answer in answers.items():
        server.json("DELETE", f"/pe/studies/{answer['id']}/lease", json={"reader": reader})
    assert row(server, study)["held_by"] is None


def test_a_study_label_is_recorded_and_other_words_are_refused(server):
    server.json("PUT", "/datastore/image/info?image=zeta", data={"info": '{"pe_label": "negative"}'})
    assert row(server, "zeta")["label"] == "negative"
    refused = server.request("PUT", "/datastore/image/info?image=zeta", data={"info": '{"pe_label": "maybe"}'})
    assert refused.status_code == 422
    assert "positive" in refused.json()["detail"]
    assert row(server, "zeta")["label"] == "negative"


def test_params_that_are_no_annotation_are_kept_as_plain_label_info(server, phantoms, tmp_path):
    write_volume(phantoms["zeta"].emboli_mask, tmp_path / "mask.nii.gz")
    with (tmp_path / "mask.nii.gz").open("rb") as file:
        saved = server.json(
            "PUT",
            "/datastore/label?image=zeta&tag=original",
            data={"params": '{"label_info": [{"name": "x"}]}'},
            files={"label": ("mask.nii.gz", file)},
        )
    assert saved["tag"] == "original"
    info = server.json("GET", "/datastore/label/info?label=zeta&tag=original")
    assert info["label_info"] == [{"name": "x"}]
    assert row(server, "zeta")["state"] == "labelled"


def test_a_plain_label_does_not_replace_a_sparse_annotation(server, saves, phantoms, tmp_path):
    first = saves("gamma", schedule(server, "gamma")[:1])
    write_volume(phantoms["gamma"].emboli_mask, tmp_path / "mask.nii.gz")
    with (tmp_path / "mask.nii.gz").open("rb") as file:
        answer = server.request("PUT", "/datastore/label?image=gamma&tag=final", files={"label": ("mask.nii.gz", file)})
    assert answer.status_code == 409
    assert row(server, "gamma")["revision"] == first["revision"]


# --- detections


def test_a_second_detection_is_remembered_and_the_worklist_shows_it(server):
    first = server.request("POST", "/infer/detection?image=alpha")
    params, image = multipart(first)
    assert params["status"] == "analysed"
    assert len(params["evidence"]) == 10
    assert multipart(server.request("POST", "/infer/detection?image=alpha")) == (params, image)
    assert row(server, "alpha")["probability"] == params["probability"]
    assert row(server, "alpha")["status"] == "analysed"
    assert row(server, "alpha")["reasons"] == [reason["code"] for reason in params["reasons"]]
    assert server.json("GET", "/pe/studies/alpha")["detection"] == params
    whys = {entry["why"] for entry in server.json("GET", "/pe/studies/alpha")["schedule"]}
    assert whys == {"schedule", "suspicious"}


def test_a_study_that_the_method_is_not_for_is_refused_with_the_reason_and_still_a_file(server, tmp_path):
    for model in ("detection", "candidates"):
        params, image = multipart(server.request("POST", f"/infer/{model}?image=unenhanced"))
        assert params["status"] == "refused"
        assert "no_contrast" in [reason["code"] for reason in params["reasons"]]
        (tmp_path / "empty.nrrd").write_bytes(image)
        assert not nrrd.read(str(tmp_path / "empty.nrrd"))[0].any()


def test_an_image_that_cannot_be_read_is_listed_with_the_reason_and_not_offered(server):
    details = server.json("GET", "/pe/studies/truncated")
    assert not details["usable"]
    assert "truncated.nrrd" in details["reason"]
    answer = server.request("POST", "/infer/detection?image=truncated")
    assert answer.status_code == 422
    assert "truncated.nrrd" in answer.json()["detail"]


@pytest.fixture
def models(server):
    """The models of the server's folder, as a training in another process sees them; what was served comes back."""
    from pe_monailabel.store.models import Models

    folder = Models(server.studies / ".pe" / "models", server.studies.parent / "model.safetensors")
    before = folder.path()
    yield folder
    folder.publish(before)


def test_new_weights_are_served_without_a_restart_and_broken_ones_are_not(server, models, tmp_path):
    before = server.json("GET", "/info/")["pe"]["model"]["sha256"]
    other = small_detector(1)
    other.save(tmp_path / "new.safetensors")
    models.publish(tmp_path / "new.safetensors")
    assert server.json("GET", "/info/")["pe"]["model"]["sha256"] == other.sha256 != before
    params, _ = multipart(server.request("POST", "/infer/detection?image=alpha"))
    assert params["model"]["sha256"] == other.sha256
    kept = server.studies / ".pe" / "models" / f"{other.sha256}.safetensors"
    kept.write_bytes(kept.read_bytes()[:-1000])
    assert server.json("GET", "/info/")["pe"]["model"]["sha256"] == other.sha256
    models.rollback()
    assert server.json("GET", "/info/")["pe"]["model"]["sha256"] == before


def test_info_answers_at_once_while_a_detection_runs_which_can_be_cancelled(server, models, tmp_path):
    small_detector(2, SLOW, width=32).save(tmp_path / "slow.safetensors")
    models.publish(tmp_path / "slow.safetensors")
    jobs = [str(uuid.uuid4()) for _ in range(2)]
    answers = {}

    def detect(job):
        answers[job] = server.request("POST", "/infer/detection?image=beta", data={"params": json.dumps({"job": job})})

    def state(job):
        return server.request("GET", f"/pe/jobs/{job}").json().get("state")

    threads = [threading.Thread(target=detect, args=(job,)) for job in jobs]
    for thread, job, wanted in zip(threads, jobs, ("running", "waiting"), strict=True):
        thread.start()
        deadline = time.monotonic() + 30
        while state(job) != wanted and time.monotonic() < deadline:
            time.sleep(0.02)
    seconds = []
    for _ in range(20):
        begin = time.perf_counter()
        server.json("GET", "/info/")
        seconds.append(time.perf_counter() - begin)
        time.sleep(0.02)
    assert [state(job) for job in jobs] == ["running", "waiting"]
    for job in reversed(jobs):
        server.json("DELETE", f"/pe/jobs/{job}")
    for thread in threads:
        thread.join(30)
    assert np.median(seconds) < 0.1
    for job in jobs:
        assert answers[job].status_code == 409
        assert answers[job].json() == {"detail": "cancelled"}
        assert state(job) == "cancelled"


# --- what must never happen


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/infer/detection?image=nobody"),
        ("POST", "/infer/nothing?image=alpha"),
        ("POST", "/activelearning/astrology"),
        ("POST", "/train/nothing"),
        ("GET", "/pe/studies/nobody"),
        ("POST", "/pe/studies/nobody/lease"),
        ("GET", "/pe/jobs/nothing"),
        ("GET", "/datastore/image?image=nobody"),
        ("GET", "/datastore/image?image=../server.log"),
        ("GET", "/datastore/image/info?image=nobody"),
        ("GET", "/datastore/label?label=alpha&tag=../../.pe"),
        ("GET", "/datastore/label/info?label=alpha&tag=nothing"),
        ("DELETE", "/datastore/label?id=alpha&tag=nothing"),
        ("PUT", "/datastore/image/info?image=nobody"),
        ("GET", "/logs/"),
        ("PUT", "/model/detection"),
        ("POST", "/reload"),
        ("PUT", "/session/"),
    ],
)
def test_what_is_not_there_is_404_with_a_sentence(server, method, path):
    answer = server.request(method, path)
    assert answer.status_code == 404, answer.text
    assert len(answer.json()["detail"]) > 5


def test_a_path_of_the_server_is_no_study(server):
    for name in (str(server.studies / "alpha.nrrd"), "alpha.nrrd", "/etc/hostname"):
        answer = server.request("POST", "/infer/detection", params={"image": name})
        assert answer.status_code == 404, answer.text
    answer = server.request(
        "POST", "/infer/detection?image=alpha", data={"params": json.dumps({"image": "/etc/hostname", "model": "x"})}
    )
    assert answer.ok
    assert multipart(answer)[0]["status"] == "analysed"


@pytest.mark.parametrize("tag", ["../../victim", "/tmp/victim", "a/b", ".hidden", "", "x" * 80])
def test_a_tag_is_a_name_and_never_a_path(server, phantoms, tmp_path, tag):
    before = sorted(str(path) for path in server.studies.parent.rglob("*"))
    write_volume(phantoms["zeta"].emboli_mask, tmp_path / "mask.nrrd")
    with (tmp_path / "mask.nrrd").open("rb") as file:
        answer = server.request(
            "PUT", "/datastore/label", params={"image": "zeta", "tag": tag}, files={"label": ("mask.nrrd", file)}
        )
    if tag:
        assert answer.status_code == 422, answer.text
        assert sorted(str(path) for path in server.studies.parent.rglob("*")) == before
    else:
        assert answer.json()["tag"] == "draft"  # its painted slices are reviewed, the schedule is not
        server.json("DELETE", "/datastore/label?id=zeta&tag=draft")


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", ".evil", "a/b", "alpha", "x.nii.gz_copy.nrrd"])
def test_an_uploaded_study_gets_a_new_name_in_the_folder_or_none(server, name):
    content = (server.studies / "zeta.nrrd").read_bytes()
    answer = server.request("PUT", "/datastore/image", params={"image": name}, files={"file": ("x.nrrd", content)})
    if name == "x.nii.gz_copy.nrrd":
        assert answer.json() == {"image": name}
        assert row(server, name)["study"] == name
        (server.studies / f"{name}.nrrd").unlink()
    else:
        assert answer.status_code in (409, 422), answer.text
    assert (server.studies / "alpha.nrrd").read_bytes() != content
    assert not list(server.studies.parent.rglob("*evil*"))


@pytest.mark.parametrize(
    ("params", "label", "sentence"),
    [
        ("[1, 2]", None, "JSON object"),
        ('{"p": NaN}', None, "finite"),
        ('{"p": ', None, "not JSON"),
        ("{}", b"garbage", "label.seg.nrrd"),
        ("{}", b"", "label.seg.nrrd"),
        ('{"annotation": {"schema": "pe-annotation/9"}}', None, "schema"),
        ('{"annotation": 5}', None, "annotation"),
    ],
)
def test_a_label_that_cannot_be_right_is_refused_with_the_reason(server, phantoms, tmp_path, params, label, sentence):
    if label is None:
        write_volume(phantoms["zeta"].emboli_mask, tmp_path / "x.nrrd")
        label = (tmp_path / "x.nrrd").read_bytes()
    before = labels_in_index(server, "zeta")
    answer = server.request(
        "PUT",
        "/datastore/label?image=zeta&tag=draft",
        data={"params": params},
        files={"label": ("x.seg.nrrd", label)},
    )
    assert answer.status_code == 422, answer.text
    assert sentence in answer.json()["detail"]
    assert labels_in_index(server, "zeta") == before


def labels_in_index(server, study):
    return json.loads((server.studies / "datastore_v2.json").read_text())["objects"][study]["labels"]


def test_an_annotation_of_another_study_is_refused(server, phantoms, tmp_path):
    annotation = review(server.studies / "alpha.nrrd", phantoms["alpha"], [20], tmp_path)
    content = (tmp_path / "annotation.seg.nrrd").read_bytes()
    answer = server.request(
        "PUT",
        "/datastore/label?image=zeta",
        data={"params": json.dumps({"annotation": annotation.to_json()})},
        files={"label": ("a.seg.nrrd", content)},
    )
    assert answer.status_code == 422
    assert row(server, "zeta")["state"] == "labelled"


def test_settings_that_cannot_be_used_start_no_training(server):
    for params in ({"epochs": "many"}, {"crop": 100}, {"learning_rate": -1}, {"batch": 1.5}):
        answer = server.request("POST", "/train/encoder", json=params)
        assert answer.status_code == 422, answer.text
    assert server.request("GET", "/train/").status_code == 404


def test_web_pages_and_other_names_of_the_machine_are_refused(server):
    port = server.address.rpartition(":")[2]
    for headers in (
        {"Host": "evil.example"},
        {"Host": f"evil.example:{port}"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
    ):
        answer = server.request("GET", "/info/", headers=headers)
        assert answer.status_code == 403, headers
        assert "detail" in answer.json()
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "PUT"}
    answer = server.request("OPTIONS", "/datastore/label", headers=preflight)
    assert answer.status_code == 403
    assert not any(name.lower().startswith("access-control") for name in answer.headers)
    assert server.request("GET", "/info/", headers={"Host": f"localhost:{port}"}).ok


def test_the_server_listens_on_this_machine_only(server):
    import psutil

    addresses = {c.laddr.ip for c in psutil.Process(server.process.pid).net_connections() if c.status == "LISTEN"}
    assert addresses == {"127.0.0.1"}


def test_an_address_of_the_network_is_refused_with_the_way_out():

    from pe_monailabel.server.middleware import is_loopback

    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert is_loopback("localhost")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("localhost.evil.example")
    assert not is_loopback("10.0.0.1")


def test_the_interface_describes_itself(server):
    answer = requests.get(server.address + "/openapi.json", timeout=30)
    assert answer.ok
    assert "/pe/worklist" in answer.json()["paths"]


def test_a_server_that_was_killed_shows_everything_again_even_with_a_damaged_index(server):
    server.json("PUT", "/datastore/image/info?image=alpha", data={"info": '{"pe_label": "positive"}'})
    server.json("POST", "/pe/studies/unenhanced/lease", json={"reader": "ann"})
    before = server.json("GET", "/pe/worklist")
    server.process.kill()
    server.process.wait()
    index = server.studies / "datastore_v2.json"
    index.write_bytes(index.read_bytes()[:300])
    server.start()
    assert server.json("GET", "/pe/worklist") == before
    assert row(server, "alpha")["label"] == "positive"
    assert row(server, "unenhanced")["held_by"] == "ann"
    assert any(row["state"] == "complete" for row in before["studies"])
    assert list(server.studies.glob("datastore_v2.json.damaged-*"))
