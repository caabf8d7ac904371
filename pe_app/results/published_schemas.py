"""The JSON Schemas of docs/schemas, for programs that read our files: made from the nouns themselves.

``python -m pe_app.results.published_schemas docs/schemas`` writes them anew; a test holds them fresh.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pe_app.annotation.record import ANNOTATION
from pe_app.common.files import write_durably
from pe_app.common.schema import json_text
from pe_app.ct.source_series import SOURCE
from pe_app.model.detection import DETECTION
from pe_app.results.outcome import RESULT


def published_schemas() -> dict[str, str]:
    """Every published schema's text by the name of its file."""
    return {
        schema.file_name: json_text(schema.described(), indent=2) + "\n"
        for schema in (DETECTION, RESULT, ANNOTATION, SOURCE)
    }


if __name__ == "__main__":
    for name, text in published_schemas().items():
        write_durably(Path(sys.argv[1], name), text)
