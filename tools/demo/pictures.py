"""Small pictures with simple figures or a printed number, and questions about them: 96 x 96 pixels, nine tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 96
COLOURS = {
    "red": (220, 30, 30), "green": (30, 160, 50), "blue": (40, 70, 220), "yellow": (240, 220, 40),
    "orange": (245, 140, 20), "purple": (140, 40, 170), "black": (15, 15, 15),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {
    "top left": (24, 24), "top right": (72, 24), "bottom left": (24, 72), "bottom right": (72, 72), "middle": (48, 48),
}  # fmt: skip
KINDS = ("shape", "colour", "place", "count", "number", "difference")
NUMBER_WORDS = ("no", "one", "two", "three", "four")


@dataclass
class Scene:
    images: list[Image.Image]
    questions: list[tuple[str, str]]  # (question, answer), the first one is of the requested kind


@dataclass(frozen=True)
class Figure:
    shape: str
    colour: str
    place: str
    radius: int
    shift: tuple[int, int]

    def __str__(self) -> str:
        return f"{'an' if self.colour == 'orange' else 'a'} {self.colour} {self.shape}"


def figure(rng: Random, place: str = "", shape: str = "", colour: str = "") -> Figure:
    return Figure(
        shape or rng.choice(SHAPES), colour or rng.choice(list(COLOURS)), place or rng.choice(list(PLACES)),
        rng.randint(13, 19), (rng.randint(-3, 3), rng.randint(-3, 3)),
    )  # fmt: skip


def draw_figure(canvas: ImageDraw.ImageDraw, f: Figure, scale: int = 1) -> None:
    x, y = (scale * (c + d) for c, d in zip(PLACES[f.place], f.shift, strict=True))
    r, fill = scale * f.radius, COLOURS[f.colour]
    if f.shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif f.shape == "square":
        canvas.rectangle((x - r, y - r, x + r, y + r), fill=fill)
    elif f.shape == "triangle":
        canvas.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
    else:
        w = max(3, r // 3)
        canvas.rectangle((x - r, y - w, x + r, y + w), fill=fill)
        canvas.rectangle((x - w, y - r, x + w, y + r), fill=fill)


def background(rng: Random) -> tuple[int, int, int]:
    base = rng.randint(225, 255)
    return tuple(min(255, base + rng.randint(-6, 6)) for _ in range(3))  # type: ignore[return-value]


def paint(figures: list[Figure], ground: tuple[int, int, int], scale: int = 1) -> Image.Image:
    image = Image.new("RGB", (scale * SIZE, scale * SIZE), ground)
    canvas = ImageDraw.Draw(image)
    for f in figures:
        draw_figure(canvas, f, scale)
    return image


def shipped() -> Image.Image:
    """edgeq/demo/picture.png, larger than the model sees it: `edgeq chat demo --image demo`."""
    figures = [
        Figure("circle", "red", "top left", 17, (0, 0)), Figure("triangle", "green", "top right", 17, (0, 0)),
        Figure("square", "blue", "bottom right", 16, (0, 0)),
    ]  # fmt: skip
    return paint(figures, (250, 248, 244), scale=4)


FONTS = {size: ImageFont.load_default(size) for size in range(34, 47)}


def printed(rng: Random, text: str) -> Image.Image:
    image = Image.new("RGB", (SIZE, SIZE), background(rng))
    colour = COLOURS[rng.choice(("black", "blue", "red", "green"))]
    centre = (SIZE // 2 + rng.randint(-3, 3), SIZE // 2 + rng.randint(-3, 3))
    ImageDraw.Draw(image).text(centre, text, fill=colour, font=FONTS[rng.randint(34, 46)], anchor="mm")
    return image


def scene(rng: Random, kind: str = "") -> Scene:
    kind = kind or rng.choices(KINDS, (2, 2, 2, 3, 5, 4))[0]
    if kind == "number":
        text = str(rng.randrange(100))
        ask = rng.choice(("What number is this?", "Which number do you see?", "Read the number."))
        return Scene([printed(rng, text)], [(ask, f"The number is {text}.")])
    if kind == "difference":
        return difference(rng)
    if kind == "count":
        return several(rng)
    f = figure(rng)
    what = rng.choice(("What shape is this?", "Which figure do you see?", "What is in the picture?"))
    hue = rng.choice((f"What colour is the {f.shape}?", f"Which colour has the {f.shape}?"))
    place = rng.choice((f"Where is the {f.shape}?", f"Where do you see the {f.shape}?"))
    asks = {
        "shape": (what, f"It is {f}."),
        "colour": (hue, f"The {f.shape} is {f.colour}."),
        "place": (place, f"The {f.shape} is in the {where(f)}."),
    }
    others = [asks[k] for k in asks if k != kind]
    rng.shuffle(others)
    return Scene([paint([f], background(rng))], [asks[kind], *others])


def where(f: Figure) -> str:
    return f.place if f.place == "middle" else f"{f.place} corner"


def several(rng: Random) -> Scene:
    n = rng.randint(1, 4)
    places = rng.sample(list(PLACES), n)
    figures = [figure(rng, place) for place in places]
    total = f"There {'is' if n == 1 else 'are'} {NUMBER_WORDS[n]} figure{'s' * (n != 1)}."
    questions = [
        (rng.choice(("How many figures are there?", "Count the figures.", "How many figures do you see?")), total)
    ]
    for f in rng.sample(figures, min(n, 2)):
        questions.append((f"What is in the {where(f)}?", f"In the {where(f)} is {f}."))
    return Scene([paint(figures, background(rng))], questions)


def difference(rng: Random) -> Scene:
    """Two frames: a figure moved, changed its colour, came or went."""
    ground, f = background(rng), figure(rng)
    change = rng.choice(("moved", "colour", "came", "went"))
    place = rng.choice([p for p in PLACES if p != f.place])
    if change == "moved":
        after = [Figure(f.shape, f.colour, place, f.radius, f.shift)]
        frames, answer = ([f], after), f"The {f.shape} moved to the {where(after[0])}."
    elif change == "colour":
        colour = rng.choice([c for c in COLOURS if c != f.colour])
        frames = [f], [Figure(f.shape, colour, f.place, f.radius, f.shift)]
        answer = f"The {f.shape} is now {colour}."
    else:
        other = figure(rng, place)
        frames = ([f], [f, other]) if change == "came" else ([f, other], [f])
        what = str(other)
        answer = f"{what[0].upper()}{what[1:]} {'came' if change == 'came' else 'went away'}."
    ask = rng.choice(("What changed?", "What is different?", "What happened between the two pictures?"))
    return Scene([paint(fs, ground) for fs in frames], [(ask, answer)])


def patches(pixels: np.ndarray) -> np.ndarray:
    """Patch vectors [N, gh * gw, 1536] float32 of still pictures [N, H, W, 3] uint8, in 2 x 2 block order."""
    count, height, width, _ = pixels.shape
    gh, gw = height // 16, width // 16
    x = (pixels.astype(np.float32) / 255 - 0.5) / 0.5
    x = x.reshape(count, gh // 2, 2, 16, gw // 2, 2, 16, 3).transpose(0, 1, 4, 2, 5, 7, 3, 6)
    x = np.repeat(x[:, :, :, :, :, :, None], 2, axis=6)  # N, blocks, 2, 2, C, the frame twice, 16, 16
    return x.reshape(count, gh * gw, 1536)


def grid_positions(gh: int, gw: int, start: int) -> tuple[np.ndarray, int]:
    """mRoPE positions [3, gh * gw] of a merged grid starting at `start`, and the position that follows."""
    rows, cols = np.divmod(np.arange(gh * gw), gw)
    return np.stack([np.full_like(rows, start), rows + start, cols + start]), start + max(gh, gw)


MERGED = math.prod((SIZE // 32, SIZE // 32))
