"""`make kill-loop` in short: one training of each kind of hook is killed and resumed, and equals one nobody killed."""

import os
import subprocess
import sys

from tests.test_openmmlab.test_hooks.conftest import ROOT


def test_three_kills():
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.test_openmmlab.test_hooks.kill_loop",
        "--kills",
        "3",
        "--cases",
        "iterative",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 after removal, 1 random, 1 torn file" in done.stdout and "yes" in done.stdout
