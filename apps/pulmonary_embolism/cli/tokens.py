"""Verbs for the tokens of a server that other machines reach: add, list, revoke."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pe_app.common.extras import require_extra

if TYPE_CHECKING:
    from pe_monailabel.server.access import TokenFile

DEFAULT_FILE = Path(typer.get_app_dir("pe-app")) / "tokens.json"
"""Where ``tokens`` keeps them and ``serve`` looks for them when other machines are served."""

app = typer.Typer(no_args_is_help=True, help="Who may use a server that asks for tokens.")

Name = Annotated[str, typer.Argument(help="The reader's name, as it is recorded with labels.")]
File = Annotated[Path, typer.Option("--file", help="Token file.")]


@app.command("add")
def add(
    name: Name,
    role: Annotated[str, typer.Option(help="reader: look and detect; annotator: also save; admin: also train.")],
    file: File = DEFAULT_FILE,
) -> None:
    """Issue a token to a reader and print it: this once, since the file keeps only its hash."""
    typer.echo(_tokens(file).add(name, role))
    typer.echo(f"{name} is {role} wherever pe-app serve asks for {file}. The token is shown this once.", err=True)


@app.command("list")
def list_(file: File = DEFAULT_FILE) -> None:
    """Who has a token, with which role, since when."""
    for token in _tokens(file).tokens():
        typer.echo(f"{token.created}  {token.role:9}  {token.name}")


@app.command("revoke")
def revoke(name: Name, file: File = DEFAULT_FILE) -> None:
    """Let a reader's token count no longer, from the next request on."""
    _tokens(file).revoke(name)
    typer.echo(f"The token of {name} counts no longer.", err=True)


def _tokens(file: Path) -> TokenFile:
    require_extra("server")
    from pe_monailabel.server.access import TokenFile

    return TokenFile(file)
