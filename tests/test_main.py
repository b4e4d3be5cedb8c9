"""``python -m rep_plugin SCRIPT``: a script runs as it does alone, with our names known to timm."""

import subprocess
import sys

import pytest

from rep_plugin.__main__ import main


def test_a_script_finds_our_names_its_arguments_and_its_neighbours(tmp_path):
    (tmp_path / "neighbour.py").write_text("word = 'found'")
    (tmp_path / "train.py").write_text(
        "import sys, timm, neighbour\n"
        "if __name__ == '__main__':\n"
        "    print(timm.is_model('rep_mobilenetv2_050'), neighbour.word, sys.argv[1:])\n"
    )
    command = [sys.executable, "-W", "ignore", "-m", "rep_plugin", tmp_path / "train.py", "--model", "rep_repvgg_a0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "True found ['--model', 'rep_repvgg_a0']", done.stderr


def test_the_installed_package_is_found_beside_a_folder_of_its_name(tmp_path):
    """As in the folder that a clone lies in."""
    (tmp_path / "rep_plugin").mkdir()
    command = [sys.executable, "-W", "ignore", "-c", "import rep_plugin; print(rep_plugin.reparameterize.__name__)"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "reparameterize", done.stderr


@pytest.mark.parametrize("arguments", [[], ["nowhere.py", "--model"]])
def test_without_a_script(arguments):
    with pytest.raises(SystemExit, match="usage: python -m rep_plugin SCRIPT.py ARGUMENTS; no such script"):
        main(arguments)
