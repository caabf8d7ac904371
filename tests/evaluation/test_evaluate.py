"""Evaluation on small chests and hand-made cases; scikit-learn and counting by hand are the oracles."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, roc_auc_score
from small_studies import CLASSIFIER, ENCODER, SLABS, small_chest, small_studies
from typer.testing import CliRunner

import pe_app.model.detector
from pe_app.annotation.record import ReviewedSlice
from pe_app.annotation.sparse import SparseAnnotation
from pe_app.cli import app
from pe_app.common.errors import InputError
from pe_app.common.progress import Cancelled
from pe_app.ct.quality import Reason
from pe_app.ct.volume import Volume, axial_affine
from pe_app.ct.volume_io import write_volume
from pe_app.evaluation.evaluate import (
    GAUSSIAN,
    MEAN_MASK,
    MODEL,
    UNTRAINED,
    EvaluationSettings,
    Prediction,
    _strata,
    choose_cohort,
    evaluate,
)
from pe_app.evaluation.report import metrics, predictions_csv, report, warnings_of, web_page, write_evaluation
from pe_app.evaluation.study_localisation import Look, StudyTruth, localise, read_truth
from pe_app.model.detector import Decision, Detector, ModelCard, TrainingRecord
from pe_app.studies import Study, StudyAttributes, patient_sha256, write_studies

QUICK = EvaluationSettings(resamples=20)


@pytest.fixture(scope="module")
def chests(tmp_path_factory):
    """Ten small studies (even ones positive) with a folder of masks; the last four are the training split."""
    folder = tmp_path_factory.mktemp("chests")
    studies = small_studies(folder)
    for number in range(0, 10, 2):
        write_volume(small_chest(number, 3)[1], folder / "masks" / f"study{number}.nrrd")
    return tuple(
        replace(study, split="train" if number >= 6 else "test", annotation=None)
        for number, study in enumerate(studies)
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in ((1, "one"), (3, "two")):
        detector = Detector.untrained(seed, SLABS, ENCODER, CLASSIFIER)
        detector.save(folder / f"{name}.safetensors")
    return [folder / "one.safetensors", folder / "two.safetensors"]


@pytest.fixture(autouse=True)
def every_chest_is_good(monkeypatch):
    """Small chests hold no enhanced heart; the quality check has its own tests."""
    monkeypatch.setattr(pe_app.model.detector, "check_study", lambda *_: ())


@pytest.fixture
def detections(monkeypatch):
    """Names of the volumes that were detected, in order."""
    names = []
    original = Detector.detect
    monkeypatch.setattr(
        Detector, "detect", lambda self, volume, progress: names.append(volume.name) or original(self, volume, progress)
    )
    return names


def masks_of(chests):
    return chests[0].path.parent / "masks"


def test_figures_are_those_of_scikit_learn_on_the_written_predictions(chests, models, tmp_path):
    settings = replace(QUICK, untrained_baseline=True)
    evaluation = evaluate(chests, models, tmp_path, masks_of(chests), settings)
    write_evaluation(evaluation, tmp_path, masks_of(chests))
    written = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert [row["study"] for row in rows] == [f"study{n}" for n in range(6)] * 2
    for name, model in zip(("one", "two"), written["models"], strict=True):
        mine = [row for row in rows if row["model"] == name]
        truth = [row["label"] == "positive" for row in mine]
        scores = [float(row["probability"]) for row in mine]
        assert model["auc"] == pytest.approx(roc_auc_score(truth, scores))
        assert model["auc_low"] <= model["auc"] <= model["auc_high"]
        assert model["brier"] == pytest.approx(brier_score_loss(truth, scores))
        called = [score >= 0.5 for score in scores]
        assert model["operating_point"]["accuracy"]["value"] == pytest.approx(np.mean(np.equal(called, truth)))
        hits = [float(row["pointing"]) for row in mine if row["label"] == "positive"]
        assert model["pointing_study"] == pytest.approx(np.mean(hits))
        assert {"pointing_slab", "energy_inside", "key_slice_hit_3", "map_mass_negatives"} <= model.keys()
        assert [point["false_per_study"] for point in model["froc"][0]["points"]] == [0.5, 1, 2, 4]
        assert set(model["baselines"]) == {GAUSSIAN, MEAN_MASK, UNTRAINED}
    difference = written["comparisons"][0]["difference"]
    assert difference["value"] == pytest.approx(written["models"][0]["auc"] - written["models"][1]["auc"])
    page = (tmp_path / "index.html").read_text()
    assert "Research use only" in page
    assert "its numbers are random" in page
    assert "<script" not in page
    assert "nan" not in page.split("base64")[0].lower()
    assert 'src="data:image/png;base64,' in page
    assert not re.search("https?:", page)
    positive = sum(row["label"] == "positive" for row in mine)
    assert f"On {len(mine)} studies, {positive} with embolism" in page.partition("<h2>")[2]


def test_an_interrupted_evaluation_goes_on_and_gives_the_same_figures(chests, models, tmp_path, detections):
    def stop_at_the_fourth(progress):
        if progress.task == "detect" and progress.done == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        evaluate(chests, models[:1], tmp_path / "a", masks_of(chests), QUICK, stop_at_the_fourth)
    with (tmp_path / "a" / "predictions.jsonl").open("ab") as file:
        file.write(b'{"detection": {"schema": "pe-det')
    detections.clear()
    resumed = evaluate(chests, models[:1], tmp_path / "a", masks_of(chests), QUICK)
    assert detections == ["3.nrrd", "4.nrrd", "5.nrrd"]
    detections.clear()
    again = evaluate(chests, models[:1], tmp_path / "a", masks_of(chests), QUICK)
    assert detections == []
    at_once = evaluate(chests, models[:1], tmp_path / "b", masks_of(chests), QUICK)
    assert predictions_csv(resumed) == predictions_csv(again) == predictions_csv(at_once)
    assert metrics(resumed, "") == metrics(again, "") == metrics(at_once, "")


def test_a_study_of_the_models_training_is_refused_by_name_or_shown_loudly(chests, tmp_path):
    detector = Detector.untrained(0, SLABS, ENCODER, CLASSIFIER)
    known = (small_chest(3, 0)[0].sha256,)
    record = TrainingRecord(1, 0, 0, True, 1, 1, 1.0, "cpu", "2026-01-01T00:00:00Z", "", {}, {}, known)
    detector = replace(detector, card=ModelCard("trained", "1", record, record))
    detector.save(tmp_path / "trained.safetensors")
    model, out = [tmp_path / "trained.safetensors"], tmp_path / "out"
    with pytest.raises(InputError, match=r"study study3: model trained\.safetensors was trained on this image"):
        evaluate(chests, model, out, settings=QUICK)
    assert not (out / "predictions.jsonl").exists()
    allowed = replace(QUICK, allow_training_studies=True)
    evaluation = evaluate(chests, model, out, settings=allowed)
    page = web_page(warnings_of(evaluation), report(evaluation), "")
    assert "NOT A TEST: trained was trained on 1 of these 6 studies (study3)" in page
    assert "never seen a real embolism" in page
    assert metrics(evaluation, "")["models"][0]["training_studies"] == ["study3"]


def test_another_study_of_a_training_patient_is_refused_by_name(chests, tmp_path):
    detector = Detector.untrained(0, SLABS, ENCODER, CLASSIFIER)
    patients = (patient_sha256(Study("other", tmp_path, "patient4")),)
    record = TrainingRecord(1, 0, 0, True, 1, 1, 1.0, "cpu", "2026-01-01T00:00:00Z", "", {}, {}, (), patients)
    detector = replace(detector, card=ModelCard("trained", "1", record, record))
    detector.save(tmp_path / "trained.safetensors")
    with pytest.raises(InputError, match=r"study study4: .* was trained on this image or patient"):
        evaluate(chests, [tmp_path / "trained.safetensors"], tmp_path / "out", settings=QUICK)


def test_a_models_own_threshold_is_used_and_told(chests, models, tmp_path):
    probabilities = [
        entry.probability for entry in evaluate(chests, models[:1], tmp_path / "a", None, QUICK).models[0].predictions
    ]
    detector = Detector.load(models[0])
    detector = replace(detector, decision=Decision(1.0, sorted(probabilities)[1], 0.9, 20, 10))
    detector.save(tmp_path / "chosen.safetensors")
    evaluation = evaluate(chests, [tmp_path / "chosen.safetensors"], tmp_path / "b", None, QUICK)
    rows = list(csv.DictReader(predictions_csv(evaluation).splitlines()))
    assert [row["called"] for row in rows].count("positive") == 5
    point = metrics(evaluation, "")["models"][0]["operating_point"]
    assert point["threshold"] == sorted(probabilities)[1]
    page = web_page(warnings_of(evaluation), report(evaluation), "")
    assert "for sensitivity 0.9, temperature 1, chosen on 20 validation studies, 10 positive" in page


def test_one_bad_study_never_stops_the_others(chests, models, tmp_path, monkeypatch):
    monkeypatch.setattr(
        pe_app.model.detector,
        "check_study",
        lambda volume, *_: (Reason("no_contrast", "blood is dark", True),) if volume.name == "1.nrrd" else (),
    )
    (tmp_path / "torn.nrrd").write_bytes(b"NRRD0004\n")
    (tmp_path / "copy.nrrd").write_bytes(chests[0].path.read_bytes())
    listed = (
        *chests,
        Study("torn", tmp_path / "torn.nrrd", "", "negative", None, "test"),
        Study("copy", tmp_path / "copy.nrrd", "", "positive", None, "test"),
    )
    evaluation = evaluate(listed, models[:1], tmp_path / "out", masks_of(chests), QUICK)
    status = {entry.study.study: entry.status for entry in evaluation.models[0].predictions}
    assert status == {
        **{f"study{n}": "analysed" for n in range(6)},
        "study1": "refused",
        "torn": "unreadable",
        "copy": "duplicate",
    }
    page = web_page(warnings_of(evaluation), report(evaluation), "")
    assert "analysed 5 of 8 (62%); 1 refused, 1 unreadable, 1 duplicate" in page
    assert "no_contrast: blood is dark" in page


def test_only_labelled_test_studies_are_judged_where_any_is_marked(tmp_path):
    labels = ("positive", "negative", "uncertain", "", "positive")
    splits = ("test", "test", "test", "test", "train")
    studies = [Study(f"s{n}", tmp_path / str(n), "", labels[n], None, splits[n]) for n in range(5)]
    cohort = choose_cohort(studies)
    assert [study.study for study in cohort.studies] == ["s0", "s1"]
    assert (cohort.split, cohort.listed, cohort.uncertain, cohort.unknown) == ("test", 5, 1, 1)
    unmarked = choose_cohort([replace(study, split="") for study in studies])
    assert [study.study for study in unmarked.studies] == ["s0", "s1", "s4"]


def test_what_cannot_be_computed_is_said_in_words(chests, models, tmp_path):
    negatives = [study for study in chests if study.label == "negative"]
    evaluation = evaluate(negatives, models[:1], tmp_path, settings=QUICK)
    write_evaluation(evaluation, tmp_path)
    model = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)["models"][0]
    assert model["auc"] is None
    assert model["pointing_study"] is None
    assert model["map_mass_negatives"] > 0
    page = (tmp_path / "index.html").read_text()
    assert "0 positive and 3 negative studies were analysed: AUC, operating points and calibration need" in page
    assert "No mask of a positive study is known" in page


def test_a_mask_of_another_grid_costs_the_mask_not_the_study(chests, models, tmp_path):
    folder = tmp_path / "masks"
    wrong = Volume(np.ones((4, 8, 8), np.uint8), axial_affine((2.5, 5.0, 5.0)))
    write_volume(wrong, folder / "study0.nrrd")
    evaluation = evaluate(chests, models[:1], tmp_path / "out", folder, QUICK)
    entry = evaluation.models[0].predictions[0]
    assert (entry.status, entry.localisation[MODEL].pointing) == ("analysed", None)
    assert "study0.nrrd: the mask is not on the grid" in entry.reason


def test_where_a_system_looks_is_counted_by_hand(tmp_path):
    """Three slabs of 4 x 4 cells of 10 mm; the CT has voxels of 5 mm on the same place, the embolus fills one cell."""
    grid = Volume(np.zeros((3, 4, 4)), axial_affine((10.0, 10.0, 10.0)))
    mask = np.zeros((6, 8, 8), np.uint8)
    mask[2:4, 2:4, 4:6] = 1  # cell (1, 1, 2)
    ct = Volume(mask, axial_affine((5.0, 5.0, 5.0), (-2.5, -2.5, -2.5)))
    maps = np.zeros((3, 4, 4))
    maps[1, 1, 2], maps[1, 0, 0] = 0.6, 0.2
    maps[2, 3, 3] = 0.3
    places = np.array([[20.0, 10.0, 10.0], [30.0, 30.0, 20.0]])  # x, y, z of the two peaks
    look = Look(maps, grid, np.array([0.1, 0.6, 0.3]), places, np.array([0.6, 0.3]))
    study = Study("s", tmp_path, "", "positive")
    found = localise(look, study, StudyTruth(ct, None))
    assert found.pointing == 1
    assert found.pointing_slabs.tolist() == [1]
    assert found.energy.tolist() == pytest.approx([0.75])
    assert found.key_slice is True
    for outcome in found.candidates:
        assert outcome.embolus_scores.tolist() == [0.6]
        assert outcome.false_scores.tolist() == [0.3]
    negative = localise(look, replace(study, label="negative"), None)
    assert negative.mass == pytest.approx((0.6 + 0.2 + 0.3) / 48)
    assert negative.candidates[0].false_scores.tolist() == [0.6, 0.3]
    assert negative.pointing is None
    sparse = localise(look, study, StudyTruth(ct, (2,)))
    assert (sparse.pointing, sparse.candidates) == (1, None)


def test_slices_without_an_outline_do_not_judge_where_a_system_looks(tmp_path):
    volume = Volume(np.zeros((8, 4, 4), np.int16), axial_affine((10.0, 5.0, 5.0)))
    outline = np.eye(4, dtype=bool)

    def annotated(*said: tuple[int, str]) -> Study:
        annotation = SparseAnnotation.empty(volume)
        for index, kind in said:
            state = kind.partition(",")[0]
            entry = ReviewedSlice(index, 10.0 * index, state, not_outlined=kind == "embolism, not outlined")
            annotation = annotation.review(entry, outline if kind == "embolism" else None)
        annotation.write(tmp_path / "a.json", volume)
        return Study("s", tmp_path, "", "positive", tmp_path / "a.json")

    mixed = annotated((1, "none"), (2, "embolism"), (3, "embolism, not outlined"), (4, "uncertain"))
    truth = read_truth(mixed, volume, None)
    assert truth.reviewed == (1, 2)
    assert np.flatnonzero(truth.mask.voxels.any((1, 2))).tolist() == [2]
    assert read_truth(annotated((1, "none"), (3, "embolism, not outlined")), volume, None) is None


def test_attributes_of_the_list_split_the_studies_and_emboli_are_set_against_all_negatives(tmp_path):
    def analysed(name: str, label: str, **known: str) -> Prediction:
        source = known.pop("source", "")
        study = Study(name, tmp_path, label=label, source=source, attributes=StudyAttributes(**known))
        return Prediction(study, "analysed", "", name, 0.5, 1.0)

    seen = [
        analysed("a", "positive", central="yes", quality="motion", source="rspect"),
        analysed("b", "positive", central="no", quality="good"),
        analysed("c", "positive"),
        analysed("d", "negative", quality="good", mimic="flow artifact"),
        analysed("e", "negative"),
    ]
    parts = {(part.group, part.name): (part.studies, part.positive) for part in _strata(seen, 0.5)}
    assert {
        place: count for place, count in parts.items() if place[0] in ("central embolism", "side of the embolism")
    } == {
        ("central embolism", "no"): (3, 1),
        ("central embolism", "not known"): (3, 1),
        ("central embolism", "yes"): (3, 1),
    }
    assert parts["image quality (by the list)", "good"] == (2, 1)
    assert parts["image quality (by the list)", "motion"] == (1, 1)
    assert parts["mimics", "flow artifact"] == (1, 0)
    assert parts["data set", "rspect"] == (1, 1)


def test_a_mask_of_ones_is_numbered_by_its_regions_and_a_numbered_one_is_kept():
    voxels = np.zeros((8, 8, 8), np.uint8)
    voxels[2, 2, 2], voxels[6, 6, 6] = 1, 1
    affine = axial_affine((2.0, 1.0, 1.0), (-5.0, 0.0, 7.0))
    binary = StudyTruth(Volume(voxels, affine), None).emboli
    assert sorted(np.unique(binary.voxels)) == [0, 1, 2]
    assert binary.to_lps_mm((0, 0, 0)).tolist() == Volume(voxels, affine).to_lps_mm((2, 2, 2)).tolist()
    numbered = StudyTruth(Volume(voxels * 5, affine), None).emboli
    assert sorted(np.unique(numbered.voxels)) == [0, 5]


def test_the_same_model_twice_is_refused(chests, models, tmp_path):
    with pytest.raises(InputError, match="given twice"):
        evaluate(chests, [models[0], models[0]], tmp_path)


def test_the_command_takes_several_models_after_one_option(chests, models, tmp_path):
    listing = masks_of(chests).parent / "list.csv"
    write_studies(chests, listing)
    words = ["evaluate", "--studies", str(listing), "--model", *map(str, models), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "one: 6 of 6 studies analysed, AUC" in result.output
    assert "two: 6 of 6 studies analysed, AUC" in result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("metrics.json", "predictions.csv", "predictions.jsonl", "index.html")
    }
