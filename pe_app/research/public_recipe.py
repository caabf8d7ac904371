"""From the downloads of public data sets to a trained and evaluated model, in one call that resumes.

DATA/fumpe, DATA/cadpe, DATA/read, DATA/rspect     the downloads, those that are there
OUT/recipe.json                                    the settings, to be read and changed before the first call
OUT/studies                                        study list, annotations, masks
OUT/encoder.safetensors, OUT/model.safetensors     stage I, both stages
OUT/evaluation                                     the test set's figures
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pe_app.common.errors import InputError
from pe_app.common.files import write_durably
from pe_app.common.progress import ProgressCallback, silent
from pe_app.common.schema import Schema, json_text
from pe_app.ct.slabs import SlabConfig
from pe_app.evaluation.evaluate import Evaluation, EvaluationSettings, evaluate
from pe_app.evaluation.report import write_evaluation
from pe_app.model.slab_encoder import EncoderConfig
from pe_app.model.study_classifier import ClassifierConfig
from pe_app.public_data.found import PublicSet
from pe_app.public_data.run import DatasetImport, DatasetLine, Estimate, import_dataset
from pe_app.public_data.sets import NAMED
from pe_app.studies import Study, read_studies, write_studies
from pe_app.training.datasets import Preparation
from pe_app.training.stages import ClassifierTraining, EncoderTraining, train_classifier, train_encoder


@dataclass(frozen=True)
class PublicRecipe:
    """How a model is made of public sets. Patients of a test set are used for nothing else.

    Attributes:
        test_sets: sets that are held out as outside tests.
        every_mm: about how far apart the reviewed slices lie; None for every slice.
        slabs: how volumes become slabs.
        encoder_network: shape of stage I.
        classifier_network: shape of stage II.
        encoder: training of stage I, the paper's by default.
        classifier: training of stage II, the paper's by default.
        evaluation: of the finished model.
    """

    test_sets: tuple[str, ...] = ("fumpe",)
    every_mm: float | None = 10.0
    slabs: SlabConfig = field(default_factory=SlabConfig)
    encoder_network: EncoderConfig = field(default_factory=EncoderConfig)
    classifier_network: ClassifierConfig = field(default_factory=ClassifierConfig)
    encoder: EncoderTraining = field(default_factory=EncoderTraining)
    classifier: ClassifierTraining = field(default_factory=ClassifierTraining)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def __post_init__(self) -> None:
        unknown = [name for name in self.test_sets if name not in NAMED]
        if unknown:
            raise InputError(f"test_sets: unknown set {unknown[0]!r}; the sets are {', '.join(NAMED)}")


SETTINGS = Schema(PublicRecipe, "pe-public-recipe", 1)


def read_recipe(out: Path) -> PublicRecipe:
    """The settings in ``OUT/recipe.json``; written there with their defaults where there is none.

    Raises:
        InputError: naming the first setting that is not as it must be.
    """
    path = out / "recipe.json"
    if not path.exists():
        write_durably(path, json_text(SETTINGS.write(PublicRecipe()), indent=1) + "\n")
    try:
        return SETTINGS.read(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error


def downloads(data: Path) -> Mapping[str, Path]:
    """The sets whose folder is there, upper or lower case.

    Raises:
        InputError: if there is none.
    """
    folders = {entry.name.lower(): entry for entry in sorted(data.iterdir()) if entry.is_dir()} if data.is_dir() else {}
    found = {name: folders[name] for name in NAMED if name in folders}
    if not found:
        raise InputError(f"{data}: holds none of the folders {', '.join(NAMED)}; unpack each download into its own")
    return found


def make_public_model(
    data: Path,
    out: Path,
    recipe: PublicRecipe,
    workers: int = 1,
    progress: ProgressCallback = silent,
    begun: Callable[[PublicSet], None] = lambda data_set: None,
    imported: Callable[[Sequence[DatasetLine]], None] = lambda lines: None,
    estimated: Callable[[Estimate], None] = lambda estimate: None,
) -> Evaluation:
    """Import, train both stages, and judge the model on the test sets.

    Args:
        data: folder of the downloads, each in a folder named after its set.
        out: everything that is made; the same call resumes there.
        recipe: settings (``read_recipe``).
        workers: processes that read studies.
        progress: told after every step; may raise ``Cancelled``.
        begun: called before each import.
        imported: called with the studies of each import.
        estimated: called with what is left of an import, when its first study is done.

    Raises:
        InputError: if nothing is left to train or to test on, or a step cannot be done.
    """
    found = downloads(data)
    missing = [name for name in recipe.test_sets if name not in found]
    if missing or set(found) <= set(recipe.test_sets):
        raise InputError(
            f"{data}: holds {', '.join(found)}; test_sets {', '.join(recipe.test_sets)} must be among them, and at "
            "least one set more to learn from: add a download, or change test_sets in recipe.json"
        )
    studies = out / "studies"
    for name, folder in found.items():
        begun(NAMED[name])
        settings = DatasetImport(recipe.every_mm, workers=workers)
        imported(import_dataset(NAMED[name], folder, studies, settings, progress, estimated))
    listed = tuple(_held_out(study, recipe) for study in read_studies(studies / "studies.csv"))
    write_studies(listed, studies / "studies.csv")

    preparation = Preparation(workers)
    encoder, model = out / "encoder.safetensors", out / "model.safetensors"
    train_encoder(
        listed,
        encoder,
        settings=recipe.encoder,
        slabs=recipe.slabs,
        network=recipe.encoder_network,
        classifier=recipe.classifier_network,
        preparation=preparation,
        progress=progress,
    )
    train_classifier(
        listed,
        encoder,
        model,
        settings=recipe.classifier,
        network=recipe.classifier_network,
        preparation=preparation,
        progress=progress,
    )
    judged = evaluate(listed, [model], out / "evaluation", studies / "masks", recipe.evaluation, progress)
    write_evaluation(judged, out / "evaluation", studies / "masks", progress)
    return judged


def _held_out(study: Study, recipe: PublicRecipe) -> Study:
    """Test sets are for testing alone; a set's own split stays otherwise."""
    return replace(study, split="test") if study.source in recipe.test_sets else study
