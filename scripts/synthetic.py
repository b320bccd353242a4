"""Face-like drawings of invented people, for the demo and the tests: no real face, no download.

An *identity* is a point in a space of continuous features (`IDENTITY_FEATURES`: head shape, skin, hair, eyes, brows,
nose, mouth, beard, marks). An *image* adds what does not belong to identity (`IMAGE_NUISANCES`: pose, expression,
light, blur, noise, compression; also a background, clothes, and sometimes something that covers part of the face).
Nuisances change the pixels far more than identity does: raw pixels verify poorly, while a network that learns to ignore
them verifies people whom it has never seen.

Random numbers are counted, not streamed: (seed, identity, image) gives the same drawing in any order and any process.

Coordinates: x to the right, y down, z towards the viewer, in pixels of the 112x112 picture, from the head's middle.
Angles are in radians, colours RGB in 0..255.
"""

from __future__ import annotations

import functools
import io
import math
import os
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from utils.errors import UserError

IMAGE_SIZE = 112
OVERSAMPLING = 2  # shapes are drawn twice as large and reduced, for smooth edges
HEAD_DEPTH = 26.0
CAMERA_DISTANCE = 260.0
FACE_CENTER = (56.0, 60.0)  # where the middle of the face lies in an aligned picture


# feature: (lowest, highest); uniform between. Lengths in pixels unless said otherwise.
IDENTITY_FEATURES: dict[str, tuple[float, float]] = {
    "face_width": (26.0, 33.5),
    "temple_width": (0.86, 1.0),  # of face_width, like the next two
    "jaw_width": (0.62, 0.98),
    "chin_width": (0.18, 0.55),
    "chin_y": (36.0, 46.0),
    "skin_tone": (0.0, 1.0),  # 0 light .. 1 dark
    "skin_red": (-1.0, 1.0),
    "ear_size": (5.0, 9.5),
    "ear_out": (0.5, 4.5),
    "hair_tone": (0.0, 1.0),  # along HAIR_COLOURS
    "hair_line": (-44.0, -19.0),  # y of the hairline; above BALD_ABOVE there is none
    "hair_recess": (-9.0, 10.0),  # how much higher the hairline is at the temples
    "hair_part": (-16.0, 16.0),
    "hair_part_height": (0.0, 8.0),
    "hair_volume": (2.0, 10.0),
    "hair_sides": (1.0, 9.0),
    "hair_length": (-12.0, 62.0),  # y where it ends
    "hair_wave": (0.0, 2.6),
    "hair_curl": (0.0, 1.0),
    "eye_x": (11.5, 16.5),
    "eye_y": (-8.0, 0.0),
    "eye_width": (4.8, 7.6),
    "eye_height": (2.0, 4.2),
    "eye_tilt": (-0.22, 0.22),
    "eye_lid": (0.0, 1.0),
    "iris_tone": (0.0, 1.0),  # along IRIS_COLOURS
    "iris_radius": (2.1, 3.0),
    "brow_gap": (5.5, 9.5),
    "brow_width": (6.0, 10.0),
    "brow_thickness": (0.8, 3.2),
    "brow_tilt": (-0.28, 0.28),
    "brow_arch": (0.0, 3.0),
    "nose_tip": (9.0, 16.0),
    "nose_width": (4.0, 8.5),
    "nose_bridge": (1.6, 4.0),
    "mouth_gap": (8.0, 13.0),  # below the tip of the nose
    "mouth_width": (8.0, 14.5),
    "upper_lip": (0.8, 3.0),
    "lower_lip": (1.5, 4.4),
    "lip_red": (0.0, 1.0),
    "mouth_curve": (-1.6, 1.6),
    "beard": (-1.4, 1.0),  # below 0: none
    "moustache": (-1.4, 1.0),
    "cheek_fold": (0.0, 1.0),
    "eye_bag": (0.0, 1.0),
    "freckles": (-2.0, 1.0),
    "mole_x": (-22.0, 22.0),
    "mole_y": (-26.0, 36.0),
    "mole_radius": (-1.5, 1.8),
}


# what changes from one image of a person to the next
IMAGE_NUISANCES: dict[str, tuple[float, float]] = {
    "yaw": (-0.42, 0.42),
    "pitch": (-0.2, 0.2),
    "roll": (-0.17, 0.17),
    "zoom": (0.93, 1.09),
    "shift_x": (-4.0, 4.0),
    "shift_y": (-4.0, 4.0),
    "smile": (-1.0, 2.2),
    "mouth_open": (-4.0, 4.0),
    "brow_raise": (-1.0, 2.0),
    "eye_open": (0.55, 1.15),
    "gaze_x": (-1.6, 1.6),
    "gaze_y": (-0.6, 0.6),
    "hair_ruffle": (0.0, 2.0),
    "light_x": (-1.0, 1.0),
    "light_y": (-1.0, 0.35),
    "ambient": (0.35, 0.8),
    "exposure": (-0.55, 0.5),  # stops, base 2
    "contrast": (0.75, 1.2),
    "warmth": (-0.8, 0.8),
    "tint": (-0.8, 0.8),
    "saturation": (0.55, 1.25),
    "blur": (-0.6, 1.2),  # standard deviation in pixels; below 0.3: none
    "noise": (1.0, 9.0),  # standard deviation, of 255
    "jpeg_quality": (25.0, 92.0),
}
SKIN_COLOURS = ((250, 222, 204), (238, 196, 164), (208, 155, 116), (155, 103, 70), (92, 58, 42))
HAIR_COLOURS = ((26, 23, 24), (58, 38, 28), (104, 66, 38), (150, 72, 34), (206, 164, 96), (190, 186, 184))
IRIS_COLOURS = ((58, 34, 20), (112, 74, 36), (104, 116, 60), (88, 140, 132), (96, 146, 196), (134, 142, 150))
BALD_ABOVE = -40.0
SILHOUETTE = math.nan  # see _Painter
Colour = tuple[int, int, int]
Points = list[tuple[float, float]]


def _sample(ranges: dict[str, tuple[float, float]], rng: np.random.Generator) -> SimpleNamespace:
    values = rng.random(len(ranges)).tolist()
    return SimpleNamespace(**{name: low + (high - low) * u for (name, (low, high)), u in zip(ranges.items(), values)})


def _on_ramp(colours: tuple[Colour, ...], position: float) -> np.ndarray:
    """The colour at `position` in [0, 1] along evenly spaced `colours`: float (3,)."""
    place = position * (len(colours) - 1)
    first = min(int(place), len(colours) - 2)
    return np.array(colours[first]) + (place - first) * (np.array(colours[first + 1]) - colours[first])


def _rgb(colour: np.ndarray) -> Colour:
    red, green, blue = (min(max(int(c), 0), 255) for c in colour.tolist())
    return red, green, blue


@functools.cache
def _spline(k: int, closed: bool, steps: int = 6) -> np.ndarray:
    """The matrix (k * steps, k) that takes k points to a Catmull-Rom curve through them."""
    eye = np.eye(k)
    before, after, later = (np.roll(eye, shift, axis=0) for shift in (1, -1, -2))
    if not closed:
        before[0], after[-1], later[-1], later[-2] = eye[0], eye[-1], eye[-1], eye[-1]
    t = np.linspace(0.0, 1.0, steps, endpoint=False)[:, None, None]
    curve = 0.5 * (2 * eye + (after - before) * t + (2 * before - 5 * eye + 4 * after - later) * t**2
                   + (3 * eye - before - 3 * after + later) * t**3)
    return curve.transpose(1, 0, 2).reshape(-1, k)


def _curve(points: Points | np.ndarray, closed: bool = True) -> np.ndarray:
    """A smooth curve through `points` (k, 2): (6 * k, 2)."""
    return _spline(len(points), closed) @ np.asarray(points, dtype=float)


def _mirrored(half: Points) -> Points:
    """A symmetric closed outline from its right half, listed from top to bottom, both ends on the axis."""
    return half + [(-x, y) for x, y in half[-2:0:-1]]


def _turn(angle: float) -> np.ndarray:
    """Rows (x, y) times this matrix are turned by `angle`, clockwise in the picture."""
    return np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])


_CIRCLE = np.stack([np.cos(np.arange(16) * math.pi / 8), np.sin(np.arange(16) * math.pi / 8)], axis=1)


def _ellipse(x: float, y: float, rx: float, ry: float, tilt: float = 0.0) -> np.ndarray:
    return (_CIRCLE * (rx, ry)) @ _turn(tilt) + (x, y)


class _Painter:
    """Collects shapes in head coordinates, then projects all their points at once and draws them in order.

    A point lies on the front of the head, `lift` pixels above its surface, or with the lift SILHOUETTE on the plane
    through the head's middle. Besides the picture there are masks for hair, for soft shadows, and for whiskers.
    """

    def __init__(self) -> None:
        self.points: list[np.ndarray] = []
        self.lifts: list[np.ndarray] = []
        self.strokes: list[tuple[dict[str, Colour | int], float]] = []  # value per layer; line width, 0: a filled shape

    def _add(
        self, points: Points | np.ndarray, lift: float | np.ndarray, width: float = 0.0, **values: Colour | int
    ) -> None:
        self.points.append(np.asarray(points, dtype=float))
        self.lifts.append(np.full(len(points), lift))
        self.strokes.append((values, width))

    def fill(self, points: Points | np.ndarray, colour: Colour, lift: float | np.ndarray = 0.0) -> None:
        self._add(points, lift, picture=colour)

    def line(self, points: Points | np.ndarray, colour: Colour, width: float, lift: float | np.ndarray = 0.0) -> None:
        self._add(points, lift, width, picture=colour)

    def cover(self, points: Points | np.ndarray, colour: Colour, lift: float | np.ndarray = SILHOUETTE) -> None:
        """A shape that hides everything behind it, hair and shadows included."""
        self._add(points, lift, picture=colour, hair=0, shadow=0, whiskers=0)

    def hair(self, points: Points | np.ndarray, colour: Colour, lift: float | np.ndarray = SILHOUETTE) -> None:
        self._add(points, lift, picture=colour, hair=255, whiskers=0)

    def shade(self, points: Points | np.ndarray, strength: float, lift: float | np.ndarray = 0.0) -> None:
        self._add(points, lift, shadow=int(255 * strength))

    def whiskers(self, points: Points | np.ndarray, density: float) -> None:
        self._add(points, 0.0, whiskers=int(255 * density))

    def render(self, background: Image.Image, face: SimpleNamespace, view: SimpleNamespace) -> dict[str, Image.Image]:
        """Draw on `background`; returns the layers picture (RGB) and hair, shadow, whiskers (L), all oversampled."""
        masks = {name: Image.new("L", background.size) for name in ("hair", "shadow", "whiskers")}
        layers = {"picture": background, **masks}
        draws = {name: ImageDraw.Draw(layer) for name, layer in layers.items()}
        lengths = [len(points) for points in self.points]
        projected = _project(np.concatenate(self.points), np.concatenate(self.lifts), face, view)
        flat = (projected * OVERSAMPLING).ravel().tolist()
        end = 0
        for length, (values, width) in zip(lengths, self.strokes):
            start, end = end, end + 2 * length
            for name, value in values.items():
                if width:
                    pen = max(1, round(width * OVERSAMPLING))
                    draws[name].line(flat[start:end], fill=value, width=pen, joint="curve")
                else:
                    draws[name].polygon(flat[start:end], fill=value)
        return layers


def _project(points: np.ndarray, lifts: np.ndarray, face: SimpleNamespace, view: SimpleNamespace) -> np.ndarray:
    """Head (k, 2), `lifts` (k,) -> picture (k, 2): rotation, weak perspective, zoom and shift."""
    half_width, half_height = 1.06 * face.face_width, 50.0
    # A detector centers the picture on the face, not on the skull.
    x, y = np.concatenate([points, [(0.0, 6.0)]]).T
    lifts = np.append(lifts, 0.0)
    flat = np.isnan(lifts)
    depth = HEAD_DEPTH * np.sqrt(np.clip(1.0 - (x / half_width) ** 2 - (y / half_height) ** 2, 0.0, 1.0))
    z = np.where(flat, 0.0, depth + lifts)
    # the silhouette of an ellipsoid does not narrow as its face turns away
    x = np.where(flat, x * math.hypot(1.0, 1.25 * HEAD_DEPTH / half_width * math.tan(view.yaw)), x)

    x, z = x * math.cos(view.yaw) + z * math.sin(view.yaw), z * math.cos(view.yaw) - x * math.sin(view.yaw)
    y, z = y * math.cos(view.pitch) - z * math.sin(view.pitch), z * math.cos(view.pitch) + y * math.sin(view.pitch)
    picture = np.stack([x, y], axis=1) @ _turn(view.roll) * (view.zoom / (1.0 - z / CAMERA_DISTANCE))[:, None]
    return picture[:-1] - picture[-1] + (FACE_CENTER[0] + view.shift_x, FACE_CENTER[1] + view.shift_y)


def _background(rng: np.random.Generator) -> Image.Image:
    """A gradient of colours, and a few large shapes out of focus."""
    size = IMAGE_SIZE * OVERSAMPLING
    corners = Image.fromarray(rng.integers(20, 236, (2, 2, 3), dtype=np.uint8))
    picture = corners.resize((28, 28), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(0, 6)):
        x, y = rng.uniform(-4, 28, 2).tolist()
        w, h = rng.uniform(3, 16, 2).tolist()
        colour = tuple(rng.integers(10, 246, 3).tolist())
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)((x, y, x + w, y + h), fill=colour)
    blurred = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.4, 2.0))))
    return blurred.resize((size, size), Image.Resampling.BILINEAR)


def _draw_hair_behind(paint: _Painter, face: SimpleNamespace, view: SimpleNamespace, rng: np.random.Generator) -> None:
    if face.hair_line < BALD_ABOVE:
        return
    side, top = face.face_width + face.hair_sides * 0.8, -47.0 - face.hair_volume
    end = max(face.hair_length, -10.0)
    half = [(0.0, top), (side * 0.66, top + 5), (side, -26.0), (side + 1, -10.0)]
    half += [(side + 1 + 0.06 * (y + 10), y) for y in np.arange(4.0, end, 14.0)]
    half += [(side * 0.75, end + 4), (0.0, min(end, 20.0))]
    shape = np.array(_mirrored(half))
    shape[1:, 0] += rng.normal(0, 0.25 + 0.35 * face.hair_wave + 0.25 * view.hair_ruffle, len(shape) - 1)
    paint.hair(_curve(shape), _rgb(face.hair * 0.72))


def _draw_hair_in_front(
    paint: _Painter, face: SimpleNamespace, view: SimpleNamespace, rng: np.random.Generator
) -> None:
    if face.hair_line < BALD_ABOVE:
        return
    side, top = face.face_width + 0.5 + face.hair_sides * 0.45, -47.0 - face.hair_volume
    temple, sideburn = face.hair_line - face.hair_recess, min(max(face.hair_length, -14.0), 8.0)
    above = [(-side, sideburn), (-side, -14.0), (-side * 0.93, -28.0), (-side * 0.6, top + 6), (0.0, top),
             (side * 0.6, top + 6), (side * 0.93, -28.0), (side, -14.0), (side, sideburn)]
    inner, outer, ends = 0.86 * face.face_width, 0.74 * face.face_width, 0.25 * temple + 0.75 * min(sideburn, -8.0)
    part = face.hair_part
    below = [(inner, ends), (outer, temple), (part + 9, face.hair_line + 0.5),
             (part, face.hair_line - face.hair_part_height), (part - 7, face.hair_line), (-outer, temple),
             (-inner, ends)]
    jitter = rng.normal(0, 0.35 * face.hair_wave + 0.3 * view.hair_ruffle, len(below)).tolist()
    below = [(x, max(y + j, -45.0)) for (x, y), j in zip(below, jitter)]
    crown, hairline = _curve(above, closed=False), _curve(below, closed=False)
    lifts = np.r_[np.full(len(crown), SILHOUETTE), np.zeros(len(hairline))]
    paint.hair(np.concatenate([crown, hairline]), _rgb(face.hair), lifts)


def _draw_body(paint: _Painter, face: SimpleNamespace, rng: np.random.Generator) -> None:
    neck = 0.62 * face.face_width
    shoulder, collar = rng.uniform(38, 60), rng.uniform(0, 9)
    top = face.chin_y + rng.uniform(6, 12)
    paint.cover([(-neck, 10), (neck, 10), (neck * 1.05, top + 8), (-neck * 1.05, top + 8)], _rgb(face.skin * 0.78))
    cloth = _mirrored([(0.0, top + collar), (neck * 0.8, top), (shoulder, top + 9), (shoulder + 8, 120), (0.0, 120)])
    paint.cover(cloth, _rgb(rng.uniform(15, 240, 3)))


def _draw_head(paint: _Painter, face: SimpleNamespace) -> None:
    width, chin, size = face.face_width, face.chin_y, face.ear_size
    for side in (-1, 1):
        x, tilt = side * (width * 0.97 + face.ear_out), side * 0.15
        paint.cover(_ellipse(x, 1.0, size * 0.5, size, tilt), _rgb(face.skin * 0.9))
        paint.fill(_ellipse(x, 1.0, size * 0.22, size * 0.6, tilt), _rgb(face.skin * 0.72), SILHOUETTE)
    head = _mirrored([
        (0.0, -47.0), (width * 0.62, -43.0), (width * face.temple_width, -24.0), (width, 0.0),
        (width * (0.42 + 0.52 * face.jaw_width), chin * 0.48), (width * 0.78 * face.jaw_width, chin * 0.76),
        (width * face.chin_width, chin * 0.97), (0.0, chin),
    ])
    paint.cover(_curve(head), _rgb(face.skin))


def _draw_beard(paint: _Painter, face: SimpleNamespace) -> None:
    mouth, width, w = face.mouth_y, face.face_width * 0.86, face.mouth_width
    if face.beard > 0:
        shape = [(0.0, mouth + 4), (w + 2.5, mouth - 2), (width * 0.8, mouth - 8), (width, 4.0),
                 (width * 0.95 * face.jaw_width + 2, face.chin_y * 0.76), (width * face.chin_width + 1, face.chin_y),
                 (0.0, face.chin_y + 2)]
        paint.whiskers(_mirrored(shape), 0.35 + 0.6 * face.beard)
    if face.moustache > 0:
        shape = [(0.0, face.nose_tip + 3), (w * 0.8, mouth - 3), (w + 2, mouth + 1), (0.0, mouth - 2.5)]
        paint.whiskers(_mirrored(shape), 0.35 + 0.6 * face.moustache)


def _draw_nose(paint: _Painter, face: SimpleNamespace, view: SimpleNamespace) -> None:
    tip, w, bridge, skin = face.nose_tip, face.nose_width, face.nose_bridge, face.skin
    dark = -1 if view.light_x > 0 else 1  # the side away from the light
    flank = _curve([(dark * bridge * 0.4, face.eye_y - 3), (dark * bridge * 1.3, tip * 0.35),
                    (dark * w * 0.95, tip - 1), (dark * 0.6, tip)])
    paint.shade(flank, 0.30 + 0.30 * abs(view.light_x), lift=np.clip((flank[:, 1] - face.eye_y) * 0.4, 0, 6))
    paint.shade(_ellipse(0, tip + 2.2, w * 1.05, 2.0), 0.6, lift=3.0)
    ridge = _curve([(-bridge * 0.3, -2), (bridge * 0.3, -2), (bridge * 0.55, tip - 2), (-bridge * 0.55, tip - 2)])
    paint.fill(ridge, _rgb(skin * 1.05), lift=np.clip((ridge[:, 1] - face.eye_y) * 0.5, 0, 9))
    paint.fill(_ellipse(0, tip - 1.5, w * 0.45, 2.6), _rgb(skin * 1.05), lift=9.0)
    for side in (-1, 1):
        paint.fill(_ellipse(side * w * 0.5, tip + 0.9, w * 0.18 + 0.4, 0.9, side * 0.3), _rgb(skin * 0.36), lift=6.0)
        wing = [(w * 0.76, tip - 3.6), (w, tip - 1.2), (w * 0.9, tip + 0.8), (w * 0.6, tip + 1.4)]
        paint.line(np.array(wing) * (side, 1), _rgb(skin * 0.58), 0.9, lift=4.0)


def _draw_mouth(paint: _Painter, face: SimpleNamespace, view: SimpleNamespace) -> None:
    y, opened, w = face.mouth_y, max(view.mouth_open, 0.0), face.mouth_width * (1 + 0.07 * view.smile)
    lip = face.skin * (0.86, 0.62, 0.62) * (1 - 0.3 * face.lip_red) + np.array([48, 10, 14]) * face.lip_red
    corner = y - face.mouth_curve - 1.1 * view.smile
    t = np.linspace(-1.0, 1.0, 13)
    arc, there_and_back = 1 - t**2, np.r_[t, t[::-1]] * w
    rest = corner + (y - corner) * arc  # the line between closed lips
    bow = 1 - 0.35 * np.exp(-((t / 0.22) ** 2))  # the dip in the middle of the upper lip
    top = rest - face.upper_lip * bow * arc**0.7 - 0.2 * opened * arc
    bottom = rest + face.lower_lip * arc**0.8 + opened * arc

    def between(upper: np.ndarray, lower: np.ndarray, narrowing: float = 1.0) -> np.ndarray:
        return np.stack([there_and_back * narrowing, np.r_[upper, lower[::-1]]], axis=1)

    for side in (-1, 1):  # the fold from nose to mouth
        fold = _curve([(side * (face.nose_width + 1), face.nose_tip - 2), (side * (w + 2.5), corner - 5),
                       (side * (w + 3.0), corner + 2)], closed=False)
        paint.shade(np.concatenate([fold, fold[::-1] + (side * 1.8, 0.6)]),
                    0.35 * face.cheek_fold + 0.12 * max(view.smile, 0.0))
    paint.fill(between(top, rest), _rgb(lip * 0.9))
    paint.fill(between(rest, bottom), _rgb(lip * 1.08))
    if opened > 0.6:
        paint.fill(between(rest - 0.1 * opened * arc, rest + opened * arc, 0.9), (70, 22, 26))
        paint.fill(between(rest, rest + 0.5 * opened * arc, 0.76), (232, 228, 220))
    else:
        paint.line(np.stack([t * w, rest], axis=1), _rgb(lip * 0.45), 0.6)
    paint.shade(_ellipse(0, y + face.lower_lip + opened + 2.4, w * 0.55, 1.5), 0.35)


def _draw_eyes(paint: _Painter, face: SimpleNamespace, view: SimpleNamespace) -> None:
    skin, w, height = face.skin, face.eye_width, face.eye_height * view.eye_open
    iris = _rgb(_on_ramp(IRIS_COLOURS, face.iris_tone))
    round_height = min(face.iris_radius, height * 1.05)
    t = np.linspace(-1.0, 1.0, 9)
    upper = np.stack([t * w, -height * (1 - t**2)], axis=1)
    lower = np.stack([t * w, 0.72 * height * (1 - t**2)], axis=1)
    thickness = face.brow_thickness * (0.5 + 0.5 * np.sqrt(1 - 0.75 * np.clip(t + 0.2, -1, 1) ** 2))
    brow_colour = _rgb(0.55 * face.hair + 0.12 * skin)
    for side in (-1, 1):
        x, y, tilt = side * face.eye_x, face.eye_y, side * face.eye_tilt
        paint.shade(_ellipse(x, y - 1.5, w * 1.25, height + 3.2, tilt), 0.20 + 0.22 * face.eye_lid)
        paint.shade(_ellipse(x, y + height + 2.4, w * 0.8, 1.4, tilt), 0.5 * face.eye_bag)
        lid = upper @ _turn(tilt) + (x, y)
        paint.fill(np.concatenate([lid, (lower @ _turn(tilt) + (x, y))[::-1]]), (238, 234, 230))
        gaze_x, gaze_y = x + view.gaze_x, y - 0.15 * height + view.gaze_y
        paint.fill(_ellipse(gaze_x, gaze_y, face.iris_radius, round_height), iris)
        paint.fill(_ellipse(gaze_x, gaze_y, face.iris_radius * 0.45, round_height * 0.45), (14, 12, 12))
        paint.fill(_ellipse(gaze_x + 0.7, gaze_y - 0.8, 0.5, 0.5), (250, 250, 250))
        paint.line(lid, _rgb(skin * 0.28), 0.8 + 0.7 * face.eye_lid)
        paint.line(lid - (0.0, 1.0 + 1.4 * face.eye_lid), _rgb(skin * 0.72), 0.5)

        brow = y - face.brow_gap - view.brow_raise + t * face.brow_tilt * face.brow_width - face.brow_arch * (1 - t**2)
        along = x + side * t * face.brow_width
        paint.fill(np.stack([np.r_[along, along[::-1]], np.r_[brow, (brow + thickness)[::-1]]], axis=1), brow_colour)


def _draw_marks(paint: _Painter, face: SimpleNamespace) -> None:
    if face.freckles > 0:
        for x, y in face.freckle_places[: int(4 + 20 * face.freckles)]:
            paint.fill(_ellipse(x, y, 0.8, 0.8), _rgb(face.skin * (0.80, 0.68, 0.6)))
    if face.mole_radius > 0.4:
        paint.fill(_ellipse(face.mole_x, face.mole_y, face.mole_radius, face.mole_radius), _rgb(face.skin * 0.35))


def _draw_occlusion(paint: _Painter, face: SimpleNamespace, rng: np.random.Generator) -> None:
    """Cover part of the face in about one image of three: glasses, dark glasses, a cap, a bar or a hand."""
    kind, colour = rng.random(), _rgb(rng.uniform(10, 200, 3))
    if kind < 0.13:
        frame, w, h = _rgb(rng.uniform(5, 70, 3)), rng.uniform(8, 11), rng.uniform(5, 8)
        dark = rng.random() < 0.6
        for side in (-1, 1):
            rim = _ellipse(side * max(face.eye_x, w + 1), face.eye_y + 1, w, h)
            if dark:
                paint.cover(rim, frame, 3.0)
            else:
                paint.line(np.concatenate([rim, rim[:1]]), frame, 1.0, lift=3.0)
        paint.line([(-5.0, face.eye_y), (5.0, face.eye_y)], frame, 1.2, lift=6.0)
    elif kind < 0.20:
        brim, side = rng.uniform(-32, -20), face.face_width + 3
        cap = _mirrored([(0.0, -56.0), (side * 0.7, -51.0), (side, -32.0), (side * 1.02, brim + 4), (0.0, brim)])
        paint.cover(_curve(cap), colour)
    elif kind < 0.27:
        thick = rng.uniform(5, 11)
        bar = np.array([(-110, -thick), (110, -thick), (110, thick), (-110, thick)])
        paint.cover(bar @ _turn(rng.uniform(-0.6, 0.6)) + (0.0, rng.uniform(-34, 46)), colour)
    elif kind < 0.34:
        skin, side = _on_ramp(SKIN_COLOURS, rng.random()) * 0.85, rng.choice((-1, 1))
        x, y, lean = side * rng.uniform(20, 36), rng.uniform(14, 40), side * rng.uniform(0.1, 0.8)
        for finger in (-1.5, -0.5, 0.5, 1.5):
            reach, tilt = 15.0 - 1.5 * abs(finger), math.pi / 2 - lean + 0.16 * finger
            place = (x + 6.0 * finger - math.cos(tilt) * reach, y - math.sin(tilt) * reach)
            paint.cover(_ellipse(*place, reach, 3.4, tilt), _rgb(skin * (0.94 + 0.04 * finger)))
        paint.cover(_ellipse(x, y + 4, 14, 12), _rgb(skin))


def _texture(layers: dict[str, Image.Image], face: SimpleNamespace, rng: np.random.Generator) -> np.ndarray:
    """Flat colours, then soft shadows, whiskers and strands of hair on them: float32 (112, 112, 3)."""
    def mask(name: str, blur: float = 0.0) -> np.ndarray:
        small = layers[name].reduce(OVERSAMPLING)
        if blur:
            small = small.filter(ImageFilter.GaussianBlur(blur))
        return np.asarray(small, dtype=np.float32)[..., None] * np.float32(1 / 255)

    picture = np.asarray(layers["picture"].reduce(OVERSAMPLING), dtype=np.float32) * (1.0 - 0.75 * mask("shadow", 1.5))
    if face.beard > 0 or face.moustache > 0:
        grain = rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE, 1), dtype=np.float32)
        density = np.clip(mask("whiskers", 2.0) * (0.85 + 0.25 * grain), 0, 1)
        picture += (0.8 * face.hair.astype(np.float32) - picture) * density
    # straight hair: long thin strands; curly hair: grains
    coarse = Image.fromarray(rng.standard_normal((int(7 + 45 * face.hair_curl), 90), dtype=np.float32))
    strands = np.asarray(coarse.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))[..., None]
    return picture * (1.0 + 0.17 * mask("hair") * strands)


def _light(picture: np.ndarray, face: SimpleNamespace, view: SimpleNamespace) -> np.ndarray:
    """Lambert's law on an ellipsoid in the place of the head, then the camera's colours: float32 (112, 112, 3)."""
    middle = _project(np.zeros((1, 2)), np.array([SILHOUETTE]), face, view)[0].astype(np.float32)
    axis = np.arange(IMAGE_SIZE, dtype=np.float32)
    nx = np.clip((axis[None, :] - middle[0]) / (1.25 * face.face_width), -1, 1)
    ny = np.clip((axis[:, None] - middle[1]) / 58.0, -1, 1)
    nz = np.sqrt(np.clip(1.0 - nx**2 - ny**2, 0.04, 1.0))
    towards = (view.light_x, view.light_y, 0.75)
    length = math.hypot(*towards)
    lambert = np.clip((nx * towards[0] + ny * towards[1] + nz * towards[2]) / length, 0.0, 1.0)
    shade = (view.ambient + (1.0 - view.ambient) * 1.25 * lambert) * 2.0**view.exposure
    cast = np.array([1 + 0.20 * view.warmth, 1 + 0.10 * view.tint, 1 - 0.22 * view.warmth], dtype=np.float32)
    picture = picture * (shade[..., None] * cast)
    gray = picture.mean(axis=2, keepdims=True)
    picture = gray + (picture - gray) * view.saturation
    picture = 118.0 + (picture - 118.0) * view.contrast
    # a film's shoulder instead of a hard cut at white
    return np.where(picture > 200.0, 255.0 - 55.0 * np.exp((200.0 - picture) / 55.0), picture)


def _degrade(picture: np.ndarray, view: SimpleNamespace, rng: np.random.Generator) -> Image.Image:
    """Blur, sensor noise and JPEG compression: float (112, 112, 3) -> the final picture."""
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    if view.blur > 0.3:
        image = image.filter(ImageFilter.GaussianBlur(view.blur))
    noise = rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32) * view.noise
    image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    compressed = io.BytesIO()
    image.save(compressed, "JPEG", quality=int(view.jpeg_quality))
    return Image.open(compressed).convert("RGB")


@functools.lru_cache(maxsize=256)
def _face(identity: int, seed: int) -> SimpleNamespace:
    """The features of a person, and what is derived from them. Cached: callers must not change the result."""
    rng = np.random.default_rng((seed, 0, identity))
    face = _sample(IDENTITY_FEATURES, rng)
    face.skin = _on_ramp(SKIN_COLOURS, face.skin_tone) * (1 + 0.04 * face.skin_red, 1.0, 1 - 0.05 * face.skin_red)
    face.hair = _on_ramp(HAIR_COLOURS, face.hair_tone)
    face.mouth_y = min(face.nose_tip + face.mouth_gap, face.chin_y - 8)
    face.freckle_places = rng.uniform((-20, -4), (20, 14), (24, 2)).tolist()
    return face


def draw_face(identity: int, image: int, seed: int = 0) -> Image.Image:
    """Picture number `image` of person number `identity`: 112x112 RGB, a function of (seed, identity, image) only."""
    face = _face(identity, seed)
    rng = np.random.default_rng((seed, 1, identity, image))
    view = _sample(IMAGE_NUISANCES, rng)

    paint = _Painter()
    _draw_hair_behind(paint, face, view, rng)
    _draw_body(paint, face, rng)
    _draw_head(paint, face)
    _draw_beard(paint, face)
    _draw_nose(paint, face, view)
    _draw_mouth(paint, face, view)
    _draw_eyes(paint, face, view)
    _draw_marks(paint, face)
    _draw_hair_in_front(paint, face, view, rng)
    _draw_occlusion(paint, face, rng)
    layers = paint.render(_background(rng), face, view)
    return _degrade(_light(_texture(layers, face, rng), face, view), view, rng)


def _write_images(directory: Path, images: list[tuple[int, int]], seed: int) -> None:
    for identity, image in images:
        path = directory / image_name(identity, image)
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_face(identity, image, seed).save(path, quality=95)


def _write_all(directory: Path, images: list[tuple[int, int]], seed: int) -> None:
    """Write `images`, in parallel on all processor cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores == 1 or len(images) < 200:  # fewer images than starting processes is worth
        _write_images(directory, images, seed)
        return
    chunks = [images[start:start + 50] for start in range(0, len(images), 50)]
    with ProcessPoolExecutor(min(cores, len(chunks))) as pool:
        for _ in pool.map(_write_images, repeat(directory), chunks, repeat(seed)):
            pass


def image_name(identity: int, image: int) -> str:
    """A picture's path below its set's directory, for example `000017/003.jpg`."""
    return f"{identity:06d}/{image:03d}.jpg"


def write_identity_set(
    directory: str | Path, identities: int, images_per_identity: int, seed: int = 0, first_identity: int = 0
) -> None:
    """Write `directory/<identity>/<image>.jpg` for the identities first_identity .. first_identity + identities - 1."""
    everyone = range(first_identity, first_identity + identities)
    images = [(identity, image) for identity in everyone for image in range(images_per_identity)]
    _write_all(Path(directory), images, seed)


def sample_pairs(
    pairs: int, identities: int, images_per_identity: int, seed: int = 0
) -> list[tuple[tuple[int, int], tuple[int, int], int]]:
    """`pairs` different pairs ((identity, image), (identity, image), same), alternately of one person and of two.

    Identities count from 0. Raises UserError if there are not that many pairs.
    """
    same, different = (pairs + 1) // 2, pairs // 2
    per_identity = images_per_identity * (images_per_identity - 1) // 2
    most_different = identities * (identities - 1) // 2 * images_per_identity**2
    if pairs < 2 or same > identities * per_identity or different > most_different:
        raise UserError(
            f"{pairs} pairs asked for: {identities} identities of {images_per_identity} images have only "
            f"{identities * per_identity} pairs of one person and {most_different} of two, and half of the pairs, at "
            "least one, must be of each kind; give more identities or images, or another number of pairs"
        )
    rng = np.random.default_rng((seed, 2))
    # Dicts keep the order and drop what was drawn before.
    of_one: dict[tuple[tuple[int, int], tuple[int, int]], int] = {}
    of_two: dict[tuple[tuple[int, int], tuple[int, int]], int] = {}
    while len(of_one) < same:
        identity = int(rng.integers(identities))
        first, second = sorted(rng.choice(images_per_identity, 2, replace=False).tolist())
        of_one[(identity, first), (identity, second)] = 1
    while len(of_two) < different:
        one, other = sorted(rng.choice(identities, 2, replace=False).tolist())
        first, second = rng.integers(images_per_identity, size=2).tolist()
        of_two[(one, first), (other, second)] = 0
    mixed = [pair for pair_of_pairs in zip(of_one.items(), of_two.items()) for pair in pair_of_pairs]
    mixed += list(of_one.items())[len(of_two):]
    return [(one, other, label) for (one, other), label in mixed]


def write_pairs(
    directory: str | Path, pairs: int, identities: int, images_per_identity: int, seed: int = 0, first_identity: int = 0
) -> None:
    """Write `directory/pair.list` (lines `path1 path2 0|1`, 1: the same person) and the images it names below `imgs/`.

    The people are first_identity .. first_identity + identities - 1. Raises UserError as `sample_pairs` does.
    """
    directory = Path(directory)
    chosen = [
        ((one + first_identity, first), (other + first_identity, second), label)
        for (one, first), (other, second), label in sample_pairs(pairs, identities, images_per_identity, seed)
    ]
    _write_all(directory / "imgs", sorted({image for one, other, _ in chosen for image in (one, other)}), seed)
    lines = [f"{image_name(*one)} {image_name(*other)} {label}\n" for one, other, label in chosen]
    (directory / "pair.list").write_text("".join(lines))
