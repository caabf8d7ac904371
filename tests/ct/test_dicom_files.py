"""Deflated DICOM: read as pydicom reads it, and never inflated beyond what its header promises."""

import tracemalloc

import numpy as np
import pydicom
import pytest
from conftest import dicom_slice
from pydicom.uid import DeflatedExplicitVRLittleEndian

from pe_app.common.errors import InputError, TooLarge
from pe_app.ct.dicom_files import read_header, read_whole
from pe_app.ct.volume_io import read_volume


def deflated(path, pixels=b"", **tags):
    """One deflated slice; with ``pixels``, these bytes in place of its own."""
    dataset = dicom_slice(np.arange(24, dtype=np.int16).reshape(4, 6), (0.0, 0.0, 0.0), **tags)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    if pixels:
        dataset.PixelData = pixels
    dataset.save_as(path, enforce_file_format=True)
    return path


def peak_of(call):
    tracemalloc.start()
    try:
        call()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def test_a_deflated_file_is_read_as_pydicom_reads_it(tmp_path):
    path = deflated(tmp_path / "slice.dcm")
    expected, found = pydicom.dcmread(path), read_whole(path)
    np.testing.assert_array_equal(found.pixel_array, expected.pixel_array)
    assert found.to_json_dict() == expected.to_json_dict()
    header = read_header(path, ["Rows", "SeriesInstanceUID"])
    assert (header.Rows, header.SeriesInstanceUID) == (4, "1.2.840")
    assert "PixelData" not in header


def test_a_file_that_unpacks_to_more_than_its_header_promises_is_refused_with_little_memory(tmp_path):
    path = deflated(tmp_path / "bomb.dcm", pixels=bytes(400 << 20))
    assert path.stat().st_size < 1 << 20

    def read():
        with pytest.raises(TooLarge, match="unpacks to more than 16 MiB"):
            read_whole(path)

    assert peak_of(read) < 100 << 20


def test_a_folder_with_such_a_file_is_refused_in_a_sentence(tmp_path):
    for index in range(3):
        position = [0.0, 0.0, 2.5 * index]
        deflated(tmp_path / f"{index}.dcm", pixels=bytes(100 << 20), ImagePositionPatient=position)
    with pytest.raises(InputError, match="unpacks to more than 16 MiB"):
        read_volume(tmp_path)


def test_a_header_that_promises_more_than_a_gigabyte_of_pixels_is_refused_before_they_are_read(tmp_path):
    path = deflated(tmp_path / "promise.dcm", Rows=65535, Columns=65535)
    with pytest.raises(TooLarge, match=r"8\.0 GiB"):
        read_whole(path)
