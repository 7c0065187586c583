"""Trains a CycleGAN: on two folders of pictures, or without any on apples and oranges that it draws.

    python train.py                                           the drawn demo, minutes on a CPU
    python train.py --dataA apples/ --dataB oranges/          two folders of your own
    python train.py --resume runs/apples-oranges              goes on where that run stopped
"""

import argparse
import functools
import hashlib
import itertools
import math
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from cyclegan import (Config, CycleGAN, UserError, find_pictures, learning_rate, load_checkpoint, pad,
                      pick_device, png, read_picture, save_checkpoint, to_pictures, to_tensor,
                      translate, write_file)

LOSSES = ("gan", "cycle", "identity", "D_X", "D_Y")
COLUMNS = ("step", "epoch", "rate", *LOSSES)
SAMPLES = 4  # rows of the sample grid
DEMO = dict(image_size=64, load_size=64, width=16, blocks=2, lr=5e-4, epochs=5, decay_epochs=5)
DEMO_SCENES, DEMO_HELD_OUT = 200, 32


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def parse(arguments=None):
    """The command line; of Config's fields only those that were given are in the result."""
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    run = parser.add_argument_group("pictures and run")
    run.add_argument("--dataA", type=Path, metavar="FOLDER", help="pictures of domain A, the paper's X")
    run.add_argument("--dataB", type=Path, metavar="FOLDER", help="pictures of domain B, the paper's Y")
    run.add_argument("--out", type=Path, metavar="RUN",
                     help="folder of the new run (default: the next free name under runs/)")
    run.add_argument("--resume", type=Path, metavar="RUN",
                     help="go on with the run in this folder, with its pictures and settings")
    run.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"),
                     help="where to compute (default: cuda if there is one, else cpu)")
    run.add_argument("--precision", choices=("auto", "fp32", "bf16"),
                     help="arithmetic of the networks (default: bf16 on a GPU that has it, else fp32)")
    run.add_argument("--max-steps", type=positive, default=None, metavar="N", help="stop after step N of the whole run")
    run.add_argument("--save-every", type=positive, default=50, metavar="N",
                     help="keep the checkpoint of every Nth epoch as epoch_0050.pt, ... (default: 50)")
    run.add_argument("--save-minutes", type=float, default=10, metavar="M",
                     help="save at least every M minutes, besides every epoch (default: 10)")
    run.add_argument("--sample-every", type=positive, default=1, metavar="N",
                     help="write a grid of samples every N epochs (default: 1)")
    method = parser.add_argument_group("method, with the paper's values as defaults")
    automatic = {"load_size": "image size x 286 / 256", "blocks": "9, or 6 if the image size is below 256"}
    for f in fields(Config):
        method.add_argument("--" + f.name.replace("_", "-"), type=f.type, metavar=f.type.__name__.upper(),
                            help=f"{f.metadata['help']} (default: {automatic.get(f.name, f.default)})")
    return parser.parse_args(arguments)


# --------------------------------------------------------------------------------------------------
# The screen
# --------------------------------------------------------------------------------------------------


def say(line, passing=False):
    """Prints a line; on a terminal a passing one is cut to its width and replaced by the next."""
    if not sys.stdout.isatty():
        print(line, flush=True)
    else:
        line = line[:shutil.get_terminal_size().columns - 1] if passing else line
        print("\r\033[K" + line, end="" if passing else "\n", flush=True)


def every(seconds_on_terminal, seconds_in_file):
    """A function that says True at most once in so many seconds, the first time at once."""
    pause = seconds_on_terminal if sys.stdout.isatty() else seconds_in_file
    last = [-math.inf]

    def due():
        if time.monotonic() - last[0] < pause:
            return False
        last[0] = time.monotonic()
        return True
    return due


# --------------------------------------------------------------------------------------------------
# Pictures: decoded once into a file of bytes, then cropped and flipped from there
# --------------------------------------------------------------------------------------------------


def decode(path, side):
    try:
        return read_picture(path, side)
    except UserError as error:
        return error


def decoded(paths, side, name):
    """The bytes of each picture that can be read, in the order of paths; says which cannot."""
    due, done = every(0.5, 10), 0
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), 64):  # a bounded number in memory, however many there are
            for picture in pool.map(decode, paths[start:start + 64], [side] * 64):
                done += 1
                if isinstance(picture, UserError):
                    say(f"skipped: {picture}")
                else:
                    yield picture.tobytes()
                if due():
                    say(f"{name}: {done} of {len(paths)} pictures decoded", passing=True)


def cached(folder, side, cache, name):
    """The readable pictures under a folder as a (n, side, side, 3) uint8 array mapped from a file.

    The file is made on the first call, and again once a picture was added, removed or changed.
    Raises UserError if no picture can be read.
    """
    paths = find_pictures(folder)
    stamp = hashlib.sha256(str(side).encode())
    for path in paths:
        status = path.stat()
        stamp.update(os.fsencode(f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}\n"))
    data, index = cache / f"{name}.bytes", cache / f"{name}.sha256"
    if not (data.is_file() and index.is_file() and index.read_text() == stamp.hexdigest()):
        index.unlink(missing_ok=True)
        write_file(data, decoded(paths, side, name))
        write_file(index, [stamp.hexdigest().encode()])
    count = data.stat().st_size // (side * side * 3)
    if count == 0:
        raise UserError(f"none of the {len(paths)} picture files in {folder} can be read")
    say(f"{name}: {count} pictures from {folder}, {len(paths) - count} skipped")
    return np.memmap(data, np.uint8, "r", shape=(count, side, side, 3))


@functools.lru_cache(2)
def shuffled(seed, epoch, count):
    return np.random.default_rng([seed, 1, epoch]).permutation(count)


def crops(pictures, chosen, side, random):
    """The chosen pictures, each cropped at a random place and flipped with probability 1/2."""
    result = []
    for i in chosen:
        top, left = random.integers(pictures.shape[1] - side + 1, size=2)
        picture = pictures[i, top:top + side, left:left + side]
        result.append(picture[:, ::-1] if random.random() < 0.5 else picture)
    return np.stack(result)


def batch(config, A, B, epoch, step):
    """x and y of one step, each (N, image_size, image_size, 3) uint8, from the seed and the place.

    An epoch has as many pictures as the larger domain: those of A in shuffled order, those of B
    drawn at random, so that no pair lasts (authors' code). The last batch is filled from the front.
    """
    order = shuffled(config.seed, epoch, max(len(A), len(B)))
    places = np.arange(step * config.batch_size, (step + 1) * config.batch_size) % len(order)
    random = np.random.default_rng([config.seed, 2, epoch, step])
    return (crops(A, order[places] % len(A), config.image_size, random),
            crops(B, random.integers(len(B), size=len(places)), config.image_size, random))


def batches(config, A, B, epoch, step, device):
    """(epoch, step, x, y) from a place, both counted from 0, to the end; one batch is read ahead."""
    steps = steps_per_epoch(config, A, B)
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(batch, config, A, B, epoch, step)
        for place in range(epoch * steps + step, (config.epochs + config.decay_epochs) * steps):
            ready, ahead = ahead, reader.submit(batch, config, A, B, *divmod(place + 1, steps))
            yield *divmod(place, steps), *(to_tensor(pictures, device) for pictures in ready.result())


def steps_per_epoch(config, A, B):
    return math.ceil(max(len(A), len(B)) / config.batch_size)


# --------------------------------------------------------------------------------------------------
# The drawn demo
# --------------------------------------------------------------------------------------------------


def draw_scene(random):
    """One or two fruits (x, y, radius), the light that falls on them, the wall and the table."""
    fruits = [random.uniform([0.3, 0.35, 0.2], [0.7, 0.65, 0.3])]
    if random.random() < 0.5:
        beside = fruits[0][0] + (0.45 if fruits[0][0] < 0.5 else -0.45)
        fruits.insert(0, [beside, random.uniform(0.3, 0.7), random.uniform(0.14, 0.2)])
    light = random.uniform([-0.6, -0.8], [0.6, -0.3])
    wall = random.uniform([0.68, 0.70, 0.72], [0.80, 0.82, 0.86])
    table = random.uniform([0.42, 0.36, 0.30], [0.54, 0.46, 0.40])
    return fruits, light, wall, table


def paint(scene, kind, side):
    """A scene as "apples" or as "oranges", (side, side, 3) uint8; only the fruits differ."""
    fruits, light, wall, table = scene
    v, u = (np.mgrid[:side, :side, :1][:2] + 0.5) / side
    picture = np.where(v < 0.6, wall * (1.1 - 0.3 * v), table * (0.7 + 0.4 * v))
    for centre, height, r in fruits:
        a, b = (u - centre) / r, (v - height) / r  # the fruit is the unit circle
        picture *= 1 - 0.45 * np.exp(-((a - 0.1 * light[0]) / 1.1) ** 2 - ((b - 0.95) / 0.25) ** 2)
        facing = 0.55 * np.sqrt((1 - a * a - b * b).clip(0)) + 0.55 * a * light[0] + 0.6 * b * light[1]
        shade = 0.35 + 0.75 * facing.clip(0, 1)
        gloss = (1 - ((a - 0.5 * light[0]) ** 2 + (b - 0.55 * light[1]) ** 2) / 0.09).clip(0)
        if kind == "apples":
            ripe = ((b + 0.85) / 0.5).clip(0, 1)
            skin = (np.array([0.75, 0.62, 0.15]) * (1 - ripe) + np.array([0.80, 0.05, 0.10]) * ripe)
            skin = np.where((np.abs(a - 0.12 * b - 0.08) < 0.07) & (b < -0.62), [0.30, 0.18, 0.06],
                            skin * shade + 0.65 * gloss)  # the stem, else the skin
        else:
            pores = 0.06 * np.sin(16 * a) * np.sin(16 * b)
            skin = np.where(a ** 2 + 3 * (b + 0.72) ** 2 < 0.02, [0.25, 0.38, 0.08],
                            ([1.0, 0.55, 0.04] + pores) * shade + 0.2 * gloss)  # the navel, else the skin
        edge = ((1 - np.sqrt(a * a + b * b)) * r * side + 0.5).clip(0, 1)
        picture = picture * (1 - edge) + skin * edge
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)


def draw_demo(run, folders, side):
    """Fills the two folders, unless they are there: other scenes as apples than as oranges."""
    for domain, folder in enumerate(folders):
        if not (run / folder).is_dir():
            part = run / f"{folder}.part"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            for i in range(DEMO_SCENES):
                scene = draw_scene(np.random.default_rng([domain, i]))
                Image.fromarray(paint(scene, part.stem, side)).save(part / f"{i:03}.png")
            part.rename(run / folder)


def judge_demo(model, side):
    """Says how near held-out scenes come to the truth, which here is known: they are painted both ways."""
    scenes = [draw_scene(np.random.default_rng([2, i])) for i in range(DEMO_HELD_OUT)]
    apples, oranges = (np.stack([paint(scene, kind, side) for scene in scenes])
                       for kind in ("apples", "oranges"))
    inside = (apples != oranges).any(-1)
    for name, network, source, truth in (("apples to oranges", model.G, apples, oranges),
                                         ("oranges to apples", model.F, oranges, apples)):
        idle = np.abs(source / 127.5 - truth / 127.5)
        error = np.abs(translate(network, source) / 127.5 - truth / 127.5)
        say(f"{name}, {DEMO_HELD_OUT} held-out scenes: inside the fruit the error is "
            f"{error[inside].mean() / idle[inside].mean():.0%} of that of doing nothing, "
            f"outside it is {error[~inside].mean():.3f} on the [-1, 1] scale")


# --------------------------------------------------------------------------------------------------
# A run: its folder, its record, its end
# --------------------------------------------------------------------------------------------------


def sample_grid(model, A, B):
    """Rows of fixed, uncropped pictures: x, G(x), F(G(x)) and y, F(y), G(F(y)). (H, W, 3) uint8."""
    side, rows = A.shape[1], []
    device = next(model.parameters()).device
    for k in range(SAMPLES):
        row = []
        for pictures, there, back in ((A, model.G, model.F), (B, model.F, model.G)):
            with torch.no_grad():
                source = to_tensor(pad(pictures[[k * len(pictures) // SAMPLES]]), device)
                images = torch.cat([source, there(source), back(there(source))])
            row += [np.pad(p[:side, :side], ((2, 2), (2, 2), (0, 0)), constant_values=255)
                    for p in to_pictures(images)]
        rows.append(np.concatenate(row, 1))
    titles = Image.new("RGB", (rows[0].shape[1], 14), "white")
    for column, title in enumerate(("x", "G(x)", "F(G(x))", "y", "F(y)", "G(F(y))")):
        ImageDraw.Draw(titles).text((column * (side + 4) + 4, 1), title, "black")
    return np.concatenate([np.asarray(titles), *rows])


def record(pending, log):
    """Reads the losses of the steps since the last call from the device, writes a line for each.

    Returns their means. Raises UserError at the first that is not finite.
    """
    table = torch.stack([torch.stack([losses[name] for name in LOSSES]) for *_, losses in pending])
    for (step, epoch, rate, _), values in zip(pending, table.tolist()):
        for name, value in zip(LOSSES, values):
            if not math.isfinite(value):
                raise UserError(f"the loss {name} became {value} at step {step}; the last checkpoint from "
                                "before is kept; start again with a lower --lr or --precision fp32")
        log.write(",".join(f"{value:.6g}" for value in (step, epoch, rate, *values)) + "\n")
    log.flush()
    pending.clear()
    return table.mean(0).tolist()


def new_folder(out, name):
    """Makes and returns the folder of a new run: `out`, or the next free name under runs/."""
    if out and out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty; name a new folder, or go on with --resume {out}")
    try:
        if out:
            out.mkdir(parents=True, exist_ok=True)
            return out
        for number in itertools.count(1):
            run = Path("runs") / (name if number == 1 else f"{name}-{number}")
            if not run.exists():
                run.mkdir(parents=True)
                return run
    except OSError as error:
        raise UserError(f"cannot make the folder {error.filename}: {error.strerror}") from None


def begin(given, device):
    """A new run as the command line wants it: its folder, its model, its place at the start."""
    folders = [given.get("dataA"), given.get("dataB")]
    if (folders[0] is None) != (folders[1] is None):
        one, other = ("--dataA", "--dataB") if folders[0] else ("--dataB", "--dataA")
        raise UserError(f"{one} is given without {other}: a CycleGAN needs pictures of both domains")
    name, side = "demo", given.get("image_size", DEMO["image_size"])
    defaults = {**DEMO, "load_size": side}
    if folders[0]:
        for folder in folders:  # refused before anything is made
            paths = find_pictures(folder)
            if all(isinstance(decode(path, 1), UserError) for path in paths):
                raise UserError(f"none of the {len(paths)} picture files in {folder} can be read")
        name, side = f"{folders[0].resolve().name}-{folders[1].resolve().name}", given.get("image_size", 256)
        defaults = {"load_size": round(side * 286 / 256), "blocks": 9 if side >= 256 else 6}
    config = Config(**defaults | {f.name: given[f.name] for f in fields(Config) if f.name in given})
    precision = given.get("precision", "auto")
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    model = CycleGAN(config, device, precision)
    run = new_folder(given.get("out"), name)
    data = [str(f.resolve()) for f in folders] if folders[0] else ["pictures/apples", "pictures/oranges"]
    place = {"epoch": 0, "step": 0, "data": data, "demo": not folders[0]}
    save_checkpoint(run / "latest.pt", model, place)  # from here on it can be resumed
    say(f"new run {run}, on {device} in {precision}")
    return run, model, place


def resume(run, given, device):
    """The run in a folder as it was left; refuses what contradicts its settings."""
    model, place = load_checkpoint(run / "latest.pt", device)
    was = {**asdict(model.config), "precision": model.precision, "out": run.resolve(),
           **dict(zip(("dataA", "dataB"), (run / folder for folder in place["data"])))}
    for name, value in given.items():
        value = value.resolve() if isinstance(value, Path) else value
        if name in ("epochs", "decay_epochs") and value > was[name]:
            model.config = replace(model.config, **{name: value})
        elif name in was and value != was[name]:
            raise UserError(f"--{name.replace('_', '-')} {value} contradicts the run in {run}, which has "
                            f"{was[name]}; leave it out, or start a new run without --resume")
    say(f"run {run}, from step {model.steps} (epoch {place['epoch'] + 1}), on {device}")
    return run, model, place


def open_log(path, steps):
    """losses.csv, open for appending, with the lines of the first so many steps."""
    lines = path.read_text().splitlines(keepends=True)[1:] if path.is_file() else []
    kept = [line for line in lines if line.endswith("\n") and int(line.split(",")[0]) <= steps]
    write_file(path, [(",".join(COLUMNS) + "\n" + "".join(kept)).encode()])
    return open(path, "a")


def train(run, model, place, options):
    """Trains to the end, or to --max-steps, Ctrl-C or SIGTERM. Returns the exit status."""
    config, device = model.config, next(model.parameters()).device
    if place["demo"]:
        draw_demo(run, place["data"], config.load_size)
    A, B = (cached(run / folder, config.load_size, run / "cache", domain)
            for folder, domain in zip(place["data"], "AB"))
    steps, epochs = steps_per_epoch(config, A, B), config.epochs + config.decay_epochs
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):  # a second one ends the program at once
        signal.signal(number, lambda n, _: (signals.append(n), signal.signal(n, signal.SIG_DFL)))
    limit = options.max_steps or math.inf
    if model.steps >= min(limit, epochs * steps):
        say(f"nothing to do: step {model.steps} is the last")
        return 0

    pending, due = [], every(1, 10)
    began = shown = saved = idle = time.monotonic()
    first = before = model.steps
    waited = 0.0
    with open_log(run / "losses.csv", model.steps) as log:
        for epoch, step, x, y in batches(config, A, B, place["epoch"], place["step"], device):
            waited += time.monotonic() - idle
            rate = learning_rate(config, epoch)
            model.set_learning_rate(rate)
            losses = model.step(x, y)
            pending.append((model.steps, epoch + 1, rate, losses))
            ended, stopped = step + 1 == steps, bool(signals) or model.steps >= limit

            if due() or ended or stopped:
                means = record(pending, log)
                now, taken = time.monotonic(), model.steps - before
                left = (now - began) / (model.steps - first) * (epochs * steps - epoch * steps - step - 1)
                say(f"epoch {epoch + 1}/{epochs} {step + 1}/{steps} | "
                    f"{1000 * (now - shown) / taken:.0f} ms/step "
                    f"{2 * config.batch_size * taken / (now - shown):.1f} pictures/s "
                    f"{waited / (now - shown):.0%} waiting | {timedelta(seconds=round(left))} left | "
                    + " ".join(f"{name} {mean:.2f}" for name, mean in zip(LOSSES, means))
                    + (f" | peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
                       if device.type == "cuda" else ""), passing=not (ended or stopped))
                shown, before, waited = now, model.steps, 0.0
            if ended and (epoch + 1) % options.sample_every == 0 or model.steps == limit:
                write_file(run / "samples" / f"epoch_{epoch + 1:04}.png", [png(sample_grid(model, A, B))])
            if ended or stopped or time.monotonic() - saved > 60 * options.save_minutes:
                if pending:
                    record(pending, log)
                os.fsync(log.fileno())
                place.update(epoch=epoch + ended, step=0 if ended else step + 1)
                save_checkpoint(run / "latest.pt", model, place)
                if ended and (epoch + 1) % options.save_every == 0:
                    save_checkpoint(run / f"epoch_{epoch + 1:04}.pt", model, place)
                saved = time.monotonic()
            if stopped:
                break
            idle = time.monotonic()
    if place["demo"] and not signals:
        judge_demo(model, config.load_size)
    finished = model.steps == epochs * steps
    say(f"{'finished' if finished else 'stopped'} after step {model.steps} of {epochs * steps}, all saved in {run}; "
        + ("translate with: python translate.py --checkpoint " if finished
           else "go on with: python train.py --resume ") + str(run))
    return 128 + signals[0] if signals else 0


def main():
    options = parse()
    try:
        device = pick_device(options.device)
        given = vars(options)
        start = resume(options.resume, given, device) if "resume" in given else begin(given, device)
        return train(*start, options)
    except torch.OutOfMemoryError:
        return "train.py: out of GPU memory; lower --image-size, --batch-size, --width or --blocks"
    except (UserError, OSError) as error:
        return f"train.py: {error}"
    except KeyboardInterrupt:
        return "train.py: stopped before training began"


if __name__ == "__main__":
    sys.exit(main())
