"""Scene -> RGB image, anti-aliased, at the scene's render scale."""

import math

import numpy as np
from PIL import Image, ImageDraw

from training.data.fonts import bundled_font, lay_out
from training.data.scenes import Background, Card, Scene, Shape
from training.data.textures import Texture


def _star() -> list[tuple[float, float]]:
    corners = [
        (radius * math.sin(math.pi * step / 5), -radius * math.cos(math.pi * step / 5))
        for step in range(10)
        for radius in [1.0 if step % 2 == 0 else 0.42]
    ]
    xs, ys = [x for x, _ in corners], [y for _, y in corners]
    return [((x - min(xs)) / (max(xs) - min(xs)), (y - min(ys)) / (max(ys) - min(ys))) for x, y in corners]


# Corners on the unit square; a circle has none.
_CROSS = [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)]
_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
    "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
    "cross": [(x / 3, y / 3) for x, y in _CROSS],
    "star": _star(),
}


def render(scene: Scene) -> Image.Image:
    """The image file of a scene: size_wh times render_scale, RGB."""
    image = render_background(scene.background, scene.size_wh, scene.render_scale)
    draw = ImageDraw.Draw(image)
    for card in scene.cards:
        _draw_card(draw, card, scene.render_scale)
    for shape in scene.shapes:
        _draw_shape(image, shape, scene.render_scale)
    return image


def render_background(background: Background, size_wh: tuple[int, int], scale: float) -> Image.Image:
    """The canvas alone: size_wh times scale, RGB."""
    width, height = size_wh
    file_size = (round(width * scale), round(height * scale))
    textured = isinstance(background, Texture)
    if background.end_colour == background.colour and background.noise_amplitude == 0 and not textured:
        return Image.new("RGB", file_size, background.colour)
    # Drawn at model resolution and scaled up: noise of single file pixels would vanish in anyres anyway.
    downwards = np.linspace(0, 1, height)[:, None, None]
    start, end = np.array(background.colour), np.array(background.end_colour)
    pixels = np.broadcast_to(start + (end - start) * downwards, (height, width, 3))
    if background.noise_amplitude:
        reach = background.noise_amplitude
        noise = np.random.default_rng(background.noise_seed).integers(-reach, reach + 1, (height, width, 1))
        pixels = pixels + noise
    if isinstance(background, Texture):
        pixels = pixels + background.change(height, width)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return image if image.size == file_size else image.resize(file_size, Image.Resampling.BILINEAR)


def fill_shape(draw: ImageDraw.ImageDraw, shape: str, box_xyxy: tuple[float, float, float, float], fill: int) -> None:
    """Fill a shape on a one-channel image, without anti-aliasing."""
    x0, y0, x1, y1 = box_xyxy
    if shape == "circle":
        draw.ellipse((x0, y0, x1 - 1, y1 - 1), fill=fill)
    else:
        draw.polygon([(x0 + x * (x1 - x0 - 1), y0 + y * (y1 - y0 - 1)) for x, y in _POLYGONS[shape]], fill=fill)


def _draw_card(draw: ImageDraw.ImageDraw, card: Card, scale: float) -> None:
    x0, y0, x1, y1 = (round(edge * scale) for edge in card.box_xyxy)
    draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=card.fill)
    # Half-pixel sizes, so that a few dozen fonts serve every scale.
    font = bundled_font(round(2 * card.font_px * scale) / 2)
    x, y = card.origin_xy
    for pen, character in zip(lay_out(card.text, card.font_px).pens, card.text, strict=True):
        draw.text(((x + pen) * scale, y * scale), character, font=font, fill=card.ink, anchor="ls")


def _draw_shape(image: Image.Image, shape: Shape, scale: float) -> None:
    x0, y0, x1, y1 = (round(edge * scale) for edge in shape.box_xyxy)
    if shape.shape == "square":
        image.paste(shape.fill, (x0, y0, x1, y1))
        return
    oversampling = 4 if scale < 2 else 2
    mask = Image.new("L", ((x1 - x0) * oversampling, (y1 - y0) * oversampling))
    fill_shape(ImageDraw.Draw(mask), shape.shape, (0, 0, mask.width, mask.height), fill=255)
    image.paste(shape.fill, (x0, y0), mask.reduce(oversampling))
