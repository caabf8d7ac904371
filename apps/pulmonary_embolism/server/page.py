"""The page at ``/``: what a browser that opens the server's address sees. It runs nothing and loads nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape

from pe_app.model.detection import NOTICE

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1a1a1a }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
th, td { text-align: left; padding: .35rem .75rem; border-bottom: 1px solid #d8d8d8; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.notice { background: #fff4ce; border-left: 4px solid #b58900; padding: .5rem 1rem }
@media (prefers-color-scheme: dark) {
  body { background: #1b1b1b; color: #e6e6e6 } th, td { border-color: #444 } .notice { background: #3a3115 }
}
"""
_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()

HEADERS = {"Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_HASH}'; frame-ancestors 'none'"}

ROLES = {
    "reader": "sees studies, labels and trainings, and runs detections",
    "annotator": "also saves labels, holds studies and adds CTs",
    "admin": "also trains, chooses models, restores and removes labels",
}
"""What each role may, in short; the table of routes decides."""

_STATES = {"not_started": "not started", "in_progress": "in progress"}


def worklist_page(rows: Sequence[Mapping[str, object]], model: str) -> str:
    """Every study: how far its review is, and what the served model makes of it."""
    body = "".join(_row(row) for row in rows)
    head = "<tr><th>Study<th>Review<th>Slices reviewed<th>Label<th>Model output<th>Held by<th>Remark</tr>"
    table = f"<table><thead>{head}</thead><tbody>{body}</tbody></table>" if rows else "<p>There is no study yet.</p>"
    shown = f"<p>{len(rows)} studies. Served model: {escape(model)}.</p>"
    return _page(f"{shown}{table}{_how_to_read()}")


def door_page() -> str:
    """What whoever has no token is shown: nothing of the studies."""
    roles = "".join(f"<tr><th>{escape(role)}<td>{escape(may)}</tr>" for role, may in ROLES.items())
    return _page(
        "<p>This server asks for a token. An administrator issues one with <code>pe-app tokens add NAME --role "
        f"ROLE</code>; enter it in 3D Slicer together with this address.</p><table>{roles}</table>{_how_to_read()}"
    )


def _row(row: Mapping[str, object]) -> str:
    state = str(row["state"])
    probability = row["probability"]
    shown = f"{probability:.2f}" if isinstance(probability, float) else ""
    cells = [
        f"<td>{escape(str(row['study']))}",
        f"<td>{escape(_STATES.get(state, state))}",
        f'<td class="number">{row["reviewed"]} of {row["scheduled"]}',
        f"<td>{escape(str(row['label'] or ''))}",
        f'<td class="number">{shown}',
        f"<td>{escape(str(row['held_by'] or ''))}",
        f"<td>{escape(str(row['reason'] or ''))}",
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _how_to_read() -> str:
    return (
        "<p>Studies are read in 3D Slicer with the module Pulmonary Embolism, or with the MONAI Label plugins. "
        'Programs find the interface described at <a href="/openapi.json">/openapi.json</a>.</p>'
    )


def _page(content: str) -> str:
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Pulmonary embolism: worklist</title><style>{_STYLE}</style></head><body>"
        f'<h1>Pulmonary embolism on chest CT</h1><p class="notice">{escape(NOTICE)}</p>{content}</body></html>'
    )
