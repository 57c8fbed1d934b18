"""Runs that are killed with SIGKILL at random moments end as the run that was left alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "kill_resume.py"


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "signals"), [(20, ["KILL"]), (4, ["TERM", "INT"])])
def test_a_run_killed_again_and_again_gives_the_same_bits(tmp_path, kills, signals):
    """Anywhere, while a checkpoint is written, and inside an evaluation, under a clock that runs backwards."""
    file = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, PROGRAM, "--kills", str(kills), "--json", file, "--signals", *signals],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = json.loads(file.read_text())
    assert sum(row["kills"] for row in rows) == kills
    assert all(row["survived"] == row["kills"] for row in rows)
    if kills == 20:
        assert sorted(row["kills"] for row in rows) == [6, 7, 7]
