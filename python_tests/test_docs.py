"""The pages in docs/: their examples run, their links resolve, and no method or command is missing.

A fenced `python` block is executed, blocks of one page sharing their names; one that starts with
`>>>` is a doctest. In a fenced `sh` block every line that starts with `paikern ` is run by the
command's own `main`, and has to end with code 0 or with the one in its `# exit code N` comment.
"""

from __future__ import annotations

import doctest
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import paikern as pk
from paikern.budget import SCHEDULES, SCOPES
from paikern.cli import main
from paikern.cli.parser import build_parser
from paikern.pathgraph import rules
from paikern.scorers import base
from paikern.training import registry

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int
    """Where the code begins in the page, 0-based."""


def blocks(page: Path, language: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(found[1], found[2], text.count("\n", 0, found.start(2)))
        for found in FENCE.finditer(text)
        if found[1] == language
    ]


def run_block(block: Block, page: str, names: dict[str, Any]) -> None:
    if block.code.startswith(">>>"):
        test = doctest.DocTestParser().get_doctest(block.code, names, page, page, block.line)
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
        report: list[str] = []
        runner.run(test, out=report.append, clear_globs=False)
        names.update(test.globs)
        assert not runner.failures, "".join(report)
        return
    # Blank lines in front, so that a traceback shows the line of the page.
    code = compile("\n" * block.line + block.code, page, "exec", dont_inherit=True)
    exec(code, names)


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods and rules that a page registers are gone afterwards."""
    monkeypatch.setattr(base, "_SCORERS", dict(base._SCORERS))
    before = dict(rules.RULES)
    monkeypatch.setattr(rules.table, "RULES", before)


def ids(pages: list[Path]) -> list[str]:
    return [page.stem for page in pages]


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
@pytest.mark.usefixtures("registries")
def test_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = blocks(page, "python")
    assert found, f"{page.name} has no example"
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in found:
        run_block(block, page.name, names)


def test_a_wrong_example_fails() -> None:
    with pytest.raises(AssertionError):
        run_block(Block("python", ">>> 1 + 1\n3\n", 0), "page", {})
    with pytest.raises(NameError):
        run_block(Block("python", "undefined\n", 0), "page", {})


def commands(page: Path) -> Iterator[tuple[int, list[str], int]]:
    for block in blocks(page, "sh"):
        # A line that ends in a backslash goes on in the next.
        text = block.code.replace("\\\n", " ")
        for line in text.splitlines():
            if line.startswith("paikern "):
                code = re.search(r"# exit code (\d+)", line)
                yield block.line, shlex.split(line, comments=True)[1:], int(code[1] if code else 0)


PAGES_WITH_COMMANDS = [page for page in PAGES if list(commands(page))]


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS, ids=ids(PAGES_WITH_COMMANDS))
def test_commands_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for line, arguments, expected in commands(page):
        code = main(arguments)
        err = capfd.readouterr().err
        assert code == expected, f"{page.name}:{line}: {' '.join(arguments)}: {err}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
    assert len(plain) == len(set(plain)), f"{page.name} has two headings with one anchor"
    return set(plain)


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_links_resolve(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link} leads nowhere"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link} has no such heading"


def test_index_names_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    missing = [page.name for page in DOCS if page.stem != "index" and page.name not in index]
    assert not missing


def sections(*pages: str) -> dict[str, str]:
    """Heading -> text below it, of second-level headings of one word."""
    text = "\n".join((ROOT / "docs" / page).read_text(encoding="utf-8") for page in pages)
    return dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))


def ours(rows: list[dict[str, Any]], classes: dict[str, type]) -> list[dict[str, Any]]:
    """Without what other tests and pages have registered."""
    return [row for row in rows if classes[row["name"]].__module__.startswith("paikern.")]


def test_every_method_and_option_is_described() -> None:
    found = sections("methods.md", "gradient_methods.md", "structured.md")
    table = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for row in ours(pk.methods(), base._SCORERS):
        assert row["name"] in found, f"no page has a section {row['name']}"
        assert f"| [{row['name']}](" in table, f"the table of methods.md lacks {row['name']}"
        for option in row["options"]:
            described = f"`{option}`" in found[row["name"]]
            assert described, f"section {row['name']} lacks the option {option}"


def test_every_method_during_training_is_described() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for row in ours(pk.training.pruner_rows(), registry._PRUNERS):
        assert f"| [{row['name']}](" in text, f"the table of training.md lacks {row['name']}"


def test_the_table_of_methods_says_what_the_code_does() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for row in ours(pk.methods(), base._SCORERS):
        line = next(line for line in text.splitlines() if line.startswith(f"| [{row['name']}]("))
        _, _, reads, cost, rounds, scope, variants, _ = (cell.strip() for cell in line.split("|"))
        if "F" in row["cost"] and "steps" not in row["cost"]:
            assert cost == row["cost"].replace(" of one input", ""), line
        assert ("inputs' shape" in reads) == (row["needs_inputs"] and not row["needs_data"]), line
        assert ("labels" in reads) == row["needs_labels"], line
        assert ("data" in reads) == row["needs_data"], line
        assert rounds == str(row["rounds"]) or rounds.startswith("trained"), line
        assert scope == row["scope"], line
        assert variants == ", ".join(row["variants"]), line
        assert ("structured.md" in line) == row["structured"], line


@pytest.mark.parametrize("known", [SCOPES, SCHEDULES], ids=["scopes", "schedules"])
def test_selection_page_names(known: tuple[str, ...]) -> None:
    text = (ROOT / "docs" / "selection.md").read_text(encoding="utf-8")
    assert not [name for name in known if f"`{name}`" not in text]


def test_cli_page_names_every_command_and_flag() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    action = next(a for a in build_parser()._actions if a.dest == "==SUPPRESS==" or a.choices)
    assert isinstance(action.choices, dict)
    for name, parser in action.choices.items():
        assert f"## paikern {name}" in text, f"cli.md has no section on {name}"
        flags = [f for a in parser._actions for f in a.option_strings if f.startswith("--")]
        assert not [f for f in flags if f"`{f}" not in text and f != "--help"]
