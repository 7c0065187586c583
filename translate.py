"""Translates pictures with a trained CycleGAN: for each, a picture of the same size.

    python translate.py                                    the newest run, on its own pictures
    python translate.py photo.jpg folder/ --out there/     your pictures, with the newest run
    python translate.py photos/ --checkpoint horse2zebra/latest_net_G.pth     the authors' weights

A network recognises things only at the scale it was trained on. So it gets each picture at that
scale, and what it makes of it is carried back to the picture's own size.
"""

import argparse
import io
import os
import shlex
import sys
import time
import warnings
from collections import Counter
from datetime import timedelta
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

import cyclegan
from cyclegan import UserError

AHEAD = 3  # pictures that are read, and as many that are written, while one is translated
RADIUS = 2          # of the windows of carry_back, in pixels of the small picture
EPSILON = 1e-3      # variance of colours on [0, 1] below which a window counts as flat
NOISE = 5 / 255     # a residual of this strength has the weight 1/2 in carry_back


def parse():
    parser = argparse.ArgumentParser(usage="translate.py [option ...] [PICTURE_OR_FOLDER ...]",
                                     description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("pictures").add_argument
    add("pictures", nargs="*", type=Path, metavar="PICTURE_OR_FOLDER",
        help="what to translate (default: the pictures that the run was trained on)")
    add("--out", type=Path, metavar="FOLDER",
        help="folder of the results (default: in the run's folder, as translated-AtoB-200000, "
             "after the direction and the steps of training)")
    add("--overwrite", action="store_true",
        help="make results anew that exist already (default: they stay as they are)")
    add("--format", default="png", choices=("png", "jpg"), help="of the results (default: png)")
    add("--side-by-side", action="store_true",
        help="put each picture next to its translation (default: the translation alone)")
    add("--size", type=shorter_side, metavar="N|full",
        help="shorter side of what the network gets (less for very long pictures), or full: the "
             "picture as it is (default: as in training, 256 for the authors' files)")
    add = parser.add_argument_group("network").add_argument
    add("--checkpoint", type=Path, metavar="RUN_OR_FILE",
        help="a run's folder or one of its .pt files; or the authors' .pth file, or a folder of "
             "them (default: the newest run in runs/)")
    add("--direction", default="AtoB", choices=("AtoB", "BtoA"),
        help="AtoB: with G, BtoA: with F; a single .pth file has only one (default: AtoB)")
    add("--device", default="auto", metavar="auto|cpu|cuda|mps", help="where to compute "
        "(default: cuda if there is one, else cpu)")
    return parser.parse_intermixed_args()


def shorter_side(text):
    if text == "full":
        return text
    if not text.isdecimal() or int(text) < 8:
        raise argparse.ArgumentTypeError(f"must be full or a number of pixels, at least 8, not "
                                         f"{text}")
    return int(text)


# ---- What to translate, and where to -------------------------------------------------------------


def newest_run():
    runs = sorted(Path("runs").glob("*/latest.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError("there is no run in runs/; train one, or name a --checkpoint")
    return runs[-1].parent


def training_pictures(generator, run, direction):
    """The folder whose pictures a run was trained to translate in this direction."""
    if not generator.place.get("data"):
        raise UserError(f"{run} is not a run; name the pictures to translate")
    folder = run / generator.place["data"][direction == "BtoA"]
    if not folder.is_dir():
        raise UserError(f"the pictures of {run} are no longer in {folder}; name others")
    return folder


def folder_of_results(options, run, steps):
    """--out, or a name that says what its results are, so that different ones lie side by side."""
    if options.out and options.out.suffix in cyclegan.SUFFIXES.split():
        raise UserError(f"--out {options.out}: it takes a folder; results have the pictures' names")
    if options.out:
        return options.out
    of = options.checkpoint.stem if steps is None else steps  # the authors' files have no steps
    parts = ["translated", options.direction, of, options.size]
    if options.side_by_side:
        parts.append("side-by-side")
    return run / "-".join(str(part) for part in parts if part not in (None, ""))


def make_folder(out):
    """Makes a folder of results; a new one is marked as such, so that nobody trains on them."""
    if out.is_dir() and any(out.iterdir()):
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / cyclegan.RESULTS).touch()
    except OSError as error:
        raise UserError(f"cannot make the folder {out}: {error.strerror}; choose another --out"
                        ) from None


def plan(inputs, out, suffix=".png"):
    """[(source, target)]: folders keep their structure, no two share a target. Raises UserError.

    Pictures that would, such as a.jpg and a.png, keep their suffixes: a.jpg.png and a.png.png.
    """
    found, pairs = [], []
    for source, name in sources(inputs, out):
        found.append((source, name, str(name.with_suffix("")).lower()))
    stems = Counter(stem for *_, stem in found)
    for source, name, stem in found:
        target = name.with_suffix(suffix) if stems[stem] == 1 else f"{name}{suffix}"
        pairs.append((source, out / target))
    # in lower case, as some file systems do not tell A.png from a.png
    counts = Counter(str(target).lower() for _, target in pairs)
    for source, target in pairs:
        if counts[str(target).lower()] > 1:
            raise UserError(f"{source} and another would both become {target}; give each its own "
                            "--out")
    return pairs


def sources(inputs, out):
    """Yields (picture, its path below `out`) for all arguments. Raises UserError."""
    for given in inputs:
        if not given.exists():
            raise UserError(f"there is no file or folder {given}")
        if not given.is_dir():
            yield given, Path(given.name)
            continue
        if given.resolve() == out.resolve():
            raise UserError(f"--out {out} is the folder of the pictures; choose another")
        below = Path(given.resolve().name if len(inputs) > 1 else "")
        for source in cyclegan.find_pictures(given):
            yield source, below / source.relative_to(given)


def to_make(pairs, overwrite):
    """The pairs whose target is to be made: none that exists, unless told to overwrite.

    Nothing is ever written over a picture that is to be translated itself.
    """
    taken = {file_of(source) for source, _ in pairs}
    return [(source, target) for source, target in pairs if not os.path.lexists(target)
            or overwrite and file_of(target) not in taken]


def file_of(path):
    """What two names of one file have in common, whatever links or a file system do to them."""
    status = os.stat(path) if os.path.exists(path) else os.lstat(path)
    return status.st_dev, status.st_ino


# ---- One picture ---------------------------------------------------------------------------------


def translate_photo(generator, picture, size=None):
    """A picture, (H, W, 3) uint8, translated at the scale of training -> the same shape.

    generator: from cyclegan.load_generator. size: another shorter side for what it gets, or
    "full": the picture as it is. If that is less than the picture, its result is carried back to
    the picture's size; if more, resized. Raises ValueError for another array or size, or for a
    generator without the .config that says the scale, if no size does.
    """
    picture = np.asarray(picture)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise ValueError("picture must be (H, W, 3) uint8, as read_picture returns it, not "
                         f"{picture.shape} {picture.dtype}")
    if size not in (None, "full") and not (isinstance(size, Integral) and size >= 8):
        raise ValueError(f'size must be "full" or a number of pixels, at least 8, not {size!r}')
    if size is None and not hasattr(generator, "config"):
        raise ValueError("load_generator(...) returns generators that know their scale; give this "
                         'one a size, a number of pixels or "full"')
    if size == "full":
        return cyclegan.translate(generator, picture)
    config, (height, width) = getattr(generator, "config", None), picture.shape[:2]
    side = size or (config.load_size if config else 256)
    squash = config is not None and config.squash
    small = resize(picture, cyclegan.scaled_size(width, height, side, squash, limited=True))
    translated = cyclegan.translate(generator, small)
    if small.size < picture.size:
        return carry_back(picture, small, translated)
    return resize(translated, (width, height))


def resize(picture, size):
    """As in training. A picture that has the size already stays as it is, byte for byte."""
    return np.array(Image.fromarray(picture).resize(size, Image.BICUBIC))


def carry_back(picture, small, translated, strip=256):
    """A translation made at a small size, at the size of the picture: its colours, its edges.

    picture: (H, W, 3); small: as the network saw it; translated: what it made of that; all uint8.
    Around each pixel of `small` the translation is taken for an affine map of its colours, which
    is applied to the picture (a guided filter: He, Sun, Tang, TPAMI 2013, with colour guidance;
    in small: He, Sun, arXiv 1505.00996). The residual, new texture or the network's noise, is added
    with the weight s^4 / (s^4 + NOISE^4); s is its strength after a blur.
    """
    source, result = to_unit(small), to_unit(translated)
    maps = colour_maps(source, result)
    residual = result - recolour(maps, source)
    texture = mean(residual, 1)  # where a checkerboard cancels
    strength = mean(texture.square().mean(1, keepdim=True), 1) / NOISE**2
    maps[:, 9:] += residual * strength**2 / (1 + strength**2)

    height, width = picture.shape[:2]
    out = np.empty_like(picture)
    u = (2 * torch.arange(width) + 1) / width - 1  # centres of the pixels, on [-1, 1]
    v = (2 * torch.arange(height) + 1) / height - 1
    for top in range(0, height, strip):
        here = slice(top, top + strip)
        grid = torch.stack(torch.meshgrid(u, v[here], indexing="xy"), -1)[None]
        enlarged = functional.grid_sample(maps, grid, padding_mode="border", align_corners=False)
        colours = recolour(enlarged, to_unit(picture[here]))[0].permute(1, 2, 0)
        out[here] = (colours.clamp(0, 1) * 255).round().numpy()
    return out


def colour_maps(source, result):
    """A (3 x 3) and b around each pixel such that A source + b is near result. -> (1, 12, h, w)

    Where a window is flat, A is drawn to that of the whole picture: fine detail, which the small
    picture may lack, so changes as the rest does.
    """
    def whole(h):
        return h.mean((2, 3), keepdim=True)

    def window(h):
        return mean(h, RADIUS)

    one = torch.eye(3)
    A = torch.linalg.solve(covariance(source, source, whole) + 1e-5 * one,
                           covariance(result, source, whole), left=False)
    A = torch.linalg.solve(covariance(source, source, window) + EPSILON * one,
                           covariance(result, source, window) + EPSILON * A, left=False)
    A = A.permute(0, 3, 4, 1, 2)
    b = window(result) - (A * window(source)[:, None]).sum(2)
    return window(torch.cat([A.flatten(1, 2), b], 1))


def recolour(maps, source):
    """A source + b, pixel by pixel. (1, 12, H, W), (1, 3, H, W) -> (1, 3, H, W)"""
    return (maps[:, :9].unflatten(1, (3, 3)) * source[:, None]).sum(2) + maps[:, 9:]


def covariance(a, b, average):
    """Of each channel of a with each of b. (1, 3, h, w) twice -> (1, h', w', 3, 3)"""
    products = average((a[:, :, None] * b[:, None]).flatten(1, 2)).unflatten(1, (3, 3))
    return (products - average(a)[:, :, None] * average(b)[:, None]).permute(0, 3, 4, 1, 2)


def mean(h, radius):
    """Over windows of 2 radius + 1 squared, cut off at the borders. (1, C, h, w) -> the same"""
    return functional.avg_pool2d(h, 2 * radius + 1, 1, radius, count_include_pad=False)


def to_unit(picture):
    """(H, W, 3) uint8 -> (1, 3, H, W) on [0, 1]"""
    return torch.tensor(picture).permute(2, 0, 1)[None].float() / 255


# ---- All of them ---------------------------------------------------------------------------------


def translate_all(generator, pairs, options):
    """Yields (target, result) of each picture that can be read, while threads read the next."""
    titles = ("x", "G(x)") if options.direction == "AtoB" else ("y", "F(y)")
    for (source, target), reading in cyclegan.in_threads(read, pairs, AHEAD):
        try:
            picture = reading.result()
            result = translate_photo(generator, picture, options.size)
            if options.side_by_side:
                result = cyclegan.titled(np.hstack([picture, result]), titles)
        except Exception as error:
            skip(error, source)
            continue
        yield target, result


def read(pair):
    return cyclegan.read_picture(pair[0])


def write(target_and_result):
    """Writes a picture in the format of its target's suffix. Raises UserError."""
    target, picture = target_and_result
    if target.suffix == ".jpg" and max(picture.shape) > 65500:
        raise UserError(f"{target}: a JPEG has at most 65,500 pixels a side; use --format png")
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG" if target.suffix == ".jpg" else "PNG", quality=95)
    cyclegan.write_file(target, file.getbuffer())


def say(line):
    try:
        print(line, flush=True)
    except OSError:  # whoever read it has gone; that must not end the work
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def skip(error, path):
    """Says why one picture of many is skipped. Raises an error that is about more than that."""
    if cyclegan.out_of_memory(error):
        error = f"too large for the memory here: {path}; a lower --size takes less"
    elif isinstance(error, OSError):
        error = f"cannot write {path}: {error}"
    elif not isinstance(error, UserError):
        raise error
    print(f"skipped: {error}", file=sys.stderr, flush=True)


def run_program(options):
    """Does what the command line says. Returns the exit status."""
    device, _ = cyclegan.choose_device(options.device)
    checkpoint = options.checkpoint or newest_run()
    generator = cyclegan.load_generator(checkpoint, options.direction, device)
    run = checkpoint if checkpoint.is_dir() else checkpoint.parent
    out = folder_of_results(options, run, generator.steps)
    inputs = options.pictures or [training_pictures(generator, run, options.direction)]
    planned = plan(inputs, out, f".{options.format}")
    pairs = to_make(planned, options.overwrite)
    make_folder(out)
    trained = f"at step {generator.steps}" if generator.config else "step unknown"
    say(f"{checkpoint}, {trained}, {options.direction} on {device}, pictures: {len(planned):,}")
    if len(pairs) < len(planned):
        how = "" if options.overwrite else "; --overwrite makes them anew"
        say(f"{len(planned) - len(pairs):,} files with these names exist in {out} and are kept, "
            f"whatever made them{how}")
    if not generator.config and not options.size:
        say("note: these weights do not say at what scale they were trained; 256 pixels are "
            "assumed, --size sets another; of a single file --direction only names the results")
    done, start = 0, time.perf_counter()
    results = translate_all(generator, pairs, options)
    for seen, ((target, _), writing) in enumerate(cyclegan.in_threads(write, results, AHEAD), 1):
        try:
            writing.result()
        except Exception as error:
            skip(error, target)
            continue
        done += 1
        left = (time.perf_counter() - start) / seen * (len(pairs) - seen)
        say(f"{done:,} of {len(pairs):,}, {timedelta(seconds=round(left))} left: {target}")
    say(f"{done:,} translated into {out}, {len(pairs) - done:,} skipped")
    return int(done < len(pairs))


def main():
    if hasattr(sys.stdout, "reconfigure"):  # notebooks replace stdout
        sys.stdout.reconfigure(errors="replace")  # names may hold what the screen cannot show
    warnings.showwarning = lambda warning, *_: print(f"note: {warning}", file=sys.stderr)
    options = parse()
    try:
        return run_program(options)
    except (UserError, OSError) as error:
        return f"translate.py: {error}"
    except KeyboardInterrupt:
        then = "begin again" if options.overwrite else "go on"
        return f"translate.py: stopped; to {then}: python translate.py {shlex.join(sys.argv[1:])}"


if __name__ == "__main__":
    sys.exit(main())
