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
import time
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


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


def installation(extra: str) -> tuple[int, int, float, float]:
    """Packages that an installation brings, those of CUDA among them, and megabytes without and of these.

    Measured on the packages of this environment, which must hold all extras, by their own lists of files.
    """
    found: dict[str, metadata.Distribution] = {}
    left, seen = [("pe-app", frozenset({extra, ""}))], set()
    while left:
        name, extras = left.pop()
        if (name.lower(), extras) in seen:
            continue
        seen.add((name.lower(), extras))
        try:
            found[name.lower().replace("_", "-")] = distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # for another system
        for line in distribution.requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": each}) for each in extras):
                left.append((needed.name, frozenset({*needed.extras, ""})))
    del found["pe-app"]
    sizes = {name: sum(file.size or 0 for file in each.files or ()) / 1e6 for name, each in found.items()}
    cuda = {name for name in sizes if name.startswith(("nvidia", "triton", "cuda"))}
    own = sum(size for name, size in sizes.items() if name not in cuda)
    return len(sizes), len(cuda), own, sum(sizes[name] for name in cuda)


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
        for extra in ("", "all"):
            count, of_cuda, size, more = installation(extra)
            print(f"pe-app[{extra}]: {count} packages, {of_cuda} of them CUDA; {size:.0f} MB, CUDA {more:.0f} MB more")


if __name__ == "__main__":
    main()
