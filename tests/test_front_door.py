"""What ``import pe_app`` offers to scripts and notebooks."""

import inspect
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

import pe_app
from pe_app.ct.slabs import SlabConfig
from pe_app.ct.volume import Volume, axial_affine
from pe_app.model.detector import Detector
from pe_app.model.slab_encoder import EncoderConfig
from pe_app.model.study_classifier import ClassifierConfig
from pe_app.phantom import PhantomConfig, make_phantom

NAMES = (
    *("detect", "read_volume", "write_volume", "Volume", "Detector", "Detection", "SparseAnnotation", "Study"),
    *("read_studies", "train_encoder", "train_classifier", "evaluate", "label_report", "make_phantom", "InputError"),
)


@pytest.fixture(scope="module")
def small_model() -> Detector:
    slabs = SlabConfig(matrix=128, crop=64, slab_count=10)
    return Detector.untrained(0, slabs, EncoderConfig(width=8), ClassifierConfig(64, 4, 4))


def test_importing_the_package_loads_neither_torch_nor_simpleitk_nor_numpy():
    script = "import sys, pe_app; print(*(n for n in ('torch', 'SimpleITK', 'numpy', 'typer') if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_public_name_is_there_documented_and_listed():
    for name in NAMES:
        assert inspect.getdoc(getattr(pe_app, name)), name
        assert name in dir(pe_app)


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_thing"):
        pe_app.no_such_thing  # noqa: B018


def test_type_checkers_and_the_interpreter_know_the_same_names():
    typed = inspect.getsource(pe_app).partition("if TYPE_CHECKING:")[2].partition("\n\n")[0]
    assert sorted(line.rpartition(" as ")[2] for line in typed.strip().splitlines()) == sorted(NAMES)


def test_the_package_carries_its_types_its_weights_and_their_card():
    here = resources.files("pe_app")
    for name in ("py.typed", "weights/starter.safetensors", "weights/MODEL_CARD.md"):
        assert here.joinpath(name).is_file()


def test_a_path_and_its_volume_give_the_same_detection(small_model, tmp_path):
    phantom = make_phantom(np.random.default_rng(8), PhantomConfig(matrix=128, spacing_mm=4.0), positive=True)
    pe_app.write_volume(phantom.volume, str(tmp_path / "study.nrrd"))
    small_model.save(tmp_path / "m.safetensors")
    by_path = pe_app.detect(str(tmp_path / "study.nrrd"), model=str(tmp_path / "m.safetensors"))
    by_volume = pe_app.detect(phantom.volume, model=small_model)
    assert by_path.detection.status == "analysed"
    assert by_path.detection.probability == by_volume.detection.probability
    assert np.array_equal(by_path.attention.voxels, by_volume.attention.voxels)


def test_a_study_that_the_method_is_not_for_is_a_result_and_a_missing_one_an_error(small_model, tmp_path):
    water = np.random.default_rng(0).normal(0, 20, (60, 128, 128)).astype(np.int16)
    refused = pe_app.detect(Volume(water, axial_affine((3.0, 2.5, 2.5))), model=small_model)
    assert (refused.detection.status, refused.attention) == ("refused", None)
    with pytest.raises(pe_app.InputError, match="nowhere"):
        pe_app.detect(tmp_path / "nowhere", model=small_model)


def test_an_installation_has_every_folder_of_code():
    root = Path(pe_app.__file__).parents[1]
    declared = set(
        tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    )
    app = root / "apps" / "pulmonary_embolism"
    folders = {
        ".".join(name)
        for base, first in ((root / "pe_app", "pe_app"), (app, "pe_monailabel"))
        for path in base.rglob("__init__.py")
        for name in [(first, *path.parent.relative_to(base).parts)]
    }
    assert declared == folders
