"""What the scale at which a picture is translated does to it, in scenes whose truth is known.

    python train.py --out runs/demo && python .ci/scale.py runs/demo

Prints the errors of translate.py's ways at four sizes, and draws docs/scale.png.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cyclegan
import train
import translate

HERE = Path(train.__file__).parent
SCENES = [train.draw_scene(np.random.default_rng([3, k])) for k in range(24)]
WAYS = (("apples", "oranges", "AtoB"), ("oranges", "apples", "BtoA"))


def marked(scene, side):
    """Where a fruit has the stem of an apple or the navel of an orange: (side, side) bool."""
    v, u = np.mgrid[:side, :side] / side + 0.5 / side
    marks = np.zeros((side, side), bool)
    for x, y, radius in scene[0]:
        a, b = (u - x) / radius, (v - y) / radius
        stem = (np.abs(a - 0.12 * b - 0.08) < 0.07) & (b < -0.62)
        navel = a**2 + 3 * (b + 0.72) ** 2 < 0.02
        marks = np.where(np.hypot(a, b) < 1, stem | navel, marks)
    return marks


def translated(pictures, run, direction, options):
    """Pictures through the command itself."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "in").mkdir()
        for k, picture in enumerate(pictures):
            (folder / "in" / f"{k:02}.png").write_bytes(cyclegan.png(picture))
        subprocess.run([sys.executable, HERE / "translate.py", folder / "in", "--checkpoint", run,
                        "--direction", direction, "--out", folder / "out", *options],
                       check=True, stdout=subprocess.DEVNULL)
        return [cyclegan.read_picture(path) for path in sorted((folder / "out").iterdir())]


def errors(run):
    """Prints them: at stem and navel, in the whole fruit, and outside of it."""
    for source, target, direction in WAYS:
        for side in (64, 128, 256, 512):
            pictures, truth = ([train.paint(scene, kind, side) for scene in SCENES]
                               for kind in (source, target))
            untranslated = np.abs(np.subtract(pictures, truth, dtype=float))
            fruit = untranslated.any(-1)
            marks = np.stack([marked(scene, side) for scene in SCENES])
            for options in ([], ["--size", "full"]):
                results = translated(pictures, run, direction, options)
                error = np.abs(np.subtract(results, truth, dtype=float))
                parts = [f"{error[part].mean() / untranslated[part].mean():.0%}"
                         for part in (marks, fruit)]
                print(f"{source} to {target}, {side} pixels {' '.join(options):11}: at stem and "
                      f"navel {parts[0]}, inside the fruit {parts[1]}, outside "
                      f"{error[~fruit].mean() / 127.5:.3f}", flush=True)


def draw(run, file, side=256, scene=SCENES[7]):
    """Draws a scene's translations by each way, with titles."""
    columns = ("picture", "at full size", "enlarged", "carried back", "truth")
    cell = side + 6
    sheet = Image.new("RGB", (len(columns) * cell, 26 + len(WAYS) * cell), "white")
    for column, title in enumerate(columns):
        ImageDraw.Draw(sheet).text((column * cell + 3, 3), title, "black",
                                   ImageFont.load_default(17))
    for row, (source, target, direction) in enumerate(WAYS):
        generator = cyclegan.load_generator(run, direction)
        picture = train.paint(scene, source, side)
        small = translate.resize(picture, (generator.config.load_size,) * 2)
        enlarged = translate.resize(cyclegan.translate(generator, small), (side, side))
        shown = (picture, translate.translate_photo(generator, picture, "full"), enlarged,
                 translate.translate_photo(generator, picture), train.paint(scene, target, side))
        for column, each in enumerate(shown):
            sheet.paste(Image.fromarray(each), (column * cell + 3, 26 + row * cell))
    sheet.save(file, optimize=True)


if __name__ == "__main__":
    errors(sys.argv[1])
    draw(sys.argv[1], HERE / "docs" / "scale.png")
