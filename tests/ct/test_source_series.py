"""What results repeat of their source: valid values, or none."""

import numpy as np
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from pe_app.common.errors import InputError
from pe_app.ct.volume_io import read_volume


def stored_pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1500, (4, 6, 7)).astype(np.uint16)


def raw(keyword: str, vr: str, value: bytes):
    value += b" " * (len(value) % 2)
    element = RawDataElement(Tag(keyword), vr, len(value), value, 0, False, True)
    return lambda k, dataset: dataset._dict.__setitem__(element.tag, element)


@pytest.mark.parametrize(
    ("keyword", "vr", "value"),
    [
        ("PatientBirthDate", "DA", b"00000000"),
        ("PatientBirthDate", "DA", b"ANON"),
        ("PatientBirthDate", "DA", b"00/00/0000"),
        ("StudyDate", "DA", b"20261301"),
        ("StudyTime", "TM", b"24:99"),
        ("SeriesTime", "TM", b"240000"),
        ("PatientSex", "CS", b"U"),
        ("PatientSex", "CS", b"Male"),
    ],
)
def test_values_that_no_object_may_repeat_are_left_empty(write_series, keyword, vr, value):
    volume = read_volume(write_series(stored_pixels(), edit=raw(keyword, vr, value)))
    assert volume.source is not None
    assert all(not dataset.get(keyword) for dataset in volume.source.datasets())


def test_valid_dates_times_and_sexes_are_repeated(write_series):
    tags = {"PatientBirthDate": "19500229", "StudyDate": "20260102", "StudyTime": "101112.5", "PatientSex": "O"}
    volume = read_volume(write_series(stored_pixels(), **tags))
    first = volume.source.datasets()[0]
    assert {keyword: first[keyword].value for keyword in tags} == tags


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda k, ds: setattr(ds, "SOPClassUID", ""), r"SOP Class UID \(0008,0016\) is empty"),
        (lambda k, ds: setattr(ds, "SOPInstanceUID", ""), r"SOP Instance UID \(0008,0018\) is empty"),
        (lambda k, ds: setattr(ds, "SOPInstanceUID", "1.2.9"), r"4 slices have 1 different SOP Instance UIDs"),
        (lambda k, ds: setattr(ds, "StudyInstanceUID", ""), r"Study Instance UID \(0020,000D\) is empty"),
    ],
)
def test_nothing_refers_to_slices_without_names_of_their_own(write_series, edit, words):
    volume = read_volume(write_series(stored_pixels(), edit=edit))
    with pytest.raises(InputError, match=words):
        volume.source.datasets()
