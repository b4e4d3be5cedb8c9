"""model-index.yml, as mmpretrain's hub and mim read it."""

from pathlib import Path

import pytest
import yaml
from mmpretrain.apis import get_model, list_models
from mmpretrain.apis.model import ModelHub

from rep_plugin.measure.costs import count_params
from tests.helpers import ROOT

INDEX = yaml.safe_load((ROOT / "model-index.yml").read_text())


@pytest.fixture
def hub(monkeypatch):
    """mmpretrain's hub with our index in it, for one test."""
    monkeypatch.setattr(ModelHub, "_models_dict", dict(ModelHub._models_dict))
    ModelHub.register_model_index(str(ROOT / "model-index.yml"))


def test_every_config_is_listed_once():
    listed = [model["Config"] for model in INDEX["Models"]]
    no_network = {"_base_", "experiments"}
    here = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "configs").rglob("*.py")
        if not no_network & set(path.parts)
    ]
    assert sorted(listed) == sorted(here)
    assert {model["In Collection"] for model in INDEX["Models"]} == {part["Name"] for part in INDEX["Collections"]}
    assert all(model["Name"] == Path(model["Config"]).stem for model in INDEX["Models"])


def test_mmpretrain_lists_and_builds_our_models(hub):
    assert {"rep_mbv2_cub", "rep_mbv2_cub_warm_start", "rep_mbv2_mini_cub"} <= set(list_models("rep_mbv2"))
    assert "rep_mbv2_mini_cub" in list_models(task="Image Classification")
    parameters = {model["Name"]: model["Metadata"]["Parameters"] for model in INDEX["Models"]}
    for name in ("rep_mbv2_mini_cub", "rep_mobileone_s0_fashion_mnist", "dbb_resnet18_cub"):
        model = get_model(name)
        assert count_params(model) == parameters[name] and model._metainfo.name == name
