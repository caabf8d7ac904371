from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from public_layouts import Made, cadpe, fumpe, rspect
from small_studies import CLASSIFIER, ENCODER, SLABS

from pe_app.common.errors import InputError
from pe_app.evaluation.evaluate import EvaluationSettings
from pe_app.model.detector import Detector
from pe_app.phantom.scan import PhantomConfig, make_phantom
from pe_app.research.public_recipe import SETTINGS, PublicRecipe, downloads, make_public_model, read_recipe
from pe_app.studies import read_studies
from pe_app.training.stages import ClassifierTraining, EncoderTraining

SMALL = PublicRecipe(
    test_sets=("fumpe",),
    slabs=SLABS,
    encoder_network=ENCODER,
    classifier_network=CLASSIFIER,
    encoder=EncoderTraining(epochs=1, batch=8, validation_fraction=0.5),
    classifier=ClassifierTraining(epochs=1, batch=2, validation_fraction=0.5),
    evaluation=EvaluationSettings(resamples=20),
)


def chest(seed: int, *, positive: bool):
    return make_phantom(np.random.default_rng(seed), PhantomConfig(96, 5.0, "large"), positive)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """FUMPE to test on, CAD-PE with outlines and RSPECT with answers to learn from; every chest another one."""
    folder = tmp_path_factory.mktemp("data")
    for number, (name, layout) in enumerate((("FUMPE", fumpe), ("cadpe", cadpe), ("rspect", rspect))):
        made = Made(chest(10 * number, positive=True), chest(10 * number + 1, positive=False))
        layout(folder / name, made)
    return folder


@pytest.mark.timeout(600)
def test_downloads_become_an_evaluated_model_and_the_same_call_makes_nothing_twice(data, tmp_path):
    judged = make_public_model(data, tmp_path, SMALL)
    listed = read_studies(tmp_path / "studies" / "studies.csv")
    by_source = {source: {study.split for study in listed if study.source == source} for source in ("fumpe", "cadpe")}
    assert by_source["fumpe"] == {"test"}
    assert "test" not in by_source["cadpe"]
    assert {prediction.study.source for prediction in judged.models[0].predictions} == {"fumpe"}
    assert all(prediction.status in ("analysed", "refused") for prediction in judged.models[0].predictions)
    card = Detector.load(tmp_path / "model.safetensors").card
    assert card.terms == ("cadpe: CC BY 4.0", "rspect: RSNA, non-commercial use only")
    assert card.non_commercial
    assert card.encoder.not_outlined_slices > 0
    assert (tmp_path / "evaluation" / "index.html").is_file()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    make_public_model(data, tmp_path, SMALL)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")} == before


def test_settings_are_a_file_that_can_be_read_and_changed(tmp_path):
    assert read_recipe(tmp_path) == PublicRecipe()
    path = tmp_path / "recipe.json"
    payload = json.loads(path.read_text())
    payload["encoder"]["epochs"] = 7
    payload["test_sets"] = ["read"]
    path.write_text(json.dumps(payload))
    assert read_recipe(tmp_path) == replace(
        PublicRecipe(), test_sets=("read",), encoder=replace(EncoderTraining(), epochs=7)
    )
    payload["encoder"]["epochs"] = "many"
    path.write_text(json.dumps(payload))
    with pytest.raises(InputError, match=r"recipe\.json: public-recipe: encoder\.epochs must be a valid integer"):
        read_recipe(tmp_path)
    assert SETTINGS.read(SETTINGS.write(SMALL)) == SMALL


def test_what_cannot_be_tested_or_learned_from_is_refused_before_anything_is_read(data, tmp_path):
    with pytest.raises(InputError, match="holds none of the folders fumpe, cadpe, read, rspect"):
        downloads(tmp_path)
    with pytest.raises(InputError, match="test_sets read must be among them"):
        make_public_model(data, tmp_path, replace(SMALL, test_sets=("read",)))
    with pytest.raises(InputError, match="at least one set more to learn from"):
        make_public_model(data, tmp_path, replace(SMALL, test_sets=("fumpe", "cadpe", "rspect")))
    assert not (tmp_path / "studies").exists()
