"""Draw captioned pictures and clips: an endless, reproducible stream in which a caption leaves much open.

A scene is a background (gradient, stripes, checks or clouds of two colours), objects and their light. A caption names
some factors; position within a region, size, rotation, background, light and a second object vary freely. A batch is a
function of its stream and its number, so nothing is ever stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

HUES = {
    "red": 0.0, "orange": 0.085, "yellow": 0.16, "green": 0.34, "cyan": 0.5, "blue": 0.63, "purple": 0.77, "pink": 0.89,
}  # fmt: skip
COLOURS = tuple(HUES)
SHAPES = ("circle", "square", "triangle", "cross")
PLURALS = ("circles", "squares", "triangles", "crosses")
NAMES, NAMED_PLURALS = (*SHAPES, "star", "ring"), (*PLURALS, "stars", "rings")
RICH_SHAPES = len(NAMES)  # and stars and rings, which only the autoencoders see
PLACES = {
    "on the left": (-0.5, 0.0),
    "on the right": (0.5, 0.0),
    "at the top": (0.0, -0.5),
    "at the bottom": (0.0, 0.5),
    "in the middle": (0.0, 0.0),
}
COUNTS = ("one", "two", "three", "four")
TONES = ("dark", "light")
MOTIONS = ("moving left", "moving right", "moving up", "moving down", "growing", "shrinking")
HEADINGS = ((-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0), (0.0, 0.0), (0.0, 0.0))


@dataclass
class Batch:
    """Captions, pixels in [-1, 1] (pictures, 3, height, width; clips, 3, frames, height, width) and named factors."""

    captions: list[str]
    pixels: torch.Tensor
    factors: dict[str, torch.Tensor] = field(default_factory=dict)


class Dice:
    """Random numbers of one batch. `rich` scenes have more shapes, turned by any angle, and more backgrounds."""

    def __init__(self, stream: int, number: int, rich: bool):
        self.rich = rich
        self.generator = torch.Generator().manual_seed((stream + 1) * 1_000_000_007 + number)

    def uniform(self, low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self.generator)

    def pick(self, choices: int, *shape: int) -> torch.Tensor:
        return torch.randint(choices, shape, generator=self.generator)

    def chance(self, probability: float, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=self.generator) < probability

    def shape(self, n: int) -> torch.Tensor:
        return self.pick(RICH_SHAPES if self.rich else len(SHAPES), n)

    def turn(self, n: int) -> torch.Tensor:
        most = math.pi if self.rich else 0.4
        return self.uniform(-most, most, n, 1)


def rgb(hue: torch.Tensor, saturation: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Colours in [0, 1] with a last dimension of 3."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * hue[..., None]) % 6
    return value[..., None] * (1 - saturation[..., None] * torch.minimum(k, 4 - k).clamp(0, 1))


def named_colour(dice: Dice, index: torch.Tensor) -> torch.Tensor:
    hue = torch.tensor(list(HUES.values()))[index] + dice.uniform(-0.018, 0.018, *index.shape)
    return rgb(hue, dice.uniform(0.75, 1, *index.shape), dice.uniform(0.75, 1, *index.shape))


def signed_distance(kind: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Distance to the edge of a shape of radius about 1, negative within."""
    r, across, down = torch.hypot(x, y), x.abs(), y.abs()
    if kind == 0:
        return r - 0.9
    if kind == 1:
        return torch.maximum(across, down) - 0.8
    if kind == 3:
        return torch.maximum(torch.minimum(across, down) - 0.3, torch.maximum(across, down) - 1.0)
    if kind == 5:
        return (r - 0.72).abs() - 0.23
    angle = torch.atan2(x, -y)
    if kind == 2:
        return r * torch.cos((angle + math.pi / 3) % (2 * math.pi / 3) - math.pi / 3) - 0.6
    spike = ((angle * 5 / (2 * math.pi)) % 1 - 0.5).abs() * 2
    return 0.6 * (r - 0.42 - 0.73 * spike)


@dataclass
class Objects:
    """One object per scene: kind (n), colour (n, 3); position, radius and angle per frame (n, frames)."""

    kind: torch.Tensor
    colour: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    radius: torch.Tensor
    angle: torch.Tensor
    shown: torch.Tensor


class Canvas:
    """Scenes of n × frames pictures, (n, frames, height, width, 3) in [0, 1]."""

    def __init__(self, n: int, frames: int, size: int):
        self.shape = (n, frames, size, size)
        axis = (torch.arange(size) + 0.5) * 2 / size - 1
        self.x, self.y = axis[None, None, None, :], axis[None, None, :, None]
        self.time = torch.linspace(0, 1, frames)[None, :, None, None] if frames > 1 else torch.zeros(1, 1, 1, 1)
        self.pixels = torch.zeros(*self.shape, 3)

    def background(self, dice: Dice, first: torch.Tensor, second: torch.Tensor) -> None:
        """Two colours mixed by a field, which drifts over time."""
        n, _frames, size, _ = self.shape
        a, b = (dice.uniform(0, 2 * math.pi, n, 1, 1, 1) for _ in range(2))
        drift, phase = dice.uniform(0.1, 0.5, n, 1, 1, 1), dice.uniform(0, 2 * math.pi, n, 1, 1, 1)
        x, y = self.x + drift * self.time * b.cos(), self.y + drift * self.time * b.sin()
        along, across = x * a.cos() + y * a.sin(), y * a.cos() - x * a.sin()
        pitch = dice.uniform(3.5, 8, n, 1, 1, 1)
        coarse = torch.randn(n, 1, 4, 4, generator=dice.generator)
        cloud = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
        fields = (
            0.5 + 0.4 * along,
            1 - torch.hypot(x - 0.6 * a.cos(), y - 0.6 * a.sin()) / 1.6,
            torch.sigmoid(2.5 * (cloud + 0.6 * along)),
            torch.sigmoid(5 * torch.sin(pitch * along + phase)),
            torch.sigmoid(6 * torch.sin(pitch * along + phase) * torch.sin(pitch * across)),
        )
        kind = dice.pick(len(fields) if dice.rich else 3, n)
        mix = torch.zeros(self.shape)
        for index, values in enumerate(fields):
            chosen = kind == index
            mix[chosen] = values.expand(self.shape)[chosen].clamp(0, 1)
        self.pixels = torch.lerp(first[:, None, None, None], second[:, None, None, None], mix[..., None])

    def alpha(self, o: Objects, dx: float | torch.Tensor = 0.0, dy: float | torch.Tensor = 0.0) -> torch.Tensor:
        x, y = self.x - (o.x + dx)[..., None, None], self.y - (o.y + dy)[..., None, None]
        c, s, r = (v[..., None, None] for v in (o.angle.cos(), o.angle.sin(), o.radius))
        x, y = (x * c + y * s) / r, (y * c - x * s) / r
        distance = torch.ones(self.shape)
        for kind in range(RICH_SHAPES):
            chosen = (o.kind == kind) & o.shown
            distance[chosen] = signed_distance(kind, x[chosen], y[chosen])
        return (0.5 - distance * r * self.shape[-1] / 2).clamp(0, 1)

    def add(self, o: Objects, light: torch.Tensor, shadow: torch.Tensor) -> None:
        """An object, lit from `light` (an angle per scene), and its shadow of strength `shadow`."""
        lx, ly = light.cos()[:, None], light.sin()[:, None]
        dark = self.alpha(o, -0.22 * lx * o.radius, -0.22 * ly * o.radius) * shadow[:, None, None, None]
        self.pixels = self.pixels * (1 - dark[..., None])
        x, y, r = o.x[..., None, None], o.y[..., None, None], o.radius[..., None, None]
        lit = ((self.x - x) * lx[..., None, None] + (self.y - y) * ly[..., None, None]) / r
        colour = o.colour[:, None, None, None] * (0.84 + 0.16 * lit.clamp(-1, 1))[..., None]
        self.pixels = torch.lerp(self.pixels, colour, self.alpha(o)[..., None])

    def finished(self) -> torch.Tensor:
        pixels = self.pixels.clamp(0, 1).permute(0, 4, 1, 2, 3) * 2 - 1
        return pixels[:, :, 0].contiguous() if self.shape[1] == 1 else pixels.contiguous()


def ground(dice: Dice, n: int, tone: torch.Tensor | None = None) -> torch.Tensor:
    """A muted colour; `tone` 0 is dark and 1 light."""
    value = dice.uniform(0.08, 0.92, n) if tone is None else dice.uniform(0.05, 0.35, n) + 0.6 * tone
    return rgb(dice.uniform(0, 1, n), dice.uniform(0, 0.4, n), value)


def second_object(dice: Dice, n: int, frames: int, x: torch.Tensor, y: torch.Tensor, chance: float) -> Objects:
    """A small unnamed object, away from (x, y); in a clip it goes its own way."""
    turn = dice.uniform(0, 2 * math.pi, n, 1)
    px = (x[:, :1] + 0.95 * turn.cos() + 1) % 2 - 1
    py = (y[:, :1] + 0.95 * turn.sin() + 1) % 2 - 1
    time = torch.linspace(0, 1, frames)[None]
    heading, speed = dice.uniform(0, 2 * math.pi, n, 1), dice.uniform(0, 0.7, n, 1)
    still = torch.zeros(n, frames)
    return Objects(
        dice.shape(n),
        named_colour(dice, dice.pick(len(COLOURS), n)),
        (0.85 * px + speed * heading.cos() * time).clamp(-0.85, 0.85) + still,
        (0.85 * py + speed * heading.sin() * time).clamp(-0.85, 0.85) + still,
        dice.uniform(0.14, 0.2, n, 1) + still,
        dice.uniform(0, 2 * math.pi, n, 1) + still,
        dice.chance(chance, n),
    )


def named(colour: str | None, shape: str) -> str:
    return f"{'an' if colour == 'orange' else 'a'} {colour} {shape}" if colour else f"a {shape}"


def draw_images(number: int, n: int, complete: bool = False, rich: bool = False, size: int = 32) -> Batch:
    """One named object and its place. Unless `complete`, some captions leave out the place or the colour."""
    dice, canvas = Dice(0, number, rich), Canvas(n, 1, size)
    colour, kind, place = dice.pick(len(COLOURS), n), dice.shape(n), dice.pick(len(PLACES), n)
    where = torch.tensor(list(PLACES.values()))[place] + dice.uniform(-0.14, 0.14, n, 2)
    radius = dice.uniform(0.3, 0.45, n, 1)
    turn = dice.turn(n)
    main = Objects(
        kind, named_colour(dice, colour), where[:, :1], where[:, 1:], radius, turn, torch.ones(n, dtype=torch.bool)
    )
    light, shadow = dice.uniform(0, 2 * math.pi, n), dice.uniform(0, 0.6, n)
    canvas.background(dice, ground(dice, n), ground(dice, n))
    canvas.add(second_object(dice, n, 1, main.x, main.y, 0.5), light, shadow)
    canvas.add(main, light, shadow)
    short, bare = dice.chance(0.0 if complete else 0.2, n).tolist(), dice.chance(0.0 if complete else 0.1, n).tolist()
    places = tuple(PLACES)
    captions = [
        " ".join([named(None if no_c else COLOURS[c], NAMES[k]), *([] if no_p else [places[p]])])
        for c, k, p, no_p, no_c in zip(colour.tolist(), kind.tolist(), place.tolist(), short, bare, strict=True)
    ]
    return Batch(captions, canvas.finished(), {"colour": colour, "shape": kind, "place": place})


def draw_joint(number: int, n: int, complete: bool = False, rich: bool = False, size: int = 32) -> Batch:
    """One to four objects of one colour and shape on a dark or a light ground, one in each quarter at most."""
    dice, canvas = Dice(1, number, rich), Canvas(n, 1, size)
    colour, kind, tone = dice.pick(len(COLOURS), n), dice.shape(n), dice.pick(2, n)
    count = dice.pick(len(COUNTS), n)
    light, shadow = dice.uniform(0, 2 * math.pi, n), dice.uniform(0, 0.6, n)
    canvas.background(dice, ground(dice, n, tone), ground(dice, n, tone))
    cells = torch.rand(n, 4, generator=dice.generator).argsort(1)
    for index in range(len(COUNTS)):
        cell = cells[:, index]
        x = (cell % 2 - 0.5)[:, None] + dice.uniform(-0.12, 0.12, n, 1)
        y = (cell // 2 - 0.5)[:, None] + dice.uniform(-0.12, 0.12, n, 1)
        radius, turn = dice.uniform(0.26, 0.38, n, 1), dice.turn(n)
        canvas.add(Objects(kind, named_colour(dice, colour), x, y, radius, turn, count >= index), light, shadow)
    bare = dice.chance(0.0 if complete else 0.2, n).tolist()
    captions = [
        f"{COUNTS[m]} {COLOURS[c]} {NAMED_PLURALS[k] if m else NAMES[k]}"
        + ("" if no_t else f" on a {TONES[t]} background")
        for m, c, k, t, no_t in zip(count.tolist(), colour.tolist(), kind.tolist(), tone.tolist(), bare, strict=True)
    ]
    return Batch(captions, canvas.finished(), {"count": count, "colour": colour, "shape": kind, "tone": tone})


def draw_video(
    number: int, n: int, complete: bool = False, rich: bool = False, size: int = 32, frames: int = 17
) -> Batch:
    """One named object that moves, grows or shrinks; a second one goes its own way over a drifting background."""
    dice, canvas = Dice(2, number, rich), Canvas(n, frames, size)
    colour, kind, motion = dice.pick(len(COLOURS), n), dice.shape(n), dice.pick(len(MOTIONS), n)
    time = torch.linspace(-0.5, 0.5, frames)[None]
    heading = torch.tensor(HEADINGS)[motion] * dice.uniform(0.7, 1.2, n, 1)
    heading = heading + dice.uniform(-0.12, 0.12, n, 2)
    slack = (0.62 - heading.abs() / 2).clamp_min(0.03)
    centre = dice.uniform(-1, 1, n, 2) * slack
    growth = (0.75 * (motion == 4).float() - 0.75 * (motion == 5).float())[:, None]
    radius = dice.uniform(0.3, 0.42, n, 1) * torch.exp(growth * 2 * time)
    turn = dice.turn(n) + dice.uniform(-1.2, 1.2, n, 1) * time
    x, y = centre[:, :1] + heading[:, :1] * time, centre[:, 1:] + heading[:, 1:] * time
    main = Objects(kind, named_colour(dice, colour), x, y, radius, turn, torch.ones(n, dtype=torch.bool))
    light, shadow = dice.uniform(0, 2 * math.pi, n), dice.uniform(0, 0.5, n)
    canvas.background(dice, ground(dice, n), ground(dice, n))
    canvas.add(second_object(dice, n, frames, x, y, 0.4), light, shadow)
    canvas.add(main, light, shadow)
    bare = dice.chance(0.0 if complete else 0.1, n).tolist()
    captions = [
        f"{named(None if no_c else COLOURS[c], NAMES[k])} {MOTIONS[m]}"
        for c, k, m, no_c in zip(colour.tolist(), kind.tolist(), motion.tolist(), bare, strict=True)
    ]
    return Batch(captions, canvas.finished(), {"colour": colour, "shape": kind, "motion": motion})


DRAW = {"images": draw_images, "joint": draw_joint, "video": draw_video}


def vocabulary(name: str) -> list[str]:
    """Captions that hold every word of a judge."""
    words = [named(c, s) for c in COLOURS for s in SHAPES]
    if name == "images":
        return words + list(PLACES)
    if name == "video":
        return words + list(MOTIONS)
    return words + [f"{m} {p} on a {t} background" for m in COUNTS for p in PLURALS for t in TONES]
