"""Translates pictures with a trained CycleGAN; files and folders in, one PNG for each out.

    python translate.py                                   the newest run, on its own pictures
    python translate.py photo.jpg folder/ --out there/    your own pictures, with the newest run
    python translate.py photos/ --checkpoint horse2zebra/latest_net_G.pth     the authors' weights
"""

import argparse
import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from cyclegan import (UserError, find_pictures, load_generator, pick_device, png, read_checkpoint,
                      read_picture, translate, write_file)

PIXELS = 2**20  # that pass the network together
READ_AHEAD = 16  # pictures


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", type=Path, metavar="PICTURE_OR_FOLDER",
                        help="what to translate (default: the pictures that the run trained on)")
    parser.add_argument("--checkpoint", type=Path, metavar="RUN_OR_FILE",
                        help="a run's folder, one of its .pt files, or the authors' .pth file or folder "
                             "of them (default: the newest run under runs/)")
    parser.add_argument("--direction", default="AtoB", choices=("AtoB", "BtoA"),
                        help="which way a checkpoint that knows both translates (default: AtoB)")
    parser.add_argument("--out", type=Path, metavar="FOLDER",
                        help="where the results go (default: translated-DIRECTION in the run's folder)")
    parser.add_argument("--side-by-side", action="store_true",
                        help="write the picture and its translation next to each other")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"),
                        help="where to compute (default: cuda if there is one, else cpu)")
    return parser.parse_args(arguments)


def newest_run():
    found = sorted(Path("runs").glob("*/latest.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("there is no run under runs/; train one, or name a --checkpoint")
    return found[-1].parent


def trained_on(checkpoint, direction):
    """The folder with the pictures of the domain that a run translates from."""
    saved = read_checkpoint(checkpoint / "latest.pt" if checkpoint.is_dir() else checkpoint)
    if "place" not in saved:
        raise UserError(f"{checkpoint} does not say what it was trained on; name pictures to translate")
    run = checkpoint if checkpoint.is_dir() else checkpoint.parent
    return run / saved["place"]["data"][direction == "BtoA"]


def plan(inputs, out):
    """[(source, target)]: folders keep their structure, names get the suffix .png, none stands twice.

    Raises UserError where an input is missing or a target is one of the sources.
    """
    pairs, taken = [], set()
    for given in inputs:
        if not given.exists():
            raise UserError(f"there is no file or folder {given}")
        sources = [p for p in find_pictures(given) if out not in p.parents] if given.is_dir() else [given]
        for source in sources:
            name = source.relative_to(given) if given.is_dir() else Path(source.name)
            if given.is_dir() and len(inputs) > 1:
                name = given.resolve().name / name
            numbers = itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
            target = next(t for n in numbers if str(t := out / name.with_name(f"{name.stem}{n}.png")).lower()
                          not in taken)
            taken.add(str(target).lower())
            pairs.append((source, target))
    files = {source.stat()[1:3] for source, _ in pairs}  # inode and device: whatever the spelling
    for _, target in pairs:
        if target.exists() and target.stat()[1:3] in files:
            raise UserError(f"{target} is one of the pictures to translate; choose another --out")
    return pairs


def read(path):
    try:
        return read_picture(path)
    except UserError as error:
        return error


def write(target, source, result, side_by_side):
    write_file(target, [png(np.concatenate([source, result], 1) if side_by_side else result)])
    return target


def translate_all(generator, pairs, side_by_side):
    """Translates each source into its target, those of one size together. Returns how many it could not."""
    failed = 0
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(pairs), READ_AHEAD):
            some, sizes = pairs[start:start + READ_AHEAD], {}
            for (source, target), picture in zip(some, pool.map(read, [source for source, _ in some])):
                if isinstance(picture, UserError):
                    print(f"skipped: {picture}", file=sys.stderr, flush=True)
                    failed += 1
                else:
                    sizes.setdefault(picture.shape, []).append((target, picture))
            for (height, width, _), group in sizes.items():
                most = max(1, PIXELS // (height * width))
                for i in range(0, len(group), most):
                    targets, pictures = zip(*group[i:i + most])
                    try:
                        results = translate(generator, np.stack(pictures))
                    except (MemoryError, RuntimeError) as error:
                        if "memory" not in str(error):
                            raise
                        print(f"skipped: {width} x {height} pixels are too many for the memory here, for "
                              + ", ".join(map(str, targets)), file=sys.stderr, flush=True)
                        failed += len(targets)
                        continue
                    for target in pool.map(write, targets, pictures, results, [side_by_side] * len(targets)):
                        print(target, flush=True)
    return failed


def main():
    options = parse()
    try:
        device = pick_device(options.device)
        checkpoint = options.checkpoint or newest_run()
        generator = load_generator(checkpoint, options.direction, device)
        run = checkpoint if checkpoint.is_dir() else checkpoint.parent
        home = run if (run / "latest.pt").is_file() else Path()
        out = options.out or home / f"translated-{options.direction}"
        pairs = plan(options.pictures or [trained_on(checkpoint, options.direction)], out)
        print(f"{options.direction} with {checkpoint} on {device}: {len(pairs)} pictures", flush=True)
        failed = translate_all(generator, pairs, options.side_by_side)
    except UserError as error:
        return f"translate.py: {error}"
    except KeyboardInterrupt:
        return "translate.py: stopped; what is listed above is done"
    print(f"{len(pairs) - failed} translated into {out}, {failed} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
