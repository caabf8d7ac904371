"""A folder of six small studies with labels, three of them annotated: what trainings of the app's tests learn from."""

from pathlib import Path

from app_server import SHAPE, chest
from small_studies import CLASSIFIER, ENCODER, SLABS

from pe_app.annotation.sparse import SparseAnnotation
from pe_app.ct.volume_io import write_volume
from pe_app.model.detector import Detector
from pe_monailabel.store.studies import StudyStore

SETTINGS = {"matrix": 64, "crop": 64, "slab_count": 6, "width": 8, "filters": 4, "batch": 8, "synthetic": True}


def annotated_store(folder: Path) -> StudyStore:
    """The store of ``folder/studies``; beside it ``start.safetensors``, a model to start from."""
    studies = folder / "studies"
    chests = {f"study{number}": chest(number, emboli=3 * (number % 2)) for number in range(6)}
    for name, (volume, _) in chests.items():
        write_volume(volume, studies / f"{name}.nrrd")
    store = StudyStore(studies)
    for name, (volume, mask) in chests.items():
        positive = bool(mask.voxels.any())
        store.update_image_info(name, {"pe_label": "positive" if positive else "negative"})
        if positive:
            annotation = SparseAnnotation.from_mask(volume, mask, range(4, SHAPE[0] - 4, 2), "reader")
            annotation.write(folder / "sent.json", volume)
            store.save(name, folder / "sent.seg.nrrd", "draft", {"annotation": annotation.to_json()})
    Detector.untrained(0, SLABS, ENCODER, CLASSIFIER).save(folder / "start.safetensors")
    return store
