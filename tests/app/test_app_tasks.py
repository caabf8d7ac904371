"""Training and next-study tasks of the app: settings, the queue, its processes and what outlives them, leases."""

import json
import os
import signal
import time

import pytest
from annotated_store import SETTINGS, annotated_store

import pe_monailabel.compat  # before monailabel
from pe_app.common.errors import InputError
from pe_app.common.progress import Progress

# isort: split
import pe_monailabel.tasks.training_queue
from pe_monailabel.server.limits import Busy
from pe_monailabel.store.labels import Conflict
from pe_monailabel.store.models import Models
from pe_monailabel.tasks.detection import Jobs
from pe_monailabel.tasks.training_queue import StageTask, Trainings
from pe_monailabel.tasks.worklist import Leases

PROGRESS = Progress("train", 1, 2)
PATIENCE = 800
"""Seconds, for a machine that does other things too."""


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """Six studies: three with annotated emboli, three negative."""
    return annotated_store(tmp_path_factory.mktemp("trainings"))


@pytest.fixture
def server(studied, monkeypatch):
    """``server()`` is the queue of a server that starts now on the same folder as those before it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    opened = []

    def start():
        models = Models(studied.private / "models", studied.root.parent / "start.safetensors")
        stages = {stage: StageTask(stage, studied.private, {"epochs": "7"}) for stage in ("encoder", "classifier")}
        queue = Trainings(studied, models, lambda: stages)
        queue.open()
        opened.append(queue)
        return queue

    yield start
    for queue in opened:
        queue.close()


def ended(queue, seconds=PATIENCE):
    """The last task, once it has ended."""
    deadline = time.monotonic() + seconds
    while queue.tasks()[-1].status in ("SUBMITTED", "RUNNING"):
        assert time.monotonic() < deadline, queue.tasks()
        time.sleep(0.02)
    return queue.tasks()[-1]


def epochs_of(store, run):
    """Epochs that a training has finished, as its status tells."""
    try:
        return json.loads((store.private / "runs" / run / "status.json").read_text())["epoch"]
    except (OSError, ValueError):
        return 0


def alive(folder):
    """Processes that train in a folder."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline"]):
        if str(folder) in (process.info["cmdline"] or []) and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


@pytest.fixture
def task(tmp_path):
    return StageTask("encoder", tmp_path, {"epochs": "7"})


def test_settings_are_the_papers_unless_the_server_or_the_request_say_otherwise(task):
    assert task.settings({})["learning_rate"] == 1e-4
    assert task.settings({})["epochs"] == 7
    assert (task.settings({})["hu_low"], task.settings({})["hu_high"]) == (-1024, 500)
    assert task.settings({"epochs": 3.0, "augment": "true", "client_id": "x", "bundle_path": "/tmp"}) == {
        **task.settings({}),
        "epochs": 3,
        "augment": True,
    }
    assert "bundle_path" not in task.config()


def test_settings_of_one_name_and_two_meanings_have_a_name_each(task):
    assert "kind" not in task.config()
    assert task.settings({"classifier_kind": "pooled"})["classifier_kind"] == "pooled"
    assert task.settings({"attention_loss": "mse"})["attention_loss"] == "mse"


@pytest.mark.parametrize(
    "said",
    [
        {"epochs": "many"},
        {"epochs": 1.5},
        {"width": 0},
        {"augment": 3},
        {"learning_rate": float("inf")},
        {"hu_low": 600},
        {"shift_cells": -1},
    ],
)
def test_settings_that_cannot_be_used_are_named(task, said):
    with pytest.raises(InputError):
        task.settings(said)


@pytest.mark.timeout(2 * PATIENCE)
def test_a_training_publishes_its_model_another_waits_and_a_third_is_sent_away(studied, server):
    queue = server()
    first = queue.submit("encoder", {**SETTINGS, "epochs": 2}, "ann", enqueue=False)
    with pytest.raises(Busy, match="running"):
        queue.submit("encoder", SETTINGS, "ann", enqueue=False)
    second = queue.submit("classifier", {"epochs": 1, "batch": 4, "synthetic": True}, "bob", enqueue=True)
    assert [task.status for task in queue.tasks()][1] == "SUBMITTED"
    for _ in range(pe_monailabel.tasks.training_queue.WAITING_TASKS - 1):
        queue.submit("encoder", {"epochs": "many"}, "", enqueue=True)
    with pytest.raises(Busy, match="waiting"):
        queue.submit("encoder", SETTINGS, "ann", enqueue=True)
    ended(queue)
    tasks = {task.id: task for task in queue.tasks()}
    assert (tasks[first.id].status, tasks[second.id].status) == ("DONE", "DONE"), tasks
    assert all(task.status == "ERROR" for task in queue.tasks()[2:])
    assert tasks[second.id].reader == "bob"
    assert any("is published" in line for line in tasks[second.id].details)
    models = Models(studied.private / "models")
    published = [entry.model for entry in models.kept()]
    assert len(published) == 3, "the start, the encoder's and the classifier's"
    assert models.current().card.trained
    again = server()
    assert [(task.id, task.status) for task in again.tasks()] == [(task.id, task.status) for task in queue.tasks()]


@pytest.mark.timeout(2 * PATIENCE)
def test_two_processes_train_together_and_go_on_when_one_is_killed(studied, server, monkeypatch):
    import psutil

    monkeypatch.setenv("PE_TRAINING_PROCESSES", "2")
    queue = server()
    queue.submit("encoder", {**SETTINGS, "epochs": 4, "seed": 3}, "ann", enqueue=False)
    deadline = time.monotonic() + PATIENCE
    while not (queue.tasks()[-1].run and epochs_of(studied, queue.tasks()[-1].run)):
        assert queue.tasks()[-1].status in ("SUBMITTED", "RUNNING"), queue.tasks()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run = queue.tasks()[-1].run
    (launcher,) = alive(studied.private / "runs" / run)
    members = [child for child in psutil.Process(launcher).children() if "--multiprocessing-fork" in child.cmdline()]
    assert len(members) == 2
    members[1].kill()
    assert ended(queue).status == "DONE", queue.tasks()
    log = (studied.private / "runs" / run / "log.txt").read_text()
    assert [log.count(f"epoch {epoch} of 4:") for epoch in range(1, 5)] == [1] * 4, log
    assert log.count("is published") == 1

    queue.submit("encoder", {**SETTINGS, "epochs": 500, "seed": 4}, "ann", enqueue=False)
    while queue.tasks()[-1].run in ("", run) or not epochs_of(studied, queue.tasks()[-1].run):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    folder = studied.private / "runs" / queue.tasks()[-1].run
    members = psutil.Process(alive(folder)[0]).children()
    queue.stop()
    psutil.wait_procs(members, timeout=PATIENCE)
    assert not any(member.is_running() for member in members)
    assert json.loads((folder / "status.json").read_text())["state"] == "stopped"


@pytest.mark.timeout(2 * PATIENCE)
def test_a_training_whose_server_is_killed_stops_at_its_next_step_and_the_same_request_goes_on(studied, server):
    asked = {**SETTINGS, "epochs": 6, "seed": 1}
    pid = os.fork()
    if pid == 0:  # a server
        try:
            server().submit("encoder", asked, "ann", enqueue=False)
            time.sleep(600)
        finally:
            os._exit(1)
    runs = studied.private / "runs"
    deadline = time.monotonic() + PATIENCE
    run = None
    while run is None or epochs_of(studied, run) < 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)
        if (runs / "tasks.json").is_file():
            last = json.loads((runs / "tasks.json").read_text())[-1]
            run = last["run"] if last["status"] == "RUNNING" and last["run"] else None
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while alive(runs / run):
        assert time.monotonic() < deadline, "the training outlives its server"
        time.sleep(0.02)
    assert 1 <= epochs_of(studied, run) < 6, "it was to be interrupted"

    queue = server()
    assert queue.tasks()[-1].status == "INTERRUPTED"
    assert json.loads((runs / run / "status.json").read_text())["state"] in ("stopped", "interrupted")
    queue.submit("encoder", asked, "ann", enqueue=False)
    done = ended(queue)
    assert (done.status, done.run) == ("DONE", run)
    log = (runs / run / "log.txt").read_text()
    assert [log.count(f"epoch {epoch} of 6:") for epoch in range(1, 7)] == [1] * 6, "no epoch is trained twice"
    queue.submit("encoder", {**asked, "epochs": 1}, "ann", enqueue=False)
    assert ended(queue).run != run, "other settings make another training"
    assert len(list(runs.glob("encoder-*"))) <= pe_monailabel.tasks.training_queue.KEPT_RUNS


@pytest.mark.timeout(2 * PATIENCE)
def test_a_training_that_is_stopped_says_so_and_one_that_fails_says_why(studied, server):
    queue = server()
    queue.submit("encoder", {**SETTINGS, "epochs": 500, "seed": 2}, "ann", enqueue=False)
    deadline = time.monotonic() + PATIENCE
    while not (queue.tasks()[-1].run and epochs_of(studied, queue.tasks()[-1].run)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    stopped = queue.stop()
    assert stopped.status == "STOPPED"
    while alive(studied.private / "runs" / stopped.run):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert queue.tasks()[-1].status == "STOPPED"
    assert queue.stop() is None
    queue.submit("encoder", {**SETTINGS, "learning_rate": 1e20, "epochs": 2}, "ann", enqueue=False)
    failed = ended(queue)
    assert failed.status == "ERROR"
    status = json.loads((studied.private / "runs" / failed.run / "status.json").read_text())
    assert status["state"] == "failed"
    assert "loss" in status["text"]
    assert failed.details


def test_a_damaged_history_of_tasks_is_set_aside(studied, server):
    path = studied.private / "runs" / "tasks.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text('[{"id": ')
    assert server().tasks() == []
    assert [file.read_text() for file in path.parent.glob("tasks.json.damaged-*")] == ['[{"id": ']


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
