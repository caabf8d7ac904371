"""Training and next-study tasks of the app, in this process: settings, run folders, leases."""

import json
import os
import sys
import time
from dataclasses import replace

import pytest
from app_server import APP, chest
from small_studies import CLASSIFIER, ENCODER, SLABS

from pe_app.detector import Detector, ModelCard, TrainingRecord
from pe_app.errors import InputError
from pe_app.progress import Cancelled, Progress
from pe_app.volume_io import write_volume

sys.path.insert(0, str(APP))
import lib.compat  # before monailabel

# isort: split
import lib.train
from lib.active import Leases
from lib.infer import Busy, Jobs, ServedDetector
from lib.store import Conflict, StudyStore
from lib.train import SERVER_PID, ClassifierTask, EncoderTask

RECORD = TrainingRecord(2, 1, 3, True, 1, 1, 1.0, "cpu", "2026-11-02T08:00:00Z", "", {}, {}, ())
PROGRESS = Progress("train", 1, 2)


def detector(seed, trained=False):
    made = Detector.untrained(seed, SLABS, ENCODER, CLASSIFIER)
    return replace(made, card=ModelCard("m", "1", RECORD, RECORD if trained else None))


@pytest.fixture
def store(tmp_path):
    write_volume(chest(1, emboli=1)[0], tmp_path / "studies" / "one.nrrd")
    return StudyStore(tmp_path / "studies")


@pytest.fixture
def task(store, tmp_path):
    detector(0).save(tmp_path / "start.safetensors")
    served = ServedDetector(store.private / "model.safetensors", tmp_path / "start.safetensors")
    return EncoderTask("stage I", served, store.private, {"epochs": "7"})


def test_settings_are_the_papers_unless_the_server_or_the_request_say_otherwise(task):
    assert task.settings({})["learning_rate"] == 1e-4
    assert task.settings({})["epochs"] == 7
    assert task.settings({"epochs": 3.0, "augment": "true", "client_id": "x", "bundle_path": "/tmp"}) == {
        **task.settings({}),
        "epochs": 3,
        "augment": True,
    }
    assert "bundle_path" not in task.config()


@pytest.mark.parametrize(
    "said", [{"epochs": "many"}, {"epochs": 1.5}, {"width": 0}, {"augment": 3}, {"learning_rate": float("inf")}]
)
def test_settings_that_cannot_be_used_are_named(task, said):
    with pytest.raises(InputError):
        task.settings(said)


def test_a_training_that_was_stopped_goes_on_in_its_folder_and_a_finished_one_begins_anew(task, store, monkeypatch):
    folders = []

    def train(studies, settings, folder):
        folders.append(folder)
        state = "finished" if len(folders) == 2 else "stopped"
        (folder / "status.json").write_text(json.dumps({"state": state, "text": ""}))
        return detector(1)

    monkeypatch.setattr(task, "train", train)
    for epochs in (3, 3, 3, 4):
        task({"epochs": epochs}, store)
    stopped, continued, anew, other = folders
    assert stopped == continued
    assert len({continued, anew, other}) == 3
    store.update_image_info("one", {"pe_label": "negative"})
    task({"epochs": 4}, store)
    assert folders[-1] != other, "another label makes another training"
    assert len(list((store.private / "runs").iterdir())) == lib.train.KEPT_RUNS


def test_a_training_that_cannot_begin_tells_clients_why(task, store):
    with pytest.raises(InputError) as refused:
        task({**vars(SLABS), "width": 8, "epochs": 2, "hu_window": None}, store)
    assert task.stats()["state"] == "failed"
    assert task.stats()["text"] == str(refused.value)


@pytest.mark.parametrize("trained", [False, True])
def test_a_new_encoder_is_served_at_once_only_while_nothing_better_is(store, tmp_path, monkeypatch, trained):
    detector(0, trained).save(tmp_path / "start.safetensors")
    served = ServedDetector(store.private / "model.safetensors", tmp_path / "start.safetensors")
    before = served.current().sha256
    new = detector(5)
    monkeypatch.setattr(lib.train, "train_encoder", lambda studies, out, **_: new.save(out) or new)
    task = EncoderTask("stage I", served, store.private, {})
    task({"epochs": 1}, store)
    assert served.current().sha256 == (before if trained else new.sha256)
    classifier = ClassifierTask("stage II", served, store.private, {})
    assert Detector.load(classifier.starts_from()).sha256 == new.sha256


def test_a_training_ends_with_its_server(monkeypatch):
    monkeypatch.setenv(SERVER_PID, str(os.getppid()))
    lib.train._while_the_server_lives(PROGRESS)
    monkeypatch.setenv(SERVER_PID, "999999999")
    with pytest.raises(Cancelled):
        lib.train._while_the_server_lives(PROGRESS)


def test_a_lease_ends_by_itself_and_outlives_a_restart(tmp_path):
    leases = Leases(tmp_path / "leases.json", minutes=0.01)
    leases.take("one", "ann")
    with pytest.raises(Conflict, match="ann"):
        leases.take("one", "bob")
    assert Leases(tmp_path / "leases.json").holder("one") == "ann"
    time.sleep(0.7)
    assert leases.holder("one") == ""
    assert leases.take("one", "bob").reader == "bob"


def test_damaged_leases_are_forgotten(tmp_path):
    (tmp_path / "leases.json").write_text('{"one": ')
    assert Leases(tmp_path / "leases.json").holder("one") == ""


@pytest.mark.parametrize("reader", ["", "x" * 65, "a\nb"])
def test_a_lease_needs_a_readable_name(tmp_path, reader):
    with pytest.raises(InputError, match="reader"):
        Leases(tmp_path / "leases.json").take("one", reader)


def test_too_many_waiting_detections_are_sent_away():
    jobs = Jobs()
    held = [jobs.job(f"job {number}") for number in range(17)]
    for job in held:
        job.__enter__()
    with pytest.raises(Busy), jobs.job("one more"):
        pass
    for job in held:
        job.__exit__(None, None, None)
    with jobs.job("one more") as report:
        report(PROGRESS)
        assert jobs.get("one more").state == "running"
    assert jobs.get("one more").state == "done"
