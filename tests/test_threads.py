"""Verbs in real threads beside threads that infer: no error anywhere, no output moves by a bit, torch works afterwards."""

import threading
import warnings
from functools import partial

import pytest
import torch
from torch import fx, nn

import rep_plugin
from tests.attack.threads import VERBS, X, attack, build, run_beside


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("verb", VERBS)
def test_four_threads_beside_inference_on_the_given_model_and_another(verb, tmp_path):
    given, other = build(3), build(4)
    repeat = 5 if verb == "reparameterize" else 2
    counts = run_beside([partial(VERBS[verb], given, tmp_path)] * 4, {"given": given, "other": other}, 2, repeat)
    assert counts["jobs"] == 4 * repeat and counts["inferences"] >= 4
    after = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()  # torch works, torch.fx too
    assert torch.equal(fx.symbolic_trace(after)(X), after(X))


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_draws_is_merged_beside_one_that_draws(tmp_path):
    noisy, other = build(1, noisy=True), build(2)
    run_beside([partial(VERBS["reparameterize"], noisy, tmp_path)] * 2, {"other": other})


@pytest.mark.filterwarnings("ignore")
def test_a_unit_of_the_attack(tmp_path):
    assert attack(1, tmp_path)["jobs"] == 8


def test_exports_in_threads_leave_the_filters_of_warnings(tmp_path):
    net, before = build(0), list(warnings.filters)

    def export(number):
        path = tmp_path / f"{number}.onnx"
        rep_plugin.export_onnx(net, path, X, rounds=0, runtimes=["onnxruntime"])

    threads = [threading.Thread(target=export, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before and len(list(tmp_path.glob("*.onnx"))) == 4
