"""The mini data set: its layouts are read by the stock loaders, it is reproducible, and it protects other files."""

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmpretrain.registry import DATASETS
from PIL import Image

from tests.helpers import ROOT

TOOL = ROOT / "tools/dataset_converters/make_mini_fgvc.py"
spec = importlib.util.spec_from_file_location("make_mini_fgvc", TOOL)
tool = importlib.util.module_from_spec(spec)
# Registered by name: dataclasses look their module up.
sys.modules[spec.name] = tool
spec.loader.exec_module(tool)
birds = tool._birds

SMALL = {"classes": 5, "train_per_class": 3, "test_per_class": 2, "size": 48}


def small(**changes) -> "tool.Params":
    return tool.Params(**{**SMALL, **changes})


def digest(folder: Path) -> dict:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_small_birds_config_names_the_default_classes(tmp_path):
    assert tool.make(tmp_path / "birds", tool.Params(train_per_class=1, test_per_class=1, size=32))
    names = [line.split(".", 1)[1] for line in (tmp_path / "birds/classes.txt").read_text().splitlines()]
    cfg = Config.fromfile(TOOL.parents[2] / "configs/rep_mbv2_mini_cub.py")
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = str(tmp_path / "birds")
        assert list(DATASETS.build(loader.dataset).metainfo["classes"]) == names
    assert len(names) == cfg.model.head.num_classes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One small set per layout, made once."""
    root = tmp_path_factory.mktemp("sets")
    for layout in tool.LAYOUTS:
        assert tool.make(root / layout, small(layout=layout))
    return root


def read(dataset) -> list:
    """(image path, label) of each sample, after checking that the image is there and of the asked size."""
    out = []
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        with Image.open(info["img_path"]) as image:
            assert image.format == "JPEG" and image.size == (48, 48)
            assert np.asarray(image).std() > 5
        out.append((info["img_path"], info["gt_label"]))
    return out


@pytest.mark.parametrize(
    ("layout", "loader", "counts"),
    [
        ("cub", "CUB", {"train": 3, "test": 2}),
        ("cars", "StanfordCars", {"train": 3, "test": 2}),
        ("aircraft", "FGVCAircraft", {"train": 2, "val": 1, "trainval": 3, "test": 2}),
    ],
)
def test_stock_loader_reads_the_layout(made, layout, loader, counts):
    datasets = pytest.importorskip("mmpretrain.datasets")
    image = {p.path: p for p in tool.images(small(layout=layout))}
    seen = {}
    for split, per_class in counts.items():
        samples = read(getattr(datasets, loader)(data_root=str(made / layout), split=split))
        assert np.bincount([label for _, label in samples]).tolist() == [per_class] * 5
        seen[split] = {Path(path).relative_to(made / layout).as_posix() for path, _ in samples}
        for path, label in samples:
            source = image[Path(path).relative_to(made / layout).as_posix()]
            assert label == source.label
            assert Path(path).read_bytes() == birds.render(0, source.label, source.index, 48)[0]
    assert not seen["train"] & seen["test"]
    if "val" in seen:
        assert not seen["train"] & seen["val"]
        assert seen["train"] | seen["val"] == seen["trainval"]


def test_aircraft_names_are_those_of_the_loader():
    categories = pytest.importorskip("mmpretrain.datasets.categories")
    assert tuple(tool.AIRCRAFT_NAMES) == tuple(categories.FGVCAIRCRAFT_CATEGORIES)


def test_cub_files_agree_with_each_other(made):
    root = made / "cub"
    rows = {n: [line.split() for line in (root / n).read_text().splitlines()] for n in tool.ANNOTATIONS["cub"]}
    names = {number: name for number, name in rows["classes.txt"]}
    assert list(names) == ["1", "2", "3", "4", "5"]
    ids = [number for number, _ in rows["images.txt"]]
    assert ids == [str(i + 1) for i in range(25)]
    for name in ("image_class_labels.txt", "train_test_split.txt", "bounding_boxes.txt"):
        assert [row[0] for row in rows[name]] == ids
    for (_, path), (_, label) in zip(rows["images.txt"], rows["image_class_labels.txt"]):
        assert path.split("/")[0] == names[label]
    for _, *box in rows["bounding_boxes.txt"]:
        x, y, w, h = map(float, box)
        assert x >= 0 and y >= 0 and x + w <= 48 and y + h <= 48
        # The bird spans 74..97 % of the image; a pixel on each side for anti-aliasing.
        assert 0.74 * 48 - 1 <= max(w, h) <= 0.97 * 48 + 2


def test_cars_annotations_are_a_struct_array_for_other_readers(made):
    io = pytest.importorskip("scipy.io")
    data = io.loadmat(made / "cars" / "cars_annos.mat", squeeze_me=False)
    rows = data["annotations"]
    assert rows.shape == (1, 25)
    assert rows.dtype.names == ("relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test")
    assert [int(v.item()) for v in rows["class"][0]] == [i // 5 + 1 for i in range(25)]
    assert [int(v.item()) for v in rows["test"][0]] == [0, 0, 0, 1, 1] * 5
    assert data["class_names"].size == 5


def test_marker_records_parameters_and_parts(made):
    data = json.loads((made / "cub" / tool.MARKER).read_text())
    assert tool.Params(**data["params"]) == small()
    assert [c["name"] for c in data["classes"]] == [birds.class_name(i) for i in range(5)]
    assert data["classes"][0]["crown"] in birds.PARTS["crown"]


@pytest.mark.parametrize("layout", tool.LAYOUTS)
def test_same_seed_same_bytes(made, tmp_path, layout):
    tool.make(tmp_path / "again", small(layout=layout))
    assert digest(tmp_path / "again") == digest(made / layout)


def test_workers_do_not_change_the_bytes(made, tmp_path):
    # Through the command line: worker processes import the main module.
    argv = ["--classes", "5", "--train-per-class", "3", "--test-per-class", "2", "--size", "48", "--workers", "2"]
    done = subprocess.run(
        [sys.executable, TOOL, *argv, "--out", tmp_path / "two"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "two") == digest(made / "cub")


def test_seed_class_and_index_each_change_the_image(monkeypatch):
    # With the same parts for all, so that only the random draws can tell two images apart.
    parts = birds.class_parts(0)
    monkeypatch.setattr(birds, "class_parts", lambda index: parts)
    base = birds.render(0, 0, 0, 48)[0]
    assert base == birds.render(0, 0, 0, 48)[0]
    assert len({base, birds.render(1, 0, 0, 48)[0], birds.render(0, 1, 0, 48)[0], birds.render(0, 0, 1, 48)[0]}) == 4


def test_classes_are_distinct_and_each_has_a_near_neighbour():
    table = np.array(birds.class_table())
    assert len(table) == birds.MAX_CLASSES >= 40
    assert len({birds.class_name(i) for i in range(len(table))}) == len(table)
    distance = (table[:, None] != table[None]).sum(axis=2)
    np.fill_diagonal(distance, 99)
    assert distance.min() == 1
    for count in (2, 20, 100):
        assert distance[:count, :count].min(axis=1).max() <= 2
    for column, values in enumerate(birds.PARTS.values()):
        # In the default 20 classes no value of a part is rare or rules.
        shares = np.bincount(table[:20, column], minlength=len(values)) / 20
        assert shares.min() >= 0.4 / len(values) and shares.max() <= 1.7 / len(values)


@pytest.mark.parametrize("part", birds.PARTS)
def test_every_part_value_shows_in_the_drawing(part):
    drawn = set()
    for value in birds.PARTS[part]:
        parts = {name: values[0] for name, values in birds.PARTS.items()} | {part: value}
        items = birds._place(np.random.default_rng(3), birds._bird(np.random.default_rng(5), parts), 144)
        drawn.add(birds._paint_bird(items, 144).tobytes())
    assert len(drawn) == len(birds.PARTS[part])


def test_complete_set_is_left_alone(tmp_path, capsys):
    argv = ["--classes", "2", "--train-per-class", "1", "--test-per-class", "1", "--size", "32", "--workers", "1"]
    argv += ["--out", str(tmp_path / "set")]
    assert tool.main(argv) == 0
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "set").rglob("*")}
    capsys.readouterr()
    assert tool.main(argv) == 0
    assert "already complete" in capsys.readouterr().out
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "set").rglob("*")}


TINY = {"classes": 2, "train_per_class": 1, "test_per_class": 1, "size": 32}


def test_other_files_are_never_replaced(tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes.txt").write_text("keep")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"holds files but no readable mini_fgvc\.json"):
            tool.make(out, tool.Params(**TINY), overwrite=overwrite)
    (tmp_path / "file").write_text("keep")
    with pytest.raises(ValueError, match="is a file"):
        tool.make(tmp_path / "file", tool.Params(**TINY), overwrite=True)
    assert digest(tmp_path).keys() == {"mine/notes.txt", "file"}
    assert (out / "notes.txt").read_text() == (tmp_path / "file").read_text() == "keep"


def test_overwrite_replaces_only_what_the_tool_made(tmp_path):
    out = tmp_path / "set"
    tool.make(out, tool.Params(**TINY))
    before = digest(out)
    other = tool.Params(**TINY, seed=7)
    with pytest.raises(ValueError, match=r"seed 0 \(asked 7\).*--overwrite"):
        tool.make(out, other)
    (out / "images" / "extra.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"also holds images/extra\.txt"):
        tool.make(out, other, overwrite=True)
    (out / "images" / "extra.txt").unlink()
    assert digest(out) == before
    assert tool.make(out, other, overwrite=True)
    after = digest(out)
    assert after.keys() == before.keys() and after["images.txt"] == before["images.txt"]
    assert all(after[name] != before[name] for name in after if name.endswith(".jpg"))
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_missing_image_is_noticed(tmp_path):
    tool.make(tmp_path / "set", tool.Params(**TINY))
    next((tmp_path / "set").rglob("*.jpg")).unlink()
    with pytest.raises(ValueError, match=r"lacks images/.*--overwrite"):
        tool.make(tmp_path / "set", tool.Params(**TINY))


def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def stop(task):
        if task[2] == 1:
            raise KeyboardInterrupt
        return real(task)

    real = birds.render_to
    monkeypatch.setattr(birds, "render_to", stop)
    with pytest.raises(KeyboardInterrupt):
        tool.make(tmp_path / "set", tool.Params(**TINY))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--classes", "101"], "classes is 101, expected 2 to 100 (maximum 100)"),
        (["--classes", "1"], "classes is 1, expected 2 to 100"),
        (["--train-per-class", "0"], "train_per_class is 0, expected 1 to 100000"),
        (["--layout", "aircraft", "--train-per-class", "1"], "train_per_class is 1, expected 2 to 100000"),
        (["--test-per-class", "0"], "test_per_class is 0, expected 1 to 100000"),
        (["--size", "20"], "size is 20, expected 32 to 1024"),
        (["--seed", "-1"], "seed is -1, expected 0 to 9223372036854775807"),
        (["--train-per-class", str(2**40)], "train_per_class is 1099511627776, expected 1 to 100000"),
        (["--workers", "0"], "workers is 0, expected 1 to 256"),
        (["--contact-sheet", "birds.jpg"], "--contact-sheet is birds.jpg, expected a name ending in .png"),
        (["--samples", "0"], "--samples is 0, expected 1 to 1000"),
        (["--layout", "dogs"], "argument --layout: invalid choice: 'dogs'"),
        (["--classes", "many"], "argument --classes: invalid int value: 'many'"),
    ],
)
def test_bad_values_give_one_line_and_exit_code_2(tmp_path, capsys, argv, message):
    try:
        code = tool.main([*argv, "--out", str(tmp_path / "set")])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "set").exists()


def test_contact_sheet_has_one_row_per_class(tmp_path, capsys):
    argv = ["--classes", "3", "--train-per-class", "1", "--test-per-class", "1", "--size", "32", "--workers", "1"]
    argv += ["--out", str(tmp_path / "set"), "--contact-sheet", str(tmp_path / "sheet.png"), "--samples", "4"]
    assert tool.main(argv) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (4 * 32, 3 * (32 + 16))
    assert "3 classes x 4 images" in capsys.readouterr().out
