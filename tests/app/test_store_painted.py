"""Label maps of clients that know no reviewed slices: worklist, answer of the save and training agree on them."""

import numpy as np
import pytest
from app_server import SHAPE, chest

from pe_app.annotation.sparse import SparseAnnotation
from pe_app.common.errors import InputError
from pe_app.ct.volume_io import write_volume
from pe_monailabel import compat  # noqa: F401 - before monailabel
from pe_monailabel.store.labels import Conflict
from pe_monailabel.store.studies import StudyStore


@pytest.fixture(scope="module")
def study():
    return chest(1, emboli=3)


@pytest.fixture
def store(tmp_path, study):
    write_volume(study[0], tmp_path / "studies" / "one.nrrd")
    return StudyStore(tmp_path / "studies")


def painted(study, tmp_path, slices):
    """A label map of a stock client, painted on some slices."""
    voxels = np.zeros(SHAPE, np.uint8)
    voxels[slices, 20:30, 20:30] = 1
    path = tmp_path / "label.nii.gz"
    write_volume(study[1].with_voxels(voxels), path)
    return path


def test_a_plain_label_map_becomes_an_annotation_of_its_painted_slices(store, study, tmp_path):
    schedule = store.facts("one").schedule
    slices = [schedule[2], schedule[3], schedule[3] + 1]
    said = {"label_info": [{"name": "pe", "idx": 1}], "client_id": "user-xyz", "reader": "ann"}
    answer = store.save("one", painted(study, tmp_path, slices), "final", said)
    assert (answer["tag"], answer["accepted"], answer["reviewed"]) == ("draft", 3, 2)
    assert answer["open"] == [index for index in schedule if index not in slices]
    state = store.review_state("one")
    assert (state.state, state.reviewed, state.embolism) == ("in_progress", 2, True)
    [trained] = store.studies()
    annotation = SparseAnnotation.read(trained.annotation)
    assert [(one.slice_index, one.state, one.reader) for one in annotation.slices] == [
        (index, "embolism", "ann") for index in slices
    ]
    assert store.get_label_info("one", "draft")["label_info"] == said["label_info"]


def test_a_painted_label_is_painted_over_and_a_review_is_not(store, study, tmp_path):
    schedule = store.facts("one").schedule
    store.save("one", painted(study, tmp_path, [schedule[0]]), "final", {})
    store.save("one", painted(study, tmp_path, [schedule[1]]), "final", {})
    assert [entry["slice_index"] for entry in store.labels.annotation_json("one")["slices"]] == [schedule[1]]
    annotation = SparseAnnotation.from_mask(study[0], study[1], schedule[:4], "ann")
    annotation.write(tmp_path / "sent.json", study[0])
    store.save("one", tmp_path / "sent.seg.nrrd", "draft", {"annotation": annotation.to_json()})
    with pytest.raises(Conflict, match="which a plain label does not replace"):
        store.save("one", painted(study, tmp_path, [schedule[1]]), "final", {})


def test_a_label_map_under_another_tag_stays_a_label_map(store, study, tmp_path):
    store.save("one", painted(study, tmp_path, [5]), "original", {})
    assert store.review_state("one").state == "not_started"
    assert store.labels.annotation_json("one") is None


def test_a_tag_that_differs_from_final_in_case_only_is_refused(store, study, tmp_path):
    with pytest.raises(InputError, match="'final'"):
        store.save("one", painted(study, tmp_path, [5]), "FINAL", {})


def test_outlines_of_an_imported_folder_are_the_first_version_with_where_they_came_from(study, tmp_path):
    folder = tmp_path / "imported"
    write_volume(study[0], folder / "volumes" / "one.nrrd")
    write_volume(study[0], folder / "volumes" / "two.nrrd")
    annotation = SparseAnnotation.from_mask(study[0], study[1], [10, 12, 14], "ann")
    (folder / "annotations").mkdir()
    annotation.write(folder / "annotations" / "one.json", study[0])
    listed = "study,path,patient,label,annotation,split\none,volumes/one.nrrd,,positive,annotations/one.json,\n"
    (folder / "studies.csv").write_text(listed + "two,volumes/two.nrrd,,negative,,\n")
    store = StudyStore(folder)
    assert store.to_take_over() == ["one"]
    store.take_over("one")
    assert (store.to_take_over(), store.review_state("one").state) == ([], "in_progress")
    assert [(entry["current"], entry["source"]) for entry in store.versions("one")] == [(True, "annotations/one.json")]
    assert store.annotation("one").to_json()["slices"] == annotation.to_json()["slices"]
    store.remove_label("one", "draft")
    assert StudyStore(folder).to_take_over() == [], "a removal stays"
