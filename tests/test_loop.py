"""The loop closes: phantoms, a reader's annotations, both trainings and detections, all through the REST interface.

The phantoms are simpler than the program's own: ellipses of tissue, and for emboli dense balls in the lung, which a
network of 0.7 million weights learns in seconds from 24 studies. Filling defects of 30 to 80 HU take full-size
networks; how well those do is in the model card.
"""

import sys
import time

import numpy as np
import pytest
from app_server import chest, running_server
from scipy.spatial import cKDTree

from pe_app.annotation.sparse import SparseAnnotation
from pe_app.ct.slabs import SlabConfig
from pe_app.ct.volume_io import write_volume
from pe_app.evaluation.roc import auc
from pe_app.model.detector import Detector
from pe_app.model.slab_encoder import EncoderConfig
from pe_app.model.study_classifier import ClassifierConfig

pytestmark = pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="MONAI Label's own client needs cgi of Python < 3.13"
)

TRAINED_ON, HELD_OUT = 24, 16
HIT_MM = 12.0
MARGIN = 0.4
"""So much more often than the same peaks hit the emboli of the other studies."""

SLABS = {"matrix": 160, "crop": 128, "slab_count": 16, "width": 16, "filters": 8, "synthetic": True}
ENCODER = {**SLABS, "epochs": 6, "batch": 8, "learning_rate": 1e-3}
CLASSIFIER = {"epochs": 30, "batch": 4, "learning_rate": 1e-3, "synthetic": True}


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Every study's CT and the mask of its emboli, by id; those of the training come first in the alphabet."""
    made = {}
    for number in range(TRAINED_ON + HELD_OUT):
        name = f"{'read' if number < TRAINED_ON else 'unseen'}-{number:02d}"
        made[name] = chest(number, emboli=2 if number % 2 == 0 else 0)
        write_volume(made[name][0], tmp_path_factory.getbasetemp() / "loop" / "studies" / f"{name}.nrrd")
    return made


@pytest.fixture(scope="module")
def server(truth, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "loop"
    slabs = SlabConfig(matrix=SLABS["matrix"], crop=SLABS["crop"], slab_count=SLABS["slab_count"])
    network = ClassifierConfig(feature_channels=8 * SLABS["width"], grid=slabs.grid, filters=SLABS["filters"])
    Detector.untrained(3, slabs, EncoderConfig(width=SLABS["width"]), network).save(folder / "untrained.safetensors")
    with running_server(folder / "studies", folder / "untrained.safetensors") as running:
        yield running


def read_as_a_careful_reader(client, truth, folder):
    """Ask for the next study and review the slices that the server wants, until the studies to read are complete."""
    for _ in range(TRAINED_ON):
        sample = client.next_sample("next_unreviewed", {"reader": "rita"})
        volume, mask = truth[sample["id"]]
        slices = [entry["slice_index"] for entry in sample["slices"]]
        annotation = SparseAnnotation.from_mask(volume, mask, slices, "rita")
        annotation.write(folder / "annotation.json", volume)
        params = {"annotation": annotation.to_json(), "based_on": None, "reader": "rita"}
        saved = client.save_label(sample["id"], str(folder / "annotation.seg.nrrd"), "draft", params)
        assert (saved["tag"], saved["open"]) == ("final", [])
        yield sample["id"]


def train(client, server, stage, settings):
    client.train_start(stage, settings)
    deadline = time.monotonic() + 240
    while client.train_status(check_if_running=True) or client.train_status()["status"] in ("SUBMITTED", "RUNNING"):
        assert time.monotonic() < deadline, "the training takes too long"
        time.sleep(0.5)
    status = client.train_status()
    assert status["status"] == "DONE", "\n".join(status["details"])
    shown = server.json("GET", "/pe/training")[stage]
    assert shown["state"] == "finished"
    assert [entry["epoch"] for entry in shown["history"]] == list(range(1, settings["epochs"] + 1))


def label_train_and_detect(client, server, labels, unseen, encoder, classifier):
    """Label the studies that were read, train both stages, and ask the new detector about the unseen ones."""
    untrained = client.info()["pe"]["model"]
    assert not untrained["trained"]
    for study, label in labels.items():
        server.json("PUT", f"/datastore/image/info?image={study}", data={"info": f'{{"pe_label": "{label}"}}'})
    train(client, server, "encoder", encoder)
    after_encoder = client.info()["pe"]["model"]
    assert after_encoder["sha256"] != untrained["sha256"]
    train(client, server, "classifier", classifier)
    trained = client.info()["pe"]["model"]
    assert trained["trained"]
    detections = {study: client.infer("detection", study, {})[1] for study in unseen}
    assert {detection["model"]["sha256"] for detection in detections.values()} == {trained["sha256"]}
    return detections


@pytest.mark.timeout(400)
def test_annotations_become_a_detector_that_finds_emboli_it_has_never_seen(server, truth, tmp_path):
    from monailabel.client import MONAILabelClient

    client = MONAILabelClient(server.address, tmpdir=str(tmp_path))
    read = list(read_as_a_careful_reader(client, truth, tmp_path))
    assert sorted(read) == [study for study in truth if study.startswith("read")]
    assert client.info()["datastore"]["completed"] == TRAINED_ON
    labels = {study: "positive" if truth[study][1].voxels.any() else "negative" for study in read}
    unseen = [study for study in truth if study.startswith("unseen")]
    detections = label_train_and_detect(client, server, labels, unseen, ENCODER, CLASSIFIER)
    positive = np.array([bool(truth[study][1].voxels.any()) for study in unseen])
    probability = np.array([detections[study]["probability"] for study in unseen])
    separation = auc(positive, probability).value

    peaks, emboli = [], []
    for study in np.array(unseen)[positive]:
        seen = [slab for slab in detections[study]["evidence"] if slab["peak_lps_mm"]]
        peaks.append(max(seen, key=lambda slab: slab["probability"])["peak_lps_mm"])
        volume, mask = truth[study]
        emboli.append(cKDTree(volume.to_lps_mm(np.argwhere(mask.voxels))))
    hits = np.array([[tree.query(peak)[0] <= HIT_MM for tree in emboli] for peak in peaks])
    own, chance = hits.diagonal().mean(), hits[~np.eye(len(hits), dtype=bool)].mean()
    figures = f"AUC {separation:.2f}, peaks within {HIT_MM} mm of an embolus: {own:.2f}, by chance {chance:.2f}"
    print(figures)
    assert separation > 0.8, figures
    assert own > chance + MARGIN, figures
