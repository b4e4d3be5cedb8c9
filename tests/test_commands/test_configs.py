"""``rep-plugin configs`` lists what the other commands take by name."""

import pytest

from rep_plugin.__main__ import main
from rep_plugin.shipped import find_config, list_configs


def test_names_one_a_line(capsys):
    main(["configs"])
    assert capsys.readouterr().out.split() == list_configs()
    main(["configs", "csgd*", "rep_mbv2_cub"])
    assert capsys.readouterr().out.split() == ["pruning/csgd_resnet18_fashion_mnist", "rep_mbv2_cub"]


def test_paths_are_the_files(capsys):
    main(["configs", "rep_mbv2_cub", "--paths"])
    assert capsys.readouterr().out.strip() == str(find_config("rep_mbv2_cub"))


def test_a_filter_that_nothing_fits_is_an_error():
    with pytest.raises(SystemExit, match="error: no shipped config is named mbv9, expected a wildcard"):
        main(["configs", "mbv9"])
