"""Trains a CycleGAN on two folders of pictures; without any, on apples and oranges that it draws.

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
import re
import shlex
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

from cyclegan import (Config, CycleGAN, UserError, find_pictures, learning_rate, load_checkpoint,
                      pick_device, png, read_picture, save_checkpoint, to_pictures, to_tensor,
                      translate, write_file)

TOO_FAR = "the last checkpoint is from before; start again with a lower --lr or --precision fp32"
LOSSES = ("gan", "cycle", "identity", "D_X", "D_Y")
DEMO = dict(image_size=64, load_size=64, width=16, blocks=2, lr=5e-4, epochs=4, decay_epochs=4)
DEMO_SCENES, DEMO_HELD_OUT = 200, 32
TERMINAL = bool(sys.stdout) and sys.stdout.isatty()

def parse():
    """The command line; Config's fields, folders and precision only if they were given."""
    def positive(text):
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
        return int(text)

    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("pictures and run").add_argument
    add("--dataA", type=Path, metavar="FOLDER", help="pictures of domain A, the paper's X")
    add("--dataB", type=Path, metavar="FOLDER", help="pictures of domain B, the paper's Y")
    add("--out", type=Path, metavar="RUN", help="new folder (default: the next free name in runs/)")
    add("--resume", type=Path, metavar="RUN", help="go on with the run in this folder")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"),
        help="where to compute (default: cuda if there is one, else cpu)")
    add("--precision", choices=("auto", "fp32", "bf16"),
        help="arithmetic of the networks (default: bf16 on a CUDA GPU that has it, else fp32)")
    add("--max-steps", type=positive, default=math.inf, metavar="N", help="stop after step N")
    add("--save-every", type=positive, default=50, metavar="N",
        help="keep the checkpoint of every Nth epoch as epoch_0050.pt and so on (default: 50)")
    add("--save-minutes", type=float, default=10, metavar="M",
        help="save every M minutes, besides after every epoch (default: 10)")
    add("--sample-every", type=positive, default=1, metavar="N",
        help="draw samples after every Nth epoch (default: 1)")
    add = parser.add_argument_group("method; the demo has smaller defaults").add_argument
    automatic = {"load_size": "image size x 286 / 256", "blocks": "9, but 6 if image size < 256"}
    for f in fields(Config):
        add("--" + f.name.replace("_", "-"), type=f.type, metavar="N" if f.type is int else "VALUE",
            help=f"{f.metadata['help']} (default: {automatic.get(f.name, f.default)})")
    return parser.parse_args()

def say(line, passing=False):
    """Prints a line. On a terminal a passing one is cut to fit, and the next one replaces it."""
    if TERMINAL:
        line = "\r\033[K" + (line[:shutil.get_terminal_size().columns - 1] if passing else line)
    try:
        print(line, end="" if passing and TERMINAL else "\n", flush=True)
    except OSError:  # whoever read it has gone; that must not end a training
        sys.stdout = open(os.devnull, "w")

# ---- Pictures: decoded once into a file of bytes; a step crops and flips from there --------------

def decoded(paths, side, name):
    """Yields each picture as bytes, in the order of the paths; says which cannot be read."""
    shown, skipped = time.perf_counter(), 0
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), 64):  # a bounded number in memory, however many there are
            some = paths[start:start + 64]
            for picture in [pool.submit(read_picture, path, side) for path in some]:
                try:
                    yield picture.result().tobytes()
                except UserError as error:
                    skipped += 1
                    say(f"skipped: {error}")
            if TERMINAL or time.perf_counter() - shown > 10:
                shown = time.perf_counter()
                say(f"{name}: {start + len(some)} of {len(paths)} pictures read", passing=True)
    if skipped:
        say(f"{name}: {skipped} of {len(paths)} pictures skipped")

def cached(folder, side, cache, name):
    """The readable pictures under a folder as a (n, side, side, 3) uint8 array mapped from a file.

    The first call writes it; so does one after a picture was added, removed or changed. If the
    folder has gone, it is used as it is.
    """
    earlier = list(cache.glob(f"{name}-*.bytes"))
    if earlier and not folder.is_dir():
        say(f"{name}: {folder} has gone; going on with its pictures as they were, from {cache}")
        data = earlier[0]
    else:
        paths, stamp = find_pictures(folder), hashlib.sha256()
        for path in paths:
            status = path.stat() if path.exists() else path.lstat()  # links may lead nowhere
            line = f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}\n"
            stamp.update(line.encode(errors="surrogateescape"))
        data = cache / f"{name}-{stamp.hexdigest()[:16]}.bytes"
        if data not in earlier:
            write_file(data, decoded(paths, side, name))
            for path in earlier:
                path.unlink()
    count = data.stat().st_size // (side * side * 3)
    if count == 0:
        raise UserError(f"no picture in {folder} can be read")
    say(f"{name}: {count} pictures from {folder}")
    return np.memmap(data, np.uint8, "r", shape=(count, side, side, 3))

@functools.lru_cache(2)
def shuffled(count, seed, epoch):
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
    """x and y of a step, (batch_size, image_size, image_size, 3) uint8; the seed decides them.

    An epoch counts as many as the larger domain. Pictures of A come in a shuffled order, those of B
    are drawn at random, so that no pair lasts (authors' code). The last batch takes from the first.
    """
    order = shuffled(max(len(A), len(B)), config.seed, epoch)
    places = np.arange(step * config.batch_size, (step + 1) * config.batch_size) % len(order)
    random = np.random.default_rng([config.seed, 2, epoch, step])
    return (crops(A, order[places] % len(A), config.image_size, random),
            crops(B, random.integers(len(B), size=len(places)), config.image_size, random))

def batches(config, A, B, steps, epoch, step):
    """Yields (epoch, step, x, y) from a place on, both counted from 0; one batch is read ahead."""
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(batch, config, A, B, epoch, step)
        for n in range(epoch * steps + step, (config.epochs + config.decay_epochs) * steps):
            ready, ahead = ahead, reader.submit(batch, config, A, B, *divmod(n + 1, steps))
            yield *divmod(n, steps), *ready.result()

# ---- The demo: scenes, each painted as apples or as oranges --------------------------------------

def draw_scene(random):
    """One or two fruits (x, y, radius), the light on them, and the colours of wall and table."""
    fruits = [random.uniform([0.3, 0.35, 0.2], [0.7, 0.65, 0.3])]
    if random.random() < 0.5:
        beside = fruits[0][0] + (0.45 if fruits[0][0] < 0.5 else -0.45)
        fruits.insert(0, [beside, random.uniform(0.3, 0.7), random.uniform(0.14, 0.2)])
    return (fruits, random.uniform([-0.6, -0.8], [0.6, -0.3]),
            random.uniform([0.68, 0.70, 0.72], [0.80, 0.82, 0.86]),
            random.uniform([0.42, 0.36, 0.30], [0.54, 0.46, 0.40]))

def paint(scene, kind, side):
    """A scene with "apples" or with "oranges", which alone differ. (side, side, 3) uint8."""
    fruits, light, wall, table = scene
    v, u = np.mgrid[:side, :side, :1][:2] / side + 0.5 / side
    picture = np.where(v < 0.6, wall * (1.1 - 0.3 * v), table * (0.7 + 0.4 * v))
    for x, y, radius in fruits:
        a, b = (u - x) / radius, (v - y) / radius  # the fruit is the unit disc
        picture *= 1 - 0.45 * np.exp(-((a - 0.1 * light[0]) / 1.1) ** 2 - ((b - 0.95) / 0.25) ** 2)
        lit = np.sqrt((1 - a * a - b * b).clip(0)) + a * light[0] + 1.1 * b * light[1]
        shade = 0.35 + 0.4 * lit.clip(0, 2)
        gloss = (1 - ((a - 0.5 * light[0]) ** 2 + (b - 0.55 * light[1]) ** 2) / 0.09).clip(0)
        if kind == "apples":
            ripe = ((b + 0.85) / 0.5).clip(0, 1)  # green-yellow round the stem, red below
            skin = ([0.75, 0.62, 0.15] + [0.05, -0.57, -0.05] * ripe) * shade + 0.65 * gloss
            mark, colour = (np.abs(a - 0.12 * b - 0.08) < 0.07) & (b < -0.62), [0.30, 0.18, 0.06]
        else:
            pores = 0.06 * np.sin(16 * a) * np.sin(16 * b)
            skin = ([1.0, 0.55, 0.04] + pores) * shade + 0.2 * gloss
            mark, colour = a ** 2 + 3 * (b + 0.72) ** 2 < 0.02, [0.25, 0.38, 0.08]
        edge = ((1 - np.hypot(a, b)) * radius * side + 0.5).clip(0, 1)
        picture += (np.where(mark, colour, skin) - picture) * edge
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)

def draw_demo(run, folders, side):
    """Fills the two folders with what they lack: other scenes as apples than as oranges."""
    for domain, folder in enumerate(run / name for name in folders):
        for i in range(DEMO_SCENES):
            path = folder / f"{i:03}.png"
            if not path.exists():
                scene = draw_scene(np.random.default_rng([domain, i]))
                write_file(path, [png(paint(scene, folder.name, side))])

def judge_demo(model, side):
    """Says how near translations of held-out scenes come to the truth, known as it was painted."""
    scenes = [draw_scene(np.random.default_rng([2, i])) for i in range(DEMO_HELD_OUT)]
    apples, oranges = (np.stack([paint(scene, kind, side) for scene in scenes])
                       for kind in ("apples", "oranges"))
    fruit = (apples != oranges).any(-1)
    for name, network, source, truth in (("apples to oranges", model.G, apples, oranges),
                                         ("oranges to apples", model.F, oranges, apples)):
        idle = abs(source - truth.astype(float)) / 127.5
        error = abs(translate(network, source) - truth.astype(float)) / 127.5
        say(f"{name}: on {len(scenes)} held-out scenes the error inside the fruit is "
            f"{error[fruit].mean() / idle[fruit].mean():.0%} of that of doing nothing; outside the "
            f"fruit it is {error[~fruit].mean():.3f} on the [-1, 1] scale")

# ---- A run and its folder ------------------------------------------------------------------------

def new_folder(out, name):
    """Makes the folder of a new run, `out` or the next free name in runs/, and returns it."""
    if out and out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty; name a new folder or go on with --resume {out}")
    names = itertools.chain([name], (f"{name}-{k}" for k in itertools.count(2)))
    folder = out or next(Path("runs", name) for name in names if not Path("runs", name).exists())
    folder.mkdir(parents=True, exist_ok=out is not None)
    return folder

def readable(path):
    try:
        return len(read_picture(path, 1))
    except UserError:
        return 0

def begin(given, device):
    """A new run as the command line wants it: its folder, its model, its place at the start."""
    folders = [Path(os.path.realpath(given[key])) for key in ("dataA", "dataB") if key in given]
    if len(folders) == 1:
        raise UserError("--dataA and --dataB go together: it takes pictures of both domains")
    side = given.get("image_size", 256 if folders else DEMO["image_size"])
    if folders:
        automatic = {"load_size": round(side * 286 / 256), "blocks": 9 if side >= 256 else 6}
    else:
        automatic = {**DEMO, "load_size": side}
    named = {f.name: given[f.name] for f in fields(Config) if f.name in given}
    config = Config(**{**automatic, **named})
    for folder in folders:  # refused now, before anything is written
        if not any(map(readable, find_pictures(folder))):
            raise UserError(f"no picture in {folder} can be read")
    precision = given.get("precision", "auto")
    if precision == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if native else "fp32"
    model = CycleGAN(config, device, precision)
    run = new_folder(given.get("out"), "-".join(folder.name for folder in folders) or "demo")
    place = {"epoch": 0, "step": 0, "demo": not folders,
             "data": list(map(str, folders)) or ["pictures/apples", "pictures/oranges"]}
    save_checkpoint(run / "latest.pt", model, place)  # from now on it can be resumed
    say(f"new run {run} on {device} in {precision}")
    return run, model, place

def resume(run, given, device):
    """The run in a folder as it was left. Refuses flags that contradict it."""
    model, place = load_checkpoint(run / "latest.pt", device)
    was = {**asdict(model.config), "precision": model.precision, "out": os.path.realpath(run),
           **{f"data{x}": os.path.realpath(run / data) for x, data in zip("AB", place["data"])}}
    for name, value in given.items():
        value = os.path.realpath(value) if isinstance(value, Path) else value
        if name in ("epochs", "decay_epochs") and value > was[name]:
            model.config = replace(model.config, **{name: value})
        elif name in was and value not in (was[name], "auto"):
            raise UserError(f"--{name.replace('_', '-')} {value} contradicts the run in {run}, "
                            f"which has {was[name]}; leave it out, or start a new run")
    say(f"run {run} from step {model.steps} on, on {device} in {model.precision}")
    return run, model, place

def open_log(path, steps):
    """losses.csv, open for appending, with the lines of the steps that are in the checkpoint."""
    head, lines = ",".join(("step", "epoch", "rate", *LOSSES)) + "\n", []
    if path.is_file():
        lines = [line for line in path.read_text(errors="replace").splitlines(keepends=True)
                 if re.match("[0-9]{1,18},.*\n", line) and int(line.split(",")[0]) <= steps]
    write_file(path, [line.encode() for line in (head, *lines)])
    return open(path, "a")

def record(pending, log):
    """Writes the losses of all steps since the last call, which only now leave the device.

    Returns their means. Raises UserError at the first that is not finite.
    """
    table = torch.stack([torch.stack([losses[name] for name in LOSSES]) for *_, losses in pending])
    for (step, epoch, rate, _), values in zip(pending, table.tolist()):
        log.write(f"{step},{epoch}," + ",".join(f"{value:.7g}" for value in (rate, *values)) + "\n")
        for name, value in zip(LOSSES, values):
            if not math.isfinite(value):
                raise UserError(f"the loss {name} is {value} at step {step}; {TOO_FAR}")
    log.flush()
    pending.clear()
    return table.mean(0).tolist()

def sample_grid(model, A, B):
    """Rows of x, G(x), F(G(x)), y, F(y), G(F(y)) for fixed, uncropped pictures. (H, W, 3) uint8."""
    rows, device = [], next(model.parameters()).device
    for k in range(4):
        row = []
        for pictures, there, back in ((A, model.G, model.F), (B, model.F, model.G)):
            with torch.no_grad():
                source = to_tensor(pictures[[k * len(pictures) // 4]], device)
                fake = there(source)
                row += [*to_pictures(torch.cat([source, fake, back(fake)]))]
        side = pictures.shape[1]
        rows.append(np.concatenate([np.pad(picture[:side, :side], ((2, 2), (2, 2), (0, 0)),
                                           constant_values=255) for picture in row], 1))
    return np.concatenate(rows)

def train(run, model, place, options):
    """Trains to the end, or to --max-steps, Ctrl-C or SIGTERM. Returns the exit status."""
    config, device = model.config, next(model.parameters()).device
    if place["demo"]:
        draw_demo(run, place["data"], config.load_size)
    A, B = (cached(run / folder, config.load_size, run / "cache", name)
            for folder, name in zip(place["data"], "AB"))
    steps = math.ceil(max(len(A), len(B)) / config.batch_size)
    epochs = config.epochs + config.decay_epochs
    last = min(options.max_steps, model.steps + (epochs - place["epoch"]) * steps - place["step"])
    if model.steps >= last:
        say(f"nothing to do: {run} has done step {model.steps} of {last}")
        return 0
    signals, hangup = [], [signal.SIGHUP] if os.name == "posix" else []
    if hangup and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        hangup = []  # nohup wants the run to outlive its terminal
    for number in (signal.SIGINT, signal.SIGTERM, *hangup):  # a second one ends the program at once
        signal.signal(number, lambda n, _: (signals.append(n), signal.signal(n, signal.SIG_DFL)))

    pending, shown_step, first_step, waited = [], model.steps, model.steps, 0.0
    began = shown = saved = idle = time.perf_counter()
    with open_log(run / "losses.csv", model.steps) as log:
        for epoch, step, x, y in batches(config, A, B, steps, place["epoch"], place["step"]):
            x, y = to_tensor(x, device), to_tensor(y, device)
            waited += time.perf_counter() - idle
            rate = learning_rate(config, epoch)
            model.set_learning_rate(rate)
            losses = model.step(x, y)
            pending.append((model.steps, epoch + 1, rate, losses))
            ended, stopped = step + 1 == steps, bool(signals) or model.steps >= last
            now = time.perf_counter()
            save = ended or stopped or now - saved > 60 * options.save_minutes
            if save or model.steps == first_step + 1 or now - shown > (1 if TERMINAL else 10):
                means, now = record(pending, log), time.perf_counter()
                pace = (now - shown) / (model.steps - shown_step)
                left = (now - began) / (model.steps - first_step) * (last - model.steps)
                memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0
                say(f"epoch {epoch + 1}/{epochs} step {step + 1}/{steps} | "
                    + " ".join(f"{name} {mean:.2f}" for name, mean in zip(LOSSES, means))
                    + f" | {timedelta(seconds=round(left))} left | {1000 * pace:.0f} ms/step "
                    f"{2 * config.batch_size / pace:.1f} pictures/s "
                    f"{waited / (now - shown):.0%} waiting"
                    + (f" | peak {memory:.1f} GiB" if memory else ""),
                    passing=not (ended or stopped))
                shown, shown_step, waited = now, model.steps, 0.0
            if ended and (epoch + 1) % options.sample_every == 0:
                grid = png(sample_grid(model, A, B))
                write_file(run / "samples" / f"epoch_{epoch + 1:04}.png", [grid])
            if save:
                if not all(parameter.isfinite().all() for parameter in model.parameters()):
                    raise UserError(f"a weight is not finite after step {model.steps}; {TOO_FAR}")
                os.fsync(log.fileno())
                place.update(epoch=epoch + ended, step=(step + 1) % steps)
                save_checkpoint(run / "latest.pt", model, place)
                if ended and (epoch + 1) % options.save_every == 0:
                    save_checkpoint(run / f"epoch_{epoch + 1:04}.pt", model, place)
                saved = time.perf_counter()
            if stopped:
                break
            idle = time.perf_counter()
    if place["demo"] and not signals:
        judge_demo(model, config.load_size)
    finished = place["epoch"] == epochs
    say(f"{'finished' if finished else 'stopped'} after step {model.steps}; all is saved in {run}; "
        + ("translate with: python translate.py --checkpoint " if finished
           else "go on with: python train.py --resume ") + shlex.quote(str(run)))
    return 128 + signals[0] if signals else 0

def main():
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # names may hold what the screen cannot show
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # before training, as Ctrl-C
    options, reason = parse(), None
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("several processes cannot train one run yet; start it without torchrun")
        given, device = vars(options), pick_device(options.device)
        run = resume(options.resume, given, device) if "resume" in given else begin(given, device)
        return train(*run, options)
    except UserError as error:
        reason = error
    except OSError as error:
        reason = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        reason = "out of memory; a lower --image-size, --width or --batch-size needs less"
    except KeyboardInterrupt:
        reason = "stopped before the first step"
    return f"{chr(10) if TERMINAL else ''}train.py: {reason}"

if __name__ == "__main__":
    sys.exit(main())
