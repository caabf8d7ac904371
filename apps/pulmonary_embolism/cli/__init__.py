"""The verbs that the server brings to pe-app: its entry point in ``pe_app.commands`` names ``app``.

They import what they need when they run, so that ``--help`` and mistakes answer at once.
"""

from __future__ import annotations

import typer

from pe_monailabel.cli import labels, models, tokens
from pe_monailabel.cli.safekeeping import backup, check, restore
from pe_monailabel.cli.serve import serve

PANEL = "Serve readers"
"""Their group in --help."""

app = typer.Typer()
app.command(rich_help_panel=PANEL)(serve)
app.add_typer(labels.app, name="labels", rich_help_panel=PANEL)
app.add_typer(models.app, name="models", rich_help_panel=PANEL)
app.command(rich_help_panel=PANEL)(backup)
app.command(rich_help_panel=PANEL)(restore)
app.command(rich_help_panel=PANEL)(check)
app.add_typer(tokens.app, name="tokens", rich_help_panel=PANEL)
