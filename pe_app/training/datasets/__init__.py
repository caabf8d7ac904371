"""What the two stages learn from, prepared once and then read at disk speed: slabs for stage I, features for stage II.

``sources`` identifies the studies of a list, ``cache`` keeps what is made of them; ``slabs`` with ``augmentation`` is
for stage I, ``features`` for stage II.
"""

from pe_app.training.datasets.augmentation import Augmentation, augmented
from pe_app.training.datasets.cache import IN_THIS_PROCESS, Preparation, PreparedFile, prepare_arrays
from pe_app.training.datasets.features import (
    StudyFeatures,
    StudyItem,
    encode_sources,
    encode_studies,
    encoder_key,
    feature_bytes,
)
from pe_app.training.datasets.slabs import (
    UNKNOWN,
    AnnotatedSlabs,
    NegativeSlabs,
    NotOutlined,
    SlabItem,
    TwinSlabs,
    prepare_slabs,
)
from pe_app.training.datasets.sources import StudySource, read_sources

__all__ = [
    "IN_THIS_PROCESS",
    "UNKNOWN",
    "AnnotatedSlabs",
    "Augmentation",
    "NegativeSlabs",
    "NotOutlined",
    "Preparation",
    "PreparedFile",
    "SlabItem",
    "StudyFeatures",
    "StudyItem",
    "StudySource",
    "TwinSlabs",
    "augmented",
    "encode_sources",
    "encode_studies",
    "encoder_key",
    "feature_bytes",
    "prepare_arrays",
    "prepare_slabs",
    "read_sources",
]
