"""Annotations that ``pe-app import-seg`` brings into a folder that is or was served, found by an entry point."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pe_app.annotation.sparse import SparseAnnotation
from pe_app.common.errors import InputError
from pe_app.ct.volume import Volume
from pe_app.studies import Study
from pe_monailabel.cli.folder import CLIENT, open_store


class ServedAnnotations:
    """The annotations of a folder that is or was served: new versions in its history, which Slicer's readers see."""

    def __init__(self, studies: Path) -> None:
        self._store = open_store(studies)
        self._based_on: dict[str, str | None] = {}

    def current(self, study: Study, volume: Volume) -> SparseAnnotation | None:
        """The annotation that counts; None before the first.

        Raises:
            InputError: if the study is not served.
        """
        name = _served_name(study)
        if name not in self._store.list_images():
            raise InputError(f"study {study.study}: its CT {study.path.name} is not among the served ones")
        self._based_on[name] = self._store.review_state(name).revision
        annotation: SparseAnnotation | None = self._store.annotation(name)
        return annotation

    def save(self, study: Study, annotation: SparseAnnotation, volume: Volume) -> str:
        """A new version; answers what was saved.

        Raises:
            InputError: if another version counts than ``current`` gave.
        """
        name = _served_name(study)
        said = {
            "annotation": annotation.to_json(),
            "based_on": self._based_on[name],
            "reader": next((one.reader for one in annotation.slices), ""),
            "client": CLIENT,
        }
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "annotation.json"
            annotation.write(path, volume)
            saved = self._store.save(name, path.with_suffix(".seg.nrrd"), "draft", said)
        return f"{saved['tag']} {saved['revision']} in the history of the served folder"


def _served_name(study: Study) -> str:
    """What the server calls a listed study: its file without the ending."""
    name = study.path.name
    return next((name.removesuffix(ending) for ending in (".nii.gz", ".nii", ".nrrd") if name.endswith(ending)), name)
