"""Generated inputs: hypothesis on ``read_volume`` and on the requests, schemathesis on the OpenAPI description."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import requests
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from campaign import corpus
from campaign.world import STUDIES, Row, World, chest

QUIET = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.generate, Phase.shrink],
}


def volumes(work: str, number: int, examples: int, out: str) -> None:
    """Change good files; runs in a fork."""
    from pe_app.common.errors import InputError
    from pe_app.ct.volume_io import read_volume

    hu = chest(0).voxels[::4, ::4, ::4].copy()
    nifti = corpus._nifti(hu)
    good = {".nrrd": corpus._nrrd(hu, encoding="raw", payload=hu.tobytes()), ".nii": nifti, ".nii.gz": nifti}
    result = {"tried": 0, "read": 0, "failure": ""}
    words = st.sampled_from([b"0", b"-1", b"nan", b"inf", b"1e30", b"999999999", b"", b"none", b"\xff", b"(", b" "])

    @seed(number)
    @settings(max_examples=examples, **QUIET)
    @given(
        st.sampled_from(sorted(good)),
        st.lists(st.tuples(st.integers(0, 420), st.binary(min_size=1, max_size=4)), max_size=4),
        st.lists(st.tuples(st.integers(0, 60), words), max_size=2),
        st.one_of(st.none(), st.floats(0, 1)),
    )
    def reads_or_refuses(
        ending: str, changes: list[tuple[int, bytes]], numbers: list[tuple[int, bytes]], cut: float | None
    ) -> None:
        content = good[ending]
        if ending == ".nrrd":
            header, _, data = content.partition(b"\n\n")
            for place, word in numbers:
                found = list(re.finditer(rb"[0-9.]+|[a-z-]+", header))
                match = found[place % len(found)]
                header = header[: match.start()] + word + header[match.end() :]
            content = header + b"\n\n" + data
        for place, bytes_ in changes:
            content = content[:place] + bytes_ + content[place + len(bytes_) :]
        if cut is not None:
            content = content[: int(cut * len(content))]
        path = Path(work) / f"fuzzed{ending}"
        path.write_bytes(gzip.compress(content, 1) if ending == ".nii.gz" else content)
        result["tried"] += 1
        try:
            volume = read_volume(path)
        except InputError:
            return
        else:
            result["read"] += 1
            assert volume.voxels.dtype == "int16"
            assert all(0 < step < 1e4 for step in volume.spacing_mm)

    try:
        reads_or_refuses()
    except BaseException as error:
        kept = Path(work) / "fuzzed-failure"
        result["failure"] = f"{type(error).__name__}: {error} {getattr(error, '__notes__', '')}"[:1500]
        kept.write_text(result["failure"])
    Path(out).write_text(json.dumps(result))


def requests_to(world: World, number: int, examples: int, row: Row) -> list[str]:
    """Send drawn words and JSON to every route; what failed."""
    words = st.one_of(
        st.sampled_from([*STUDIES, "final", "draft", "detection", "encoder"]),
        st.sampled_from(corpus.names()),
        st.text(max_size=30),
    )
    values = st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
        max_leaves=6,
    )
    keys = st.sampled_from(
        ["annotation", "based_on", "reader", "pe_label", "job", "epochs", "max_batch_size", "label_tag", "save_label"]
    )
    bodies = st.dictionaries(keys, values, max_size=3)
    routes = st.sampled_from([
        ("GET", "/datastore/image?image={}", ""), ("GET", "/datastore/label?label={}&tag={}", ""),
        ("GET", "/datastore/label/info?label={}&tag={}", ""), ("DELETE", "/datastore/label?id={}&tag={}", ""),
        ("PUT", "/datastore/image/info?image={}", "info"), ("PUT", "/datastore/label/info?label={}&tag={}", "info"),
        ("PUT", "/datastore/label?image={}&tag={}", "params"), ("POST", "/infer/{}?image={}", "params"),
        ("POST", "/activelearning/{}", "json"), ("POST", "/pe/studies/{}/lease", "json"), ("GET", "/pe/studies/{}", ""),
        ("GET", "/pe/jobs/{}", ""), ("POST", "/activelearning/random", "json"),
        ("POST", "/batch/infer/{}?images={}", "json"),
        ("PUT", "/datastore/label?image=study0&tag=second", "params"),
        ("PUT", "/datastore/image/info?image=study0", "info"), ("GET", "/pe/studies/{}/history/{}/label", ""),
        ("POST", "/pe/studies/{}/history/{}/restore", "json"), ("POST", "/pe/models/{}/pin", ""),
    ])  # fmt: skip
    failures: list[str] = []

    @seed(number)
    @settings(max_examples=examples, **QUIET)
    @given(routes, words, words, bodies)
    def answers(route: tuple[str, str, str], first: str, second: str, body: dict[str, Any]) -> None:
        method, path, where = route
        address = path.format(
            *(quote(word.encode("utf-8", "replace"), safe="") for word in (first, second)[: path.count("{}")])
        )
        text = json.dumps(body)
        arguments: dict[str, Any] = {}
        if where == "json":
            arguments = {"data": text.encode(), "headers": {"Content-Type": "application/json"}}
        elif where:
            arguments = {"data": {where: text}}
            if where == "params" and method == "PUT":
                arguments["files"] = {"label": ("a.seg.nrrd", b"NRRD0004\n\n")}
        row.tried += 1
        answer = world.request(method, address, **arguments)
        assert answer.status_code < 500, f"{method} {address} {text}: {answer.status_code} {answer.text[:150]}"
        assert "Traceback" not in answer.text

    try:
        answers()
    except requests.RequestException as error:
        failures.append(f"no answer: {error}")
    except BaseException as error:
        failures.append(f"{error}"[:600])
    return failures


def schemathesis(world: World, number: int, examples: int) -> tuple[int, list[str], str]:
    """Run schemathesis' command; how many cases, what failed, its version."""
    description = world.zygote.work / "openapi.json"
    description.write_text(world.request("GET", "/openapi.json").text)
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", str(description), "--url", world.address),
        *("--checks", "not_a_server_error", "--phases", "coverage,fuzzing", "--max-examples", str(examples)),
        *("--seed", str(number), "--suppress-health-check", "all", "--request-timeout", "30", "--no-color"),
        *("--generation-database", "none", "--max-failures", "20"),
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900, cwd=world.zygote.work,
                         env={**os.environ, "COLUMNS": "200"})  # fmt: skip
    cases = re.search(r"(\d+) generated", ran.stdout)
    version = re.search(r"v(\d[\d.]*)", ran.stdout)
    failures = re.findall(r"^\s*\[(?:5\d\d)\].*?$|^\s*curl .*$|^\s*- .*error.*$", ran.stdout, re.MULTILINE)
    if ran.returncode not in (0, 1) or (ran.returncode == 1 and not failures):
        failures = [f"schemathesis ended with {ran.returncode}: {ran.stdout[-1500:]} {ran.stderr[-500:]}"]
    return (
        int(cases.group(1)) if cases else 0,
        [line.strip()[:300] for line in failures],
        f"schemathesis {version and version.group(1)}, seed {number}",
    )
