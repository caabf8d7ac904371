"""Verbs for many studies at once: phantom, label-reports, evaluate, compare."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pe_app.cli.options import Model, StudyList, progress_bars
from pe_app.common.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pe_app.reports.report_labels import ReportLabel


class Burden(StrEnum):
    """How much clot the simulated patients have."""

    MIXED = "mixed"
    LARGE = "large"


def phantom(
    out: Annotated[Path, typer.Option(help="Folder for volumes, masks, annotations and studies.csv.")],
    studies: Annotated[int | None, typer.Option(min=1, help="How many; every other one has emboli. [default: 300 with "
                                                "--benchmark]")] = None,
    benchmark: Annotated[bool, typer.Option("--benchmark", help="Twins with and without emboli, in which something "
                                            "irrelevant goes with the label in the training studies only.")] = False,
    seed: Annotated[int, typer.Option(help="The same seed gives the same studies.")] = 0,
    matrix: Annotated[int | None, typer.Option(min=64, help="Rows and columns; 512 as scanners do, 128 for trials. "
                                               "[default: 512, 256 with --benchmark]")] = None,
    spacing_mm: Annotated[float | None, typer.Option(min=0.3, max=10, help="Between slices. [default: drawn as "
                                                     "hospitals do; 2.5 with --benchmark below 512]")] = None,
    burden: Annotated[Burden | None, typer.Option(help="Emboli of every size, as a hospital sees them; or only large "
                                                  "ones in central and lobar arteries, as a first check that a "
                                                  "detector finds what nobody would miss. [default: mixed, large with "
                                                  "--benchmark, whose share of tiny ones stays]")] = None,
    vessels: Annotated[Path | None, typer.Option(help="Folder of real patients' vessel masks, NAME.nii.gz (1 artery, 2 "
                                                      "vein) and NAME_lungmask.nii.gz: studies of these trees, bent "
                                                      "anew, with clots of real size.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. [default: one a core]")] = None,
) -> None:  # fmt: skip
    """Simulated enhanced chest CT with emboli of known place, annotated as a reader would, and their study list."""
    import os

    from pe_app.phantom import PhantomConfig, write_phantom_studies
    from pe_app.research.benchmark import BenchmarkConfig, write_benchmark

    processes = workers or os.cpu_count() or 1
    if not benchmark and studies is None:
        raise InputError("how many studies? Say --studies 8, or --benchmark for the benchmark")
    if vessels and (benchmark or matrix or spacing_mm or burden):
        raise InputError("--vessels decides matrix, spacing and clots itself: leave out the options for them")
    with progress_bars() as progress:
        if benchmark:
            matrix = matrix or 256
            spacing = spacing_mm or (2.5 if matrix < 512 else None)
            config = BenchmarkConfig(
                (studies or 300) // 2, burden=(burden or Burden.LARGE).value, matrix=matrix, spacing_mm=spacing
            )
            study_list = write_benchmark(out, config, seed, progress, processes)
        else:
            made = PhantomConfig(matrix=matrix or 512, spacing_mm=spacing_mm, burden=(burden or Burden.MIXED).value)
            study_list = write_phantom_studies(out, studies or 0, seed, made, progress, processes, vessels)
    typer.echo(f"Study list: {study_list}. Volumes to serve: {out / 'volumes'}")


def label_reports(
    reports: Annotated[Path, typer.Argument(help="CSV with the column report, and study, accession, study_uid, or "
                                                 "patient and date.")],
    out: Annotated[Path, typer.Option(help="CSV of study, label, deciding sentence, location, side, acuity.")],
    studies: Annotated[Path | None, typer.Option(help="Study list to fill in: labels that are there stay.")] = None,
    key: Annotated[Path | None, typer.Option(help="Key of a de-identified import, by which true accession numbers find "
                                                  "their pseudonyms in the study list.")] = None,
) -> None:  # fmt: skip
    """Mine study labels from radiology reports: positive, negative or uncertain, with the sentence that decided."""
    from dataclasses import replace

    from pe_app.pacs.importing import Pseudonyms, read_key
    from pe_app.reports.label_files import join_labels, label_studies, pseudonym_of, write_labels
    from pe_app.reports.label_files import label_reports as label
    from pe_app.studies import read_studies, write_studies

    if key and not studies:
        raise InputError("--key finds studies in a de-identified study list: give it with --studies")
    known = read_studies(studies) if studies else ()
    with progress_bars() as progress:
        labelled = label(reports, out, progress)
    _show_labels([one.found for one in labelled], out)
    if not studies:
        return
    pseudonyms = Pseudonyms(read_key(key, studies.parent, make=False)) if key else None
    joined = join_labels(labelled, known, (lambda one: pseudonym_of(one, pseudonyms)) if pseudonyms else None)
    ids = joined.studies
    write_labels([replace(one, key=one.key._replace(study=ids.get(one.place, ""))) for one in labelled], out)
    done = label_studies(known, joined.labels)
    write_studies(done, studies)
    gained = sum(new.label != old.label for new, old in zip(done, known, strict=True))
    typer.echo(
        f"{len(joined.labels)} of {len(labelled)} reports belong to a study of {studies}; "
        f"{gained} of {len(known)} studies got a label"
    )
    _name_some("reports belong to no study of the list", [f"{one.place} ({one.key})" for one in joined.unmatched])
    _name_some("reports may belong to several studies", [f"{one.place} ({one.key})" for one in joined.ambiguous])
    _name_some("studies have no report", joined.without_report)


NAMED = 10
"""Of what did not match, so many are named."""


def _name_some(what: str, names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        typer.echo(f"{len(names)} {what}: {', '.join(names[:NAMED])}{more}", err=True)


def _show_labels(found: Sequence[ReportLabel], out: Path) -> None:
    """How many reports got each label, and how many were not read or mention nothing that the rules know."""
    from collections import Counter

    counts = Counter(one.label for one in found)
    typer.echo(", ".join(f"{counts[label]} {label}" for label in ("positive", "negative", "uncertain")) + f": {out}")
    unread = Counter(one.unread for one in found if one.unread)
    for language, count in unread.most_common():
        typer.echo(f"{count} of {len(found)} reports were not read, the rules know English only: {language}", err=True)
    silent = sum(not one.sentence and not one.unread for one in found)
    if silent:
        typer.echo(
            f"{silent} of {len(found)} reports ({silent / len(found):.0%}) mention nothing that the rules know; they "
            "are uncertain and label no study",
            err=True,
        )


def evaluate(
    studies: StudyList,
    out: Annotated[Path, typer.Option(help="Folder for metrics.json, predictions.csv, index.html and report.pdf.")],
    model: Model = None,
    more: Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="More models to compare.")] = None,
    untrained_baseline: Annotated[bool, typer.Option("--untrained-baseline", help="Also let random weights look; "
                                                     "costs another pass.")] = False,
    allow_training_studies: Annotated[bool, typer.Option("--allow-training-studies", help="Do not refuse studies that "
                                                         "a model was trained on; the result says so.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of bootstrap intervals and pictures.")] = 0,
) -> None:  # fmt: skip
    """How good models are on the test studies of a list: AUC, operating points, calibration, where they look."""
    from pe_app.evaluation.evaluate import EvaluationSettings
    from pe_app.evaluation.evaluate import evaluate as judge
    from pe_app.evaluation.report import summary, write_evaluation
    from pe_app.model.detector import default_model
    from pe_app.studies import read_studies

    models = [path for path in (model or default_model(), *(more or ())) if path is not None]
    if not models:
        raise InputError("no model: give one or more with --model FILE [FILE]...")
    settings = EvaluationSettings(untrained_baseline, allow_training_studies, seed)
    masks = studies.parent / "masks"
    with progress_bars() as progress:
        evaluation = judge(read_studies(studies), models, out, masks, settings, progress)
        write_evaluation(evaluation, out, masks, progress)
    typer.echo("\n".join(summary(evaluation)))
    typer.echo(f"Open {out / 'index.html'}. Research use only, not for diagnosis.")


class Size(StrEnum):
    """How large the networks of a comparison are."""

    FULL = "full"
    SMALL = "small"


def compare(
    studies: StudyList,
    out: Annotated[Path, typer.Option(help="Folder for models, comparison.csv, comparison.png and index.html.")],
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of every system.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="Of the first training: several calls, each with seeds of its "
                                            "own, may fill the same folder at the same time.")] = 0,
    systems: Annotated[str, typer.Option(help="Names with commas between; scenario3 is always among them. "
                                         "[default: all]")] = "",
    size: Annotated[Size, typer.Option(help="The paper's, or small ones for two processor cores.")] = Size.FULL,
    encoder_epochs: Annotated[int | None, typer.Option(min=1, help="Of stage I. [default: 100, small 12]")] = None,
    classifier_epochs: Annotated[int | None, typer.Option(min=1, help="Of stage II. [default: 50, small 8]")] = None,
    matrix: Annotated[int, typer.Option(min=32, help="Small size: rows and columns of a slice.")] = 256,
    crop: Annotated[int, typer.Option(min=64, help="Small size: centre crop, a multiple of 64.")] = 192,
    slab_count: Annotated[int, typer.Option(min=2, help="Small size: slabs of a study, an even number.")] = 16,
    synthetic: Annotated[bool, typer.Option(help="Record that every embolism is simulated or painted.")] = False,
) -> None:  # fmt: skip
    """The paper's Table 1 and scenarios on a study list, and options beyond it. Goes on where it was interrupted."""
    from dataclasses import replace

    from pe_app.research.benchmark import read_truth_table
    from pe_app.research.comparison.page import summary, write_comparison
    from pe_app.research.comparison.run import compare as train_and_ask
    from pe_app.research.comparison.run import finished
    from pe_app.research.comparison.systems import SYSTEMS, Plan, choose_systems, small_plan
    from pe_app.studies import read_studies

    plan = Plan() if size is Size.FULL else small_plan(matrix, crop, slab_count)
    if encoder_epochs:
        plan = replace(plan, encoder=replace(plan.encoder, epochs=encoder_epochs))
    if classifier_epochs:
        plan = replace(plan, classifier=replace(plan.classifier, epochs=classifier_epochs))
    chosen = choose_systems([name.strip() for name in systems.split(",") if name.strip()])
    masks = studies.parent / "masks"
    try:
        with progress_bars() as progress:
            train_and_ask(
                read_studies(studies), out, chosen, plan, range(first_seed, first_seed + seeds),
                masks if masks.is_dir() else None, synthetic, progress,
            )  # fmt: skip
    finally:  # what an interrupted call has finished is shown, too
        outcomes = finished(out)
        if outcomes:
            truth = read_truth_table(studies.parent / "truth.csv")
            typer.echo("\n".join(summary(write_comparison(outcomes, SYSTEMS, out, truth, synthetic))))
            typer.echo(f"Open {out / 'index.html'}. Research use only, not for diagnosis.")


def calibrate(
    studies: StudyList,
    model: Annotated[Path, typer.Option("--model", help="A model with both stages trained.")],
    out: Annotated[Path, typer.Option(help="The calibrated model; may be the same file.")],
    sensitivity: Annotated[float | None, typer.Option(help="Share of positive validation studies that the threshold "
                                                      "is to find. [default: the threshold stays 0.5]")] = None,
) -> None:  # fmt: skip
    """Choose a model's temperature and threshold on the validation studies of a list and keep them in its file."""
    from pe_app.studies import read_studies
    from pe_app.training.calibration import calibrate as choose

    with progress_bars() as progress:
        decision = choose(read_studies(studies), model, out, sensitivity, progress)
    typer.echo(f"{out}: {decision}. Now measure on test studies: pe-app evaluate --model {out} ...")
