"""The table: every step of a detection and of both trainings, its textbook way, and the limit of the machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pydicom
import torch
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from pe_app.common.device import autocast
from pe_app.common.errors import InputError
from pe_app.common.memory import keep_freed_memory
from pe_app.common.progress import Progress, ProgressCallback, silent
from pe_app.ct.lungs import find_lungs, lung_range
from pe_app.ct.slabs import study_slabs
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import read_volume, write_volume
from pe_app.model.detector import Detector, default_model
from pe_app.model.slab_encoder import SlabEncoder
from pe_app.model.study_classifier import StudyClassifier
from pe_app.phantom import PhantomConfig, make_phantom
from pe_app.research.baselines.penet import PENet, PENetConfig, penet_windows
from pe_app.research.bench import textbook
from pe_app.research.bench.limits import Limits, best_seconds, operations
from pe_app.research.demo import request_detection, running_server
from pe_app.studies import Study
from pe_app.training.datasets import SlabItem, StudyItem, encode_sources, read_sources
from pe_app.training.stages import ClassifierTraining, EncoderTraining, score_slabs, score_studies

BATCH = 8
"""Slabs of a training step of stage I."""

STUDIES = 2
"""Studies of a training step of stage II."""

FEW_WINDOWS = 4
"""So many windows of PENet are timed for stride 1; all of them take minutes and each takes as long."""

LONG_SLICES = 600
"""Slices of the study whose memory is measured."""


@dataclass(frozen=True)
class Step:
    """One row of the table.

    Attributes:
        step: its name.
        seconds: of this program, the shortest of some runs.
        textbook_seconds: of the plain way in ``textbook``; None where there is none.
        limit_seconds: what the machine cannot go below; None where no limit was measured.
    """

    step: str
    seconds: float
    textbook_seconds: float | None
    limit_seconds: float | None

    def to_json(self) -> dict[str, str | float | None]:
        """The row with its ratios: ``speedup`` over the textbook, and which share of the limit is reached."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "textbook_seconds": self.textbook_seconds,
            "limit_seconds": self.limit_seconds,
            "speedup": self.textbook_seconds / self.seconds if self.textbook_seconds else None,
            "of_limit": self.limit_seconds / self.seconds if self.limit_seconds else None,
        }


@dataclass(frozen=True)
class Bench:
    """A table and the machine that it is true for.

    Attributes:
        machine: processor, cores, memory, versions, rates.
        steps: the rows.
    """

    machine: dict[str, str | int | float]
    steps: tuple[Step, ...]

    def to_json(self) -> dict[str, object]:
        """Machine and rows."""
        return {"machine": self.machine, "steps": [step.to_json() for step in self.steps]}

    def seconds(self, step: str) -> float | None:
        """Of one row; None where it was not measured."""
        return next((row.seconds for row in self.steps if row.step == step), None)


STEPS = (
    *("read", "lungs", "prepare", "encode", "classify", "attention", "detection", "request"),
    *("train_encoder", "train_classifier", "encode_cache", "penet_stride24", "penet_stride1"),
)


def run_bench(
    series: Path | None = None,
    device: torch.device | None = None,
    steps: Sequence[str] = STEPS,
    repeats: int = 3,
    progress: ProgressCallback = silent,
) -> Bench:
    """Measure the steps on one DICOM series, by default a simulated one of 133 slices.

    Args:
        series: folder of a DICOM series.
        device: of the networks; the CPU by default.
        steps: which rows; their order is that of ``STEPS``.
        repeats: runs of every step, of which the shortest counts.
        progress: told before every step; may raise ``Cancelled``.

    Raises:
        InputError: for a step that does not exist, or a series that cannot be read.
    """
    unknown = sorted(set(steps) - set(STEPS))
    if unknown:
        raise InputError(f"bench: there is no step {unknown[0]!r}; the steps are {', '.join(STEPS)}")
    device = device or torch.device("cpu")
    wanted = [step for step in STEPS if step in steps]
    with tempfile.TemporaryDirectory() as folder:
        progress(Progress("measure", 0, len(wanted), "the machine and the study"))
        if series is None:
            series = Path(folder) / "series"
            write_phantom_series(series)
        bench = _Steps(series, Path(folder), device, repeats)
        rows = []
        for number, step in enumerate(wanted):
            progress(Progress("measure", number, len(wanted), step))
            rows.append(bench.row(step))
        progress(Progress("measure", len(wanted), len(wanted)))
        return Bench(_machine(bench.limits), tuple(rows))


def measure_memory(slices: int = LONG_SLICES, matrix: int = 512) -> dict[str, float]:
    """Memory in MB of a process of its own: idle with the model loaded, and at the peak of one long detection.

    The detection is that of a server: a study is read from its .nrrd file, and freed memory is kept.

    Raises:
        InputError: elsewhere than on Linux.
    """
    if not sys.platform.startswith("linux"):
        raise InputError("--memory: measured on Linux only")
    config = PhantomConfig(matrix, spacing_mm=5.0)
    volume = make_phantom(np.random.default_rng(7), config, positive=False).volume
    index = np.rint(np.linspace(0, volume.shape[0] - 1, slices)).astype(int)
    affine = volume.affine.copy()
    affine[:, 0] *= volume.shape[0] / slices
    with tempfile.TemporaryDirectory() as folder:
        study = Path(folder, "long.nrrd")
        write_volume(Volume(volume.voxels[index], affine, "long"), study)
        script = "import sys; from pe_app.research.bench.measure import _print_memory; _print_memory(sys.argv[1])"
        run = subprocess.run([sys.executable, "-c", script, str(study)], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(run.stdout)
    return found


def write_phantom_series(folder: Path, slices: int = 133, matrix: int = 512) -> None:
    """A simulated study as a plain DICOM series, slices 2.5 mm apart."""
    config = PhantomConfig(matrix, spacing_mm=2.5)
    volume = make_phantom(np.random.default_rng(7), config, positive=True).volume
    index = np.rint(np.linspace(0, volume.shape[0] - 1, slices)).astype(int)
    folder.mkdir(parents=True)
    study_uid, series_uid, frame_uid = generate_uid(), generate_uid(), generate_uid()
    for number, slice_index in enumerate(index.tolist()):
        file = pydicom.Dataset()
        file.SOPClassUID, file.SOPInstanceUID = CTImageStorage, generate_uid()
        file.StudyInstanceUID, file.SeriesInstanceUID, file.FrameOfReferenceUID = study_uid, series_uid, frame_uid
        file.Modality, file.PatientID, file.InstanceNumber = "CT", "phantom", number + 1
        file.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        file.ImagePositionPatient = [*(float(f"{mm:.4f}") for mm in volume.affine[:2, 3]), 2.5 * number]
        file.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        file.PixelSpacing = [float(f"{mm:.6f}") for mm in volume.spacing_mm[1:]]
        file.SliceThickness = 2.5
        file.Rows, file.Columns = volume.shape[1:]
        file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
        file.BitsAllocated = file.BitsStored = 16
        file.HighBit, file.PixelRepresentation = 15, 1
        file.RescaleSlope, file.RescaleIntercept = 1, 0
        file.PixelData = np.ascontiguousarray(volume.voxels[slice_index], "<i2").tobytes()
        file.file_meta = pydicom.dataset.FileMetaDataset()
        file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        file.save_as(folder / f"{number:04d}.dcm", enforce_file_format=True)


class _Steps:
    """The study, the networks and what lies between the steps; every method named in ``STEPS`` is a row."""

    def __init__(self, series: Path, folder: Path, device: torch.device, repeats: int) -> None:
        self.series, self.folder, self.device, self.repeats = series, folder, device, repeats
        self.volume = read_volume(series)
        detector = (Detector.load(model) if (model := default_model()) else Detector.untrained()).to(device)
        if not isinstance(detector.classifier, StudyClassifier):  # the method's stage II is what is timed
            classifier = StudyClassifier(Detector.untrained().classifier.config).to(device).eval()
            detector = replace(detector, classifier=classifier)
        self.detector = detector
        self.plain = Detector.untrained().to(device)
        self.plain_classifier = StudyClassifier(self.plain.classifier.config).to(device).eval()
        for network in (self.plain.encoder, self.plain_classifier):
            textbook.without_shortcuts(network)
        with autocast(device):
            short = torch.is_autocast_enabled(device.type)
            self.dtype = torch.get_autocast_dtype(device.type) if short else torch.float32
        self.limits = Limits.measure(device, tuple({torch.float32, self.dtype}))
        self.lung = lung_range(self.volume)
        self.slabs = study_slabs(self.volume, self.lung, self.detector.slabs)
        self.pixels = torch.from_numpy(self.slabs.pixels.copy()).to(device)
        self._rows: dict[str, Step] = {}

    def row(self, step: str) -> Step:
        """A row, measured once."""
        if step not in self._rows:
            self._rows[step] = getattr(self, step)()
        return self._rows[step]

    @cached_property
    def features(self) -> torch.Tensor:
        return self.detector.encode(self.slabs)[0]

    def read(self) -> Step:
        """Limit: the bare series reader, without checks."""
        import SimpleITK as sitk

        names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(self.series))
        return Step(
            "read",
            self._best(lambda: read_volume(self.series)),
            self._best(lambda: textbook.read_series(self.series)),
            self._best(lambda: sitk.ReadImage(names)),
        )

    def lungs(self) -> Step:
        """Limit: every voxel read once."""
        hu = self.volume.voxels.astype(np.int16)
        return Step(
            "lungs",
            self._best(lambda: find_lungs(self.volume)),
            self._best(lambda: textbook.find_lungs(hu), repeats=1),
            self.limits.move(self.volume.voxels.nbytes),
        )

    def prepare(self) -> Step:
        """Limit: the slices of the lung read, the slabs' own memory written."""
        config = self.detector.slabs
        read = (self.lung.last - self.lung.first + 1) * self.volume.voxels[0].nbytes
        written = config.range_slices * config.crop**2 * 4
        return Step(
            "prepare",
            self._best(lambda: study_slabs(self.volume, self.lung, config)),
            self._best(lambda: textbook.prepare(self.volume, self.lung, config), repeats=1),
            self.limits.move(read + written),
        )

    def encode(self) -> Step:
        """Limit: the operations of direct convolutions at the rate of the best matrix product in the number format.

        Some are computed with fewer operations (``pe_app/model/winograd.py``), so more than the limit can be reached.
        """
        return Step(
            "encode",
            self._best(lambda: self.detector.encode(self.slabs)),
            self._best(lambda: textbook.encode(self.plain.encoder, self.pixels), repeats=1),
            self.limits.compute(self._encoder_operations * len(self.pixels), self.dtype),
        )

    def classify(self) -> Step:
        """Limit: as of ``encode``, in float32."""
        features = self.features.float()[None]

        def plainly() -> None:
            with torch.inference_mode():
                textbook.classify(self.plain_classifier, features)

        return Step(
            "classify",
            self._best(lambda: self.detector.classify(self.features)),
            self._best(plainly, repeats=1),
            self.limits.compute(self._classifier_operations, torch.float32),
        )

    def attention(self) -> Step:
        """Maps, candidates, coarse volume and JSON. Limit: the features read once."""
        results = [self.detector.detect(self.volume).detection for _ in range(2)]
        as_text = self._best(lambda: json.dumps(results[0].to_json()))
        features = self.features

        def plainly() -> None:
            textbook.attention_on_ct(self.plain.encoder, features, self.volume.shape)

        return Step(
            "attention",
            min(result.seconds["attention"] for result in results) + as_text,
            self._best(plainly, repeats=1),
            self.limits.move(features.nbytes),
        )

    def detection(self) -> Step:
        """From the files to the detection, without process start. Textbook and limit: the sums of all steps."""
        parts = [self.row(name) for name in ("read", "lungs", "prepare", "encode", "classify", "attention")]
        return Step(
            "detection",
            self._best(lambda: self.detector.detect(read_volume(self.series))),
            sum(part.textbook_seconds or 0.0 for part in parts),
            sum(part.limit_seconds or 0.0 for part in parts),
        )

    def request(self) -> Step:
        """A client's request to the server for a study that it has not seen. Limit: the detection itself."""
        studies = self.folder / "served"
        names = [f"study{number}" for number in range(self.repeats + 1)]  # the server remembers what it has detected
        for number, name in enumerate(names):
            voxels = self.volume.voxels.copy()
            voxels[0, 0, 0] = number
            write_volume(self.volume.with_voxels(voxels), studies / f"{name}.nii")
        with running_server(studies, self.folder / "server.log") as address:
            seconds = self._best(lambda: request_detection(address, names.pop()))
        return Step("request", seconds, None, self._best(lambda: self.detector.detect(self.volume)))

    def train_encoder(self) -> Step:
        """A step of stage I. Limit: three times the forward operations."""
        slabs = self.pixels[torch.arange(BATCH) % len(self.pixels)]
        labels = torch.arange(BATCH, device=self.device) % 2
        targets = torch.zeros(BATCH, self.detector.slabs.grid, self.detector.slabs.grid, device=self.device)
        targets[labels > 0, 1:3, 1:3] = 1
        items = SlabItem(slabs, targets, labels, torch.zeros(BATCH, dtype=torch.long))
        encoder = Detector.untrained().to(self.device).encoder
        ours, plain = (torch.optim.Adam(network.parameters()) for network in (encoder, self.plain.encoder))
        settings = EncoderTraining()

        def step() -> None:
            encoder.train()
            loss = score_slabs(encoder, items, settings)["loss"].mean()
            ours.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            ours.step()

        return Step(
            "train_encoder",
            self._best(step),
            self._best(
                lambda: textbook.encoder_step(self.plain.encoder, plain, items.slab, targets, labels), repeats=1
            ),
            self.limits.compute(3 * self._encoder_operations * BATCH, self.dtype),
        )

    def train_classifier(self) -> Step:
        """A step of stage II. Limit: three times the forward operations."""
        features = self.features[None].repeat(STUDIES, 1, 1, 1, 1)
        labels = torch.arange(STUDIES, device=self.device) % 2
        classifier = Detector.untrained().to(self.device).classifier.train()
        ours, plain = (torch.optim.Adam(network.parameters()) for network in (classifier, self.plain_classifier))
        settings = ClassifierTraining()

        def step() -> None:
            loss = score_studies(classifier, StudyItem(features, labels), settings)["loss"].mean()
            ours.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            ours.step()

        def plainly() -> None:
            textbook.classifier_step(self.plain_classifier, plain, features.float(), labels.float())

        return Step(
            "train_classifier",
            self._best(step),
            self._best(plainly, repeats=1),
            self.limits.compute(3 * self._classifier_operations * STUDIES, self.dtype),
        )

    def encode_cache(self) -> Step:
        """Features of a study into the cache of stage II, from its files on. Limit: as of the steps that it takes."""
        sources = read_sources([Study("bench", self.series)], annotations=False)
        caches = iter(range(1000))

        def ours() -> None:
            encode_sources(self.detector, sources, self.folder / f"cache{next(caches)}")

        def plainly() -> None:
            hu = textbook.read_series(self.series)
            volume = Volume(hu.astype(np.float32), self.volume.affine, "bench")
            slabs = textbook.prepare(volume, textbook.find_lungs(hu), self.detector.slabs)
            features, _ = textbook.encode(self.plain.encoder, torch.from_numpy(slabs).to(self.device))
            torch.save(features, self.folder / "features.pt")

        parts = [self.row(name) for name in ("read", "lungs", "prepare", "encode")]
        limit = sum(part.limit_seconds or 0.0 for part in parts)
        return Step("encode_cache", self._best(ours, repeats=2), self._best(plainly, repeats=1), limit)

    def penet_stride24(self) -> Step:
        """PENet with windows that do not overlap, from the files on. Limit: its operations."""
        return self._penet("penet_stride24", PENetConfig(stride=24))

    def penet_stride1(self) -> Step:
        """PENet with a window at every slice, of which a few are timed. Limit: its operations."""
        return self._penet("penet_stride1", PENetConfig(stride=1))

    def _penet(self, name: str, config: PENetConfig) -> Step:
        """PENet in the faster of float32 and our number format, with our memory settings and its own preparation.

        Textbook: in float32, as its authors run it.
        """
        network = PENet(config).to(self.device).eval()
        prepare = self._best(lambda: penet_windows(read_volume(self.series), config), repeats=1)
        windows = torch.from_numpy(penet_windows(self.volume, config))
        few = windows[:FEW_WINDOWS].to(self.device)

        def run(short: bool) -> None:
            with torch.inference_mode(), autocast(self.device, "auto" if short else "float32"):
                for window in few:
                    network(window[None])

        ours, plainly = (self._best(partial(run, short), repeats=1) / len(few) for short in (True, False))
        with torch.device("meta"):
            shape = PENet(config).eval()
            count = operations(lambda: shape(torch.empty(1, *windows.shape[1:])))
        limit = self.limits.compute(count * len(windows), self.dtype if ours < plainly else torch.float32)
        fastest, plain = (prepare + seconds * len(windows) for seconds in (min(ours, plainly), plainly))
        return Step(name, fastest, plain, limit)

    @cached_property
    def _encoder_operations(self) -> float:
        with torch.device("meta"):
            encoder = SlabEncoder(self.detector.encoder.config)
            return operations(lambda: encoder(torch.empty(1, *self.pixels.shape[1:])))

    @cached_property
    def _classifier_operations(self) -> float:
        with torch.device("meta"):
            classifier = StudyClassifier(self.detector.classifier.config).eval()
            return operations(lambda: classifier(torch.empty(1, *self.features.shape)))

    def _best(self, function: Callable[[], object], repeats: int | None = None) -> float:
        return best_seconds(function, repeats or self.repeats, self.device)


def _machine(limits: Limits) -> dict[str, str | int | float]:
    rates = {f"gflops_{str(dtype).removeprefix('torch.')}": rate / 1e9 for dtype, rate in limits.flops.items()}
    name = torch.cuda.get_device_name(limits.device) if limits.device.type == "cuda" else _processor()
    return {
        "device": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **rates,
        "gigabytes_a_second": limits.bandwidth / 1e9,
    }


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    if described.is_file():
        for line in described.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _print_memory(study: str) -> None:
    """In a process of its own: the peak of a detection is that of the process."""
    keep_freed_memory()
    detector = Detector.load(model) if (model := default_model()) else Detector.untrained()
    idle = _memory_mb("VmRSS")
    slices = detector.detect(read_volume(study)).detection.image.size[0]
    peak = _memory_mb("VmHWM")
    memory = {"slices": slices, "idle_mb": idle, "peak_mb": peak, "above_idle_mb": peak - idle}
    sys.stdout.write(json.dumps(memory))


def _memory_mb(kind: str) -> float:
    """Of this process, as Linux counts it: ``VmRSS`` now, ``VmHWM`` at its peak."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) / 2**10
