"""The two commands of the README."""

import subprocess

from tests.helpers import ROOT


def test_dry_run_of_the_two_commands_names_the_real_tools():
    for target, tool in (("demo", "rep-plugin train configs/rep_mbv2_mini_cub.py"), ("test", "-m pytest")):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and tool in done.stdout
