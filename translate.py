"""Translates pictures with a trained CycleGAN. Each result has the size of its picture.

    python translate.py                                    the newest run, on its training pictures
    python translate.py photo.jpg folder/ --out there/     your pictures, with the newest run
    python translate.py photos/ --checkpoint horse2zebra/latest_net_G.pth     the authors' weights

A network recognises objects only at the scale it was trained on. So each picture is resized to that
scale; what the network changed is enlarged and added to the picture.
"""

import argparse
import io
import os
import shlex
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

import cyclegan
from cyclegan import UserError

AHEAD = 3  # pictures that are read, and as many that are written, while one is translated


# ---- One picture ---------------------------------------------------------------------------------


def translate_photo(generator, picture, size=None):
    """A picture, (H, W, 3) uint8, translated at the scale of training -> the same shape.

    generator: from cyclegan.load_generator. size: another shorter side for what it gets, or
    "full": the picture as it is.
    """
    if size == "full":
        return cyclegan.translate(generator, picture)
    config, (height, width) = generator.config, picture.shape[:2]
    side = size or (config.load_size if config else 256)
    squash = config is not None and config.squash
    wanted = cyclegan.scaled_size(width, height, side, squash, limited=True)
    small = np.array(Image.fromarray(picture).resize(wanted, Image.BICUBIC))
    translated = cyclegan.translate(generator, small)
    if small.size >= picture.size:
        return np.array(Image.fromarray(translated).resize((width, height), Image.BICUBIC))
    return carry_back(picture, small, translated)


def carry_back(picture, small, translated):
    """Enlarges what the network changed, and adds it to the picture, whose edges stay sharp."""
    change = torch.from_numpy(translated - small.astype(np.float32)).permute(2, 0, 1)[None]
    change = functional.interpolate(change, picture.shape[:2], mode="bilinear")
    result = change[0].permute(1, 2, 0).numpy()
    result += picture
    return result.round(out=result).clip(0, 255, out=result).astype(np.uint8)


# ---- Which pictures, and where to ----------------------------------------------------------------


def newest_run():
    runs = sorted(Path("runs").glob("*/latest.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError("there is no run in runs/; train one, or give a --checkpoint")
    if len(runs) > 1:
        print(f"the newest of {len(runs)} runs; --checkpoint takes another", flush=True)
    return runs[-1].parent


def folder_of_results(args, checkpoint, run, steps):
    """--out, or a name made of direction, steps and size, so that different results do not mix."""
    if args.out:
        return args.out
    name = checkpoint.stem if steps is None else steps  # the authors' files have no steps
    parts = ["translated", args.direction, name, args.size, args.side_by_side and "side-by-side"]
    return run / "-".join(str(part) for part in parts if part)


def training_pictures(generator, run, direction):
    """The folder of pictures that a run was trained to translate in this direction."""
    if not generator.config or "data" not in generator.place:
        raise UserError(f"{run} is not a run; give the pictures to translate")
    folder = run / generator.place["data"][direction == "BtoA"]
    if not folder.is_dir():
        raise UserError(f"the pictures of {run} are no longer in {folder}; give others")
    return folder


def plan(inputs, out, suffix):
    """{target: source}; names and subfolders stay. Earlier results are no sources. UserError."""
    targets, taken, results = {}, {}, out.resolve()
    if out.suffix.lower() in cyclegan.SUFFIXES.split():
        raise UserError(f"--out must be a folder, not {out}; results keep the pictures' names")
    for path in map(Path, map(os.path.abspath, inputs)):
        if not path.exists():
            raise UserError(f"no such picture or folder: {path}")
        if path.is_dir() and path.resolve() == results:
            raise UserError(f"--out {out} is the folder of the pictures; choose another")
        base = path if path.is_dir() and len(inputs) == 1 else path.parent
        for source in cyclegan.find_pictures(path) if path.is_dir() else [path]:
            if path.resolve() in results.parents and results in source.resolve().parents:
                continue  # an earlier result, as --out lies in this folder
            target = out / source.relative_to(base).with_suffix(suffix)
            other = taken.setdefault(str(target).lower(), source)  # A.png may be a.png
            if other != source:
                raise UserError(f"{other} and {source} would both become {target}; translate them "
                                "into different folders")
            targets[target] = source
    if {path.resolve() for path in targets} & {path.resolve() for path in targets.values()}:
        raise UserError(f"results would overwrite pictures; choose another --out than {out}")
    return targets


# ---- All of them ---------------------------------------------------------------------------------


def translate_all(generator, pairs, args):
    """Yields (target, result) for each (target, source), except for those that are skipped."""
    titles = ("x", "G(x)") if args.direction == "AtoB" else ("y", "F(y)")
    reads = cyclegan.prefetch(lambda pair: cyclegan.read_picture(pair[1]), pairs, AHEAD)
    for (target, source), reading in reads:
        try:
            picture = reading.result()
            result = translate_photo(generator, picture, args.size)
            if args.side_by_side:
                result = cyclegan.with_titles(np.hstack([picture, result]), titles)
        except (MemoryError, RuntimeError, UserError) as error:
            skip(error, source)
            continue
        yield target, result


def write(pair):
    """Writes (target, result) in the format of the target's suffix. Raises UserError."""
    target, result = pair
    file = io.BytesIO()
    with cyclegan.as_user_error(f"cannot write {target}"):  # a JPEG has at most 65,500 a side
        Image.fromarray(result).save(file, "JPEG" if target.suffix == ".jpg" else "PNG", quality=95)
    cyclegan.write_file(target, file.getbuffer())


def skip(error, path):
    """Says why one picture of many is skipped. Raises what is not about that picture."""
    if cyclegan.out_of_memory(error):
        error = f"{path} is too large for this machine's memory"
    elif isinstance(error, RuntimeError):
        raise error
    print(f"skipped: {error}", file=sys.stderr, flush=True)


def run_program(args):
    """Does what the command line says. Returns the exit status."""
    for path in args.pictures:
        if (path / "latest.pt").exists():
            raise UserError(f"{path} is a run; to translate with it: --checkpoint {path}")
    checkpoint = args.checkpoint or newest_run()
    generator = cyclegan.load_generator(checkpoint, args.direction, args.device)
    run = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if generator.steps == 0:
        raise UserError(f"{checkpoint} is at step 0, untrained; train.py saves every 10 minutes, "
                        "and when it stops")
    out = folder_of_results(args, checkpoint, run, generator.steps)
    found = plan(args.pictures or [training_pictures(generator, run, args.direction)], out,
                 f".{args.format}")
    pairs = [pair for pair in found.items() if args.overwrite or not pair[0].exists()]
    with cyclegan.as_user_error(f"cannot create the folder {out}; choose another --out"):
        out.mkdir(parents=True, exist_ok=True)
    trained = f"at step {generator.steps}" if generator.config else "step unknown"
    print(f"{checkpoint}, {trained}, {args.direction}, pictures: {len(found):,}", flush=True)
    if len(pairs) < len(found):
        print(f"{len(found) - len(pairs):,} of the results exist in {out} and are kept; "
              "use --overwrite to redo them", flush=True)
    if not generator.config and not args.size:
        print("note: these weights do not record the scale of their training; 256 pixels are "
              "assumed, --size sets another", flush=True)
    done, start = 0, time.perf_counter()
    results = translate_all(generator, pairs, args)
    for (target, _), writing in cyclegan.prefetch(write, results, AHEAD):
        try:
            writing.result()
        except (MemoryError, UserError) as error:
            skip(error, target)
            continue
        done += 1
        left = (time.perf_counter() - start) / done * (len(pairs) - done)
        left = timedelta(seconds=round(left))
        print(f"{done:,} of {len(pairs):,}, {left} left: {target}", flush=True)
    print(f"{done:,} translated into {out}, {len(pairs) - done:,} skipped")
    return int(done < len(pairs))


# ---- Command line --------------------------------------------------------------------------------


def parse():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("pictures", nargs="*", type=path, metavar="PICTURE_OR_FOLDER",
        help="what to translate (default: the pictures that the run was trained on)")
    add("--out", type=path, metavar="FOLDER", help="folder of the results "
        "(default: one such as translated-AtoB-5600 in the run's folder)")
    add("--overwrite", action="store_true", help="redo existing results")
    add("--format", default="png", choices=("png", "jpg"), help="of the result files")
    add("--side-by-side", action="store_true", help="put each picture next to its translation")
    add("--size", type=shorter_side, metavar="N|full",
        help="resize to this shorter side for the network, or full: do not resize "
             "(default: as in training, 256 for the authors' files)")
    add("--checkpoint", type=path, metavar="RUN_OR_FILE",
        help="a run or one of its .pt files, or the authors' .pth file, or a folder of them "
             "(default: the newest run in runs/)")
    add("--direction", default="AtoB", choices=("AtoB", "BtoA"),
        help="AtoB uses G, BtoA uses F; a single .pth file has only one")
    add("--device", default="auto", metavar="auto|cpu|cuda|mps", help="where to compute")
    return parser.parse_intermixed_args()


def path(text):
    return Path(os.path.expanduser(text))


def shorter_side(text):
    if text != "full" and int(text) < 8:
        raise argparse.ArgumentTypeError(f"must be full or at least 8, not {text}")
    return text if text == "full" else int(text)


def main():
    if hasattr(sys.stdout, "reconfigure"):  # notebooks replace stdout
        sys.stdout.reconfigure(errors="replace")  # names may hold what the screen cannot show
    warnings.showwarning = lambda warning, *_: print(f"note: {warning}", file=sys.stderr)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # phones have 108 megapixels
    try:
        return run_program(parse())
    except (UserError, OSError) as error:
        return f"translate.py: {error}"
    except KeyboardInterrupt:
        return f"translate.py: stopped; to continue: python translate.py {shlex.join(sys.argv[1:])}"


if __name__ == "__main__":
    sys.exit(main())
