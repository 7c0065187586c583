"""Translates pictures with a trained CycleGAN: for each, a picture of the same size.

    python translate.py                                    the newest run, on its own pictures
    python translate.py photo.jpg folder/ --out there/     your pictures, with the newest run
    python translate.py photos/ --checkpoint horse2zebra/latest_net_G.pth     the authors' weights

A network knows things at the size at which it learned them. So it gets each picture at the scale
of training, and what it makes of it is carried back to the picture's own size.
"""

import argparse
import io
import os
import sys
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch.nn import functional

import cyclegan
from cyclegan import UserError

AHEAD = 3  # pictures that are read, and as many that are written, while one is translated
SOFTWARE = "cyclegan.py"  # marks our results; only these may be overwritten
RADIUS = 2          # of the windows of carry_back, in pixels of the small picture
EPSILON = 1e-3      # variance of colours on [0, 1] below which a window counts as flat
NOISE = 5 / 255     # as strong as this, the rest in carry_back counts half


def parse():
    parser = argparse.ArgumentParser(usage="translate.py [option ...] [PICTURE_OR_FOLDER ...]",
                                     description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("pictures").add_argument
    add("pictures", nargs="*", type=Path, metavar="PICTURE_OR_FOLDER",
        help="what to translate (default: the pictures that the run was trained on)")
    add("--out", type=Path, metavar="FOLDER",
        help="folder of the results (default: translated-AtoB or -BtoA in the run's folder)")
    add("--format", default="png", choices=("png", "jpg"), help="of the results (default: png)")
    add("--side-by-side", action="store_true",
        help="put each picture next to its translation (default: the translation alone)")
    add("--size", type=shorter_side, metavar="N|full",
        help="shorter side of what the network gets, or full: the picture as it is (default: as in "
             "training, 256 for the authors' files)")
    add = parser.add_argument_group("network").add_argument
    add("--checkpoint", type=Path, metavar="RUN_OR_FILE",
        help="a run's folder or one of its .pt files; or the authors' .pth file, or a folder of "
             "them (default: the newest run in runs/)")
    add("--direction", default="AtoB", choices=("AtoB", "BtoA"),
        help="AtoB: with G, BtoA: with F; a single .pth file has only one (default: AtoB)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"),
        help="where to compute (default: cuda if there is one, else cpu)")
    add("--precision", default="auto", choices=("auto", "fp32", "bf16"),
        help="arithmetic of the network (default: bf16 on a CUDA GPU that has it, else fp32)")
    return parser.parse_args()


def shorter_side(text):
    if text == "full":
        return text
    if not text.isdecimal() or int(text) < 8:
        raise argparse.ArgumentTypeError(f"must be full or a number of pixels, not {text}")
    return int(text)


# ---- What to translate, and where to -------------------------------------------------------------


def newest_run():
    runs = sorted(Path("runs").glob("*/latest.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError("there is no run in runs/; train one, or name a --checkpoint")
    return runs[-1].parent


def training_pictures(checkpoint, direction):
    """The folder whose pictures a run was trained to translate in this direction."""
    run = run_folder(checkpoint)
    path = checkpoint if checkpoint.is_file() else checkpoint / "latest.pt"
    try:
        folder = run / cyclegan.read_checkpoint(path)["place"]["data"][direction == "BtoA"]
    except (LookupError, TypeError, UserError):
        raise UserError(f"{checkpoint} is not from a run; name the pictures to translate") from None
    if not folder.is_dir():
        raise UserError(f"the pictures of {run} are no longer in {folder}; name others")
    return folder


def run_folder(checkpoint):
    return checkpoint if checkpoint.is_dir() else checkpoint.parent


def plan(inputs, out, suffix=".png"):
    """[(source, target)]: folders keep their structure, no two share a target.

    Raises UserError if an input is missing, or if a target is a source, or exists and was not
    written by this program.
    """
    pairs = {}  # by the target in lower case, as some file systems do not tell A.png from a.png
    for given in inputs:
        if not given.exists():
            raise UserError(f"there is no file or folder {given}")
        for source, name in sources(given, within_folder=len(inputs) > 1):
            target, number = out / name.with_suffix(suffix), 2
            while str(target).lower() in pairs:  # as of a.jpg and a.png
                target = out / name.with_name(f"{name.stem}-{number}{suffix}")
                number += 1
            pairs[str(target).lower()] = source, target
    taken = {os.path.realpath(source) for source, _ in pairs.values()}
    for _, target in pairs.values():
        if os.path.realpath(target) in taken:
            raise UserError(f"{target} is itself to be translated; choose another --out")
        if target.exists() and not is_result(target):
            raise UserError(f"{target} exists and was not written by translate.py; choose another "
                            "--out")
    return list(pairs.values())


def sources(given, within_folder):
    """Yields (picture, its path below --out) for an argument.

    Results of earlier calls are left out of a folder, unless it holds nothing else.
    """
    if not given.is_dir():
        yield given, Path(given.name)
        return
    found = cyclegan.find_pictures(given)
    for source in [path for path in found if not is_result(path)] or found:
        name = source.relative_to(given)
        yield source, Path(os.path.realpath(given)).name / name if within_folder else name


def is_result(path):
    """Whether a path is the result of an earlier call, which may be replaced."""
    if not path.is_file():
        return False
    try:
        with open(path, "rb") as file:  # the mark stands before the pixels
            head = file.read(99)
        return head.startswith((b"\x89PNG", b"\xff\xd8")) and SOFTWARE.encode() in head
    except OSError:
        return False


# ---- One picture ---------------------------------------------------------------------------------


def translate_photo(generator, picture, size=None, precision="fp32"):
    """A picture, (H, W, 3) uint8, translated at the scale of training -> the same shape.

    generator: from cyclegan.load_generator. size: another shorter side for what it gets, or
    "full": the picture as it is. If that is less than the picture, its result is carried back to
    the picture's size; if more, resized. Raises ValueError for another array, or for a generator
    without the .config that says the scale, if no size does.
    """
    picture = np.ascontiguousarray(picture)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise ValueError(f"picture must be (H, W, 3) uint8, not {picture.shape} {picture.dtype}")
    if not hasattr(generator, "config") and size is None:
        raise ValueError("load_generator(...) returns generators that know their scale; give this "
                         'one a size, a number of pixels or "full"')
    if size == "full":
        return cyclegan.translate(generator, picture, precision)
    config, (height, width) = getattr(generator, "config", None), picture.shape[:2]
    side = size or (config.load_size if config else 256)
    squash = config is not None and config.squash
    small_size = cyclegan.scaled_size(width, height, side, squash, at_once=True)
    small = resize(picture, small_size)
    translated = cyclegan.translate(generator, small, precision)
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
    in small: He, Sun, arXiv 1505.00996). What no such map explains, new texture or the network's
    noise, is added with the weight s^4 / (s^4 + NOISE^4); s is its strength after a blur.
    """
    source, result = to_unit(small), to_unit(translated)
    maps = colour_maps(source, result)
    rest = result - recolour(maps, source)
    texture = mean(rest, 1)  # where a checkerboard cancels
    strength = mean(texture.square().mean(1, keepdim=True), 1) / NOISE**2
    maps[:, 9:] += rest * strength**2 / (1 + strength**2)

    height, width = picture.shape[:2]
    out = np.empty_like(picture)
    u = (2 * torch.arange(width) + 1) / width - 1  # centres of the pixels, on [-1, 1]
    v = (2 * torch.arange(height) + 1) / height - 1
    for top in range(0, height, strip):
        here = slice(top, top + strip)
        grid = torch.stack(torch.meshgrid(u, v[here], indexing="xy"), -1)[None]
        enlarged = functional.grid_sample(maps, grid, padding_mode="border", align_corners=False)
        colours = recolour(enlarged, to_unit(picture[here]))[0].permute(1, 2, 0)
        out[here] = (colours.clamp(0, 1) * 255).round()
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


def translate_all(generator, pairs, options, precision):
    """Translates, while threads read what comes next and write what is done. Returns how many."""
    writing, done = deque(), 0
    with ThreadPoolExecutor() as pool:
        for source, target, reading in read_ahead(pairs, pool):
            try:
                picture = reading.result()
                result = translate_photo(generator, picture, options.size, precision)
            except UserError as error:
                skip(error)
                continue
            except (MemoryError, RuntimeError) as error:
                if not cyclegan.out_of_memory(error):
                    raise
                skip(f"too large for the memory here: {source}; a lower --size takes less")
                continue
            if options.side_by_side:
                titles = ("x", "G(x)") if options.direction == "AtoB" else ("y", "F(y)")
                result = cyclegan.titled(np.hstack([picture, result]), titles)
            writing.append(pool.submit(write, target, result))
            done += print_written(writing, at_most=AHEAD)
        done += print_written(writing, at_most=0)
    return done


def read_ahead(pairs, pool):
    """Yields (source, target, future of the picture) while threads read the next ones."""
    coming = deque()
    for source, target in pairs:
        coming.append((source, target, pool.submit(cyclegan.read_picture, source)))
        if len(coming) > AHEAD:
            yield coming.popleft()
    while coming:
        yield coming.popleft()


def print_written(writing, at_most):
    """Waits until at_most results are left to be written; prints the others, returns how many."""
    count = 0
    while len(writing) > at_most:
        print(writing.popleft().result(), flush=True)
        count += 1
    return count


def write(target, picture):
    """Writes a result in the format of its suffix, marked as ours."""
    if target.suffix == ".jpg" and max(picture.shape) > 65500:
        raise UserError(f"{target}: a JPEG has at most 65,500 pixels a side; use --format png")
    if target.suffix == ".jpg":
        mark = Image.Exif()
        mark[0x0131] = SOFTWARE  # the tag Software
        options = {"format": "JPEG", "quality": 95, "exif": mark}
    else:
        mark = PngInfo()
        mark.add_text("Software", SOFTWARE)
        options = {"format": "PNG", "pnginfo": mark}
    file = io.BytesIO()
    Image.fromarray(picture).save(file, **options)
    cyclegan.write_file(target, [file.getvalue()])
    return target


def skip(reason):
    print(f"skipped: {reason}", file=sys.stderr, flush=True)


def run_program(options):
    """Does what the command line says. Returns the exit status."""
    device, precision = cyclegan.choose_device(options.device, options.precision)
    checkpoint = options.checkpoint or newest_run()
    generator = cyclegan.load_generator(checkpoint, options.direction, device)
    run = run_folder(checkpoint)
    home = run if (run / "latest.pt").is_file() else Path()
    out = options.out or home / f"translated-{options.direction}"
    inputs = options.pictures or [training_pictures(checkpoint, options.direction)]
    pairs = plan(inputs, out, f".{options.format}")
    count = f"{len(pairs)} picture{'' if len(pairs) == 1 else 's'}"
    print(f"{checkpoint} {options.direction} on {device}, {count}", flush=True)
    for folder in filter(Path.is_dir, inputs):
        ignored = cyclegan.ignored_files(folder)
        if ignored:
            print(f"{folder}: ignored: {ignored}")
    done = translate_all(generator, pairs, options, precision)
    print(f"{done} translated into {out}, {len(pairs) - done} skipped")
    return int(done < len(pairs))


def main():
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # names may hold what the screen cannot show
    warnings.showwarning = lambda warning, *_: print(f"note: {warning}", file=sys.stderr)
    options = parse()
    try:
        return run_program(options)
    except (UserError, OSError) as error:
        return f"translate.py: {error}"
    except KeyboardInterrupt:
        return "translate.py: stopped; the pictures listed above are done"


if __name__ == "__main__":
    sys.exit(main())
