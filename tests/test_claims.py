"""docs/claims.md names tests and commands that exist, and has a part for every page that promises something."""

import ast
import re
from pathlib import Path

import typer

from hf_cl.cli import app

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "claims.md").read_text("utf-8")
LINES = [line for line in PAGE.split("\n") if line.startswith("- ")]
OPENLY = re.compile(r"\bno test\b")
"""How a line says that nothing fails."""


def pairs(text):
    return set(re.findall(r"`((?:data/)?test_\w+\.py)::(\w+)`", text))


def commands(text):
    return re.findall(r"`(make|hf-cl) ([a-z]+)[^`]*`", text)


def held(file):
    """Return the names of a test file's tests."""
    place = ROOT / "tests" / file
    tree = ast.parse(place.read_text("utf-8")).body if place.is_file() else []
    return {node.name for node in tree if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def lacking(text):
    """Return what is named in a text and is not there."""
    known = {file: held(file) for file in {file for file, _ in pairs(text)}}
    gone = [f"{file}::{test}" for file, test in pairs(text) if test not in known[file]]
    words = {
        "hf-cl": set(typer.main.get_command(app).commands),
        "make": set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE)),
    }
    return sorted(gone + [f"{program} {word}" for program, word in commands(text) if word not in words[program]])


def test_every_test_and_command_named_is_there():
    assert lacking(PAGE) == []
    assert len(pairs(PAGE)) > 150


def test_what_is_not_there_is_seen():
    gone = "`test_claims.py::test_no_such`, `test_gone.py::test_x`, `hf-cl lern`, `make proof`, `hf-cl verify RUN`"
    assert lacking(gone) == ["hf-cl lern", "make proof", "test_claims.py::test_no_such", "test_gone.py::test_x"]


def test_every_line_names_what_fails_or_says_openly_that_nothing_does():
    assert [line for line in LINES if not (pairs(line) or commands(line) or OPENLY.search(line))] == []


def test_every_page_that_promises_has_a_part():
    told = {"claims.md", "log.md", "results.md", "benchmarks.md", "methods.md"}  # methods.md: with the README's table
    pages = {f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md") if file.name not in told}
    parts = set(re.findall(r"^## (.*)$", PAGE, flags=re.MULTILINE))
    assert pages <= parts and len(pages) >= 5
    assert {"Start", "How it works", "Methods", "Command line", "The mask bank"} <= parts
