"""Trains a CycleGAN on two folders of pictures; without any, on apples and oranges that it draws.

    python train.py                                           the drawn demo, minutes on a CPU
    python train.py --dataA apples/ --dataB oranges/          two folders of your own
    python train.py --resume runs/apples-oranges              goes on where that run stopped
    torchrun --nproc-per-node 8 train.py --dataA ...          on 8 GPUs, each with its own batch
"""

import argparse
import functools
import hashlib
import io
import itertools
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from cyclegan import (LOSSES, Config, CycleGAN, UserError, find_pictures, learning_rate,
                      load_checkpoint, out_of_memory, pick, png, read_checkpoint, read_picture,
                      save_checkpoint, to_pictures, to_tensor, translate, write_file)

if os.name == "posix":
    import fcntl
else:
    import msvcrt

TOO_FAR = "the last checkpoint is from before; start again with a lower --lr or --precision fp32"
DEMO = dict(image_size=64, load_size=64, width=16, blocks=2, lr=5e-4, epochs=4, decay_epochs=4)
DEMO_SCENES, DEMO_HELD_OUT = 200, 32
HABITS = dict(save_every=50, save_minutes=10.0, sample_every=1)  # may change on resume
START = {"epoch": 0, "done": 0, "demo": True, "data": ["pictures/apples", "pictures/oranges"],
         **HABITS}  # where in its run a checkpoint is
FRAMES = 40  # of the animation
AHEAD = 8  # batches that a thread reads meanwhile; a disk may pause for as long as some steps take
TERMINAL = bool(sys.stdout) and sys.stdout.isatty()
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun, as are the ranks
RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) if WORLD > 1 else 0
                    for name in ("RANK", "LOCAL_RANK"))  # that of RANK 0 alone writes and prints

def parse():
    """The command line; Config's fields, folders and precision only if they were given."""
    def positive(text):
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
        return int(text)

    parser = argparse.ArgumentParser(
        usage="train.py [--dataA FOLDER --dataB FOLDER | --resume RUN] [option ...]",
        description=__doc__, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The demo has other defaults:\n "
               + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in DEMO.items()))
    add = parser.add_argument_group("pictures and run").add_argument
    add("--dataA", type=Path, metavar="FOLDER", help="pictures of domain A, the paper's X")
    add("--dataB", type=Path, metavar="FOLDER",
        help="pictures of domain B, the paper's Y (default: the demo draws both)")
    add("--out", type=Path, metavar="RUN", help="new folder (default: the next free name in runs/)")
    add("--resume", type=Path, metavar="RUN", help="go on with the run in this folder")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"),
        help="where to compute (default: cuda if there is one, else cpu)")
    add("--precision", choices=("auto", "fp32", "bf16"),
        help="arithmetic of the networks (default: bf16 on a CUDA GPU that has it, else fp32)")
    add("--max-steps", type=positive, default=math.inf, metavar="N",
        help="stop after step N of the run, to go on later (default: after all epochs)")
    add("--save-every", type=positive, metavar="N",
        help="keep the checkpoint of every Nth epoch as epoch_0050.pt and so on (default: 50)")
    add("--save-minutes", type=float, metavar="M",
        help="save every M minutes, besides after every epoch (default: 10)")
    add("--sample-every", type=positive, metavar="N",
        help="draw samples after every Nth epoch (default: 1)")
    groups = {"image_size": "sizes", "objective": "losses", "buffer_size": "training"}
    automatic = {"load_size": "image size x 286 / 256", "blocks": "9, but 6 if image size < 256"}
    for f in fields(Config):
        if f.name in groups:
            add = parser.add_argument_group(groups[f.name]).add_argument
        add("--" + f.name.replace("_", "-"), type=f.type,
            metavar={int: "N", float: "VALUE", str: "lsgan|log"}[f.type],
            help=f"{f.metadata['help']} (default: {automatic.get(f.name, f.default)})")
    return parser.parse_args()

def say(line, passing=False):
    """Prints a line. On a terminal a passing one is cut to fit, and the next one replaces it."""
    if RANK:
        return
    if TERMINAL:
        line = "\r\033[K" + (line[:shutil.get_terminal_size().columns - 1] if passing else line)
    try:
        print(line, end="" if passing and TERMINAL else "\n", flush=True)
    except OSError:  # whoever read it has gone; that must not end a training
        sys.stdout = open(os.devnull, "w")

# ---- Several processes ---------------------------------------------------------------------------

def connect(device):
    """Joins torchrun's processes. Returns a group to wait in on the host, None if there is one."""
    if WORLD == 1:
        return None
    if device.type == "mps":
        raise UserError("several processes train on --device cuda or cpu, not on mps")
    if device.type == "cuda":
        if LOCAL_RANK >= torch.cuda.device_count():
            raise UserError(f"--nproc-per-node of torchrun: this machine has "
                            f"{torch.cuda.device_count()} GPUs; start one process for each")
        torch.cuda.set_device(LOCAL_RANK)
        say("steps are not recorded as a CUDA graph, as there are several processes")
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return dist.new_group(backend="gloo", timeout=timedelta(days=1))  # reading pictures is slow
    except (ValueError, RuntimeError) as error:
        raise UserError(f"WORLD_SIZE is {WORLD}, but the processes cannot connect ({error}); start "
                        "them with torchrun") from error

def agree(group, *values):
    """The largest of each value over all processes, for which this waits."""
    if group:
        largest = torch.tensor([0, *values], dtype=torch.int64)  # for no value nobody would wait
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        values = tuple(largest[1:].tolist())
    return values

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
    earlier, picture = [*cache.glob(f"{name}-*.bytes")], 3 * side ** 2
    if earlier and not folder.is_dir():
        say(f"{name}: {folder} has gone; going on with its pictures as they were, from {cache}")
        data = max(earlier, key=os.path.getmtime)
    else:
        paths, stamp = find_pictures(folder), hashlib.sha256()
        for path in paths:
            status = path.stat() if path.exists() else path.lstat()  # links may lead nowhere
            line = f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}\n"
            stamp.update(line.encode(errors="surrogateescape"))
        data = cache / f"{name}-{stamp.hexdigest()[:16]}.bytes"
        if not data.exists() or data.stat().st_size % picture:
            write_file(data, decoded(paths, side, name))
        for path in set(earlier) - {data}:
            path.unlink()
    count = data.stat().st_size // picture
    if count == 0:
        raise UserError(f"no picture in {folder} can be read")
    say(f"{name}: {count} pictures from {folder}")
    return np.memmap(data, np.uint8, "r", shape=(count, side, side, 3))

def open_pictures(run, place, side, group):
    """A and B as `cached` gives them; one process of each machine reads before its others do."""
    for mine in (RANK == 0, RANK > LOCAL_RANK == 0, LOCAL_RANK > 0):  # machines may share a disk
        if mine:
            if place["demo"]:
                draw_demo(run, side)
            A, B = (cached(run / folder, side, run / "cache", name)
                    for folder, name in zip(place["data"], "AB"))
        agree(group)
    if agree(group, len(A), len(B), -len(A), -len(B)) != (len(A), len(B), -len(A), -len(B)):
        raise UserError("the machines do not have the same pictures")
    return A, B

@functools.lru_cache(2)
def shuffled(count, seed, epoch):
    return np.random.default_rng([seed, 1, epoch]).permutation(count)

def crops(pictures, chosen, side, random):
    """The chosen pictures, each cropped at a random place and flipped with probability 1/2.

    Each is read whole: through the mapping, one page can fetch megabytes around it from the disk.
    Of several processes each draws the random numbers for all and takes its share of the pictures.
    """
    one = pictures[0]
    corners = random.integers(len(one) - side + 1, size=(len(chosen), 2))
    flips, result = random.random(len(chosen)) < 0.5, []
    for k in np.array_split(np.arange(len(chosen)), WORLD)[RANK]:
        start, (top, left) = one.size * int(chosen[k]), corners[k]
        read = np.fromfile(pictures.filename, np.uint8, one.size, offset=start).reshape(one.shape)
        picture = read[top:top + side, left:left + side]
        result.append(picture[:, ::-1] if flips[k] else picture)
    return np.stack(result)

def batch(config, A, B, epoch, done):
    """x and y of a step, (batch_size, image_size, image_size, 3) uint8, after `done` pictures.

    An epoch counts as many as the larger domain. Pictures of A come in a shuffled order, those of B
    are drawn at random, so that no pair lasts (authors' code). The last batch takes from the first.
    """
    order = shuffled(max(len(A), len(B)), config.seed, epoch)
    places = np.arange(done, done + WORLD * config.batch_size) % len(order)
    random = np.random.default_rng([config.seed, 2, epoch, done])
    return (crops(A, order[places] % len(A), config.image_size, random),
            crops(B, random.integers(len(B), size=len(places)), config.image_size, random))

def batches(config, A, B, epoch, done):
    """Yields (epoch, the place after this step, x, y); a thread reads AHEAD batches ahead.

    A place is an epoch, counted from 0, and how many of its pictures are done, which holds for any
    number of processes.
    """
    coming, count, last = deque(), max(len(A), len(B)), config.epochs + config.decay_epochs
    with ThreadPoolExecutor(1) as reader:
        while coming or epoch < last:
            while len(coming) <= AHEAD and epoch < last:
                end = done + WORLD * config.batch_size
                after = (epoch, end) if end < count else (epoch + 1, 0)
                coming.append((epoch, after, reader.submit(batch, config, A, B, epoch, done)))
                epoch, done = after
            at, after, read = coming.popleft()
            yield at, after, *read.result()

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

def draw_demo(run, side):
    """Fills the two folders with what they lack: other scenes as apples than as oranges."""
    for domain, folder in enumerate(run / name for name in START["data"]):
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
    idle = abs(apples - oranges.astype(float))[fruit].mean()
    for name, network, source, truth in (("apples to oranges", model.G, apples, oranges),
                                         ("oranges to apples", model.F, oranges, apples)):
        error = abs(translate(network, source) - truth.astype(float))
        say(f"{name}: on {len(scenes)} held-out scenes the error inside the fruit is "
            f"{error[fruit].mean() / idle:.0%} of that of doing nothing; outside the fruit it is "
            f"{error[~fruit].mean() / 127.5:.3f} on the [-1, 1] scale")

# ---- A run and its folder ------------------------------------------------------------------------

def lock(run):
    """Keeps other trainings out of a run's folder until this process ends, however it ends."""
    file = os.open(run / ".lock", os.O_RDWR | os.O_CREAT, 0o666)  # closing it would unlock it
    try:
        if os.name == "posix":
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        os.write(file, f"{os.getpid():<9}\n".encode())
    except (BlockingIOError, PermissionError):
        raise UserError(f"another training is at work in {run}; let it end, or stop it: process "
                        + (run / ".lock").read_text().strip()) from None
    except OSError as error:
        say(f"{run / '.lock'}: {error.strerror}; take care that nothing else trains in this folder")

def new_folder(out, name):
    """Makes the folder of a new run, `out` or the next free name in runs/, and returns it."""
    left = {".lock", "latest.pt.part"}  # by a start that was killed
    if out and out.is_dir() and {path.name for path in out.iterdir()} - left:
        raise UserError(f"--out {out} is not empty; name a new folder or go on with --resume {out}")
    folders = (Path("runs", f"{name}-{k}" if k > 1 else name) for k in itertools.count(1))
    folder = out or next(folder for folder in folders if not folder.exists())
    folder.mkdir(parents=True, exist_ok=out is not None)
    lock(folder)
    return folder

def readable(path):
    try:
        return len(read_picture(path, 1))
    except UserError:
        return 0

def begin(given, device):
    """Makes the folder of a new run as the command line wants it, with a checkpoint at step 0."""
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
    run = new_folder(given.get("out"), "-".join(folder.name for folder in folders) or "demo")
    place = {**START, **{name: given[name] for name in HABITS if name in given}}
    if folders:
        place.update(demo=False, data=list(map(str, folders)))
    model = CycleGAN(config, device, given.get("precision", "auto"))
    save_checkpoint(run / "latest.pt", model, place)
    return run

def resume(run, saved, given, device):
    """The model and the place in a run's checkpoint. Refuses flags that contradict it."""
    model, place = load_checkpoint(run / "latest.pt", device, saved)
    if isinstance(place, dict) and "step" in place:  # as the first release counted
        place = {**HABITS, "done": place.pop("step") * model.config.batch_size, **place}
    if not (isinstance(place, dict) and {name: type(place[name]) for name in place}
            == {name: type(START[name]) for name in START}
            and list(map(type, place["data"])) == [str, str] and "\0" not in "".join(place["data"])
            and all(0 <= place[name] < 2**48 for name in ("epoch", "done"))
            and all(place[name] > 0 for name in ("save_every", "sample_every"))):
        raise UserError(f"{run / 'latest.pt'} is damaged: it does not say how far its run is")
    place.update({name: given[name] for name in HABITS if name in given})
    was = {**asdict(model.config), "precision": model.precision, "out": os.path.realpath(run),
           **{f"data{x}": os.path.realpath(run / data) for x, data in zip("AB", place["data"])}}
    for name, value in given.items():
        value = os.path.realpath(value) if isinstance(value, Path) else value
        if name in ("epochs", "decay_epochs") and value > was[name]:
            model.config = replace(model.config, **{name: value})
        elif name in was and value not in (was[name], "auto"):
            raise UserError(f"--{name.replace('_', '-')} {value} contradicts the run in {run}, "
                            f"which has {was[name]}; leave it out, or start a new run")
    say((f"run {run} from step {model.steps} on" if model.steps else f"new run {run}")
        + f", on {device} in {model.precision}" + f", {WORLD} processes" * (WORLD > 1))
    return model, place

def start(given, device, group):
    """(run, model, place) as the command line wants them; rank 0 has the files, and sends them."""
    found = [None, None]
    if RANK == 0:
        if "resume" not in given:
            run = begin(given, device)
        elif ((run := given["resume"]) / "latest.pt").is_file():
            lock(run)
        else:
            raise UserError(f"--resume {run}: there is no run, which would have a latest.pt")
        for pattern in ("*.part", "cache/*.part", "samples/*.part"):  # of a process that was killed
            for part in run.glob(pattern):
                part.unlink()
        found = [run, read_checkpoint(run / "latest.pt")]
    if group:
        dist.broadcast_object_list(found, group=group)
    return found[0], *resume(*found, given, device)

def trim_log(path, steps):
    """Leaves of losses.csv its head and the lines of the steps that are in the checkpoint."""
    head, lines = ",".join(("step", "epoch", "rate", *LOSSES)) + "\n", []
    if path.is_file():
        lines = [line for line in path.read_text(errors="replace").splitlines(keepends=True)
                 if re.match("[0-9]{1,18},.*\n", line) and int(line.split(",")[0]) <= steps]
    write_file(path, [line.encode() for line in (head, *lines)])

def record(pending, path):
    """Appends the losses of the pending steps, which only now leave the device.

    Returns their means. Raises UserError at the first that is not finite, or if writing fails.
    """
    table = torch.stack([torch.stack([losses[name] for name in LOSSES]) for *_, losses in pending])
    table = table.cpu().numpy()
    try:
        with open(path, "a") as log:
            for (step, epoch, rate, _), row in zip(pending, table):
                log.write(f"{step},{epoch}," + ",".join(f"{v:.7g}" for v in (rate, *row)) + "\n")
            log.flush()
            os.fsync(log.fileno())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    for k, loss in np.argwhere(~np.isfinite(table)):
        raise UserError(f"the loss {LOSSES[loss]} is {table[k, loss]} at step {pending[k][0]}; "
                        + TOO_FAR)
    return table.mean(0)

@torch.no_grad()
def sample_grid(model, A, B):
    """Rows of x, G(x), F(G(x)), y, F(y), G(F(y)) for fixed, uncropped pictures. (H, W, 3) uint8."""
    shown, device, side = [], next(model.parameters()).device, A.shape[1]
    for k in range(4):
        for pictures, there, back in ((A, model.G, model.F), (B, model.F, model.G)):
            source = to_tensor(pictures[[k * len(pictures) // 4]], device)
            fake = there(source)
            shown += [*to_pictures(torch.cat([source, fake, back(fake)]))[:, :side, :side]]
    framed = np.pad(shown, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=255)
    return np.concatenate([np.concatenate(row, 1) for row in np.split(framed, 4)])

def animate(run):
    """Writes samples.gif: the samples, or FRAMES of them, from the first epoch to the last."""
    paths = sorted((run / "samples").glob("epoch_*.png"), key=lambda path: (len(path.name), path))
    frames, file = [], io.BytesIO()
    for k in np.linspace(0, len(paths) - 1, min(FRAMES, len(paths))).round().astype(int):
        try:
            frames.append(Image.fromarray(read_picture(paths[k])))
            frames[-1].thumbnail((960, 960))
        except UserError as error:
            say(f"skipped: {error}")
    if frames:
        times = [250] * (len(frames) - 1) + [2000]  # milliseconds
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)
        write_file(run / "samples.gif", [file.getvalue()])

def save(run, model, place):
    """Writes latest.pt, and before it, so that none is ever missing, the copy of an Nth epoch."""
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise UserError(f"a weight is not finite after step {model.steps}; {TOO_FAR}")
    if place["done"] == 0 and place["epoch"] % place["save_every"] == 0:
        save_checkpoint(run / f"epoch_{place['epoch']:04}.pt", model, place)
    save_checkpoint(run / "latest.pt", model, place)

def train(run, model, place, max_steps, group):
    """Trains to the end, or to --max-steps, Ctrl-C or SIGTERM. Returns the exit status."""
    config, device = model.config, next(model.parameters()).device
    A, B = open_pictures(run, place, config.load_size, group)
    count, size = max(len(A), len(B)), WORLD * config.batch_size
    epochs = config.epochs + config.decay_epochs
    last = min(max_steps, model.steps + math.ceil(max(1, count - place["done"]) / size)
               + (epochs - place["epoch"] - 1) * math.ceil(count / size))
    if model.steps >= last:
        say(f"nothing to do: {run} has done step {model.steps} of {last}")
        return 0
    signals = []

    def on_signal(number, _):
        signals.append(number)
        if WORLD == 1:  # a second one ends the program at once; torchrun repeats the first
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    if os.name == "posix" and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # by nohup
        signal.signal(signal.SIGHUP, on_signal)
    if RANK == 0:
        trim_log(run / "losses.csv", model.steps)
    pending, running, first_step, waited = [], deque(), model.steps, 0.0
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        say("the first step compiles the networks, which may take a minute or two")
    began = shown = saved = idle = time.perf_counter()
    for epoch, after, x, y in batches(config, A, B, place["epoch"], place["done"]):
        waited += time.perf_counter() - idle
        x, y = to_tensor(x, device), to_tensor(y, device)
        rate = learning_rate(config, epoch)
        model.set_learning_rate(rate)
        losses, now = model.step(x, y), time.perf_counter()
        if device.type == "cuda":  # else steps would be asked for faster than pictures are read
            running.append(torch.cuda.Event(blocking=True))
            running[-1].record()
            if len(running) > AHEAD:
                running.popleft().synchronize()
        ended, stopped = after[1] == 0, bool(signals) or model.steps >= last
        late = now - saved > 60 * place["save_minutes"]
        stopped, due = agree(group, stopped, stopped or ended or late)
        place["epoch"], place["done"] = after
        if RANK == 0:
            pending.append((model.steps, epoch + 1, rate, losses))
            if due or model.steps == first_step + 1 or now - shown > (1 if TERMINAL else 10):
                means, now = record(pending, run / "losses.csv"), time.perf_counter()
                pace = (now - shown) / len(pending)
                left = (now - began) / max(1, model.steps - first_step - 1) * (last - model.steps)
                memory = torch.cuda.max_memory_allocated() / 2**30  # 0 without CUDA
                say(f"epoch {epoch + 1}/{epochs} step {model.steps}/{last} | "
                    + " ".join(f"{name} {mean:.2f}" for name, mean in zip(LOSSES, means))
                    + f" | {timedelta(seconds=round(left))} left | {1000 * pace:.0f} ms/step "
                    f"{2 * size / pace:.1f} pictures/s {waited / (now - shown):.0%} waiting"
                    + f" | peak {memory:.1f} GiB" * bool(memory), passing=not (ended or stopped))
                began = now if model.steps == first_step + 1 else began  # not that of compiling
                pending, shown, waited = [], now, 0.0
            if ended and (epoch + 1) % place["sample_every"] == 0:
                grid = png(sample_grid(model, A, B))
                write_file(run / "samples" / f"epoch_{epoch + 1:04}.png", [grid])
            if due:
                save(run, model, place)
        saved = time.perf_counter() if due else saved
        if stopped:
            break
        idle = time.perf_counter()
    agree(group)  # the others wait until rank 0 has saved
    if place["demo"] and not signals and RANK == 0:
        judge_demo(model, config.load_size)
    if RANK == 0:
        animate(run)
    finished = place["epoch"] == epochs
    say(f"{'finished' if finished else 'stopped'} after step {model.steps}; all is saved in {run}; "
        + ("translate with: python translate.py --checkpoint " if finished
           else "go on with: python train.py --resume ") + shlex.quote(str(run)))
    return 128 + signals[0] if signals else 0

def main():
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # names may hold what the screen cannot show
    warnings.showwarning = lambda warning, *_: say(f"note: {warning}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # before training, as Ctrl-C
    options = parse()
    try:
        device, _ = pick(options.device)
        group = connect(device)
        return train(*start(vars(options), device, group), options.max_steps, group)
    except UserError as error:
        reason = error
    except OSError as error:
        reason = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    except (MemoryError, RuntimeError) as error:
        if WORLD > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            reason = "another process of this run has ended; once that is mended, --resume goes on"
        elif out_of_memory(error):
            reason = "out of memory; a lower --image-size, --width or --batch-size needs less"
        else:
            raise
    except KeyboardInterrupt:
        reason = "stopped before the first step"
    rank = f" (rank {RANK})" if WORLD > 1 else ""
    print(f"{chr(10) if TERMINAL else ''}train.py{rank}: {reason}", file=sys.stderr, flush=True)
    return 1

if __name__ == "__main__":
    status = main()
    if WORLD > 1:  # no farewells to processes that may have gone; gloo's even aborted now and then
        os._exit(status)
    sys.exit(status)
