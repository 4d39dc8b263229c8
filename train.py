"""Data and training: drawn shapes or folders of images, then the tokenizer, next-scale and masked stages."""
import colorsys
import functools

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("disc", "ring", "square", "triangle", "star", "cross", "crescent", "hexagon", "arrow", "heart")


def circle(points=48, radius=1.0, centre=0.0, start=0.0):
    """The corners (points, 2) of a regular polygon around (centre, 0), the first at the angle start in radians, y pointing down."""
    angle = start + np.arange(points) * (2 * np.pi / points)
    return np.stack([centre + radius * np.cos(angle), radius * np.sin(angle)], axis=1)


@functools.cache
def outline(shape):
    """The polygon (N, 2) that fills a shape of SHAPES within about the unit circle, then the polygons cut out of it."""
    if shape == "disc":
        return (circle(),)
    if shape == "ring":
        return circle(), circle(radius=0.5)
    if shape == "crescent":
        return circle(), circle(radius=0.75, centre=0.5)
    if shape == "hexagon":
        return (circle(points=6),)
    if shape == "star":
        return (np.stack([circle(5, start=-np.pi / 2), circle(5, radius=0.4, start=-np.pi * 0.3)], axis=1).reshape(10, 2),)
    if shape == "heart":
        angle = np.linspace(0, 2 * np.pi, 48)
        height = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
        return (np.stack([np.sin(angle) ** 3, -(height + 2.5) / 16], axis=1),)
    return (np.array({
        "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
        "triangle": [(0, -1), (0.95, 0.7), (-0.95, 0.7)],
        "cross": [(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
                  (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
        "arrow": [(1, 0), (0.1, -0.9), (0.1, -0.3), (-1, -0.3), (-1, 0.3), (0.1, 0.3), (0.1, 0.9)],
    }[shape]),)


def draw_shape(index, size=32):
    """The built-in data set: (RGB image of size x size, label), a pure function of the index; label = index % 10, an index into SHAPES.

    Bright fill on a dark background that is flat or blends two colours; the shape's colour, place, size and rotation (within .25 rad)
    vary. The random numbers do not depend on size, so sizes show the same picture. ValueError for index < 0 or size < 8.
    """
    for name, value, least in (("index", index, 0), ("size", size, 8)):
        if not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    label = int(index) % len(SHAPES)
    hue, saturation, value, radius, x, y, turn, blend, direction, *dark = np.random.default_rng(int(index)).random(15).tolist()
    fill = np.float32(colorsys.hsv_to_rgb(hue, 0.5 + 0.5 * saturation, 0.85 + 0.15 * value))
    first, second = (np.float32(colorsys.hsv_to_rgb(dark[i], dark[i + 1], 0.3 * dark[i + 2])) for i in (0, 3))
    radius, angle = (9.5 + 4 * radius) / 32, 0.5 * turn - 0.25
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    centre = np.array([12 + 8 * x, 12 + 8 * y]) / 32
    mask = Image.new("L", (4 * size, 4 * size))  # drawn at four times the size, then averaged: smooth edges
    for polygon, ink in zip(outline(SHAPES[label]), (255, 0)):
        ImageDraw.Draw(mask).polygon(((centre + radius * polygon @ rotation) * 4 * size).ravel().tolist(), fill=ink)
    cover = np.asarray(mask.reduce(4), dtype=np.float32)[:, :, None] / 255
    ground = first
    if blend < 0.5:
        ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
        way = 2 * np.pi * direction
        ground = first + (second - first) * (0.5 + (np.cos(way) * ramp + np.sin(way) * ramp[:, None]) / 2**0.5)[:, :, None]
    picture = ground + cover * (fill - ground)  # (size, size, 3) in [0, 1]
    return Image.fromarray((picture * 255 + 0.5).astype(np.uint8)), label
