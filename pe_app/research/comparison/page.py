"""A comparison as one table and one figure: comparison.csv, comparison.png, index.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats

import pe_app
from pe_app.common.files import replacing, write_durably
from pe_app.common.tables import table_text
from pe_app.evaluation.evaluate import Estimate
from pe_app.evaluation.pictures import BACKGROUND, INK, MUTED
from pe_app.evaluation.report import Section, Table, web_page
from pe_app.evaluation.roc import Auc, AucDifference, auc, compare_aucs
from pe_app.model.detection import NOTICE
from pe_app.model.detector import THRESHOLD
from pe_app.research.benchmark import Nuisance, Truth
from pe_app.research.comparison.run import Outcome
from pe_app.research.comparison.systems import REFERENCE, System

WORD, BEYOND, PAPER = "#4fb3ff", "#7ee081", "#ffb000"
UNKNOWN = "?"
"""Shown by a study that no truth table names."""


@dataclass(frozen=True)
class Row:
    """One system over all seeds.

    Attributes:
        system: which.
        aucs: of each seed on the test studies.
        auc: their mean; its interval is that of the choice of test studies (DeLong).
        seeds: their mean; its interval is that of the seeds (Student's t); None with one seed.
        accuracy: mean share decided rightly at 0.5.
        difference: to the reference, paired DeLong over all seeds; None for the reference.
        pointing: mean share of positive studies whose attention peaks on an embolism; None where not known.
        slab_auc: mean; None where not known.
        tiny_auc: mean AUC of studies with a tiny embolus against the negative ones; None without a truth table.
        nuisance_auc: mean AUC of the probability for the irrelevant thing, which goes with no label in the test: 0.5
            ignores it, 1 has learned it; None without a truth table.
        nuisance_aucs: the same of each kind of thing, against the studies that show none.
        plain_auc: mean AUC among the studies that show nothing irrelevant; None without a truth table.
        parameters, training_studies, seconds: of one training.
    """

    system: System
    aucs: tuple[float, ...]
    auc: Auc
    seeds: Estimate | None
    accuracy: float
    difference: AucDifference | None
    pointing: float | None
    slab_auc: float | None
    tiny_auc: float | None
    nuisance_auc: float | None
    nuisance_aucs: Mapping[str, float]
    plain_auc: float | None
    parameters: int
    training_studies: int
    seconds: float


def rows(outcomes: Sequence[Outcome], systems: Sequence[System], truth: Mapping[str, Truth]) -> tuple[Row, ...]:
    """One row a system, in their order, from the seeds that are finished."""
    by_name = {system.name: [outcome for outcome in outcomes if outcome.system == system.name] for system in systems}
    found = []
    for system in systems:
        runs = by_name[system.name]
        if not runs:
            continue
        labels = np.array(runs[0].labels)
        scores = _scores(runs)
        seeds = {run.seed for run in runs}
        reference = _scores([run for run in by_name.get(REFERENCE, []) if run.seed in seeds])
        area = auc(labels, scores)
        aucs = tuple(auc(labels, run).value for run in scores)
        differs = system.name != REFERENCE and len(reference) == len(scores)
        found.append(
            Row(
                system,
                aucs,
                area,
                _over_seeds(aucs),
                float(((scores >= THRESHOLD) == labels).mean()),
                compare_aucs(labels, scores, reference) if differs else None,
                _mean([value for run in runs for value in run.pointing]),
                _mean([run.slab_auc for run in runs]),
                _tiny(runs[0], scores, truth),
                _nuisance(runs[0], scores, truth),
                _nuisances(runs[0], scores, truth),
                _plain(runs[0], scores, truth),
                runs[0].parameters,
                runs[0].training_studies,
                float(np.mean([run.seconds for run in runs])),
            )
        )
    return tuple(found)


def write_comparison(
    outcomes: Sequence[Outcome], systems: Sequence[System], out: Path, truth: Mapping[str, Truth], synthetic: bool
) -> tuple[Row, ...]:
    """Write comparison.csv, comparison.png and index.html into ``out``; returns what stands in them."""
    table = rows(outcomes, systems, truth)
    write_durably(out / "comparison.csv", comparison_csv(table))
    figure = draw_comparison(table)
    with replacing(out / "comparison.png") as unfinished:
        FigureCanvasAgg(figure).print_png(unfinished)
    warnings = [NOTICE]
    if synthetic:
        warnings.append("Every embolism is simulated or inserted: these figures do not apply to patients.")
    date = datetime.now(UTC).isoformat(timespec="seconds")
    first = outcomes[0]
    positive = sum(first.labels)
    text = (
        f"{len(first.labels)} test studies, {positive} positive. AUC: mean over the seeds, 95% interval of the choice "
        "of studies (DeLong), then of the seeds (Student's t). Difference: to scenario 3 on "
        "the same studies and seeds, paired DeLong; p is not corrected for several comparisons.",
        "Pointing: the attention's maximum lies on an embolism. AUC, tiny: studies whose only embolus is the smallest "
        "of several, against the negative ones. AUC for the irrelevant: how well the probability tells what goes with "
        "the label in the training studies and with nothing in the test; 0.5 ignores it, 1 has learned nothing else.",
        "The paper's figures are of other studies and stand here for their order only.",
    )
    sections = (
        Section("Table", text, Table(tuple(_HEAD), tuple(tuple(_cells(row)) for row in table))),
        *((_irrelevant(table),) if truth else ()),
        Section("Figure", figure=figure),
    )
    footer = f"Made {date} by pe-app {pe_app.__version__}."
    write_durably(out / "index.html", web_page(warnings, sections, footer, "Comparison"))
    return table


def summary(table: Sequence[Row]) -> tuple[str, ...]:
    """A line a system for the command line."""
    width = max(len(row.system.title) for row in table)
    return tuple(
        f"{row.system.title:{width}}  AUC {row.auc.value:.3f} ({row.auc.low:.3f} to {row.auc.high:.3f})"
        + (f", to scenario 3 {row.difference.value:+.3f} (p {row.difference.p_value:.2g})" if row.difference else "")
        for row in table
    )


def comparison_csv(table: Sequence[Row]) -> str:
    """One line a system, numbers as they are; what is not known is empty."""
    rows = []
    columns = (
        ("system", "title", "seeds", "auc", "auc_low", "auc_high", "auc_seeds_low", "auc_seeds_high", "auc_by_seed",
         "accuracy", "difference", "difference_low", "difference_high", "p", "pointing_study", "slab_auc", "auc_tiny",
         "auc_irrelevant", *(f"auc_{kind}" for kind in get_args(Nuisance)), "auc_plain",
         "parameters", "training_studies", "training_seconds", "paper_auc")
    )  # fmt: skip
    for row in table:
        gap = row.difference
        cells = (
            row.system.name, row.system.title, len(row.aucs), row.auc.value, row.auc.low, row.auc.high,
            row.seeds and row.seeds.low, row.seeds and row.seeds.high, " ".join(f"{value:.4f}" for value in row.aucs),
            row.accuracy, gap and gap.value, gap and gap.low, gap and gap.high, gap and gap.p_value, row.pointing,
            row.slab_auc, row.tiny_auc, row.nuisance_auc,
            *(row.nuisance_aucs.get(kind) for kind in get_args(Nuisance)), row.plain_auc,
            row.parameters, row.training_studies, row.seconds, row.system.paper_auc,
        )  # fmt: skip
        rows.append([f"{cell:.4f}" if isinstance(cell, float) else cell for cell in cells])
    return table_text(columns, rows)


def draw_comparison(table: Sequence[Row]) -> Figure:
    """AUC of every system: mean and interval, a small dot a seed, the paper's figure as a diamond."""
    figure = Figure(figsize=(11, 1.3 + 0.42 * len(table)), dpi=100, facecolor=BACKGROUND)
    axes = figure.add_subplot()
    figure.subplots_adjust(
        left=0.43, right=0.98, top=1 - 0.35 / figure.get_figheight(), bottom=0.75 / figure.get_figheight()
    )
    axes.set_facecolor(BACKGROUND)
    for place, row in enumerate(table):
        colour = BEYOND if row.system.beyond else WORD
        errors = [[row.auc.value - row.auc.low], [row.auc.high - row.auc.value]]
        axes.errorbar([row.auc.value], [place], xerr=errors, color=colour, marker="o", markersize=7, linewidth=1.6)
        axes.plot(row.aucs, [place + 0.25] * len(row.aucs), ".", color=MUTED, markersize=5)
        if row.system.paper_auc is not None:
            axes.plot([row.system.paper_auc], [place - 0.25], "D", color=PAPER, markersize=5)
    axes.axvline(0.5, color=MUTED, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(table)), [row.system.title for row in table], color=INK, fontsize=9)
    axes.invert_yaxis()
    axes.tick_params(colors=MUTED, labelsize=9)
    axes.tick_params(axis="y", colors=INK, length=0)
    axes.set_xlabel(
        "AUC on the test studies; bar: 95% DeLong, grey: each seed, diamond: the paper, on its own studies",
        color=MUTED, fontsize=9, x=0.25,
    )  # fmt: skip
    axes.grid(axis="x", color="#2b333c", linewidth=0.7)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_color(MUTED)
    return figure


_HEAD = ("system", "AUC", "over seeds", "accuracy", "difference to scenario 3", "p", "pointing", "slab AUC",
         "AUC, tiny", "AUC for the irrelevant", "parameters", "studies learned from", "minutes", "paper")  # fmt: skip


def _cells(row: Row) -> list[str]:
    gap = row.difference
    return [
        row.system.title,
        f"{row.auc.value:.3f} ({row.auc.low:.3f}\u00a0to\u00a0{row.auc.high:.3f})",
        f"{row.seeds.low:.3f}\u00a0to\u00a0{row.seeds.high:.3f} ({len(row.aucs)} seeds)" if row.seeds else "one seed",
        f"{row.accuracy:.3f}",
        f"{gap.value:+.3f} ({gap.low:+.3f}\u00a0to\u00a0{gap.high:+.3f})" if gap else "",
        f"{gap.p_value:.2g}" if gap else "",
        *("" if value is None else f"{value:.2f}" for value in (row.pointing, row.slab_auc)),
        *("" if value is None else f"{value:.3f}" for value in (row.tiny_auc, row.nuisance_auc)),
        f"{row.parameters:,}",
        str(row.training_studies),
        f"{row.seconds / 60:.1f}",
        "" if row.system.paper_auc is None else f"{row.system.paper_auc:.3f}",
    ]


def _scores(runs: Sequence[Outcome]) -> NDArray[np.float64]:
    """``(seeds, studies)``."""
    return np.array([run.probabilities for run in sorted(runs, key=lambda run: run.seed)], dtype=np.float64)


def _over_seeds(aucs: Sequence[float]) -> Estimate | None:
    if len(aucs) < 2:
        return None
    mean = float(np.mean(aucs))
    margin = float(stats.t.ppf(0.975, len(aucs) - 1) * np.std(aucs, ddof=1) / len(aucs) ** 0.5)
    return Estimate(mean, max(mean - margin, 0.0), min(mean + margin, 1.0))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _tiny(run: Outcome, scores: NDArray[np.float64], truth: Mapping[str, Truth]) -> float | None:
    chosen = np.array([
        study in truth and (not positive or truth[study].tiny)
        for study, positive in zip(run.studies, run.labels, strict=True)
    ])  # fmt: skip
    return _auc_of(np.array(run.labels)[chosen], scores[:, chosen])


def _nuisance(run: Outcome, scores: NDArray[np.float64], truth: Mapping[str, Truth]) -> float | None:
    shown = _shown(run, truth)
    chosen = shown != UNKNOWN
    return _auc_of(shown[chosen] != "", scores[:, chosen])


def _nuisances(run: Outcome, scores: NDArray[np.float64], truth: Mapping[str, Truth]) -> dict[str, float]:
    shown = _shown(run, truth)
    found = {}
    for kind in get_args(Nuisance):
        chosen = np.isin(shown, (kind, ""))
        area = _auc_of(shown[chosen] == kind, scores[:, chosen])
        if area is not None:
            found[kind] = area
    return found


def _plain(run: Outcome, scores: NDArray[np.float64], truth: Mapping[str, Truth]) -> float | None:
    chosen = _shown(run, truth) == ""
    return _auc_of(np.array(run.labels)[chosen], scores[:, chosen])


def _shown(run: Outcome, truth: Mapping[str, Truth]) -> NDArray[np.str_]:
    """The irrelevant thing that each study shows, "" for none."""
    return np.array([truth[study].nuisance if study in truth else UNKNOWN for study in run.studies])


def _irrelevant(table: Sequence[Row]) -> Section:
    """What was learned of the irrelevant, kind by kind."""
    text = (
        "AUC of the study probability for each irrelevant thing, against the test studies that show none; and the AUC "
        "for embolism among the studies that show nothing irrelevant. A lead and a dense rib lesion have a place that "
        "attention can avoid; streaks between lowered arms cross a slice, and a sharp kernel is everywhere, also on an "
        "embolus.",
    )
    kinds = get_args(Nuisance)
    body = tuple(
        (
            row.system.title,
            *(f"{row.nuisance_aucs[kind]:.3f}" if kind in row.nuisance_aucs else "" for kind in kinds),
            "" if row.plain_auc is None else f"{row.plain_auc:.3f}",
        )
        for row in table
    )
    return Section("The irrelevant", text, Table(("system", *kinds, "AUC, nothing irrelevant"), body))


def _auc_of(labels: NDArray[np.bool_], scores: NDArray[np.float64]) -> float | None:
    if labels.sum() < 2 or (~labels).sum() < 2:
        return None
    return auc(labels, scores).value
