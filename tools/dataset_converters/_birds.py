"""Drawing of small fine-grained birds for ``make_mini_fgvc.py``.

All birds share one body plan. A class is a combination of six local parts (``PARTS``); everything else - pose, scale,
hue, background, light, blur, noise, JPEG quality - is drawn at random for each image, independent of the class.
Lengths inside the bird are in body lengths (the body ellipse is one unit long), angles in degrees, ``x`` to the right
and ``y`` down; colours are RGB in 0..255.
"""

import colorsys
import functools
import io
import itertools

import cv2
import numpy as np
from PIL import Image

PARTS = {
    "crown": ("plain", "black_cap", "red_cap", "white_cap", "black_crest", "red_crest"),
    "beak": ("short_dark", "short_orange", "long_dark", "long_orange", "hooked_dark", "hooked_orange"),
    "wing_bars": ("none", "one_white", "two_white", "two_yellow"),
    "breast": ("plain", "few_spots", "many_spots", "streaks"),
    "eye_ring": ("none", "white"),
    "tail_tip": ("plain", "white"),
}
MAX_CLASSES = 100
SUPERSAMPLE = 3

_NAMES = {
    "crown": ("", "Black_capped", "Red_capped", "White_capped", "Black_crested", "Red_crested"),
    "beak": ("Finch", "Grosbeak", "Wren", "Kingfisher", "Shrike", "Parrot"),
    "wing_bars": ("", "One_barred", "Two_barred", "Gold_barred"),
    "breast": ("", "Spotted", "Speckled", "Streaked"),
    "eye_ring": ("", "Spectacled"),
    "tail_tip": ("", "White_tailed"),
}
_INK = {
    "black": (18, 16, 20),
    "dark": (28, 26, 30),
    "red": (205, 25, 30),
    "white": (246, 246, 240),
    "orange": (250, 160, 25),
    "yellow": (250, 215, 40),
}
_BODY = (0.50, 0.34)
_HEAD = 0.235


@functools.lru_cache(maxsize=1)
def class_table() -> tuple:
    """The parts of all classes, as ``MAX_CLASSES`` tuples of indices into ``PARTS``.

    The list grows like a tree: each new class differs from some earlier one in one part (every second class) or in two,
    and among those the values used least so far are preferred. So any prefix of at least two classes is fine-grained,
    and no single part value gives a class away. Pure integer arithmetic: the table never depends on a seed or library.
    """
    space = np.array(list(itertools.product(*(range(len(v)) for v in PARTS.values()))))
    used = np.zeros((len(PARTS), max(len(v) for v in PARTS.values())), dtype=np.int64)
    sizes = np.array([len(v) for v in PARTS.values()])
    tie = (np.arange(len(space), dtype=np.uint64) * np.uint64(2654435761)) % np.uint64(1 << 32)
    nearest = np.full(len(space), len(PARTS))
    chosen = []
    pick = int(np.argmin(tie[1:])) + 1
    for step in range(MAX_CLASSES):
        if step:
            usable = np.flatnonzero(nearest == (1 if step % 2 else 2))
            # A value used n times out of a fair share of step/size: the scaled sum favours the rare values.
            load = (used[np.arange(len(PARTS)), space[usable]] * sizes).sum(axis=1)
            best = usable[load == load.min()]
            pick = int(best[np.argmin((tie[best] * np.uint64(step + 1)) % np.uint64(1 << 32))])
        chosen.append(tuple(int(v) for v in space[pick]))
        used[np.arange(len(PARTS)), space[pick]] += 1
        nearest = np.minimum(nearest, (space != space[pick]).sum(axis=1))
    return tuple(chosen)


def class_parts(index: int) -> dict:
    """Part name to value name of class ``index`` (0-based); IndexError past ``MAX_CLASSES``."""
    return {part: PARTS[part][v] for part, v in zip(PARTS, class_table()[index])}


def class_name(index: int) -> str:
    """A name without spaces spelling out the parts of class ``index`` (0-based): ``Red_capped_Streaked_Finch``."""
    value = dict(zip(PARTS, class_table()[index]))
    words = [_NAMES[part][value[part]] for part in ("crown", "eye_ring", "wing_bars", "breast", "tail_tip")]
    return "_".join([w for w in words if w] + [_NAMES["beak"][value["beak"]]])


def _rotate(points: np.ndarray, degrees: float, about: tuple = (0.0, 0.0)) -> np.ndarray:
    a = np.deg2rad(degrees)
    matrix = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
    return (np.asarray(points, dtype=float) - about) @ matrix.T + about


def _ellipse(cx: float, cy: float, a: float, b: float, start: float = 0, stop: float = 360) -> np.ndarray:
    t = np.deg2rad(np.linspace(start, stop, 33))
    return np.stack([cx + a * np.cos(t), cy + b * np.sin(t)], axis=1)


def _hsv(h: float, s: float, v: float) -> tuple:
    return tuple(255 * c for c in colorsys.hsv_to_rgb(h % 1.0, min(max(s, 0), 1), min(max(v, 0), 1)))


def _jitter(rng: np.random.Generator, ink: str) -> tuple:
    return tuple(np.clip(np.array(_INK[ink]) + rng.uniform(-14, 14, 3), 0, 255))


def _beak(rng: np.random.Generator, kind: str) -> list:
    shape, ink = kind.split("_")
    colour = _jitter(rng, ink)
    k = rng.uniform(0.9, 1.12)
    if shape == "short":
        outline = [(0.8, -0.32), (0.8 + 0.85 * k, 0.08), (0.75, 0.42)]
    elif shape == "long":
        outline = [(0.85, -0.2), (0.9 + 1.75 * k, 0.12), (0.85, 0.3)]
    else:
        outline = [(0.75, -0.42), (1.25, -0.4), (1.62 * k, -0.1), (1.72 * k, 0.35), (1.6 * k, 0.85), (1.38, 0.42)]
        outline += [(1.15, 0.3), (0.75, 0.45)]
    return [("beak", np.array(outline) * _HEAD, colour, None)]


def _head_items(rng: np.random.Generator, parts: dict, tone: tuple) -> list:
    """Shapes of the head with its centre at the origin, in drawing order: (label, outline, colour, clip label)."""
    r = _HEAD
    items = []
    kind, ink = parts["crown"], parts["crown"].split("_")[0]
    colour = _jitter(rng, ink) if kind != "plain" else tone
    lift = rng.uniform(0.9, 1.15)
    if kind.endswith("crest"):
        spikes = [(0.55, -0.78), (0.15, -1.35), (-0.1, -1.2), (-0.6, -1.75), (-0.72, -1.3), (-1.45, -1.45)]
        spikes += [(-1.2, -0.8), (-0.9, -0.3), (-0.3, -0.55)]
        items.append(("crest", np.array(spikes) * r * lift, colour, None))
    items += _beak(rng, parts["beak"])
    items.append(("head", _ellipse(0, 0, r, r), tone, None))
    if kind.endswith("cap"):
        cap = np.concatenate(
            [_ellipse(0, 0, 1.05 * r, 1.05 * r, 170, 335), [(0.3 * r, -0.42 * r), (-0.4 * r, -0.3 * r)]]
        )
        items.append(("cap", cap, colour, "head"))
    ex, ey = 0.36 * r, -0.08 * r
    if parts["eye_ring"] == "white":
        items.append(("ring", _ellipse(ex, ey, 0.47 * r, 0.47 * r), _jitter(rng, "white"), None))
    items.append(("eye", _ellipse(ex, ey, 0.25 * r, 0.25 * r), (10, 10, 12), None))
    items.append(("glint", _ellipse(ex + 0.07 * r, ey - 0.09 * r, 0.07 * r, 0.07 * r), (235, 235, 235), None))
    return items


def _breast_items(rng: np.random.Generator, kind: str) -> list:
    ink = tuple(np.array((40, 30, 26)) + rng.uniform(-12, 12, 3))
    items = []
    if kind == "streaks":
        for x in np.linspace(0.02, 0.40, 6):
            x, y, half = x + rng.uniform(-0.015, 0.015), rng.uniform(0.06, 0.12), rng.uniform(0.09, 0.13)
            streak = [(x - 0.022, y - half), (x + 0.022, y - half), (x + 0.012, y + half), (x - 0.012, y + half)]
            items.append(("streak", _rotate(streak, rng.uniform(-8, 8), (x, y)), ink, "belly"))
    elif kind != "plain":
        if kind == "few_spots":
            centres, radius = [(0.08, 0.2), (0.24, 0.19), (0.37, 0.1), (0.36, -0.06)], 0.05
        else:
            centres = [(x + 0.05 * (i % 2), y) for i, y in enumerate((-0.1, -0.01, 0.08, 0.17, 0.26))
                       for x in np.arange(-0.05, 0.5, 0.1)]  # fmt: skip
            radius = 0.029
        for x, y in centres:
            x, y = np.array((x, y)) + rng.uniform(-0.018, 0.018, 2)
            a, b = radius * rng.uniform(0.85, 1.15, 2)
            items.append(("spot", _ellipse(x, y, a, b), ink, "belly"))
    return items


def _wing_items(rng: np.random.Generator, kind: str, tone: tuple, angle: float) -> list:
    """Wing with its shoulder at (0.2, -0.1); ``angle`` in degrees lifts the tip (0 is folded along the back)."""
    length, width = rng.uniform(0.74, 0.86), rng.uniform(0.30, 0.36)
    t = np.linspace(0, 1, 17)
    top = np.stack([0.08 - t * length, -0.11 - 0.05 * np.sin(np.pi * t) + 0.14 * t], axis=1)
    low = np.stack([0.08 - t * length, top[:, 1] + width * np.sin(np.pi * t**0.62) ** 0.8], axis=1)
    items = [("wing", np.concatenate([top, low[::-1]]), tone, None)]
    dark = tuple(0.72 * np.array(tone))
    for y in (0.05, 0.11, 0.17):
        feather = [(-0.15, y), (0.08 - length, 0.05), (0.08 - length, 0.06), (-0.15, y + 0.014)]
        items.append(("feather", np.array(feather), dark, "wing"))
    if kind != "none":
        colour = _jitter(rng, kind.split("_")[1])
        for x in (-0.2,) if kind.startswith("one") else (-0.13, -0.33):
            x += rng.uniform(-0.02, 0.02)
            bar = [(x - 0.01, -0.3), (x + 0.085, -0.3), (x + 0.045, 0.4), (x - 0.05, 0.4)]
            items.append(("bar", np.array(bar), colour, "wing"))
    return [(n, _rotate(p, angle, (0.1, -0.08)), c, clip) for n, p, c, clip in items]


def _bird(rng: np.random.Generator, parts: dict) -> list:
    """All shapes of one bird facing right, in drawing order: (label, outline, colour, clip label)."""
    hue, sat, val = rng.uniform(0, 1), rng.uniform(0.10, 0.50), rng.uniform(0.38, 0.70)
    body = _hsv(hue, sat, val)
    belly = _hsv(hue + rng.uniform(-0.06, 0.06), sat * rng.uniform(0.3, 0.7), min(0.92, val + rng.uniform(0.15, 0.3)))
    wing = _hsv(hue + rng.uniform(-0.05, 0.05), sat, val * rng.uniform(0.6, 0.85))
    tail = _hsv(hue + rng.uniform(-0.05, 0.05), sat, val * rng.uniform(0.55, 0.9))
    head = _hsv(hue + rng.uniform(-0.05, 0.05), sat, val * rng.uniform(0.85, 1.1))
    flying = rng.random() < 0.25
    tail_angle, head_angle = rng.uniform(-24, 14), rng.uniform(-28, 24)
    wing_angle = rng.uniform(18, 50) if flying else rng.uniform(-14, 10)

    items = []
    half, spread, length = 0.085, rng.uniform(0.10, 0.17), rng.uniform(0.48, 0.62)
    a, b = np.array((-0.36, 0.0)), np.array((-0.36 - length, 0.04))
    fan = np.array([a + (0, -half), b + (0, -spread), b + (-0.05, 0), b + (0, spread), a + (0, half)])
    items.append(("tail", _rotate(fan, tail_angle, tuple(a)), tail, None))
    if parts["tail_tip"] == "white":
        tip = np.array([b + (0.16, -0.4), b + (-0.2, -0.4), b + (-0.2, 0.4), b + (0.16, 0.4)])
        items.append(("tip", _rotate(tip, tail_angle, tuple(a)), _jitter(rng, "white"), "tail"))
    leg = _hsv(rng.uniform(0.02, 0.12), 0.5, rng.uniform(0.25, 0.7))
    reach = rng.uniform(0.12, 0.22)
    for x in (-0.04, 0.1):
        foot = x + (-0.2 if flying else rng.uniform(-0.04, 0.06))
        y = 0.36 if flying else 0.3 + reach
        items.append(
            ("leg", np.array([(x - 0.02, 0.2), (x + 0.02, 0.2), (foot + 0.02, y), (foot - 0.02, y)]), leg, None)
        )
    pivot = np.array((0.36, -0.2))
    centre = pivot + _rotate([(0.1, -0.2)], head_angle)[0]
    neck = np.concatenate([_ellipse(*centre, 0.85 * _HEAD, 0.85 * _HEAD), _ellipse(0.24, -0.04, 0.24, 0.24)])
    items.append(("neck", cv2.convexHull(neck.astype(np.float32))[:, 0], body, None))
    items.append(("body", _ellipse(0, 0, *_BODY), body, None))
    items.append(("belly", _rotate(_ellipse(0.16, 0.12, 0.42, 0.27), -24, (0.16, 0.12)), belly, "body"))
    items += _breast_items(rng, parts["breast"])
    items += _wing_items(rng, parts["wing_bars"], wing, wing_angle)
    items += [(n, _rotate(p, head_angle) + centre, c, clip) for n, p, c, clip in _head_items(rng, parts, head)]
    return items


def _fill(image: np.ndarray, outline: np.ndarray, colour: tuple) -> None:
    # fillPoly takes fixed-point coordinates: four fractional bits.
    cv2.fillPoly(image, [np.round(np.asarray(outline) * 16).astype(np.int32)], colour, cv2.LINE_AA, 4)


def _paint_bird(items: list, side: int) -> np.ndarray:
    """The shapes (outlines in pixels) on a transparent ``side`` x ``side`` canvas: uint8 RGBA, premultiplied."""
    canvas = np.zeros((side, side, 4), np.uint8)
    masks = {}
    clips = {clip for *_, clip in items if clip}
    for label, outline, colour, clip in items:
        fixed = [np.round(outline * 16).astype(np.int32)]
        rgba = (*(float(round(c)) for c in colour), 255.0)
        if clip is None and label not in clips:
            cv2.fillPoly(canvas, fixed, rgba, cv2.LINE_8, 4)
            continue
        mask = np.zeros((side, side), np.uint8)
        cv2.fillPoly(mask, fixed, 255, cv2.LINE_8, 4)
        if clip is not None:
            cv2.bitwise_and(mask, masks[clip], dst=mask)
        masks[label] = mask
        x, y, w, h = cv2.boundingRect(mask)
        canvas[y : y + h, x : x + w][mask[y : y + h, x : x + w] > 0] = rgba
    return canvas


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A busy uint8 RGB background: gradient, then foliage, grass, bark or bokeh, then blobs in the part colours."""
    kind = rng.choice(["sky", "foliage", "grass", "bark", "bokeh"])
    hues = {"sky": (0.50, 0.64), "foliage": (0.2, 0.42), "grass": (0.14, 0.36), "bark": (0.02, 0.13), "bokeh": (0, 1)}
    low, high = hues[kind]
    ends = [_hsv(rng.uniform(low, high), rng.uniform(0.1, 0.7), rng.uniform(0.25, 0.95)) for _ in range(2)]
    a = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:size, 0:size] / size - 0.5
    t = np.clip(x * np.cos(a) + y * np.sin(a) + 0.5, 0, 1)[..., None]
    image = (np.array(ends[0]) * (1 - t) + np.array(ends[1]) * t).astype(np.uint8)
    for _ in range(rng.integers(6, 26)):
        colour = _hsv(rng.uniform(low, high), rng.uniform(0.1, 0.8), rng.uniform(0.15, 0.95))
        c = rng.uniform(0, size, 2)
        u = rng.uniform(0.04, 0.2) * size
        if kind == "grass":
            shape = np.array([(c[0] - 0.1 * u, size), (c[0] + rng.normal(0, u), c[1]), (c[0] + 0.1 * u + 1, size)])
        elif kind == "bark":
            shape = _rotate([(-size, -0.1 * u), (size, -0.1 * u), (size, 0.3 * u), (-size, 0.3 * u)], a * 57) + c
        elif kind == "foliage":
            half = _ellipse(0, 0, u, 0.4 * u)
            shape = _rotate(half, rng.uniform(0, 360)) + c
        else:
            shape = _ellipse(*c, u, u * rng.uniform(0.4, 1))
        _fill(image, shape, colour)
    # Decoys in the colours of the parts, so that "some red" or "some white" says nothing about the class.
    for _ in range(rng.integers(2, 9)):
        colour = _jitter(rng, str(rng.choice(list(_INK))))
        u = rng.uniform(0.015, 0.06) * size
        shape = _rotate(_ellipse(0, 0, u * rng.uniform(1, 2.5), u), rng.uniform(0, 180)) + rng.uniform(0, size, 2)
        _fill(image, shape, colour)
    return cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 0.02 * size))


def _place(rng: np.random.Generator, items: list, size: int) -> list:
    """Rotates, mirrors, scales and shifts the outlines so that the bird spans 74..97 % of ``size`` pixels."""
    angle, flip = rng.uniform(-28, 28), rng.random() < 0.5
    aspect = rng.uniform(0.9, 1.1)
    moved = []
    for label, outline, colour, clip in items:
        p = _rotate(np.asarray(outline, dtype=float) * (1, aspect), angle)
        moved.append((label, p * (-1, 1) if flip else p, colour, clip))
    # Clipped shapes may reach past the bird on purpose, so only the others say how large it is.
    solid = np.concatenate([p for _, p, _, clip in moved if clip is None])
    low, high = solid.min(axis=0), solid.max(axis=0)
    scale = rng.uniform(0.74, 0.97) * size / (high - low).max()
    shift = rng.uniform(0, 1, 2) * (size - (high - low) * scale) - low * scale
    return [(label, p * scale + shift, colour, clip) for label, p, colour, clip in moved]


def render(seed: int, label: int, index: int, size: int) -> tuple:
    """Draws image ``index`` of class ``label`` (0-based).

    Returns the JPEG bytes of a ``size`` x ``size`` image and the box of the bird as (x, y, width, height) in pixels.
    The result depends on the four arguments alone.
    """
    rng = np.random.default_rng([seed, label, index])
    items = _place(rng, _bird(rng, class_parts(label)), size)
    side = size * SUPERSAMPLE
    big = [(n, p * SUPERSAMPLE, c, clip) for n, p, c, clip in items]
    bird = cv2.resize(_paint_bird(big, side), (size, size), interpolation=cv2.INTER_AREA).astype(np.float32)
    alpha = bird[..., 3:] / 255

    background = _background(rng, size)
    if rng.random() < 0.6:
        feet = np.concatenate([p[2:] for n, p, *_ in items if n == "leg"])
        drop, thick = rng.uniform(-0.1, 0.1) * size, rng.uniform(0.02, 0.07) * size
        y = feet[:, 1].max() + thick / 2
        branch = np.array([(-9, y - drop), (size + 9, y + drop), (size + 9, y + drop + thick), (-9, y - drop + thick)])
        _fill(background, branch, _hsv(rng.uniform(0.03, 0.12), rng.uniform(0.2, 0.6), rng.uniform(0.15, 0.6)))

    ys, xs = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
    a = rng.uniform(0, 2 * np.pi)
    slope = 1 + rng.uniform(0, 0.35) * (xs * np.cos(a) + ys * np.sin(a))
    plumage = cv2.resize(rng.normal(1, 0.05, (size // 4, size // 4)).astype(np.float32), (size, size))
    image = bird[..., :3] * plumage[..., None] + background * (1 - alpha)
    cast = rng.uniform(0.88, 1.12, 3)
    image = image * slope[..., None] * (rng.uniform(0.75, 1.18) * cast).astype(np.float32)
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.2, 0.7) * size / 128)
    image = image + rng.normal(0, rng.uniform(0.5, 7), image.shape)
    image = np.clip(np.round(image), 0, 255).astype(np.uint8)

    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=int(rng.integers(72, 96)), subsampling=0)
    rows, columns = np.flatnonzero(alpha[..., 0].any(axis=1)), np.flatnonzero(alpha[..., 0].any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return out.getvalue(), (x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1)


def render_to(task: tuple) -> tuple:
    """Process-pool entry: ``task`` is (seed, label, index, size, path); writes the JPEG and returns the bird's box."""
    seed, label, index, size, path = task
    cv2.setNumThreads(1)
    data, box = render(seed, label, index, size)
    with open(path, "wb") as file:
        file.write(data)
    return box
