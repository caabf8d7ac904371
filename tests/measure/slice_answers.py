"""Do slices that are answered without an outline help? ``python tests/measure/slice_answers.py FOLDER [SEEDS]``.

Stage I on simulated studies, every other one with emboli: 20 with outlines, against the same 20 with 60 more whose
slices are answered alone. Both take equally many steps, share validation studies and are judged on 30 others: AUC over
slabs of reviewed slices, and how often the attention's peak lies on an embolism. The same call resumes.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from pe_app.annotation.sparse import SparseAnnotation, slice_schedule
from pe_app.ct.slabs import SlabConfig
from pe_app.ct.volume_io import write_volume
from pe_app.model.slab_encoder import EncoderConfig
from pe_app.model.study_classifier import ClassifierConfig
from pe_app.phantom.scan import PhantomConfig, make_phantom
from pe_app.studies import Study
from pe_app.training.datasets import prepare_slabs, read_sources
from pe_app.training.stages import EncoderTraining, score_slabs, train_encoder

PARTS = {"outlined": 20, "answered": 60, "validation": 20, "test": 30}
SLABS = SlabConfig(matrix=128, crop=128, slab_count=16)
ENCODER = EncoderConfig(width=16)
CLASSIFIER = ClassifierConfig(feature_channels=128, grid=8, filters=4)
EPOCHS = 10
"""Of the larger list; the smaller one takes four times as many."""


def simulated(folder: Path, number: int, part: str) -> Study:
    """One study, made where it is missing; of ``answered`` ones the outlines are left out."""
    path, positive = folder / f"{number}.nrrd", number % 2 == 0
    annotation = path.with_suffix(".json")
    if not annotation.is_file():
        phantom = make_phantom(np.random.default_rng(number), PhantomConfig(128, 2.5), positive)
        write_volume(phantom.volume, path)
        schedule = slice_schedule(phantom.volume)
        made = SparseAnnotation.from_mask(phantom.volume, phantom.emboli_mask, schedule, "simulated reader")
        if part == "answered":
            slices = tuple(replace(entry, not_outlined=entry.state == "embolism") for entry in made.slices)
            made = replace(made, slices=slices, masks={})
        made.write(annotation, phantom.volume)
    split = {"validation": "validation", "test": "test"}.get(part, "train")
    return Study(f"s{number}", path, f"p{number}", "positive" if positive else "negative", annotation, split)


def judged(encoder: torch.nn.Module, test: list[Study], folder: Path) -> tuple[float, float]:
    """AUC over slabs and share of hits on the test studies."""
    slabs = prepare_slabs(read_sources(test), SLABS, folder / "slabs")
    items = [slabs[number] for number in range(len(slabs))]
    with torch.no_grad():
        columns = score_slabs(encoder.eval(), type(items[0])(*map(torch.stack, zip(*items, strict=True))), SETTINGS)
    return roc_auc_score(columns["label"], columns["logit"]), float(columns["pointing"].nanmean())


SETTINGS = EncoderTraining(
    batch=16, learning_rate=1e-3, schedule="cosine", fresh_statistics=True, precision="float32", epochs=EPOCHS
)


def main(folder: Path, seeds: int) -> None:
    """Print both figures for every seed and list."""
    folder.mkdir(parents=True, exist_ok=True)
    studies: dict[str, list[Study]] = {}
    number = 0
    for part, count in PARTS.items():
        studies[part] = [simulated(folder, number + k, part) for k in range(count)]
        number += count
        print(part, count, flush=True)
    lists = {
        "20 outlined": (studies["outlined"], 4 * EPOCHS),
        "20 outlined, 60 answered": (studies["outlined"] + studies["answered"], EPOCHS),
    }
    for seed in range(seeds):
        for name, (train, epochs) in lists.items():
            out = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.safetensors"
            detector = train_encoder(
                [*train, *studies["validation"]],
                out,
                settings=replace(SETTINGS, epochs=epochs, seed=seed),
                slabs=SLABS,
                network=ENCODER,
                classifier=CLASSIFIER,
                slabs_dir=folder / "slabs",
            )
            area, pointing = judged(detector.encoder, studies["test"], folder)
            print(f"seed {seed}, {name}: slab AUC {area:.3f}, pointing {pointing:.2f}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3)
