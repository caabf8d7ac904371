"""ROC, calibration and FROC of an evaluation as one figure."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from pe_app.evaluation.evaluate import MODEL, Evaluation, ModelEvaluation
from pe_app.evaluation.pictures import BACKGROUND, INK, MUTED
from pe_app.evaluation.roc import proportion

SHOWN_DISTANCE_MM = 5.0
"""FROC distance of the figure: half a cell of the attention map."""

COLOURS = ("#ffb000", "#4fb3ff", "#7ee081", "#ff6b5e", "#c792ea", "#f5e663")
GREYS = {"centred Gaussian": ":", "mean training mask": "--", "untrained network": "-."}


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
