"""The structure of the code in numbers: rooms, floors, imports, sizes, seconds, and what installations bring.

    python tests/measure/structure.py [CHECKOUT] [--installs]

A room is a module or folder at the top of ``pe_app``. A room's floor is one more than the highest of those it imports
from; rooms in a circle share a floor.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def modules(package: Path) -> dict[str, Path]:
    """Files of a package by their dotted name below it."""
    return {
        ".".join(path.relative_to(package).with_suffix("").parts): path
        for path in sorted(package.rglob("*.py"))
        if path.name not in ("__init__.py", "__main__.py") or path.parent != package
    }


def room(name: str) -> str:
    """The room of a dotted name."""
    return name.partition(".")[0]


def imports(package: Path) -> dict[str, set[str]]:
    """For each room the rooms that its modules import, at any depth of the code."""
    found: dict[str, set[str]] = {room(name): set() for name in modules(package)}
    for name, path in modules(package).items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for dotted in names:
                first, _, rest = dotted.partition(".")
                if first == package.name and room(rest) in found:
                    found[room(name)].add(room(rest))
        found[room(name)].discard(room(name))
    return found


def in_circles(arrows: dict[str, set[str]]) -> set[str]:
    """Rooms from which one comes back to them."""
    return {start for start in arrows if start in reached(arrows, start)}


def reached(arrows: dict[str, set[str]], start: str) -> set[str]:
    """Rooms that a room imports, directly or through others."""
    seen: set[str] = set()
    left = list(arrows[start])
    while left:
        here = left.pop()
        if here not in seen:
            seen.add(here)
            left += arrows[here]
    return seen


def floors(arrows: dict[str, set[str]]) -> int:
    """Length of the longest chain of rooms, each importing the next."""
    circle = in_circles(arrows)
    height: dict[str, int] = {}

    def of(name: str, above: frozenset[str]) -> int:
        if name not in height:
            lower = [of(each, above | {name}) for each in arrows[name] - above - (circle & above)]
            height[name] = 1 + max(lower, default=0)
        return height[name]

    return max(of(name, frozenset()) for name in arrows)


def seconds(*command: str) -> float:
    """The shortest of three runs."""
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        times.append(time.perf_counter() - begin)
    return min(times)


def installation(checkout: Path, extra: str) -> tuple[int, float]:
    """Packages and megabytes of an installation in a fresh environment."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = Path(folder) / "bin" / "python"
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "install", f"{checkout}{extra}"], check=True)
        listed = subprocess.run([*pip, "list", "--format=freeze"], check=True, capture_output=True, text=True).stdout
        place = next((Path(folder) / "lib").glob("python*"))
        size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file() and not path.is_symlink())
        own = {"pip", "setuptools"}
        return sum(line.partition("==")[0] not in own for line in listed.split()), size / 1e6


def main() -> None:
    """Print one line per number."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, nargs="?", default=Path(__file__).resolve().parents[2])
    parser.add_argument("--installs", action="store_true")
    given = parser.parse_args()
    package = given.checkout / "pe_app"
    arrows = imports(package)
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules(package).items()}
    largest = max(lines, key=lambda name: lines[name])
    print(f"rooms at the top of pe_app: {len(arrows)}")
    print(f"floors: {floors(arrows)}")
    print(f"arrows between rooms: {sum(map(len, arrows.values()))}")
    print(f"rooms in circles: {len(in_circles(arrows))}")
    print(f"largest module: {largest}, {lines[largest]} lines")
    print(f"lines of pe_app: {sum(lines.values())}")
    apps = given.checkout / "apps"
    reaching = [p for p in package.rglob("*.py") if "pe_monailabel" in p.read_text() or "from lib" in p.read_text()]
    print(f"modules of pe_app that import the app: {len(reaching)}")
    print(f"files of pe_app and apps: {len(list(package.rglob('*.py'))) + len(list(apps.rglob('*.py')))}")
    if given.checkout == Path(__file__).resolve().parents[2]:
        print(f"seconds of import pe_app: {seconds('-c', 'import pe_app'):.2f}")
        print(f"seconds of pe-app --help: {seconds('-m', 'pe_app', '--help'):.2f}")
    if given.installs:
        for extra in ("", "[all]"):
            count, size = installation(given.checkout, extra)
            print(f"installation pe-app{extra}: {count} packages, {size:.0f} MB")


if __name__ == "__main__":
    main()
