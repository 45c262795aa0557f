"""The phantom's anatomy: one short-axis slice of a chest, painted tissue over tissue with soft edges.

Lengths are mm, angles radians, T1 ms; y points down and x right in the image, which is the patient's left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ROWS, COLUMNS = 218, 256
LIVER, MUSCLE, FAT, MARROW, SPLEEN, BLOOD, LUNG = 586.0, 856.0, 343.0, 549.0, 1057.0, 1550.0, 1199.0
NOISE = 32.0  # ms per pixel in tissue, before blur
LUNG_NOISE = 130.0  # lung gives so little signal that its map is mostly noise


@dataclass(frozen=True)
class Heart:
    """What stays the same over a patient's slices."""

    pixel: float  # spacing
    remote: float  # T1 of the myocardium
    contrast: float  # T1 that a sector of the wall has on top
    sector: tuple[float, float]  # its centre angle and half width
    blood: float  # T1
    cavity: float  # endocardial radius at the base
    wall: float  # thickness at the base
    centre: tuple[float, float]  # (y, x) of the left ventricle from the centre of the field of view
    right: tuple[float, float, float]  # right ventricle: direction from the left one, half axes across and along
    waves: np.ndarray  # (2, 3) amplitude and phase of the waves that keep the left ventricle from being round
    papillary: tuple[float, float]  # angles of the two papillary muscles
    body: tuple[float, float]  # half axes (y, x) of the trunk
    fat: float  # thickness under the skin
    muscle: float  # thickness of the chest wall's muscle
    liver: tuple[float, float]  # (y, x) of the top of its dome, from the centre of the left ventricle


def draw_heart(rng: np.random.Generator, remote: float, contrast: float, spacing: tuple[float, float]) -> Heart:
    """Draw everything but the two T1 values, which carry the diagnosis; nothing here knows the class."""
    return Heart(
        pixel=round(rng.uniform(*spacing), 4),
        remote=remote,
        contrast=contrast,
        sector=(rng.uniform(-np.pi, np.pi), rng.uniform(0.6, 1.0)),
        blood=BLOOD + 50 * rng.standard_normal(),
        cavity=rng.uniform(19, 26),
        wall=rng.uniform(8, 12),
        centre=(rng.uniform(-8, 4), rng.uniform(6, 22)),
        right=(np.pi + rng.uniform(0.1, 0.6), rng.uniform(24, 30), rng.uniform(36, 43)),
        waves=np.stack([0.025 * rng.standard_normal(3), rng.uniform(-np.pi, np.pi, 3)]),
        papillary=(rng.uniform(-0.9, -0.3), rng.uniform(1.0, 1.7)),
        body=(rng.uniform(106, 118), rng.uniform(136, 148)),
        fat=rng.uniform(6, 18),
        muscle=rng.uniform(8, 13),
        liver=(rng.uniform(36, 44), rng.uniform(-62, -40)),
    )


class _Canvas:
    """T1 and noise level per pixel, and the mm coordinates to paint on them."""

    def __init__(self, pixel: float):
        self.pixel = pixel
        self.y, self.x = np.meshgrid(
            ((np.arange(ROWS) - (ROWS - 1) / 2) * pixel).astype(np.float32),
            ((np.arange(COLUMNS) - (COLUMNS - 1) / 2) * pixel).astype(np.float32),
            indexing="ij",
        )
        self.t1 = np.zeros((ROWS, COLUMNS), np.float32)
        self.noise = np.zeros((ROWS, COLUMNS), np.float32)

    def cover(self, distance: np.ndarray) -> np.ndarray:
        """Share of each pixel inside an outline, from the signed distance to it: partial volume."""
        out: np.ndarray = np.clip(0.5 - distance / np.float32(1.3 * self.pixel), 0, 1)
        return out

    def paint(self, cover: np.ndarray, t1: float | np.ndarray, noise: float = NOISE) -> None:
        self.t1 += cover * (np.asarray(t1, np.float32) - self.t1)
        self.noise += cover * (np.float32(noise) - self.noise)

    def ellipse(self, cy: float, cx: float, ry: float, rx: float, turn: float = 0.0, power: float = 2.0) -> np.ndarray:
        """Signed distance, near the outline, to an ellipse (power 2) or a rounder box (above)."""
        y, x = self.y - np.float32(cy), self.x - np.float32(cx)
        if turn:
            y, x = y * np.cos(turn) - x * np.sin(turn), y * np.sin(turn) + x * np.cos(turn)
        if power == 2.0:
            radius = np.sqrt((y / ry) ** 2 + (x / rx) ** 2)
        else:
            radius = (np.abs(y / ry) ** power + np.abs(x / rx) ** power) ** (1 / power)
        out: np.ndarray = (radius - 1) * np.float32(min(ry, rx))
        return out


def draw_slice(rng: np.random.Generator, heart: Heart, level: float) -> tuple[np.ndarray, np.ndarray]:
    """One slice: T1 map (218, 256) int16 in ms, and mask (218, 256) uint8, 1 in the left-ventricular myocardium.

    level: 0 at the base, 1 at the apex, towards which cavity, wall and right ventricle shrink.
    """
    canvas = _Canvas(heart.pixel)
    cy, cx = heart.centre[0] + rng.normal(0, 1.5), heart.centre[1] + rng.normal(0, 1.5)
    _paint_trunk(rng, canvas, heart, cy, cx)
    mask = _paint_heart(rng, canvas, heart, cy, cx, level)
    t1, noise = canvas.t1, canvas.noise

    # Imperfect shim and coil: a smooth error of about one per cent at most.
    slopes = rng.normal(0, 0.004, 3)
    t1 = t1 * (1 + slopes[0] * canvas.y / 130 + slopes[1] * canvas.x / 150 + slopes[2] * canvas.x * canvas.y / 19500)

    # The blur of the imaging system, then noise, a little of which neighbours share.
    grain = rng.standard_normal((2, ROWS, COLUMNS), np.float32)
    t1 = _blur(t1, 0.6) + noise * (0.9 * grain[0] + 1.2 * _blur(grain[1], 0.7))
    return np.clip(np.rint(np.abs(t1)), 0, 4000).astype(np.int16), mask


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    out: np.ndarray = gaussian_filter(image, sigma, mode="nearest", truncate=3.0)
    return out


def _texture(rng: np.random.Generator, sigma: float) -> np.ndarray:
    """A smooth random field of mean 0 and SD about 1, (218, 256)."""
    from scipy.ndimage import zoom

    coarse = rng.standard_normal((ROWS // 8 + 2, COLUMNS // 8 + 2), np.float32)
    smooth = zoom(_blur(coarse, sigma), 8, order=1)[:ROWS, :COLUMNS]
    out: np.ndarray = smooth / max(float(smooth.std()), 1e-6)
    return out


def _paint_trunk(rng: np.random.Generator, canvas: _Canvas, heart: Heart, cy: float, cx: float) -> None:
    ry, rx = heart.body
    centre = 6.0
    angle = np.arctan2(canvas.y - centre, canvas.x)
    ripples = 1.4 * np.cos(11 * angle + rng.uniform(0, 6)) + 1.6 * np.cos(5 * angle + rng.uniform(0, 6))
    ribs = ripples.astype(np.float32)

    # Skin fat, muscle of the chest wall with ribs in it, lung inside.
    skin = canvas.ellipse(centre, 0, ry, rx, power=2.5)
    canvas.paint(canvas.cover(skin), FAT + 12 * _texture(rng, 0.8))
    under = skin + np.float32(heart.fat) + 1.2 * ribs
    canvas.paint(canvas.cover(under), MUSCLE + 25 * _texture(rng, 0.6))
    for side in (-1, 1):
        for k in range(4):
            at = 0.3 + 0.42 * k + rng.uniform(-0.07, 0.07)
            depth = heart.fat + 0.55 * heart.muscle
            along = (ry - depth, rx - depth)
            y0, x0 = centre - along[0] * np.sin(at - 0.35), side * along[1] * np.cos(at - 0.35)
            bone = canvas.ellipse(y0, x0, 3.0, 5.5, turn=side * (at + 0.9))
            canvas.paint(canvas.cover(bone), MARROW, 1.5 * NOISE)
    inner = under + np.float32(heart.muscle) + ribs
    cavity = canvas.cover(inner)
    canvas.paint(cavity, LUNG + 60 * _texture(rng, 0.7), LUNG_NOISE)
    for _ in range(14):  # vessels of the lung
        y0, x0, r = rng.uniform(-85, 30), rng.uniform(-120, 130), rng.uniform(1.2, 2.6)
        canvas.paint(canvas.cover(canvas.ellipse(y0, x0, r, r * rng.uniform(1, 2))) * cavity, 0.85 * heart.blood, 90.0)

    # Below the diaphragm: liver under its dome on the patient's right, stomach and spleen on the left, fat between.
    top, left = cy + heart.liver[0], cx + heart.liver[1]
    sag = 0.0032 * (canvas.x - np.float32(left)) ** 2
    dome = np.float32(top) + sag - canvas.y
    left_top = top + rng.uniform(8, 18)
    right_dome = np.float32(left_top) + 0.006 * (canvas.x - np.float32(95)) ** 2 - canvas.y
    canvas.paint(canvas.cover(np.minimum(dome, right_dome) - 3) * cavity, MUSCLE)
    canvas.paint(canvas.cover(right_dome) * cavity, FAT + 40)
    spleen = canvas.ellipse(left_top + 26, 98, 15, 24, turn=-0.5)
    canvas.paint(canvas.cover(spleen) * cavity, SPLEEN + 15 * _texture(rng, 0.7))
    stomach = canvas.ellipse(left_top + 24, 52, 14, 19, turn=0.3)
    canvas.paint(canvas.cover(stomach) * cavity, MUSCLE + 60)
    canvas.paint(canvas.cover(stomach + 4) * cavity, 1300.0, 150.0)
    liver = canvas.cover(dome) * cavity
    canvas.paint(liver, LIVER + 14 * _texture(rng, 0.8))
    for _ in range(7):
        y0, x0 = top + rng.uniform(14, 55), left + rng.uniform(-45, 60)
        vessel = canvas.ellipse(y0, x0, rng.uniform(1.5, 3), rng.uniform(2.5, 7), turn=rng.uniform(-1.5, 1.5))
        canvas.paint(canvas.cover(vessel) * liver, 0.9 * heart.blood)

    # Spine with its muscles, and the descending aorta beside it.
    low, mid = centre + ry - heart.fat - 12, rng.uniform(-6, 6)
    for side in (-1, 1):
        back = canvas.ellipse(low + 4, mid + side * 27, 13, 19)
        canvas.paint(canvas.cover(back) * canvas.cover(under - 1), MUSCLE + 10)
    canvas.paint(canvas.cover(canvas.ellipse(low - 14, mid, 17, 20)), FAT + 60)
    canvas.paint(canvas.cover(canvas.ellipse(low - 14, mid, 15, 18, power=2.5)), MARROW + 20 * _texture(rng, 0.6))
    aorta = canvas.ellipse(low - 30, mid + 27, 11.5, 11.5)
    canvas.paint(canvas.cover(aorta - 2), MUSCLE)
    canvas.paint(canvas.cover(aorta), heart.blood + 10 * _texture(rng, 0.8))


def _paint_heart(
    rng: np.random.Generator, canvas: _Canvas, heart: Heart, cy: float, cx: float, level: float
) -> np.ndarray:
    y, x = canvas.y - np.float32(cy), canvas.x - np.float32(cx)
    angle = np.arctan2(y, x)
    waves = sum(a * np.cos((k + 2) * angle + p) for k, (a, p) in enumerate(heart.waves.T))
    radius = np.sqrt(y * y + x * x) / (1 + waves)
    cavity = heart.cavity * (1 - 0.5 * level**1.5)
    wall = heart.wall * (1 - 0.15 * level) * (1 + 0.1 * np.cos(angle - np.float32(heart.waves[1, 0])))
    endocardium = radius - np.float32(cavity)
    epicardium = endocardium - wall

    # Right ventricle: an ellipse that the left one overlaps, so that a crescent is left of it.
    direction, across, along = heart.right
    across, along = across * (1 - 0.4 * level), along * (1 - 0.35 * level)
    away = cavity + heart.wall + 0.12 * across
    ry, rx = cy + away * np.sin(direction), cx + away * np.cos(direction)
    right = canvas.ellipse(ry, rx, along, across, turn=direction - np.pi)
    right = right + (1.2 * np.cos(5 * angle + rng.uniform(0, 6))).astype(np.float32)  # trabeculae

    # Fat around both, thickest in the grooves where they meet; then muscle, then blood.
    both = -np.logaddexp(-epicardium / 5, -(right - 3) / 5) * 5
    fat = both - np.float32(rng.uniform(3, 7)) - (2.5 * _texture(rng, 1.0)).astype(np.float32)
    canvas.paint(canvas.cover(fat), FAT + 25, 1.5 * NOISE)
    grain = (10 * _texture(rng, 0.6)).astype(np.float32)
    turn = np.abs(np.angle(np.exp(1j * (angle - heart.sector[0]))))
    sector = 1 / (1 + np.exp((turn - heart.sector[1]) / 0.08))
    muscle = (heart.remote + heart.contrast * sector + grain).astype(np.float32)
    blood = heart.blood + 1.5 * grain
    canvas.paint(canvas.cover(right - 3), heart.remote + grain)
    canvas.paint(canvas.cover(right), blood)
    canvas.paint(canvas.cover(epicardium), muscle)
    canvas.paint(canvas.cover(endocardium), blood)
    if level < 0.75:
        for at in heart.papillary:
            r, size = 0.62 * cavity, 0.17 * cavity
            muscle_blob = canvas.ellipse(cy + r * np.sin(at), cx + r * np.cos(at), size, 1.2 * size, turn=at)
            canvas.paint(canvas.cover(muscle_blob), muscle)
    return ((endocardium > 0) & (epicardium <= 0)).astype(np.uint8)
