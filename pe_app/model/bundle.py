"""A model as a MONAI Bundle: configs, weights and documentation in a folder that ``python -m monai.bundle run`` runs.

The weights stay the detector's own safetensors file and are loaded by it: loading runs no code, which MONAI's usual
``model.pt`` cannot promise. The bundle's machine needs this program installed, as its metadata say.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pe_app
from pe_app.common.errors import InputError
from pe_app.common.files import replacing, write_durably
from pe_app.model.detection import NOTICE
from pe_app.model.detector import Detector

MODEL_FILE = "model.safetensors"

INFERENCE = {
    "imports": ["$from pathlib import Path", "$from pe_app.results.result_files import write_result"],
    "bundle_root": ".",
    "image": "",
    "output_dir": "$@bundle_root + '/eval'",
    "detector": {"_target_": "pe_app.model.detector.Detector.load", "path": f"$@bundle_root + '/models/{MODEL_FILE}'"},
    "volume": {"_target_": "pe_app.ct.volume_io.read_volume", "path": "@image"},
    "result": "$@detector.detect(@volume)",
    "run": ["$write_result(@result, @volume, Path(@output_dir), Path(@image).name)"],
}
"""MONAI evaluates what begins with ``$``; ``--image`` on the command line replaces the entry of that name."""


def write_bundle(model: Path, out: Path) -> None:
    """Make the bundle of a model.

    Args:
        model: the detector's file.
        out: the folder to make; must not hold anything.

    Raises:
        InputError: if the model cannot be loaded, or the folder is not empty.
    """
    detector = Detector.load(model)
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: is not empty; give a new folder")
    (out / "models").mkdir(parents=True, exist_ok=True)
    with replacing(out / "models" / MODEL_FILE) as unfinished:
        shutil.copyfile(model, unfinished)
    write_durably(out / "docs" / "README.md", _readme(detector))
    write_durably(out / "configs" / "inference.json", json.dumps(INFERENCE, indent=2) + "\n")
    write_durably(out / "configs" / "metadata.json", json.dumps(_metadata(detector), indent=2) + "\n")


def _metadata(detector: Detector) -> dict[str, object]:
    """What MONAI's bundle schema asks for; the networks' own dimensions lie in the weights' file."""
    card, slabs = detector.card, detector.slabs
    version = {
        name: importlib.metadata.version(name) for name in ("monai", "torch", "numpy", "SimpleITK", "safetensors")
    }
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
        "meta_schema_20240725.json",
        "version": card.version or "0",
        "changelog": {card.version or "0": f"exported by pe-app {pe_app.__version__}"},
        "monai_version": version["monai"],
        "pytorch_version": version["torch"],
        "numpy_version": version["numpy"],
        "required_packages_version": {
            "pe-app": pe_app.__version__,
            "SimpleITK": version["SimpleITK"],
            "safetensors": version["safetensors"],
        },
        "name": f"Pulmonary embolism on chest CT: {card.name}",
        "task": "Probability of pulmonary embolism of a contrast-enhanced chest CT, and where to look",
        "description": f"Two-stage network with attention training. {NOTICE} {_warnings(detector)}".strip(),
        "authors": "pe-app",
        "copyright": "Apache License 2.0",
        "intended_use": NOTICE,
        "data_type": "DICOM folder, NIfTI or NRRD",
        "image_classes": "CT in Hounsfield units",
        "pred_classes": "probability of the study; attention from 0 to 255 on a coarse grid",
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "hounsfield",
                    "modality": "CT",
                    "num_channels": 1,
                    "spatial_shape": ["*", "*", "*"],
                    "dtype": "int16",
                    "value_range": [-1024, 32767],
                    "is_patch_data": False,
                    "channel_def": {"0": "image"},
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "attention",
                    "num_channels": 1,
                    "spatial_shape": [slabs.slab_count, slabs.grid, slabs.grid],
                    "dtype": "uint8",
                    "value_range": [0, 255],
                    "is_patch_data": False,
                    "channel_def": {"0": "attention x slab probability"},
                }
            },
        },
        "model_sha256": detector.sha256,
        "slabs": asdict(slabs),
    }


def _warnings(detector: Detector) -> str:
    return " ".join(reason.message for reason in detector.card.reasons())


def _readme(detector: Detector) -> str:
    card = detector.card
    return f"""# Pulmonary embolism on chest CT: {card.name} {card.version}

{NOTICE} {_warnings(detector)}

A MONAI Bundle. It needs `pe-app` {pe_app.__version__} and MONAI. From this folder:

    python -m monai.bundle run --config_file configs/inference.json --image STUDY --output_dir OUT

STUDY is a DICOM folder, .nii, .nii.gz or .nrrd of one chest CT; OUT gets `detection.json` (probability, evidence of
every slab, places to look at, or the reasons why the study was refused), `attention.nrrd`, `review.png` and
`index.html`: the same as `pe-app detect STUDY --model models/{MODEL_FILE} --out OUT`.

The weights are safetensors, loaded by `pe_app.model.detector.Detector.load`: reading them runs no code. SHA-256 of
the file: `{detector.sha256}`
"""
