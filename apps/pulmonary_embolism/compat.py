"""Import this before monailabel: 0.8.5 cannot be imported beside pydicom 3 without it, and takes MONAI along.

MONAI Label imports ``pydicom_seg`` 0.4.1, which is unmaintained and imports a module that pydicom 3 no longer has. It
is needed for MONAI Label's own DICOM SEG export only, which this app does not offer, so an empty stand-in suffices.

It also imports MONAI for bundles and transforms of its stock tasks, which this app does not have: more than half of a
server's start and 400 MB of its memory. While monailabel is imported here, MONAI's names are stand-ins; after that
whoever imports MONAI gets the real one.
"""

import sys
import types
from collections.abc import Iterator, MutableSequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec


class _StandIn(types.ModuleType):
    """A module of which any name can be imported, to be refused when it is used."""

    __path__: MutableSequence[str] = []  # noqa: RUF012 - never changed

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(self: object, *arguments: object, **options: object) -> None:
            raise NotImplementedError(f"this server was started without MONAI's {name}")

        return type(name, (), {"__init__": refuse})


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "monai" else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing is in it."""


@contextmanager
def _without_monai() -> Iterator[None]:
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _StandIn)]:
            del sys.modules[name]


sys.modules.setdefault("pydicom_seg", types.ModuleType("pydicom_seg"))
if "monai" not in sys.modules:
    with _without_monai():
        import monailabel.interfaces.app
        import monailabel.transform.writer  # noqa: F401
