"""The loop closes on the program's own phantoms, through the REST interface: ``make loop``, some minutes.

Filling defects of 30 to 80 HU in enhanced central and lobar arteries. Each patient comes with emboli and without, the
same chest otherwise, so that nothing but the emboli tells the studies apart, and a network of 0.2 million weights
learns from 32 patients what they look like. It looks through a window in which clot and blood differ (-100 to 300 HU).
How well full-size networks find emboli of every size is in the model card.
"""

import sys

import numpy as np
import pytest
from app_server import running_server
from scipy.spatial import cKDTree
from test_loop import label_train_and_detect

from pe_app.annotation.sparse import SparseAnnotation, slice_schedule
from pe_app.ct.slabs import SlabConfig
from pe_app.ct.volume_io import write_volume
from pe_app.evaluation.roc import auc
from pe_app.model.detector import Detector
from pe_app.model.slab_encoder import EncoderConfig
from pe_app.model.study_classifier import ClassifierConfig
from pe_app.phantom import PhantomConfig, make_phantom
from pe_app.studies import Study, write_studies

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.version_info >= (3, 13), reason="MONAI Label's own client needs cgi of Python < 3.13"),
]

TRAINED_ON, HELD_OUT = 32, 12
"""Patients."""

HIT_MM = 12.0
MARGIN = 0.2
"""So much more often than the same place of the same slab does in the other studies."""

PHANTOM = PhantomConfig(matrix=128, spacing_mm=5.0, burden="large")
SMALLEST_MM2 = 30.0
"""What a slice must show of an embolus for the reader to mark it there: a disc of 6 mm."""

SLABS = {"matrix": 320, "crop": 128, "slab_count": 20, "slab_spacing": "physical", "hu_low": -100, "hu_high": 300}
ENCODER = {
    **SLABS, "width": 8, "filters": 8, "synthetic": True, "epochs": 20, "batch": 8, "learning_rate": 5e-3,
    "schedule": "cosine", "fresh_statistics": True, "attention_weight": 0.2, "validation_fraction": 0.12,
    "augment": True, "flip": False, "shift_cells": 1,
}  # fmt: skip
CLASSIFIER = {
    "epochs": 6, "batch": 4, "learning_rate": 1e-4, "schedule": "cosine", "fresh_statistics": True,
    "pooled": True, "synthetic": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Every study's phantom, by id: of each patient the one with emboli, then the one without."""
    folder = tmp_path_factory.getbasetemp() / "loop" / "studies"
    made, listed = {}, []
    for number in range(TRAINED_ON + HELD_OUT):
        patient = f"{'read' if number < TRAINED_ON else 'unseen'}-{number:02d}"
        for kind in ("clots", "none"):
            study = f"{patient}-{kind}"
            made[study] = make_phantom(np.random.default_rng((11, number)), PHANTOM, positive=kind == "clots")
            write_volume(made[study].volume, folder / f"{study}.nrrd")
            listed.append(Study(study, folder / f"{study}.nrrd", patient))
    write_studies(listed, folder / "studies.csv")
    return made


@pytest.fixture(scope="module")
def server(truth, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "loop"
    slabs = SlabConfig(matrix=SLABS["matrix"], crop=SLABS["crop"], slab_count=SLABS["slab_count"])
    network = ClassifierConfig(8 * ENCODER["width"], slabs.grid, ENCODER["filters"])
    Detector.untrained(3, slabs, EncoderConfig(width=ENCODER["width"]), network).save(folder / "untrained.safetensors")
    with running_server(folder / "studies", folder / "untrained.safetensors") as running:
        yield running


def read_where_emboli_are(client, truth, folder):
    """A reader outlines the emboli on slices 10 mm apart, and says of the same slices of the other CT "none"."""
    for study in truth:
        if study.startswith("read") and study.endswith("clots"):
            emboli = truth[study].emboli_mask
            shown_mm2 = np.count_nonzero(emboli.voxels, axis=(1, 2)) * emboli.spacing_mm[1] ** 2
            slices = [index for index in slice_schedule(truth[study].volume) if shown_mm2[index] >= SMALLEST_MM2]
            for name in (study, study.replace("clots", "none")):
                phantom = truth[name]
                annotation = SparseAnnotation.from_mask(phantom.volume, phantom.emboli_mask, slices, "rita")
                annotation.write(folder / "annotation.json", phantom.volume)
                params = {"annotation": annotation.to_json(), "based_on": None, "reader": "rita"}
                saved = client.save_label(name, str(folder / "annotation.seg.nrrd"), "draft", params)
                assert (saved["tag"], saved["accepted"]) == ("draft", len(slices))


@pytest.mark.timeout(1200)
def test_annotations_become_a_detector_that_finds_emboli_it_has_never_seen(server, truth, tmp_path):
    from monailabel.client import MONAILabelClient

    client = MONAILabelClient(server.address, tmpdir=str(tmp_path))
    read_where_emboli_are(client, truth, tmp_path)
    read = [study for study in truth if study.startswith("read")]
    labels = {study: "positive" if study.endswith("clots") else "negative" for study in read}
    unseen = [study for study in truth if study.startswith("unseen")]
    detections = label_train_and_detect(client, server, labels, unseen, ENCODER, CLASSIFIER)
    positive = np.array([study.endswith("clots") for study in unseen])
    probability = np.array([detections[study]["probability"] for study in unseen])
    separation = auc(positive, probability).value

    positives = [study for study in unseen if study.endswith("clots")]
    emboli = {}
    for study in positives:
        mask = truth[study].emboli_mask
        emboli[study] = cKDTree(mask.to_lps_mm(np.argwhere(mask.voxels)))
    own, chance = [], []
    for study in positives:
        evidence = [slab for slab in detections[study]["evidence"] if slab["peak_lps_mm"]]
        strongest = max(evidence, key=lambda slab: slab["probability"])
        place = np.array(strongest["peak_lps_mm"]) - centre(truth[study].volume)
        own.append(emboli[study].query(strongest["peak_lps_mm"])[0] <= HIT_MM)
        for other in positives:
            if other != study:  # the same place of the same slab there
                there = place + centre(truth[other].volume)
                there[2] = detections[other]["evidence"][strongest["slab"]]["z_mm"]
                chance.append(emboli[other].query(there)[0] <= HIT_MM)
    figures = (
        f"AUC {separation:.2f}, peaks within {HIT_MM} mm of an embolus: {np.mean(own):.2f}, "
        f"by chance {np.mean(chance):.2f}"
    )
    print(figures)
    assert separation > 0.8, figures
    assert np.mean(own) > np.mean(chance) + MARGIN, figures


def centre(volume):
    """Of the CT, in LPS mm: phantoms lie at different heights of the table."""
    return np.array(volume.to_lps_mm((np.array(volume.shape) - 1) / 2))
