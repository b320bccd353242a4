"""Face-like drawings of invented people, for the demo and the tests: no real face, no download.

An *identity* is a point in a space of continuous features (`IDENTITY_FEATURES`). An *image* adds what does not belong
to the identity: pose, expression, light, blur, noise and compression (`IMAGE_NUISANCES`), a background, clothes, and
sometimes something that covers part of the face. Nuisances change the pixels far more than the identity does: raw
pixels verify poorly, while a network that learns to ignore nuisances verifies people whom it has never seen.

The random numbers depend on (seed, identity, image) only, so any process draws the same picture, in any order.

Coordinates: x to the right, y down, z towards the viewer, in pixels of the 112x112 picture, from the head's middle.
Angles are in radians, colours RGB in 0..255.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

IMAGE_SIZE = 112
OVERSAMPLING = 2  # shapes are drawn twice as large and reduced, for smooth edges
HEAD_DEPTH, CAMERA_DISTANCE = 26.0, 260.0
FACE_CENTER = (56.0, 60.0)
SILHOUETTE = math.nan  # as the lift of a point: see _Canvas.draw

# feature: (lowest, highest); uniform between. Lengths in pixels unless said otherwise.
IDENTITY_FEATURES = {
    # jaw_width is a part of face_width; tones are places along SKIN_COLOURS, HAIR_COLOURS and IRIS_COLOURS.
    "face_width": (26.0, 33.5), "jaw_width": (0.62, 0.98), "chin_y": (36.0, 46.0), "ear_size": (5.0, 9.5),
    "skin_tone": (0.0, 1.0), "hair_tone": (0.0, 1.0), "iris_tone": (0.0, 1.0),
    # The hairline is hair_recess higher at the temples than in the middle.
    "hair_line": (-42.0, -19.0), "hair_recess": (-9.0, 10.0), "hair_volume": (1.0, 10.0), "hair_length": (-12.0, 62.0),
    "eye_x": (11.5, 16.5), "eye_y": (-8.0, 0.0), "eye_width": (4.8, 7.6), "eye_height": (2.0, 4.2),
    "eye_tilt": (-0.22, 0.22),
    "brow_gap": (5.5, 9.5), "brow_width": (6.0, 10.0), "brow_thickness": (0.8, 3.2), "brow_tilt": (-0.28, 0.28),
    "brow_arch": (0.0, 3.0),
    "nose_tip": (9.0, 16.0), "nose_width": (4.0, 8.5),
    # mouth_gap: below the tip of the nose. beard: none below 0.
    "mouth_gap": (8.0, 13.0), "mouth_width": (8.0, 14.5), "upper_lip": (0.8, 3.0), "lower_lip": (1.5, 4.4),
    "lip_red": (0.0, 1.0), "beard": (-1.4, 1.0),
}
# what changes from one image of a person to the next
IMAGE_NUISANCES = {
    "yaw": (-0.42, 0.42), "pitch": (-0.2, 0.2), "roll": (-0.17, 0.17),
    "zoom": (0.93, 1.09), "shift_x": (-4.0, 4.0), "shift_y": (-4.0, 4.0),
    "smile": (-1.0, 2.2), "mouth_open": (-4.0, 4.0), "brow_raise": (-1.0, 2.0), "eye_open": (0.55, 1.15),
    "gaze_x": (-1.6, 1.6),
    # exposure in stops, base 2
    "light_x": (-1.0, 1.0), "light_y": (-1.0, 0.35), "ambient": (0.35, 0.8), "exposure": (-0.55, 0.5),
    "warmth": (-0.8, 0.8), "tint": (-0.8, 0.8), "saturation": (0.55, 1.25),
    # standard deviations: of the blur in pixels, of the noise in values up to 255
    "blur": (0.0, 1.2), "noise": (1.0, 9.0), "jpeg_quality": (25.0, 92.0),
}
SKIN_COLOURS = np.array([(250, 222, 204), (238, 196, 164), (208, 155, 116), (155, 103, 70), (92, 58, 42)])
HAIR_COLOURS = np.array([(26, 23, 24), (58, 38, 28), (104, 66, 38), (150, 72, 34), (206, 164, 96), (190, 186, 184)])
IRIS_COLOURS = np.array([(58, 34, 20), (112, 74, 36), (104, 116, 60), (88, 140, 132), (96, 146, 196), (134, 142, 150)])


def draw_face(identity: int, image: int, seed: int = 0) -> Image.Image:
    """Picture number `image` of person number `identity`: 112x112 RGB, a function of (seed, identity, image) only."""
    face, view, canvas, rng = _pose(identity, image, seed)
    _draw_head(canvas, face, rng)
    _draw_shading(canvas, face, view)
    canvas.soften()
    _draw_nose(canvas, face)
    _draw_mouth(canvas, face, view)
    _draw_eyes(canvas, face, view)
    _draw_fringe(canvas, face)
    _draw_occlusion(canvas, face, rng)
    return _photograph(canvas, view, rng)


def draw_photo(identity: int, image: int, seed: int = 0) -> tuple[Image.Image, np.ndarray]:
    """The picture of draw_face turned, enlarged and somewhere in a larger photo, and the face's landmarks in the photo.

    Landmarks: float (5, 2), as data.align has them. An RGB photo of 240 to 360 pixels a side.
    """
    rng = np.random.default_rng((seed, 3, identity, image))
    size = rng.integers(240, 361, 2)
    angle, scale = rng.uniform(-0.7, 0.7), rng.uniform(0.8, 1.6)
    # The camera's axis of y points down, as _rotation's second axis does.
    turn = scale * _rotation(0, 1, angle, axes=2)
    margin = 45 * scale  # about from the face's center to its chin
    center = rng.uniform(margin, size - margin)
    colours = Image.fromarray(rng.integers(20, 236, (6, 6, 3), dtype=np.uint8))
    photo = colours.resize(tuple(size.tolist()), Image.Resampling.BICUBIC)
    # Pillow counts from the corner of the top left pixel, in which its center is (0.5, 0.5).
    back = np.linalg.inv(turn)
    a, d, b, e = back.ravel().tolist()
    c, f = (np.array(FACE_CENTER) - center @ back).tolist()
    warped, inside = (one.transform(photo.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BICUBIC)
                      for one in (draw_face(identity, image, seed), Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), 255)))
    photo.paste(warped, mask=inside)
    return photo, (find_landmarks(identity, image, seed) + 0.5 - FACE_CENTER) @ turn + center - 0.5


def find_landmarks(identity: int, image: int, seed: int = 0) -> np.ndarray:
    """The landmarks in the picture of draw_face, also those that are covered: float (5, 2), as data.align has them."""
    face, view, canvas, _ = _pose(identity, image, seed)
    corner, corner_y = face.mouth_width * (1 + 0.07 * view.smile), face.mouth_y - 1.1 * view.smile
    points = [(-face.eye_x, face.eye_y), (face.eye_x, face.eye_y), (0, face.nose_tip - 1.5),
              (-corner, corner_y), (corner, corner_y)]
    # A pixel of the picture is OVERSAMPLING of the canvas, whose first one has its center at 0.
    return canvas.project(np.array(points), np.array([0.0, 0, 9, 0, 0])) - (OVERSAMPLING - 1) / (2 * OVERSAMPLING)


def _pose(
    identity: int, image: int, seed: int
) -> tuple[SimpleNamespace, SimpleNamespace, _Canvas, np.random.Generator]:
    """The person, what is of this image only, an empty canvas, and the random numbers that remain for the drawing."""
    face = _sample(IDENTITY_FEATURES, np.random.default_rng((seed, 0, identity)))
    face.skin, face.hair = _on_ramp(SKIN_COLOURS, face.skin_tone), _on_ramp(HAIR_COLOURS, face.hair_tone)
    face.mouth_y = min(face.nose_tip + face.mouth_gap, face.chin_y - 8)
    rng = np.random.default_rng((seed, 1, identity, image))
    view = _sample(IMAGE_NUISANCES, rng)
    return face, view, _Canvas(face, view, rng), rng


def _sample(ranges: dict[str, tuple[float, float]], rng: np.random.Generator) -> SimpleNamespace:
    return SimpleNamespace(**{name: rng.uniform(low, high) for name, (low, high) in ranges.items()})


def _on_ramp(colours: np.ndarray, position: float) -> np.ndarray:
    """The colour at `position` in [0, 1] along evenly spaced `colours`: float (3,)."""
    places = np.linspace(0, 1, len(colours))
    return np.array([np.interp(position, places, channel) for channel in colours.T])


def _rotation(first: int, second: int, angle: float, axes: int = 3) -> np.ndarray:
    """The matrix that turns rows, such as (x, y, z), from axis `first` towards axis `second`."""
    matrix = np.eye(axes)
    matrix[first, first] = matrix[second, second] = math.cos(angle)
    matrix[first, second], matrix[second, first] = math.sin(angle), -math.sin(angle)
    return matrix


def _ellipse(x: float, y: float, rx: float, ry: float, tilt: float = 0.0) -> np.ndarray:
    angles = np.arange(16) * math.pi / 8
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return circle * (rx, ry) @ _rotation(0, 1, tilt, axes=2) + (x, y)


def _outline(half: Sequence[tuple[float, float]], steps: int = 6) -> np.ndarray:
    """A smooth symmetric outline from its right half, which goes from the axis to the axis: (steps * points, 2).

    It is the closed Catmull-Rom curve through the points and their mirror images.
    """
    points = np.array([*half, *((-x, y) for x, y in half[-2:0:-1])])
    before, after, later = (np.roll(points, shift, axis=0)[:, None] for shift in (1, -1, -2))
    points, t = points[:, None], np.linspace(0, 1, steps, endpoint=False)[:, None]
    curve = 0.5 * (2 * points + (after - before) * t + (2 * before - 5 * points + 4 * after - later) * t**2
                   + (3 * points - before - 3 * after + later) * t**3)
    return curve.reshape(-1, 2)


def _band(x: np.ndarray, upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """The polygon between two curves over x."""
    return np.stack([np.r_[x, x[::-1]], np.r_[upper, lower[::-1]]], axis=1)


class _Canvas:
    """A picture on which shapes in head coordinates are drawn as the camera sees them."""

    def __init__(self, face: SimpleNamespace, view: SimpleNamespace, rng: np.random.Generator) -> None:
        size = IMAGE_SIZE * OVERSAMPLING
        patches = Image.fromarray(rng.integers(20, 236, (4, 4, 3), dtype=np.uint8))
        self.picture = patches.resize((size, size), Image.Resampling.BICUBIC)
        self._half_width = 1.06 * face.face_width
        # The silhouette of an ellipsoid does not narrow as its face turns away.
        self._widening = math.hypot(1.0, 1.25 * HEAD_DEPTH / self._half_width * math.tan(view.yaw))
        self._rotation = _rotation(2, 0, view.yaw) @ _rotation(2, 1, -view.pitch) @ _rotation(0, 1, view.roll)
        self._zoom, self._origin = view.zoom, np.zeros(2)
        # A detector centers the picture on the face, not on the skull.
        self._origin = FACE_CENTER + np.array([view.shift_x, view.shift_y]) - self.project(np.array([(0.0, 6.0)]))[0]

    def project(self, points: np.ndarray, lift: float | np.ndarray = 0.0) -> np.ndarray:
        """Head (k, 2) -> picture (k, 2): rotation, weak perspective, zoom and shift. For `lift` see `draw`."""
        x, y = points.T
        front = HEAD_DEPTH * np.sqrt(np.clip(1 - (x / self._half_width) ** 2 - (y / 50) ** 2, 0, 1))
        x = np.where(np.isnan(lift), x * self._widening, x)
        turned = np.stack([x, y, np.nan_to_num(front + lift)], axis=1) @ self._rotation
        return turned[:, :2] * self._zoom / (1 - turned[:, 2:] / CAMERA_DISTANCE) + self._origin

    def draw(self, points: np.ndarray, colour: np.ndarray | tuple[float, ...], lift: float | np.ndarray = 0.0,
             width: float = 0.0, pair: bool = False) -> None:
        """A filled shape, or a line of this width; as a `pair`, also its mirror image.

        points (k, 2) are `lift` pixels above the front of the head. With SILHOUETTE they are on the plane through its
        middle. lift: a number or (k,).
        """
        pen, (red, green, blue) = ImageDraw.Draw(self.picture), np.clip(colour, 0, 255).astype(int).tolist()
        for side in (1, -1) if pair else (1,):
            flat = (self.project(points * (side, 1), lift) * OVERSAMPLING).ravel().tolist()
            if width:
                pen.line(flat, (red, green, blue), max(1, round(width * OVERSAMPLING)), joint="curve")
            else:
                pen.polygon(flat, (red, green, blue))

    def soften(self) -> None:
        """Blur what has been drawn so far."""
        self.picture = self.picture.filter(ImageFilter.GaussianBlur(1.2 * OVERSAMPLING))


def _draw_head(canvas: _Canvas, face: SimpleNamespace, rng: np.random.Generator) -> None:
    width, chin, jaw = face.face_width, face.chin_y, face.face_width * face.jaw_width
    side, top, end = width + 0.8 * face.hair_volume, -47 - face.hair_volume, max(face.hair_length, -10.0)
    hair = [(0, top), (side * 0.66, top + 5), (side, -26), (side + 1, -10), (side + 0.06 * end, end - 4),
            (side * 0.75, end + 4), (0, min(end, 20))]
    canvas.draw(_outline(hair), face.hair * 0.72, SILHOUETTE)

    neck, collar, shoulder = 0.62 * width, chin + rng.uniform(6, 12), rng.uniform(38, 60)
    canvas.draw(_ellipse(0, chin, neck, 25), face.skin * 0.78, SILHOUETTE)
    clothes = _outline([(0, collar + 5), (neck, collar), (shoulder, collar + 9), (shoulder + 8, 120), (0, 120)])
    canvas.draw(clothes, rng.uniform(15, 240, 3), SILHOUETTE)

    canvas.draw(_ellipse(width + 1.5, 1, face.ear_size / 2, face.ear_size), face.skin * 0.85, SILHOUETTE, pair=True)
    head = [(0, -47), (width * 0.62, -43), (width * 0.93, -24), (width, 0), (width * 0.42 + jaw * 0.52, chin * 0.48),
            (jaw * 0.78, chin * 0.76), (jaw * 0.4, chin * 0.97), (0, chin)]
    canvas.draw(_outline(head), face.skin, SILHOUETTE)


def _draw_shading(canvas: _Canvas, face: SimpleNamespace, view: SimpleNamespace) -> None:
    """Beard and shadows. They are blurred before anything else is drawn."""
    width, mouth, skin = face.face_width * 0.86, face.mouth_y, face.skin
    if face.beard > 0:
        beard = [(0, face.nose_tip + 3), (face.mouth_width + 2, mouth - 3), (width * 0.8, mouth - 8), (width, 4),
                 (width * face.jaw_width, face.chin_y * 0.76), (0, face.chin_y + 1)]
        density = 0.35 + 0.6 * face.beard
        canvas.draw(_outline(beard), (1 - density) * skin + density * 0.8 * face.hair)
    socket = _ellipse(face.eye_x, face.eye_y - 1.5, face.eye_width * 1.25, face.eye_height + 3)
    canvas.draw(socket, skin * 0.8, pair=True)
    dark = -1 if view.light_x > 0 else 1  # the side of the nose away from the light
    flank = np.array([(0, face.eye_y - 3), (dark * 3, face.nose_tip * 0.4), (dark * face.nose_width, face.nose_tip),
                      (0, face.nose_tip)])
    canvas.draw(flank, skin * (0.85 - 0.25 * abs(view.light_x)), lift=np.array([0.0, 3, 5, 6]))
    canvas.draw(_ellipse(0, face.nose_tip + 2.2, face.nose_width * 1.05, 2), skin * 0.65, lift=3)
    canvas.draw(_ellipse(0, mouth + face.lower_lip + 3, face.mouth_width * 0.55, 1.5), skin * 0.75)


def _draw_nose(canvas: _Canvas, face: SimpleNamespace) -> None:
    tip, w = face.nose_tip, face.nose_width
    canvas.draw(_ellipse(0, tip - 1.5, w * 0.45, 2.6), face.skin * 1.05, lift=9)
    canvas.draw(_ellipse(w * 0.5, tip + 0.9, w * 0.18 + 0.4, 0.9, 0.3), face.skin * 0.36, lift=6, pair=True)


def _draw_mouth(canvas: _Canvas, face: SimpleNamespace, view: SimpleNamespace) -> None:
    opened, t = max(view.mouth_open, 0.0), np.linspace(-1, 1, 13)
    arc, x = 1 - t**2, t * face.mouth_width * (1 + 0.07 * view.smile)
    lip = face.skin * (0.86, 0.62, 0.62) * (1 - 0.3 * face.lip_red) + np.array([48, 10, 14]) * face.lip_red
    rest = face.mouth_y - 1.1 * view.smile * t**2  # the line between closed lips
    canvas.draw(_band(x, rest - face.upper_lip * arc, rest), lip * 0.9)
    canvas.draw(_band(x, rest, rest + (face.lower_lip + opened) * arc), lip * 1.08)
    canvas.draw(_band(0.9 * x, rest, rest + (opened + 0.6) * arc), (70, 22, 26))
    canvas.draw(_band(0.75 * x, rest, rest + 0.5 * opened * arc), (232, 228, 220))


def _draw_eyes(canvas: _Canvas, face: SimpleNamespace, view: SimpleNamespace) -> None:
    x, y, w, height, t = face.eye_x, face.eye_y, face.eye_width, face.eye_height * view.eye_open, np.linspace(-1, 1, 9)
    level = _band(t * w, -height * (1 - t**2), 0.72 * height * (1 - t**2))
    eye = level @ _rotation(0, 1, face.eye_tilt, axes=2) + (x, y)
    canvas.draw(eye, (238, 234, 230), pair=True)
    for side in (-1, 1):  # both eyes look in the same direction, so this is no mirror image
        for colour, radius in ((_on_ramp(IRIS_COLOURS, face.iris_tone), 2.5), ((14, 12, 12), 1.1)):
            canvas.draw(_ellipse(side * x + view.gaze_x, y - 0.15 * height, radius, min(radius, height)), colour)
    canvas.draw(eye[:len(t)], face.skin * 0.28, width=1.2, pair=True)
    brow = y - face.brow_gap - view.brow_raise + t * face.brow_tilt * face.brow_width - face.brow_arch * (1 - t**2)
    thickness = face.brow_thickness * (1 - 0.4 * t**2)
    canvas.draw(_band(x + t * face.brow_width, brow, brow + thickness), 0.55 * face.hair + 0.12 * face.skin, pair=True)


def _draw_fringe(canvas: _Canvas, face: SimpleNamespace) -> None:
    """The hair in front of the head, between its silhouette and the hairline."""
    side, top = face.face_width + 0.5 + 0.45 * face.hair_volume, -47 - face.hair_volume
    temple, sideburn = face.hair_line - face.hair_recess, min(max(face.hair_length, -14.0), 8.0)
    crown = [(0, top), (side * 0.6, top + 6), (side * 0.93, -28), (side, -14), (side, sideburn)]
    hairline = [(0.86 * face.face_width, min(sideburn, -8.0)), (0.74 * face.face_width, temple), (9, face.hair_line),
                (0, face.hair_line)]
    half = [SILHOUETTE] * len(crown) + [0.0] * len(hairline)
    lifts = np.repeat(half + half[-2:0:-1], 6)
    canvas.draw(_outline(crown + [(x, max(y, -45)) for x, y in hairline], steps=6), face.hair, lifts)


def _draw_occlusion(canvas: _Canvas, face: SimpleNamespace, rng: np.random.Generator) -> None:
    """Glasses, dark glasses or a bar, in about one image of three."""
    kind, colour = rng.random(), rng.uniform(5, 120, 3)
    if kind < 0.18:
        rim = _ellipse(face.eye_x, face.eye_y + 1, rng.uniform(8, 10), rng.uniform(5, 8))
        canvas.draw(np.concatenate([rim, rim[:1]]), colour, lift=3, width=1.0 if kind < 0.1 else 0.0, pair=True)
        canvas.draw(np.array([(-5, face.eye_y), (5, face.eye_y)]), colour, lift=6, width=1.2)
    elif kind < 0.32:
        bar = np.array([(-110, -8), (110, -8), (110, 8), (-110, 8)]) @ _rotation(0, 1, rng.uniform(-0.6, 0.6), axes=2)
        canvas.draw(bar + (0, rng.uniform(-34, 46)), colour, SILHOUETTE)


def _photograph(canvas: _Canvas, view: SimpleNamespace, rng: np.random.Generator) -> Image.Image:
    """Light on the drawing, then the camera's colours, blur, noise and JPEG compression."""
    picture = np.asarray(canvas.picture.reduce(OVERSAMPLING), dtype=np.float32)
    # Lambert's law on an ellipsoid in the place of the head.
    (middle,), axis = canvas.project(np.zeros((1, 2)), SILHOUETTE), np.arange(IMAGE_SIZE)
    nx, ny = np.clip((axis - middle[0]) / 37, -1, 1)[None], np.clip((axis - middle[1]) / 58, -1, 1)[:, None]
    nz = np.sqrt(np.clip(1 - nx**2 - ny**2, 0.04, 1))
    light = np.array([view.light_x, view.light_y, 0.75])
    lambert = np.clip((nx * light[0] + ny * light[1] + nz * light[2]) / np.linalg.norm(light), 0, 1)
    shade = (view.ambient + (1 - view.ambient) * 1.25 * lambert) * 2**view.exposure
    picture *= shade[..., None] * (1 + 0.2 * view.warmth, 1 + 0.1 * view.tint, 1 - 0.2 * view.warmth)
    gray = picture.mean(axis=2, keepdims=True)
    picture = gray + (picture - gray) * view.saturation

    blurred = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(view.blur))
    noisy = np.clip(blurred + rng.normal(0, view.noise, picture.shape), 0, 255).astype(np.uint8)
    compressed = io.BytesIO()
    Image.fromarray(noisy).save(compressed, "JPEG", quality=int(view.jpeg_quality))
    return Image.open(compressed).convert("RGB")
