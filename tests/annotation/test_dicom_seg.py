"""Segmentations drawn elsewhere (here by highdicom, as any other program would) as annotations of our studies."""

from dataclasses import replace
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.sr.codedict import codes
from small_series import TAGS, TURNS, marked, write_turned
from small_studies import small_chest
from typer.testing import CliRunner

from pe_app.annotation.dicom_seg import import_segmentations, merged, parse_reviewed
from pe_app.annotation.sparse import SparseAnnotation
from pe_app.cli import app
from pe_app.common.errors import InputError
from pe_app.ct.source_series import source_path, write_source
from pe_app.ct.volume_io import read_volume, write_volume
from pe_app.studies import Study, read_studies, write_studies
from pe_monailabel.cli.folder import open_store

MARKED_SLICES = [5, 6, 7, 8]


def headers(folder: Path) -> list[pydicom.Dataset]:
    read = [pydicom.dcmread(path) for path in folder.iterdir()]
    for image in read:
        image.SliceThickness = 3.0  # highdicom wants it
    return sorted(read, key=lambda dataset: dataset.SOPInstanceUID)


def draw(
    folder: Path,
    path: Path,
    kind: str = "BINARY",
    labels: tuple[str, ...] = ("clot",),
    creator: str = "Roe^Richard",
    **changes: str,
) -> Path:
    """A SEG of the blob on its source images; every further segment is the blob on one slice less."""
    images = [image for image in headers(folder) if (image.pixel_array == 1024 + 777).any()]
    pixels = np.array([image.pixel_array == 1024 + 777 for image in images])
    masks = np.stack(
        [pixels] + [np.where(np.arange(len(pixels))[:, None, None] == 0, pixels, False) for _ in labels[1:]], -1
    )
    algorithm = highdicom.AlgorithmIdentificationSequence("brush", codes.DCM.ArtificialIntelligence, "1")
    segments = [
        highdicom.seg.SegmentDescription(
            number, label, codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Tissue, "SEMIAUTOMATIC", algorithm
        )
        for number, label in enumerate(labels, start=1)
    ]
    dataset = highdicom.seg.Segmentation(
        images, masks.astype(np.float32) if kind == "FRACTIONAL" else masks if kind == "BINARY" else masks[..., 0],
        kind, segments, "1.2.9", 1, "1.2.9.1", 1, "other", "editor", "1", "1", content_creator_name=creator,
    )  # fmt: skip
    for keyword, value in changes.items():
        setattr(dataset, keyword, value)
    dataset.save_as(path)
    return path


@pytest.fixture
def hospital(write_series, tmp_path):
    """Makes a folder of studies with one study in it; gives the folder and the study's DICOM."""

    def make(turn: str = "head first, supine", step_mm: float = 3.0) -> tuple[Path, Path]:
        folder = write_turned(write_series, turn, step_mm)
        studies = tmp_path / "studies"
        studies.mkdir()
        write_studies([Study("one", folder)], studies / "studies.csv")
        return studies, folder

    return make


def annotation_in(studies: Path) -> SparseAnnotation:
    (study,) = read_studies(studies / "studies.csv")
    return SparseAnnotation.read(study.annotation)


@pytest.mark.parametrize("step_mm", [3.0, -3.0], ids=["feet to head", "head to feet"])
@pytest.mark.parametrize("turn", TURNS)
def test_outlines_arrive_on_the_voxels_that_were_outlined(write_series, hospital, tmp_path, turn, step_mm):
    studies, folder = hospital(turn, step_mm)
    assert import_segmentations([draw(folder, tmp_path / "s.dcm")], studies, "segmented") == ()
    annotation, volume = annotation_in(studies), read_volume(folder)
    voxels = np.zeros(volume.shape, bool)
    for index, mask in annotation.masks.items():
        voxels[index] = mask
    np.testing.assert_array_equal(voxels, marked(volume))
    assert {entry.reader for entry in annotation.slices} == {"Roe Richard"}


@pytest.mark.parametrize(
    ("reviewed", "without"),
    [
        ("segmented", []),
        ("range", []),
        ("all", [*range(5), *range(9, 24)]),
        ("3-10", [3, 4, 9, 10]),
    ],
)
def test_only_slices_that_the_reader_is_said_to_have_seen_become_none(hospital, tmp_path, reviewed, without):
    studies, folder = hospital()
    import_segmentations([draw(folder, tmp_path / "s.dcm")], studies, parse_reviewed(reviewed))
    annotation = annotation_in(studies)
    assert [entry.slice_index for entry in annotation.slices if entry.state == "embolism"] == MARKED_SLICES
    assert [entry.slice_index for entry in annotation.slices if entry.state == "none"] == without


def test_the_range_holds_the_slices_between_two_outlines(hospital, tmp_path):
    studies, folder = hospital()
    path = draw(folder, tmp_path / "s.dcm")
    dataset = pydicom.dcmread(path)
    pixels = dataset.pixel_array.copy()
    places = [float(group.PlanePositionSequence[0].ImagePositionPatient[2])
              for group in dataset.PerFrameFunctionalGroupsSequence]  # fmt: skip
    pixels[np.argsort(places)[1]] = 0  # the second outlined slice from the feet becomes empty
    dataset.PixelData = pydicom.pixels.pack_bits(pixels)
    dataset.save_as(path)
    import_segmentations([path], studies, "range")
    assert {entry.slice_index: entry.state for entry in annotation_in(studies).slices} == {
        5: "embolism", 6: "none", 7: "embolism", 8: "embolism"
    }  # fmt: skip


def test_an_outline_outside_of_what_was_reviewed_is_refused(hospital, tmp_path):
    studies, folder = hospital()
    (problem,) = import_segmentations([draw(folder, tmp_path / "s.dcm")], studies, (0, 6))
    assert "slice 7" in problem
    assert read_studies(studies / "studies.csv")[0].annotation is None


@pytest.mark.parametrize("words", ["", "some", "9-3", "-4", "a-b", "3"])
def test_what_was_reviewed_is_never_guessed(words):
    with pytest.raises(InputError, match="give the slices the reader saw"):
        parse_reviewed(words)


@pytest.mark.parametrize(
    ("drawn", "sentence"),
    [
        ({"kind": "FRACTIONAL"}, "fractional"),
        ({"FrameOfReferenceUID": "1.2.3.99"}, "another frame of reference"),
        ({"labels": ("heart", "lung")}, "which segment holds the emboli? It has 1 'heart', 2 'lung'"),
    ],
)
def test_what_cannot_be_an_outline_of_this_study_is_refused_with_a_sentence(hospital, tmp_path, drawn, sentence):
    studies, folder = hospital()
    (problem,) = import_segmentations([draw(folder, tmp_path / "s.dcm", **drawn)], studies, "segmented")
    assert sentence in problem
    assert read_studies(studies / "studies.csv")[0].annotation is None


def test_a_segmentation_of_a_series_that_is_not_here_says_which_one(hospital, tmp_path, write_series):
    studies, _ = hospital()
    other = write_turned(write_series, StudyInstanceUID="1.9", SeriesInstanceUID="1.9.1", folder=tmp_path / "other")
    (problem,) = import_segmentations([draw(other, tmp_path / "s.dcm")], studies, "segmented")
    assert "1.9.1" in problem


def test_shifted_pixels_are_refused_and_never_moved(hospital, tmp_path):
    studies, folder = hospital()
    path = draw(folder, tmp_path / "s.dcm")
    dataset = pydicom.dcmread(path)
    for group in dataset.PerFrameFunctionalGroupsSequence:
        x, y, z = group.PlanePositionSequence[0].ImagePositionPatient
        group.PlanePositionSequence[0].ImagePositionPatient = [x + 0.3, y, z]
    dataset.save_as(path)
    (problem,) = import_segmentations([path], studies, "segmented")
    assert "its voxels are not those of" in problem


def test_one_of_several_segments_can_be_chosen_and_emboli_say_so_themselves(hospital, tmp_path):
    studies, folder = hospital()
    path = draw(folder, tmp_path / "s.dcm", labels=("lung", "second"))
    assert import_segmentations([path], studies, "segmented", segment="2") == ()
    assert len(annotation_in(studies).slices) == 1
    both = draw(folder, tmp_path / "b.dcm", labels=("embolus right", "embolus left"))
    write_studies([Study("one", folder)], studies / "studies.csv")
    (studies / "annotations" / "one.json").unlink()
    assert import_segmentations([both], studies, "segmented") == ()
    assert len(annotation_in(studies).slices) == 4


def test_a_label_map_is_read_as_a_binary_segmentation_is(hospital, tmp_path):
    studies, folder = hospital()
    assert import_segmentations([draw(folder, tmp_path / "s.dcm", kind="LABELMAP")], studies, "segmented") == ()
    assert [entry.slice_index for entry in annotation_in(studies).slices] == MARKED_SLICES


def test_the_same_file_twice_changes_nothing_and_another_word_on_a_slice_is_refused(hospital, tmp_path):
    studies, folder = hospital()
    path = draw(folder, tmp_path / "s.dcm")
    assert import_segmentations([path, path], studies, "segmented") == ()
    before = (studies / "annotations" / "one.json").read_text()
    differing = draw(folder, tmp_path / "d.dcm", labels=("lung", "second"))
    (problem,) = import_segmentations([differing], studies, "all", segment="2")
    assert "reviewed already, with another result" in problem
    assert (studies / "annotations" / "one.json").read_text() == before


def test_an_outline_completes_a_slice_that_was_not_outlined_and_is_not_lost_to_one(hospital, tmp_path):
    studies, folder = hospital()
    path = draw(folder, tmp_path / "s.dcm")
    assert import_segmentations([path], studies, "segmented") == ()
    outlined = annotation_in(studies)
    answers = replace(
        outlined, slices=tuple(replace(entry, not_outlined=True, reader="Bo") for entry in outlined.slices), masks={}
    )
    assert merged(answers, outlined).to_json() == outlined.to_json()
    assert merged(outlined, answers).to_json() == outlined.to_json()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\0" * 128 + b"DICM" + b"\2\0\0\0"])
def test_a_damaged_file_is_told_and_the_others_are_imported(hospital, tmp_path, content):
    studies, folder = hospital()
    (tmp_path / "bad.dcm").write_bytes(content)
    problems = import_segmentations([tmp_path / "bad.dcm", draw(folder, tmp_path / "s.dcm")], studies, "segmented")
    assert [problem.startswith("bad.dcm") for problem in problems] == [True]
    assert len(annotation_in(studies).slices) == 4


@pytest.mark.timeout(1500)  # imports MONAI Label
def test_in_a_served_folder_the_outlines_become_a_version_that_readers_see(write_series, tmp_path):
    chest, mask = small_chest(0, emboli=1)
    stored = np.where(mask.voxels != 0, 777, chest.voxels) + 1024
    folder = write_series(stored.astype(np.uint16), PixelSpacing=[5, 5], **TAGS)
    volume = read_volume(folder)
    slices = [int(k) for k in np.flatnonzero(mask.voxels.any((1, 2)))]
    studies = tmp_path / "studies"
    write_volume(volume, studies / "volumes" / "one.nrrd")
    write_source(replace(volume.source, image_sha256=volume.sha256), source_path(studies / "volumes" / "one.nrrd"))
    write_studies([Study("one", studies / "volumes" / "one.nrrd")], studies / "studies.csv")
    store = open_store(studies)
    path = draw(folder, tmp_path / "s.dcm")
    for _ in range(2):
        done = CliRunner().invoke(app, ["import-seg", str(path), "--studies", str(studies), "--reviewed", "5-30"])
        assert done.exit_code == 0, done.output
    seen = store.annotation("one")
    assert [entry.slice_index for entry in seen.slices if entry.state == "embolism"] == slices
    assert [entry.slice_index for entry in seen.slices] == list(range(5, 31))
    assert len(store.versions("one")) == 1


def test_without_a_word_on_what_was_reviewed_nothing_is_imported(hospital, tmp_path):
    studies, folder = hospital()
    done = CliRunner().invoke(app, ["import-seg", str(draw(folder, tmp_path / "s.dcm")), "--studies", str(studies)])
    assert done.exit_code == 2
    assert "--reviewed" in done.output
    assert read_studies(studies / "studies.csv")[0].annotation is None
