"""Draws pictures of docs/ from finished runs of the demo, and prints what stands beside them.

    python .ci/figures.py why BOTH NO_CYCLE CYCLE     what each half of the method is for
    python .ci/figures.py scale RUN                   ways to translate large scenes; their errors

BOTH was trained with --lambda-identity 0, NO_CYCLE with --lambda-forward 0 --lambda-backward 0, and
CYCLE, the cycle alone, with --lambda-gan 0 --lambda-identity 0.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import cyclegan  # noqa: E402
import train  # noqa: E402
import translate  # noqa: E402
from demo import scenes  # noqa: E402

SCENES = [scenes.draw_scene(np.random.default_rng([3, k])) for k in range(24)]
WAYS = (("apples", "oranges", "AtoB"), ("oranges", "apples", "BtoA"))


def framed(pictures):
    """Pictures of one size in a row, in white frames."""
    return np.hstack([np.pad(p, ((3, 3), (3, 3), (0, 0)), constant_values=255) for p in pictures])


def why(both, no_cycle, cycle, scene=SCENES[7], factor=2):
    """x, G(x), F(G(x)) of one scene with each of three runs, pixels enlarged by a factor."""
    rows = []
    for title, run in (("adversarial loss and cycle", both),
                       ("the adversarial loss alone", no_cycle), ("the cycle alone", cycle)):
        G, F = (cyclegan.load_generator(run, direction) for *_, direction in WAYS)
        x = scenes.paint(scene, "apples", G.config.load_size)
        fake_y = cyclegan.translate(G, x)
        shown = (x, fake_y, cyclegan.translate(F, fake_y))
        row = framed(p.repeat(factor, 0).repeat(factor, 1) for p in shown)
        rows.append(cyclegan.with_titles(row, [title]))
    return cyclegan.with_titles(np.vstack(rows), train.TITLES[:3])


def resized(picture, side):
    return np.array(Image.fromarray(picture).resize((side, side), Image.BICUBIC))


def scale(run, side=256, scene=SCENES[7]):
    """A scene's translations at full size, enlarged, and by translate.py. Prints the errors."""
    rows = []
    for source, target, direction in WAYS:
        generator = cyclegan.load_generator(run, direction)
        print_errors(generator, source, target)
        x, truth = (scenes.paint(scene, kind, side) for kind in (source, target))
        small = resized(x, generator.config.load_size)
        enlarged = resized(cyclegan.translate(generator, small), side)
        rows.append(framed([x, translate.translate_photo(generator, x, "full"), enlarged,
                            translate.translate_photo(generator, x), truth]))
    titles = ("picture", "at full size", "enlarged", "translate.py", "truth")
    return cyclegan.with_titles(np.vstack(rows), titles)


def print_errors(generator, source, target):
    """In scenes of 64 to 512 pixels: at stem and navel / in the fruit, in % / outside of it."""
    for size in (None, "full"):
        line = f"| {source} to {target}{', --size full' if size else ''} |"
        for side in (64, 128, 256, 512):
            pictures, truth = (np.stack([scenes.paint(scene, kind, side) for scene in SCENES])
                               for kind in (source, target))
            results = [translate.translate_photo(generator, each, size) for each in pictures]
            before, after = (np.abs(np.subtract(each, truth, dtype=float))
                             for each in (pictures, results))
            fruit = before.any(-1)
            for part in (np.stack([marked(scene, side) for scene in SCENES]), fruit):
                line += f" {100 * after[part].mean() / before[part].mean():.0f} /"
            line += f" {after[~fruit].mean() / 127.5:.3f} |"
        print(line, flush=True)


def marked(scene, side):
    """Where a fruit has the stem of an apple or the navel of an orange: (side, side) bool."""
    v, u = np.mgrid[:side, :side] / side + 0.5 / side
    marks = np.zeros((side, side), bool)
    for x, y, radius, *_ in scene[0]:
        a, b = (u - x) / radius, (v - y) / radius
        stem = (np.abs(a - 0.12 * b - 0.08) < 0.07) & (b < -0.62)
        navel = a**2 + 3 * (b + 0.72) ** 2 < 0.02
        marks = np.where(np.hypot(a, b) < 1, stem | navel, marks)
    return marks


if __name__ == "__main__":
    name, *runs = sys.argv[1:]
    picture = {"why": why, "scale": scale}[name](*runs)
    (HERE / "docs" / f"{name}.png").write_bytes(cyclegan.png(picture))
