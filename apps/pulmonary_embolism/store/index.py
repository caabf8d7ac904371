"""MONAI Label's index ``datastore_v2.json``: whole or not at all, and always the one that is on disk."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from monailabel.datastore.local import ImageLabelModel, LocalDatastoreModel

from pe_app.common.files import write_durably

logger = logging.getLogger(__name__)


class Index:
    """The index in memory, read again when another process has replaced it.

    Args:
        path: of ``datastore_v2.json``.
        empty: what counts while there is no index that can be read; its folders always count.
    """

    def __init__(self, path: Path, empty: LocalDatastoreModel) -> None:
        self._path = path
        self._empty = empty
        self._held: tuple[LocalDatastoreModel, tuple[int, ...]] = (empty, ())

    @property
    def model(self) -> LocalDatastoreModel:
        """What the index says now. Never changed in place: whoever reads it keeps it in hand.

        An index that cannot be read is set aside; what is in memory counts, and the next write replaces it.
        """
        held, held_stamp = self._held
        try:
            stamp = _stamp(self._path)
            if stamp == held_stamp:
                return held
            content = self._path.read_bytes()
        except FileNotFoundError:
            return held
        try:
            model = LocalDatastoreModel.model_validate_json(content)
        except ValueError:
            aside = self._path.with_name(f"{self._path.name}.damaged-{time.time_ns()}")
            logger.exception("%s is damaged: it is set aside as %s and rebuilt", self._path, aside.name)
            os.replace(self._path, aside)
            return held
        for name in ("base_path", "images_dir", "labels_dir"):
            setattr(model, name, getattr(self._empty, name))
        self._held = (model, stamp)
        return model

    def write(self, objects: dict[str, ImageLabelModel]) -> None:
        """Let the index say this, on disk first; the caller holds the store's lock."""
        model = self.model.model_copy(update={"objects": objects})
        write_durably(self._path, model.model_dump_json(exclude={"base_path"}))
        self._held = (model, _stamp(self._path))

    def hold(self, objects: dict[str, ImageLabelModel]) -> None:
        """Let the index say this in this process only, because the disk takes nothing."""
        self._held = (self.model.model_copy(update={"objects": objects}), self._held[1])


def _stamp(path: Path) -> tuple[int, ...]:
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size, status.st_ino
