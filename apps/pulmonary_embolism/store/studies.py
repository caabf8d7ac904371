"""The studies folder as MONAI Label's datastore, where what is saved stays saved.

    STUDIES/<study>.nii.gz | .nii | .nrrd   the CTs (in STUDIES/volumes/ where a studies.csv lies beside it)
    STUDIES/labels/, .pe/history/           the labels and every version of them
    STUDIES/datastore_v2.json               MONAI Label's index; rebuilt from the rest if damaged
    STUDIES/.pe/images/                     facts of the CTs; can be deleted

What clients bring is checked in ``checks``.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from filelock import FileLock
from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastore, LocalDatastoreModel
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException

from pe_app.annotation.sparse import SparseAnnotation
from pe_app.common.errors import InputError
from pe_app.common.files import replacing
from pe_app.common.progress import ProgressCallback, silent
from pe_app.ct.volume import Volume
from pe_app.ct.volume_io import read_mask, write_volume
from pe_app.studies import Label, Study, read_studies
from pe_monailabel.store.checks import (
    IMAGE_ENDINGS,
    check_inside,
    check_study_name,
    finite_json,
    is_listed,
    painted_slices,
    read_annotation,
    split_ending,
)
from pe_monailabel.store.history import History, Version
from pe_monailabel.store.images import ImageFacts, Images
from pe_monailabel.store.index import Index
from pe_monailabel.store.labels import (
    ANNOTATION_LINE,
    COUNTS,
    DRAFT,
    FINAL,
    OWN,
    PAINTED,
    SEEN,
    STUDY_LABEL_LINE,
    Conflict,
    Labels,
    label_info,
    line_of,
)

logger = logging.getLogger(__name__)

UNFINISHED_SECONDS = 3600.0
"""Files that a killed process was writing go when they are older than that; younger ones may be being written."""

CLIENT_INFO = "client_info"
"""Where the info of a study keeps what clients said of it, other than its label."""

_UNFINISHED = re.compile(r"\.[0-9a-f]{32}\..+")


class StudyNotFound(ImageNotFoundException, InputError):  # noqa: N818 - as MONAI Label names them
    """There is no study of that id."""


class LabelNotFound(LabelNotFoundException, InputError):  # noqa: N818 - as MONAI Label names them
    """There is no label or version of that name."""


@dataclass(frozen=True)
class ReviewState:
    """How far the review of a study is.

    Attributes:
        state: ``not_started``, ``in_progress`` or ``complete``.
        reviewed: slices of the schedule that are reviewed.
        revision: of the annotation; None where there is none.
        tag: ``draft``, ``final`` or None.
        embolism: whether a slice with embolism is among them.
        image_sha256: of the CT that was reviewed; "" where it is not known.
    """

    state: str = "not_started"
    reviewed: int = 0
    revision: str | None = None
    tag: str | None = None
    embolism: bool = False
    image_sha256: str = ""

    def on(self, facts: ImageFacts | None) -> ReviewState:
        """The review of a CT as it is now: one of a former CT does not count, only its revision is known."""
        if not self.is_outdated(facts):
            return self
        return ReviewState(revision=self.revision, tag=self.tag, image_sha256=self.image_sha256)

    def is_outdated(self, facts: ImageFacts | None) -> bool:
        """Whether the CT was replaced since it was reviewed."""
        return bool(self.image_sha256 and facts and facts.sha256 and facts.sha256 != self.image_sha256)


OUTDATED = "the CT was replaced since it was annotated: review it again, or put the former CT back"


class StoreLock:
    """Exclusive between threads and between processes; re-entrant within a thread."""

    def __init__(self, path: Path) -> None:
        self._threads = threading.RLock()  # threads wait here, not by polling the file
        self._processes = FileLock(path, poll_interval=0.01)

    def __enter__(self) -> None:
        self._threads.acquire()
        try:
            self._processes.acquire()
        except BaseException:
            self._threads.release()
            raise

    def __exit__(self, *_: object) -> None:
        self._processes.release()
        self._threads.release()


_OF_LABEL = (*OWN, *SEEN, "pe_label", "reader", "based_on")
"""What the record of a study's label holds that no client said of the study."""

_LABEL_ABSENT = {"label_reader": "", "label_time": "", "label_revision": None}


class StudyStore(LocalDatastore):
    """Studies, labels and sparse annotations in one folder.

    Every change happens under a lock between threads and processes, starts from what is on disk at that moment, and
    is durable before it is acknowledged.

    Raises:
        InputError: if a folder of the store is a link that leads out of it.
    """

    def __init__(self, studies: str | Path) -> None:
        self.root = Path(studies).resolve()
        self.private = self.root / ".pe"
        check_inside(self.private, self.root)
        for path in self.private.iterdir() if self.private.is_dir() else ():
            if path.is_symlink():  # what it leads to would be changed, and temporary files there removed
                raise InputError(f"{path}: is a link: put the folder or file itself there")
        for folder in (self.private, self.private / "history", self.private / "images", self.root / "labels"):
            check_inside(folder, self.root)
            folder.mkdir(parents=True, exist_ok=True)
        self.images = Images(self.private / "images")
        self.history = History(self.private / "history")
        self.labels = Labels(self.root, self.history, self.images)
        self.lock = StoreLock(self.root / ".lock")
        self._index: Index
        in_volumes = (self.root / "studies.csv").is_file() and (self.root / "volumes").is_dir()
        images_dir = "volumes" if in_volumes else "."
        self._folder = self.root / images_dir
        check_inside(self._folder, self.root)
        self._folder_time = 0
        self._unshown: set[str] = set()
        self._not_taken: set[str] = set()
        self._listed = _listed_studies(self._folder)
        endings = [f"*{ending}" for ending in IMAGE_ENDINGS]
        super().__init__(str(self.root), images_dir, extensions=endings, auto_reload=False)
        self._say_what_is_served()

    # What is there

    def check_study(self, image_id: str) -> None:
        """Refuse an id that is not in the store.

        Raises:
            StudyNotFound: with a sentence.
        """
        if image_id not in self._datastore.objects:
            raise StudyNotFound(f"there is no study {image_id!r}")

    def list_images(self) -> list[str]:
        """Study ids in order; files that came or went since are noticed."""
        return list(self.entries())

    def entries(self) -> dict[str, ImageLabelModel]:
        """What the index says of each study, in order; files that came or went since are noticed."""
        if self._folder.stat().st_mtime_ns != self._folder_time:
            self.refresh()
        return self._datastore.objects

    def image_path(self, image_id: str, entry: ImageLabelModel | None = None) -> Path:
        """Where the CT of a study lies; ``entry`` is what the index says of it, where it is at hand."""
        entry = entry or self._datastore.objects[image_id]
        return self._folder / f"{image_id}{entry.image.ext}"

    def get_image_uri(self, image_id: str) -> str:
        """Where the CT lies, for MONAI Label.

        Raises:
            InputError: if a link leads out of the studies folder.
        """
        return str(self._image_file(image_id))

    def get_label_uri(self, label_id: str, label_tag: str) -> str:
        """Where the file of a label lies, for MONAI Label.

        Raises:
            InputError: if a link leads out of the studies folder.
        """
        label = self._datastore.label(label_id, label_tag)
        if label is None:
            return ""
        path = self.root / "labels" / label_tag / f"{label_id}{label.ext}"
        if label_id in self._unshown:
            path = self.history.path(label_id, line_of(label_tag), label.info["revision"], label.ext)
        check_inside(path, self.root)
        return str(path)

    def volume(self, image_id: str) -> Volume:
        """The CT of a study.

        Raises:
            InputError: if it cannot be read.
        """
        return self.images.volume(self._image_file(image_id))

    def facts(self, image_id: str) -> ImageFacts:
        """What is known of the CT; it is examined if nobody did."""
        return self.images.facts(image_id, self._image_file(image_id))

    def _image_file(self, image_id: str) -> Path:
        self.check_study(image_id)
        path = self.image_path(image_id)
        check_inside(path, self.root)
        return path

    def known_facts(self, image_id: str) -> ImageFacts | None:
        """What is known of the CT without reading it."""
        return self.images.known_facts(image_id, self.image_path(image_id))

    def remembered_facts(self, image_id: str) -> ImageFacts | None:
        """``known_facts``, quick: a usable CT that is replaced is noticed by ``to_examine``, not here."""
        return self.images.remembered_facts(image_id) or self.known_facts(image_id)

    def have(self, image_id: str, progress: ProgressCallback = silent) -> None:
        """Let the CT be here before it is used; in a folder it always is."""

    def not_examined(self, image_id: str) -> str:
        """What to tell of a CT that nobody looked at yet."""
        return "not examined yet"

    def to_examine(self) -> list[str]:
        """Studies whose CT nobody looked at yet."""
        return [study for study in self.list_images() if self.known_facts(study) is None]

    def to_train(self) -> list[str]:
        """Studies that a training may learn from."""
        return self.list_images()

    def review_state(self, image_id: str) -> ReviewState:
        """How far the review is; from the index, quick."""
        return review_of(self._datastore.objects[image_id])

    def annotation(self, image_id: str) -> SparseAnnotation | None:
        """The annotation that counts, with its outlines."""
        path = self.labels.annotation_path(image_id)
        return SparseAnnotation.read(path) if path else None

    def label(self, image_id: str, entry: ImageLabelModel | None = None) -> Label:
        """What is known of the study as a whole: said through the server, else in the study list."""
        said = (entry or self._datastore.objects[image_id]).image.info.get("pe_label")
        if said is None and image_id in self._listed:
            return self._listed[image_id].label
        return said if said in get_args(Label) else ""

    def label_version(self, image_id: str, entry: ImageLabelModel | None = None) -> dict[str, Any]:
        """Whose the study's label is, from when, and the name of its version; from the index, quick."""
        info = (entry or self._datastore.objects[image_id]).image.info
        if "pe_label" in info and "label_revision" not in info:  # an index of version 0.1
            info = label_info(self.history.current(image_id, STUDY_LABEL_LINE))
        return {name: info.get(name, absent) for name, absent in _LABEL_ABSENT.items()}

    def studies(self) -> tuple[Study, ...]:
        """Every usable study with its label and annotation, for training; ``left_out`` names the others."""
        studies = []
        left_out = self.left_out()
        for image_id in self.to_train():
            if image_id not in left_out and not self.facts(image_id).reason:
                path = self.image_path(image_id)
                listed = self._listed.get(image_id) or Study(image_id, path)
                label, annotation = self.label(image_id), self.labels.annotation_path(image_id)
                studies.append(replace(listed, study=image_id, path=path, label=label, annotation=annotation))
        return tuple(studies)

    def left_out(self) -> dict[str, str]:
        """Annotated studies that no training may learn from, and why."""
        reasons = {}
        for image_id in self.to_train():
            facts = self.facts(image_id)
            if self.review_state(image_id).tag is not None and facts.reason:
                reasons[image_id] = facts.reason
            elif self.review_state(image_id).is_outdated(facts):
                reasons[image_id] = OUTDATED
            else:
                try:
                    self.labels.annotation_path(image_id)
                except InputError as error:
                    reasons[image_id] = str(error)
        return reasons

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """MONAI Label's info of a CT."""
        self.check_study(image_id)
        return {**self._datastore.objects[image_id].image.info, "path": self.get_image_uri(image_id)}

    def get_label_info(self, label_id: str, label_tag: str) -> dict[str, Any]:
        """MONAI Label's info of a label; of an annotation also its JSON."""
        self._check_label(label_id, label_tag)
        info = dict(super().get_label_info(label_id, label_tag))
        if label_tag in (DRAFT, FINAL) and (annotation := self.labels.annotation_json(label_id)):
            info["annotation"] = annotation
        return info

    # What is saved

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: Mapping[str, Any]) -> str:
        """``save``, as MONAI Label calls it."""
        self.save(image_id, label_filename, label_tag, label_info)
        return image_id

    def save(
        self, image_id: str, label_filename: str | Path, label_tag: str, label_info: Mapping[str, Any]
    ) -> dict[str, object]:
        """Save a label; with ``annotation`` in the info, a sparse annotation.

        Args:
            image_id: the study.
            label_filename: a file with the outlines; its ending tells the format.
            label_tag: a name; of an annotation, the store decides it. A label map saved as ``draft`` or ``final``
                without an annotation becomes one: its painted slices are reviewed, the others are not.
            label_info: finite JSON. ``annotation``: the reviewed slices, schema ``pe-annotation/2`` or 1. ``based_on``:
                the revision that was edited, None where there was none; leave it out to save in any case.

        Returns:
            ``tag`` and ``revision`` of the version that counts now; of an annotation also ``accepted`` and ``reviewed``
            (counts of slices) and ``open`` (the slices of the schedule that are left).

        Raises:
            InputError: if the label does not belong to the study, or the info is not finite JSON.
            Conflict: if another revision counts than the one that was edited.
        """
        path = self._image_file(image_id)
        info = finite_json(label_info)
        annotation = info.pop("annotation", None)
        expects, based_on = "based_on" in info, info.pop("based_on", None)
        info = {name: value for name, value in info.items() if name not in OWN}
        volume = self.images.volume(path)
        source = Path(label_filename)
        plain = annotation is None and line_of(label_tag) == ANNOTATION_LINE
        if annotation is None and not plain:
            line = line_of(label_tag)
            read_mask(source, volume)
            with self.lock:
                self.labels.adopt(image_id, path, {})
                self._check_tag_is_free(image_id, label_tag)
                if expects:
                    self.labels.check_counts(image_id, line, based_on)
                self.labels.write_file(image_id, label_tag, source, path, info)
                self._show(image_id)
                return self._saved(image_id, line)

        if plain:
            self._check_tag_is_free(image_id, label_tag)
            checked = painted_slices(read_mask(source, volume), volume, str(info.get("reader") or ""))
        else:
            checked = read_annotation(annotation, source, volume)
        self.images.facts(image_id, path)  # now, not under the lock
        with self.lock:
            self.labels.adopt(image_id, path, {})
            if expects and self.labels.counts_already(image_id, checked):
                return self._saved(image_id, ANNOTATION_LINE)  # sent again, because the first answer got lost
            if expects:
                self.labels.check_counts(image_id, ANNOTATION_LINE, based_on)
            if plain and not self.labels.may_be_painted_over(image_id):
                message = f"study {image_id} has a sparse annotation, which a plain label does not replace"
                raise self.labels.conflict(f"{message}: save it under another tag", image_id)
            self.labels.write_annotation(image_id, path, checked, {**info, **({PAINTED: True} if plain else {})})
            self._show(image_id)
            return self._saved(image_id, ANNOTATION_LINE)

    def _saved(self, image_id: str, line: str) -> dict[str, object]:
        version = self.history.current(image_id, line)
        if version is None:
            return {}
        counts = {name: version.info[name] for name in COUNTS} if version.annotated else {}
        return {"tag": version.tag, "revision": version.revision, **counts}

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Take a label away from the clients; its versions stay in the history."""
        with self.lock:
            self._check_label(label_id, label_tag)
            self.labels.remove(label_id, label_tag)
            self._show(label_id)

    def add_image(self, image_id: str, image_filename: str, image_info: Mapping[str, Any]) -> str:
        """Take a CT into the store under a new id; never over an existing one.

        Raises:
            InputError: if it is no CT that can be read, or the id is no name.
        """
        source = Path(image_filename)
        _, ending = split_ending(source.name, IMAGE_ENDINGS)
        info = finite_json(image_info)
        check_study_name(image_id)
        volume = self.images.volume(source)
        with tempfile.TemporaryDirectory(prefix="pe-") as folder:
            ready = Path(folder) / f"ready{ending.lower()}"
            try:
                write_volume(volume, ready)  # for minutes, during which others go on
            except InputError as error:  # of a CT that was read: it is the disk
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            with self.lock:
                for other in self.list_images():
                    if other.casefold() == image_id.casefold():  # one file where a file system tells no difference
                        raise Conflict(f"there is a study {other!r} already: choose another id")
                with replacing(self._folder / f"{image_id}{ending.lower()}") as temporary:
                    shutil.move(ready, temporary)
                self.refresh()
                self.update_image_info(image_id, info)
        return image_id

    def remove_image(self, image_id: str) -> None:
        """Refused: a CT leaves the store by hand, so that no request can destroy a study."""
        raise InputError(f"study {image_id}: CTs are not deleted through the server; move the file out of the folder")

    def update_image_info(self, image_id: str, info: Mapping[str, Any]) -> None:
        """Add to what is known of an image.

        Args:
            image_id: the study.
            info: finite JSON. ``pe_label`` is the study's label, "" takes it back. ``based_on``: name of the label that
                the reader saw, None for none.

        Raises:
            Conflict: if another label counts than the one in ``based_on``, where that is given.
        """
        said = finite_json(info)
        expects, based_on = "based_on" in said, said.pop("based_on", None)
        label = said.get("pe_label", "")
        if label not in get_args(Label):
            words = ", ".join(repr(word) for word in get_args(Label) if word)
            raise InputError(f"study {image_id}: unknown label {label!r}; the labels are {words}")
        with self.lock:
            self.check_study(image_id)
            entry = self._datastore.objects[image_id]
            image_info = entry.image.info
            noted = {name: value for name, value in said.items() if name not in _OF_LABEL}
            if noted:  # in a place of its own: what the server tells of a study, no client can tell otherwise
                image_info = {**image_info, CLIENT_INFO: {**image_info.get(CLIENT_INFO, {}), **noted}}
            if "pe_label" in said:
                reader = str(said.get("reader") or "")
                if expects and self.labels.check_study_label_counts(image_id, label, reader, based_on):
                    return
                written = self.labels.write_study_label(image_id, said)  # from here on it counts
                image_info = {**image_info, **label_info(written)}
            image = DataModel(ext=entry.image.ext, info=image_info)
            changed = {image_id: ImageLabelModel(image=image, labels=entry.labels)}
            if "pe_label" not in said:
                self._write_index(changed)
                return
            try:
                self._write_index(changed)
            except OSError:
                logger.exception("study %s is labelled; the index will show it when the disk takes it", image_id)
                self._index.hold({**self._datastore.objects, **changed})

    def update_label_info(self, label_id: str, label_tag: str, info: Mapping[str, Any]) -> None:
        """Remark on a label, as the stock Reviewer does; ``reader`` says who. Its version stays as it was."""
        said = finite_json(info)
        reader = str(said.pop("reader", "") or "")
        with self.lock:
            self._check_label(label_id, label_tag)
            self.labels.add_note(label_id, label_tag, reader, said)
            self._show(label_id)

    # What the study list brings

    def to_take_over(self) -> list[str]:
        """Studies whose list names an annotation that is no version here yet."""
        return [
            study
            for study, listed in self._listed.items()
            if listed.annotation is not None
            and study in self._datastore.objects
            and study not in self._not_taken
            and ANNOTATION_LINE not in self.history.lines(study)
        ]

    def take_over(self, study: str) -> None:
        """Let the annotation of the study list be the first version; one that does not fit the CT is logged."""
        source = self._listed[study].annotation
        if source is None:
            return
        try:
            path = self._image_file(study)
            annotation = SparseAnnotation.read(source, self.images.volume(path))
            with self.lock:
                if ANNOTATION_LINE not in self.history.lines(study):
                    place = source.relative_to(self.root) if source.is_relative_to(self.root) else source
                    self.labels.write_annotation(study, path, annotation, {"adopted": True, "source": str(place)})
                    self._show(study)
        except InputError as error:
            self._not_taken.add(study)
            logger.warning("study %s: the annotation of the study list is not taken over: %s", study, error)

    # The versions of a study's labels

    def versions(self, image_id: str) -> list[dict[str, Any]]:
        """Every save of a study, the latest first, as ``Labels.versions`` tells it."""
        self.check_study(image_id)
        return self.labels.versions(image_id)

    def version(self, image_id: str, revision: str) -> tuple[dict[str, Any], Path | None]:
        """One save, an annotation's with ``annotation``, and its label file if it has one.

        Raises:
            LabelNotFound: if there is none of that name.
        """
        line, version = self._find(image_id, revision)
        return self.labels.describe(image_id, line, version), self.labels.file(image_id, line, version)

    def restore(self, image_id: str, revision: str, said: Mapping[str, Any]) -> dict[str, Any]:
        """Let an earlier version count again, as a new one; nothing is rewritten.

        Args:
            image_id: the study.
            revision: the version to take back.
            said: who and with what (``reader``, ``client``), and perhaps ``based_on`` as in ``save_label``.

        Returns:
            The version that counts now, as ``version`` tells it.

        Raises:
            LabelNotFound: if there is none of that name.
            InputError: if that version holds no label, or no longer belongs to the CT.
            Conflict: if another version counts than ``based_on``.
        """
        line, version = self._find(image_id, revision)
        info = {**{name: value for name, value in version.info.items() if name not in OWN}, "restored_from": revision}
        info |= finite_json(said)
        entry, file = self.version(image_id, revision)
        with self.lock:
            if line == STUDY_LABEL_LINE:
                if "based_on" in info:
                    self.labels.check_counts(image_id, line, info.pop("based_on"))
                self.update_image_info(image_id, info)
            elif file is None:
                raise InputError(f"version {revision} of study {image_id} is a removal: choose one with a label")
            else:
                info |= {"annotation": entry["annotation"]} if version.annotated else {}
                self.save(image_id, file, version.tag, info)
            return self.labels.describe(image_id, line, self.history.current(image_id, line) or version)

    def _find(self, image_id: str, revision: str) -> tuple[str, Version]:
        self.check_study(image_id)
        found = self.labels.find(image_id, revision)
        if found is None:
            raise LabelNotFound(f"study {image_id!r} has no version {revision!r}")
        return found

    # Under the lock

    def _check_label(self, label_id: str, label_tag: str) -> None:
        if self._datastore.label(label_id, label_tag) is None:
            raise LabelNotFound(f"study {label_id!r} has no label with tag {label_tag!r}")

    def _check_tag_is_free(self, image_id: str, tag: str) -> None:
        for other in (DRAFT, FINAL, *self._datastore.objects[image_id].labels):
            if other != tag and other.casefold() == tag.casefold():
                raise InputError(f"tag {tag!r}: study {image_id} has {other!r} already, which some file systems mix up")

    def _show(self, image_id: str) -> None:
        """Let folder and index show what counts now.

        It counts already: where the disk takes nothing more, this process shows it from memory and history, and a later
        save or ``refresh`` writes it down.
        """
        image = self._datastore.objects[image_id].image
        entry = ImageLabelModel(image=image, labels=self._labels_of(image_id))
        self._unshown.add(image_id)
        try:
            self.labels.show(image_id)
            self._write_index({image_id: entry})
            self._unshown.discard(image_id)
        except OSError:
            logger.exception("study %s is saved; labels/ and the index will show it when the disk takes it", image_id)
            self._index.hold({**self._datastore.objects, image_id: entry})

    def _labels_of(self, image_id: str) -> dict[str, DataModel]:
        """What the index is to say of a study's labels."""
        return {
            tag: DataModel(
                ext=version.ext,
                info={
                    **self.labels.info(image_id, tag, version),
                    "revision": version.revision,
                    "name": f"{image_id}{version.ext}",
                },
            )
            for tag, version in self.labels.current(image_id).items()
        }

    # The index

    @property
    def _datastore(self) -> LocalDatastoreModel:
        return self._index.model

    @_datastore.setter
    def _datastore(self, model: LocalDatastoreModel) -> None:
        model.base_path = str(self.root)
        self._index = Index(Path(self._datastore_config_path), model)

    def _init_from_datastore_file(self, throw_exception: bool = False) -> None:
        """Nothing to do: the index is read when it is looked at."""

    def _update_datastore_file(self, lock: bool = True) -> None:
        self._write_index({})

    def _write_index(self, changed: Mapping[str, ImageLabelModel]) -> None:
        with self.lock:
            noticed = self._folder.stat().st_mtime_ns == self._folder_time
            self._index.write({**self._datastore.objects, **changed})
            if noticed:  # what has changed in the folder since is the index
                self._folder_time = self._folder.stat().st_mtime_ns

    def refresh(self) -> None:
        """Notice CTs that came or went."""
        with self.lock:
            for study in tuple(self._unshown & self._datastore.objects.keys()):
                self._show(study)
            self._list_studies(self._datastore.objects)

    def _reconcile_datastore(self) -> None:
        """At the start: what the index says is held against the files."""
        with self.lock:
            self._list_studies({})

    def _list_studies(self, trusted: Mapping[str, ImageLabelModel]) -> None:
        self._folder_time = self._folder.stat().st_mtime_ns
        held = self._datastore.objects
        objects: dict[str, ImageLabelModel] = {}
        for name in self._image_files():
            image_id, ext = split_ending(name)
            if image_id in objects:
                logger.warning("%s is ignored: there is another file of study %s", name, image_id)
            elif image_id in trusted and trusted[image_id].image.ext == ext:
                objects[image_id] = trusted[image_id]
            else:
                objects[image_id] = self._entry(image_id, ext, held.get(image_id))
        if objects != held or not Path(self._datastore_config_path).exists():
            try:
                self._index.write(objects)
                self._folder_time = self._folder.stat().st_mtime_ns
            except OSError:
                logger.exception("the index cannot be written; it is kept in memory")
                self._index.hold(objects)

    def _entry(self, image_id: str, ext: str, held: ImageLabelModel | None) -> ImageLabelModel:
        """What the index is to say of a study, from the files."""
        said = self.history.current(image_id, STUDY_LABEL_LINE)
        shown: dict[str, Any] = dict(label_info(said)) if said else {}
        if said and (noted := {name: said.info[name] for name in said.info if name not in _OF_LABEL}):
            shown[CLIENT_INFO] = noted
        info = {"ts": int(time.time()), "name": f"{image_id}{ext}", **shown}
        image = DataModel(ext=ext, info=held.image.info if held else info)
        known = {tag: label.info for tag, label in held.labels.items()} if held else {}
        try:
            self.labels.adopt(image_id, self._folder / f"{image_id}{ext}", known)
            self.labels.show(image_id)
        except OSError:
            logger.exception("study %s: labels/ cannot be brought up to date", image_id)
            self._unshown.add(image_id)
        return ImageLabelModel(image=image, labels=self._labels_of(image_id))

    def _image_files(self) -> list[str]:
        """Names of CT files: no segmentations, nothing hidden, no links that lead out of the studies folder."""
        names = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                name = entry.name
                lower = name.lower()
                if not lower.endswith(IMAGE_ENDINGS) or lower.endswith(".seg.nrrd") or name.startswith("."):
                    continue
                if not is_listed(name):
                    logger.warning("%a is ignored: give it a shorter name of printable characters", name)
                elif entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(self.root):
                    logger.warning("%s is ignored: it leads out of the studies folder", name)
                elif entry.is_file():
                    names.append(name)
        return sorted(names)

    def remove_unfinished(self) -> None:
        """Remove what killed processes left half-written."""
        for folder, _, names in os.walk(self.root):
            for path in (Path(folder) / name for name in names if _UNFINISHED.fullmatch(name)):
                with suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > UNFINISHED_SECONDS:
                        path.unlink()

    def _say_what_is_served(self) -> None:
        ours = {"labels", "volumes", "masks", "annotations"}
        ignored = [name for name in _folders(self._folder) if name not in ours]
        if ignored:
            logger.warning("not served: %s; convert DICOM folders to .nrrd or .nii.gz", ", ".join(ignored))
        logger.info("%d studies in %s", len(self._datastore.objects), self._folder)


def review_of(entry: ImageLabelModel) -> ReviewState:
    """How far the review of a study is, by what the index says of it."""
    tag = next((tag for tag in (FINAL, DRAFT) if tag in entry.labels), None)
    if tag is None:
        return ReviewState()
    info = entry.labels[tag].info
    state = "complete" if tag == FINAL else "in_progress"
    image = str(info.get("image_sha256", ""))
    return ReviewState(state, info.get("reviewed", 0), info["revision"], tag, bool(info.get("embolism")), image)


def _listed_studies(images: Path) -> dict[str, Study]:
    """What a studies.csv beside the folder of CTs, or in it, says of them."""
    for path in (images / "studies.csv", images.parent / "studies.csv"):
        if path.is_file() and (path.parent == images or images.name == "volumes"):
            here = [study for study in read_studies(path) if study.path.parent.resolve() == images.resolve()]
            return {split_ending(study.path.name)[0]: study for study in here if study.path.is_file()}
    return {}


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
