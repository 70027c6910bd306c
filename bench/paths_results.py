"""The results file of the path benchmark: rows as everywhere, and what each section adds.

A section is a mapping with "rows" and lists or numbers of its own. In the file the rows stand
together, each with the name of its section, and the rest under "sections", so that one section can
be measured again without the others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.references import nth_element
from bench.timing import machine, versions, write_results
from paikern.backends import cpu

NAME = "paths"
SECTIONS = ("sweeps", "runs", "dpai", "memory", "scaling", "px", "profile")
SEEDS = (0,)

Results = dict[str, Any]
Sections = dict[str, dict[str, Any]]


def tools() -> dict[str, str]:
    """What the figures depend on besides what every results file says."""
    return {
        "compiler": nth_element.compiler_version(),
        "instruction set": cpu.isa(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
    }


def about(threads: int) -> Results:
    """On what a file was measured."""
    return {"machine": machine(), "versions": versions(), "threads": threads, "tools": tools()}


def earlier(path: Path, threads: int, replaced: Sequence[str]) -> Sections:
    """The sections of a results file, but for those that are measured again.

    None where the file was made on another machine, by other versions or with other threads.
    """
    if not path.exists():
        return {}
    held = json.loads(path.read_text())
    if any(held.get(name) != value for name, value in about(threads).items()):
        return {}
    found: Sections = {}
    for name, section in held.get("sections", {}).items():
        if name not in replaced:
            rows = [row for row in held["rows"] if row["section"] == name]
            found[name] = {"rows": rows, **section}
    return found


def content_of(sections: Mapping[str, Mapping[str, Any]]) -> Results:
    """Sections as they stand in the file, in the order of `SECTIONS`."""
    named = {name: sections[name] for name in SECTIONS if name in sections}
    rows = [row for section in named.values() for row in section.get("rows", [])]
    own = {
        name: {key: value for key, value in section.items() if key != "rows"}
        for name, section in named.items()
    }
    return {"rows": rows, "sections": own}


def save(folder: Path, sections: Mapping[str, Mapping[str, Any]], threads: int) -> Path:
    """Write `folder/paths.json` and return its path."""
    content = content_of(sections)
    path = write_results(NAME, content["rows"], threads=threads, seeds=SEEDS, folder=folder)
    whole = json.loads(path.read_text()) | content | {"tools": tools()}
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(whole, indent=1) + "\n")
    os.replace(temporary, path)
    return path


def part(results: Mapping[str, Any], section: str, key: str) -> Any:
    """What a section added under `key`; an empty list where it was not measured."""
    return results.get("sections", {}).get(section, {}).get(key, [])
