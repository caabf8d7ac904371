"""Import: what hospitals hand over, hostile archives, interruptions, and what de-identification hides."""

import csv
import gzip
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.fileset import FileSet
from typer.testing import CliRunner

from pe_app.cli import app
from pe_app.common.errors import InputError
from pe_app.common.progress import Cancelled, Progress
from pe_app.common.worker_pool import Processes
from pe_app.ct.source_series import read_source, source_path
from pe_app.ct.volume_io import read_volume
from pe_app.pacs.importing import ImportLine, ImportSettings, Pseudonyms, import_studies, read_key
from pe_app.pacs.importing.pseudonyms import identities_folder
from pe_app.pacs.importing.unpacking import unpack
from pe_app.studies import read_studies

SHAPE = (5, 6, 7)


def stored_pixels(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1500, shape).astype(np.uint16)


@pytest.fixture
def disc(write_series, tmp_path) -> Path:
    """Two patients: Ann with two series and a localizer, Bob with one series."""
    folder = tmp_path / "disc"
    ann = {"PatientID": "A1", "PatientName": "Ann^Archer", "StudyInstanceUID": "1.2.1", "StudyDate": "20250304"}
    bob = {"PatientID": "B2", "PatientName": "Bob^Baker", "StudyInstanceUID": "1.2.2", "StudyDate": "20250305"}
    write_series(stored_pixels(1), folder=folder / "a", SeriesInstanceUID="1.3.1", SeriesDescription="PE 1.0", **ann)
    write_series(stored_pixels(2)[:3], folder=folder / "a", SeriesInstanceUID="1.3.2", SeriesDescription="5 mm", **ann)
    scout = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "SeriesDescription": "Scout"}
    write_series(stored_pixels(3)[:1], folder=folder / "a", SeriesInstanceUID="1.3.3", **scout, **ann)
    write_series(stored_pixels(4), folder=folder / "b", SeriesInstanceUID="1.3.4", **bob)
    (folder / "README.txt").write_text("patients of the week")
    return folder


def by_series(lines: tuple[ImportLine, ...]) -> dict[str, ImportLine]:
    return {line.series: line for line in lines}


def cts(studies: Path) -> list[Path]:
    return sorted(studies.glob("*.nrrd"))


def test_every_study_becomes_one_ct_and_a_line_of_the_list(disc, tmp_path):
    lines = by_series(import_studies([disc], tmp_path / "studies"))
    assert {uid: line.status for uid, line in lines.items()} == {
        "1.3.1": "imported",
        "1.3.2": "left out",
        "1.3.3": "left out",
        "1.3.4": "imported",
    }
    assert lines["1.3.3"].codes == "derived"
    assert all(line.reason for line in lines.values())
    listed = {study.patient: study for study in read_studies(tmp_path / "studies" / "studies.csv")}
    assert set(listed) == {"A1", "B2"}
    volume = read_volume(listed["A1"].path)
    np.testing.assert_array_equal(volume.voxels, stored_pixels(1).astype(np.int16) - 1024)
    assert len(cts(tmp_path / "studies")) == 2


def test_a_ct_keeps_the_way_back_to_its_instances(disc, tmp_path):
    import_studies([disc], tmp_path / "studies")
    study = next(one for one in read_studies(tmp_path / "studies" / "studies.csv") if one.patient == "A1")
    source = read_volume(study.path).source
    assert (source.patient_id, source.study_uid, source.series_uid) == ("A1", "1.2.1", "1.3.1")
    for instance in source.instances:
        original = pydicom.dcmread(Path(source.root) / instance.file)
        assert original.SOPInstanceUID == instance.sop_instance_uid
        assert tuple(original.ImagePositionPatient) == instance.position_mm
    heights = [instance.position_mm[2] for instance in source.instances]
    assert heights == pytest.approx(read_volume(study.path).slice_z_mm)
    assert str(source.datasets()[0].PatientName) == "Ann^Archer"


def test_a_record_of_other_voxels_is_not_believed(disc, tmp_path):
    import_studies([disc], tmp_path / "studies")
    first, second = cts(tmp_path / "studies")
    shutil.copyfile(first, second)
    assert read_volume(first).source is not None
    assert read_volume(second).source is None


def test_the_quality_of_every_study_is_told(disc, tmp_path):
    lines = by_series(import_studies([disc], tmp_path / "studies"))
    assert lines["1.3.1"].quality == "refused"
    assert "too_few_slices" in lines["1.3.1"].codes
    with (tmp_path / "studies" / "import.csv").open() as file:
        written = {row["series"]: row for row in csv.DictReader(file)}
    assert written["1.3.1"]["codes"] == lines["1.3.1"].codes
    assert written["1.3.3"]["status"] == "left out"


def test_importing_again_imports_nothing_twice_and_says_so(disc, tmp_path, write_series):
    import_studies([disc / "a"], tmp_path / "studies")
    (before,) = cts(tmp_path / "studies")
    stamp = before.stat().st_mtime_ns
    lines = by_series(import_studies([disc], tmp_path / "studies"))
    assert lines["1.3.1"].status == "known"
    assert lines["1.3.4"].status == "imported"
    assert before.stat().st_mtime_ns == stamp
    assert len(read_studies(tmp_path / "studies" / "studies.csv")) == 2


def test_a_ct_whose_record_is_damaged_is_not_overwritten_and_stops_no_other(disc, tmp_path):
    studies = tmp_path / "studies"
    import_studies([disc / "b"], studies)
    (path,) = cts(studies)
    source_path(path).write_text("{")
    lines = by_series(import_studies([disc], studies))
    assert lines["1.3.4"].status == "failed"
    assert path.name in lines["1.3.4"].reason
    assert lines["1.3.1"].status == "imported"


def test_lines_of_a_list_that_is_there_stay(disc, tmp_path):
    studies = tmp_path / "studies"
    import_studies([disc / "a"], studies)
    text = (studies / "studies.csv").read_text()
    (studies / "studies.csv").write_text(text.replace(",A1,,,", ",A1,positive,,train"))
    import_studies([disc], studies)
    labels = {study.patient: (study.label, study.split) for study in read_studies(studies / "studies.csv")}
    assert labels == {"A1": ("positive", "train"), "B2": ("", "")}


def test_an_interrupted_import_leaves_whole_studies_and_goes_on(disc, tmp_path):
    studies = tmp_path / "studies"

    def stop(progress: Progress) -> None:
        if progress.task == "convert" and progress.done == 1:
            raise Cancelled

    (studies / ".pe" / "import-killed").mkdir(parents=True)  # left by one that was killed while it unpacked
    with pytest.raises(Cancelled):
        import_studies([disc], studies, progress=stop)
    assert len(cts(studies)) == len(read_studies(studies / "studies.csv")) == 1
    lines = import_studies([disc], studies)
    assert sorted(line.status for line in lines) == ["imported", "known", "left out", "left out"]
    assert all(read_volume(path).shape == SHAPE for path in cts(studies))
    assert not list((studies / ".pe").glob("import-*"))


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in sorted(folder.rglob("*")):
            packed.write(file, file.relative_to(folder))
    return path


def tarred(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w:gz") as packed:
        packed.add(folder, "export")
    return path


@pytest.mark.parametrize(("pack", "name"), [(zipped, "export.zip"), (tarred, "export.tar.gz")])
def test_archives_give_what_their_folder_gives(disc, tmp_path, pack: Callable[[Path, Path], Path], name):
    archive = pack(disc, tmp_path / name)
    import_studies([disc], tmp_path / "plain")
    import_studies([archive], tmp_path / "packed")
    assert [path.name for path in cts(tmp_path / "packed")] == [path.name for path in cts(tmp_path / "plain")]
    for one, other in zip(cts(tmp_path / "packed"), cts(tmp_path / "plain"), strict=True):
        assert one.read_bytes() == other.read_bytes()
        source = read_source(source_path(one))
        assert source.root == str(archive)
        assert Path(source.instances[0].file).name in {path.name for path in disc.rglob("*")}


def test_an_archive_within_a_folder_and_several_sources_are_taken_together(disc, tmp_path):
    (tmp_path / "inbox").mkdir()
    zipped(disc / "a", tmp_path / "inbox" / "a.zip")
    lines = import_studies([tmp_path / "inbox", disc / "b"], tmp_path / "studies")
    assert sorted(line.patient for line in lines if line.status == "imported") == ["A1", "B2"]


def test_no_member_of_an_archive_gets_out_of_it(disc, tmp_path):
    dicom = next(iter((disc / "b").iterdir())).read_bytes()
    archive = tmp_path / "evil.tar"
    with tarfile.open(archive, "w") as packed:
        for name in ("../../escaped.dcm", "/tmp/escaped.dcm", "a/../../../escaped.dcm"):
            member = tarfile.TarInfo(name)
            member.size = len(dicom)
            packed.addfile(member, io.BytesIO(dicom))
        link = tarfile.TarInfo("link.dcm")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        packed.addfile(link)
    before = {path for path in tmp_path.rglob("*") if "unpacked" not in path.parts}
    found = unpack(archive, tmp_path / "deep" / "unpacked")
    assert len(found) == 3
    assert all(file.path.parent == tmp_path / "deep" / "unpacked" for file in found)
    assert {path for path in tmp_path.rglob("*") if "unpacked" not in path.parts} - before == {tmp_path / "deep"}
    assert not Path("/tmp/escaped.dcm").exists()


def test_a_bomb_is_told_before_it_fills_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("pe_app.pacs.importing.unpacking.FREE_BYTES", 1 << 16)
    head = bytes(128) + b"DICM"
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.dcm", head + bytes(30_000_000))
    with tarfile.open(tmp_path / "bomb.tar.gz", "w:gz") as packed_tar:
        member = tarfile.TarInfo("zeros")
        member.size = 30_000_000
        packed_tar.addfile(member, io.BytesIO(bytes(30_000_000)))
    for name in ("bomb.zip", "bomb.tar.gz"):
        with pytest.raises(InputError, match="grows far beyond its size"):
            unpack(tmp_path / name, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_an_archive_that_is_cut_off_is_told_and_nothing_of_it_is_imported(disc, tmp_path):
    for name in ("cut.zip", "cut.tar.gz"):
        whole = (zipped if name.endswith("zip") else tarred)(disc, tmp_path / name)
        whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        (line,) = import_studies([whole], tmp_path / f"studies {name}")
        assert (line.status, line.series) == ("failed", "")
        assert name in line.reason
        assert cts(tmp_path / f"studies {name}") == []


def make_dicomdir(disc: Path, out: Path) -> Path:
    """A disc as pydicom writes it: its own folders, names in capitals, a DICOMDIR."""
    files = FileSet()
    for path in sorted(disc.rglob("1_3*")):
        dataset = pydicom.dcmread(path)
        for keyword in ("PatientName", "StudyDate", "StudyTime", "StudyID", "AccessionNumber"):
            setattr(dataset, keyword, dataset.get(keyword) or "")
        dataset.StudyDate, dataset.StudyTime, dataset.StudyID = "20250304", "120000", "1"
        files.add(dataset)
    files.write(out)
    return out / "DICOMDIR"


def test_a_dicomdir_is_taken_for_its_disc_and_what_the_disc_lacks_is_noticed(disc, tmp_path):
    directory = make_dicomdir(disc, tmp_path / "cd")
    lines = by_series(import_studies([directory], tmp_path / "whole"))
    assert lines["1.3.4"].status == lines["1.3.1"].status == "imported"
    last = max(
        (path for path in (tmp_path / "cd").rglob("*") if path.is_file() and path.name != "DICOMDIR"),
        key=lambda path: (
            pydicom.dcmread(path).SeriesInstanceUID == "1.3.4",
            pydicom.dcmread(path).ImagePositionPatient[2],
        ),
    )
    last.unlink()  # the uppermost slice: no gap tells of it
    lines = by_series(import_studies([tmp_path / "cd"], tmp_path / "lacking"))
    assert (lines["1.3.4"].status, lines["1.3.4"].codes) == ("left out", "uneven_spacing")
    assert "lists 1 of its images that are not there" in lines["1.3.4"].reason
    assert lines["1.3.1"].status == "imported"


def test_a_damaged_slice_keeps_its_own_series_out_and_no_other_patients(disc, tmp_path):
    path = sorted((disc / "b").iterdir())[2]
    path.write_bytes(path.read_bytes()[:300])
    lines = import_studies([disc], tmp_path / "studies")
    series = by_series(lines)
    assert series["1.3.4"].status == "left out"
    assert "damaged file in its folder" in series["1.3.4"].reason
    assert series["1.3.1"].status == "imported"
    assert any(line.status == "failed" and path.name in line.reason for line in lines)


def test_a_series_with_a_gap_gives_way_to_a_whole_one_of_the_study(write_series, tmp_path):
    same = {"PatientID": "A1", "StudyInstanceUID": "1.2.1", "folder": tmp_path / "disc"}
    gap = np.array([[0.0, 0, 2.5 * k + 9 * (k > 4)] for k in range(8)])
    write_series(stored_pixels(shape=(8, 6, 7)), gap, SeriesInstanceUID="1.3.1", **same)
    write_series(stored_pixels(), SeriesInstanceUID="1.3.2", **same)
    lines = by_series(import_studies([tmp_path / "disc"], tmp_path / "studies"))
    assert (lines["1.3.1"].status, lines["1.3.1"].codes) == ("left out", "uneven_spacing")
    assert lines["1.3.2"].status == "imported"


def test_the_enhanced_series_is_taken_before_a_longer_native_one(write_series, tmp_path, monkeypatch):
    """The gate is made to judge by the first voxel: what it measures is tested elsewhere."""
    from pe_app.ct.quality import Reason

    def by_first_voxel(volume, limits):
        return () if volume.voxels[0, 0, 0] > 0 else (Reason("no_contrast", "dark", True),)

    monkeypatch.setattr("pe_app.pacs.importing.conversion.check_study", by_first_voxel)
    same = {"PatientID": "A1", "StudyInstanceUID": "1.2.1", "folder": tmp_path / "disc"}
    native, enhanced = np.zeros((9, 6, 7), np.uint16), np.zeros((8, 6, 7), np.uint16)
    enhanced[0, 0, 0] = 1500
    write_series(native, SeriesInstanceUID="1.3.1", **same)
    write_series(enhanced, SeriesInstanceUID="1.3.2", **same)
    lines = by_series(import_studies([tmp_path / "disc"], tmp_path / "studies"))
    assert (lines["1.3.1"].status, lines["1.3.1"].codes) == ("left out", "no_contrast")
    assert (lines["1.3.2"].status, lines["1.3.2"].quality) == ("imported", "fit")


def test_a_folder_without_dicom_is_told(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("no")
    with pytest.raises(InputError, match="none of the 1 files there is a DICOM image"):
        import_studies([tmp_path / "notes"], tmp_path / "studies")
    with pytest.raises(InputError, match="there is no such file or folder"):
        import_studies([tmp_path / "gone"], tmp_path / "studies")


def test_where_the_server_serves_a_volumes_folder_studies_go_there(disc, tmp_path):
    studies = tmp_path / "studies"
    (studies / "volumes").mkdir(parents=True)
    (studies / "studies.csv").write_text("study,path\nold,volumes/old.nrrd\n")
    import_studies([disc / "b"], studies)
    (path,) = (studies / "volumes").glob("*.nrrd")
    assert read_volume(path).source.patient_id == "B2"
    assert [study.study for study in read_studies(studies / "studies.csv")] == ["old", path.stem]


# De-identification


@pytest.fixture
def pseudonymous(disc, tmp_path) -> tuple[Path, ImportSettings]:
    key = tmp_path / "vault" / "key"
    key.parent.mkdir()
    studies = tmp_path / "shared"
    settings = ImportSettings(key_file=key, pseudonyms=Pseudonyms(read_key(key, studies)))
    import_studies([zipped(disc, tmp_path / "Archer Ann.zip"), disc / "b"], studies, settings)
    return studies, settings


def test_nothing_in_the_studies_tells_who_it_is(pseudonymous, disc):
    studies, _ = pseudonymous
    secrets_ = [b"Ann", b"Archer", b"Bob", b"Baker", b"A1", b"B2", b"1.2.1", b"1.2.2", b"1.3.1", b"20250304", b"disc"]
    for path in studies.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        if path.suffix == ".nrrd":
            header, _, packed = content.partition(b"\n\n")
            content = header + gzip.decompress(packed)[:0]
        for secret in secrets_:
            assert secret not in content, (path, secret)
            assert secret.decode() not in path.name


def test_pseudonyms_are_the_hmac_of_the_key_and_the_same_again(pseudonymous, disc, tmp_path):
    import hashlib
    import hmac

    studies, settings = pseudonymous
    key = settings.key_file.read_bytes()
    expected = {hmac.new(key, f"patient\0{one}".encode(), hashlib.sha256).hexdigest()[:20] for one in ("A1", "B2")}
    assert {study.patient for study in read_studies(studies / "studies.csv")} == expected
    lines = import_studies([disc], studies, settings)
    assert sorted(line.status for line in lines) == ["known", "known", "left out", "left out"]
    other = ImportSettings(key_file=tmp_path / "other", pseudonyms=Pseudonyms(b"another key, long enough"))
    import_studies([disc], tmp_path / "others", other)
    assert not {path.name for path in cts(tmp_path / "others")} & {path.name for path in cts(studies)}


def test_the_owner_of_the_key_finds_the_way_back(pseudonymous):
    studies, settings = pseudonymous
    folder = identities_folder(settings.key_file)
    for path in cts(studies):
        public, identity = read_source(source_path(path)), read_source(folder / f"{path.stem}.json")
        assert public.pseudonyms
        with pytest.raises(InputError, match="key of the de-identification"):
            public.datasets()
        assert identity.patient_id in ("A1", "B2")
        assert len(identity.datasets()) == 5
        assert identity.image_sha256 == public.image_sha256 == read_volume(path).sha256
    for path in (settings.key_file, *folder.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_key_among_the_studies_or_too_short_is_refused(tmp_path):
    with pytest.raises(InputError, match="must not lie in"):
        read_key(tmp_path / "studies" / "key", tmp_path / "studies")
    (tmp_path / "key").write_text("short")
    with pytest.raises(InputError, match="at least 16 bytes"):
        read_key(tmp_path / "key", tmp_path / "studies")


def test_the_gate_still_knows_a_projection_without_its_description():
    from pe_app.ct.source_series import SeriesFacts, SourceSeries, unlike_ct

    for text in ("Thorax MIP 8/3", "Iodine map of Mr Baker"):
        source = SourceSeries("p", "1", "2", "3", "4", (1, 0, 0, 0, 1, 0), (1, 1), (2, 2), facts=SeriesFacts((), text))
        kept = Pseudonyms(b"k" * 16).source(source).facts.description
        assert unlike_ct("", kept) == unlike_ct("", text) != ""
        assert "Baker" not in kept


# Processes and the command line


def ends_its_process(job: int) -> int:
    if job == 3:
        os._exit(1)
    if job == 4:
        raise ValueError("four")
    return job * job


def test_a_job_that_ends_its_process_takes_no_other_with_it():
    with Processes(2) as processes:
        outcomes = dict(processes.run(ends_its_process, list(range(7))))
    assert {job: made for job, made in outcomes.items() if isinstance(made, int)} == {0: 0, 1: 1, 2: 4, 5: 25, 6: 36}
    assert "process ended" in str(outcomes[3])
    assert str(outcomes[4]) == "four"


KILLED_PARENT = """
import time
from test_importing import Processes, tell_and_wait

with Processes(2) as processes:
    for _ in processes.run(tell_and_wait, [0, 1]):
        pass
"""


def tell_and_wait(job: int) -> None:
    print("working", flush=True)
    time.sleep(600)


def test_processes_end_with_the_one_that_started_them():
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (here.parents[1], here.parent, here)))}
    command = [sys.executable, "-c", KILLED_PARENT]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as run:
        assert [run.stdout.readline() for _ in range(2)] == ["working\n"] * 2
        run.kill()
        assert run.stdout.read() == ""  # comes to an end when the last process that could write to it has ended


def test_the_words_a_person_types(disc, tmp_path):
    studies = tmp_path / "studies"
    result = CliRunner().invoke(app, ["import", str(disc), "--studies", str(studies), "--workers", "2"])
    assert result.exit_code == 0, result.output
    assert "2 studies imported (2 of them unfit for detection), 0 unchanged, skipped" in result.output
    assert "Scout" in result.output
    assert json.loads((studies / ".pe" / "sources" / f"{cts(studies)[0].stem}.json").read_text())["schema"]


def test_deidentification_needs_its_key_and_is_never_on_by_itself(disc, tmp_path):
    for options in (["--deidentify"], ["--key", str(tmp_path / "key")]):
        result = CliRunner().invoke(app, ["import", str(disc), "--studies", str(tmp_path / "s"), *options])
        assert isinstance(result.exception, InputError)
        assert "belong together" in str(result.exception)
    assert not (tmp_path / "s").exists()


def test_a_real_chest_is_imported_as_it_is_read(real_data, tmp_path):
    folder = real_data / "slab_lidc0002"
    (line,) = import_studies([folder], tmp_path)
    assert (line.status, line.quality, line.slices) == ("imported", "refused", 12)
    imported, read = read_volume(cts(tmp_path)[0]), read_volume(folder)
    np.testing.assert_array_equal(imported.voxels, read.voxels)
    assert imported.same_grid(read, 1e-3)
    assert imported.source.instances == read.source.instances


# the way from reports to studies


def test_the_list_keeps_what_reports_are_known_by_and_the_gates_reasons(write_series, tmp_path):
    write_series(stored_pixels(), folder=tmp_path / "x", PatientID="P", StudyInstanceUID="1.2.9", StudyDate="20250304",
                 AccessionNumber="A7")  # fmt: skip
    first = import_studies([tmp_path / "x"], tmp_path / "studies")
    (study,) = read_studies(tmp_path / "studies" / "studies.csv")
    assert (study.accession, study.study_uid, study.date, study.patient) == ("A7", "1.2.9", "2025-03-04", "P")
    assert (study.fitness, study.reasons.split()) == ("refused", first[0].codes.split())
    (again,) = import_studies([tmp_path / "x"], tmp_path / "studies")
    assert (again.status, again.quality, again.codes) == ("known", "refused", first[0].codes)


def test_a_list_of_an_earlier_version_gets_the_identifiers_of_its_studies(disc, tmp_path):
    import_studies([disc], tmp_path / "studies")
    path = tmp_path / "studies" / "studies.csv"
    rows = list(csv.DictReader(path.open()))
    with path.open("w") as file:
        writer = csv.DictWriter(file, ["study", "path", "label"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, "label": "positive"} for row in rows)
    import_studies([disc], tmp_path / "studies")
    assert {(study.study_uid, study.label) for study in read_studies(path)} == {
        ("1.2.1", "positive"),
        ("1.2.2", "positive"),
    }


def test_studies_are_called_after_their_accession_number_or_patient_and_nobody_elses(write_series, tmp_path):
    for number, (patient, accession) in enumerate((("P/1", "A 7"), ("P/1", "A 7"), ("P2", ""))):
        names = {"PatientID": patient, "AccessionNumber": accession, "StudyInstanceUID": f"1.2.{number}"}
        folder = tmp_path / "x" / str(number)
        write_series(
            stored_pixels(number), folder=folder, SeriesInstanceUID=f"1.3.{number}", StudyDate="20250304", **names
        )
    by_patient = ["P2_2025-03-04", "P_1_2025-03-04", "P_1_2025-03-04-"]
    for kind, wanted in (("accession", ["A_7", "A_7-", "ct-"]), ("patient", by_patient)):
        out = tmp_path / kind
        import_studies([tmp_path / "x"], out, ImportSettings(names=kind))
        found = sorted(study.study for study in read_studies(out / "studies.csv"))
        assert len(found) == 3
        assert all(name.startswith(start) for name, start in zip(found, wanted, strict=True)), found
        again = import_studies([tmp_path / "x"], out, ImportSettings(names="hash"))
        assert {line.status for line in again} == {"known"}, "a study keeps the name that it has"
        assert sorted(line.study for line in again) == found


def test_reports_find_the_studies_of_a_deidentified_import_with_its_key(disc, tmp_path):
    for path in (disc / "a").iterdir():
        dataset = pydicom.dcmread(path)
        dataset.AccessionNumber = "ACC1"
        dataset.save_as(path)
    key = tmp_path / "key"
    settings = ImportSettings(key_file=key, pseudonyms=Pseudonyms(read_key(key, tmp_path / "studies")))
    import_studies([disc], tmp_path / "studies", settings)
    assert "ACC1" not in (tmp_path / "studies" / "studies.csv").read_text()
    (tmp_path / "reports.csv").write_text("accession,report\nACC1,Acute PE.\nACC2,No PE.\n")
    words = ["label-reports", tmp_path / "reports.csv", "--out", tmp_path / "labels.csv", "--studies",
             tmp_path / "studies" / "studies.csv"]  # fmt: skip
    assert CliRunner().invoke(app, list(map(str, words))).exit_code != 0
    done = CliRunner().invoke(app, list(map(str, [*words, "--key", key])))
    assert done.exit_code == 0, done.output
    assert "1 of 2 reports belong to a study" in done.output
    assert "ACC2" in done.output
    assert sorted(study.label for study in read_studies(tmp_path / "studies" / "studies.csv")) == ["", "positive"]


@pytest.mark.parametrize("content", [b"", b"not DICOM at all"])
def test_a_damaged_dicomdir_is_left_out_and_its_disc_is_imported(disc, tmp_path, content):
    (disc / "DICOMDIR").write_bytes(content)
    lines = import_studies([disc], tmp_path / "studies")
    assert len(cts(tmp_path / "studies")) == 2
    assert any(line.status == "left out" and "the DICOMDIR is damaged" in line.reason for line in lines)


def test_a_slice_that_is_a_link_to_nowhere_keeps_its_series_out_by_name(disc, tmp_path):
    last = max((disc / "b").iterdir())
    last.unlink()
    last.symlink_to("/nowhere/object")
    lines = import_studies([disc], tmp_path / "studies")
    assert len(cts(tmp_path / "studies")) == 1
    assert any(line.status == "failed" and last.name in line.reason for line in lines)
    done = CliRunner().invoke(app, ["import", str(disc), "--studies", str(tmp_path / "studies")])
    assert done.exit_code == 4, "a study failed"


def test_an_empty_slice_within_an_archive_keeps_its_series_out(disc, tmp_path):
    max((disc / "b").iterdir()).write_bytes(b"")
    import_studies([zipped(disc, tmp_path / "export.zip")], tmp_path / "studies")
    assert len(cts(tmp_path / "studies")) == 1
