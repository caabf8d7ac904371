"""Slices that are missing as files, pictures among slices, and values that nothing needs."""

import logging
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from pe_app.common.errors import InputError
from pe_app.common.files import files_below
from pe_app.ct.volume_io import read_volume

SHAPE = (8, 6, 7)


def stored_pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1500, SHAPE).astype(np.uint16)


def outermost(folder: Path) -> Path:
    return max(folder.iterdir())


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 524812\n"


def empty(path: Path) -> None:
    path.write_bytes(b"")


def short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:90])


def pointer(path: Path) -> None:
    path.write_bytes(LFS)


def annexed(path: Path) -> None:
    path.write_bytes(b"/annex/objects/MD5E-s524812--00.dcm\n")


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere/annex/objects/x")


def unfinished(path: Path) -> None:
    short(path)
    path.rename(path.with_name(path.name + ".filepart"))


@pytest.mark.parametrize("spoil", [empty, short, pointer, annexed, dangling, unfinished])
@pytest.mark.parametrize("ending", ["", ".dcm", ".IMA"])
def test_a_slice_that_is_missing_as_a_file_refuses_its_series_by_name(write_series, spoil, ending):
    folder = write_series(stored_pixels())
    for path in list(folder.iterdir()):
        path.rename(path.with_name(path.name + ending))
    last = outermost(folder)
    spoil(last)
    with pytest.raises(InputError, match=rf"{last.name}.*it may be (?:a slice of|why) series 1\.2\.840"):
        read_volume(folder)


@pytest.mark.parametrize(
    "name", ["README", "LICENSE", "report.pdf", ".hidden", "._1_2_840_007", "notes.txt", "VERSION"]
)
def test_what_does_not_look_like_a_slice_keeps_no_series_out(write_series, name):
    folder = write_series(stored_pixels())
    (folder / name).write_bytes(b"" if name == "VERSION" else b"made up")
    assert read_volume(folder).shape == SHAPE


def test_a_text_named_like_dicom_is_left_out_with_a_word(write_series, caplog):
    folder = write_series(stored_pixels())
    (folder / "Notes.dcm").write_text("seen with Dr. Wu\n")
    assert read_volume(folder).shape == SHAPE
    assert "Notes.dcm: is a text and no DICOM file, it is left out" in caplog.text


def test_a_damaged_file_of_another_series_keeps_this_one_in_with_a_word(write_series, caplog):
    folder = write_series(stored_pixels())
    other = write_series(stored_pixels()[:3], folder=folder / "other", SeriesInstanceUID="1.2.841")
    empty(outermost(other))
    assert read_volume(folder).shape == SHAPE
    assert "lies with another series and is left out" in caplog.text
    alone = folder / "alone"
    alone.mkdir()
    empty(alone / "IM0001.dcm")
    with pytest.raises(InputError, match=r"IM0001\.dcm: its 0 bytes"):
        read_volume(folder)


def test_linked_folders_are_followed_once_and_circles_end(write_series, tmp_path):
    real = write_series(stored_pixels(), folder=tmp_path / "real")
    study = tmp_path / "study"
    study.mkdir()
    (study / "CT").symlink_to(real, target_is_directory=True)
    (study / "CT again").symlink_to(real, target_is_directory=True)
    (study / "circle").symlink_to(study, target_is_directory=True)
    assert len(files_below(study)) == len(stored_pixels())
    assert read_volume(study).shape == SHAPE


def raw(keyword: str, vr: str, value: bytes):
    value += b" " * (len(value) % 2)
    element = RawDataElement(Tag(keyword), vr, len(value), value, 0, False, True)
    return lambda k, dataset: dataset._dict.__setitem__(element.tag, element)


@pytest.mark.parametrize(
    ("keyword", "vr", "value"),
    [
        ("SliceThickness", "DS", b"3,0"),
        ("SliceThickness", "DS", b"3.0 mm"),
        ("SeriesNumber", "IS", b"S2"),
        ("SeriesNumber", "IS", b"2.0"),
        ("AcquisitionNumber", "IS", b"first"),
        ("LossyImageCompressionRatio", "DS", b"10:1"),
        ("PixelSpacing", "UT", b"0.8\\0.8"),
        ("KVP", "DS", b"120kV"),
        ("StudyDate", "DA", b"00000000"),
    ],
)
def test_a_value_that_nothing_needs_keeps_no_series_out(write_series, keyword, vr, value):
    lossy = {"LossyImageCompression": "01"} if "Lossy" in keyword else {}
    volume = read_volume(write_series(stored_pixels(), edit=raw(keyword, vr, value), **lossy))
    np.testing.assert_array_equal(volume.voxels, stored_pixels().astype(np.int16) - 1024)


@pytest.mark.parametrize(
    ("keyword", "value", "words"),
    [
        ("PixelSpacing", b"0,8\\0,8", r"Pixel Spacing \(0028,0030\) is '0,8\\\\0,8'"),
        ("ImagePositionPatient", b"1\\2", r"Image Position \(Patient\) \(0020,0032\) is '1\\\\2'"),
        ("ImageOrientationPatient", b"", r"Image Orientation \(Patient\) \(0020,0037\) is missing"),
        ("RescaleSlope", b"eins", r"Rescale Slope \(0028,1053\) is 'eins'"),
    ],
)
def test_a_value_that_is_needed_is_named_by_tag_and_value(write_series, keyword, value, words):
    with pytest.raises(InputError, match=words):
        read_volume(write_series(stored_pixels(), edit=raw(keyword, "DS", value)))


def renumbered(k: int, dataset) -> None:
    dataset.SOPInstanceUID = f"1.9.{k}"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"AcquisitionNumber": 1}, {"AcquisitionNumber": 2}),
        ({"AcquisitionNumber": 9}, {"AcquisitionNumber": 10}),
        ({"TemporalPositionIdentifier": 1}, {"TemporalPositionIdentifier": 2}),
        ({"AcquisitionNumber": 1, "AcquisitionTime": "120000"}, {"AcquisitionNumber": 1, "AcquisitionTime": "120130"}),
    ],
)
def test_of_two_acquisitions_in_one_series_the_first_is_taken_with_a_word(write_series, caplog, first, second):
    folder = write_series(stored_pixels(), **first)
    for path in list(folder.iterdir()):
        path.rename(path.with_name("1st" + path.name))
    write_series(stored_pixels()[::-1].copy(), folder=folder, edit=renumbered, **second)
    np.testing.assert_array_equal(read_volume(folder).voxels, stored_pixels().astype(np.int16) - 1024)
    assert "holds 2 acquisitions" in caplog.text


def test_acquisitions_that_nothing_tells_apart_are_refused(write_series):
    folder = write_series(stored_pixels(), AcquisitionNumber=1, AcquisitionTime="120000")
    for path in list(folder.iterdir()):
        path.rename(path.with_name("1st" + path.name))
    same = {"AcquisitionNumber": 1, "AcquisitionTime": "120000"}
    write_series(stored_pixels()[::-1].copy(), folder=folder, edit=renumbered, **same)
    with pytest.raises(InputError, match="lie at the same position"):
        read_volume(folder)


def test_a_picture_of_the_screen_and_a_scout_among_the_slices_are_left_out_with_a_word(write_series, caplog):
    caplog.set_level(logging.WARNING)

    def capture(k, dataset):
        if k == 0:
            dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
            for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
                delattr(dataset, keyword)
        if k == 1:
            dataset.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]

    volume = read_volume(write_series(stored_pixels(), edit=capture))
    assert volume.shape == (SHAPE[0] - 2, *SHAPE[1:])
    assert "2 pictures among its slices are left out" in caplog.text
