"""NIfTI and NRRD files as public sets and other programs write them."""

import bz2

import nibabel as nib
import numpy as np
import pytest

from pe_app.common.errors import InputError
from pe_app.ct.volume_io import read_volume

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def ct() -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 300, (40, 50, 30)).astype(np.int16)


@pytest.mark.parametrize("off", [1e-4, 3e-4, 1e-3, 1e-2])
def test_an_sform_that_a_rounding_took_off_right_angles_places_the_image_as_in_nibabel(tmp_path, off):
    affine = np.diag([-3.0, -3.0, 3.0, 1.0])
    affine[0, 1], affine[:3, 3] = off, (192, 150, -100)
    nib.save(nib.Nifti1Image(ct(), affine), tmp_path / "ct.nii.gz")
    volume = read_volume(tmp_path / "ct.nii.gz")
    np.testing.assert_array_equal(volume.voxels, ct().transpose(2, 1, 0))
    corner = np.array([39.0, 49.0, 29.0, 1.0])
    wanted = RAS_TO_LPS @ nib.load(tmp_path / "ct.nii.gz").affine @ corner
    np.testing.assert_allclose(volume.to_lps_mm((29, 49, 39)), wanted[:3], atol=1e-3)


def test_a_sheared_sform_is_refused_with_its_angle(tmp_path):
    affine = np.diag([-3.0, -3.0, 3.0, 1.0])
    affine[0, 1] = 0.3
    nib.save(nib.Nifti1Image(ct(), affine), tmp_path / "ct.nii.gz")
    with pytest.raises(InputError, match=r"sheared by 5\.7 degrees"):
        read_volume(tmp_path / "ct.nii.gz")


def plain_named_gz(folder):
    nib.save(nib.Nifti1Image(ct(), np.eye(4)), folder / "a.nii")
    return (folder / "a.nii").rename(folder / "plain.nii.gz")


def gz_named_plain(folder):
    nib.save(nib.Nifti1Image(ct(), np.eye(4)), folder / "a.nii.gz")
    return (folder / "a.nii.gz").rename(folder / "packed.nii")


def nifti_2(folder):
    nib.save(nib.Nifti2Image(ct(), np.eye(4)), folder / "two.nii.gz")
    return folder / "two.nii.gz"


def metres(folder):
    image = nib.Nifti1Image(ct(), np.diag([1e-3, 1e-3, 1e-3, 1]))
    image.header.set_xyzt_units("meter", "sec")
    nib.save(image, folder / "m.nii")
    return folder / "m.nii"


def bzipped(folder):
    nib.save(nib.Nifti1Image(ct(), np.eye(4)), folder / "a.nii")
    (folder / "b.nii.gz").write_bytes(bz2.compress((folder / "a.nii").read_bytes()))
    return folder / "b.nii.gz"


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (plain_named_gz, r"plain\.nii\.gz: is not compressed, against its ending: rename it to end in \.nii$"),
        (gz_named_plain, r"packed\.nii: is compressed, against its ending: rename it to end in \.nii\.gz"),
        (nifti_2, r"two\.nii\.gz: is NIfTI-2, which is not read"),
        (metres, r"m\.nii: its places are in metres"),
        (bzipped, r"b\.nii\.gz: is compressed by bzip2"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused_in_our_own_words(tmp_path, write, words):
    with pytest.raises(InputError, match=words):
        read_volume(write(tmp_path))


def nrrd(path, sizes, directions, kinds, voxels, encoding="raw"):
    header = (
        f"NRRD0005\ntype: short\ndimension: {len(sizes.split())}\nspace: left-posterior-superior\nsizes: {sizes}\n"
        f"space directions: {directions}\nkinds: {kinds}\nendian: little\nencoding: {encoding}\n"
        "space origin: (1,2,3)\n\n"
    )
    path.write_bytes(header.encode() + voxels)
    return path


def test_a_list_of_one_volume_is_that_volume(tmp_path):
    voxels = np.ascontiguousarray(ct().transpose(2, 1, 0))
    axes, kinds = "(3,0,0) (0,3,0) (0,0,3)", "domain domain domain"
    plain = nrrd(tmp_path / "3.nrrd", "40 50 30", axes, kinds, voxels.tobytes())
    one = nrrd(tmp_path / "4.nrrd", "1 40 50 30", f"none {axes}", f"list {kinds}", voxels.tobytes())
    first, second = read_volume(plain), read_volume(one)
    np.testing.assert_array_equal(first.voxels, second.voxels)
    np.testing.assert_array_equal(first.affine, second.affine)
    two = nrrd(tmp_path / "5.nrrd", "2 40 50 30", f"none {axes}", f"list {kinds}", voxels.tobytes() * 2)
    with pytest.raises(InputError, match=r"5\.nrrd: holds a list of 2 volumes"):
        read_volume(two)
    packed = nrrd(tmp_path / "6.nrrd", "40 50 30", axes, kinds, bz2.compress(voxels.tobytes()), "bzip2")
    with pytest.raises(InputError, match=r"6\.nrrd: is compressed by bzip2"):
        read_volume(packed)
