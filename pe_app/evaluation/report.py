"""An evaluation as files: metrics.json, predictions.csv, and the same report as a web page and as PDF."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

import pe_app
from pe_app.common.files import replacing, write_durably
from pe_app.common.progress import ProgressCallback, silent
from pe_app.evaluation.evaluate import MODEL, Estimate, Evaluation, Localisation, ModelEvaluation
from pe_app.evaluation.pictures import BACKGROUND, INK, MUTED, draw_pictures
from pe_app.evaluation.predictions import PredictionFile
from pe_app.evaluation.roc import OperatingPoint, Proportion, proportion
from pe_app.model.detection import NOTICE

SCHEMA = "pe-evaluation/1"

SHOWN_DISTANCE_MM = 5.0
"""FROC distance of the figure: half a cell of the attention map."""

COLOURS = ("#ffb000", "#4fb3ff", "#7ee081", "#ff6b5e", "#c792ea", "#f5e663")
GREYS = {"centred Gaussian": ":", "mean training mask": "--", "untrained network": "-."}


@dataclass(frozen=True)
class Table:
    """A table of words."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, eq=False)
class Section:
    """A part of the report; page and PDF show it alike."""

    title: str
    text: tuple[str, ...] = ()
    table: Table | None = None
    figure: Figure | None = None


def write_evaluation(
    evaluation: Evaluation, out: Path, masks: Path | None = None, progress: ProgressCallback = silent
) -> None:
    """Write metrics.json, predictions.csv, index.html and report.pdf into ``out``, where the detections are kept."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    write_durably(out / "metrics.json", json.dumps(metrics(evaluation, date), indent=1, allow_nan=False))
    write_durably(out / "predictions.csv", predictions_csv(evaluation))
    warnings, sections = warnings_of(evaluation), list(report(evaluation))
    kept = PredictionFile(out / "predictions.jsonl")
    for model in evaluation.models:
        figures = draw_pictures(model, kept, masks, evaluation.settings.seed, progress)
        words = "CT in the window for PE, the embolism outlined in blue, attention times slab probability in colour."
        sections += [
            Section(f"Attention of {model.name}. {kind}", (words,), figure=figure) for kind, figure in figures.items()
        ]
    footer = f"Made {date} by pe-app {pe_app.__version__}."
    write_durably(out / "index.html", web_page(warnings, sections, footer))
    with replacing(out / "report.pdf") as unfinished:
        _write_pdf(unfinished, warnings, sections, footer)


def metrics(evaluation: Evaluation, date: str) -> dict[str, object]:
    """All figures as plain finite JSON; what could not be computed is null, and ``notes`` say why."""
    cohort = evaluation.cohort
    payload: dict[str, object] = {
        "schema": SCHEMA,
        "notice": NOTICE,
        "program": f"pe-app {pe_app.__version__}",
        "date": date,
        "settings": asdict(evaluation.settings),
        "studies": {
            "listed": cohort.listed,
            "split": cohort.split,
            "labelled": len(cohort.studies),
            "positive": sum(study.label == "positive" for study in cohort.studies),
            "left_out_uncertain": cohort.uncertain,
            "left_out_unknown": cohort.unknown,
        },
        "models": [_model_metrics(model) for model in evaluation.models],
        "comparisons": [asdict(comparison) for comparison in evaluation.comparisons],
    }
    return _finite(payload)  # type: ignore[return-value]


def predictions_csv(evaluation: Evaluation) -> str:
    """One line a study and model."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ("study", "patient", "label", "model", "status", "probability", "called", "slice_spacing_mm", "pointing",
         "energy_inside", "key_slice_hit_3", "image_sha256", "model_sha256", "reason")
    )  # fmt: skip
    for model in evaluation.models:
        for entry in model.predictions:
            look = entry.localisation.get(MODEL)
            called = (
                ""
                if entry.probability is None
                else ("negative", "positive")[entry.probability >= model.decision.threshold]
            )
            row = (
                entry.study.study,
                entry.study.patient,
                entry.study.label,
                model.name,
                entry.status,
                entry.probability,
                called,
                entry.slice_spacing_mm,
                look.pointing if look else None,
                f"{look.energy.mean():.4f}" if look and len(look.energy) else None,
                int(look.key_slice) if look and look.key_slice is not None else None,
                entry.image_sha256,
                model.sha256,
                entry.reason,
            )
            writer.writerow(["" if cell is None else cell for cell in row])
    return text.getvalue()


def warnings_of(evaluation: Evaluation) -> tuple[str, ...]:
    """What stands on top of everything."""
    warnings = [NOTICE]
    for model in evaluation.models:
        warnings += [f"{model.name}: {reason.message}" for reason in model.card.reasons()]
        if model.card.terms:
            warnings.append(f"{model.name}: learned from data with terms of use: {'; '.join(model.card.terms)}.")
        if model.training_studies:
            count, total = len(model.training_studies), len(model.predictions)
            warnings.append(
                f"NOT A TEST: {model.name} was trained on {count} of these {total} studies "
                f"({_listed(model.training_studies)}). Its figures flatter it."
            )
    return tuple(warnings)


def summary(evaluation: Evaluation) -> tuple[str, ...]:
    """A few lines for the command line; the warnings first."""
    lines = list(warnings_of(evaluation)[1:])
    for model in evaluation.models:
        words = [f"{len(model.analysed)} of {len(model.predictions)} studies analysed"]
        if model.discrimination:
            area = model.discrimination.auc
            words.append(f"AUC {_interval(Estimate(area.value, area.low, area.high), 3)}")
        own = next((entry for entry in model.localisation if entry.system == MODEL), None)
        if own and own.pointing_study:
            words.append(f"pointing game {_interval(own.pointing_study, 2)}")
        lines += [f"{model.name}: {', '.join(words)}", *(f"  {note}" for note in model.notes)]
    return tuple(lines)


def report(evaluation: Evaluation) -> tuple[Section, ...]:
    """Everything but the attention pictures."""
    return (
        _studies(evaluation),
        _results(evaluation),
        Section("Curves", figure=draw_curves(evaluation)),
        *_comparisons(evaluation),
        _where(evaluation),
        *_froc(evaluation),
        _strata(evaluation),
        _not_analysed(evaluation),
        _models(evaluation),
    )


def draw_curves(evaluation: Evaluation) -> Figure:
    """ROC, calibration and FROC of all models, side by side."""
    figure = Figure(figsize=(15, 5.4), dpi=100, facecolor=BACKGROUND)
    panels = [figure.add_subplot(1, 3, column) for column in (1, 2, 3)]
    figure.subplots_adjust(left=0.045, right=0.99, top=0.92, bottom=0.105, wspace=0.2)
    for draw, axes in zip((_draw_roc, _draw_calibration, _draw_froc), panels, strict=True):
        axes.set_facecolor(BACKGROUND)
        axes.tick_params(colors=MUTED, labelsize=9)
        for spine in axes.spines.values():
            spine.set_color(MUTED)
        axes.grid(color="#2b333c", linewidth=0.7)
        axes.set_axisbelow(True)
        draw(axes, evaluation)
        axes.title.set_color(INK)
        axes.xaxis.label.set_color(MUTED)
        axes.yaxis.label.set_color(MUTED)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(
                loc="lower right" if draw is not _draw_froc else "upper left",
                fontsize=8.5, facecolor="#1b2128", edgecolor="#2b333c", labelcolor=INK,
            )  # fmt: skip
    return figure


def web_page(warnings: Sequence[str], sections: Sequence[Section], footer: str, title: str = "Evaluation") -> str:
    """A self-contained HTML page: no script, nothing loaded from elsewhere, every text escaped."""
    body = "".join(f"<p class=notice>{html.escape(warning)}</p>" for warning in warnings)
    for section in sections:
        body += f"<h2>{html.escape(section.title)}</h2>"
        body += "".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in section.text)
        if section.table:
            body += _html_table(section.table)
        if section.figure:
            picture = base64.b64encode(_png(section.figure)).decode()
            body += f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{picture}">'
    return _PAGE.format(title=html.escape(title), body=body, footer=html.escape(footer))


def _studies(evaluation: Evaluation) -> Section:
    cohort = evaluation.cohort
    which = "of split 'test'" if cohort.split else "of all splits (none is marked as test)"
    positive = sum(study.label == "positive" for study in cohort.studies)
    count = len(cohort.studies)
    lines = [
        f"{count} labelled studies {which}, from a list of {cohort.listed}: {positive} positive, {count - positive} "
        f"negative. Left out: {cohort.uncertain} with an uncertain and {cohort.unknown} with no label."
    ]
    for model in evaluation.models:
        status = [prediction.status for prediction in model.predictions]
        missed = [f"{status.count(kind)} {kind}" for kind in ("refused", "unreadable", "failed", "duplicate")]
        missed = [words for words in missed if not words.startswith("0 ")]
        lines.append(
            f"{model.name} analysed {len(model.analysed)} of {count} ({len(model.analysed) / count:.0%})"
            + (f"; {', '.join(missed)}, listed below. All figures are of the analysed ones only." if missed else ".")
        )
    return Section("Studies", tuple(lines))


def _results(evaluation: Evaluation) -> Section:
    head = ("model", "AUC", "accuracy", "sensitivity", "specificity", "PPV", "NPV", "sensitivity at specificity 80%",
            "90%", "95%", "Brier", "ECE")  # fmt: skip
    rows = []
    text = []
    for model in evaluation.models:
        figures = model.discrimination
        text += [f"{model.name}: {note}" for note in model.notes]
        if figures is None:
            rows.append((model.name, *("not computed",) * (len(head) - 1)))
            continue
        point, area = figures.operating_point, figures.auc
        rows.append(
            (
                model.name,
                _interval(Estimate(area.value, area.low, area.high), 3),
                *(_share(share) for share in _shares(point)),
                *(_share(entry.point.sensitivity) for entry in figures.at_specificity),
                f"{figures.calibration.brier:.3f}",
                f"{figures.calibration.expected_error:.3f}",
            )
        )
    analysed = [prediction.positive for prediction in evaluation.models[0].analysed]
    if analysed:
        share = sum(analysed) / len(analysed)
        text.append(
            "A study counts as positive at or above the model's threshold (see Models). "
            f"{share:.0%} of the analysed studies are positive: PPV, NPV and accuracy hold for that share only, and "
            f"always answering the same would have an accuracy of {max(share, 1 - share):.2f}. Intervals are 95%: "
            "DeLong for AUC, Wilson for shares."
        )
    return Section("Positive or negative?", tuple(text), Table(head, tuple(rows)))


def _comparisons(evaluation: Evaluation) -> tuple[Section, ...]:
    if not evaluation.comparisons:
        return ()
    rows = []
    for pair in evaluation.comparisons:
        difference = pair.difference
        words = ("too few studies of either kind", "") if difference is None else (
            _interval(Estimate(difference.value, difference.low, difference.high), 3), f"{difference.p_value:.3g}"
        )  # fmt: skip
        rows.append((f"{pair.first} - {pair.second}", str(pair.studies), *words))
    text = "Paired DeLong test on the studies that both analysed; p-values are not corrected for several comparisons."
    return (
        Section("Models compared", (text,), Table(("AUC difference", "studies", "95% interval", "p"), tuple(rows))),
    )


def _where(evaluation: Evaluation) -> Section:
    head = ("model", "looks", "studies", "slabs", "pointing game, study", "pointing game, slab", "energy inside",
            "key slice hit@3", "attention on negatives")  # fmt: skip
    rows = tuple(
        (
            model.name,
            _system(entry),
            str(entry.studies),
            str(entry.slabs),
            *(
                _interval(value, 2)
                for value in (
                    entry.pointing_study,
                    entry.pointing_slab,
                    entry.energy_inside,
                    entry.key_slice_hit_3,
                )
            ),
            _interval(entry.map_mass_negatives, 4),
        )
        for model in evaluation.models
        for entry in model.localisation
    )
    text = (
        "Judged on the cells of the attention map (about 11 mm at full size), in positive studies with a mask, beside "
        "baselines that see no image or have learnt nothing. Pointing game: the maximum lies on an embolism, for the "
        "whole study or slab by slab. Energy inside: share of a slab's attention on the embolism. Key slice hit@3: one "
        "of the three strongest slabs shows embolism, give or take one. Attention on negatives: mean attention times "
        "slab probability; less is better. Intervals are 95%: Wilson for studies, bootstrap over studies for slabs.",
    )
    if not rows:
        return Section("Where does it look?", ("No study was analysed.",))
    return Section("Where does it look?", text, Table(head, rows))


def _froc(evaluation: Evaluation) -> tuple[Section, ...]:
    rows = tuple(
        (model.name, _system(entry), str(entry.emboli), str(entry.froc_studies), f"{curve.distance_mm:g} mm",
         *(_interval(Estimate(point.sensitivity, point.low, point.high), 2) for point in curve.points))
        for model in evaluation.models
        for entry in model.localisation
        for curve in entry.froc
    )  # fmt: skip
    if not rows:
        return ()
    points = next(entry.froc[0].points for model in evaluation.models for entry in model.localisation if entry.froc)
    rates = tuple(f"{point.false_per_study:g} false a study" for point in points)
    text = (
        "Share of all emboli hit by a candidate (its centre lies in the embolus or at most so many mm away) at a "
        "number of false candidates a study; 95% bootstrap over studies.",
    )
    return (
        Section("Emboli found (FROC)", text, Table(("model", "looks", "emboli", "studies", "distance", *rates), rows)),
    )


def _strata(evaluation: Evaluation) -> Section:
    rows = []
    for model in evaluation.models:
        for stratum in model.strata:
            figures = stratum.discrimination
            counts = (model.name, stratum.group, stratum.name, str(stratum.studies), str(stratum.positive))
            if figures is None:
                rows.append((*counts, "fewer than 2 of a kind", "", ""))
                continue
            area, point = figures.auc, figures.operating_point
            rows.append(
                (*counts, _interval(Estimate(area.value, area.low, area.high), 3), _share(point.sensitivity),
                 _share(point.specificity))
            )  # fmt: skip
    head = ("model", "by", "stratum", "studies", "positive", "AUC", "sensitivity", "specificity")
    text = (
        "Strata are small: look for large differences, and test them on new studies. DeLong intervals of a handful of "
        "studies are too narrow; that of a perfect AUC is a point.",
    )
    return Section("Strata", text, Table(head, tuple(rows)) if rows else None)


def _not_analysed(evaluation: Evaluation) -> Section:
    several = len(evaluation.models) > 1
    rows = tuple(
        (*((model.name,) if several else ()), entry.study.study, entry.study.label, entry.status, entry.reason)
        for model in evaluation.models
        for entry in model.predictions
        if entry.reason
    )
    if not rows:
        return Section("Not analysed", ("Every study was analysed.",))
    head = (*(("model",) if several else ()), "study", "label", "status", "reason")
    return Section("Not analysed, or without its mask", table=Table(head, rows))


def _models(evaluation: Evaluation) -> Section:
    rows = []
    for model in evaluation.models:
        record = model.card.classifier or model.card.encoder
        trained = "untrained"
        if record:
            kind = "simulated or inserted emboli" if record.synthetic else "real emboli"
            trained = f"{record.studies} studies ({record.positive} positive), {kind}, {record.date[:10]}"
        card = f"{model.card.name} {model.card.version}"
        decision = str(model.decision) or f"threshold {model.decision.threshold:g}, not calibrated"
        rows.append((model.name, card, trained, decision, model.file.name, model.sha256))
    return Section("Models", table=Table(("model", "card", "trained on", "decision", "file", "SHA-256"), tuple(rows)))


def _draw_roc(axes: Axes, evaluation: Evaluation) -> None:
    axes.set_title("ROC")
    axes.plot((0, 1), (0, 1), color=MUTED, linewidth=0.8, linestyle=":")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel="1 - specificity", ylabel="sensitivity")
    for model, colour in _coloured(evaluation):
        figures = model.discrimination
        if figures is None:
            continue
        false_share, true_share, _ = roc_curve(model.truth, model.probabilities, drop_intermediate=False)
        area, point = figures.auc, figures.operating_point
        label = f"{model.name}: AUC {area.value:.3f} ({area.low:.3f} to {area.high:.3f})"
        axes.plot(false_share, true_share, color=colour, linewidth=1.8, label=label)
        at, high = 1 - point.specificity.value, point.sensitivity.value
        axes.errorbar(
            [at], [high], color=colour, marker="o", markersize=6, linewidth=1.1, markeredgecolor=INK,
            xerr=[[at - (1 - point.specificity.high)], [1 - point.specificity.low - at]],
            yerr=[[high - point.sensitivity.low], [point.sensitivity.high - high]],
        )  # fmt: skip
    if all(model.discrimination is None for model in evaluation.models):
        _say(axes, "needs at least 2 positive\nand 2 negative studies")
    else:
        _say_below_title(axes, "dot: the model's threshold, with 95% intervals")


def _draw_calibration(axes: Axes, evaluation: Evaluation) -> None:
    axes.set_title("Calibration")
    axes.plot((0, 1), (0, 1), color=MUTED, linewidth=0.8, linestyle=":")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel="mean predicted probability", ylabel="observed frequency")
    for model, colour in _coloured(evaluation):
        figures = model.discrimination
        if figures is None:
            continue
        bins = figures.calibration.bins
        said = np.array([part.mean_probability for part in bins])
        shares = [proportion(round(part.positive_share * part.studies), part.studies) for part in bins]
        true = np.array([share.value for share in shares])
        low, high = np.array([share.low for share in shares]), np.array([share.high for share in shares])
        label = f"{model.name}: Brier {figures.calibration.brier:.3f}, ECE {figures.calibration.expected_error:.3f}"
        axes.errorbar(
            said, true, yerr=np.maximum((true - low, high - true), 0), color=colour, linewidth=1.1, marker="o",
            markersize=4, label=label,
        )  # fmt: skip
        if len(evaluation.models) == 1:
            for x, y, part in zip(said, true, bins, strict=True):
                axes.annotate(str(part.studies), (x, y), (5, 4), textcoords="offset points", color=MUTED, fontsize=8)
    if all(model.discrimination is None for model in evaluation.models):
        _say(axes, "needs at least 2 positive\nand 2 negative studies")
    elif len(evaluation.models) == 1:
        _say_below_title(axes, "bars: 95% intervals; numbers: studies")


def _draw_froc(axes: Axes, evaluation: Evaluation) -> None:
    axes.set_title(f"FROC, candidate within {SHOWN_DISTANCE_MM:g} mm of the embolus")
    axes.set(ylim=(-0.01, 1.01), xlabel="false candidates a study", ylabel="share of emboli found")
    drawn = False
    for place, (model, colour) in enumerate(_coloured(evaluation)):
        for entry in model.localisation:
            if entry.system != MODEL and place > 0:
                continue
            for curve in entry.froc:
                if curve.distance_mm != SHOWN_DISTANCE_MM:
                    continue
                drawn = True
                rates = [point.false_per_study for point in curve.points]
                found = np.array([point.sensitivity for point in curve.points])
                if entry.system != MODEL:
                    axes.plot(rates, found, color=MUTED, linestyle=GREYS[entry.system], label=entry.system)
                    continue
                low = np.array([point.low for point in curve.points])
                high = np.array([point.high for point in curve.points])
                axes.errorbar(
                    rates, found, yerr=np.maximum((found - low, high - found), 0), color=colour, linewidth=1.8,
                    elinewidth=1.1, marker="o", markersize=5, label=f"{model.name} ({entry.emboli} emboli)",
                )  # fmt: skip
                axes.set_xscale("log", base=2)
                axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    if not drawn:
        axes.set_xticks(())
        _say(axes, "needs masks of whole studies\n(a folder masks/ID.nrrd beside the list)")


def _say(axes: Axes, words: str) -> None:
    axes.text(0.5, 0.5, words, color=INK, fontsize=11, ha="center", va="center", transform=axes.transAxes)


def _say_below_title(axes: Axes, words: str) -> None:
    axes.text(0.02, 0.97, words, color=MUTED, fontsize=8.5, va="top", transform=axes.transAxes)


def _coloured(evaluation: Evaluation) -> list[tuple[ModelEvaluation, str]]:
    return [(model, COLOURS[place % len(COLOURS)]) for place, model in enumerate(evaluation.models)]


def _model_metrics(model: ModelEvaluation) -> dict[str, object]:
    status = [prediction.status for prediction in model.predictions]
    payload: dict[str, object] = {
        "model": model.name,
        "file": model.file.name,
        "sha256": model.sha256,
        "card": {"name": model.card.name, "version": model.card.version, "trained": model.card.trained},
        "warnings": [reason.message for reason in model.card.reasons()],
        "notes": list(model.notes),
        "training_studies": list(model.training_studies),
        "analysed": status.count("analysed"),
        "analysed_share": status.count("analysed") / len(status),
        "not_analysed": [
            {"study": entry.study.study, "status": entry.status, "reason": entry.reason}
            for entry in model.predictions
            if entry.status != "analysed"
        ],
    }
    figures = model.discrimination
    payload |= {
        "decision": asdict(model.decision),
        "auc": figures.auc.value if figures else None,
        "auc_low": figures.auc.low if figures else None,
        "auc_high": figures.auc.high if figures else None,
        "operating_point": asdict(figures.operating_point) if figures else None,
        "sensitivity_at_specificity": [asdict(entry) for entry in figures.at_specificity] if figures else [],
        "brier": figures.calibration.brier if figures else None,
        "ece": figures.calibration.expected_error if figures else None,
        "calibration": asdict(figures.calibration) if figures else None,
        "strata": [asdict(stratum) for stratum in model.strata],
    }
    looks = {entry.system: _localisation_metrics(entry) for entry in model.localisation}
    payload |= looks.pop(MODEL, {})
    payload["baselines"] = looks
    return payload


def _localisation_metrics(entry: Localisation) -> dict[str, object]:
    payload: dict[str, object] = {"localised_studies": entry.studies, "localised_slabs": entry.slabs}
    for name in ("pointing_study", "pointing_slab", "energy_inside", "key_slice_hit_3", "map_mass_negatives"):
        value: Estimate | None = getattr(entry, name)
        payload[name] = value.value if value else None
        payload[f"{name}_low"] = value.low if value else None
        payload[f"{name}_high"] = value.high if value else None
    payload["froc"] = [asdict(curve) for curve in entry.froc]
    payload["froc_studies"], payload["emboli"] = entry.froc_studies, entry.emboli
    return payload


def _finite(value: object) -> object:
    """Plain JSON; a number that is not finite (a share of nothing, a threshold that nothing reaches) becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _shares(point: OperatingPoint) -> tuple[Proportion, ...]:
    return point.accuracy, point.sensitivity, point.specificity, point.ppv, point.npv


def _share(share: Proportion) -> str:
    if share.total == 0:
        return "none of 0"
    return f"{share.value:.2f} ({share.low:.2f} to {share.high:.2f}), {share.count} of {share.total}"


def _interval(estimate: Estimate | None, digits: int) -> str:
    if estimate is None:
        return "not known"
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"


def _system(entry: Localisation) -> str:
    return "the model" if entry.system == MODEL else entry.system


def _listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
    rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in table.rows)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


_LINES, _COLUMNS, _LARGE = 58, 150, 12.0
"""Lines and characters of a PDF page of text; size of a heading."""


def _write_pdf(path: Path, warnings: Sequence[str], sections: Sequence[Section], footer: str) -> None:
    """Text and tables flow over landscape pages in one type; every figure has its own page."""
    lines: list[tuple[str, str]] = [("Evaluation", "#heading")]
    for warning in warnings:
        lines += [(line, "#ff6b5e") for line in textwrap.wrap(warning, _COLUMNS)]
    with PdfPages(path, metadata={"Title": "Evaluation", "Subject": NOTICE}) as pdf:
        for section in sections:
            if section.figure:
                _text_pages(pdf, lines)
                lines = []
                section.figure.text(0.005, 0.995, section.title, color=INK, fontsize=10, weight="bold", va="top")
                pdf.savefig(section.figure, facecolor=BACKGROUND)
                continue
            lines += [("", INK), (section.title, "#heading")]
            for paragraph in section.text:
                lines += [(line, INK) for line in textwrap.wrap(paragraph, _COLUMNS)]
            if section.table:
                lines += [("", INK), *_text_table(section.table)]
        _text_pages(pdf, [*lines, ("", INK), (footer, MUTED)])


def _text_pages(pdf: PdfPages, lines: Sequence[tuple[str, str]]) -> None:
    for start in range(0, len(lines), _LINES):
        page = Figure(figsize=(15, 10), facecolor=BACKGROUND)
        for row, (line, kind) in enumerate(lines[start : start + _LINES]):
            heading = kind == "#heading"
            page.text(
                0.03, 0.965 - row * 0.94 / _LINES, line, va="top", color=INK if heading else kind,
                family="sans-serif" if heading else "monospace", fontsize=_LARGE if heading else 9.5,
                weight="bold" if heading else "normal", parse_math=False,
            )  # fmt: skip
        pdf.savefig(page, facecolor=BACKGROUND)


def _text_table(table: Table) -> list[tuple[str, str]]:
    """Columns padded to their widest cell; where they are too wide together, the widest ones are wrapped."""
    columns = list(zip(table.head, *table.rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    while sum(widths) + 2 * len(widths) > _COLUMNS:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for number, row in enumerate((table.head, *table.rows)):
        cells = [textwrap.wrap(cell, width) or [""] for cell, width in zip(row, widths, strict=True)]
        for part in range(max(map(len, cells))):
            padded = (
                (cell[part] if part < len(cell) else "").ljust(width) for cell, width in zip(cells, widths, strict=True)
            )
            lines.append(("  ".join(padded).rstrip(), INK if number else MUTED))
    return lines


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
body {{ background: #14181d; color: #e8ecf0; font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1500px;
  padding: 1rem 1.5rem 3rem; }}
.notice {{ background: #5c1f1a; color: #fff; font-weight: 600; padding: .5rem 1rem; border-radius: 6px;
  margin: .4rem 0; }}
h1 {{ font-size: 1.5rem; margin: 1rem 0 .2rem; }} h2 {{ font-size: 1.1rem; margin: 1.6rem 0 .4rem; }}
p {{ margin: .3rem 0; max-width: 75rem; }} img {{ width: 100%; border-radius: 6px; margin-top: .5rem; }}
.wide {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-size: .88rem;
  font-variant-numeric: tabular-nums; }}
th, td {{ padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #2b333c; }}
th {{ color: #8d99a6; }} td:last-child {{ overflow-wrap: break-word; }} .muted {{ color: #8d99a6; }}
</style></head><body>
<h1>{title}</h1>
{body}
<p class="muted">{footer}</p>
</body></html>
"""
