"""What was acknowledged survives upgrades, restored backups, files laid by hand, replaced CTs and clocks set back."""

import json
import os
import shutil

import pytest
from small_studies import small_chest
from typer.testing import CliRunner

import pe_monailabel.store.labels
from pe_app.annotation.sparse import SparseAnnotation
from pe_app.cli import app as command_line
from pe_app.common.errors import InputError
from pe_app.ct.volume_io import read_volume, write_volume
from pe_monailabel import compat  # noqa: F401 - before monailabel
from pe_monailabel.store.backup import restore
from pe_monailabel.store.studies import StudyStore

TIME = "2026-11-02T08:00:00Z"


@pytest.fixture(scope="module")
def chest():
    return small_chest(1, emboli=2)


@pytest.fixture
def studies(tmp_path, chest):
    folder = tmp_path / "studies"
    write_volume(chest[0], folder / "one.nrrd")
    return folder


@pytest.fixture
def save(studies, chest, tmp_path):
    """``save(store, count)`` saves a review of the first slices of the schedule."""

    def save(store, count=99, **more):
        volume = read_volume(studies / "one.nrrd")
        annotation = SparseAnnotation.from_mask(volume, chest[1], store.facts("one").schedule[:count], "ann", TIME)
        annotation.write(tmp_path / "sent.json", volume)
        said = {"annotation": annotation.to_json(), "reader": "ann", **more}
        return store.save("one", tmp_path / "sent.seg.nrrd", "draft", said)["revision"]

    return save


def line(studies):
    return studies / ".pe" / "history" / "one" / "annotation"


def slices(store):
    return len(store.labels.annotation_json("one")["slices"])


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- links in the private folder


@pytest.mark.parametrize("name", ["tmp", "models", "runs", "detections", "leases.json", "audit.jsonl", "features"])
def test_a_link_in_the_private_folder_is_refused_by_name_and_what_it_leads_to_stays(studies, tmp_path, name):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "1234").mkdir()
    (studies / ".pe").mkdir()
    (studies / ".pe" / name).symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match=f"{name}: is a link"):
        StudyStore(studies)
    assert (tmp_path / "precious" / "1234").is_dir()


# --- records of other programs


def test_a_field_that_a_newer_program_wrote_is_ignored_and_kept(studies, save):
    revision = save(StudyStore(studies))
    for name in ("current.json", f"{revision}.version"):
        edit(line(studies) / name, confidence="high", schema="pe-version/1.3")
    store = StudyStore(studies)
    assert store.review_state("one").state == "complete"
    assert [entry["revision"] for entry in store.versions("one")] == [revision]
    assert (studies / "labels" / "final" / "one.seg.nrrd").is_file()
    assert json.loads((line(studies) / f"{revision}.version").read_text())["confidence"] == "high"
    assert save(store, count=3).startswith("000002-")


def test_a_record_of_another_major_version_stops_the_start_with_its_name_and_removes_nothing(studies, save):
    revision = save(StudyStore(studies))
    before = (studies / "labels" / "final" / "one.seg.nrrd").read_bytes()
    edit(line(studies) / "current.json", schema="pe-version/2")
    edit(line(studies) / f"{revision}.version", schema="pe-version/2")
    with pytest.raises(InputError, match=r"current\.json: is of schema 'pe-version/2'.*install that one again"):
        StudyStore(studies)
    assert (studies / "labels" / "final" / "one.seg.nrrd").read_bytes() == before


def test_records_of_which_none_can_be_read_stop_the_start_with_their_folder(studies, save):
    save(StudyStore(studies))
    for record in [*line(studies).glob("*.version"), line(studies) / "current.json"]:
        record.write_text("[]")
    with pytest.raises(InputError, match=r"one/annotation: none of its records of versions can be read"):
        StudyStore(studies)
    assert (studies / "labels" / "final" / "one.seg.nrrd").is_file()


def test_a_version_that_cannot_be_read_gives_its_number_to_no_other(studies, save):
    store = StudyStore(studies)
    save(store, count=2)
    second = save(store, count=3)
    (line(studies) / "current.json").write_text("{")
    (line(studies) / f"{second}.version").write_text("{")
    again = StudyStore(studies)
    assert slices(again) == 3  # it lay in labels/, too, and was taken over from there
    assert [entry["revision"][:6] for entry in again.versions("one")] == ["000003", "000001"]


# --- backups that were laid back


def test_labels_newer_than_a_history_that_was_restored_become_a_version_that_counts(studies, save, tmp_path):
    store = StudyStore(studies)
    save(store, count=2)
    shutil.copytree(studies / ".pe" / "history", tmp_path / "backup")
    save(store)
    newer = store.labels.annotation_json("one")
    shutil.rmtree(studies / ".pe" / "history")
    shutil.copytree(tmp_path / "backup", studies / ".pe" / "history")
    again = StudyStore(studies)
    assert again.labels.annotation_json("one") == newer
    assert [entry["slices"] for entry in again.versions("one")].count(None) == 0
    assert len(again.versions("one")) == 2
    assert again.review_state("one").state == "complete"


def test_a_label_laid_over_another_by_hand_becomes_a_version_and_garbage_is_set_aside(studies, chest, tmp_path):
    store = StudyStore(studies)
    write_volume(chest[1], tmp_path / "first.nrrd")
    store.save("one", tmp_path / "first.nrrd", "original", {})
    shown = studies / "labels" / "original" / "one.nrrd"
    write_volume(chest[1].with_voxels(chest[1].voxels * 2), tmp_path / "second.nrrd")
    by_hand = (tmp_path / "second.nrrd").read_bytes()
    shown.write_bytes(by_hand)
    again = StudyStore(studies)
    assert shown.read_bytes() == by_hand
    assert len(again.versions("one")) == 2
    shown.write_bytes(b"nothing that is a label")
    again = StudyStore(studies)
    assert shown.read_bytes() == by_hand
    assert [path.read_bytes() for path in shown.parent.glob("one.nrrd.damaged-*")] == [b"nothing that is a label"]


def test_a_label_laid_by_hand_while_the_server_runs_is_set_aside_before_a_save_takes_its_place(
    studies, save, chest, monkeypatch
):
    store = StudyStore(studies)
    save(store, count=2)
    monkeypatch.setattr(store.labels, "adopt", lambda *_: None)  # it came after the look at the folder
    shown = studies / "labels" / "draft" / "one.seg.nrrd"
    shown.write_bytes(b"by hand")
    save(store, count=3)
    assert [path.read_bytes() for path in shown.parent.glob("one.seg.nrrd.set-aside-*")] == [b"by hand"]
    assert slices(store) == 3


def test_a_history_without_its_pointer_shows_all_its_versions(studies, save):
    store = StudyStore(studies)
    revisions = [save(store, count=count) for count in (1, 2)]
    (line(studies) / "current.json").unlink()
    again = StudyStore(studies)
    assert [entry["revision"] for entry in again.versions("one")] == revisions[::-1]
    assert slices(again) == 2


def test_a_version_without_its_file_is_named_with_the_way_out(studies, save):
    store = StudyStore(studies)
    first = save(store, count=1)
    save(store, count=2)
    (line(studies) / f"{first}.seg.nrrd").unlink()
    with pytest.raises(InputError, match=rf"{first}\.seg\.nrrd .*is missing from the history: restore"):
        store.version("one", first)


# --- CTs that were replaced


def test_a_ct_that_was_replaced_under_its_annotation_is_to_be_reviewed_again(studies, save, chest):
    store = StudyStore(studies)
    revision = save(store)
    former = (studies / "one.nrrd").read_bytes()
    write_volume(chest[0].with_voxels(chest[0].voxels[::-1].copy()), studies / "one.nrrd")
    facts = store.facts("one")
    state = store.review_state("one").on(facts)
    assert (state.state, state.reviewed, state.revision) == ("not_started", 0, revision)
    assert list(store.left_out()) == ["one"]
    assert "put the former CT back" in store.left_out()["one"] or facts.reason in store.left_out()["one"]
    (studies / "one.nrrd").write_bytes(former)
    assert store.review_state("one").on(store.facts("one")).state == "complete"


def test_a_ct_of_the_same_size_and_time_is_noticed_as_another(studies, chest):
    plain = studies / "plain.nii"
    write_volume(chest[0], plain)
    store = StudyStore(studies)
    before, status = store.facts("plain"), plain.stat()
    write_volume(chest[0].with_voxels(chest[0].voxels[::-1].copy()), plain)
    os.utime(plain, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (plain.stat().st_size, plain.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert store.facts("plain").sha256 != before.sha256
    assert store.volume("plain").sha256 != before.sha256


# --- what clients say later


def test_a_remark_changes_no_version_and_cannot_say_who_made_it(studies, save):
    store = StudyStore(studies)
    revision = save(store, client="Slicer", model_seen={"name": "a"})
    record = (line(studies) / f"{revision}.version").read_bytes()
    forged = {"client": "x", "model_seen": None, "restored_from": "x", "slices": {}, "reviewed": 0, "client_id": "x"}
    store.update_label_info("one", "final", {**forged, "reader": "bob", "segmentationMeta": {"status": "approved"}})
    store.update_label_info("one", "final", {"reader": "eve", "segmentationMeta": {"status": "flagged"}})
    assert (line(studies) / f"{revision}.version").read_bytes() == record
    info = StudyStore(studies).get_label_info("one", "final")
    assert (info["reader"], info["client"], info["model_seen"]) == ("ann", "Slicer", {"name": "a"})
    assert info["reviewed"] == len(store.facts("one").schedule)
    assert info["segmentationMeta"] == {"status": "flagged"}
    [entry] = store.versions("one")
    assert [note["reader"] for note in entry["notes"]] == ["bob", "eve"]
    assert all(note["time"] for note in entry["notes"])


def test_what_clients_say_of_a_study_has_a_place_of_its_own(studies):
    store = StudyStore(studies)
    store.update_image_info("one", {"id": "another", "path": "/etc/passwd", "pe_label": "negative", "name": "x"})
    info = StudyStore(studies).get_image_info("one")
    assert info["path"] == str(studies / "one.nrrd")
    assert info["name"] == "one.nrrd"
    assert info["client_info"] == {"id": "another", "path": "/etc/passwd", "name": "x"}
    assert "id" not in info


# --- clocks


def test_the_history_is_in_the_order_of_the_saves_also_when_the_clock_goes_back(studies, save, monkeypatch):
    store = StudyStore(studies)
    times = iter(["2026-11-28T10:00:00+00:00", "2026-05-01T10:00:00+00:00", "2026-05-01T10:00:01+00:00"])
    monkeypatch.setattr(pe_monailabel.store.labels, "_now", lambda: next(times))
    first = save(store, count=1)
    second = save(store, count=2)
    store.update_image_info("one", {"pe_label": "positive"})
    shown = store.versions("one")
    assert [entry["kind"] for entry in shown] == ["study_label", "annotation", "annotation"]
    assert [entry["revision"] for entry in shown[1:]] == [second, first]


# --- backup, restore, check


def pe_app(*arguments):
    return CliRunner().invoke(command_line, list(map(str, arguments)))


def test_a_backup_brings_back_what_is_lost_and_replaces_nothing_newer(studies, save, tmp_path):
    store = StudyStore(studies)
    first, second = save(store, count=1), save(store, count=2)
    assert pe_app("backup", studies, "--out", tmp_path / "backup.tar").exit_code == 0
    third = save(store, count=3)
    (line(studies) / f"{first}.seg.nrrd").unlink()
    (line(studies) / f"{second}.version").write_text("{")
    restored = pe_app("restore", studies, tmp_path / "backup.tar")
    assert restored.exit_code == 0, restored.output
    assert f"{third} counts, {second} in the backup" in restored.output
    again = StudyStore(studies)
    assert [entry["revision"] for entry in again.versions("one")] == [third, second, first]
    assert again.version("one", first)[1].is_file()
    shutil.rmtree(studies / ".pe")
    shutil.rmtree(studies / "labels")
    assert pe_app("restore", studies, tmp_path / "backup.tar").exit_code == 0
    assert StudyStore(studies).review_state("one").revision == second


def test_a_damaged_backup_changes_nothing(studies, save, tmp_path):
    store = StudyStore(studies)
    save(store, count=1)
    assert pe_app("backup", studies, "--out", tmp_path / "backup.tar").exit_code == 0
    content = bytearray((tmp_path / "backup.tar").read_bytes())
    place = content.index(b"NRRD0004")
    content[place : place + 8] = b"garbage!"
    (tmp_path / "backup.tar").write_bytes(content)
    shutil.rmtree(studies / ".pe")
    with pytest.raises(InputError, match="is damaged: choose another backup"):
        restore(tmp_path / "backup.tar", studies)
    assert not (studies / ".pe").exists()


def test_check_lists_what_is_damaged_and_changes_nothing(studies, save):
    store = StudyStore(studies)
    first, second = save(store, count=1), save(store, count=2)
    sound = pe_app("check", studies)
    assert (sound.exit_code, sound.output) == (0, "Nothing is damaged.\n")
    (line(studies) / f"{first}.seg.nrrd").unlink()
    (line(studies) / f"{second}.version").write_text("{")
    (studies / "one.nrrd").rename(studies / "lost.nrrd")
    found = pe_app("check", studies)
    assert found.exit_code == 1
    lines = found.output.splitlines()
    assert any(first in one and "is missing" in one for one in lines)
    assert any(f"{second}.version: is damaged" in one for one in lines)
    assert any("study one: has labels, but its CT is not in" in one for one in lines)
    assert (line(studies) / f"{second}.version").read_text() == "{"
