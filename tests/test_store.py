"""The studies folder as a datastore: what was acknowledged stays, whatever happens."""

import json
import resource
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import nrrd
import numpy as np
import pytest
from app_server import APP
from small_studies import small_chest

from pe_app.annotation import SparseAnnotation
from pe_app.errors import InputError
from pe_app.volume_io import read_volume, write_volume

sys.path.insert(0, str(APP))
import lib.compat  # before monailabel
import lib.history
import lib.store
from lib.store import Conflict, StudyStore
from monailabel.interfaces.exception import ImageNotFoundException


@pytest.fixture(scope="module")
def chest():
    return small_chest(1, emboli=2)


@pytest.fixture
def studies(tmp_path, chest):
    folder = tmp_path / "studies"
    for name in ("one", "two"):
        write_volume(chest[0], folder / f"{name}.nrrd")
    return folder


@pytest.fixture
def save(studies, chest, tmp_path):
    """``save(store, study, count)`` saves a review of the first slices of the schedule."""

    def save(store, study="one", count=3, **more):
        volume = read_volume(studies / f"{study}.nrrd")
        slices = store.facts(study).schedule[:count]
        annotation = SparseAnnotation.from_mask(volume, chest[1], slices, "ann", "2026-11-02T08:00:00Z")
        annotation.write(tmp_path / "sent.json", volume)
        store.save_label(
            study,
            str(tmp_path / "sent.seg.nrrd"),
            "draft",
            {"annotation": annotation.to_json(), "reader": "ann", **more},
        )
        return store.review_state(study).revision

    return save


def reviewed(store, study="one"):
    annotation = store.annotation_json(study)
    return len(annotation["slices"]) if annotation else 0


def everything(folder):
    names = ("labels", "datastore_v2.json", ".pe/history")
    files = [file for name in names for file in sorted([folder / name, *(folder / name).rglob("*")]) if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@contextmanager
def full_disk(limit):
    """No file may grow beyond ``limit`` bytes: writes fail as they do on a full disk."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
        signal.signal(signal.SIGXFSZ, handler)


def test_label_files_are_where_people_and_stock_clients_look(studies, save, chest):
    store = StudyStore(studies)
    save(store, count=99)
    stored = studies / "labels" / "final" / "one.seg.nrrd"
    assert store.get_label_uri("one", "final") == str(stored)
    expected = np.zeros(chest[1].shape, bool)
    slices = list(store.facts("one").schedule)
    expected[slices] = chest[1].voxels[slices] > 0
    np.testing.assert_array_equal(nrrd.read(str(stored))[0].T > 0, expected)
    assert SparseAnnotation.read(studies / "labels" / "final" / "one.json").is_complete(slices)
    index = json.loads((studies / "datastore_v2.json").read_text())
    assert index["objects"]["one"]["labels"]["final"]["ext"] == ".seg.nrrd"


@pytest.mark.parametrize("damage", [b"", b'{"name": "new-dat', b"\xff\xfe", b"[]"])
def test_a_damaged_index_is_set_aside_and_rebuilt_from_what_lies_beside_the_labels(studies, save, damage):
    store = StudyStore(studies)
    save(store)
    store.update_image_info("two", {"pe_label": "negative"})
    before = {study: store.review_state(study) for study in store.list_images()}
    (studies / "datastore_v2.json").write_bytes(damage)
    again = StudyStore(studies)
    assert {study: again.review_state(study) for study in again.list_images()} == before
    assert again.label("two") == "negative"
    assert [path.read_bytes() for path in studies.glob("datastore_v2.json.damaged-*")] == [damage]


def test_a_lost_index_is_rebuilt(studies, save):
    store = StudyStore(studies)
    revision = save(store)
    (studies / "datastore_v2.json").unlink()
    assert StudyStore(studies).review_state("one").revision == revision


@pytest.mark.parametrize("dies_at", range(6))
def test_a_save_that_dies_anywhere_leaves_the_former_version_or_the_new_one_whole(studies, save, monkeypatch, dies_at):
    store = StudyStore(studies)
    save(store, count=1)
    writes = []

    def dying(original):
        def write(*arguments):
            writes.append(arguments[0])
            if len(writes) > dies_at:
                raise KeyboardInterrupt("killed")
            return original(*arguments)

        return write

    with monkeypatch.context() as patched:
        patched.setattr(lib.history, "write_durably", dying(lib.history.write_durably))
        patched.setattr(lib.store, "write_durably", dying(lib.store.write_durably))
        patched.setattr(lib.store, "show", dying(lib.store.show))
        try:
            save(store, count=4)
            acknowledged = True
        except KeyboardInterrupt:
            acknowledged = False
    again = StudyStore(studies)
    assert reviewed(again) in ((4,) if acknowledged else (1, 4))
    path = again.annotation_path("one")
    shown = studies / "labels" / "draft"
    assert (shown / "one.json").read_bytes() == path.read_bytes()
    assert (shown / "one.seg.nrrd").read_bytes() == path.with_name(path.name.replace(".json", ".seg.nrrd")).read_bytes()
    assert len(SparseAnnotation.read(shown / "one.json").slices) == reviewed(again)
    assert again.review_state("one").revision == path.name.removesuffix(".json")


@pytest.mark.parametrize("limit", [0, 100, 500, 1000])
def test_a_full_disk_refuses_the_save_and_changes_nothing_that_counts(studies, save, limit):
    store = StudyStore(studies)
    save(store, count=2)
    before = everything(studies)
    with full_disk(limit), pytest.raises((OSError, RuntimeError, InputError)):
        save(store, count=5)
    after = everything(studies)
    assert {name: content for name, content in after.items() if name in before} == before
    assert reviewed(StudyStore(studies)) == 2
    assert save(store, count=5)
    assert reviewed(store) == 5


def test_two_processes_do_not_revert_each_other(studies, save):
    first, second = StudyStore(studies), StudyStore(studies)
    save(first, "one")
    second.update_image_info("two", {"pe_label": "positive"})
    save(second, "two", count=2)
    first.update_image_info("one", {"note": "x"})
    for store in (first, second, StudyStore(studies)):
        assert (reviewed(store, "one"), reviewed(store, "two"), store.label("two")) == (3, 2, "positive")
        assert store.get_image_info("one")["note"] == "x"


def test_every_version_stays_readable(studies, save):
    store = StudyStore(studies)
    revisions = [save(store, count=count) for count in (1, 2, 99)]
    versions = list(store.history.versions("one", "annotation"))
    assert [version.revision for version in versions] == revisions[::-1]
    assert [version.tag for version in versions] == ["final", "draft", "draft"]
    assert all(version.info["reader"] == "ann" and version.info["time"] for version in versions)
    for version, count in zip(versions[1:], (2, 1), strict=True):
        path = store.history.path("one", "annotation", version.revision, ".json")
        assert len(SparseAnnotation.read(path).slices) == count
    assert not (studies / "labels" / "draft" / "one.seg.nrrd").exists()


def test_a_removed_label_is_gone_for_clients_but_not_from_the_history(studies, save):
    store = StudyStore(studies)
    revision = save(store)
    store.remove_label("one", "draft")
    assert store.review_state("one").state == "not_started"
    assert store.annotation_path("one") is None
    assert not (studies / "labels" / "draft" / "one.seg.nrrd").exists()
    assert store.history.path("one", "annotation", revision, ".seg.nrrd").is_file()
    assert save(store, based_on=None)


def test_a_label_laid_into_the_folder_by_hand_is_taken_over_and_kept(studies, chest, tmp_path):
    write_volume(chest[1], studies / "labels" / "original" / "two.nii.gz")
    by_hand = (studies / "labels" / "original" / "two.nii.gz").read_bytes()
    store = StudyStore(studies)
    assert store.get_labels_by_image_id("two") == {"original": "two"}
    write_volume(chest[1], tmp_path / "other.nrrd")
    store.save_label("two", str(tmp_path / "other.nrrd"), "original", {})
    assert sorted(path.name for path in (studies / "labels" / "original").iterdir()) == ["two.nrrd"]
    *_, first = store.history.versions("two", "tag-original")
    assert store.history.path("two", "tag-original", first.revision, first.ext).read_bytes() == by_hand


def test_only_ct_files_of_the_folder_itself_are_studies(studies, chest, tmp_path):
    write_volume(chest[0], tmp_path / "outside.nrrd")
    (studies / "link.nrrd").symlink_to(tmp_path / "outside.nrrd")
    shutil.copy(studies / "one.nrrd", studies / "one.seg.nrrd")
    shutil.copy(studies / "one.nrrd", studies / ".hidden.nrrd")
    write_volume(chest[0], studies / "one.nii.gz")
    shutil.copy(studies / "one.nrrd", studies / "x.nii.gz_copy.nrrd")
    (studies / "dicom").mkdir()
    store = StudyStore(studies)
    assert store.list_images() == ["one", "two", "x.nii.gz_copy"]
    assert Path(store.get_image_uri("x.nii.gz_copy")).is_file()
    with pytest.raises(ImageNotFoundException, match=r"'\.\./one'"):
        store.volume("../one")


def test_files_that_come_and_go_are_noticed(studies):
    store = StudyStore(studies)
    shutil.copy(studies / "one.nrrd", studies / "three.nrrd")
    assert store.list_images() == ["one", "three", "two"]
    (studies / "three.nrrd").unlink()
    assert store.list_images() == ["one", "two"]


def test_a_file_that_is_still_being_copied_is_unusable_until_it_is_whole(studies):
    whole = (studies / "one.nrrd").read_bytes()
    (studies / "three.nrrd").write_bytes(whole[:-500])
    store = StudyStore(studies)
    assert "three.nrrd" in store.facts("three").reason
    assert "three" not in [study.study for study in store.studies()]
    (studies / "three.nrrd").write_bytes(whole)
    assert store.known_facts("three") is None
    assert store.facts("three").sha256 == store.facts("one").sha256


@pytest.mark.parametrize("served", [".", "volumes"])
def test_a_study_list_beside_the_volumes_tells_labels_patients_and_splits(studies, tmp_path, served):
    folder = tmp_path / "list"
    folder.mkdir()
    studies.rename(folder / "volumes")
    (folder / "studies.csv").write_text(
        "study,path,patient,label,annotation,split\nfirst,volumes/one.nrrd,p1,positive,,train\n"
    )
    store = StudyStore(folder / served)
    assert store.list_images() == ["one", "two"]
    assert (store.label("one"), store.label("two")) == ("positive", "")
    store.update_image_info("one", {"pe_label": "uncertain"})
    assert store.label("one") == "uncertain"
    assert store._listed["one"].patient == "p1"


def test_an_annotation_of_other_voxels_is_refused(studies, save):
    other, _ = small_chest(2, emboli=0)
    store = StudyStore(studies)
    volume = read_volume(studies / "one.nrrd")
    annotation = SparseAnnotation.empty(other)
    annotation.write(studies.parent / "other.json", other)
    with pytest.raises(InputError, match="other voxels"):
        store.save_label("one", str(studies.parent / "other.seg.nrrd"), "draft", {"annotation": annotation.to_json()})
    assert volume.shape == other.shape
    assert reviewed(store) == 0


def test_a_conflict_shows_what_counts(studies, save):
    store = StudyStore(studies)
    save(store, based_on=None)
    current = save(store, count=4)
    with pytest.raises(Conflict) as conflict:
        save(store, count=5, based_on="000001-00000000")
    assert conflict.value.revision == current
    assert len(conflict.value.annotation["slices"]) == 4
