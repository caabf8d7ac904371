"""The verb doctor: what this installation and this machine offer, for a first look and for reports of problems."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

import pe_app
from pe_app.cli.options import Model
from pe_app.common.errors import InputError
from pe_app.common.extras import EXTRAS, missing_packages

_PACKAGES = ("torch", "numpy", "SimpleITK", "pydicom", "monai", "monailabel", "highdicom")


def doctor(
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON, for a report of a problem.")] = False,
) -> None:
    """Check the installation: versions, device, threads, memory, model, free disk, and which extras are installed.

    Exit code 2 where detections cannot run here, with the reason.
    """
    found: dict[str, str] = {"pe-app": f"{pe_app.__version__} in {Path(pe_app.__file__).parent}"}
    found["python"] = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    found |= {name: version for name in _PACKAGES if (version := _version(name))}
    problem = ""
    try:
        found |= _machine()
        found["model"] = _model(model)
    except InputError as error:
        problem = str(error)
    free = shutil.disk_usage(Path.cwd()).free
    found["free disk here"] = f"{free / 1e9:.1f} GB"
    for extra, purpose in EXTRAS.items():
        gone = missing_packages(extra)
        state = f"not installed: pip install 'pe-app[{extra}]'" if gone else "installed"
        found[f"extra {extra}"] = f"{state} ({purpose})"
    if as_json:
        typer.echo(json.dumps({**found, "problem": problem}, indent=1))
    else:
        width = max(map(len, found))
        for name, value in found.items():
            typer.echo(f"{name:{width}}  {value}")
    if problem:
        raise InputError(problem)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _machine() -> dict[str, str]:
    import torch

    from pe_app.common.device import best_device

    device = best_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    found = {
        "torch": torch.__version__,
        "device": f"{device} {name}".strip(),
        "threads": f"{torch.get_num_threads()} of {cores} cores",
    }
    if sys.platform == "linux":
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        found["memory"] = f"{pages / 2**30:.1f} GiB"
    return found


def _model(path: Path | None) -> str:
    from pe_app.model.detector import Detector, default_model

    chosen = path or default_model()
    if chosen is None:
        raise InputError("no model: this copy of pe-app ships without the starter model; give one with --model FILE")
    detector = Detector.load(chosen)
    card = detector.card
    limits = ", ".join(reason.code for reason in card.reasons())
    return f"{card.name} {card.version}, SHA-256 {detector.sha256[:12]}" + (f" ({limits})" if limits else "")
