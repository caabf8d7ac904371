"""The pulmonary embolism app as MONAI Label finds it: the first class here whose base is MONAILabelApp."""

import lib.compat  # noqa: F401 - before monailabel

# isort: split
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.active import Leases, NextStudy, Worklist
from lib.infer import BatchDetection, CandidatesTask, Detections, DetectionTask, Jobs, ServedDetector
from lib.store import FINAL, StudyStore
from lib.train import ClassifierTask, EncoderTask
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.exception import MONAILabelError, MONAILabelException
from monailabel.interfaces.tasks.infer_v2 import InferTask
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask

import pe_app
from pe_app.detection import NOTICE
from pe_app.errors import InputError
from pe_app.review import STRATEGIES

logger = logging.getLogger(__name__)

API = 1
"""Version of the interface that the Slicer module speaks."""


class PulmonaryEmbolismApp(MONAILabelApp):
    """Sparse annotations in, both trainings, detections out.

    ``conf``: ``model`` is the file to start with; any setting of the trainings (``epochs``, ``width``, ...) by name.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        if "://" in studies:
            raise InputError(f"{studies}: this app serves a folder; other datastores of MONAI Label are not supported")
        self.store = StudyStore(studies)
        model = conf.get("model")
        self.served = ServedDetector(self.store.private / "model.safetensors", Path(model) if model else None)
        self.jobs = Jobs()
        self._examining = threading.Lock()
        self.detections = Detections(self.store, self.served, self.jobs)
        self.leases = Leases(self.store.private / "leases.json")
        self.worklist = Worklist(self.store, self.detections, self.leases)
        description = f"Pulmonary embolism on chest CT, trained from sparse annotations. {NOTICE}"
        super().__init__(app_dir, studies, conf, "Pulmonary embolism", description, pe_app.__version__)

    def init_datastore(self) -> StudyStore:
        """The store, made before all else because everything rests on it."""
        return self.store

    def init_infers(self) -> dict[str, InferTask]:
        """What can be asked of a study."""
        return {
            "detection": DetectionTask(self.store, self.detections),
            "candidates": CandidatesTask(self.store, self.detections),
        }

    def init_trainers(self) -> dict[str, TrainTask]:
        """Both stages."""
        return {
            "encoder": EncoderTask("Stage I, from annotated slices", self.served, self.store.private, self.conf),
            "classifier": ClassifierTask("Stage II, from study labels", self.served, self.store.private, self.conf),
        }

    def init_strategies(self) -> dict[str, Strategy]:
        """How the next study is chosen."""
        return {name: NextStudy(name, self.worklist) for name in STRATEGIES}

    def init_batch_infer(self) -> BatchDetection:
        """Detections of many studies in a process of their own, so that the worklist shows probabilities."""
        return BatchDetection()

    def info(self) -> dict[str, Any]:
        """Stock info, and who speaks."""
        model = self.detections.model
        served = {name: getattr(model, name) for name in ("name", "version", "sha256", "trained", "date")}
        pe = {"api": API, "version": pe_app.__version__, "model": served, "research_use_only": True, "notice": NOTICE}
        return {**super().info(), "pe": pe}

    def infer(self, request: Mapping[str, Any], datastore: StudyStore | None = None) -> dict[str, Any]:
        """Run a task on a study of the store; never on a path, which the stock one would open."""
        task = self._infers.get(request.get("model"))
        if task is None:
            raise MONAILabelException(MONAILabelError.INVALID_INPUT, f"there is no model {request.get('model')!r}")
        study = str(request.get("image"))
        self.store.check_study(study)
        file, params = task({**request, "image": study})
        if request.get("save_label") and isinstance(task, CandidatesTask):
            tag = str(request.get("label_tag") or "original")
            self.store.save_label(study, file, tag, {"model": request["model"], "detection": params["model"]})
        return {"label": file, "tag": "original", "file": file, "params": params}

    def on_save_label(self, image_id: str, label_id: str) -> dict[str, object]:
        """What the save meant, for the client that made it; a study that is complete is free for others."""
        saved = self.store.saved(image_id)
        if saved.get("tag") == FINAL:
            self.leases.release(image_id)
        return saved

    def examine_new_studies(self) -> None:
        """Look, in the background, at CTs that nobody looked at yet: the worklist shows their schedules then."""
        if self._examining.acquire(blocking=False):
            threading.Thread(target=self._examine, name="examine studies", daemon=True).start()

    def _examine(self) -> None:
        try:
            for study in self.store.list_images():
                if self.store.known_facts(study) is None:
                    self.store.facts(study)
        except Exception:
            logger.exception("new studies cannot be examined")
        finally:
            self._examining.release()
