"""The benchmark's promises, each counted on its own files."""

import csv

import numpy as np
import pytest

from pe_app.annotation.sparse import SparseAnnotation
from pe_app.common.errors import InputError
from pe_app.common.progress import Cancelled
from pe_app.ct.volume import PADDING_HU
from pe_app.ct.volume_io import read_mask, read_volume
from pe_app.research import benchmark
from pe_app.research.benchmark import BenchmarkConfig, add_nuisance, read_truth_table, write_benchmark
from pe_app.studies import read_studies

CONFIG = BenchmarkConfig(patients=10, annotated_share=0.5, tiny_share=0.5, matrix=64, spacing_mm=10.0)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark")
    return read_studies(write_benchmark(out, CONFIG, seed=5)), out


def test_every_patient_has_a_study_with_and_one_without_emboli_on_one_side(written):
    studies, _ = written
    for positive, negative in zip(studies[::2], studies[1::2], strict=True):
        assert (positive.label, negative.label) == ("positive", "negative")
        assert positive.patient == negative.patient
        assert positive.split == negative.split
        assert (positive.annotation is None) == (negative.annotation is None)
    assert [study.split for study in studies[::2]] == ["train"] * 5 + ["validation"] + ["test"] * 4


def test_twins_differ_only_in_emboli_noise_and_the_irrelevant(written):
    studies, out = written
    truth = read_truth_table(out / "truth.csv")
    plain = [(a, b) for a, b in zip(studies[::2], studies[1::2], strict=True)
             if not truth[a.study].nuisance and not truth[b.study].nuisance]  # fmt: skip
    assert plain
    for positive, negative in plain:
        with_emboli, without = read_volume(positive.path), read_volume(negative.path)
        mask = read_mask(out / "masks" / f"{positive.study}.nrrd", with_emboli).voxels > 0
        inside = with_emboli.voxels != PADDING_HU
        difference = with_emboli.voxels.astype(float) - without.voxels
        assert abs(difference[~mask & inside].mean()) < 1
        assert np.median(np.abs(difference[~mask & inside])) < 10  # two independent noises of 6 HU
        assert np.abs(difference[mask]).mean() > 30


def test_masks_hold_what_the_truth_table_says_and_tiny_studies_one_embolus(written):
    studies, out = written
    truth = read_truth_table(out / "truth.csv")
    assert {study.study for study in studies} == truth.keys()
    for study in studies[::2]:
        mask = read_mask(out / "masks" / f"{study.study}.nrrd", read_volume(study.path))
        known = truth[study.study]
        assert mask.voxels.max() == known.emboli
        if known.tiny:
            assert known.emboli == 1
            voxels, volume_mm3 = np.count_nonzero(mask.voxels), np.prod(mask.spacing_mm)
            assert voxels <= 8 or voxels * volume_mm3 <= 4 / 3 * np.pi * 5**3  # a ball of 10 mm
    assert any(truth[study.study].tiny for study in studies)
    assert not (out / "masks" / f"{studies[1].study}.nrrd").exists()


def test_the_irrelevant_goes_with_the_label_in_training_as_often_as_stated_and_not_in_the_test(tmp_path, monkeypatch):
    """Drawn for 200 patients, without making a single CT."""
    shown = {"train": [], "validation": [], "test": []}
    config = BenchmarkConfig(patients=200, matrix=64, spacing_mm=10.0)

    made = benchmark._twins(5, 0, CONFIG, tiny=False)
    monkeypatch.setattr(benchmark, "_twins", lambda *_: made)
    monkeypatch.setattr(benchmark, "write_volume", lambda *_: None)
    monkeypatch.setattr(benchmark, "add_nuisance", lambda volume, kind, rng: volume)
    monkeypatch.setattr(benchmark.SparseAnnotation, "write", lambda *_: None)
    studies = read_studies(write_benchmark(tmp_path, config, seed=1))
    truth = read_truth_table(tmp_path / "truth.csv")
    for study in studies:
        shown[study.split].append(bool(truth[study.study].nuisance) == (study.label == "positive"))
    assert np.mean(shown["train"] + shown["validation"]) == pytest.approx(0.85, abs=0.07)
    assert np.mean(shown["test"]) == pytest.approx(0.5, abs=0.12)
    kinds = [truth[study.study].nuisance for study in studies if truth[study.study].nuisance]
    assert {kind: kinds.count(kind) > 20 for kind in set(kinds)} == dict.fromkeys(
        ("lead", "arms", "rib", "kernel"), True
    )


def test_reviewed_slices_are_those_of_the_mask(written):
    studies, out = written
    annotated = [study for study in studies if study.annotation]
    assert annotated
    assert all(study.split != "test" for study in annotated)
    for study in annotated:
        annotation = SparseAnnotation.read(study.annotation, read_volume(study.path))
        marked = {entry.slice_index for entry in annotation.slices if entry.state == "embolism"}
        mask = out / "masks" / f"{study.study}.nrrd"
        holding = (
            set(np.flatnonzero(read_mask(mask, read_volume(study.path)).voxels.any((1, 2))).tolist())
            if mask.exists()
            else set()
        )
        assert marked == holding & {entry.slice_index for entry in annotation.slices}


def test_an_interrupted_benchmark_goes_on_and_writes_the_same_bytes(written, tmp_path):
    _, whole = written

    def after_three(progress):
        if progress.done == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        write_benchmark(tmp_path, CONFIG, 5, after_three)
    write_benchmark(tmp_path, CONFIG, 5)
    for name in ("studies.csv", "truth.csv"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    for path in sorted((whole / "volumes").iterdir()):
        assert (tmp_path / "volumes" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("kind", ["lead", "arms", "rib", "kernel"])
def test_what_is_irrelevant_leaves_the_air_outside_and_spares_most_of_the_lungs_vessels(written, kind):
    studies, _ = written
    volume = read_volume(studies[1].path)
    changed = add_nuisance(volume, kind, np.random.default_rng(0))
    assert (changed.voxels[volume.voxels == PADDING_HU] == PADDING_HU).all()
    difference = np.abs(changed.voxels.astype(float) - volume.voxels)
    touched = (difference > 100).mean()
    assert difference.max() > 60
    if kind in ("lead", "rib"):
        assert 0 < touched < 0.05


def test_a_benchmark_of_nonsense_is_refused():
    with pytest.raises(InputError, match="at least 10 patients"):
        BenchmarkConfig(patients=2)
    with pytest.raises(InputError, match="shares from 0 to 1"):
        BenchmarkConfig(confounding=85)


def test_the_default_has_at_least_240_studies():
    config = BenchmarkConfig()
    assert 2 * config.patients >= 240
    sides = [config.split(number) for number in range(config.patients)]
    assert [sides.count(side) for side in ("train", "validation", "test")] == [72, 18, 60]


def test_the_truth_table_is_plain_csv(written):
    _, out = written
    rows = list(csv.DictReader((out / "truth.csv").open()))
    assert set(rows[0]) == {"study", "nuisance", "emboli", "smallest_mm3", "largest_mm3", "tiny"}
