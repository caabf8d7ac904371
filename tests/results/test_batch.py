"""Many studies: what is taken as a study, what is kept when, and that neither a study nor a power cut loses others."""

import contextlib
import csv
import errno
import json
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import dicom_slice

from pe_app.common.errors import InputError, UnfitStudy
from pe_app.common.progress import Cancelled
from pe_app.ct.quality import QualityLimits, Reason
from pe_app.ct.volume import Volume, axial_affine
from pe_app.ct.volume_io import write_volume
from pe_app.model.detection import Detection, ImageIdentity, ModelIdentity
from pe_app.model.detector import DetectionResult
from pe_app.results import batch
from pe_app.results.batch import Finished, run_batch
from pe_app.results.find_studies import BatchStudy, find_studies
from pe_app.studies import Study, write_studies


class Model:
    """Stands for a Detector: the probability is the brightest voxel / 1000; 999 is refused, 666 is its own fault."""

    def __init__(self, sha256: str = "ab" * 32) -> None:
        self.sha256 = sha256
        self.limits = QualityLimits()
        self.asked: list[str] = []

    def detect(self, volume: Volume, progress=None) -> DetectionResult:
        self.asked.append(volume.name)
        brightest = int(volume.voxels.max())
        if brightest == 666:
            raise RuntimeError("the networks do not like it")
        refused = (Reason("no_contrast", "blood of 40 HU", refuses=True),) if brightest == 999 else ()
        return DetectionResult(
            self._said(ImageIdentity.of(volume), refused, None if refused else brightest / 1000), None
        )

    def refuse_unread(self, error: UnfitStudy) -> Detection:
        nothing = ImageIdentity((0, 0, 0), (0.0, 0.0, 0.0), "")
        return self._said(nothing, (Reason(error.code, str(error), refuses=True),), None)

    def _said(self, image: ImageIdentity, reasons: tuple[Reason, ...], probability: float | None) -> Detection:
        status = "refused" if reasons else "analysed"
        identity = ModelIdentity("stand-in", "1", self.sha256, trained=True)
        return Detection(status, reasons, probability, 0.5, (), (), image, identity)


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """Pictures take most of the time and are tested elsewhere."""

    def write(result, volume, folder, name, *, full_resolution=False):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "detection.json").write_text(json.dumps(result.detection.to_json()))

    monkeypatch.setattr(batch, "write_result", write)


def ct(path: Path, brightest: int) -> BatchStudy:
    """A small CT on disk whose brightest voxel is known."""
    voxels = np.random.default_rng(0).integers(-1000, 0, (4, 8, 8)).astype(np.int16)
    voxels[2, 4, 4] = brightest
    write_volume(Volume(voxels, axial_affine((2.5, 1.0, 1.0))), path)
    return BatchStudy(path.name.removesuffix(".nrrd"), path)


@pytest.fixture
def studies(tmp_path) -> list[BatchStudy]:
    return [ct(tmp_path / "in" / f"{name}.nrrd", hu) for name, hu in (("a", 100), ("b", 700), ("c", 300))]


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def rows_of(out: Path) -> list[dict]:
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def run(studies, out: Path, model: Model | None = None, **options):
    return list(run_batch(studies, model or Model(), out, **options))


# --- one study never stops the others


def test_damaged_absent_refused_and_cursed_studies_stop_no_other(tmp_path, studies):
    cut = ct(tmp_path / "in" / "cut.nrrd", 5)
    cut.path.write_bytes(cut.path.read_bytes()[:-40])
    bad = [
        cut,
        BatchStudy("absent", tmp_path / "in" / "absent.nrrd"),
        ct(tmp_path / "in" / "refused.nrrd", 999),
        ct(tmp_path / "in" / "cursed.nrrd", 666),
    ]
    outcomes = run([studies[0], *bad, *studies[1:]], tmp_path / "out")
    assert [(outcome.study, outcome.status) for outcome in outcomes] == [
        *(("a", "analysed"), ("cut", "failed"), ("absent", "failed"), ("refused", "refused"), ("cursed", "failed")),
        *(("b", "analysed"), ("c", "analysed")),
    ]
    said = {outcome.study: outcome.message for outcome in outcomes}
    assert "cannot be read" in said["cut"]
    assert "no such file" in said["absent"]
    assert said["refused"] == "blood of 40 HU"
    assert "the networks do not like it" in said["cursed"]
    assert [line["study"] for line in lines_of(tmp_path / "out")] == [outcome.study for outcome in outcomes]
    rows = rows_of(tmp_path / "out")
    assert [(row["study"], row["probability"]) for row in rows if row["probability"]] == [
        *(("a", "0.1"), ("b", "0.7"), ("c", "0.3")),
    ]
    page = (tmp_path / "out" / "index.html").read_text()
    assert "3 of 7 analysed (42%)" in page


def test_files_that_make_no_ct_are_refused_with_their_code(tmp_path, monkeypatch):
    def read(path, series=None):
        raise UnfitStudy("derived", "series 1.2: its slices are not axial")

    monkeypatch.setattr(batch, "read_volume", read)
    (outcome,) = run([BatchStudy("mpr", tmp_path / "in")], tmp_path / "out")
    assert (outcome.status, outcome.message) == ("refused", "series 1.2: its slices are not axial")
    assert [reason.code for reason in outcome.detection.reasons] == ["derived"]
    assert run([BatchStudy("mpr", tmp_path / "in")], tmp_path / "out")[0].known


def test_a_line_is_on_disk_before_its_study_is_told(tmp_path, studies):
    for number, outcome in enumerate(run_batch(studies, Model(), tmp_path / "out"), start=1):
        assert lines_of(tmp_path / "out")[-1]["study"] == outcome.study
        assert len(rows_of(tmp_path / "out")) == number


def test_a_full_disk_stops_the_batch_and_what_is_done_stays(tmp_path, studies, monkeypatch):
    write = batch.write_result

    def full(result, volume, folder, name, **options):
        if name == "b":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(result, volume, folder, name, **options)

    monkeypatch.setattr(batch, "write_result", full)
    told = []
    with pytest.raises(InputError, match=r"No space left.*start again"):
        told.extend(outcome.study for outcome in run_batch(studies, Model(), tmp_path / "out"))
    monkeypatch.setattr(batch, "write_result", write)
    again = run(studies, tmp_path / "out")
    assert [(outcome.study, outcome.known) for outcome in again] == [("a", True), ("b", False), ("c", False)]


def test_no_message_says_where_the_files_are(tmp_path):
    absent = tmp_path / "DOE^JANE 1970" / "scan"
    (outcome,) = run([BatchStudy("s1", absent)], tmp_path / "out")
    assert "DOE" not in outcome.message
    assert "DOE" not in (tmp_path / "out" / "index.html").read_text()


# --- going on


def test_a_second_run_does_only_what_is_new_or_failed(tmp_path, studies):
    missing = BatchStudy("late", tmp_path / "in" / "late.nrrd")
    run([*studies, missing], tmp_path / "out")
    ct(missing.path, 200)
    model = Model()
    again = run([*studies, missing], tmp_path / "out", model)
    assert [outcome.known for outcome in again] == [True, True, True, False]
    assert model.asked == ["late.nrrd"]
    assert again[1].detection.probability == 0.7
    assert [line["study"] for line in lines_of(tmp_path / "out")] == ["a", "b", "c", "late"]
    assert len(rows_of(tmp_path / "out")) == 4


@pytest.mark.parametrize("change", ["model", "limits", "option", "voxels", "result removed"])
def test_what_the_result_rests_on_makes_a_study_be_done_again(tmp_path, studies, change):
    run(studies, tmp_path / "out")
    model, options = Model("cd" * 32 if change == "model" else "ab" * 32), {}
    if change == "limits":
        model.limits = QualityLimits(min_slices=2)
    elif change == "option":
        options = {"full_resolution": True}
    elif change == "voxels":
        ct(studies[1].path, 800)
    elif change == "result removed":
        (tmp_path / "out" / "b" / "detection.json").unlink()
    again = run(studies, tmp_path / "out", model, **options)
    only_b = change in ("voxels", "result removed")
    assert [not outcome.known for outcome in again] == [not only_b, True, not only_b]
    assert again[1].detection.probability == (0.8 if change == "voxels" else 0.7)


def test_files_copied_anew_with_the_same_voxels_are_read_but_not_analysed_again(tmp_path, studies):
    run(studies, tmp_path / "out")
    for study in studies:
        os.utime(study.path, (1, 1))
    model = Model()
    assert all(outcome.known for outcome in run(studies, tmp_path / "out", model))
    assert model.asked == []
    read = []
    batch_read, batch.read_volume = batch.read_volume, lambda *a, **k: read.append(a)
    try:
        assert all(outcome.known for outcome in run(studies, tmp_path / "out", model))
    finally:
        batch.read_volume = batch_read
    assert read == []  # and the next time they are known by their files


@pytest.mark.parametrize("kept", [0.3, 0.95])
def test_a_line_that_a_power_cut_tore_is_made_again(tmp_path, studies, kept):
    run(studies, tmp_path / "out")
    file = tmp_path / "out" / "results.jsonl"
    whole = file.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    file.write_bytes(whole[: len(whole) - len(last) + int(kept * len(last))])
    model = Model()
    assert [outcome.known for outcome in run(studies, tmp_path / "out", model)] == [True, True, False]
    assert [line["study"] for line in lines_of(tmp_path / "out")] == ["a", "b", "c"]


def test_results_of_another_program_are_not_overwritten(tmp_path, studies):
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.jsonl").write_text('{"schema": "pe-result/9", "study": "a"}\n')
    with pytest.raises(InputError, match=r"line 1.*pe-result/9"):
        run(studies, out)
    assert "pe-result/9" in (out / "results.jsonl").read_text()


def test_a_study_that_ends_the_process_twice_is_passed_over_and_no_other_is_blamed(tmp_path, studies):
    """The disk as it is while the networks look at b is what a process that dies there leaves behind."""

    def dying(out: Path, left_behind: Path) -> list[tuple[str, str, bool]]:
        class Dying(Model):
            def detect(self, volume, progress=None):
                if volume.name == "b.nrrd":
                    time.sleep(0.2)  # c is being read meanwhile
                    shutil.copytree(out, left_behind)
                    raise Cancelled
                return super().detect(volume, progress)

        told = []
        with contextlib.suppress(Cancelled):
            told.extend((outcome.study, outcome.status, outcome.known) for outcome in run_batch(studies, Dying(), out))
        return told

    assert dying(tmp_path / "1", tmp_path / "2") == [("a", "analysed", False)]
    assert dying(tmp_path / "2", tmp_path / "3") == [("a", "analysed", True)]
    assert dying(tmp_path / "3", tmp_path / "4") == [
        *(("a", "analysed", True), ("b", "failed", False), ("c", "analysed", False)),
    ]
    (message,) = (line["message"] for line in lines_of(tmp_path / "3") if line["study"] == "b")
    assert "ended 2 times" in message
    ct(studies[1].path, 400)  # other files may do better
    assert [outcome.status for outcome in run(studies, tmp_path / "3")] == ["analysed"] * 3


def test_a_run_that_is_stopped_blames_no_study(tmp_path, studies):
    for _ in range(4):
        outcomes = run_batch(studies, Model(), tmp_path / "out")
        next(outcomes)
        outcomes.close()
    assert [outcome.status for outcome in run(studies, tmp_path / "out")] == ["analysed"] * 3
    assert not (tmp_path / "out" / ".begun.json").exists()


def test_cancelling_stops_between_steps_and_what_is_done_stays(tmp_path, studies):
    def progress(step):
        if step.done == 1:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(studies, tmp_path / "out", total=3, progress=progress)
    assert [line["study"] for line in lines_of(tmp_path / "out")] == ["a"]
    page = (tmp_path / "out" / "index.html").read_text()
    assert "1 of 3 analysed" in page
    assert "2 waiting" in page


def test_two_runs_do_not_write_into_one_folder(tmp_path, studies):
    first = run_batch(studies, Model(), tmp_path / "out")
    next(first)
    with pytest.raises(InputError, match="another run"):
        run(studies, tmp_path / "out")
    first.close()
    assert len(run(studies, tmp_path / "out")) == 3


# --- as they come


def test_a_stream_without_end_is_told_study_by_study_and_the_page_is_ready_while_it_waits(tmp_path, studies):
    more = threading.Event()

    def arriving():
        yield studies[0]
        yield studies[1]
        more.wait(60)
        yield studies[2]

    outcomes = run_batch(arriving(), Model(), tmp_path / "out")
    assert [next(outcomes).study, next(outcomes).study] == ["a", "b"]
    page = tmp_path / "out" / "index.html"
    threading.Timer(2.5, more.set).start()
    page.unlink()  # what may have been written by now is not what this is about
    assert next(outcomes).study == "c"
    outcomes.close()
    assert "3 of 3 analysed" in page.read_text()


def test_the_next_study_is_read_while_the_networks_look_and_no_further_one(tmp_path, monkeypatch):
    studies = [ct(tmp_path / "in" / f"{number}.nrrd", number) for number in range(5)]
    read, at_detection = [], []
    real = batch.read_volume
    monkeypatch.setattr(batch, "read_volume", lambda path, series=None: read.append(path.name) or real(path))

    class Slow(Model):
        def detect(self, volume, progress=None):
            deadline = time.monotonic() + 30
            while len(read) < min(len(self.asked) + 2, 5) and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.05)
            at_detection.append(len(read))
            return super().detect(volume, progress)

    run(studies, tmp_path / "out", Slow())
    assert at_detection == [2, 3, 4, 5, 5]


def test_progress_counts_this_runs_studies_only_so_that_the_time_left_is_right(tmp_path, studies):
    run(studies[:2], tmp_path / "out")
    seen = []
    run(studies, tmp_path / "out", total=3, progress=lambda step: seen.append((step.done, step.total, step.text)))
    assert seen[-1] == (1, 1, "2 unchanged, skipped")


# --- publishing


def test_publishing_follows_the_files_and_what_could_not_be_published_is_done_again(tmp_path, studies):
    published = []

    def publish(finished: Finished) -> None:
        assert (finished.folder / "detection.json").is_file()
        published.append(finished.study.study)
        if finished.study.study == "b" and published.count("b") == 1:
            raise InputError(f"{finished.study.path}: the archive is down")

    outcomes = run(studies, tmp_path / "out", publish=publish, published_as="dicom")
    assert [outcome.problem for outcome in outcomes] == ["", "b: the archive is down", ""]
    assert outcomes[1].detection.probability == 0.7
    again = run(studies, tmp_path / "out", publish=publish, published_as="dicom")
    assert [(outcome.known, outcome.problem) for outcome in again] == [(True, ""), (False, ""), (True, "")]
    assert published == ["a", "b", "c", "b"]


# --- names


@pytest.mark.parametrize("name", ["../../etc/x", "a/b", "index.html", ".hidden", "x" * 300, "*?:", "=1+1", "Ä ö"])
def test_whatever_a_study_is_called_its_files_stay_in_the_folder_of_results(tmp_path, studies, name):
    out = tmp_path / "deep" / "er" / "out"
    outcomes = run([replace(studies[0], study=name), studies[1]], out)
    assert [outcome.status for outcome in outcomes] == ["analysed"] * 2
    folder = out / outcomes[0].folder
    assert folder.parent == out
    assert (folder / "detection.json").is_file()
    assert lines_of(out)[0]["study"] == name
    assert not rows_of(out)[0]["study"].startswith("=")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "deep"}


def test_different_names_never_share_a_folder(tmp_path, studies):
    names = ["a/b", "a_b", "a?b", "a b"]
    outcomes = run([replace(studies[0], study=name) for name in names], tmp_path / "out")
    assert len({outcome.folder for outcome in outcomes}) == len(names)


# --- what is a study


def dicom_series(folder: Path, study_uid: str, series_uid: str = "1.2.840", count: int = 2) -> None:
    folder.mkdir(parents=True)
    for k in range(count):
        dataset = dicom_slice(np.zeros((4, 4), np.int16), (0.0, 0.0, 2.5 * k), SeriesInstanceUID=series_uid)
        dataset.StudyInstanceUID = study_uid
        dataset.save_as(folder / f"{k}", enforce_file_format=True)


def test_a_folder_of_dicom_files_is_one_study(tmp_path):
    dicom_series(tmp_path / "scan", "1.2.3")
    found = find_studies([tmp_path / "scan"])
    assert found.single
    assert [(study.study, study.path) for study in found.studies] == [("scan", tmp_path / "scan")]


def test_series_of_one_study_in_folders_of_their_own_are_one_study(tmp_path):
    dicom_series(tmp_path / "scan" / "se1", "1.2.3", "1.2.3.1")
    dicom_series(tmp_path / "scan" / "se2", "1.2.3", "1.2.3.2")
    (tmp_path / "scan" / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "scan" / "README.txt").write_text("from the PACS")
    found = find_studies([tmp_path / "scan"])
    assert found.single
    assert [study.path for study in found.studies] == [tmp_path / "scan"]


def test_a_folder_of_several_dicom_studies_is_many_named_by_their_folders(tmp_path):
    for number, patient in enumerate(("p1", "p2")):
        dicom_series(tmp_path / "all" / patient / "se1", f"1.2.{number}", f"1.2.{number}.1")
        dicom_series(tmp_path / "all" / patient / "se2", f"1.2.{number}", f"1.2.{number}.2")
    found = find_studies([tmp_path / "all"])
    assert not found.single
    assert [(study.study, study.path) for study in found.studies] == [
        *(("p1", tmp_path / "all" / "p1"), ("p2", tmp_path / "all" / "p2")),
    ]
    assert "2 studies" in found.said[0]


def test_series_of_one_study_beside_other_studies_are_told(tmp_path):
    dicom_series(tmp_path / "all" / "s1", "1.2.3", "1.2.3.1")
    dicom_series(tmp_path / "all" / "s2", "1.2.3", "1.2.3.2")
    dicom_series(tmp_path / "all" / "s3", "1.2.4", "1.2.4.1")
    found = find_studies([tmp_path / "all"])
    assert len(found.studies) == 3
    assert "s1, s2: series of one study" in found.said[1]


def test_files_in_folders_are_studies_but_results_hidden_files_and_outlines_are_not(tmp_path):
    ct(tmp_path / "all" / "x.nrrd", 1)
    ct(tmp_path / "all" / "p1" / "ct.nrrd", 1)
    ct(tmp_path / "all" / ".pe" / "hidden.nrrd", 1)
    ct(tmp_path / "all" / "x.seg.nrrd", 1)
    ct(tmp_path / "all" / "x-detection" / "attention.nrrd", 1)
    (tmp_path / "all" / "x-detection" / "detection.json").write_text("{}")
    found = find_studies([tmp_path / "all"])
    assert [study.study for study in found.studies] == ["x", "p1_ct"]


def test_a_study_list_and_a_folder_with_one_are_that_list(tmp_path, studies):
    listed = tmp_path / "in" / "studies.csv"
    write_studies([Study("first", studies[2].path), Study("second", studies[0].path)], listed)
    for given in (listed, tmp_path / "in"):
        found = find_studies([given])
        assert [(study.study, study.path.name) for study in found.studies] == [
            ("first", "c.nrrd"),
            ("second", "a.nrrd"),
        ]
        assert not found.single


def test_several_paths_are_many_studies_with_names_of_their_own(tmp_path):
    for number, patient in enumerate(("p1", "p2")):
        dicom_series(tmp_path / patient / "dicom", f"1.2.{number}")
    found = find_studies([tmp_path / "p1" / "dicom", tmp_path / "p2" / "dicom", tmp_path / "none.nrrd"])
    assert [study.study for study in found.studies] == ["p1_dicom", "p2_dicom", "none"]
    assert not found.single


def test_a_path_without_a_study_is_kept_so_that_reading_it_says_what_is_wrong(tmp_path):
    (tmp_path / "empty").mkdir()
    for given in (tmp_path / "empty", tmp_path / "absent"):
        found = find_studies([given])
        assert found.single
        assert [study.path for study in found.studies] == [given]


def test_one_ct_under_two_spellings_of_its_path_is_one_study(tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.nrrd").write_bytes(b"x")
    (tmp_path / "v" / "gone.nrrd").symlink_to("/nowhere/gone.nrrd")
    found = find_studies([tmp_path / "v" / "a.nrrd", tmp_path / "v" / ".." / "v" / "a.nrrd"])
    assert [study.study for study in found.studies] == ["a"]
    assert "is given twice" in " ".join(found.said)
    assert [study.study for study in find_studies([tmp_path / "v"]).studies] == ["a", "gone"], (
        "a link to nowhere is named"
    )
