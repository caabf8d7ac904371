"""The folder of one training: what it has learned so far, how that went, and how to go on after any interruption.

``checkpoint.pt`` alone is the truth, replaced as a whole after every epoch; ``metrics.csv``, ``curves.png``,
``status.json`` and the TensorBoard events in ``tensorboard/`` show what it says. Of several processes that train
together (``distributed``) the main one reads and writes them.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import pickle
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import filelock
import torch
from torch import Tensor, nn

from pe_app.common import distributed
from pe_app.common.errors import InputError
from pe_app.common.extras import missing_packages
from pe_app.common.files import replacing, write_durably
from pe_app.common.progress import Cancelled, Progress, ProgressCallback
from pe_app.common.settings import as_toml

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

Metrics = Mapping[str, float]
"""Figures of one epoch by name; ``epoch``, ``seconds`` and ``waiting``, the share of these without data, among them."""

STATUS_SECONDS = 1.0
"""``status.json`` is not written more often than that."""


@dataclass(frozen=True, eq=False)
class RunState:
    """What a training knows after an epoch.

    Attributes:
        history: the metrics of every epoch so far.
        best_epoch: the epoch to publish: highest validation accuracy, then lowest validation loss; 0 before any.
        best_weights: the network's state after that epoch.
        seconds: time spent, over all resumes.
        published: the record of a finished training as JSON; empty before.
    """

    history: tuple[Metrics, ...] = ()
    best_epoch: int = 0
    best_weights: Mapping[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    published: str = ""

    @property
    def best(self) -> Metrics:
        """The metrics of the best epoch."""
        return self.history[self.best_epoch - 1]


class TrainingRun:
    """One training in its folder, open for one process at a time (``with``).

    Args:
        folder: made where it is not there.
        task: e.g. ``train encoder``.
        epochs: of the whole training.
        progress: told what ``report`` is told; may raise ``Cancelled``.

    Raises:
        InputError: on entering, if another process trains in this folder.
    """

    def __init__(self, folder: Path, task: str, epochs: int, progress: ProgressCallback) -> None:
        self.folder = folder
        self.task = task
        self.epochs = epochs
        self.state = RunState()
        self._progress = progress
        self._identity: Mapping[str, str] = {}
        self._lock = filelock.FileLock(folder / ".lock")
        self._last = Progress(task, 0, 0)
        self._status_time = -math.inf
        self._writer: SummaryWriter | None = None
        self._begin = time.perf_counter()

    def __enter__(self) -> TrainingRun:
        distributed.from_main(self._take)
        self._begin = time.perf_counter()
        return self

    def _take(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise InputError(
                f"run folder {self.folder}: another training is running in it: wait for it or choose another run folder"
            ) from error
        for folder in (self.folder, self.folder / "slabs"):  # the features may be another run's, too
            for leftover in folder.glob(f".{'[0-9a-f]' * 32}.*"):  # of ``replacing`` in a killed process
                leftover.unlink(missing_ok=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not distributed.is_main():
            return
        try:
            if self._writer is not None:
                self._writer.close()
            if error is None:
                total = max(self._last.total, 1)
                self._last = Progress(self.task, total, total)
                self._write_status("finished", f"epoch {self.state.best_epoch} is published")
            else:
                stopped = isinstance(error, (Cancelled, KeyboardInterrupt))
                self._write_status("stopped" if stopped else "failed", str(error) or type(error).__name__)
        finally:
            self._lock.release()

    def report(self, progress: Progress) -> None:
        """Tell the caller and, now and then, ``status.json``; what the caller raises goes through."""
        self._last = progress
        if not distributed.is_main():
            return
        if time.monotonic() - self._status_time >= STATUS_SECONDS:
            self._write_status("running", progress.text)
        self._progress(progress)

    def resume(self, identity: Mapping[str, str], network: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        """Go on from the folder's checkpoint where there is one; remember what this training is.

        Args:
            identity: what must be the same for going on to make sense, in words and hashes.
            network: gets the weights of the last epoch.
            optimiser: gets its state after the last epoch.

        Raises:
            InputError: if the folder holds another training, or its checkpoint cannot be read.
        """
        self._identity = dict(identity)
        saved = distributed.from_main(self._saved)
        if saved is None:
            return
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
        self.state = RunState(**saved["state"])
        self._begin -= self.state.seconds
        if not self.state.published:
            self._show()  # the last epoch may have been kept, but not shown any more

    def keep_settings(self, settings: Sequence[DataclassInstance]) -> None:
        """Write ``settings.toml``, from which ``pe-app train ... --settings`` repeats the training."""
        if distributed.is_main():
            here = "# Settings of this run; repeat them with: pe-app train ... --settings settings.toml\n\n"
            without = frozenset({"augment", "workers", "feature_channels", "grid"})  # derived, or of this machine
            write_durably(self.folder / "settings.toml", here + as_toml(settings, without))

    def finish_epoch(self, network: nn.Module, optimiser: torch.optim.Optimizer, metrics: Metrics) -> None:
        """Keep what an epoch has learned; from here on it is not repeated."""
        history = (*self.state.history, dict(metrics))
        best_epoch, best_weights = self.state.best_epoch, self.state.best_weights
        if not self.state.history or _rank(metrics) > _rank(self.state.best):
            best_epoch = len(history)
            best_weights = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
        self.state = RunState(history, best_epoch, best_weights, time.perf_counter() - self._begin)
        self._save(network, optimiser)
        self._show()

    def publish(self, record: str, network: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        """Keep the record of a finished training, so that the same call returns the same model."""
        self.state = replace(self.state, published=distributed.from_main(lambda: record))
        self._save(network, optimiser)

    def _saved(self) -> dict[str, Any] | None:
        """What the checkpoint holds: the states of network and optimiser, and the fields of ``RunState``."""
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            return None
        try:
            # loads numbers, words and tensors only: a checkpoint from elsewhere runs no code
            saved = torch.load(path, map_location="cpu", weights_only=True)
            fields = ("best_epoch", "best_weights", "seconds", "published")
            state = {"history": tuple(saved["history"]), **{name: saved[name] for name in fields}}
            found, states = saved["identity"], {name: saved[name] for name in ("network", "optimiser")}
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, KeyError, TypeError) as error:
            raise InputError(
                f"run folder {self.folder}: its checkpoint.pt is damaged or of another program: choose another run "
                "folder"
            ) from error
        self._check_same(found)
        return {**states, "state": state}

    def _check_same(self, found: Mapping[str, str]) -> None:
        # how many processes read ahead changes nothing that is learned
        for name in sorted((self._identity.keys() | found.keys()) - {"workers"}):
            here, there = self._identity.get(name, "nothing"), found.get(name, "nothing")
            if here != there:
                what = f"{there} instead of {here}" if len(here) + len(there) < 80 else "changed since"
                raise InputError(
                    f"run folder {self.folder}: it holds another training ({name}: {what}): choose another run folder, "
                    "or the same settings and studies to go on"
                )

    def _save(self, network: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        if not distributed.is_main():
            return
        content = {
            "identity": dict(self._identity),
            "network": network.state_dict(),
            "optimiser": optimiser.state_dict(),
            "history": [dict(metrics) for metrics in self.state.history],
            "best_epoch": self.state.best_epoch,
            "best_weights": dict(self.state.best_weights),
            "seconds": self.state.seconds,
            "published": self.state.published,
        }
        with replacing(self.folder / "checkpoint.pt") as temporary:
            torch.save(content, temporary)

    def _show(self) -> None:
        if not distributed.is_main():
            return
        write_durably(self.folder / "metrics.csv", metrics_csv(self.state.history))
        with replacing(self.folder / "curves.png") as temporary:
            draw_curves(self.state.history, self.state.best_epoch, self.task).savefig(temporary, dpi=150)
        self._log_scalars(self.state.history[-1])
        self._write_status("running", self._last.text)

    def _log_scalars(self, metrics: Metrics) -> None:
        """One epoch for TensorBoard; one that is logged again after an interruption replaces the former."""
        epoch = int(metrics["epoch"])
        if missing_packages("tensorboard"):
            if epoch == 1:
                logger.info("No TensorBoard events (pip install 'pe-app[tensorboard]'); metrics.csv has all figures")
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import, and only training needs it

            self._writer = SummaryWriter(self.folder / "tensorboard", purge_step=epoch)
        for name, value in metrics.items():
            if name != "epoch":
                figure, side = (name.removeprefix("validation_"), "validation" if "validation_" in name else "train")
                self._writer.add_scalar(f"{figure}/{side}", value, epoch)
        self._writer.flush()

    def _write_status(self, state: str, text: str) -> None:
        self._status_time = time.monotonic()
        history = [{name: _finite(value) for name, value in metrics.items()} for metrics in self.state.history]
        status = {
            "task": self._last.task,
            "state": state,
            "epoch": len(history),
            "epochs": self.epochs,
            "done": self._last.done,
            "total": self._last.total,
            "text": text,
            "best_epoch": self.state.best_epoch,
            "metrics": history[-1] if history else {},
            "history": history,
            "updated": utc_now(),
        }
        write_durably(self.folder / "status.json", json.dumps(status, indent=1, allow_nan=False) + "\n")


def metrics_csv(history: Sequence[Metrics]) -> str:
    """The metrics as CSV, a row an epoch; a figure that is not defined is empty."""
    text = io.StringIO()
    # a run that a former version began has rows with fewer figures
    writer = csv.DictWriter(text, tuple(history[-1]), lineterminator="\n")
    writer.writeheader()
    for metrics in history:
        writer.writerow({name: value if math.isfinite(value) else "" for name, value in metrics.items()})
    return text.getvalue()


def draw_curves(history: Sequence[Metrics], best_epoch: int, title: str) -> Figure:
    """One figure of a training: losses, how well it decides, and (stage I) how well it looks."""
    panels = [panel for panel in _PANELS if panel.curves[0].name in history[0]]
    from matplotlib.figure import Figure  # like below: a training starts without

    width, height = 4.6 * len(panels), 4.6
    figure = Figure(figsize=(width, height))
    # margins in inches: drawn after every epoch, and matplotlib's own layout takes twice as long
    margins = {"left": 0.5 / width, "right": 1 - 0.15 / width, "bottom": 1.38 / height, "top": 1 - 0.68 / height}
    figure.subplots_adjust(**margins, wspace=0.13)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_panel(axes, panel, history, best_epoch)
    heading = f"{title}: {len(history)} epochs, the best is epoch {best_epoch} (grey)"
    figure.suptitle(heading, x=0.12 / width, y=0.985, ha="left", fontsize=12, fontweight="bold")
    return figure


def git_revision() -> str:
    """Commit of the program with ``-dirty`` where files changed since; empty outside a checkout of it."""
    here = Path(__file__)
    commands = (
        ["ls-files", "--error-unmatch", here.name],
        ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
    )
    output = ""
    for command in commands:
        try:
            done = subprocess.run(["git", *command], cwd=here.parent, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        if done.returncode:
            return ""
        output = done.stdout.strip()
    return output


def utc_now() -> str:
    """Now, ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _rank(metrics: Metrics) -> tuple[float, float]:
    """Epochs are better the higher this is; equal ones leave the earlier."""
    return metrics["validation_accuracy"], -metrics["validation_loss"]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class _Curve:
    name: str
    label: str
    colour: str
    style: str = "-"


@dataclass(frozen=True)
class _Panel:
    title: str
    curves: tuple[_Curve, ...]
    share: bool


# Okabe and Ito's palette: told apart by colour-blind readers, too
_BLUE, _ORANGE, _GREEN, _PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
_PANELS = (
    _Panel(
        "Loss",
        (
            _Curve("loss", "training", _BLUE, "--"),
            _Curve("validation_loss", "validation", _BLUE),
            _Curve("validation_classification_loss", "validation, classification", _ORANGE),
            _Curve("validation_attention_loss", "validation, attention (before its weight)", _GREEN),
        ),
        share=False,
    ),
    _Panel(
        "Decision",
        (
            _Curve("accuracy", "accuracy, training", _BLUE, "--"),
            _Curve("validation_accuracy", "accuracy, validation", _BLUE),
            _Curve("validation_auc", "AUC, validation", _ORANGE),
        ),
        share=True,
    ),
    _Panel(
        "Attention on slabs with embolism",
        (
            _Curve("validation_pointing", "share with the maximum in the mask, validation", _GREEN),
            _Curve("validation_empty_maps", "share with an empty map, validation", _PURPLE),
            _Curve("empty_maps", "share with an empty map, training", _PURPLE, "--"),
        ),
        share=True,
    ),
)


def _draw_panel(axes: Axes, panel: _Panel, history: Sequence[Metrics], best_epoch: int) -> None:
    from matplotlib.ticker import MaxNLocator

    epochs = [metrics["epoch"] for metrics in history]
    marker = "o" if len(history) < 12 else ""
    axes.axvline(best_epoch, color="0.9", linewidth=8, zorder=0)
    for curve in panel.curves:
        if curve.name in history[0]:
            values = [metrics[curve.name] for metrics in history]
            axes.plot(epochs, values, curve.style, color=curve.colour, label=curve.label, marker=marker, markersize=3.5)
    axes.set_title(panel.title, loc="left", fontsize=11)
    axes.set_xlabel("epoch", fontsize=9)
    axes.tick_params(labelsize=9, color="0.7")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0.5, max(epochs) + 0.5)
    axes.set_ylim(-0.02 if panel.share else 0, 1.02 if panel.share else None)
    axes.grid(axis="y", color="0.93")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("0.7")
    # below the axes, where no curve can run through it
    axes.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(-0.02, -0.15), handlelength=2.6)
