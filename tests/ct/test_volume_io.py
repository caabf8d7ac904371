"""Reading and writing, against nibabel, pynrrd and pydicom, which share no code with SimpleITK; and what is refused."""

import contextlib
import gzip
import io
import logging
import os
import pickle
import re
import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from pe_app.common.errors import InputError, UnfitStudy
from pe_app.ct.dicom_stack import check_uniform_spacing
from pe_app.ct.volume import Volume, axial_affine
from pe_app.ct.volume_io import (
    image_from_volume,
    read_mask,
    read_volume,
    resample_like,
    volume_from_image,
    write_volume,
)

RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
SHAPE = (5, 6, 7)


def stored_pixels(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1500, shape).astype(np.uint16)


def hu_volume(seed: int = 0) -> Volume:
    """Oblique by 10 degrees, spacing different along every axis."""
    angle = np.radians(10)
    affine = axial_affine((2.5, 0.8, 0.7), (-100.0, -120.0, -300.0))
    turn = [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    affine[:3, :3] = np.array(turn) @ affine[:3, :3]
    return Volume(np.random.default_rng(seed).integers(-1024, 1500, SHAPE).astype(np.int16), affine)


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(array, np.diag([-0.7, -0.8, 2.5, 1]) if affine is None else affine), path)
    return path


# DICOM: what is read


def test_a_shuffled_series_is_sorted_by_patient_position_and_laid_into_the_patient(write_series):
    stored = stored_pixels()
    volume = read_volume(write_series(stored))
    np.testing.assert_array_equal(volume.voxels, stored.astype(np.int16) - 1024)
    assert volume.voxels.dtype == np.int16
    np.testing.assert_allclose(volume.affine, axial_affine((2.5, 0.8, 0.7), (-100.0, -120.0, -300.0)))
    assert volume.name == "series 1.2.840"


def test_every_voxel_lies_where_the_standard_says_for_any_orientation_in_the_plane(write_series):
    """DICOM PS3.3 C.7.6.2.1.1: position + column index x spacing[1] x row cosine + row index x spacing[0] x ..."""
    stored = stored_pixels()
    for orientation in ([-1, 0, 0, 0, -1, 0], [0, 1, 0, -1, 0, 0], [1, 0, 0, 0, -1, 0], [0, -1, 0, -1, 0, 0]):
        positions = np.array([[10.0, -20.0, 50 - 1.25 * k] for k in range(5)])
        folder = write_series(
            stored, positions, write_series_folder(write_series, orientation), ImageOrientationPatient=orientation
        )
        volume = read_volume(folder)
        for k, row, column in np.ndindex(SHAPE):
            place = positions[k] + column * 0.7 * np.array(orientation[:3]) + row * 0.8 * np.array(orientation[3:])
            index = tuple(np.rint(volume.to_index(place)).astype(int))
            assert volume.voxels[index] == stored[k, row, column] - 1024


def write_series_folder(write_series, orientation: list[int]) -> Path:
    root = write_series(stored_pixels(), SeriesInstanceUID="1.9").parent
    return root / "turned" / "".join(map(str, orientation))


def test_an_oblique_stack_along_its_own_normal_is_read(write_series):
    cos, sin = np.cos(np.radians(15)), np.sin(np.radians(15))
    positions = np.array([0.0, -sin, cos]) * 2.5 * np.arange(5)[:, None]
    volume = read_volume(write_series(stored_pixels(), positions, ImageOrientationPatient=[1, 0, 0, 0, cos, sin]))
    assert volume.spacing_mm == pytest.approx((2.5, 0.8, 0.7))
    np.testing.assert_allclose(volume.to_lps_mm((4, 0, 0)), positions[4], atol=1e-6)


def test_every_slice_is_rescaled_with_its_own_slope_and_intercept(write_series):
    stored = stored_pixels()

    def edit(k, dataset):
        dataset.RescaleSlope, dataset.RescaleIntercept = 0.5 + 0.25 * k, -1000 - k

    hu = [np.rint(plane * (0.5 + 0.25 * k) - 1000 - k) for k, plane in enumerate(stored)]
    np.testing.assert_array_equal(read_volume(write_series(stored, edit=edit)).voxels, hu)


@pytest.mark.parametrize(
    ("padding", "tags"),
    [
        (-2000, {"PixelPaddingValue": -2000}),
        (-2000, {}),
        (-2048, {}),
        (-3024, {}),
        (-1500, {"PixelPaddingValue": -1490, "PixelPaddingRangeLimit": -1510}),
        (32767, {"PixelPaddingValue": 32767}),
    ],
)
def test_what_the_scanner_did_not_measure_becomes_air(write_series, padding, tags):
    stored = stored_pixels().astype(np.int16) - 1000
    stored[:, :2] = padding
    volume = read_volume(write_series(stored, RescaleIntercept=0, **tags))
    assert (volume.voxels[:, :2] == -1024).all()
    np.testing.assert_array_equal(volume.voxels[:, 2:], stored[:, 2:])


def test_a_signed_padding_written_as_unsigned_becomes_air(write_series):
    stored = np.full(SHAPE, 100, np.int16)
    stored[:, 0] = -2000

    def edit(k, dataset):
        dataset.add_new("PixelPaddingValue", "US", 63536)

    volume = read_volume(write_series(stored, edit=edit))
    assert (volume.voxels[:, 0] == -1024).all()
    assert (volume.voxels[:, 1:] == 100 - 1024).all()


def test_a_padding_value_that_tissue_has_too_is_padding_at_the_frame_only(write_series):
    stored = np.full(SHAPE, 100, np.int16)
    stored[:, 0], stored[:, 3, 3] = 0, 0
    volume = read_volume(write_series(stored, RescaleIntercept=0, PixelPaddingValue=0))
    assert (volume.voxels[:, 0] == -1024).all()
    assert (volume.voxels[:, 3, 3] == 0).all()


def test_rle_is_read(write_series):
    stored = stored_pixels()
    folder = write_series(stored, edit=lambda k, dataset: dataset.compress(RLELossless, generate_instance_uid=False))
    np.testing.assert_array_equal(read_volume(folder).voxels, stored.astype(np.int16) - 1024)


@pytest.mark.parametrize(("compressor", "syntax"), [("JPEG2000", JPEG2000Lossless), ("JPEG", JPEGLosslessSV1)])
def test_slices_that_gdcm_compressed_are_read(write_series, compressor, syntax):
    stored = stored_pixels(shape=(3, 32, 32))
    folder = write_series(stored)
    for path in folder.iterdir():
        compress_with_gdcm(path, compressor)
        assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(read_volume(folder).voxels, stored.astype(np.int16) - 1024)


@pytest.mark.parametrize(
    ("command", "syntax"),
    [
        (["dcmcrle"], RLELossless),
        (["dcmcjpeg", "+el"], JPEGLossless),
        (["dcmcjpeg", "+e1"], JPEGLosslessSV1),
        (["dcmcjpls", "+el"], JPEGLSLossless),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value.name,
)
@pytest.mark.parametrize("kind", ["unsigned 12 bit", "unsigned 16 bit", "signed 16 bit"])
def test_slices_that_dcmtk_compressed_without_loss_are_the_same_voxels(write_series, command, syntax, kind):
    stored, tags = stored_pixels(shape=(2, 24, 20)), {}
    if kind == "unsigned 12 bit":
        tags = {"BitsStored": 12, "HighBit": 11}
    elif kind == "signed 16 bit":
        stored, tags = stored.astype(np.int16) - 1024, {"RescaleIntercept": 0}
        stored[:, 0] = -2000
    folder = write_series(stored, RescaleSlope=1, **tags)
    plain = read_volume(folder)
    for path in folder.iterdir():
        dcmtk(*command, path, path.with_suffix(".out"))
        path.with_suffix(".out").rename(path)
        assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == syntax
    compressed = read_volume(folder)
    np.testing.assert_array_equal(compressed.voxels, plain.voxels)
    assert compressed.source.facts.lossy == ""


def dcmtk(*command: object) -> None:
    """One of dcmtk's programs: codecs that share nothing with GDCM's and pydicom's."""
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not installed (Debian package dcmtk)")
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


def test_near_lossless_slices_are_read_within_their_error_and_marked(write_series):
    stored = stored_pixels(shape=(2, 24, 20))
    folder = write_series(stored)
    for path in folder.iterdir():
        dcmtk("dcmcjpls", "+en", "+md", "3", path, path.with_suffix(".out"))
        path.with_suffix(".out").rename(path)
    volume = read_volume(folder)
    off = np.abs(volume.voxels - (stored.astype(np.int16) - 1024))
    assert 0 < off.max() <= 3
    assert volume.source.facts.lossy.startswith("JPEG-LS near-lossless")


def test_12_bit_jpeg_is_read_and_marked_as_lossy(write_series):
    smooth = np.add.outer(np.arange(2), np.add.outer(np.linspace(0, 900, 64), np.linspace(0, 300, 64)))
    stored = (smooth + 200).astype(np.uint16)
    folder = write_series(stored, BitsStored=12, HighBit=11)
    for path in folder.iterdir():
        dcmtk("dcmcjpeg", "+ee", "+q", "95", path, path.with_suffix(".out"))
        path.with_suffix(".out").rename(path)
        assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == JPEGExtended12Bit
    volume = read_volume(folder)
    assert np.abs(volume.voxels - (stored.astype(np.int16) - 1024)).max() < 12
    assert volume.source.facts.lossy.startswith("JPEG, ")


def test_deflated_slices_are_read(write_series):
    folder = write_series(stored_pixels())
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        dataset.save_as(path)
    np.testing.assert_array_equal(read_volume(folder).voxels, stored_pixels().astype(np.int16) - 1024)


@pytest.mark.parametrize("marked", [True, False])
def test_lossy_jpeg_2000_is_read_and_marked_whether_or_not_the_header_says_so(write_series, marked):
    """Encoded by Pillow's OpenJPEG at 8:1; the mark of PS3.3 C.7.6.1.1.5 says method and ratio."""
    smooth = np.add.outer(np.arange(2), np.add.outer(np.linspace(0, 900, 64), np.linspace(0, 300, 64)))
    stored = (smooth + 200).astype(np.uint16)

    def edit(k, dataset):
        buffer = io.BytesIO()
        image = Image.fromarray(stored[k])
        image.save(buffer, "JPEG2000", irreversible=True, quality_layers=[8], no_jp2=True)
        dataset.file_meta.TransferSyntaxUID = JPEG2000
        dataset.PixelData = encapsulate([buffer.getvalue()])
        dataset["PixelData"].is_undefined_length = True
        if marked:
            dataset.LossyImageCompression = "01"
            dataset.LossyImageCompressionMethod, dataset.LossyImageCompressionRatio = "ISO_15444_1", 8.1

    volume = read_volume(write_series(stored, edit=edit))
    assert np.abs(volume.voxels - (stored.astype(np.int16) - 1024)).max() < 12
    assert volume.source.facts.lossy == ("JPEG 2000, 8:1" if marked else "JPEG 2000")


def test_loss_is_told_also_after_the_pixels_were_decompressed(write_series):
    folder = write_series(stored_pixels(), LossyImageCompression="01", LossyImageCompressionRatio=[4, 12])
    assert read_volume(folder).source.facts.lossy == "an unknown method, 12:1"


# DICOM: enhanced multi-frame CT


def test_enhanced_ct_that_highdicom_converted_is_the_same_volume(write_series, tmp_path):
    stored = stored_pixels(shape=(5, 16, 12))
    folder = write_series(stored, **LEGACY)
    plain = read_volume(folder)
    instances = sorted((pydicom.dcmread(path) for path in folder.iterdir()), key=lambda one: one.InstanceNumber)
    enhanced = LegacyConvertedEnhancedCTImage(instances, generate_uid(), 1, generate_uid(), 1)
    (tmp_path / "enhanced").mkdir()
    enhanced.save_as(tmp_path / "enhanced" / "one", enforce_file_format=True)
    volume = read_volume(tmp_path / "enhanced")
    np.testing.assert_array_equal(volume.voxels, plain.voxels)
    np.testing.assert_allclose(volume.affine, plain.affine)
    assert {instance.sop_instance_uid for instance in volume.source.instances} == {enhanced.SOPInstanceUID}
    for k, instance in enumerate(volume.source.instances):
        group = enhanced.PerFrameFunctionalGroupsSequence[instance.frame - 1]
        assert tuple(group.PlanePositionSequence[0].ImagePositionPatient) == instance.position_mm
        assert instance.position_mm[2] == pytest.approx(plain.slice_z_mm[k])


LEGACY = {
    "PatientName": "A^B", "PatientID": "1", "PatientBirthDate": "", "PatientSex": "", "StudyDate": "20250101",
    "StudyTime": "120000", "StudyID": "1", "AccessionNumber": "", "ReferringPhysicianName": "",
    "FrameOfReferenceUID": "1.2.9", "SeriesDate": "20250101", "SeriesTime": "120000", "ContentDate": "20250101",
    "ContentTime": "120000", "AcquisitionDate": "20250101", "AcquisitionTime": "120000", "Manufacturer": "M",
    "ManufacturerModelName": "M", "DeviceSerialNumber": "1", "SoftwareVersions": "1", "SliceThickness": 2.5,
    "BodyPartExamined": "CHEST", "PositionReferenceIndicator": "", "PatientPosition": "HFS", "Laterality": "",
    "AcquisitionNumber": 1,
}  # fmt: skip


def enhanced_dataset(write_series, stored: np.ndarray, order: list[int]) -> pydicom.Dataset:
    """Frames in any ``order``, each with a rescale of its own, as PS3.3 A.38.1 lays them out."""
    dataset = pydicom.dcmread(next(write_series(stored[:1]).iterdir()))
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope"):
        delattr(dataset, keyword)
    del dataset.RescaleIntercept
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    dataset.NumberOfFrames = len(order)
    shared = pydicom.Dataset()
    shared.PixelMeasuresSequence = [pydicom.Dataset()]
    shared.PixelMeasuresSequence[0].PixelSpacing = [0.8, 0.7]
    shared.PixelMeasuresSequence[0].SliceThickness = 3
    shared.PlaneOrientationSequence = [pydicom.Dataset()]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.SharedFunctionalGroupsSequence = [shared]
    dataset.PerFrameFunctionalGroupsSequence = []
    for k in order:
        group = pydicom.Dataset()
        group.PlanePositionSequence = [pydicom.Dataset()]
        group.PlanePositionSequence[0].ImagePositionPatient = [-100, -120, -300 + 2.5 * k]
        group.PixelValueTransformationSequence = [pydicom.Dataset()]
        group.PixelValueTransformationSequence[0].RescaleSlope = 1 + k % 2
        group.PixelValueTransformationSequence[0].RescaleIntercept = -1000 - k
        group.CTImageFrameTypeSequence = [pydicom.Dataset()]
        group.CTImageFrameTypeSequence[0].FrameType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
        dataset.PerFrameFunctionalGroupsSequence.append(group)
    dataset.PixelData = stored[order].tobytes()
    return dataset


@pytest.mark.parametrize("compression", [None, "dcmcrle", "dcmcjpeg", "dcmcjpls"])
def test_every_frame_of_an_enhanced_ct_has_its_own_place_and_rescale(write_series, tmp_path, compression):
    stored = stored_pixels(shape=(4, 16, 12))
    dataset = enhanced_dataset(write_series, stored, order=[2, 0, 3, 1])
    path = tmp_path / "enhanced" / "file.dcm"
    path.parent.mkdir()
    dataset.save_as(path, enforce_file_format=True)
    if compression:
        dcmtk(compression, path, path.with_suffix(".out"))
        path.with_suffix(".out").rename(path)
    volume = read_volume(path.parent)
    expected = [stored[k].astype(int) * (1 + k % 2) - 1000 - k for k in range(4)]
    np.testing.assert_array_equal(volume.voxels, np.maximum(expected, -1024))
    np.testing.assert_allclose(volume.affine, axial_affine((2.5, 0.8, 0.7), (-100.0, -120.0, -300.0)))
    assert [instance.frame for instance in volume.source.instances] == [2, 4, 1, 3]
    assert volume.source.facts.thickness_mm == 3
    (header,) = volume.source.datasets()
    assert header.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient[2] == -295


def test_a_part_of_a_concatenation_is_refused(write_series, tmp_path):
    dataset = enhanced_dataset(write_series, stored_pixels(), order=[0, 1, 2])
    dataset.ConcatenationUID, dataset.InConcatenationNumber, dataset.InConcatenationTotalNumber = "1.2.3", 1, 2
    (tmp_path / "enhanced").mkdir()
    dataset.save_as(tmp_path / "enhanced" / "one", enforce_file_format=True)
    with pytest.raises(InputError, match="one part of a concatenation"):
        read_volume(tmp_path / "enhanced")


def compress_with_gdcm(path: Path, compressor: str) -> None:
    plain = pydicom.dcmread(path)
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.UseCompressionOn()
    writer.SetCompressor(compressor)
    writer.SetFileName(str(path.with_suffix(".jpg.dcm")))
    writer.Execute(sitk.GetImageFromArray(plain.pixel_array[None]))
    compressed = pydicom.dcmread(path.with_suffix(".jpg.dcm"))
    path.with_suffix(".jpg.dcm").unlink()
    plain.file_meta.TransferSyntaxUID = compressed.file_meta.TransferSyntaxUID
    plain.PixelData = compressed.PixelData
    plain["PixelData"].is_undefined_length = True
    plain.save_as(path)


def test_files_that_are_no_slices_are_skipped_also_in_nested_folders(write_series):
    folder = write_series(stored_pixels())
    write_series(stored_pixels(1)[:3], folder=folder / "deep" / "er", SeriesInstanceUID="1.2.900")
    (folder / "DICOMDIR").write_bytes(dicomdir_bytes())
    (folder / "README.txt").write_text("not DICOM")
    (folder / "empty").touch()
    (folder / "deep" / "thumbs.db").write_bytes(os.urandom(300))
    assert read_volume(folder).name == "series 1.2.840"
    (folder / "nested").mkdir()
    for path in folder.glob("1_2_840*"):
        path.rename(folder / "nested" / path.name)
    assert read_volume(folder).shape == SHAPE


def dicomdir_bytes() -> bytes:
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset = pydicom.Dataset()
    dataset.file_meta = meta
    dataset.FileSetID = "SET"
    buffer = pydicom.filebase.DicomBytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def test_of_several_series_the_largest_axial_ct_is_taken_and_the_choice_logged(write_series, caplog):
    folder = write_series(stored_pixels())
    write_series(stored_pixels()[:4], folder=folder, SeriesInstanceUID="1.2.841")
    longer = stored_pixels(shape=(9, 6, 7))
    sideways = np.array([[-2.0 * k, 0, 0] for k in range(9)])
    coronal = {"SeriesInstanceUID": "1.2.842", "ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}
    write_series(longer, sideways, folder, **coronal)
    write_series(longer, folder=folder, SeriesInstanceUID="1.2.843", Modality="PT")
    write_series(longer, folder=folder, SeriesInstanceUID="1.2.844", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    with caplog.at_level(logging.INFO, "pe_app"):
        assert read_volume(folder).name == "series 1.2.840"
    assert "took series 1.2.840 (5 slices)" in caplog.text
    assert read_volume(folder, series="1.2.841").shape[0] == 4


def test_real_ct_equals_what_pydicom_reads_slice_by_slice(real_data):
    folder = real_data / "slab_lidc0002" / "dicom"
    slices = sorted((pydicom.dcmread(path) for path in folder.iterdir()), key=lambda one: one.ImagePositionPatient[2])
    expected = [
        np.maximum(one.pixel_array * float(one.RescaleSlope) + float(one.RescaleIntercept), -1024) for one in slices
    ]
    volume = read_volume(folder)
    np.testing.assert_array_equal(volume.voxels, expected)
    np.testing.assert_allclose(volume.slice_z_mm, [one.ImagePositionPatient[2] for one in slices], atol=1e-4)


def test_real_ct_with_odd_headers_keeps_its_hu_and_loses_its_padding(real_data):
    volume = read_volume(real_data / "slices_lungmask_contrast")
    assert volume.shape == (2, 512, 512)
    assert volume.voxels.min() == -1024


# DICOM: what is refused


def test_missing_slice_is_refused_and_located():
    positions = np.array([0.0, 2.5, 5.0, 12.5, 15.0])
    message = (
        "series 1.2.840: slices are 2.50 mm apart, but 7.50 mm between slice 3 and 4 of 5; some are missing: "
        "export the whole series again"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        check_uniform_spacing(positions, "series 1.2.840")


def test_positions_rounded_to_a_tenth_of_a_millimetre_are_uniform():
    assert check_uniform_spacing(np.round(np.arange(100) * 0.625, 1), "x") == pytest.approx(0.625, abs=0.002)


@pytest.mark.parametrize("slices", [3, 4, 30])
@given(data=st.data())
@settings(max_examples=10)
def test_any_slice_taken_out_is_noticed(slices, data):
    gone = data.draw(st.integers(1, slices - 1))
    positions = np.delete(np.arange(slices + 1) * data.draw(st.floats(0.3, 10)), gone)
    with pytest.raises(InputError, match=f"between slice {gone} and {gone + 1} of {slices}"):
        check_uniform_spacing(positions, "x")


def z_positions(*z_mm: float) -> np.ndarray:
    return np.array([[-100.0, -120.0, z] for z in z_mm])


SIDE = [0, 1, 0, 0, 0, -1]


@pytest.mark.parametrize(
    ("positions", "tags", "message"),
    [
        (z_positions(0, 2.5, 5, 12.5, 15), {}, r"7\.50 mm between slice 3 and 4 of 5; some are missing"),
        (z_positions(0, 2.5, 2.5, 5, 7.5), {}, r"slice 2 and 3 of 5 lie at the same position \(2\.50 mm\)"),
        (np.array([[0, 0.6 * k, 2.5 * k] for k in range(5)]), {}, r"tilted by 13\.5 degrees"),
        (np.array([[0, 3.0 * (k == 2), 2.5 * k] for k in range(5)]), {}, r"slice 3 of 5 is \d\.\d+ mm aside"),
        (None, {"ImageOrientationPatient": SIDE}, "not axial"),
        (None, {"ImagePositionPatient": None}, "lacks a valid position"),
        (None, {"ImageOrientationPatient": None}, "lacks a valid position, orientation"),
        (None, {"PixelSpacing": None}, "pixel spacing"),
        (None, {"PixelSpacing": [0, 0]}, "pixel spacing"),
        (None, {"Modality": "MR"}, "modality is MR, not CT"),
        (None, {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
        (None, {"NumberOfFrames": 3}, "share one file"),
        (None, {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "BitsAllocated": 8}, "colour"),
        (None, {"RescaleSlope": None}, r"slice 1 of 5 .*no rescale slope"),
        (None, {"RescaleIntercept": 1e9}, r"values run from 32767 to 32767, these are not HU"),
        (None, {"RescaleIntercept": 0}, r"values run from \d+ to \d+, these are not HU"),
        (None, {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0}, r"a CT has 16 bits a pixel, this one 1"),
        (z_positions(*(1e7 + 2.5 * k for k in range(5))), {}, "lacks a valid position"),
    ],
)
def test_a_series_that_is_no_complete_upright_ct_is_refused(write_series, positions, tags, message):
    with pytest.raises(InputError, match=message) as refusal:
        read_volume(write_series(stored_pixels(), positions, **tags))
    assert "series 1.2.840" in str(refusal.value)


@pytest.mark.parametrize(
    ("positions", "tags", "code"),
    [
        (z_positions(0, 2.5, 5, 12.5, 15), {}, "uneven_spacing"),
        (z_positions(0, 2.5, 2.5, 5, 7.5), {}, "uneven_spacing"),
        (z_positions(0, 2.5, 2.6, 5, 7.5), {}, "uneven_spacing"),
        (z_positions(0, 0, 2.5, 2.5, 5), {}, "mixed_series"),
        (np.array([[0, 0.6 * k, 2.5 * k] for k in range(5)]), {}, "tilted"),
        (np.array([[0, 3.0 * (k == 2), 2.5 * k] for k in range(5)]), {}, "mixed_series"),
        (None, {"ImageOrientationPatient": SIDE}, "derived"),
        (None, {"Modality": "MR"}, "not_ct"),
        (None, {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "derived"),
    ],
)
def test_whole_files_that_are_no_ct_for_the_method_are_refused_with_a_code(write_series, positions, tags, code):
    with pytest.raises(UnfitStudy) as refusal:
        read_volume(write_series(stored_pixels(), positions, **tags))
    assert refusal.value.code == code
    again = pickle.loads(pickle.dumps(refusal.value))  # it comes back from other processes
    assert (again.code, str(again)) == (code, str(refusal.value))


@pytest.mark.parametrize("tags", [{"ImagePositionPatient": None}, {"RescaleSlope": None}])
def test_what_is_damaged_has_no_code(write_series, tags):
    with pytest.raises(InputError) as refusal:
        read_volume(write_series(stored_pixels(), **tags))
    assert not isinstance(refusal.value, UnfitStudy)


def test_copies_of_a_slice_are_taken_once_and_counted(write_series):
    folder = write_series(stored_pixels())
    for path in sorted(folder.iterdir())[:2]:
        shutil.copyfile(path, path.with_name(f"copy of {path.name}"))
    volume = read_volume(folder)
    np.testing.assert_array_equal(volume.voxels, stored_pixels().astype(np.int16) - 1024)
    assert volume.source.facts.repeated == 2


def test_two_patients_under_one_series_are_told(write_series):
    def edit(k, dataset):
        dataset.PatientID = "A" if k < 3 else "B"

    with pytest.raises(UnfitStudy, match="slice 1 and 4 of 5 name different patients") as refusal:
        read_volume(write_series(stored_pixels(), edit=edit))
    assert refusal.value.code == "mixed_series"


def test_other_patients_in_the_folder_are_counted(write_series):
    folder = write_series(stored_pixels(), PatientID="A")
    write_series(stored_pixels()[:3], folder=folder, SeriesInstanceUID="1.2.9", PatientID="B")
    assert read_volume(folder).source.facts.neighbours == 1


def test_a_projection_is_not_taken_for_the_largest_series(write_series):
    folder = write_series(stored_pixels(), SeriesDescription="PE 1.0")
    longer = stored_pixels(shape=(9, 6, 7))
    write_series(longer, folder=folder, SeriesInstanceUID="1.2.9", SeriesDescription="PE MIP 8/1")
    assert read_volume(folder).source.facts.description == "PE 1.0"


def test_the_source_tells_patient_series_and_instances(write_series):
    folder = write_series(stored_pixels(), PatientID="P7", PatientName="Müller^Ä", SpecificCharacterSet="ISO_IR 100")
    source = read_volume(folder).source
    by_uid = {one.SOPInstanceUID: one for one in map(pydicom.dcmread, folder.iterdir())}
    assert [by_uid[one.sop_instance_uid].ImagePositionPatient[2] for one in source.instances] == [
        -300 + 2.5 * k for k in range(5)
    ]
    for header, instance in zip(source.datasets(), source.instances, strict=True):
        original = by_uid[instance.sop_instance_uid]
        for keyword in ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "PixelSpacing", "Rows"):
            assert header[keyword].value == original[keyword].value
        assert str(header.PatientName) == "Müller^Ä"


@pytest.mark.parametrize(
    ("keyword", "value", "message"),
    [
        (
            "ImageOrientationPatient",
            [0.98, 0.199, 0, -0.199, 0.98, 0],
            "slice 1 and 4 of 5 have different orientations",
        ),
        ("PixelSpacing", [0.9, 0.7], r"slice 4 of 5 0\.90 x 0\.70 mm"),
        ("Rows", 5, "slice 4 of 5 has 5x7"),
        ("SamplesPerPixel", 3, "colour"),
        ("Modality", "PT", "modality is PT"),
    ],
)
def test_one_slice_unlike_the_others_is_refused_and_located(write_series, keyword, value, message):
    def edit(k, dataset):
        if k == 3:
            setattr(dataset, keyword, value)

    with pytest.raises(InputError, match=message):
        read_volume(write_series(stored_pixels(), edit=edit))


def test_a_single_slice_is_no_study(write_series):
    with pytest.raises(InputError, match="single slice"):
        read_volume(write_series(stored_pixels()[:1]))


def test_slices_of_many_patients_are_no_study(real_data):
    with pytest.raises(InputError, match=r"single slice.*22 series more"):
        read_volume(real_data / "slices_tcga_luad")


def test_one_dicom_file_is_told_to_be_one_slice(write_series):
    path = next(write_series(stored_pixels()).iterdir())
    with pytest.raises(InputError, match="a study needs the folder"):
        read_volume(path)
    with pytest.raises(InputError, match="a study needs the folder"):
        read_volume(path.rename(path.with_suffix(".dcm")))


def test_a_series_that_is_not_there_is_named_with_those_that_are(write_series):
    with pytest.raises(InputError, match=r"no series 9\.9; there are 1: 1\.2\.840"):
        read_volume(write_series(stored_pixels()), series="9.9")


@pytest.mark.parametrize("kept", [0.99, 0.5])
def test_a_slice_that_is_cut_off_is_refused_by_name(write_series, kept):
    folder = write_series(stored_pixels(shape=(4, 32, 32)))
    path = sorted(folder.iterdir())[2]
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(InputError, match=path.name):
        read_volume(folder)


@pytest.mark.filterwarnings("ignore:End of file")
def test_a_compressed_slice_that_is_cut_off_is_refused(write_series):
    stored = stored_pixels(shape=(4, 32, 32))
    folder = write_series(stored, edit=lambda k, dataset: dataset.compress(RLELossless, generate_instance_uid=False))
    path = sorted(folder.iterdir())[1]
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(InputError, match=path.name):
        read_volume(folder)


def test_folders_without_slices_are_refused(tmp_path):
    for path, message in ((tmp_path, "empty"), (tmp_path / "none", "no such file")):
        with pytest.raises(InputError, match=message):
            read_volume(path)
    (tmp_path / "notes.txt").write_text("x" * 200)
    with pytest.raises(InputError, match="none of the 1 files is DICOM"):
        read_volume(tmp_path)
    with pytest.raises(InputError, match="expected a DICOM folder or a file"):
        read_volume(tmp_path / "notes.txt")
    (tmp_path / "notes.txt").unlink()
    (tmp_path / "DICOMDIR").write_bytes(dicomdir_bytes())
    with pytest.raises(InputError, match="none of the 1 DICOM files is an image"):
        read_volume(tmp_path)


# NIfTI and NRRD: what is read


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "SPL", "AIR", "PSR"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_nifti_of_any_axes_is_laid_where_nibabel_lays_it(tmp_path, axes, suffix):
    source = hu_volume()
    image = nib.Nifti1Image(source.voxels.transpose(2, 1, 0), RAS @ source.affine[:, [2, 1, 0, 3]])
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes))
    nib.save(image.as_reoriented(turn), tmp_path / f"ct{suffix}")
    volume = read_volume(tmp_path / f"ct{suffix}")
    np.testing.assert_array_equal(volume.voxels, source.voxels)
    np.testing.assert_allclose(volume.affine, source.affine, atol=1e-3)
    assert volume.sha256 == source.sha256


@pytest.mark.parametrize("space", ["left-posterior-superior", "right-anterior-superior", "RAS"])
@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_an_nrrd_of_any_space_is_laid_where_pynrrd_says(tmp_path, space, encoding):
    source = hu_volume()
    matrix = source.affine if space.startswith("left") else RAS @ source.affine
    header = {
        "space": space,
        "space directions": matrix[:3, [0, 2, 1]].T,  # (slice, column, row): an order that is not ITK's
        "space origin": matrix[:3, 3],
        "kinds": ["domain"] * 3,
        "encoding": encoding,
    }
    nrrd.write(str(tmp_path / "ct.nrrd"), source.voxels.transpose(0, 2, 1), header)
    volume = read_volume(tmp_path / "ct.nrrd")
    np.testing.assert_array_equal(volume.voxels, source.voxels)
    np.testing.assert_allclose(volume.affine, source.affine, atol=1e-6)


def test_hu_are_rounded_to_whole_numbers_and_padding_is_air(tmp_path):
    array = np.full((4, 5, 6), -999.6, np.float32)
    array[0], array[1] = -3024.0, 40.4
    values = read_volume(write_nifti(tmp_path / "ct.nii", array)).voxels
    assert values.dtype == np.int16
    assert set(np.unique(values)) == {-1024, -1000, 40}


def test_dicom_and_its_conversion_are_the_same_image(write_series, tmp_path):
    volume = read_volume(write_series(stored_pixels()))
    for name in ("ct.nii.gz", "ct.nrrd", "ct.nii"):
        write_volume(volume, tmp_path / name)
        again = read_volume(tmp_path / name)
        assert again.sha256 == volume.sha256
        assert again.same_grid(volume)
        assert again.name == name


# NIfTI and NRRD: what is refused


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.random.default_rng(0).integers(0, 256, (5, 6, 7)).astype(np.uint8), "run from 0 to 255, these are not HU"),
        (np.linspace(0, 1, 210, dtype=np.float32).reshape(5, 6, 7), "run from 0 to 1, these are not HU"),
        (np.linspace(-1, 1, 210, dtype=np.float32).reshape(5, 6, 7), "these are not HU"),
        (np.linspace(0, 4095, 210).reshape(5, 6, 7).astype(np.int16), "these are not HU"),
        (np.linspace(-1000, 1e5, 210, dtype=np.float32).reshape(5, 6, 7), "these are not HU"),
        (np.where(np.arange(210).reshape(5, 6, 7) == 77, np.nan, -500.0), "NaN"),
        (np.where(np.arange(210).reshape(5, 6, 7) == 77, -np.inf, -500.0), "infinite"),
        (np.full((5, 6), -1000, np.int16), "2 dimensions"),
        (np.full((5, 6, 7, 2), -1000, np.int16), "4 dimensions"),
        (np.full((5, 6, 1), -1000, np.int16), "single slice"),
        (np.full((5, 6, 7), -1000 + 0j), "2 numbers a voxel"),
        (np.zeros((5, 6, 7), [("R", "u1"), ("G", "u1"), ("B", "u1")]), "3 numbers a voxel"),
    ],
)
def test_numbers_that_are_no_ct_are_refused(tmp_path, array, message):
    with pytest.raises(InputError, match=f"ct.nii.gz: .*{message}"):
        read_volume(write_nifti(tmp_path / "ct.nii.gz", array))


SHEARED = np.array([[-0.7, 0, 0.5, 0], [0, -0.7, 0, 0], [0, 0, 2.5, 0], [0, 0, 0, 1.0]])


@pytest.mark.parametrize("qform_code", [0, 1])
@pytest.mark.parametrize(
    "sform",
    [
        SHEARED,
        np.diag([-0.7, -0.7, 0, 1]),
        np.diag([-0.7, np.nan, 2.5, 1]),
        np.diag([-0.7e3, -0.7e3, 2.5e3, 1]),
        np.diag([-0.7e-3, -0.7e-3, 2.5e-3, 1]),
    ],
    ids=["sheared", "singular", "nan", "metres", "micrometres"],
)
def test_an_absurd_affine_is_refused(tmp_path, sform, qform_code):
    image = nib.Nifti1Image(np.full((5, 6, 7), -1000, np.int16), None)
    image.header["sform_code"], image.header["qform_code"] = 1, qform_code
    for row, name in zip(sform, ("srow_x", "srow_y", "srow_z"), strict=False):
        image.header[name] = row
    nib.save(image, tmp_path / "ct.nii")
    with pytest.raises(InputError, match=r"^ct\.nii: "):
        read_volume(tmp_path / "ct.nii")


def test_where_sform_and_qform_disagree_the_sform_places_the_image_as_in_nibabel(tmp_path):
    array = np.random.default_rng(5).integers(-1000, 0, (5, 6, 7)).astype(np.int16)
    image = nib.Nifti1Image(array, None)
    image.set_qform(np.diag([0.7, 0.8, 2.5, 1]), 2)
    image.set_sform(np.diag([-0.7, -0.8, 2.5, 1]), 2)
    nib.save(image, tmp_path / "ct.nii")
    volume = read_volume(tmp_path / "ct.nii")
    np.testing.assert_array_equal(volume.voxels, array.transpose(2, 1, 0))
    np.testing.assert_allclose((RAS @ nib.load(tmp_path / "ct.nii").affine)[:, [2, 1, 0, 3]], volume.affine)


def test_a_nifti_without_a_place_is_refused(tmp_path):
    nib.save(nib.Nifti1Image(np.full((5, 6, 7), -1000, np.int16), None), tmp_path / "ct.nii")
    with pytest.raises(InputError, match="left and right are unknown"):
        read_volume(tmp_path / "ct.nii")


@pytest.mark.parametrize("kept", [0.98, 0.5, 0.05])
@pytest.mark.parametrize("name", ["ct.nii", "ct.nii.gz", "ct.nrrd", "raw.nrrd"])
def test_a_file_that_is_cut_off_is_refused(tmp_path, name, kept):
    path = tmp_path / name
    if name == "raw.nrrd":
        sitk.WriteImage(image_from_volume(hu_volume()), str(path), useCompression=False)
    else:
        write_volume(hu_volume(), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(InputError, match=name):
        read_volume(path)


@pytest.mark.parametrize("name", ["ct.nii.gz", "ct.nrrd"])
def test_a_flipped_bit_in_compressed_voxels_is_noticed(tmp_path, name):
    write_volume(hu_volume(), tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for at in range(len(content) - 200, len(content), 23):
        damaged = bytearray(content)
        damaged[at] ^= 0x10
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(InputError, match=name):
            read_volume(tmp_path / name)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"space: left-posterior-superior\n", b"space: scanner-xyz\n", "no space"),
        (b"space: left-posterior-superior\n", b"", "no space"),
        (b"encoding: gzip\n", b"encoding: gzip\ndata file: /etc/passwd\n", "in another file"),
        (b"sizes: 7 6 5\n", b"sizes: 70000 60000 50000\n", "cannot be|cut off|not read"),
        (b"NRRD000", b"LRRD000", "not an NRRD"),
    ],
)
def test_an_nrrd_header_that_cannot_be_trusted_is_refused(tmp_path, old, new, message):
    path = tmp_path / "ct.nrrd"
    write_volume(hu_volume(), path)
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    with pytest.raises(InputError, match=message):
        read_volume(path)


def test_a_file_has_no_series_to_choose(tmp_path):
    write_volume(hu_volume(), tmp_path / "ct.nrrd")
    with pytest.raises(InputError, match=r"no series 1\.2"):
        read_volume(tmp_path / "ct.nrrd", series="1.2")


DAMAGE = st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=4)


@pytest.mark.parametrize("name", ["ct.nii", "ct.nii.gz", "ct.nrrd", "dicom"])
@given(damage=DAMAGE, kept=st.one_of(st.just(1.0), st.floats(0, 1)), head=st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_a_volume_or_a_sentence(tmp_path, write_series, name, damage, kept, head):
    if name == "dicom":
        folder = tmp_path / "series"
        target, read = next(write_series(stored_pixels()).iterdir()), folder
    else:
        target = read = tmp_path / name
        write_volume(hu_volume(), target)
    content = bytearray(target.read_bytes())
    reach = min(len(content), 1000) if head else len(content)
    for place, byte in damage:
        content[int(place * reach)] = byte
    target.write_bytes(content[: int(kept * len(content))])
    with contextlib.suppress(InputError):
        assert isinstance(read_volume(read), Volume)


# Writing, masks, resampling


@pytest.mark.parametrize("suffix", [".nrrd", ".nii.gz", ".nii"])
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32])
def test_written_volumes_are_read_back_by_nibabel_and_pynrrd(tmp_path, suffix, dtype):
    volume = hu_volume()
    volume = volume.with_voxels((volume.voxels % 200).astype(dtype))
    path = tmp_path / f"map{suffix}"
    write_volume(volume, path)
    if suffix == ".nrrd":
        array, header = nrrd.read(str(path))
        assert header["space"] == "left-posterior-superior"
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = header["space directions"].T, header["space origin"]
    else:
        image = nib.load(path)
        array, affine = np.asarray(image.dataobj), RAS @ image.affine
    assert array.dtype == dtype
    np.testing.assert_array_equal(array.transpose(2, 1, 0), volume.voxels)
    np.testing.assert_allclose(affine[:, [2, 1, 0, 3]], volume.affine, atol=1e-4)
    assert os.listdir(tmp_path) == [path.name]


def test_a_failed_write_leaves_the_former_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "ct.nrrd"
    write_volume(hu_volume(0), path)
    before = path.read_bytes()

    def half_written(image, name, **_):
        Path(name).write_bytes(b"NRRD0004\nhalf")
        raise RuntimeError("disk full")

    monkeypatch.setattr(sitk, "WriteImage", half_written)
    with pytest.raises(InputError, match="cannot be written: disk full"):
        write_volume(hu_volume(1), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["ct.nrrd"]


def test_only_known_endings_are_written(tmp_path):
    with pytest.raises(InputError, match=r"\.nii\.gz, \.nii, \.nrrd"):
        write_volume(hu_volume(), tmp_path / "ct.mha")


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32])
def test_a_mask_of_any_axes_comes_onto_the_grid_of_its_ct(tmp_path, dtype):
    ct = hu_volume()
    labels = np.random.default_rng(4).integers(0, 4, SHAPE)
    image = nib.Nifti1Image(labels.astype(dtype).transpose(2, 1, 0), RAS @ ct.affine[:, [2, 1, 0, 3]])
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt("SAR"))
    nib.save(image.as_reoriented(turn), tmp_path / "mask.nii.gz")
    mask = read_mask(tmp_path / "mask.nii.gz", ct)
    np.testing.assert_array_equal(mask.voxels, labels)
    assert mask.voxels.dtype == np.uint8
    np.testing.assert_array_equal(mask.affine, ct.affine)


def test_a_mask_on_another_grid_or_with_other_numbers_is_refused(tmp_path):
    ct = hu_volume()
    moved = ct.affine.copy()
    moved[2, 3] += 2.5
    path = tmp_path / "mask.nrrd"
    for voxels, affine, message in (
        (np.zeros(SHAPE, np.uint8), moved, r"not on the grid of volume: .*-297\.50 against"),
        (np.zeros((4, 6, 7), np.uint8), ct.affine, r"not on the grid of volume: \(4, 6, 7\) voxels"),
        (np.full(SHAPE, 0.5, np.float32), ct.affine, "whole numbers"),
        (np.full(SHAPE, np.nan, np.float32), ct.affine, "whole numbers"),
        (np.full(SHAPE, -1, np.int16), ct.affine, "whole numbers"),
    ):
        write_volume(Volume(voxels, affine), path)
        with pytest.raises(InputError, match=message):
            read_mask(path, ct)
    with pytest.raises(InputError, match="expected a mask in a file"):
        read_mask(tmp_path / "none.nrrd", ct)


def test_resampling_a_linear_ramp_gives_the_ramp_and_0_outside():
    coarse = Volume(np.zeros((6, 7, 8), np.float32), axial_affine((10.0, 12.0, 11.0), (-40.0, -30.0, -20.0)))
    index = np.stack(np.meshgrid(*map(np.arange, coarse.shape), indexing="ij"), -1)
    slope = np.array([0.5, -0.25, 2.0])
    coarse = coarse.with_voxels((coarse.to_lps_mm(index) @ slope + 500).astype(np.float32))
    fine = Volume(np.zeros((40, 30, 50), np.int16), axial_affine((3.0, 3.0, 3.0), (-55.0, -28.0, -35.0)))
    values = resample_like(coarse, fine)
    assert values.same_grid(fine)
    assert values.voxels.dtype == np.float32
    places = fine.to_lps_mm(np.stack(np.meshgrid(*map(np.arange, fine.shape), indexing="ij"), -1))
    at = coarse.to_index(places)
    inside = ((at >= 0) & (at <= np.array(coarse.shape) - 1)).all(-1)
    outside = ((at < -0.51) | (at > np.array(coarse.shape) - 0.49)).any(-1)
    assert inside.any()
    assert outside.any()
    np.testing.assert_allclose(values.voxels[inside], (places @ slope + 500)[inside], atol=1e-2)
    assert (values.voxels[outside] == 0).all()


def test_whole_numbers_are_rounded_when_resampled_not_cut():
    two = Volume(np.array([[[0, 100]]], np.uint8), axial_affine((1.0, 1.0, 1.0)))
    ten = Volume(np.zeros((1, 1, 8), np.int16), axial_affine((1.0, 1.0, 1 / 7)))
    np.testing.assert_array_equal(resample_like(two, ten).voxels.ravel(), np.rint(np.arange(8) * 100 / 7))


def test_an_image_and_its_volume_agree_with_itk_on_every_corner():
    volume = hu_volume()
    image = image_from_volume(volume)
    for k, row, column in ((0, 0, 0), (4, 5, 6), (2, 0, 6)):
        place = image.TransformIndexToPhysicalPoint((column, row, k))
        np.testing.assert_allclose(volume.to_lps_mm((k, row, column)), place, atol=1e-9)
        assert image[column, row, k] == volume.voxels[k, row, column]
    again = volume_from_image(image, "again")
    np.testing.assert_array_equal(again.voxels, volume.voxels)
    np.testing.assert_allclose(again.affine, volume.affine)


def test_gz_of_several_members_is_read(tmp_path):
    """Parallel gzip writers put several members into one file."""
    write_volume(hu_volume(), tmp_path / "ct.nii")
    content = (tmp_path / "ct.nii").read_bytes()
    (tmp_path / "ct.nii.gz").write_bytes(gzip.compress(content[:300]) + gzip.compress(content[300:]))
    assert read_volume(tmp_path / "ct.nii.gz").sha256 == hu_volume().sha256


def test_an_nrrd_with_sheared_axes_is_refused_as_a_tilted_gantry_is(tmp_path):
    header = {
        "space": "left-posterior-superior",
        "space directions": np.array([[1, 0, 0], [0, 1, 0], [0, np.tan(np.deg2rad(12)), 1]]) * 2.0,
        "space origin": np.zeros(3),
    }
    nrrd.write(str(tmp_path / "ct.nrrd"), np.full((8, 8, 8), -1000, np.int16), header)
    with pytest.raises(InputError, match=r"sheared by 1[12]\.\d degrees"):
        read_volume(tmp_path / "ct.nrrd")


def test_an_nrrd_header_may_be_long(tmp_path):
    header = {"space": "left-posterior-superior", "space directions": np.eye(3), "space origin": np.zeros(3)}
    tags = {f"Segment0_Note{number}": "x" * 500 for number in range(300)}
    nrrd.write(str(tmp_path / "ct.nrrd"), np.full((8, 8, 8), -1000, np.int16), {**header, **tags})
    assert read_volume(tmp_path / "ct.nrrd").shape == (8, 8, 8)


@pytest.mark.parametrize("kept", [0, 60])
def test_an_end_slice_that_is_still_being_copied_is_noticed(write_series, kept):
    folder = write_series(stored_pixels())
    last = max(folder.iterdir())
    last.rename(last.with_suffix(".dcm")).write_bytes(last.with_suffix(".dcm").read_bytes()[:kept])
    with pytest.raises(InputError, match=rf"{last.name}\.dcm: its {kept} bytes"):
        read_volume(folder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (b"space directions: (1,0,0) (0,1,0) (0,0,1)", b"space directions: none none none", "place in the patient"),
        (b"space origin: (0,0,0)", b"space origin: (1e300,0,0)", "its place, .* cannot be"),
    ],
)
def test_an_nrrd_without_a_possible_place_is_refused(tmp_path, field, value, message):
    header = b"NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 8 8 8\n" + (
        b"space directions: (1,0,0) (0,1,0) (0,0,1)\nkinds: domain domain domain\nendian: little\nencoding: raw\n"
        b"space origin: (0,0,0)\n\n"
    )
    voxels = np.full((8, 8, 8), -1000, "<i2").tobytes()
    (tmp_path / "ct.nrrd").write_bytes(header + voxels)
    assert read_volume(tmp_path / "ct.nrrd").shape == (8, 8, 8)
    assert field in header
    (tmp_path / "ct.nrrd").write_bytes(header.replace(field, value) + voxels)
    with pytest.raises(InputError, match=message):
        read_volume(tmp_path / "ct.nrrd")


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("offset", [-1.0, 0.0, 348.0, 1e30, float("nan"), float("inf")])
def test_a_nifti_whose_voxels_cannot_begin_where_it_says_is_refused(tmp_path, offset, ending):
    content = bytearray(write_nifti(tmp_path / "good.nii", np.full((8, 8, 8), -1000, np.int16)).read_bytes())
    assert np.frombuffer(content, "<f4", 1, 108)[0] == 352
    content[108:112] = np.float32(offset).tobytes()
    path = tmp_path / f"ct{ending}"
    path.write_bytes(gzip.compress(content) if ending == ".nii.gz" else content)
    with pytest.raises(InputError, match=r"voxels begin at byte|cannot be read"):
        read_volume(path)
