"""Trains a CycleGAN on two folders of pictures; without any, on apples and oranges that it draws.

    python train.py                                           the drawn demo, minutes on a CPU
    python train.py --dataA apples/ --dataB oranges/          two folders of your own
    python train.py --resume runs/apples-oranges              continues where that run stopped
    torchrun --nproc-per-node 8 train.py --dataA ...          on 8 GPUs, each with its own batch
"""

import argparse
import fnmatch
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
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw

import cyclegan
from cyclegan import Config, CycleGAN, UserError, learning_rate

if os.name == "posix":
    import fcntl
else:
    import msvcrt

DEMO = {"image_size": 64, "load_size": 64, "width": 16, "blocks": 2, "lambda_identity": 1.0,
        "lr": 1e-3, "epochs": 2, "decay_epochs": 6}
DEMO_FOLDERS = ["pictures/apples", "pictures/oranges"]  # in the run's folder
AHEAD = 8  # batches read in advance
COLUMNS = ("x", "G(x)", "F(G(x))", "y", "F(y)", "G(F(y))")  # of the samples
FRAMES = 40  # of samples.gif, at most
TERMINAL = bool(sys.stdout) and sys.stdout.isatty()
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun, as is the rank
RANK = int(os.environ.get("RANK", 0)) if WORLD > 1 else 0  # 0 alone writes and prints


# ---- Command line --------------------------------------------------------------------------------


def parse():
    """Parses the command line; options that a checkpoint stores are there only if given."""
    parser = argparse.ArgumentParser(
        usage="train.py [--dataA FOLDER --dataB FOLDER | --resume RUN] [option ...]",
        description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The demo has other defaults:\n "
               + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in DEMO.items()))
    add = parser.add_argument_group("pictures and run").add_argument
    add("--dataA", type=Path, metavar="FOLDER", help="pictures of domain A, the paper's X")
    add("--dataB", type=Path, metavar="FOLDER",
        help="pictures of domain B, the paper's Y (default: the demo draws both)")
    add("--out", type=Path, metavar="RUN", help="new folder (default: the next free name in runs/)")
    add("--resume", type=Path, metavar="RUN", help="continue the run in this folder")
    add("--start-from", type=Path, metavar="RUN_OR_FILE_OR_FOLDER",
        help="begin a new run with the networks of a run, a checkpoint or the authors' files")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"),
        help="where to compute (default: cuda if there is one, else cpu)")
    add("--precision", choices=("auto", "fp32", "bf16"),
        help="arithmetic of the networks (default: bf16 on a CUDA GPU that has it, else fp32)")
    add("--eager", action="store_true",
        help="on CUDA, neither compile the networks nor capture the step as a graph")
    add("--max-steps", type=positive, default=math.inf, metavar="N",
        help="stop after step N of the run, to continue later (default: after all epochs)")
    add("--save-every", type=positive, metavar="N",
        help="keep the checkpoint of every Nth epoch as epoch_0050.pt and so on (default: 50)")
    add("--save-minutes", type=float, metavar="M",
        help="save every M minutes, besides every Nth epoch and at the end (default: 10)")
    add("--sample-every", type=positive, metavar="N",
        help="draw samples after every Nth epoch (default: 1)")
    add_settings(parser)
    return parser.parse_args()


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def add_settings(parser):
    """A flag for every field of Config."""
    groups = {"image_size": "networks and images", "objective": "losses", "buffer_size": "training"}
    metavars = {int: "N", float: "VALUE", str: "lsgan|log"}
    for f in fields(Config):
        if f.name in groups:
            add = parser.add_argument_group(groups[f.name]).add_argument
        default = "" if f.default is None else f" (default: {f.default})"
        kind = {"type": f.type, "metavar": metavars.get(f.type)}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        add(flag(f.name), help=f.metadata["help"] + default, **kind)


def flag(name, value=None):
    """A setting as it is typed: --load-size, --load-size 286, --no-flip."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}" if value is None else f"--{name} {value}"


def log(line, passing=False):
    """Prints a line. On a terminal a passing one is cut to fit, and the next one replaces it."""
    if RANK > 0:
        return
    if TERMINAL:
        width = shutil.get_terminal_size().columns - 1
        line = "\r\033[K" + (line[:width] if passing else line)
    try:
        print(line, end="" if passing and TERMINAL else "\n", flush=True)
    except OSError:  # whoever read it has gone; that must not end a training
        sys.stdout = open(os.devnull, "w")


# ---- Several processes ---------------------------------------------------------------------------


def connect(device):
    """Joins torchrun's processes. Returns the group used to wait for one another, or None.

    It is gloo's, with a timeout of a day: NCCL would give up while rank 0 reads the pictures.
    """
    if WORLD == 1:
        return None
    if device.type == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise UserError("--nproc-per-node of torchrun: this machine has "
                            f"{torch.cuda.device_count()} GPUs; start one process for each")
        torch.cuda.set_device(local_rank)
        log("steps are not captured as a CUDA graph, as there are several processes")
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return dist.new_group(backend="gloo", timeout=timedelta(days=1))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"WORLD_SIZE is {WORLD}, but the processes cannot connect ({error}); start "
                        "them with torchrun") from error


def max_over_processes(group, *values):
    """Waits for all processes; returns the largest of each value."""
    if group is None:
        return values
    largest = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    return largest.tolist()


def from_rank_0(group, value):
    """Returns rank 0's value in every process."""
    values = [value]
    if group:
        dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


# ---- Pictures: decoded once into a file of bytes; a step crops and flips from there --------------


class Pictures:
    """The pictures of a domain, of any shapes, one after another in a file of bytes.

    A second file holds their heights and widths, unless all are squashed to squares.
    """

    def __init__(self, file, config):
        self.file, side = file, config.load_size
        if config.squash:
            self.shapes = np.full((file.stat().st_size // (3 * side**2), 2), side)
        else:
            self.shapes = np.fromfile(shapes_file(file), np.int32).reshape(-1, 2).astype(int)
        ends = 3 * self.shapes.prod(1, dtype=np.int64).cumsum()
        self.starts = np.concatenate([[0], ends])

    def __len__(self):
        return len(self.shapes)

    def rows(self, index, top, bottom):
        """Some rows of a picture, (bottom - top, W, 3) uint8, in one read.

        That is faster than a mapping, where one page fault may fetch megabytes.
        """
        width = self.shapes[index][1]
        start = self.starts[index] + 3 * width * top
        data = np.fromfile(self.file, np.uint8, 3 * width * (bottom - top), offset=start)
        return data.reshape(-1, width, 3)


def shapes_file(file):
    return file.with_suffix(".shapes")


def open_pictures(run, group):
    """A and B, as Pictures in files that rank 0 writes: all processes must see the run's folder."""
    config, cache = run.model.config, run.folder / "cache"
    if RANK == 0:
        if run.demo:
            draw_demo(run.folder, config.load_size)
        for folder, name in zip(run.data, "AB"):
            update_cache(run.folder / folder, config, cache, name)
    if group:
        dist.barrier(group)
    return [cached_pictures(cache, name, config) for name in "AB"]


def cached_pictures(cache, name, config):
    files = sorted(cache.glob(f"{name}-*.bytes"), key=os.path.getmtime)
    if not files:
        raise UserError(f"{cache} is not visible to this process; all need the run's folder")
    return Pictures(files[-1], config)


def update_cache(folder, config, cache, name):
    """Writes the readable pictures under a folder to one file, unless it is there already.

    Its name holds a hash of the pictures' names, sizes and times, so adding, removing or changing
    one rebuilds it. If the folder is gone, the file is used as it is.
    """
    earlier = [*cache.glob(f"{name}-*.bytes")]
    if earlier and not folder.is_dir():
        log(f"{name}: {folder} no longer exists; its pictures are taken from {cache}")
        return
    paths = cyclegan.find_pictures(folder)
    file = cache / f"{name}-{hash_of(folder, paths)}.bytes"
    if earlier and file not in earlier:
        log(f"{name}: the pictures in {folder} are not those of the run's last start")
    if not is_complete(file, config):
        need = check_room(paths, config, cache)
        log(f"{name}: reading {len(paths):,} files into about {need / 1e6:,.1f} MB")
        cyclegan.write_file(file, decoded(paths, config, file))
    for path in {*cache.glob(f"{name}-*")} - {file, shapes_file(file)}:
        path.unlink()
    count = len(Pictures(file, config))
    if count == 0:
        raise UserError(f"no picture in {folder} can be read")
    log(f"{name}: {count} picture{'s' if count > 1 else ''} from {folder}"
        + (f", {len(paths) - count} of {len(paths)} skipped" if count < len(paths) else ""))
    ignored = cyclegan.ignored_files(folder)
    if ignored:
        log(f"{name}: ignored: {ignored}")


def hash_of(folder, paths):
    stamp = hashlib.sha256()
    for path in paths:
        status = path.stat() if path.exists() else path.lstat()  # links may lead nowhere
        line = f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}\n"
        stamp.update(line.encode(errors="surrogateescape"))
    return stamp.hexdigest()[:16]


def is_complete(file, config):
    """Whether a file of pictures is there, and as long as their shapes say."""
    try:
        return Pictures(file, config).starts[-1] == file.stat().st_size
    except (OSError, ValueError):
        return False


def check_room(paths, config, folder):
    """How many bytes the cache of some pictures takes, going by 200 of them.

    Raises UserError if the disk of the folder has less room.
    """
    sizes = []
    for k in np.linspace(0, len(paths) - 1, min(200, len(paths))).astype(int):
        if paths[k].is_file():
            with suppress(Exception), Image.open(paths[k]) as image:
                width, height = cyclegan.scaled_size(*image.size, config.load_size, config.squash)
                readable = max(image.size) <= 100 * min(image.size)  # see read_picture
                sizes.append(3 * width * height * readable)
    need = len(paths) * sum(sizes) // max(1, len(sizes))
    folder = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    room = shutil.disk_usage(folder).free
    if need > room:
        raise UserError(f"{len(paths):,} pictures take about {need:,} bytes, but {folder} has room "
                        f"for {room:,}; a lower --load-size takes less, --out names another disk")
    return need


def decoded(paths, config, file):
    """Yields each picture as bytes, in the order of the paths; logs which cannot be read."""
    shown, shapes = time.perf_counter(), []
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), 64):  # a bounded number in memory, however many there are
            some = paths[start:start + 64]
            for reading in [pool.submit(cyclegan.read_picture, path, config.load_size,
                                        config.squash) for path in some]:
                try:
                    picture = reading.result()
                except UserError as error:
                    log(f"skipped: {error}")
                    continue
                shapes.append(picture.shape[:2])
                yield picture.tobytes()
            if TERMINAL or time.perf_counter() - shown > 10:
                shown = time.perf_counter()
                log(f"{file.name[0]}: {start + len(some)} of {len(paths)} pictures read",
                    passing=True)
    if not config.squash:  # before the pictures' file gets its name: it never lacks its shapes
        cyclegan.write_file(shapes_file(file), [np.array(shapes, np.int32).tobytes()])


def batches(config, A, B, epoch, done):
    """Yields x and y of each step of an epoch after its first `done` pictures.

    They are a function of seed, epoch and `done` alone, so a run resumes to the same pictures, and
    with any number of processes. A thread reads up to AHEAD of them in advance.
    """
    count, size = max(len(A), len(B)), WORLD * config.batch_size
    order = np.random.default_rng([config.seed, 1, epoch]).permutation(count)
    coming = deque()
    with ThreadPoolExecutor(1) as reader:
        for start in range(done, count, size):
            coming.append(reader.submit(batch, config, A, B, order, epoch, start))
            if len(coming) > AHEAD:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def batch(config, A, B, order, epoch, start):
    """x and y of one step, (batch_size, image_size, image_size, 3) uint8.

    A follows a permutation of as many places as the larger domain has pictures, B is drawn at
    random, so that no pair lasts (authors' code). The last batch is filled up from the first.
    """
    places = np.arange(start, start + WORLD * config.batch_size) % len(order)
    random = np.random.default_rng([config.seed, 2, epoch, start])
    return (crops(config, A, order[places] % len(A), random),
            crops(config, B, random.integers(len(B), size=len(places)), random))


def crops(config, pictures, chosen, random):
    """The chosen pictures, each cropped at a random place and flipped with probability 1/2.

    With several processes, each draws the random numbers for all and takes its share of pictures.
    """
    side = config.image_size
    corners = random.integers(pictures.shapes[chosen] - side + 1)
    flips = random.random(len(chosen)) < 0.5
    result = []
    share = len(chosen) // WORLD
    for k in range(share * RANK, share * (RANK + 1)):
        top, left = corners[k]
        crop = pictures.rows(chosen[k], top, top + side)[:, left:left + side]
        result.append(crop[:, ::-1] if config.flip and flips[k] else crop)
    return np.stack(result)


# ---- Runs ----------------------------------------------------------------------------------------


@dataclass
class Run:
    """A training run: its folder, its model, and how far it has come."""

    folder: Path
    model: CycleGAN
    data: list                   # folders of A and B; the demo's are in the run's folder
    demo: bool = False
    epoch: int = 0               # epochs completed
    done: int = 0                # pictures completed of the epoch under way
    save_every: int = 50         # epochs
    save_minutes: float = 10.0
    sample_every: int = 1        # epochs

    def at_numbered_epoch(self):
        return self.done == 0 and self.epoch > 0 and self.epoch % self.save_every == 0

    def save(self, last=False):
        """Writes latest.pt; before it, so that none is ever missing, the copy of an Nth epoch.

        One that cannot take the place of the old one ends the program only if it is the last.
        """
        if RANK > 0:
            return
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise UserError(f"a weight is not finite after step {self.model.steps}; {DIVERGED}")
        place = {name: getattr(self, name) for name in PLACE}
        copies = [f"epoch_{self.epoch:04}.pt"] if self.at_numbered_epoch() else []
        for name in (*copies, "latest.pt"):
            try:
                cyclegan.save_checkpoint(self.folder / name, self.model, place, keep=last)
            except cyclegan.NotReplaced as error:
                if last and name == "latest.pt":
                    raise
                log(f"note: {error}" + ("" if last else "; training goes on"))


HABITS = ("save_every", "save_minutes", "sample_every")  # may change when a run is resumed
PLACE = ("data", "demo", "epoch", "done", *HABITS)  # what latest.pt holds besides the model
DIVERGED = ("training diverged; latest.pt is from before that: start again with a lower --lr or "
            "with --precision fp32")


def new_run(given, device, group):
    """Makes the folder of a new run as the command line asks, with a checkpoint at step 0."""
    folders = [Path(os.path.realpath(given[key])) for key in ("dataA", "dataB") if key in given]
    if len(folders) == 1:
        raise UserError("--dataA and --dataB go together: training takes pictures of both domains")
    networks = cyclegan.load_networks(given["start_from"]) if "start_from" in given else {}
    config = new_config(given, networks, demo=not folders)
    folder = None
    if RANK == 0:
        check_folders(folders, config, given.get("out", Path("runs")))
        name = "-".join(data.name for data in folders) or "demo"
        folder = new_folder(given.get("out"), name)
    folder = from_rank_0(group, folder)
    model = CycleGAN(config, device, given.get("precision", "auto"), "eager" in given)
    for name, network in networks.items():
        getattr(model, name).load_state_dict(network.state_dict())
    if networks:
        others = [name for name in cyclegan.AUTHORS if name not in networks]
        log(f"from {given['start_from']}: {', '.join(networks)}; at random: "
            f"{', '.join(others) or 'none'}")
        was = next(iter(networks.values())).config
        if was and was.image_size != config.image_size:
            log(f"note: they were trained at --image-size {was.image_size} --load-size "
                f"{was.load_size}, this run has {config.image_size} and {config.load_size}")
    run = Run(folder, model, [str(data) for data in folders] or DEMO_FOLDERS, demo=not folders,
              **habits(given))
    run.save(last=True)
    return run


def new_config(given, networks, demo):
    """The Config of a new run; width and blocks are those of the networks that it starts from."""
    named = {f.name: given[f.name] for f in fields(Config) if f.name in given}
    if demo:
        named = {**DEMO, "load_size": named.get("image_size", DEMO["image_size"]), **named}
    for setting, value in settings_of(networks).items():
        if given.get(setting, value) != value:
            raise UserError(f"{flag(setting, given[setting])} contradicts {given['start_from']}, "
                            f"whose networks have {value}; leave it out")
        named[setting] = value
    return Config(**named)


def settings_of(networks):
    """{"width": ..., "blocks": ...} of networks by name. Raises UserError if they differ."""
    found = {"width": set(), "blocks": set()}
    for name, network in networks.items():
        found["width"].add(len(next(network.parameters())))
        if name in ("G", "F"):
            blocks = sum(isinstance(layer, cyclegan.R) for layer in network.model)
            found["blocks"].add(blocks)
    for setting, values in found.items():
        if len(values) > 1:
            raise UserError(f"--start-from: the networks differ in their {setting}: {values}")
    return {setting: values.pop() for setting, values in found.items() if values}


def check_folders(folders, config, out):
    """Refuses what cannot be trained on, before anything is written."""
    paths = [cyclegan.find_pictures(data) for data in folders]
    for one, other in itertools.permutations(folders, 2):
        if any(other.samefile(folder) for folder in (one, *one.parents)):
            raise UserError(f"--dataA {folders[0]} and --dataB {folders[1]} are one folder, or one "
                            "lies in the other; each domain needs its own")
    for data, found in zip(folders, paths):
        if not any(map(can_be_read, found)):
            raise UserError(f"no picture in {data} can be read")
    if folders:
        check_room(sum(paths, []), config, out)


def habits(given):
    return {name: given[name] for name in HABITS if name in given}


def can_be_read(path):
    try:
        cyclegan.read_picture(path, 1)
    except UserError:
        return False
    return True


def new_folder(out, name):
    """Makes the folder of a new run, `out` or the next free name in runs/, and returns it."""
    inside = {path.name for path in out.iterdir()} if out and out.is_dir() else set()
    ours = set(fnmatch.filter(inside, "cyclegan-*.part"))  # left by a killed start, as are these
    if inside - ours - {".lock", "latest.pt.part"}:
        raise UserError(f"--out {out} is not empty; choose another, or use --resume {out}")
    names = (Path("runs", f"{name}-{k}" if k > 1 else name) for k in itertools.count(1))
    folder = out or next(folder for folder in names if not folder.exists())
    folder.mkdir(parents=True, exist_ok=out is not None)
    lock(folder)
    return folder


def lock(folder):
    """Keeps other runs out of a folder until this process ends; clears what a killed one left."""
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)  # closing it would unlock it
    try:
        if os.name == "posix":
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        raise UserError(f"train.py is already running in {folder}; stop it first") from None
    except OSError as error:
        log(f"{folder / '.lock'}: {error.strerror}; make sure that no other run uses this folder")
    for part in folder.rglob("*.part"):
        part.unlink()


def open_run(given, device):
    """Loads the run in a folder from its checkpoint. Refuses flags that contradict it."""
    folder = given["resume"]
    if not (folder / "latest.pt").is_file():
        raise UserError(f"--resume takes the folder of a run; there is no {folder / 'latest.pt'}")
    if (folder / "latest.new.pt").exists():
        raise UserError(f"{folder / 'latest.new.pt'} could not take the place of latest.pt when it "
                        "was saved; rename it to latest.pt now, or delete it")
    if RANK == 0:
        lock(folder)
    model, place = cyclegan.load_checkpoint(folder / "latest.pt", device, "eager" in given)
    try:
        run = Run(folder, model, **{**place, **habits(given)})
    except TypeError:
        raise UserError(f"{folder / 'latest.pt'} has no progress of a run") from None
    config = resumed_config(run, given)
    if config != model.config:
        model.config = config
        run.save(last=True)
    return run


def resumed_config(run, given):
    """The run's Config, with the epochs that were given. Refuses flags that contradict it."""
    if "start_from" in given:
        raise UserError("--start-from begins a new run; leave it out, or --resume")
    data_A, data_B = run.data
    was = {**asdict(run.model.config), "precision": run.model.engine.precision,
           "out": os.path.realpath(run.folder), "dataA": os.path.realpath(run.folder / data_A),
           "dataB": os.path.realpath(run.folder / data_B)}
    for name in was.keys() & given.keys() - {"epochs", "decay_epochs"}:
        value = given[name]
        value = os.path.realpath(value) if isinstance(value, Path) else value
        if value not in (was[name], "auto"):
            raise UserError(f"{flag(name, value)} contradicts the run in {run.folder}, which has "
                            f"{was[name]}; leave it out, or start a new run")
    return rescheduled(run.model.config, run.epoch, given)


def rescheduled(config, epoch, given):
    """The Config with other epochs, if they were given: as few as are done begin the decay now."""
    epochs = given.get("epochs", config.epochs)
    if epochs < config.epochs:
        epochs = max(epochs, min(epoch, config.epochs))
    new = replace(config, epochs=epochs,
                  decay_epochs=given.get("decay_epochs", config.decay_epochs))
    last = new.epochs + new.decay_epochs
    if epoch < last and {"epochs", "decay_epochs"} & given.keys():
        log(f"in epoch {epoch + 1} the learning rate is {learning_rate(new, epoch):.3g}"
            + (f", until epoch {new.epochs}" if epoch < new.epochs else "")
            + f"; in the last, epoch {last}, {learning_rate(new, last - 1):.3g}")
    return new


# ---- Progress: losses.csv and the status line ----------------------------------------------------


class Progress:
    """Writes the losses to losses.csv, and shows their means, the speed and the time left."""

    def __init__(self, run, last_step):
        config = run.model.config
        self.path, self.last_step = run.folder / "losses.csv", last_step
        self.epochs = config.epochs + config.decay_epochs
        self.pictures = 2 * WORLD * config.batch_size  # per step
        self.device = run.model.engine.device
        self.pending = []    # (step, epoch, lr, losses) of the steps that are not written yet
        self.rows = []       # losses of this epoch's steps that are written
        self.flushed = None  # when that was
        if RANK == 0:
            keep_rows(self.path, run.model.steps)

    def start_epoch(self, step):
        self.rows = []
        self.start_clock(step)

    def start_clock(self, step):
        self.clock, self.clock_step = time.perf_counter(), step

    def add(self, step, epoch, lr, losses):
        """Takes the losses of a step; they stay on the device for now. Epochs count from 0."""
        if RANK > 0:
            return
        self.step, self.epoch = step, epoch + 1
        self.pending.append((step, epoch + 1, lr, losses))
        if self.flushed is None:
            self.start_clock(step)  # the first step may compile the networks
            self.flush()
        elif time.perf_counter() - self.flushed > (1 if TERMINAL else 10):
            self.flush()

    def flush(self, end_of_epoch=False):
        """Writes what is pending; shows its means or, in a line that stays, those of the epoch."""
        if RANK > 0:
            return
        written = len(self.rows)
        if self.pending:
            self.write_pending()
        shown = self.rows if end_of_epoch else self.rows[written:]
        if shown:
            log(self.status(np.mean(shown, 0)), passing=not end_of_epoch)

    def write_pending(self):
        self.names = list(self.pending[0][-1])
        table = torch.stack([torch.stack(list(losses.values())) for *_, losses in self.pending])
        table = table.cpu().numpy()  # only now do the losses leave the device
        append_rows(self.path, self.names, [(*row[:3], *values)
                                            for row, values in zip(self.pending, table)])
        if not np.isfinite(table).all():
            k, loss = np.argwhere(~np.isfinite(table))[0]
            raise UserError(f"the loss {self.names[loss]} is {table[k, loss]} at step "
                            f"{self.pending[k][0]}; {DIVERGED}")
        self.rows += list(table)
        self.pending, self.flushed = [], time.perf_counter()

    def status(self, means):
        """The status line: where training is, the mean losses, the time left and the speed."""
        parts = [f"epoch {self.epoch}/{self.epochs} step {self.step}/{self.last_step}",
                 " ".join(f"{name} {mean:.2f}" for name, mean in zip(self.names, means))]
        steps = self.step - self.clock_step
        if steps > 0:
            pace = (time.perf_counter() - self.clock) / steps
            left = timedelta(seconds=round(pace * (self.last_step - self.step)))
            parts.insert(1, f"{left} left")  # before what a narrow terminal may cut off
            parts.append(f"{1000 * pace:.0f} ms/step {self.pictures / pace:.1f} pictures/s")
        if self.device.type == "cuda":
            parts.append(f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        return " | ".join(parts)


def append_rows(path, names, rows):
    """Appends rows to losses.csv, with a header row if it has none, and syncs. Raises UserError."""
    try:
        with open(path, "a") as file:
            if file.tell() == 0:
                file.write(",".join(("step", "epoch", "rate", *names)) + "\n")
            for step, epoch, *values in rows:
                file.write(f"{step},{epoch}," + ",".join(f"{v:.7g}" for v in values) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def keep_rows(path, steps):
    """Trims losses.csv to its header and the rows of the steps that are in the checkpoint."""
    if not path.is_file():
        return
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # the last may be cut short
    rows = [row for row in whole[1:] if re.match("[0-9]{1,18},", row)]
    kept = [row for row in rows if int(row.split(",")[0]) <= steps]
    cyclegan.write_file(path, [line.encode() for line in (*whole[:1], *kept)])


# ---- Samples -------------------------------------------------------------------------------------


def save_samples(run, A, B):
    """Writes the samples of an epoch and a plot of the losses. Without them training goes on."""
    if RANK > 0 or run.epoch % run.sample_every:
        return
    try:
        grid = cyclegan.titled(sample_grid(run.model, A, B), COLUMNS)
        write_or_warn(run.folder / "samples" / f"epoch_{run.epoch:04}.png", cyclegan.png(grid))
    except (MemoryError, RuntimeError) as error:
        if not cyclegan.out_of_memory(error):
            raise
        log(f"note: no samples after epoch {run.epoch}: whole pictures do not fit into the memory")
    try:
        plot = plot_losses(run.folder / "losses.csv")
        write_or_warn(run.folder / "losses.png", cyclegan.png(plot))
    except (OSError, ValueError) as error:  # as with columns that came later
        log(f"note: no losses.png: {error}")


def write_or_warn(path, data):
    """Writes what training can do without."""
    try:
        cyclegan.write_file(path, [data])
    except UserError as error:
        log(f"note: {error}")


@torch.no_grad()
def sample_grid(model, A, B):
    """Rows of x, G(x), F(G(x)), y, F(y), G(F(y)) for fixed, uncropped pictures. (H, W, 3) uint8."""
    shown, device = [], model.engine.device
    for k in range(4):
        for pictures, there, back in ((A, model.G, model.F), (B, model.F, model.G)):
            picture = whole_picture(pictures, k * len(pictures) // 4, model.config)
            height, width = picture.shape[:2]
            source = cyclegan.to_tensor(cyclegan.pad_to_multiple_of_4(picture[None]), device)
            fake = there(source)
            images = torch.cat([source, fake, back(fake)])
            shown += [*cyclegan.to_pictures(images)[:, :height, :width]]
    return in_cells(shown, min(2 * model.config.load_size, 640), len(COLUMNS))


def whole_picture(pictures, index, config):
    """A picture at the scale of training; smaller, if it would be too large for a network."""
    height, width = map(int, pictures.shapes[index])
    picture = Image.fromarray(pictures.rows(index, 0, height))
    size = cyclegan.scaled_size(width, height, config.load_size, config.squash, at_once=True)
    return np.asarray(picture.resize(size, Image.BICUBIC))


def in_cells(pictures, longest, columns):
    """Rows of pictures on white, in cells of one size; none is shown larger than `longest`."""
    images = [Image.fromarray(picture) for picture in pictures]
    for image in images:
        image.thumbnail((longest, longest))
    width, height = (max(lengths) + 4 for lengths in zip(*(image.size for image in images)))
    grid = Image.new("RGB", (columns * width, len(images) // columns * height), "white")
    for k, image in enumerate(images):
        left, top = k % columns * width, k // columns * height
        grid.paste(image, (left + (width - image.width) // 2, top + (height - image.height) // 2))
    return np.asarray(grid)


def plot_losses(path, width=720, height=96):
    """losses.csv as a picture: a curve for each loss, of about 120 means over steps."""
    means = []
    with open(path) as file:
        names = file.readline().strip().split(",")[3:]
        first = file.readline()
        rows = itertools.chain([first], file)
        size = max(1, path.stat().st_size // len(first) // 120)  # rows of a mean
        while block := list(itertools.islice(rows, size)):  # however long the run, little memory
            means.append(np.loadtxt(block, delimiter=",", ndmin=2).mean(0))
    steps, _, _, *curves = np.transpose(means)
    across = 4 + (width - 9) * (steps - steps[0]) / max(1, steps[-1] - steps[0])
    panels = []
    for name, values in zip(names, curves):
        top = max(values.max(), 1e-9)
        points = list(zip(across, (height - 2) * (1 - values / top)))
        panel = Image.new("RGB", (width, height), "white")
        ImageDraw.Draw(panel).line(points, "firebrick", 2)
        ImageDraw.Draw(panel).line([(4, 0), (4, height - 1), (width, height - 1)], "grey")
        title = f"{name}, from 0 to {top:.2f}; at the end {values[-1]:.2f}"
        panels.append(cyclegan.titled(np.asarray(panel), [title]))
    title = f"losses until step {steps[-1]:.0f}, means over {size}"
    return cyclegan.titled(np.concatenate(panels), [title])


def animate(folder):
    """Writes samples.gif: the samples, or FRAMES of them, from the first epoch to the last."""
    paths = sorted((path for path in (folder / "samples").glob("epoch_*.png")
                    if path.stem[6:].isdecimal()), key=lambda path: int(path.stem[6:]))
    frames, file = [], io.BytesIO()
    for k in np.linspace(0, len(paths) - 1, min(FRAMES, len(paths))).round().astype(int):
        try:
            frame = Image.fromarray(cyclegan.read_picture(paths[k]))
            frame.thumbnail((960, 960))
            epoch = f"after epoch {int(paths[k].stem[6:])}"
            frames.append(Image.fromarray(cyclegan.titled(np.asarray(frame), [epoch])))
        except UserError as error:
            log(f"skipped: {error}")
    if frames:
        times = [250] * (len(frames) - 1) + [2000]  # milliseconds
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)
        write_or_warn(folder / "samples.gif", file.getvalue())


# ---- Training ------------------------------------------------------------------------------------


class StopSignal:
    """`received` is the number of the signal that asks to stop: Ctrl-C, SIGTERM, SIGHUP."""

    def __init__(self):
        self.received = None
        numbers = [signal.SIGINT, signal.SIGTERM]
        if os.name == "posix" and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            numbers.append(signal.SIGHUP)
        for number in numbers:
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        self.received = number
        if WORLD == 1:  # a second one ends the program at once; torchrun sends the first again
            signal.signal(number, signal.SIG_DFL)


def train(run, max_steps, group):
    """Trains to the last epoch, to step max_steps, or until a signal, which is returned."""
    model, config, device = run.model, run.model.config, run.model.engine.device
    A, B = open_pictures(run, group)
    count, size = max(len(A), len(B)), WORLD * config.batch_size
    epochs = config.epochs + config.decay_epochs
    if run.done >= count:  # as after pictures were removed
        run.epoch, run.done = run.epoch + 1, 0
    last_step = min(max_steps, model.steps + steps_left(run, epochs, count, size))
    if model.steps >= last_step:
        log(f"nothing to do: {run.folder} has done step {model.steps} of {last_step}")
        return None
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True

    stop, progress = StopSignal(), Progress(run, last_step)
    saved = time.perf_counter()
    stopping = False
    while run.epoch < epochs and not stopping:
        lr = learning_rate(config, run.epoch)
        model.set_learning_rate(lr)
        progress.start_epoch(model.steps)
        for x, y in batches(config, A, B, run.epoch, run.done):
            losses = model.step(cyclegan.to_tensor(x, device), cyclegan.to_tensor(y, device))
            run.done += size
            progress.add(model.steps, run.epoch, lr, losses)
            late = time.perf_counter() - saved > 60 * run.save_minutes
            stopping, late = max_over_processes(
                group, bool(stop.received) or model.steps >= last_step, late)
            if stopping:
                break
            if late and run.done < count:
                progress.flush()
                run.save()
                saved = time.perf_counter()
        progress.flush(end_of_epoch=True)
        if run.done >= count:
            run.epoch, run.done = run.epoch + 1, 0
            save_samples(run, A, B)
        last = stopping or run.epoch == epochs
        if last or late or run.at_numbered_epoch():
            run.save(last)
            saved = time.perf_counter()
    return stop.received


def steps_left(run, epochs, count, size):
    """How many steps there are from here to the end of the last epoch."""
    if run.epoch >= epochs:
        return 0
    of_this_epoch = math.ceil((count - run.done) / size)
    return of_this_epoch + (epochs - run.epoch - 1) * math.ceil(count / size)


# ==== The demo. Nothing below concerns training on your own pictures. =============================


def draw_scene(random):
    """One or two fruits (x, y, radius), the light on them, and the colours of wall and table.

    It is always the same wall and table, in slightly different light.
    """
    fruits = [random.uniform([0.3, 0.35, 0.2], [0.7, 0.65, 0.3])]
    if random.random() < 0.5:
        beside = fruits[0][0] + (0.45 if fruits[0][0] < 0.5 else -0.45)
        fruits.insert(0, [beside, random.uniform(0.3, 0.7), random.uniform(0.14, 0.2)])
    return (fruits, random.uniform([-0.6, -0.8], [0.6, -0.3]),
            np.array([0.76, 0.79, 0.83]) * random.uniform(0.96, 1.04, 3),
            np.array([0.48, 0.41, 0.35]) * random.uniform(0.95, 1.05, 3))


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


def draw_demo(folder, side, scenes=200):
    """Draws the pictures that the two folders lack: other scenes as apples than as oranges."""
    for domain, name in enumerate(DEMO_FOLDERS):
        for i in range(scenes):
            path = folder / name / f"{i:03}.png"
            if not path.exists():
                scene = draw_scene(np.random.default_rng([domain, i]))
                cyclegan.write_file(path, [cyclegan.png(paint(scene, path.parent.name, side))])


def evaluate_demo(run, scenes=32):
    """Reports the error of translating held-out scenes, whose truth is known, as it was painted."""
    model = run.model
    drawn = [draw_scene(np.random.default_rng([2, i])) for i in range(scenes)]
    apples, oranges = (np.stack([paint(scene, kind, model.config.load_size) for scene in drawn])
                       for kind in ("apples", "oranges"))
    for name, network, source, truth in (("apples to oranges", model.G, apples, oranges),
                                         ("oranges to apples", model.F, oranges, apples)):
        inside, outside = demo_errors(network, source, truth)
        log(f"{name}: on {scenes} held-out scenes the error inside the fruit is {inside:.0%} of "
            f"the untranslated picture's; outside the fruit it is {outside:.3f} on the [-1, 1] "
            "scale")
    inside, outside = demo_errors(CycleGAN(model.config).G, apples[:8], oranges[:8])
    log(f"What this means: the program drew {scenes} scenes that were not trained on, each with "
        "apples and with oranges,\nso it knows what a translation should look like. A picture left "
        "as it is has 100% inside and 0.000 outside;\na perfect translation has 0% and 0.000; one "
        f"before training has {inside:.0%} and {outside:.3f}.")
    if (run.folder / "samples.gif").exists():  # once there are samples
        log(f"To see the networks learn, open {run.folder / 'samples.gif'}; its columns are x, "
            "G(x), F(G(x)), y, F(y), G(F(y)).")


def demo_errors(network, source, truth):
    """Mean errors of a translation: in the fruit, as a part of the source's there; elsewhere."""
    fruit = (source != truth).any(-1)
    untranslated = np.abs(np.subtract(source, truth, dtype=float))
    error = np.abs(np.subtract(cyclegan.translate(network, source), truth, dtype=float))
    return error[fruit].mean() / untranslated[fruit].mean(), error[~fruit].mean() / 127.5


# ==== The program =================================================================================


def run_program(options):
    """Does what the command line says. Returns the exit status."""
    given = vars(options)
    device, _ = cyclegan.choose_device(options.device)
    group = connect(device)
    if "resume" in given:
        run = open_run(given, device)
    else:
        run = new_run(given, device, group)
    model = run.model
    log(("run " if model.steps else "new run ") + str(run.folder)
        + (f" from step {model.steps} on" if model.steps else "")
        + f", on {device} in {model.engine.precision}"
        + (f", {WORLD} processes" if WORLD > 1 else ""))
    if model.engine.fuses:
        log("the first step compiles the networks, which may take a minute or two")
    received = train(run, options.max_steps, group)
    if RANK == 0:
        animate(run.folder)
        if run.demo and not received:
            evaluate_demo(run)
    if group:
        dist.barrier(group)  # until rank 0 is done; NCCL would end it if the others left
    finished = run.epoch >= model.config.epochs + model.config.decay_epochs
    then = ("translate with: python translate.py --checkpoint" if finished
            else "continue with: python train.py --resume")
    log(f"{'finished' if finished else 'stopped'} after step {model.steps}; everything is saved "
        f"in {run.folder}; {then} {shlex.quote(str(run.folder))}")
    return 128 + received if received else 0


def main():
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # names may hold what the screen cannot show
    warnings.showwarning = lambda warning, *_: log(f"note: {warning}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until training starts
    options = parse()
    try:
        return run_program(options)
    except UserError as error:
        reason = error
    except OSError as error:
        reason = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    except (MemoryError, RuntimeError) as error:
        if WORLD > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            reason = "another process failed; see its message"
        elif cyclegan.out_of_memory(error):
            reason = "out of memory; a lower --image-size, --width or --batch-size needs less"
        else:
            raise
    except KeyboardInterrupt:
        reason = "stopped before training began"
    rank = f" (rank {RANK})" if WORLD > 1 else ""
    print(f"{chr(10) if TERMINAL else ''}train.py{rank}: {reason}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    status = main()
    if WORLD > 1:  # no teardown of groups, as peers may be dead; gloo's aborted now and then
        os._exit(status)
    sys.exit(status)
