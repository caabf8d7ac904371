"""The pulmonary embolism app, as MONAI Label asks for it: its store, its tasks, its strategies."""

import pe_monailabel.compat  # noqa: F401 - before monailabel

# isort: split
import logging
import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.exception import MONAILabelError, MONAILabelException
from monailabel.interfaces.tasks.infer_v2 import InferTask
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask

import pe_app
from pe_app.annotation.review import STRATEGIES
from pe_app.common.errors import InputError
from pe_app.model.detection import NOTICE
from pe_monailabel.server.blinding import STRATEGIES as BLIND_STRATEGIES
from pe_monailabel.server.blinding import Blinding
from pe_monailabel.store.archive import open_store
from pe_monailabel.store.labels import FINAL
from pe_monailabel.store.models import Models
from pe_monailabel.store.studies import StudyStore
from pe_monailabel.tasks.detection import BatchDetection, CandidatesTask, Detections, DetectionTask, Jobs
from pe_monailabel.tasks.training_queue import DESCRIPTIONS, StageTask, Trainings
from pe_monailabel.tasks.worklist import Leases, NextStudy, Worklist

logger = logging.getLogger(__name__)

EXAMINE_SECONDS = 2.0
"""Between two looks at the folder for CTs that came, changed or are whole now."""

API = 1
"""Version of the interface that the Slicer module speaks."""


class PulmonaryEmbolismApp(MONAILabelApp):
    """Sparse annotations in, both trainings, detections out.

    ``conf``: ``model`` is the file to start with; any setting of the trainings (``epochs``, ``width``, ...) by name.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        if "://" in studies:
            raise InputError(f"{studies}: archives are served with pe-app serve, not as MONAI Label's datastores")
        self.store = open_store(studies, conf)
        model = conf.get("model")
        self.models = Models(self.store.private / "models", Path(model) if model else None)
        self.jobs = Jobs()
        self._examining = threading.Lock()
        self._examined = -math.inf
        self.detections = Detections(self.store, self.models, self.jobs)
        self.blinding = Blinding(self.store, conf.get("blinded") == "true")
        self.leases = Leases(self.store.private / "leases.json")
        self.worklist = Worklist(self.store, self.detections, self.leases)
        self.trainings = Trainings(self.store, self.models, lambda: self._trainers)
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
        return {stage: StageTask(stage, self.store.private, self.conf) for stage in DESCRIPTIONS}

    def init_strategies(self) -> dict[str, Strategy]:
        """How the next study is chosen."""
        offered = BLIND_STRATEGIES if self.blinding.on else STRATEGIES
        return {name: NextStudy(name, self.worklist) for name in offered}

    def init_batch_infer(self) -> BatchDetection:
        """Detections of many studies in a process of their own, so that the worklist shows probabilities."""
        return BatchDetection()

    def info(self) -> dict[str, Any]:
        """Stock info, and who speaks."""
        model = self.detections.model
        served = {name: getattr(model, name) for name in ("name", "version", "sha256", "trained", "date")}
        pe = {
            "blinded": self.blinding.on,
            "api": API,
            "version": pe_app.__version__,
            "model": served,
            "research_use_only": True,
            "notice": NOTICE,
        }
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
            said = request.get("label_tag") or "original"
            tag = str(getattr(said, "value", said))  # MONAI Label's batches send a member of an enum
            try:
                reader = {"reader": request["reader"]} if request.get("reader") else {}
                info = {"model": request["model"], "detection": params["model"], **reader}
                self.store.save_label(study, file, tag, info)
            except BaseException:
                Path(file).unlink(missing_ok=True)  # nobody will be sent it
                raise
        return {"label": file, "tag": "original", "file": file, "params": params}

    def on_saved(self, study: str, meaning: Mapping[str, object], reader: str) -> None:
        """After a save: a study that is complete is free for others, one that is not stays its reader's for longer."""
        if meaning.get("tag") == FINAL:
            self.leases.release(study)
        elif reader and "accepted" in meaning:
            self.leases.prolong(study, reader)

    def examine_new_studies(self) -> None:
        """Look, in the background, at CTs that nobody looked at yet: the worklist shows their schedules then."""
        if time.monotonic() - self._examined > EXAMINE_SECONDS and self._examining.acquire(blocking=False):
            threading.Thread(target=self._examine, name="examine studies", daemon=True).start()

    def _examine(self) -> None:
        try:
            if self._examined == -math.inf:
                self.store.remove_unfinished()
            self.store.refresh()
            for study in self.store.to_examine():
                self.store.facts(study)
            for study in self.store.to_take_over():
                self.store.take_over(study)
            self.worklist.states()  # reads what is on disk, so that no request has to
            self._examined = time.monotonic()
        except Exception:
            logger.exception("new studies cannot be examined")
        finally:
            self._examining.release()
