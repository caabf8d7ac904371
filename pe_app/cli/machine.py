"""The options --device and --threads, which every verb that runs the networks has."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

_PANEL = "This machine"
_Device = Annotated[
    str,
    typer.Option(
        "--device",
        envvar="PE_DEVICE",
        rich_help_panel=_PANEL,
        help="Where the networks run: cpu, cuda, cuda:1.",
        show_default="the first GPU where there is one, else cpu",
    ),
]
_Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, rich_help_panel=_PANEL, help="CPU threads.", show_default="one per core"),
]


def with_machine_options(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with ``--device`` and ``--threads``; both apply before its own modules are imported."""
    signature = inspect.signature(verb, eval_str=True)

    @functools.wraps(verb)
    def run(*, device: str, threads: int | None, **values: object) -> None:
        use_machine(device, threads)
        verb(**values)

    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter("device", keyword, default="", annotation=_Device),
        inspect.Parameter("threads", keyword, default=None, annotation=_Threads),
    ]
    own = [parameter.replace(kind=keyword) for parameter in signature.parameters.values()]
    set_signature(run, [*own, *added])
    return run


def set_signature(function: Callable[..., None], parameters: list[inspect.Parameter]) -> None:
    """Let typer see these parameters instead of the function's own."""
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def use_machine(device: str, threads: int | None) -> None:
    """Choose device and threads for this process and those that it starts."""
    if device:
        os.environ["PE_DEVICE"] = device
    if threads:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"):
            os.environ[name] = str(threads)
        if "torch" in sys.modules:  # it has read the variables already
            sys.modules["torch"].set_num_threads(threads)
