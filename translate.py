"""Translates pictures with a trained CycleGAN: for each, a PNG of the same size.

    python translate.py                                    the newest run, on its own pictures
    python translate.py photo.jpg folder/ --out there/     your pictures, with the newest run
    python translate.py photos/ --checkpoint horse2zebra/latest_net_G.pth     the authors' weights
"""

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from cyclegan import (SOFTWARE, UserError, find_pictures, load_generator, pick_device, png,
                      read_checkpoint, read_picture, translate, write_file)

PIXELS = 2**20  # at most, of the pictures that pass the network together
READ_AHEAD = 16  # pictures in memory

def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("pictures", nargs="*", type=Path, metavar="PICTURE_OR_FOLDER",
        help="what to translate (default: the pictures that the run learned from)")
    add("--checkpoint", type=Path, metavar="RUN_OR_FILE",
        help="a run's folder or one of its .pt files; or the authors' .pth file, or a folder of "
             "them (default: the newest run in runs/)")
    add("--direction", default="AtoB", choices=("AtoB", "BtoA"),
        help="which of its two ways a run translates (default: AtoB)")
    add("--out", type=Path, metavar="FOLDER",
        help="folder of the results (default: translated-AtoB or -BtoA in the run's folder)")
    add("--side-by-side", action="store_true", help="put each picture next to its translation")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"),
        help="where to compute (default: cuda if there is one, else cpu)")
    return parser.parse_args()

def newest_run():
    runs = sorted(Path("runs").glob("*/latest.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError("there is no run in runs/; train one, or name a --checkpoint")
    return runs[-1].parent

def trained_on(checkpoint, run, direction):
    """The folder of the pictures from which a run learned to translate in this direction."""
    path = checkpoint if checkpoint.is_file() else checkpoint / "latest.pt"
    saved = read_checkpoint(path) if path.is_file() else {}
    try:
        return run / saved["place"]["data"][direction == "BtoA"]
    except (IndexError, KeyError, TypeError):
        raise UserError(f"{checkpoint} is of no run; name the pictures to translate") from None

def plan(inputs, out):
    """[(source, target)]: folders keep their structure, names end in .png, no target stands twice.

    Raises UserError if an input is missing, or a target is a source or no result of this program.
    """
    pairs, taken = [], set()
    for given in inputs:
        if not given.exists():
            raise UserError(f"there is no file or folder {given}")
        real_out = Path(os.path.realpath(out))
        within = Path(os.path.realpath(given)) in real_out.parents  # with results of earlier calls
        for source in find_pictures(given) if given.is_dir() else [given]:
            if within and real_out in Path(os.path.realpath(source)).parents:
                continue
            name = Path(source.name)
            if given.is_dir():
                root = os.path.basename(os.path.realpath(given)) if len(inputs) > 1 else ""
                name = Path(root, source.relative_to(given))
            target, number = out / name.with_suffix(".png"), 2
            while str(target).lower() in taken:  # a.jpg and a.png, or A.jpg where case is nothing
                target, number = out / name.with_name(f"{name.stem}-{number}.png"), number + 1
            taken.add(str(target).lower())
            pairs.append((source, target))
    sources = {os.path.realpath(source) for source, _ in pairs}
    for _, target in pairs:
        if os.path.realpath(target) in sources or target.exists() and not translated(target):
            raise UserError(f"{target} is there, and not from here; choose another --out")
    return pairs

def translated(path):
    """Whether a file is the result of an earlier call, which may be replaced."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE
    except OSError:
        return False

def skip(reason):
    print(f"skipped: {reason}", file=sys.stderr, flush=True)

def translate_group(generator, group, side_by_side):
    """Writes the translations of [(target, picture)], all of one size. Returns how many."""
    targets, pictures = zip(*group)
    try:
        results = translate(generator, np.stack(pictures))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        skip(f"too large for the memory here: {', '.join(map(str, targets))}")
        return 0
    for target, picture, result in zip(targets, pictures, results):
        write_file(target, [png(np.concatenate([picture, result], 1) if side_by_side else result)])
        print(target, flush=True)
    return len(group)

def translate_all(generator, pairs, side_by_side):
    """Reads by threads, a few pictures at a time, and translates together what has one size."""
    done = 0
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(pairs), READ_AHEAD):
            some, sizes = pairs[start:start + READ_AHEAD], {}
            for picture, (_, target) in zip([pool.submit(read_picture, s) for s, _ in some], some):
                try:
                    sizes.setdefault(picture.result().shape, []).append((target, picture.result()))
                except UserError as error:
                    skip(error)
            for (height, width, _), group in sizes.items():
                most = max(1, PIXELS // (height * width))
                for i in range(0, len(group), most):
                    done += translate_group(generator, group[i:i + most], side_by_side)
    return done

def main():
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # names may hold what the screen cannot show
    options = parse()
    try:
        device = pick_device(options.device)
        checkpoint = options.checkpoint or newest_run()
        generator = load_generator(checkpoint, options.direction, device)
        run = checkpoint if checkpoint.is_dir() else checkpoint.parent
        home = run if (run / "latest.pt").is_file() else Path()
        out = options.out or home / f"translated-{options.direction}"
        pairs = plan(options.pictures or [trained_on(checkpoint, run, options.direction)], out)
        print(f"{checkpoint} {options.direction} on {device}, {len(pairs)} pictures", flush=True)
        done = translate_all(generator, pairs, options.side_by_side)
    except (UserError, OSError) as error:
        return f"translate.py: {error}"
    except KeyboardInterrupt:
        return "translate.py: stopped; the pictures listed above are done"
    print(f"{done} translated into {out}, {len(pairs) - done} skipped")
    return int(done < len(pairs))

if __name__ == "__main__":
    sys.exit(main())
