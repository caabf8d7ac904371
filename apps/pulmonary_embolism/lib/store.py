"""The studies folder as MONAI Label's datastore, where what is saved stays saved.

    STUDIES/<study>.nii.gz | .nii | .nrrd        the CTs (in STUDIES/volumes/ where a studies.csv lies beside it)
    STUDIES/labels/<tag>/<study>.seg.nrrd .json  the labels that count, for people and stock clients
    STUDIES/datastore_v2.json                    MONAI Label's index; rebuilt from the rest when it is damaged
    STUDIES/.pe/history/                         every version of every label (``lib.history``): the truth
    STUDIES/.pe/images/                          facts of the CTs (``lib.images``); can be deleted

The only place that knows tags: an annotation is a ``draft`` until every slice of the reading schedule is reviewed,
then ``final``. Both are one line of versions, so that at most one of them exists.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from filelock import FileLock
from lib.history import History, Version, show
from lib.images import ImageFacts, Images
from monailabel.datastore.local import DataModel, ImageLabelModel, LocalDatastore, LocalDatastoreModel
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException

from pe_app.annotation import SparseAnnotation
from pe_app.errors import InputError
from pe_app.files import write_durably
from pe_app.studies import Label, Study, read_studies
from pe_app.volume import Volume
from pe_app.volume_io import read_mask, write_volume

logger = logging.getLogger(__name__)

IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd")
LABEL_ENDINGS = (".seg.nrrd", *IMAGE_ENDINGS)
DRAFT, FINAL = "draft", "final"

ANNOTATION_LINE = "annotation"
STUDY_LABEL_LINE = "study-label"
COUNTS = ("accepted", "open", "reviewed")
"""What the store itself says of an annotation in its info."""

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_NAME = re.compile(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]{0,127}")


class Conflict(InputError):  # noqa: N818 - a state, not a fault
    """Somebody else saved in between: whoever saves must see what counts now."""

    def __init__(self, message: str, revision: str | None = None, annotation: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.revision = revision
        self.annotation = annotation


@dataclass(frozen=True)
class ReviewState:
    """How far the review of a study is.

    Attributes:
        state: ``not_started``, ``in_progress`` or ``complete``.
        reviewed: slices of the schedule that are reviewed.
        revision: of the annotation; None where there is none.
        tag: ``draft``, ``final`` or None.
        embolism: whether a slice with embolism is among them.
    """

    state: str = "not_started"
    reviewed: int = 0
    revision: str | None = None
    tag: str | None = None
    embolism: bool = False


class StudyStore(LocalDatastore):
    """Studies, labels and sparse annotations in one folder.

    Every change happens under a lock between threads and processes, starts from what is on disk at that moment, and
    is durable before it is acknowledged.
    """

    def __init__(self, studies: str | Path) -> None:
        self.root = Path(studies).resolve()
        self.private = self.root / ".pe"
        self.private.mkdir(parents=True, exist_ok=True)
        self.images = Images(self.private / "images")
        self.history = History(self.private / "history")
        self.lock = FileLock(self.root / ".lock")  # re-entrant within a thread, exclusive between threads
        self._loaded: tuple[LocalDatastoreModel, tuple[int, ...]]
        self._folder_time = 0
        in_volumes = (self.root / "studies.csv").is_file() and (self.root / "volumes").is_dir()
        images_dir = "volumes" if in_volumes else "."
        self._listed = _listed_studies(self.root / images_dir)
        endings = [f"*{ending}" for ending in IMAGE_ENDINGS]
        super().__init__(str(self.root), images_dir, extensions=endings, auto_reload=False)
        self._say_what_is_served()

    # What is there

    def check_study(self, image_id: str) -> None:
        """Refuse an id that is not in the store.

        Raises:
            ImageNotFoundException: with a sentence.
        """
        if image_id not in self._datastore.objects:
            raise ImageNotFoundException(f"there is no study {image_id!r}")

    def list_images(self) -> list[str]:
        """Study ids in order; files that came or went since are noticed."""
        if self._images_folder().stat().st_mtime_ns != self._folder_time:
            self.refresh()
        return sorted(self._datastore.objects)

    def volume(self, image_id: str) -> Volume:
        """The CT of a study.

        Raises:
            InputError: if it cannot be read.
        """
        self.check_study(image_id)
        return self.images.volume(Path(self.get_image_uri(image_id)))

    def facts(self, image_id: str) -> ImageFacts:
        """What is known of the CT; it is examined if nobody did."""
        self.check_study(image_id)
        return self.images.facts(image_id, Path(self.get_image_uri(image_id)))

    def known_facts(self, image_id: str) -> ImageFacts | None:
        """What is known of the CT without reading it."""
        return self.images.known_facts(image_id, Path(self.get_image_uri(image_id)))

    def review_state(self, image_id: str) -> ReviewState:
        """How far the review is; from the index, quick."""
        labels = self._datastore.objects[image_id].labels
        tag = next((tag for tag in (FINAL, DRAFT) if tag in labels), None)
        if tag is None:
            return ReviewState()
        info = labels[tag].info
        state = "complete" if tag == FINAL else "in_progress"
        return ReviewState(state, info.get("reviewed", 0), info["revision"], tag, bool(info.get("embolism")))

    def annotation_path(self, image_id: str) -> Path | None:
        """The .json of the annotation that counts, in the history, where no later save changes it."""
        version = self.history.current(image_id, ANNOTATION_LINE)
        if version is None or not version.annotated:
            return None
        return self.history.path(image_id, ANNOTATION_LINE, version.revision, ".json")

    def annotation(self, image_id: str) -> SparseAnnotation | None:
        """The annotation that counts, with its outlines."""
        path = self.annotation_path(image_id)
        return SparseAnnotation.read(path) if path else None

    def annotation_json(self, image_id: str) -> dict[str, Any] | None:
        """The annotation that counts as JSON, without its outlines."""
        path = self.annotation_path(image_id)
        if path is None:
            return None
        payload: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        payload.pop("mask_sha256", None)  # binds the two files to each other; a client's next save has other outlines
        return payload

    def label(self, image_id: str) -> Label:
        """What is known of the study as a whole: said through the server, else in the study list."""
        said = self._datastore.objects[image_id].image.info.get("pe_label")
        if said is None and image_id in self._listed:
            return self._listed[image_id].label
        return said if said in get_args(Label) else ""

    def studies(self) -> tuple[Study, ...]:
        """Every usable study with its label and annotation, for training."""
        studies = []
        for image_id in self.list_images():
            if not self.facts(image_id).reason:
                listed = self._listed.get(image_id)
                study = Study(
                    study=image_id,
                    path=Path(self.get_image_uri(image_id)),
                    patient=listed.patient if listed else "",
                    label=self.label(image_id),
                    annotation=self.annotation_path(image_id),
                    split=listed.split if listed else "",
                )
                studies.append(study)
        return tuple(studies)

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """MONAI Label's info of a CT."""
        self.check_study(image_id)
        info: dict[str, Any] = super().get_image_info(image_id)
        return info

    def get_label_info(self, label_id: str, label_tag: str) -> dict[str, Any]:
        """MONAI Label's info of a label; of an annotation also its JSON."""
        self._check_label(label_id, label_tag)
        info = dict(super().get_label_info(label_id, label_tag))
        if label_tag in (DRAFT, FINAL) and (annotation := self.annotation_json(label_id)):
            info["annotation"] = annotation
        return info

    # What is saved

    def save_label(self, image_id: str, label_filename: str, label_tag: str, label_info: Mapping[str, Any]) -> str:
        """Save a label; with ``annotation`` in the info, a sparse annotation.

        Args:
            image_id: the study.
            label_filename: a file with the outlines; its ending tells the format.
            label_tag: a name; of an annotation, the store decides it.
            label_info: finite JSON. ``annotation``: the reviewed slices, schema ``pe-annotation/1``. ``based_on``: the
                revision that was edited, None where there was none; leave it out to save in any case.

        Raises:
            InputError: if the label does not belong to the study, or the info is not finite JSON.
            Conflict: if another revision counts than the one that was edited.
        """
        self.check_study(image_id)
        info = finite_json(label_info)
        annotation = info.pop("annotation", None)
        expects, based_on = "based_on" in info, info.pop("based_on", None)
        volume = self.volume(image_id)
        source = Path(label_filename)
        if annotation is None:
            line = _line(label_tag)
            read_mask(source, volume)
            with self.lock:
                self._check_conflict(image_id, line, expects, based_on)
                if line == ANNOTATION_LINE and self.annotation_path(image_id):
                    message = f"study {image_id} has a sparse annotation, which a plain label does not replace"
                    raise Conflict(f"{message}: save it under another tag", *self._what_counts(image_id))
                self._save_file(image_id, line, label_tag, source, info)
            return image_id

        checked = _read_annotation(annotation, source, volume)
        schedule = self.facts(image_id).schedule
        if not schedule:
            raise InputError(f"study {image_id}: {self.facts(image_id).reason}")
        still_open = checked.open_slices(schedule)
        counts = (len(checked.slices), list(still_open), len(schedule) - len(still_open))
        info |= {**dict(zip(COUNTS, counts, strict=True)), "embolism": bool(checked.masks)}
        with self.lock:
            if expects and self._counts_already(image_id, checked):
                return image_id  # the same save again, because the first answer got lost
            self._check_conflict(image_id, ANNOTATION_LINE, expects, based_on)
            revision, previous = self.history.next_revision(image_id, ANNOTATION_LINE)
            checked.write(self.history.path(image_id, ANNOTATION_LINE, revision, ".json"), volume)
            tag = DRAFT if still_open else FINAL
            version = Version(revision, previous, tag, ".seg.nrrd", True, _dated(info))
            self._commit(image_id, ANNOTATION_LINE, version)
        return image_id

    def saved(self, image_id: str) -> dict[str, object]:
        """What the annotation that counts means for the client that saved it."""
        version = self.history.current(image_id, ANNOTATION_LINE)
        if version is None or not version.annotated:
            return {}
        return {"tag": version.tag, "revision": version.revision, **{name: version.info[name] for name in COUNTS}}

    def remove_label(self, label_id: str, label_tag: str) -> None:
        """Take a label away from the clients; its versions stay in the history."""
        with self.lock:
            self._check_label(label_id, label_tag)
            line = _line(label_tag)
            revision, previous = self.history.next_revision(label_id, line)
            self._commit(label_id, line, Version(revision, previous, label_tag, "", False, _dated({})))

    def add_image(self, image_id: str, image_filename: str, image_info: Mapping[str, Any]) -> str:
        """Take a CT into the store under a new id; never over an existing one.

        Raises:
            InputError: if it is no CT that can be read, or the id is no name.
        """
        source = Path(image_filename)
        ending = _ending(source.name, IMAGE_ENDINGS)
        info = finite_json(image_info)
        name = f"{image_id}{ending}"
        if not _NAME.fullmatch(image_id) or _id_and_ending(name) != (image_id, ending):
            raise InputError(f"{image_id!r} cannot name a study: use letters, digits, - and _")
        volume = self.images.volume(source)
        with self.lock:
            if image_id in self.list_images():
                raise Conflict(f"there is a study {image_id!r} already: choose another id")
            write_volume(volume, self._images_folder() / name)
            self.refresh()
            self.update_image_info(image_id, info)
        return image_id

    def remove_image(self, image_id: str) -> None:
        """Refused: a CT leaves the store by hand, so that no request can destroy a study."""
        raise InputError(f"study {image_id}: CTs are not deleted through the server; move the file out of the folder")

    def update_image_info(self, image_id: str, info: Mapping[str, Any]) -> None:
        """Add to what is known of an image; ``pe_label`` is the study's label."""
        said = finite_json(info)
        label = said.get("pe_label", "")
        if label not in get_args(Label):
            words = ", ".join(repr(word) for word in get_args(Label) if word)
            raise InputError(f"study {image_id}: unknown label {label!r}; the labels are {words}")
        with self.lock:
            self.check_study(image_id)
            if "pe_label" in said:
                revision, previous = self.history.next_revision(image_id, STUDY_LABEL_LINE)
                version = Version(revision, previous, "", "", False, _dated(said))
                self.history.commit(image_id, STUDY_LABEL_LINE, version)
            entry = self._datastore.objects[image_id]
            image = DataModel(ext=entry.image.ext, info={**entry.image.info, **said})
            self._replace(image_id, ImageLabelModel(image=image, labels=entry.labels))

    def update_label_info(self, label_id: str, label_tag: str, info: Mapping[str, Any]) -> None:
        """Add to what is known of a label, as the stock Reviewer does; files and revision stay."""
        said = finite_json(info)
        with self.lock:
            self._check_label(label_id, label_tag)
            current = self.history.current(label_id, _line(label_tag))
            if current is None:
                raise LabelNotFoundException(f"study {label_id!r} has no label with tag {label_tag!r}")
            own = {name: current.info[name] for name in (*COUNTS, "embolism") if name in current.info}
            self._commit(label_id, _line(label_tag), replace(current, info={**current.info, **said, **own}))

    # Under the lock

    def _check_label(self, label_id: str, label_tag: str) -> None:
        if self._datastore.label(label_id, label_tag) is None:
            raise LabelNotFoundException(f"study {label_id!r} has no label with tag {label_tag!r}")

    def _check_conflict(self, image_id: str, line: str, expects: bool, based_on: object) -> None:
        current = self.history.current(image_id, line)
        counts = current.revision if current and current.ext else None
        if expects and based_on != counts:
            message = f"study {image_id} was saved by somebody else meanwhile: take over the changes and save again"
            raise Conflict(message, *self._what_counts(image_id))

    def _what_counts(self, image_id: str) -> tuple[str | None, dict[str, Any] | None]:
        version = self.history.current(image_id, ANNOTATION_LINE)
        return (version.revision if version and version.ext else None), self.annotation_json(image_id)

    def _counts_already(self, image_id: str, annotation: SparseAnnotation) -> bool:
        current = self.annotation(image_id)
        return (
            current is not None
            and (current.image_sha256, current.slices) == (annotation.image_sha256, annotation.slices)
            and all(bool((current.masks[index] == mask).all()) for index, mask in annotation.masks.items())
        )

    def _save_file(self, image_id: str, line: str, tag: str, source: Path, info: Mapping[str, Any]) -> None:
        ending = _ending(source.name, LABEL_ENDINGS)
        revision, previous = self.history.next_revision(image_id, line)
        write_durably(self.history.path(image_id, line, revision, ending), source.read_bytes())
        self._commit(image_id, line, Version(revision, previous, tag, ending, False, _dated(info)))

    def _commit(self, image_id: str, line: str, version: Version) -> None:
        self.history.commit(image_id, line, version)
        image = self._datastore.objects[image_id].image
        self._replace(image_id, ImageLabelModel(image=image, labels=self._show_labels(image_id)))

    def _show_labels(self, image_id: str) -> dict[str, DataModel]:
        """Lay the versions that count into ``labels/``, take the others away, and tell what is there now."""
        folder = self.root / "labels"
        shown: dict[str, DataModel] = {}
        wanted = set()
        for line in self.history.lines(image_id):
            version = self.history.current(image_id, line)
            if version is None or not version.ext:
                continue
            for ending in (version.ext, ".json") if version.annotated else (version.ext,):
                target = folder / version.tag / f"{image_id}{ending}"
                show(self.history.path(image_id, line, version.revision, ending), target)
                wanted.add(target)
            info = {**version.info, "revision": version.revision, "name": f"{image_id}{version.ext}"}
            shown[version.tag] = DataModel(ext=version.ext, info=info)
        for tag in _folders(folder):
            for ending in (*LABEL_ENDINGS, ".json"):
                stale = folder / tag / f"{image_id}{ending}"
                if stale not in wanted:
                    stale.unlink(missing_ok=True)
        return shown

    def _adopt_labels(self, image_id: str) -> None:
        """Take label files that somebody laid into ``labels/`` by hand into the history."""
        for tag in _folders(self.root / "labels"):
            for ending in LABEL_ENDINGS:
                found = self.root / "labels" / tag / f"{image_id}{ending}"
                if _TAG.fullmatch(tag) and found.is_file() and not found.is_symlink():
                    line = _line(tag)
                    if self.history.current(image_id, line) is None:
                        revision, previous = self.history.next_revision(image_id, line)
                        write_durably(self.history.path(image_id, line, revision, ending), found.read_bytes())
                        info = {"ts": int(found.stat().st_mtime)}
                        self.history.commit(image_id, line, Version(revision, previous, tag, ending, False, info))

    def _replace(self, image_id: str, entry: ImageLabelModel) -> None:
        """Whoever reads keeps the index in hand; a new one goes to disk and takes its place."""
        model = self._datastore
        self._write_index(model.model_copy(update={"objects": {**model.objects, image_id: entry}}))

    # How LocalDatastore keeps its index: whole or not at all, and always the one on disk

    @property
    def _datastore(self) -> LocalDatastoreModel:
        self._init_from_datastore_file()
        return self._loaded[0]

    @_datastore.setter
    def _datastore(self, model: LocalDatastoreModel) -> None:
        self._loaded = (model, ())

    def _init_from_datastore_file(self, throw_exception: bool = False) -> None:
        index = Path(self._datastore_config_path)
        held, held_stamp = self._loaded
        try:
            stamp = _stamp(index)
            if stamp == held_stamp:
                return
            content = index.read_bytes()
        except FileNotFoundError:
            return
        try:
            model = LocalDatastoreModel.model_validate_json(content)
        except ValueError:
            aside = index.with_name(f"{index.name}.damaged-{time.time_ns()}")
            logger.exception("%s is damaged: it is set aside as %s and rebuilt", index, aside.name)
            os.replace(index, aside)
            return
        model.base_path = self._datastore_path
        model.images_dir, model.labels_dir = held.images_dir, held.labels_dir
        self._loaded = (model, stamp)

    def _update_datastore_file(self, lock: bool = True) -> None:
        self._write_index(self._datastore)

    def _write_index(self, model: LocalDatastoreModel) -> None:
        index = Path(self._datastore_config_path)
        with self.lock:
            write_durably(index, model.model_dump_json(exclude={"base_path"}))
            self._loaded = (model, _stamp(index))

    def _reconcile_datastore(self) -> None:
        """Let the index say what is in the folders: after a start, a crash, or new files."""
        with self.lock:
            self._folder_time = self._images_folder().stat().st_mtime_ns
            held = self._datastore
            objects: dict[str, ImageLabelModel] = {}
            for name in self._image_files():
                image_id, ext = _id_and_ending(name)
                if image_id in objects:
                    logger.warning("%s is ignored: there is another file of study %s", name, image_id)
                    continue
                said = self.history.current(image_id, STUDY_LABEL_LINE)
                info = {"ts": int(time.time()), "name": name, **(said.info if said else {})}
                if image_id in held.objects:
                    info = held.objects[image_id].image.info
                self._adopt_labels(image_id)
                image = DataModel(ext=ext, info=info)
                objects[image_id] = ImageLabelModel(image=image, labels=self._show_labels(image_id))
            if objects != held.objects or not Path(self._datastore_config_path).exists():
                self._write_index(held.model_copy(update={"objects": objects}))

    def _image_files(self) -> list[str]:
        """Names of CT files: no segmentations, nothing hidden, no links that lead out of the studies folder."""
        folder = self._images_folder()
        return [
            name
            for name in sorted(os.listdir(folder))
            if name.endswith(IMAGE_ENDINGS)
            and not name.endswith(".seg.nrrd")
            and _NAME.fullmatch(name)
            and (folder / name).is_file()
            and (folder / name).resolve().is_relative_to(self.root)
        ]

    def _images_folder(self) -> Path:
        return self.root / self._loaded[0].images_dir

    def _say_what_is_served(self) -> None:
        folder = self._images_folder()
        ours = {"labels", "volumes", "masks", "annotations"}
        ignored = [name for name in _folders(folder) if name not in ours]
        if ignored:
            logger.warning("not served: %s; convert DICOM folders to .nrrd or .nii.gz", ", ".join(ignored))
        logger.info("%d studies in %s", len(self._loaded[0].objects), folder)


def finite_json(value: object) -> dict[str, Any]:
    """A JSON object whose numbers are finite, as a new dict.

    Raises:
        InputError: if it is anything else.
    """
    if not isinstance(value, Mapping):
        raise InputError(f"expected a JSON object, got {type(value).__name__}")
    try:
        copy: dict[str, Any] = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"expected JSON with finite numbers: {error}") from error
    return copy


def _read_annotation(payload: object, source: Path, volume: Volume) -> SparseAnnotation:
    """A client's annotation and its outlines, checked against the CT."""
    if not isinstance(payload, dict):
        raise InputError("annotation: expected a JSON object of schema pe-annotation/1")
    if not source.name.endswith(".nrrd"):
        mask = read_mask(source, volume)
        masks = {index: plane != 0 for index, plane in enumerate(mask.voxels) if plane.any()}
        annotation = SparseAnnotation.from_json(payload, masks)
        annotation.check_belongs_to(volume)
        return annotation
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "annotation.json"
        path.write_text(json.dumps({**payload, "mask_sha256": None}), encoding="utf-8")
        path.with_name("annotation.seg.nrrd").write_bytes(source.read_bytes())
        return SparseAnnotation.read(path, volume)


def _line(tag: str) -> str:
    """The line of versions that a tag belongs to.

    Raises:
        InputError: if the tag is no name.
    """
    if not _TAG.fullmatch(tag):
        raise InputError(f"{tag!r} is no tag: use letters, digits, - and _")
    return ANNOTATION_LINE if tag in (DRAFT, FINAL) else f"tag-{tag}"


def _dated(info: Mapping[str, Any]) -> dict[str, Any]:
    """Info with the time of the save, for people and as MONAI Label writes it."""
    return {**info, "time": datetime.now(UTC).isoformat(timespec="seconds"), "ts": int(time.time())}


def _ending(name: str, endings: tuple[str, ...]) -> str:
    ending = next((ending for ending in endings if name.lower().endswith(ending)), None)
    if ending is None:
        raise InputError(f"expected a file ending in {', '.join(endings)}, got {name!r}")
    return ending


def _id_and_ending(name: str) -> tuple[str, str]:
    ending = _ending(name, LABEL_ENDINGS)
    return name[: -len(ending)], name[-len(ending) :]


def _listed_studies(images: Path) -> dict[str, Study]:
    """What a studies.csv beside the folder of CTs, or in it, says of them."""
    for path in (images / "studies.csv", images.parent / "studies.csv"):
        if path.is_file() and (path.parent == images or images.name == "volumes"):
            here = [study for study in read_studies(path) if study.path.parent.resolve() == images.resolve()]
            return {_id_and_ending(study.path.name)[0]: study for study in here if study.path.is_file()}
    return {}


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))


def _stamp(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino
