"""The studies folder as a datastore: what was acknowledged stays, whatever happens."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import nrrd
import numpy as np
import pytest
from monailabel.interfaces.exception import ImageNotFoundException
from small_studies import small_chest

import pe_monailabel.compat  # before monailabel
import pe_monailabel.store.history
import pe_monailabel.store.index
import pe_monailabel.store.labels
from pe_app.annotation.sparse import SparseAnnotation
from pe_app.common.errors import InputError
from pe_app.ct.volume_io import read_volume, write_volume
from pe_monailabel.store.checks import check_study_name, check_tag, finite_json
from pe_monailabel.store.labels import Conflict
from pe_monailabel.store.studies import StudyStore


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
    annotation = store.labels.annotation_json(study)
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
        patched.setattr(pe_monailabel.store.history, "write_durably", dying(pe_monailabel.store.history.write_durably))
        patched.setattr(pe_monailabel.store.index, "write_durably", dying(pe_monailabel.store.index.write_durably))
        patched.setattr(pe_monailabel.store.labels, "show", dying(pe_monailabel.store.labels.show))
        try:
            save(store, count=4)
            acknowledged = True
        except KeyboardInterrupt:
            acknowledged = False
    again = StudyStore(studies)
    assert reviewed(again) in ((4,) if acknowledged else (1, 4))
    path = again.labels.annotation_path("one")
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
        assert store.get_image_info("one")["client_info"]["note"] == "x"


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
    assert store.labels.annotation_path("one") is None
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


def test_a_ct_whose_ending_is_in_capitals_is_served(studies, chest):
    write_volume(chest[0], studies / "upper.nii.gz")
    (studies / "upper.nii.gz").rename(studies / "UPPER.NII.GZ")
    store = StudyStore(studies)
    assert store.list_images() == ["UPPER", "one", "two"]
    assert store.facts("UPPER") == store.facts("one")  # read like any other: the same voxels
    assert Path(store.get_image_uri("UPPER")).name == "UPPER.NII.GZ"


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


# --- names


PATHS = (
    "../evil",
    "a/b",
    "a\\b",
    "/tmp/x",
    "C:x",
    ".",
    "..",
    ".hidden",
    "x ",
    "x.",
    "",
    "what?",
    'a"b',
    "a|b",
    "x.seg",
)
INVISIBLE = ("a\nb", "a\x7fb", "a\u202eb", "\ud800", "\x00", "e\u0301")
RESERVED = ("CON", "nul.x", "lpt1", "x" * 129, "\u00e9" * 65)


@pytest.mark.parametrize("name", [*PATHS, *INVISIBLE, *RESERVED])
def test_what_is_not_a_files_name_everywhere_names_no_study(name):
    with pytest.raises(InputError, match="cannot name a study"):
        check_study_name(name)


@pytest.mark.parametrize("name", ["case1", "p.1.2.840", "a b", "\u00e9t\u00e9", "\u60a3\u8005", "x" * 123, "-1", "1"])
def test_names_that_people_use_name_studies(name):
    check_study_name(name)


@pytest.mark.parametrize(
    "tag", ["", ".", "..", "../final", "/etc", "a/b", "a\\b", "final\x00", "con", "x" * 65, "a b", "fin\u00e4l", "x."]
)
def test_a_tag_is_a_name(tag):
    with pytest.raises(InputError, match="no tag"):
        check_tag(tag)


def test_names_that_differ_in_case_only_are_refused_where_a_file_system_could_mix_them_up(studies, chest, tmp_path):
    store = StudyStore(studies)
    with pytest.raises(Conflict, match="'one' already"):
        store.add_image("One", str(studies / "one.nrrd"), {})
    write_volume(chest[1], tmp_path / "mask.nrrd")
    with pytest.raises(InputError, match="'final'"):
        store.save("one", tmp_path / "mask.nrrd", "FINAL", {})
    store.save("one", tmp_path / "mask.nrrd", "second", {})
    with pytest.raises(InputError, match="'second'"):
        store.save("one", tmp_path / "mask.nrrd", "Second", {})


def test_a_file_whose_name_cannot_be_shown_is_no_study(studies):
    whole = (studies / "one.nrrd").read_bytes()
    (studies / "bad\nname.nrrd").write_bytes(whole)
    Path(os.fsdecode(os.fsencode(studies) + b"/\xff\xfe.nrrd")).write_bytes(whole)
    assert StudyStore(studies).list_images() == ["one", "two"]


# --- what is said


def nested(levels):
    value = {}
    for _ in range(levels):
        value = {"a": value}
    return value


NO_OBJECTS = ([1, 2], 5, None, "x", {1: 2}, {"b": b"x"}, {"s": {1, 2}})
NOT_FINITE = ({"p": float("nan")}, {"p": [float("-inf")]}, {"n": 2**63}, {"n": -(10**400)})


@pytest.mark.parametrize("said", [*NO_OBJECTS, *NOT_FINITE, nested(40), nested(5000), {"s": "\ud800"}, {"\ud800": 1}])
def test_info_is_finite_json_of_few_levels(studies, chest, tmp_path, said):
    with pytest.raises(InputError, match="expected"):
        finite_json(said)
    store = StudyStore(studies)
    before = everything(studies)
    write_volume(chest[1], tmp_path / "mask.nrrd")
    with pytest.raises(InputError):
        store.save("one", tmp_path / "mask.nrrd", "original", said)
    with pytest.raises(InputError):
        store.update_image_info("one", said)
    assert everything(studies) == before


def test_info_comes_back_as_it_was_said(studies, chest, tmp_path):
    said = {"a": [1, 2.5, None, True, "\u00e9"], "b": nested(20), "n": 2**62}
    write_volume(chest[1], tmp_path / "mask.nrrd")
    StudyStore(studies).save("one", tmp_path / "mask.nrrd", "original", said)
    info = StudyStore(studies).get_label_info("one", "original")
    assert {name: info[name] for name in said} == said


def bad_labels(mask, folder):
    """Label files that no label can be, by what is wrong with them."""
    voxels = mask.voxels.astype(np.float32)
    header = {
        "space": "left-posterior-superior",
        "space directions": np.diag([5.0, 5.0, 2.5]),
        "space origin": (0, 0, 0),
    }
    right = voxels.T
    arrays = {
        "wrong size": right[:-1],
        "not integers": np.where(right > 0, 0.5, 0),
        "negative": (-right).astype(np.int16),
        "not a number": np.where(right > 0, np.nan, 0),
        "beyond 16 bits": right.astype(np.int32) * 70000,
    }
    for what, array in arrays.items():
        nrrd.write(str(folder / f"{what}.nrrd"), array, header)
    nrrd.write(str(folder / "elsewhere.nrrd"), right, {**header, "space origin": (0, 0, 40)})
    nrrd.write(str(folder / "other spacing.nrrd"), right, {**header, "space directions": np.diag([5.0, 5.0, 3.0])})
    nrrd.write(str(folder / "four axes.nrrd"), np.stack([right, right]))
    (folder / "empty.nrrd").write_bytes(b"")
    (folder / "garbage.nii.gz").write_bytes(b"garbage" * 100)
    nrrd.write(str(folder / "whole.nrrd"), right.astype(np.uint8), header)
    whole = (folder / "whole.nrrd").read_bytes()
    (folder / "cut off.nrrd").write_bytes(whole[: len(whole) // 2])
    return sorted(path for path in folder.iterdir() if path.name != "whole.nrrd")


def test_label_files_that_are_no_integer_image_on_the_cts_grid_are_refused_and_change_nothing(studies, chest, tmp_path):
    (tmp_path / "bad").mkdir()
    store = StudyStore(studies)
    annotation = SparseAnnotation.from_mask(read_volume(studies / "one.nrrd"), chest[1], [6]).to_json()
    before = everything(studies)
    bad = bad_labels(chest[1], tmp_path / "bad")
    assert len(bad) == 11
    for path in bad:
        for info in ({}, {"annotation": annotation}):
            with pytest.raises(InputError):
                print(path.name, store.save("one", path, "original", info))
    assert everything(studies) == before
    assert store.save("one", tmp_path / "bad" / "whole.nrrd", "original", {})["tag"] == "original"


# --- links


@pytest.mark.parametrize("linked", [".pe", "labels", ".pe/history"])
def test_a_folder_of_the_store_that_is_a_link_out_of_it_is_refused(studies, tmp_path, linked):
    (tmp_path / "outside").mkdir()
    (studies / linked).parent.mkdir(exist_ok=True)
    (studies / linked).symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="link"):
        StudyStore(studies)
    assert list((tmp_path / "outside").iterdir()) == []


@pytest.mark.parametrize("linked", ["labels/draft", ".pe/history/one", ".pe/history/one/annotation"])
def test_nothing_is_written_through_a_link_that_leads_out(studies, save, tmp_path, linked):
    store = StudyStore(studies)
    (tmp_path / "outside").mkdir()
    (studies / linked).parent.mkdir(parents=True, exist_ok=True)
    (studies / linked).symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="link"):
        save(store)
    assert list((tmp_path / "outside").iterdir()) == []


def test_nothing_is_served_through_a_link_that_leads_out(studies, save, tmp_path):
    store = StudyStore(studies)
    save(store)
    (tmp_path / "secret.nrrd").write_bytes(b"secret")
    for path in (studies / "two.nrrd", studies / "labels" / "draft" / "one.seg.nrrd"):
        path.unlink()
        path.symlink_to(tmp_path / "secret.nrrd")
    for ask in (
        lambda: store.get_image_uri("two"),
        lambda: store.volume("two"),
        lambda: store.get_label_uri("one", "draft"),
    ):
        with pytest.raises((InputError, ImageNotFoundException)):
            ask()
    assert StudyStore(studies).list_images() == ["one"]


# --- what lies in the folders


def test_a_former_stock_servers_store_is_taken_over_with_what_it_knew_and_without_its_broken_files(studies, chest):
    (studies / "labels" / "final").mkdir(parents=True)
    write_volume(chest[1], studies / "labels" / "final" / "one.nii.gz")
    (studies / "labels" / "final" / "two.nii.gz").write_bytes(b"")  # as a stock server leaves it when it is killed
    shown = {
        "ext": ".nii.gz",
        "info": {"label_info": [{"name": "pe", "idx": 1}], "ts": 7, "segmentationMeta": {"level": "easy"}},
    }
    stock = {
        "name": "new-dataset",
        "description": "New Dataset",
        "images_dir": ".",
        "labels_dir": "labels",
        "objects": {
            name: {"image": {"ext": ".nrrd", "info": {"ts": 7, "strategy": {}}}, "labels": {"final": shown}}
            for name in ("one", "two", "gone")
        },
    }
    (studies / "datastore_v2.json").write_text(json.dumps(stock))
    store = StudyStore(studies)
    assert store.list_images() == ["one", "two"]
    info = store.get_label_info("one", "draft")  # its painted slices are reviewed, the others are not
    assert info["segmentationMeta"] == {"level": "easy"}
    assert info["label_info"] == [{"name": "pe", "idx": 1}]
    assert store.get_image_info("one")["strategy"] == {}
    assert store.get_labels_by_image_id("two") == {}
    assert [path.stat().st_size for path in (studies / "labels" / "final").glob("two.nii.gz.damaged-*")] == [0]
    assert store.review_state("one").state == "in_progress"
    assert {one["state"] for one in store.labels.annotation_json("one")["slices"]} == {"embolism"}


@pytest.mark.parametrize(
    "index", ['{"name": 5}', '{"objects": []}', '{"name": "a", "description": "b", "objects": {"x": 1}}', "5"]
)
def test_an_index_of_other_types_is_set_aside(studies, index):
    (studies / "datastore_v2.json").write_text(index)
    assert StudyStore(studies).list_images() == ["one", "two"]
    assert [path.read_text() for path in studies.glob("datastore_v2.json.damaged-*")] == [index]


def test_labels_alone_bring_back_the_review_when_all_else_is_lost(studies, save):
    save(StudyStore(studies), count=3)
    former = StudyStore(studies).labels.annotation_json("one")
    shutil.rmtree(studies / ".pe")
    (studies / "datastore_v2.json").unlink()
    store = StudyStore(studies)
    assert store.labels.annotation_json("one") == former
    assert store.review_state("one").state == "in_progress"


def test_an_edit_of_a_shown_label_does_not_change_a_version(studies, save):
    store = StudyStore(studies)
    revision = save(store)
    version = store.history.path("one", "annotation", revision, ".seg.nrrd")
    before = version.read_bytes()
    with (studies / "labels" / "draft" / "one.seg.nrrd").open("r+b") as file:
        file.write(b"overwritten in place")
    assert version.read_bytes() == before


def test_of_a_damaged_version_the_label_that_is_shown_counts_and_else_the_version_before_it(studies, save):
    store = StudyStore(studies)
    first, second = save(store, count=2), save(store, count=3)
    folder = studies / ".pe" / "history" / "one" / "annotation"
    (folder / "current.json").write_text("{")
    assert StudyStore(studies).history.current("one", "annotation").revision == second
    (folder / f"{second}.version").write_text("")
    shutil.rmtree(studies / "labels")
    assert StudyStore(studies).review_state("one").revision == first


def read_and_save(studies, outlines, count):
    """A reader in another process: a save of one more slice each time."""
    store = StudyStore(studies)
    volume = store.volume("one")
    schedule = store.facts("one").schedule
    for number in range(count):
        annotation = SparseAnnotation.from_mask(volume, outlines, schedule[: number + 1], "ann", "2026-11-02T08:00:00Z")
        annotation.write(studies.parent / "reader.json", volume)
        store.save(
            "one", studies.parent / "reader.seg.nrrd", "draft", {"annotation": annotation.to_json(), "reader": "ann"}
        )


def infer_and_save(studies, count):
    """A batch inference in another process: label maps of every study, again and again."""
    store = StudyStore(studies)
    for number in range(count):
        for study in ("one", "two"):
            store.save(study, studies.parent / "found.nrrd", "original", {"round": number, "study": study})
            store.update_image_info(study, {"round": number})


def test_a_batch_inference_in_another_process_reverts_no_review_and_loses_none_of_its_own(studies, chest):
    StudyStore(studies).facts("one")
    write_volume(chest[1], studies.parent / "found.nrrd")
    processes = multiprocessing.get_context("fork")
    batch = processes.Process(target=infer_and_save, args=(studies, 6))
    reader = processes.Process(target=read_and_save, args=(studies, chest[1], 6))
    watching = StudyStore(studies)
    for process in (batch, reader):
        process.start()
    seen = []
    while any(process.is_alive() for process in (batch, reader)):
        annotation = watching.labels.annotation_json("one")
        seen.append(len(annotation["slices"]) if annotation else 0)
    for process in (batch, reader):
        process.join()
        assert process.exitcode == 0
    assert seen == sorted(seen), "a review went back"
    for store in (watching, StudyStore(studies)):
        assert reviewed(store) == 6
        assert store.review_state("one").reviewed == 6
        assert [store.get_label_info(study, "original")["round"] for study in ("one", "two")] == [5, 5]
        assert [store.get_image_info(study)["client_info"]["round"] for study in ("one", "two")] == [5, 5]
    assert len(list(watching.history.versions("one", "annotation"))) == 6
    assert json.loads((studies / "labels" / "draft" / "one.json").read_text())["slices"][-1]["state"]


def test_a_save_that_counts_is_shown_although_the_disk_takes_no_index_and_written_when_it_does(
    studies, save, chest, monkeypatch
):
    store = StudyStore(studies)
    save(store, count=2)

    def full(path, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(pe_monailabel.store.index, "write_durably", full)
        patched.setattr(pe_monailabel.store.labels, "show", lambda *_: full(None, None))
        revision = save(store, count=4)
        shutil.copy(studies / "one.nrrd", studies / "three.nrrd")
        assert store.list_images() == ["one", "three", "two"]
        assert store.review_state("one").reviewed == 4
        shown = nrrd.read(store.get_label_uri("one", "draft"))[0]
        assert shown.any(axis=(0, 1)).sum() == sum(
            chest[1].voxels[list(store.facts("one").schedule[:4])].any(axis=(1, 2))
        )
    store.refresh()
    for again in (store, StudyStore(studies)):
        assert (reviewed(again), again.review_state("one").revision) == (4, revision)
        assert again.get_label_uri("one", "draft") == str(studies / "labels" / "draft" / "one.seg.nrrd")
    assert json.loads((studies / "datastore_v2.json").read_text())["objects"].keys() == {"one", "three", "two"}


def test_what_itk_could_not_write_whole_is_refused_as_a_full_disk(studies, chest, tmp_path):
    import SimpleITK as sitk

    written = sitk.WriteImage

    def cut(image, path, **options):
        written(image, path, **options)
        with Path(path).open("r+b") as file:
            file.truncate(Path(path).stat().st_size - 40)

    store = StudyStore(studies)
    annotation = SparseAnnotation.from_mask(read_volume(studies / "one.nrrd"), chest[1], [6, 10])
    annotation.write(tmp_path / "sent.json", chest[0])
    before = everything(studies)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sitk, "WriteImage", cut)
        with pytest.raises(OSError, match="No space left"):
            store.save("one", tmp_path / "sent.seg.nrrd", "draft", {"annotation": annotation.to_json()})
        with pytest.raises(OSError, match="No space left"):
            store.add_image("three", str(studies / "one.nrrd"), {})
    assert everything(studies) == before
    assert store.list_images() == ["one", "two"]
