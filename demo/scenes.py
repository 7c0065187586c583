"""Scenes of the demo: drawn apples and oranges, and how good their translations are.

Any scene can be painted with either fruit. So, unlike with photographs, it is known what a
translation should look like.
"""

import numpy as np

import cyclegan

SETTINGS = {"image_size": 64, "width": 16, "blocks": 2, "lambda_identity": 1.0,
            "lr": 1e-3, "epochs": 2, "decay_epochs": 6}
FOLDERS = ["pictures/apples", "pictures/oranges"]  # of A and B, in the run's folder
PORES = 64 / 6  # of an orange, across a picture: 6 pixels apart at 64


# ---- Drawing -------------------------------------------------------------------------------------


def draw_scene(rng):
    """One or two fruits, the direction of the light, and the colours of the wall and the table.

    A fruit is x, y, radius (parts of the picture's side) and two phases of its pores; the last one
    stands in front. Wall and table are always the same ones, in slightly different light.
    """
    fruits = [rng.uniform([0.3, 0.35, 0.23, 0, 0], [0.7, 0.65, 0.32, 1, 1])]
    if rng.random() < 0.5:
        beside = fruits[0][0] + (0.45 if fruits[0][0] < 0.5 else -0.45)
        fruits.insert(0, [beside, *rng.uniform([0.3, 0.14, 0, 0], [0.7, 0.2, 1, 1])])
    light = rng.uniform([-0.6, -0.8], [0.6, -0.3])
    wall = np.array([0.90, 0.70, 0.45]) * rng.uniform(0.96, 1.04, 3)
    table = np.array([0.60, 0.38, 0.20]) * rng.uniform(0.95, 1.05, 3)
    return fruits, light, wall, table


def on_fruit(fruit, light, side):
    """Coordinates in the picture, coordinates on the fruit (a unit disc), its shading, its gloss.

    Returns u, v, a, b, lit, gloss, which broadcast to (side, side, 1).
    """
    x, y, radius = fruit[:3]
    v, u = np.mgrid[:side, :side, :1][:2] / side + 0.5 / side
    a, b = (u - x) / radius, (v - y) / radius
    lit = np.sqrt((1 - a * a - b * b).clip(0)) + a * light[0] + 1.1 * b * light[1]
    gloss = (1 - ((a - 0.5 * light[0]) ** 2 + (b - 0.55 * light[1]) ** 2) / 0.09).clip(0)
    return u, v, a, b, lit, gloss


def paint(scene, kind, side):
    """A scene with "apples" or with "oranges"; all else is the same. (side, side, 3) uint8"""
    fruits, light, wall, table = scene
    v = np.mgrid[:side, :side, :1][0] / side + 0.5 / side
    picture = np.where(v < 0.6, wall * (1.1 - 0.3 * v), table * (0.7 + 0.4 * v))
    for fruit in fruits:
        u, v, a, b, lit, gloss = on_fruit(fruit, light, side)
        shadow = np.exp(-((a - 0.1 * light[0]) / 1.1) ** 2 - ((b - 0.95) / 0.25) ** 2)
        picture *= 1 - 0.45 * shadow
        shade = 0.35 + 0.4 * lit.clip(0, 2)
        if kind == "apples":
            ripe = ((b + 0.95) / 0.4).clip(0, 1)  # green-yellow around the stem, red below
            skin = ([0.75, 0.62, 0.15] + [-0.10, -0.59, -0.07] * ripe) * shade + 0.65 * gloss
            mark = (np.abs(a - 0.12 * b - 0.08) < 0.07) & (b < -0.62)  # the stem
            colour = [0.30, 0.18, 0.06]
        else:
            across = np.sin(2 * np.pi * (PORES * u + fruit[3]))
            pores = across * np.sin(2 * np.pi * (PORES * v + fruit[4]))
            skin = ([1.0, 0.55, 0.04] + [0.045, 0.15, 0] * pores) * shade + 0.2 * gloss
            mark = a**2 + 3 * (b + 0.72) ** 2 < 0.02  # the navel
            colour = [0.25, 0.38, 0.08]
        edge = ((1 - np.hypot(a, b)) * fruit[2] * side + 0.5).clip(0, 1)  # anti-aliased
        picture += (np.where(mark, colour, skin) - picture) * edge
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)


def draw_pictures(folder, side, count=200):
    """Writes the demo's pictures into a run's folder. A and B show different scenes."""
    for domain, name in enumerate(FOLDERS):
        for i in range(count):
            path = folder / name / f"{i:03}.png"
            scene = draw_scene(np.random.default_rng([domain, i]))
            cyclegan.write_file(path, cyclegan.png(paint(scene, path.parent.name, side)))


# ---- Measuring -----------------------------------------------------------------------------------


def pore_strength(pictures, drawn_scenes):
    """The amplitude of the pores' pattern in the front fruit, whatever its phase: a median.

    A least-squares fit of four phases of the pattern and a quadratic, which takes up the shading,
    inside the lit part of the fruit, away from gloss and navel.
    """
    amplitudes = []
    for picture, (fruits, light, _, _) in zip(pictures, drawn_scenes, strict=True):
        u, v, a, b, lit, gloss = on_fruit(fruits[-1], light, len(picture))
        s, t = 2 * np.pi * PORES * u, 2 * np.pi * PORES * v
        inside = (np.hypot(a, b) < 0.8) & (b > -0.45) & (gloss == 0) & (lit > 0.2)
        terms = [np.sin(s) * np.sin(t), np.sin(s) * np.cos(t),
                 np.cos(s) * np.sin(t), np.cos(s) * np.cos(t),
                 np.ones_like(a), a, b, a * a, a * b, b * b]
        terms = [np.broadcast_to(term, inside.shape)[inside] for term in terms]
        grey = picture.mean(-1, keepdims=True)[inside]
        weights = np.linalg.lstsq(np.stack(terms, 1), grey, rcond=None)[0]
        amplitudes.append(np.linalg.norm(weights[:4]))
    return np.median(amplitudes)


def errors(fakes, source, truth):
    """Mean errors of translations: in the fruit, as a part of the source's there; elsewhere."""
    fruit = (source != truth).any(-1)
    untranslated = np.abs(np.subtract(source, truth, dtype=float))
    error = np.abs(np.subtract(fakes, truth, dtype=float))
    return error[fruit].mean() / untranslated[fruit].mean(), error[~fruit].mean() / 127.5


def evaluate(model, log, count=32):
    """Says how close translations of scenes that were not trained on come to the truth."""
    side = model.config.load_size
    scenes = [draw_scene(np.random.default_rng([2, k])) for k in range(count)]
    apples = np.stack([paint(scene, "apples", side) for scene in scenes])
    oranges = np.stack([paint(scene, "oranges", side) for scene in scenes])
    full = pore_strength(oranges, scenes)
    for title, network, source, truth, goal in (
            ("apples to oranges", model.G, apples, oranges, "100%"),
            ("oranges to apples", model.F, oranges, apples, "0%")):
        fakes = np.stack([cyclegan.translate(network, picture) for picture in source])
        inside, outside = errors(fakes, source, truth)
        log(f"{title}, {count} held-out scenes: error in the fruit {inside:.0%} of the "
            f"untranslated picture's, elsewhere {outside:.3f} on [-1, 1]; pores "
            f"{pore_strength(fakes, scenes) / full:.0%} of a true orange's (should be {goal})")
    log("The program painted these scenes with either fruit, so it knows what a translation "
        "should look like.")
