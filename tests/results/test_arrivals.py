"""Studies that arrive in a folder or an archive: each is handled once, in order, when it is whole."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from app_server import chest
from orthanc import PASSWORD, USER, running_orthanc
from small_series import write_dicom
from small_studies import CLASSIFIER, ENCODER, SLABS, small_chest
from typer.testing import CliRunner

from pe_app.cli import app
from pe_app.common.errors import InputError
from pe_app.ct.volume_io import write_volume
from pe_app.model.detector import Detector
from pe_app.pacs.dicomweb import Access, Archive, Limits, Unavailable
from pe_app.results.arrivals import Arrival, WatchedArchive, WatchedFolder, WatchSettings, watch
from pe_app.results.batch import run_batch
from pe_app.results.outcome import Outcome

ONCE = WatchSettings(settle_s=0.0, once=True)


@pytest.fixture(scope="module")
def detector():
    return Detector.untrained(0, SLABS, ENCODER, CLASSIFIER)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def noting(studies):
    """Stands for ``run_batch`` where only the stream matters: the message says how many files a study has."""
    for study in studies:
        files = [path for path in [study.path, *study.path.rglob("*")] if path.is_file()]
        yield Outcome(study.study, "failed", str(study.error or len(files)), fingerprint=study.fingerprint)


@pytest.fixture
def watching(folder, tmp_path):
    """``watching()`` is the watch over the folder, with the results beside it."""

    def watching(source=None, settings=ONCE, run=noting):
        out = tmp_path / "out"
        return watch(source or WatchedFolder(folder, out), out, run, settings)

    return watching


@pytest.fixture
def real(detector, tmp_path):
    return partial(run_batch, detector=detector, out=tmp_path / "out")


def names(outcomes):
    return [outcome.study for outcome in outcomes]


def handled(out):
    return [json.loads(line)["study"] for line in (out / "watched.jsonl").read_text().splitlines()]


# --- a folder


def test_studies_mixed_in_one_folder_are_told_apart_and_handled_once_in_the_order_they_came(folder, watching, tmp_path):
    for seed in (3, 1, 2):
        for file in write_dicom(tmp_path / "sent", seed):
            shutil.copy(file, folder)
        time.sleep(0.02)  # file systems tell times apart by some milliseconds
    (folder / "DICOMDIR").write_bytes(b"no image")
    outcomes = list(watching())
    assert names(outcomes) == ["1.2.3", "1.2.1", "1.2.2"]
    assert [outcome.message for outcome in outcomes] == ["32", "32", "32"]
    assert list(watching()) == []
    assert not (tmp_path / "out" / ".arriving").exists()


def test_results_are_those_of_detect(folder, watching, real, tmp_path):
    write_volume(chest(1, 2)[0], folder / "a.nrrd")
    shutil.copy(folder / "a.nrrd", folder / "mask.seg.nrrd")
    (outcome,) = watching(run=real)
    assert (outcome.study, outcome.status) == ("a", "analysed")
    written = json.loads((tmp_path / "out" / "a" / "detection.json").read_text())
    assert written == outcome.detection.to_json()
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["study"] for line in lines] == ["a"]
    assert "a" in (tmp_path / "out" / "index.html").read_text()


def test_a_bad_study_is_reported_with_its_reason_and_stops_nothing(folder, watching, real):
    gap = write_dicom(folder / "gap", 1)
    gap[10].unlink()
    cut = write_dicom(folder / "cut", 2)
    cut[-1].write_bytes(cut[-1].read_bytes()[:100])  # the last slice: without it the others are even
    (folder / "nothing.nrrd").write_bytes(b"")
    write_volume(small_chest(3, emboli=0)[0], folder / "good.nrrd")
    said = {outcome.study: (outcome.status, outcome.message) for outcome in watching(run=real)}
    assert said["1.2.1"][0] == "refused"
    assert "some are missing" in said["1.2.1"][1]
    assert said["1.2.2"][0] == said["nothing"][0] == "failed"
    assert "not DICOM" in said["1.2.2"][1]
    assert said["good"][0] == "refused"  # it is too short
    assert list(watching(run=real)) == []  # also the failed ones are not tried again and again


def test_late_slices_make_a_study_be_analysed_again(folder, watching):
    files = write_dicom(folder, 1)
    late = [(file, file.read_bytes()) for file in files[24:]]
    for file, _ in late:
        file.unlink()
    assert [outcome.message for outcome in watching()] == ["24"]
    for file, content in late:
        file.write_bytes(content)
    assert [outcome.message for outcome in watching()] == ["32"]
    assert list(watching()) == []


def test_a_watch_that_was_stopped_goes_on_where_it_was(folder, watching, tmp_path):
    for number in range(3):
        (folder / f"{number}.nrrd").write_bytes(b"")
        time.sleep(0.02)
    first = watching()
    assert next(first).study == "0"
    first.close()
    ledger = tmp_path / "out" / "watched.jsonl"
    with ledger.open("a") as file:
        file.write('{"study": "1", "finger')  # the power went
    assert names(watching()) == ["1", "2"]
    assert names(watching()) == []


def test_the_folder_of_results_and_hidden_files_are_not_watched(folder):
    for name in ("a.nrrd", ".b.nrrd", "out/c.nrrd"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    source = WatchedFolder(folder, folder / "out")
    assert [arrival.study for arrival in source.look()] == ["a"]


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(InputError, match="there is no such folder"):
        WatchedFolder(tmp_path / "none", tmp_path)


# --- when a study is whole, told with a source that says what the test wants


class Scripted:
    """Shows one list of arrivals after another; the last one stays."""

    def __init__(self, path, *looks):
        self.path = path
        self.looks = list(looks)
        self.staged = []

    def look(self):
        look = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        if isinstance(look, Exception):
            raise look
        return look

    def stage(self, arrival, folder):
        self.staged.append(arrival.fingerprint)
        return self.path


def arrival(study, fingerprint="1", order=0.0, quiet_s=0.0):
    return Arrival(study, fingerprint, (order, study), quiet_s)


@pytest.fixture
def ct(tmp_path):
    (tmp_path / "ct.nrrd").write_bytes(b"")
    return tmp_path / "ct.nrrd"


def test_a_study_that_still_changes_waits_until_it_rests(ct, watching):
    looks = [[arrival("a", str(number)), arrival("b", order=1, quiet_s=99)] for number in range(5)]
    source = Scripted(ct, *looks)
    outcomes = watching(source, WatchSettings(every_s=0.01, settle_s=2))
    assert names([next(outcomes), next(outcomes)]) == ["b", "a"]
    assert source.staged == ["1", "4"]
    outcomes.close()


def test_a_single_pass_waits_for_what_is_just_arriving(ct, watching):
    source = Scripted(ct, [arrival("a")])
    assert names(watching(source, WatchSettings(settle_s=0.1, once=True))) == ["a"]


def test_a_source_that_is_away_for_a_while_is_asked_again(ct, watching, caplog):
    source = Scripted(ct, Unavailable("the archive is down"), Unavailable("the archive is down"), [arrival("a")])
    outcomes = watching(source, WatchSettings(every_s=0.01, settle_s=0))
    assert next(outcomes).study == "a"
    outcomes.close()
    assert caplog.text.count("the archive is down") == 1


def test_a_source_that_can_never_be_used_is_said_at_once(ct, watching):
    with pytest.raises(InputError, match="wrong password"):
        list(watching(Scripted(ct, InputError("wrong password")), WatchSettings(every_s=0.01)))
    with pytest.raises(Unavailable, match="down"):
        list(watching(Scripted(ct, Unavailable("down")), ONCE))


def test_a_study_that_cannot_be_had_stops_no_other_and_is_reported_in_the_end(ct, watching, monkeypatch):
    monkeypatch.setattr("pe_app.results.arrivals.ATTEMPTS", 2)
    source = Scripted(
        ct, [arrival("bad"), arrival("broken", order=1), arrival("away", order=2), arrival("good", order=3)]
    )
    cut = Unavailable("it was cut off")
    faults = {"bad": [InputError("it is nonsense")], "away": [cut], "broken": [cut] * 9}
    stage = source.stage

    def failing(arrival, folder):
        if faults.get(arrival.study):
            raise faults[arrival.study].pop()
        return stage(arrival, folder)

    source.stage = failing
    outcomes = watching(source, WatchSettings(every_s=0.01, settle_s=0))
    said = {outcome.study: outcome.message for outcome in (next(outcomes) for _ in range(4))}
    outcomes.close()
    assert said == {"bad": "it is nonsense", "broken": "it was cut off", "away": "1", "good": "1"}
    assert names(watching(source, ONCE)) == []


def test_a_single_pass_leaves_what_cannot_be_had_to_the_next(ct, watching):
    source = Scripted(ct, [arrival("away"), arrival("good", order=1)])
    stage, faults = source.stage, [Unavailable("it was cut off")]
    source.stage = lambda arrival, folder: stage(arrival, folder) if not faults else _raise(faults.pop())
    assert names(watching(source, ONCE)) == ["good"]
    assert names(watching(source, ONCE)) == ["away"]


def _raise(error):
    raise error


def test_what_could_not_be_published_is_tried_again_later(ct, watching, tmp_path):
    problems = ["the archive is down", "the archive is down", ""]

    def run(studies):
        for study, problem in zip(studies, problems, strict=False):
            yield Outcome(study.study, "refused", problem=problem, fingerprint=study.fingerprint)

    source = Scripted(ct, [arrival("a")])
    outcomes = watching(source, WatchSettings(every_s=0.01, settle_s=0, retry_s=0.05), run)
    assert [next(outcomes).problem for _ in range(3)] == problems
    outcomes.close()
    assert handled(tmp_path / "out") == ["a"]
    assert list(watching(source, ONCE, run)) == []


# --- an archive


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with running_orthanc(tmp_path_factory.mktemp("orthanc")) as archive:
        yield archive


@pytest.fixture
def orthanc(running):
    running.empty()
    return running


def test_new_studies_of_an_archive_are_fetched_once(orthanc, watching, real, tmp_path, monkeypatch):
    archive = Archive(Access(orthanc.url, USER, PASSWORD), Limits(waits_s=()))
    source = WatchedArchive(archive, {"StudyDate": "20260101-"}, 1)
    sent = tmp_path / "sent"
    orthanc.add(write_dicom(sent, 2, StudyDate="20260103"))
    orthanc.add(write_dicom(sent, 1, series=1, StudyDate="20260102", ImageOrientationPatient=[1, 0, 0, 0, 0, -1]))
    orthanc.add(write_dicom(sent, 1, series=2, StudyDate="20260102"))
    orthanc.add(write_dicom(sent, 3, StudyDate="20251231"))
    gap = write_dicom(sent, 4, StudyDate="20260104")
    orthanc.add([*gap[:10], *gap[12:]])
    outcomes = list(watching(source, run=real))
    assert names(outcomes) == ["1.2.1", "1.2.2", "1.2.4"]
    assert [outcome.detection.image.size[0] for outcome in outcomes[:2]] == [32, 32]
    assert (outcomes[2].status, "some are missing" in outcomes[2].message) == ("refused", True)
    with monkeypatch.context() as patched:
        patched.setattr(archive, "retrieve", lambda *_: pytest.fail("it was fetched again"))
        assert list(watching(source, run=real)) == []
    orthanc.add(gap[10:12])
    assert [(one.study, one.detection.image.size[0]) for one in watching(source, run=real)] == [("1.2.4", 32)]
    assert not list((tmp_path / "out" / ".arriving").iterdir())


def test_only_studies_of_the_last_days_are_asked_for(orthanc, tmp_path):
    orthanc.add(write_dicom(tmp_path / "sent", 1, StudyDate=time.strftime("%Y%m%d")))
    orthanc.add(write_dicom(tmp_path / "sent", 2, StudyDate="20260101"))
    source = WatchedArchive(Archive(Access(orthanc.url, USER, PASSWORD)), {}, 2)
    assert [arrival.study for arrival in source.look()] == ["1.2.1"]


# --- the command


def test_the_command_handles_a_folder_once(folder, detector, tmp_path):
    (folder / "a.nrrd").write_bytes(b"")
    detector.save(tmp_path / "model.safetensors")
    options = ["--out", tmp_path / "out", "--once", "--settle", "0", "--model", tmp_path / "model.safetensors"]
    answer = CliRunner().invoke(app, ["watch", str(folder), *map(str, options), "--json"])
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout.splitlines()[0])["study"] == "a"


def test_the_command_does_not_send_a_password_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("PE_ARCHIVE_PASSWORD", "x")
    words = ["https://a/dicom-web", "--out", str(tmp_path), "--user", "u", "--send", "https://b/dicom-web"]
    answer = CliRunner().invoke(app, ["watch", *words])
    assert isinstance(answer.exception, InputError)
    assert "the password is the one of https://a" in str(answer.exception)


def test_a_request_to_end_ends_the_watch(folder, detector, tmp_path):
    (folder / "a.nrrd").write_bytes(b"")
    detector.save(tmp_path / "model.safetensors")
    options = ["--out", tmp_path / "out", "--settle", 0, "--every", 1, "--model", tmp_path / "model.safetensors"]
    command = [sys.executable, "-m", "pe_app", "watch", str(folder), *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(1000):
            if (tmp_path / "out" / "watched.jsonl").is_file() or process.poll() is not None:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, "Stopped; the same command resumes" in said) == (130, True), said
    assert handled(tmp_path / "out") == ["a"]
