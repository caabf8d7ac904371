"""Optional parts of the installation."""

from importlib import metadata

import pytest

from pe_app.common.errors import InputError
from pe_app.common.extras import EXTRAS, missing_packages, require_extra


def test_what_is_installed_is_not_missing():
    assert all(missing_packages(extra) == () for extra in EXTRAS)  # the tests' own environment has all


def test_a_missing_package_is_reported_with_the_command(monkeypatch):
    found = metadata.distribution

    def without_highdicom(name: str) -> metadata.Distribution:
        if name == "highdicom":
            raise metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(metadata, "distribution", without_highdicom)
    with pytest.raises(InputError, match=r"results as DICOM objects.*\(highdicom\): pip install 'pe-app\[dicom\]'"):
        require_extra("dicom")
    require_extra("tensorboard")
