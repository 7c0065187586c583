"""Translates pictures with a trained CycleGAN: for each, a PNG of the same size.

    python translate.py                                    the newest run, on its own pictures
    python translate.py photo.jpg folder/ --out there/     your pictures, with the newest run
    python translate.py photos/ --checkpoint horse2zebra/latest_net_G.pth     the authors' weights
"""

import argparse
import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL.PngImagePlugin import PngInfo

import cyclegan
from cyclegan import UserError

PIXELS = 2**20  # at most, of the pictures that pass the network together
AHEAD = 8  # pictures that are read, and as many that are written, while others are translated
SOFTWARE = "cyclegan.py"  # marks our results; only these may be overwritten


def parse():
    parser = argparse.ArgumentParser(usage="translate.py [option ...] [PICTURE_OR_FOLDER ...]",
                                     description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("pictures").add_argument
    add("pictures", nargs="*", type=Path, metavar="PICTURE_OR_FOLDER",
        help="what to translate (default: the pictures that the run was trained on)")
    add("--out", type=Path, metavar="FOLDER",
        help="folder of the results (default: translated-AtoB or -BtoA in the run's folder)")
    add("--side-by-side", action="store_true",
        help="put each picture next to its translation (default: the translation alone)")
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
        return run / cyclegan.read_checkpoint(path)["place"]["data"][direction == "BtoA"]
    except (LookupError, TypeError, UserError):
        raise UserError(f"{checkpoint} is not from a run; name the pictures to translate") from None


def run_folder(checkpoint):
    return checkpoint if checkpoint.is_dir() else checkpoint.parent


def plan(inputs, out):
    """[(source, target)]: folders keep their structure, names end in .png, no two share a target.

    Raises UserError if an input is missing, or if a target is a source, or exists and was not
    written by this program.
    """
    pairs = {}  # by the target in lower case, as some file systems do not tell A.png from a.png
    for given in inputs:
        if not given.exists():
            raise UserError(f"there is no file or folder {given}")
        for source, name in sources(given, within_folder=len(inputs) > 1):
            target, number = out / name.with_suffix(".png"), 2
            while str(target).lower() in pairs:  # as of a.jpg and a.png
                target, number = out / name.with_name(f"{name.stem}-{number}.png"), number + 1
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
            return f"Software\0{SOFTWARE}".encode() in file.read(99)
    except OSError:
        return False


# ---- Translating ---------------------------------------------------------------------------------


def translate_all(generator, precision, pairs, side_by_side):
    """Translates, while threads read what comes next and write what is done. Returns how many."""
    writing, done = deque(), 0
    with ThreadPoolExecutor() as pool:
        for group in groups(pairs, pool):
            targets, pictures = zip(*group)
            try:
                results = cyclegan.translate(generator, np.stack(pictures), precision)
            except (MemoryError, RuntimeError) as error:
                if not cyclegan.out_of_memory(error):
                    raise
                skip("too large for the memory here: " + ", ".join(map(str, targets)))
                continue
            for target, picture, result in zip(targets, pictures, results):
                shown = np.hstack([picture, result]) if side_by_side else result
                writing.append(pool.submit(write, target, shown))
            done += print_written(writing, at_most=AHEAD)
        done += print_written(writing, at_most=0)
    return done


def print_written(writing, at_most):
    """Waits until at_most results are left to be written; prints the others, returns how many."""
    count = 0
    while len(writing) > at_most:
        print(writing.popleft().result(), flush=True)
        count += 1
    return count


def groups(pairs, pool):
    """Yields lists of (target, picture) of one size, while threads read the next ones."""
    def read(start):
        return [(target, pool.submit(cyclegan.read_picture, source))
                for source, target in pairs[start:start + AHEAD]]

    coming = read(0)
    for start in range(0, len(pairs), AHEAD):
        now, coming, sizes = coming, read(start + AHEAD), {}
        for target, picture in now:
            try:
                sizes.setdefault(picture.result().shape, []).append((target, picture.result()))
            except UserError as error:
                skip(error)
        for (height, width, _), same in sizes.items():
            most = max(1, PIXELS // (height * width))
            yield from (same[i:i + most] for i in range(0, len(same), most))


def write(target, picture):
    mark = PngInfo()
    mark.add_text("Software", SOFTWARE)
    cyclegan.write_file(target, [cyclegan.png(picture, pnginfo=mark)])
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
    pairs = plan(inputs, out)
    count = f"{len(pairs)} picture{'' if len(pairs) == 1 else 's'}"
    print(f"{checkpoint} {options.direction} on {device}, {count}", flush=True)
    done = translate_all(generator, precision, pairs, options.side_by_side)
    print(f"{done} translated into {out}, {len(pairs) - done} skipped")
    return int(done < len(pairs))


def main():
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # names may hold what the screen cannot show
    options = parse()
    try:
        return run_program(options)
    except (UserError, OSError) as error:
        return f"translate.py: {error}"
    except KeyboardInterrupt:
        return "translate.py: stopped; the pictures listed above are done"


if __name__ == "__main__":
    sys.exit(main())
