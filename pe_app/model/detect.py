"""One call from a study to its detection, for scripts and notebooks."""

from __future__ import annotations

from pathlib import Path

from pe_app.common.errors import InputError, UnfitStudy
from pe_app.common.progress import ProgressCallback, silent
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import read_volume
from pe_app.model.detector import DetectionResult, Detector, default_model


def detect(
    study: Volume | str | Path,
    *,
    model: Detector | str | Path | None = None,
    progress: ProgressCallback = silent,
) -> DetectionResult:
    """Detect embolism in one study. Research use only, not for diagnosis.

    Args:
        study: a volume, or the path of one: a DICOM folder, .nii, .nii.gz or .nrrd file.
        model: a detector, or its file; by default the starter model that ships, which has never seen a real embolism.
            Load it once (``Detector.load``) where many studies follow.
        progress: called while slabs pass the networks; may raise ``Cancelled``.

    Returns:
        The detection (probability, evidence, candidates) and the attention volume. A study that the method is not made
        for is not an error: its detection has the status ``refused``, with reasons, and no probability.

    Raises:
        InputError: if the study or the model cannot be read.
    """
    if not isinstance(model, Detector):
        path = model or default_model()
        if path is None:
            raise InputError("no model: this copy of pe-app ships without the starter model; give model=")
        model = Detector.load(path)
    try:
        volume = study if isinstance(study, Volume) else read_volume(study)
    except UnfitStudy as error:
        return DetectionResult(model.refuse_unread(error), None)
    return model.detect(volume, progress)
