"""An evaluation as files: metrics.json, predictions.csv, and a web page."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import pe_app
from pe_app.common.files import write_durably
from pe_app.common.progress import ProgressCallback, silent
from pe_app.common.tables import table_text
from pe_app.evaluation.curves import draw_curves
from pe_app.evaluation.evaluate import MODEL, Estimate, Evaluation, Localisation, ModelEvaluation
from pe_app.evaluation.pictures import draw_pictures
from pe_app.evaluation.predictions import PredictionFile
from pe_app.evaluation.roc import OperatingPoint, Proportion
from pe_app.model.detection import NOTICE
from pe_app.results.rendering import data_uri, render

SCHEMA = "pe-evaluation/1"


@dataclass(frozen=True)
class Table:
    """A table of words."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, eq=False)
class Section:
    """A part of the report; text, table, figure."""

    title: str
    text: tuple[str, ...] = ()
    table: Table | None = None
    figure: Figure | None = None


def write_evaluation(
    evaluation: Evaluation, out: Path, masks: Path | None = None, progress: ProgressCallback = silent
) -> None:
    """Write metrics.json, predictions.csv and index.html into ``out``, where the detections are kept."""
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
    rows = []
    columns = (
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
            rows.append(row)
    return table_text(columns, rows)


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
        _answer(evaluation),
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


def web_page(warnings: Sequence[str], sections: Sequence[Section], footer: str, title: str = "Evaluation") -> str:
    """A self-contained page that also prints: no script, nothing loaded from elsewhere, every text escaped."""
    shown = [
        {
            "title": section.title,
            "text": section.text,
            "table": section.table,
            "picture": data_uri(_png(section.figure), "image/png") if section.figure else "",
        }
        for section in sections
    ]
    others = [warning for warning in warnings if warning != NOTICE]
    return render("report.html", {"heading": title, "warnings": others, "sections": shown, "footer": footer})


def _answer(evaluation: Evaluation) -> Section:
    """The evaluation in a sentence per model, and its confusion table."""
    sentences, rows = [], []
    for model in evaluation.models:
        truth = model.truth
        words = [f"On {len(truth)} studies, {int(truth.sum())} with embolism, {model.name}"]
        if model.discrimination is None:
            sentences.append(f"{words[0]} has no figures: at least 2 analysed studies of either kind are needed.")
            continue
        area, point = model.discrimination.auc, model.discrimination.operating_point
        found, free = point.sensitivity, point.specificity
        sentences.append(
            f"{words[0]} has an AUC of {_interval(Estimate(area.value, area.low, area.high), 2)}; at its threshold of "
            f"{point.threshold:.2f} it finds {found.count} of {found.total} (sensitivity {found.value:.0%}) and clears "
            f"{free.count} of {free.total} (specificity {free.value:.0%})."
        )
        rows += [
            (model.name, "embolism", str(found.count), str(found.total - found.count)),
            (model.name, "no embolism", str(free.total - free.count), str(free.count)),
        ]
    head = ("model", "truth", "at or above the threshold", "below")
    return Section("The answer", tuple(sentences), Table(head, tuple(rows)) if rows else None)


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


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
