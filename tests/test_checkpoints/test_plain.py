"""Data from files of others is bounded and of the expected types before anything is done with it."""

import os
import zipfile
from collections import OrderedDict

import pytest
import torch

from rep_plugin.arguments import fits
from rep_plugin.checkpoints.plain import parse_json, read_json, require_fields
from rep_plugin.checkpoints.safe_load import load_checkpoint_file, load_safetensors
from rep_plugin.checkpoints.strict import describe_mismatch
from rep_plugin.errors import ArgumentError, UnreadableCheckpointError, UnsafeCheckpointError


def nested(levels, make):
    node = 0
    for _ in range(levels):
        node = make(node)
    return node


class Shadowing(OrderedDict):
    """Pickles as an OrderedDict with attributes in the place of its methods."""

    def __reduce__(self):
        return OrderedDict, (), {"items": 3}, None, iter({"a": 1}.items())


UNBOUNDED = {
    "lists": ({"meta": nested(40, lambda node: [node, node])}, "more than 10,000,000 values"),
    "dicts": ({"meta": nested(40, lambda node: {"a": node, "b": node})}, "more than 10,000,000 values"),
    "tuples": ({"meta": nested(40, lambda node: (node, node))}, "more than 10,000,000 values"),
    "depth": ({"meta": nested(150, lambda node: [node])}, "100 levels deep"),
    "integer": ({"meta": 10**5000}, "an integer of 16,610 bits"),
    "attributes": ({"state_dict": Shadowing()}, "a dict has the attributes"),
    "repeated": ({"a": torch.zeros(1).expand(2**40)}, "a tensor of 4,398,046,511,104 bytes has 4 bytes"),
    "no data": ({"a": torch.empty(3, device="meta")}, "a tensor has no data"),
}


@pytest.mark.parametrize("name", UNBOUNDED)
def test_content_without_end_is_refused(tmp_path, name):
    content, message = UNBOUNDED[name]
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(UnreadableCheckpointError, match=message) as caught:
        load_checkpoint_file(tmp_path / "bad.pth")
    assert "bad.pth" in str(caught.value) and "\n" not in str(caught.value)


def test_a_list_in_itself_is_refused(tmp_path):
    own: list = []
    own.append(own)
    torch.save({"a": own}, tmp_path / "bad.pth")
    with pytest.raises(UnreadableCheckpointError, match="levels deep"):
        load_checkpoint_file(tmp_path / "bad.pth")


def test_shared_and_expanded_values_of_real_checkpoints_pass(tmp_path):
    shared = ["a"] * 1000
    content = {"a": [shared] * 1000, "b": torch.zeros(1).expand(1000), "c": torch.nn.Linear(2, 2).state_dict()}
    torch.save(content, tmp_path / "good.pth")
    assert load_checkpoint_file(tmp_path / "good.pth")["a"][999] == shared
    assert load_checkpoint_file(tmp_path / "good.pth", map_location="meta")["b"].is_meta


def test_compressed_archives_are_refused_unread(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**8)
    with pytest.raises(UnsafeCheckpointError, match=r"bomb.pth: refused an archive with compressed parts"):
        load_checkpoint_file(tmp_path / "bomb.pth")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 10**6, "nests too deeply"),
        (b"9" * 10_000, "is not JSON"),
        (b"\x80", "is not JSON"),
        (b"", "is not JSON"),
    ],
)
def test_broken_json_is_named(tmp_path, text, message):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ArgumentError, match=message) as caught:
        read_json(tmp_path / "a.json")
    assert "a.json" in str(caught.value) and "\n" not in str(caught.value)


def test_json_is_read_from_regular_files_alone(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(ArgumentError, match="is no regular file"):
            read_json(path)
    with pytest.raises(FileNotFoundError, match="none.json does not exist"):
        read_json(tmp_path / "none.json")
    for path in (tmp_path / "pipe", tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            load_safetensors(path)


@pytest.mark.parametrize(
    ("value", "kind", "right"),
    [
        (3, int, True), (True, int, False), (2**64, int, False), (3, float, True), (float("nan"), float, False),
        ([1, 2], tuple[int, ...], True), ([1, "2"], tuple[int, ...], False), ([1, 2], tuple[int, int], True),
        ([1], tuple[int, int], False), ("ab", list[str], False), (None, int | None, True), ("x", int | None, False),
        ({"a": {"b": 1}}, dict[str, dict], True), ({1: 2}, dict[str, int], False), ([{}], list[dict], True),
    ],
)  # fmt: skip
def test_fits(value, kind, right):
    assert fits(value, kind) is right


def test_fields_are_named():
    for data, message in (
        (3, "a.json: missing or unknown int"),
        ({"a": 1}, r"missing or unknown \['a', 'rounds'\]"),
        ({"rounds": "x" * 999}, "rounds is 'xxx.*, expected int"),
        ({"rounds": 10**9000}, "rounds is an integer of 29,898 bits, expected int"),
    ):
        with pytest.raises(ArgumentError, match=message) as caught:
            require_fields(data, {"rounds": int}, "a.json")
        assert len(str(caught.value)) < 200
    assert parse_json("[NaN]", "x")[0] != 1  # metrics of a collapsed network


def test_odd_keys_are_told_in_one_line():
    net = torch.nn.PReLU(1)
    for key in ("a\nb", "a" * 9999, ("x",)):
        told = describe_mismatch(net, {"weight": torch.zeros(1), key: torch.zeros(1)})
        assert "\n" not in told and len(told) < 300 and told.startswith("1 unexpected")
    assert "of another kind of number" in describe_mismatch(net, {"weight": torch.zeros(1).to_sparse()})
