"""Studies of a real archive (Orthanc) as a datastore: fetched on first use, served whatever becomes of the archive."""

import io
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from app_server import Server, chest
from orthanc import PASSWORD, USER, running_orthanc
from small_series import write_dicom
from small_studies import CLASSIFIER, ENCODER, SLABS, small_chest
from typer.testing import CliRunner

import pe_monailabel.compat  # before monailabel
from pe_app.annotation.sparse import SparseAnnotation
from pe_app.cli import app as command_line
from pe_app.common.errors import InputError
from pe_app.common.progress import Cancelled
from pe_app.ct.source_series import read_source, source_path
from pe_app.ct.volume_io import read_volume
from pe_app.model.detector import Detector
from pe_app.pacs.dicomweb import Access, Archive, Incomplete, Limits, Unavailable

# isort: split
import pe_monailabel.store.archive
from pe_monailabel.store.archive import ArchiveSettings, ArchiveStore
from pe_monailabel.store.studies import StudyStore


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with running_orthanc(tmp_path_factory.mktemp("orthanc")) as archive:
        yield archive


@pytest.fixture
def orthanc(running):
    running.empty()
    return running


@pytest.fixture
def opened(orthanc, tmp_path, monkeypatch):
    """``opened()`` is the store as a server that starts has it, without its thread."""
    monkeypatch.setattr(pe_monailabel.store.archive, "DOWN_SECONDS", 0.0)

    def opened(**settings):
        store = ArchiveStore(tmp_path / "store", ArchiveSettings(Access(orthanc.url, USER, PASSWORD), **settings))
        store.archive = Archive(store.archive.access, Limits(connect_s=5, read_s=5, waits_s=()))
        with monkeypatch.context() as patched:
            patched.setattr("threading.Thread.start", lambda thread: None)
            store.follow()
        return store

    return opened


def fetched(store):
    return sorted(path.name for path in store.root.glob("*.nrrd"))


def test_studies_are_listed_without_being_fetched(orthanc, opened, tmp_path):
    for seed in (1, 2):
        orthanc.add(write_dicom(tmp_path / "sent", seed))
    orthanc.add(write_dicom(tmp_path / "sent", 3, every=2))  # 16 slices are no chest
    store = opened()
    assert store.list_images() == ["1.2.1", "1.2.2"]
    assert store.known_facts("1.2.1") is None
    assert store.not_examined("1.2.1") == "in the archive; fetched on first use"
    assert store.to_examine() == []
    info = store.get_image_info("1.2.1")
    assert (info["patient"], info["date"], info["description"]) == ("patient-1", "20260102", "CT PE")
    assert fetched(store) == []


def test_first_use_fetches_the_ct_with_its_geometry_and_its_way_back(orthanc, opened, tmp_path):
    orthanc.add(write_dicom(tmp_path / "sent", 1))
    store = opened()
    truth, _ = small_chest(1, emboli=2)
    steps = []
    store.have("1.2.1", steps.append)
    assert (steps[-1].done, steps[-1].total) == (32, 32)
    volume = store.volume("1.2.1")
    np.testing.assert_array_equal(volume.voxels, truth.voxels)
    np.testing.assert_allclose(volume.affine, truth.affine)
    image = sitk.ReadImage(store.get_image_uri("1.2.1"))
    assert image.GetSize() == (64, 64, 32)
    source = read_source(source_path(store.image_path("1.2.1")))
    assert (source.patient_id, source.study_uid, source.series_uid) == ("patient-1", "1.2.1", "1.2.1.1")
    assert {one.sop_instance_uid for one in source.instances} == orthanc.instances().keys()
    assert list((store.private / "fetching").iterdir()) == []


def test_a_fetch_can_be_cancelled_and_two_at_once_are_one(orthanc, opened, tmp_path, monkeypatch):
    orthanc.add(write_dicom(tmp_path / "sent", 1))
    store = opened()

    def cancel(progress):
        if progress.done == 9:
            raise Cancelled

    with pytest.raises(Cancelled):
        store.have("1.2.1", cancel)
    assert (fetched(store), store.not_examined("1.2.1")) == ([], "in the archive; fetched on first use")
    retrieve, calls = store.archive.retrieve, []
    monkeypatch.setattr(store.archive, "retrieve", lambda *said: (calls.append(said), time.sleep(0.3), retrieve(*said)))
    with ThreadPoolExecutor(4) as readers:
        list(readers.map(store.volume, ["1.2.1"] * 4))
    assert len(calls) == 1


def test_a_program_that_opens_the_folder_without_the_archive_hides_nothing(orthanc, opened, tmp_path):
    orthanc.add(write_dicom(tmp_path / "sent", 1))
    store = opened()
    assert StudyStore(store.root).list_images() == []
    store.check_study("1.2.1")
    assert store.list_images() == ["1.2.1"]


def test_the_series_with_most_slices_that_is_an_axial_volume_is_taken(orthanc, opened, tmp_path):
    sent = tmp_path / "sent"
    orthanc.add(write_dicom(sent, 1, series=1, ImageOrientationPatient=[1, 0, 0, 0, 0, -1]))  # coronal
    orthanc.add(write_dicom(sent, 1, series=2))
    orthanc.add(write_dicom(sent, 1, series=3, every=2))
    store = opened()
    assert read_source(source_path(Path(store.get_image_uri("1.2.1")))).series_uid == "1.2.1.2"


def test_a_study_that_cannot_be_used_says_why_and_is_not_fetched_again_until_it_grows(
    orthanc, opened, tmp_path, monkeypatch
):
    files = write_dicom(tmp_path / "sent", 1)
    orthanc.add([*files[:10], *files[13:]])
    store = opened()
    reason = store.facts("1.2.1").reason
    assert "some are missing" in reason
    assert store.known_facts("1.2.1").reason == reason
    with monkeypatch.context() as patched:
        patched.setattr(store.archive, "retrieve", lambda *_: pytest.fail("it was fetched again"))
        with pytest.raises(InputError, match="some are missing"):
            store.volume("1.2.1")
    orthanc.add(files[10:13])
    store.update()
    assert store.volume("1.2.1").shape == (32, 64, 64)
    assert store.facts("1.2.1").size == (32, 64, 64)


def test_a_study_that_grew_is_fetched_again_unless_it_is_annotated(orthanc, opened, tmp_path):
    for seed in (1, 2):
        files = write_dicom(tmp_path / "sent", seed)
        orthanc.add(files[:24])
    store = opened()
    assert [store.volume(f"1.2.{seed}").shape[0] for seed in (1, 2)] == [24, 24]
    save(store, "1.2.2", tmp_path)
    for seed in (1, 2):
        orthanc.add([tmp_path / "sent" / f"{seed}-1-{k}.dcm" for k in range(24, 32)])
    store.update()
    assert [store.volume(f"1.2.{seed}").shape[0] for seed in (1, 2)] == [32, 24]


def save(store, study, folder):
    volume = store.volume(study)
    reviewed = store.facts(study).schedule[:2]
    mask = volume.with_voxels(np.zeros(volume.shape, np.uint8))
    annotation = SparseAnnotation.from_mask(volume, mask, reviewed, "ann", "2026-11-02T08:00:00Z")
    annotation.write(folder / "sent.json", volume)
    store.save_label(study, str(folder / "sent.seg.nrrd"), "draft", {"annotation": annotation.to_json()})


def test_while_the_archive_is_down_what_was_fetched_is_served_and_the_rest_says_so(orthanc, opened, tmp_path):
    for seed in (1, 2):
        orthanc.add(write_dicom(tmp_path / "sent", seed))
    opened().volume("1.2.1")
    orthanc.stop()
    store = opened()
    assert store.list_images() == ["1.2.1", "1.2.2"]
    assert store.facts("1.2.1").size == (32, 64, 64)
    save(store, "1.2.1", tmp_path)
    with pytest.raises(Unavailable, match="cannot be reached"):
        store.volume("1.2.2")
    assert "cannot be reached" in store.facts("1.2.2").reason
    assert store.known_facts("1.2.2") is None  # it may be reached the next time
    orthanc.start()
    assert store.volume("1.2.2").shape == (32, 64, 64)


def test_a_study_that_never_comes_whole_does_not_hold_up_others(orthanc, opened, tmp_path, monkeypatch):
    for seed in (1, 2):
        orthanc.add(write_dicom(tmp_path / "sent", seed))
    store = opened()
    monkeypatch.setattr(pe_monailabel.store.archive, "DOWN_SECONDS", 600.0)
    retrieve, calls = store.archive.retrieve, []

    def cut_off(series, *said):
        calls.append(series.study)
        if series.study == "1.2.1":
            raise Incomplete("it was cut off")
        retrieve(series, *said)

    monkeypatch.setattr(store.archive, "retrieve", cut_off)
    for _ in range(2):
        assert store.facts("1.2.1").reason == "it was cut off"
    assert store.volume("1.2.2").shape == (32, 64, 64)
    assert calls == ["1.2.1", "1.2.2"]


def test_an_archive_that_was_never_reached_is_said_at_the_start(orthanc, opened):
    orthanc.stop()
    with pytest.raises(Unavailable, match="cannot be reached"):
        opened()


def test_a_study_that_was_deleted_from_the_archive_stays_if_it_is_here(orthanc, opened, tmp_path):
    for seed in (1, 2):
        orthanc.add(write_dicom(tmp_path / "sent", seed))
    store = opened(cache_gb=1e-9)
    store.volume("1.2.1")
    orthanc.delete_study("1.2.1")
    orthanc.delete_study("1.2.2")
    with pytest.raises(InputError, match="no CT series of it any longer"):
        store.volume("1.2.2")
    store.update()
    assert store.list_images() == ["1.2.1"]
    assert store.volume("1.2.1").shape == (32, 64, 64)
    assert fetched(store) == ["1.2.1.nrrd"]  # in spite of the limit


def test_the_cache_keeps_to_its_limit_but_never_gives_up_what_is_annotated(orthanc, opened, tmp_path, monkeypatch):
    monkeypatch.setattr(pe_monailabel.store.archive, "GRACE_SECONDS", 0.0)
    for seed in range(1, 5):
        orthanc.add(write_dicom(tmp_path / "sent", seed))
    store = opened()
    identity = {f"1.2.{seed}": store.facts(f"1.2.{seed}").sha256 for seed in (1, 2, 3)}
    save(store, "1.2.1", tmp_path)
    used = time.time()
    for seed, ago in ((1, 300), (2, 100), (3, 200)):
        path = store.image_path(f"1.2.{seed}")
        os.utime(store.private / "fetches" / f"{path.stem}.used", (used - ago, used - ago))
    size = sum(path.stat().st_size for path in store.root.glob("*.nrrd"))
    store = opened(cache_gb=size / 1e9)
    store.have("1.2.4")
    assert fetched(store) == ["1.2.1.nrrd", "1.2.2.nrrd", "1.2.4.nrrd"]
    assert store.known_facts("1.2.3").sha256 == identity["1.2.3"]  # so that its detection is still shown
    assert store.facts("1.2.3").sha256 == identity["1.2.3"]
    assert store.list_images() == [f"1.2.{seed}" for seed in range(1, 5)]


def test_a_training_fetches_only_studies_that_somebody_labelled(orthanc, opened, tmp_path):
    for seed in (1, 2):
        orthanc.add(write_dicom(tmp_path / "sent", seed, volume=chest(seed, 0)[0]))
    store = opened()
    store.update_image_info("1.2.2", {"pe_label": "negative"})
    (study,) = store.studies()
    assert (study.study, study.label, study.patient) == ("1.2.2", "negative", "patient-2")
    assert fetched(store) == ["1.2.2.nrrd"]


def test_outlines_drawn_on_a_fetched_ct_go_back_to_the_archive_when_asked(orthanc, opened, tmp_path, monkeypatch):
    orthanc.add(write_dicom(tmp_path / "sent", 1))
    instances = set(orthanc.instances())
    store = opened()
    volume, (_, mask) = store.volume("1.2.1"), small_chest(1, emboli=2)
    drawn = np.flatnonzero(mask.voxels.any(axis=(1, 2)))[:2].tolist()
    SparseAnnotation.from_mask(volume, mask, drawn, "ann", "2026-11-02T08:00:00Z").write(tmp_path / "a.json", volume)
    monkeypatch.setenv("PE_ARCHIVE_PASSWORD", PASSWORD)
    words = [store.get_image_uri("1.2.1"), tmp_path / "a.json", "--out", tmp_path / "a.dcm"]
    options = ["--send", orthanc.url, "--user", USER]
    answer = CliRunner().invoke(command_line, ["export-seg", *map(str, words), *options], catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    (sent,) = (file for uid, file in orthanc.instances().items() if uid not in instances)
    segmentation = pydicom.dcmread(io.BytesIO(sent))
    assert (segmentation.Modality, segmentation.StudyInstanceUID, segmentation.PatientID) == (
        "SEG",
        "1.2.1",
        "patient-1",
    )
    referred = segmentation.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert {one.ReferencedSOPInstanceUID for one in referred} <= instances
    store.update()
    assert store.list_images() == ["1.2.1"]
    assert store.volume("1.2.1").sha256 == volume.sha256


# --- the whole of it


@contextmanager
def serving(folder: Path, url: str, model: Path, monkeypatch):
    """``pe-app serve`` over the archive."""
    monkeypatch.setenv("PE_ARCHIVE_PASSWORD", PASSWORD)
    server = Server(folder, model, "--cache", str(folder), "--user", USER, source=url)
    try:
        yield server
    finally:
        server.stop()


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="MONAI Label's own client needs cgi of Python < 3.13")
def test_stock_clients_work_on_an_archive_and_nothing_waits_for_it(orthanc, tmp_path, monkeypatch):
    from monailabel.client import MONAILabelClient

    volumes = {seed: chest(seed, 2)[0] for seed in (1, 2)}
    for seed, volume in volumes.items():
        orthanc.add(write_dicom(tmp_path / "sent", seed, volume=volume))
    model = tmp_path / "model.safetensors"
    Detector.untrained(0, SLABS, ENCODER, CLASSIFIER).save(model)
    with serving(tmp_path / "store", orthanc.url, model, monkeypatch) as server:
        client = MONAILabelClient(server.address, tmpdir=str(tmp_path))
        assert sorted(client.datastore()["objects"]) == ["1.2.1", "1.2.2"]
        answer = server.request("GET", "/datastore/image?image=1.2.1")
        (tmp_path / "got.nrrd").write_bytes(answer.content)
        np.testing.assert_array_equal(read_volume(tmp_path / "got.nrrd").voxels, volumes[1].voxels)
        rows = {row["study"]: row for row in server.json("GET", "/pe/worklist")["studies"]}
        assert rows["1.2.2"]["reason"] == "in the archive; fetched on first use"
        assert rows["1.2.2"]["usable"]
        detection = server.json("POST", "/infer/detection?image=1.2.1&output=json")
        assert 0 <= detection["probability"] <= 1

        os.kill(orthanc.process.pid, signal.SIGSTOP)  # the archive hangs
        fetch = threading.Thread(target=server.request, args=("GET", "/datastore/image?image=1.2.2"))
        try:
            fetch.start()
            for _ in range(200):
                reasons = [row["reason"] for row in server.json("GET", "/pe/worklist")["studies"]]
                if "being fetched from the archive: 0 of unknown slices" in reasons:
                    break
                time.sleep(0.1)
            else:
                pytest.fail(f"nothing is being fetched: {reasons}")
            assert client.info()["name"] == "Pulmonary embolism"
            assert fetch.is_alive()
        finally:
            os.kill(orthanc.process.pid, signal.SIGCONT)
        fetch.join(60)
        assert (tmp_path / "store" / "1.2.2.nrrd").is_file()
