"""Pages of the reference that are made from the program itself when the site is built."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import pe_app
from pe_app.cli import app

ROOT = Path(__file__).resolve().parent.parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {"command_line": command_line(), "python": python(), "json": schemas()}
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def command_line() -> str:
    """Every command with its arguments and options, as --help shows them."""
    lines = ["# Command line", "", "Every command takes `-h` and `--help`."]
    _add_commands(typer.main.get_command(app), "pe-app", lines)
    return "\n".join(lines) + "\n"


def _add_commands(group: typer.core.TyperGroup, prefix: str, lines: list[str]) -> None:
    context = typer.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        full = f"{prefix} {name}"
        lines += ["", f"## {full}", "", inspect.cleandoc(command.help or "")]
        if hasattr(command, "list_commands"):
            _add_commands(command, full, lines)
            continue
        lines += ["", "| option | default | |", "|---|---|---|"]
        for option in command.params:
            names = ", ".join(option.opts) if option.param_type_name == "option" else option.name.upper()
            shown = getattr(option, "show_default", None)
            default = shown if isinstance(shown, str) else option.default
            default = "" if default in (None, "", False) or callable(default) else default
            text = " ".join((getattr(option, "help", "") or "").split())
            lines.append(f"| `{names}` | {_cell(default)} | {_cell(text)} |")


def python() -> str:
    """The public functions and classes of pe_app."""
    lines = [
        "# Python",
        "",
        "`import pe_app` loads neither torch nor SimpleITK; each name is imported when it is used.",
    ]
    for name in pe_app._HOMES:
        value = getattr(pe_app, name)
        shown = f"{name}{inspect.signature(value)}" if inspect.isfunction(value) else f"class {name}"
        lines += ["", f"## {name}", "", "```text", shown, "", inspect.getdoc(value) or "", "```"]
    return "\n".join(lines) + "\n"


def schemas() -> str:
    """The published JSON Schemas."""
    lines = ["# JSON", "", "Unknown fields of a newer minor version are ignored; a newer major version is refused."]
    for path in sorted((ROOT / "docs" / "schemas").glob("*.json")):
        schema = json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=1)
        lines += ["", f"## {path.stem}", "", "```json", schema, "```"]
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("<", "&lt;")
