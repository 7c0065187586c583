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

from cyclegan import (UserError, find_pictures, load_generator, out_of_memory, pick, png,
                      read_checkpoint, read_picture, translate, write_file)

PIXELS = 2**20  # at most, of the pictures that pass the network together
AHEAD = 8  # pictures that are read, and as many that are written, while others are translated
SOFTWARE = "cyclegan.py"  # marks results, which alone later calls may replace

def parse():
    parser = argparse.ArgumentParser(usage="translate.py [option ...] [PICTURE_OR_FOLDER ...]",
                                     description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("pictures").add_argument
    add("pictures", nargs="*", type=Path, metavar="PICTURE_OR_FOLDER",
        help="what to translate (default: the pictures that the run learned from)")
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

def newest_run():
    runs = sorted(Path("runs").glob("*/latest.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError("there is no run in runs/; train one, or name a --checkpoint")
    return runs[-1].parent

def trained_on(checkpoint, run, direction):
    """The folder of the pictures from which a run learned to translate in this direction."""
    path = checkpoint if checkpoint.is_file() else checkpoint / "latest.pt"
    try:
        return run / read_checkpoint(path)["place"]["data"][direction == "BtoA"]
    except (LookupError, TypeError, UserError):
        raise UserError(f"{checkpoint} is of no run; name the pictures to translate") from None

def plan(inputs, out):
    """[(source, target)]: folders keep their structure, names end in .png, no target stands twice.

    Raises UserError if an input is missing, or a target is a source or no result of this program.
    """
    pairs, real_out = {}, Path(os.path.realpath(out))
    for given in inputs:
        if not given.exists():
            raise UserError(f"there is no file or folder {given}")
        real = Path(os.path.realpath(given))
        for source in find_pictures(given) if given.is_dir() else [given]:
            if real in real_out.parents and real_out in Path(os.path.realpath(source)).parents:
                continue  # a result of an earlier call
            name = source.relative_to(given) if given.is_dir() else Path(source.name)
            if given.is_dir() and len(inputs) > 1:
                name = real.name / name
            target, number = out / name.with_suffix(".png"), 2
            while str(target).lower() in pairs:  # a.jpg and a.png, or A.jpg where case is nothing
                target, number = out / name.with_name(f"{name.stem}-{number}.png"), number + 1
            pairs[str(target).lower()] = source, target
    sources = {os.path.realpath(source) for source, _ in pairs.values()}
    for _, target in pairs.values():
        if os.path.realpath(target) in sources or target.exists() and not translated(target):
            raise UserError(f"{target} is there, and not from here; choose another --out")
    return [*pairs.values()]

def translated(path):
    """Whether a path is the result of an earlier call, which may be replaced."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:  # the mark stands before the pixels
        return f"Software\0{SOFTWARE}".encode() in file.read(99)

def skip(reason):
    print(f"skipped: {reason}", file=sys.stderr, flush=True)

def write(target, *pictures):
    mark = PngInfo()
    mark.add_text("Software", SOFTWARE)
    write_file(target, [png(np.concatenate(pictures, 1), pnginfo=mark)])
    print(target, flush=True)

def groups(pairs, pool):
    """Yields [(target, picture)] of one size, while threads read the next ones."""
    def read(start):
        return [(target, pool.submit(read_picture, source))
                for source, target in pairs[start:start + AHEAD]]

    coming = read(0)
    for start in range(0, len(pairs), AHEAD):
        some, coming, sizes = coming, read(start + AHEAD), {}
        for target, picture in some:
            try:
                sizes.setdefault(picture.result().shape, []).append((target, picture.result()))
            except UserError as error:
                skip(error)
        for (height, width, _), same in sizes.items():
            most = max(1, PIXELS // (height * width))
            yield from (same[i:i + most] for i in range(0, len(same), most))

def translate_all(generator, precision, pairs, side_by_side):
    """Translates, while threads read what comes next and write what is done. Returns how many."""
    writing, done = deque(), 0
    with ThreadPoolExecutor() as pool:
        for group in groups(pairs, pool):
            targets, pictures = zip(*group)
            try:
                results = translate(generator, np.stack(pictures), precision)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                skip("too large for the memory here: " + ", ".join(map(str, targets)))
                continue
            for target, picture, result in zip(targets, pictures, results):
                writing.append(pool.submit(write, target, *[picture] * side_by_side, result))
                done += 1
            while len(writing) > AHEAD:
                writing.popleft().result()
        for written in writing:
            written.result()
    return done

def main():
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # names may hold what the screen cannot show
    options = parse()
    try:
        device, precision = pick(options.device, options.precision)
        checkpoint = options.checkpoint or newest_run()
        generator = load_generator(checkpoint, options.direction, device)
        run = checkpoint if checkpoint.is_dir() else checkpoint.parent
        home = run if (run / "latest.pt").is_file() else Path()
        out = options.out or home / f"translated-{options.direction}"
        pairs = plan(options.pictures or [trained_on(checkpoint, run, options.direction)], out)
        print(f"{checkpoint} {options.direction} on {device}, {len(pairs)} pictures", flush=True)
        done = translate_all(generator, precision, pairs, options.side_by_side)
    except (UserError, OSError) as error:
        return f"translate.py: {error}"
    except KeyboardInterrupt:
        return "translate.py: stopped; the pictures listed above are done"
    print(f"{done} translated into {out}, {len(pairs) - done} skipped")
    return int(done < len(pairs))

if __name__ == "__main__":
    sys.exit(main())
