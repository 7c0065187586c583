"""Trains a CycleGAN on two folders of pictures or, without them, on apples and oranges it draws.

    python train.py                                           the demo: minutes on a CPU
    python train.py --dataA apples/ --dataB oranges/          two folders of your own
    python train.py --resume runs/apples-oranges              continues where that run stopped
    torchrun --nproc-per-node 8 train.py --dataA ...          on 8 GPUs, each with its own batch
"""

import argparse
import io
import math
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw

import cyclegan
from cyclegan import Config, FastCycleGAN, UserError, learning_rate
from demo import scenes

MODEL = FastCycleGAN  # CycleGAN, with a faster step (Part II), or your subclass of it
AHEAD = 8  # batches that are read in advance
EARLY = (10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)  # steps with samples in epoch 0
TITLES = ("x", "G(x)", "F(G(x))", "y", "F(y)", "G(F(y))")  # of the samples' columns


# ---- Training ------------------------------------------------------------------------------------


def train(run, signals):
    """Trains from step model.steps to run.last_step, or until a signal arrives.

    Steps are counted through all epochs: epoch 0 has the steps 0 to run.epoch_steps - 1. signals is
    an empty list until Ctrl-C. Of several processes (WORLD), number 0 (RANK) alone writes files.
    """
    model = run.model
    if RANK == 0:
        run.save(must=True)  # from here on, --resume can continue this run
        if model.steps == 0:
            save_samples(run)
    for x, y in run.batches():
        epoch = model.steps // run.epoch_steps
        lr = learning_rate(model.config, epoch)
        losses = model.train_step(x, y, lr)  # CycleGAN.step on the device; counts model.steps
        run.add_losses(losses)
        if time.perf_counter() - run.last_status > (1 if TERMINAL else 10):
            log(run.status(), transient=True)
        stopping = in_any_process(signals or model.steps == run.last_step)
        if RANK == 0:
            record(run, lr, stopping)
        if stopping:
            break


def record(run, lr, stopping):
    """Writes what is due after a step: losses and samples, and checkpoints last.

    By default: samples after each epoch, a checkpoint to keep every 50, latest.pt every 10 minutes.
    """
    args, steps = run.args, run.model.steps
    epoch, k = divmod(steps, run.epoch_steps)  # epochs completed, and steps of the next one
    epoch_ended = k == 0
    early = epoch == 0 and steps in EARLY
    if epoch_ended or early:
        log(run.status())
        run.history.append({"epoch": epoch, "step": steps, "lr": lr, **run.mean_losses()})
        write_losses(run)
    if epoch_ended:
        run.sums = {}
    sample_due = epoch % args.sample_every == 0 or steps == run.total_steps
    if early or (epoch_ended and sample_due):
        save_samples(run)
    if stopping:
        animate(run.folder)
    numbered = epoch_ended and epoch % args.save_every == 0
    if numbered:  # first, as --resume from this latest.pt would never write it
        run.save(f"epoch_{epoch:04}.pt")
    if numbered or stopping or time.perf_counter() - run.save_time > 60 * args.save_minutes:
        run.save(must=stopping)


class Run:
    """A training run: its folder, its model, its pictures. Its progress is model.steps.

    A, B: the Pictures of the paper's X and Y. A checkpoint holds the model and these: data, the
    folders of A and B; counts, the numbers of pictures of A and B and of processes; history, the
    rows of losses.csv; sums, the losses of this epoch so far.
    """

    def __init__(self, args, folder, model, A, B, data, counts=None, history=(), sums=()):
        self.args, self.folder, self.model, self.A, self.B, self.data = (
            args, folder, model, A, B, data)
        self.counts = [len(A.paths), len(B.paths), WORLD]
        if counts not in (None, self.counts):
            raise UserError("a resumed run needs as many pictures of A, of B, and processes as "
                            f"before: {counts}, not {self.counts}")
        self.history, self.sums = list(history), dict(sums)
        self.epoch_images = max(len(A.paths), len(B.paths))  # of each domain
        self.epoch_steps = math.ceil(self.epoch_images / (WORLD * model.config.batch_size))
        self.epochs = model.config.epochs + model.config.decay_epochs
        self.total_steps = self.epochs * self.epoch_steps
        self.last_step = min(args.max_steps, self.total_steps)
        self.command = f"python train.py --resume {shlex.quote(str(folder))}"
        self.last_saved = f"step {model.steps} ({self.command})" if model.steps else "none"
        self.times, self.last_status = deque(maxlen=100), 0.0

    def batch(self, step):
        """x and y of a step: (batch_size, 3, image_size, image_size) each, in [-1, 1].

        They depend only on the seed and the step, so a resumed run sees the same ones. An epoch has
        every picture of A, repeated if A is the smaller folder, and random ones of B, so pairs keep
        changing (authors' code). The last batch of an epoch is filled up with its first pictures.
        Each process takes its share of a batch of WORLD * batch_size.
        """
        seed, size = self.model.config.seed, self.model.config.batch_size
        epoch, k = divmod(step, self.epoch_steps)
        order = np.random.default_rng([seed, 1, epoch]).permutation(self.epoch_images)
        x, y = [], []
        for i in range(RANK * size, (RANK + 1) * size):
            rng = np.random.default_rng([seed, 2, step, i])  # 2: another stream than the order's
            number = order[(k * WORLD * size + i) % self.epoch_images]
            x.append(self.A.crop(number % len(self.A.paths), rng))
            y.append(self.B.crop(rng.integers(len(self.B.paths)), rng))
        return cyclegan.to_tensor(np.stack(x)), cyclegan.to_tensor(np.stack(y))

    def batches(self):
        """Yields x and y of the steps to come. Threads call batch(step) up to AHEAD in advance."""
        steps = range(self.model.steps, self.last_step)
        for _, future in cyclegan.prefetch(self.batch, steps, AHEAD):
            try:
                x, y = future.result()
            except (MemoryError, RuntimeError, UserError) as error:  # a drive was unplugged, say
                if RANK == 0:
                    self.save(must=True)
                if not isinstance(error, UserError) and not cyclegan.out_of_memory(error):
                    raise
                raise UserError(f"{str(error) or 'out of memory'}; once this is fixed, continue "
                                f"from the last checkpoint: {self.last_saved}") from error
            yield x, y

    def add_losses(self, losses):
        """Adds a step's losses to the sums, on the device."""
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + loss
        self.times.append(time.perf_counter())

    def mean_losses(self):
        """The means over the epoch so far."""
        steps = (self.model.steps - 1) % self.epoch_steps + 1
        return {name: round(float(total) / steps, 6) for name, total in self.sums.items()}

    def stop_if_diverged(self):
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise UserError(f"training has diverged by step {self.model.steps}: start again with a "
                            f"lower --lr or --precision fp32; last checkpoint: {self.last_saved}")

    def status(self):
        """The status line: the epoch, the step, the time left, the speed, the mean losses."""
        self.stop_if_diverged()
        steps, times, self.last_status = self.model.steps, self.times, time.perf_counter()
        epoch = math.ceil(steps / self.epoch_steps)
        line = f"epoch {epoch}/{self.epochs} step {steps}/{self.last_step} | "
        if len(times) > 1:  # of the last steps; the first one may have compiled the networks
            pace = (times[-1] - times[0]) / (len(times) - 1)
            left = timedelta(seconds=round(pace * (self.last_step - steps)))
            line += f"{left} left, {1000 * pace:.0f} ms/step | "
        return line + " ".join(f"{name} {mean:.2f}" for name, mean in self.mean_losses().items())

    def save(self, name="latest.pt", must=False):
        """Writes a checkpoint. If that fails, training goes on, unless it `must` be written."""
        self.stop_if_diverged()
        self.sums = {loss: float(total) for loss, total in self.sums.items()}
        place = {key: getattr(self, key) for key in ("data", "counts", "history", "sums")}
        self.save_time = time.perf_counter()
        with errors_as_notes(must and f"; the last complete checkpoint: {self.last_saved}"):
            cyclegan.save_checkpoint(self.folder / name, self.model, place)
            if name == "latest.pt":
                self.last_saved = f"step {self.model.steps} ({self.command})"


# ---- Pictures ------------------------------------------------------------------------------------


class Pictures:
    """The pictures under a folder. Each is read when first needed, and kept while there is room."""

    def __init__(self, folder, config):
        self.folder, self.config = folder, config
        self.paths = cyclegan.find_pictures(folder)
        self.damaged, self.cache = {}, {}
        self.free_bytes = 1e9 / int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        first = [self.read(k) for k in range(min(8, len(self.paths)))]
        if np.median([np.percentile(picture, 90) for picture in first]) < 26:
            log(f"note: the pictures in {folder} are nearly black (most values below 10 % of "
                "white); rescale label maps and depth to 0-255 first")

    def read(self, number):
        """A picture, (H, W, 3) uint8, at the scale of training; if it is damaged, the next one.

        Raises UserError if one cannot be reached, as when a drive is away, or if all are damaged.
        """
        for k in range(number, number + len(self.paths)):
            path = self.paths[k % len(self.paths)]
            if path in self.cache:
                return self.cache[path]
            if path in self.damaged:
                continue
            try:
                picture = cyclegan.read_picture(path, self.config.load_size, self.config.squash)
            except UserError as error:
                if getattr(error.__cause__, "errno", None):
                    raise
                line = f"skipped: {error}"
                if self.damaged.setdefault(path, line) is line:  # the first thread says it
                    log(line)
                continue
            if (picture.nbytes <= self.free_bytes
                    and self.cache.setdefault(path, picture) is picture):  # the first thread's
                self.free_bytes -= picture.nbytes
            return picture
        raise UserError(f"none of the pictures in {self.folder} can be read")

    def crop(self, number, rng=None):
        """A square of image_size, anywhere, perhaps mirrored; without rng the one in the middle."""
        picture, side = self.read(number), self.config.image_size
        margins = np.array(picture.shape[:2]) - side
        top, left = margins // 2 if rng is None else rng.integers(margins + 1)
        crop = picture[top:top + side, left:left + side]
        mirrored = rng is not None and self.config.flip and rng.random() < 0.5
        return crop[:, ::-1] if mirrored else crop


def open_pictures(data, config):
    """The pictures of A and B. Raises UserError for folders that cannot be trained on."""
    A, B = (Path(folder).resolve() for folder in data)
    for folder in (A, B):
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}; --dataA and --dataB take folders of "
                            "pictures")
    if A == B or A in B.parents or B in A.parents:
        raise UserError(f"{A} and {B} are the same folder, or one contains the other")
    return Pictures(A, config), Pictures(B, config)


# ---- Samples and losses --------------------------------------------------------------------------


def save_samples(run):
    """Writes samples/epoch_0003.png, or within the first epoch samples/epoch_0000_step_030.png."""
    epoch, k = divmod(run.model.steps, run.epoch_steps)
    name = f"epoch_{epoch:04}" + (f"_step_{run.model.steps:03}" if k else "")
    with errors_as_notes():
        picture = cyclegan.with_titles(sample_grid(run), TITLES)
        cyclegan.write_file(run.folder / "samples" / f"{name}.png", cyclegan.png(picture))


@torch.no_grad()
def sample_grid(run, rows=4):
    """x, G(x), F(G(x)), y, F(y), G(F(y)) for centre crops of fixed pictures. (H, W, 3) uint8"""
    columns, model = [], run.model
    for pictures, there, back in ((run.A, model.G, model.F), (run.B, model.F, model.G)):
        squares = [pictures.crop(k * len(pictures.paths) // rows) for k in range(rows)]
        images = cyclegan.to_tensor(np.stack(squares), model.device)
        fakes = there.forward(images)  # not compiled, as four at once would be anew
        columns += [images, fakes, back.forward(fakes)]
    framed = [torch.nn.functional.pad(images, (2, 2, 2, 2), value=1.0) for images in columns]
    return np.concatenate(cyclegan.to_pictures(torch.cat(framed, 3)))


def animate(folder, most=40):
    """Writes samples.gif: the samples, or some of them, evenly spaced."""
    paths = sorted((folder / "samples").glob("epoch_*.png"),
                   key=lambda path: [int(number) for number in re.findall(r"\d+", path.stem)])
    frames, file = [], io.BytesIO()
    if not paths:
        return
    with errors_as_notes():
        for k in np.linspace(0, len(paths) - 1, min(most, len(paths))).round().astype(int):
            title = f"after {paths[k].stem.replace('_', ' ')}"
            picture = cyclegan.with_titles(cyclegan.read_picture(paths[k]), [title])
            frames.append(Image.fromarray(picture))
            frames[-1].thumbnail((960, 960))
        times = [400] * (len(frames) - 1) + [2000]  # milliseconds
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)
        cyclegan.write_file(folder / "samples.gif", file.getvalue())


def write_losses(run):
    """Writes losses.csv and draws losses.png, both whole, from the first epoch on."""
    names = list(run.history[-1])  # a loss of one's own may have come later
    rows = [names, *([row.get(name, "") for name in names] for row in run.history)]
    text = "".join(",".join(map(str, row)) + "\n" for row in rows)
    with errors_as_notes():
        cyclegan.write_file(run.folder / "losses.csv", text.encode())
        cyclegan.write_file(run.folder / "losses.png", cyclegan.png(plot_losses(run.history)))


def plot_losses(history, width=720, height=96):
    """A curve for each loss over the steps, from 0 to its highest mean. (H, W, 3) uint8"""
    panels, steps = [], np.array([row["step"] for row in history])
    for name in list(history[-1])[3:]:  # after epoch, step and lr
        values = np.array([row.get(name, 0.0) for row in history])
        top = max(values.max(), 1e-9)
        x, y = 2 + (width - 5) * steps / steps[-1], (height - 2) * (1 - values / top)
        panel = Image.new("RGB", (width, height), "gainsboro")
        ImageDraw.Draw(panel).line([*zip(x, y, strict=True)], "firebrick", 2)
        title = f"{name}, to step {steps[-1]:,}, from 0 to {top:.2f}; last {values[-1]:.2f}"
        panels.append(cyclegan.with_titles(np.asarray(panel), [title]))
    return np.concatenate(panels)


# ---- Runs: new, started from other networks, resumed ---------------------------------------------


def new_run(args, settings):
    """Makes a run and its folder. Raises UserError."""
    data = [os.path.realpath(folder) for folder in (args.dataA, args.dataB) if folder]
    if len(data) == 1 or args.start_from and not data:
        raise UserError("--dataA and --dataB are both needed: training takes pictures of A and B")
    if args.start_from and {"width", "blocks"} & settings.keys():
        raise UserError("--width and --blocks are taken from --start-from; leave them out")
    networks, before = (
        start_from(args.start_from, args.device) if args.start_from else ({}, {}))
    if not data:  # the demo
        before = {**scenes.SETTINGS, "load_size": scenes.SETTINGS["image_size"]}
    if "image_size" in settings:
        before["load_size"] = None if data else settings["image_size"]
    config = Config(**{**before, **settings})
    torch.manual_seed(config.seed)  # for networks of your own
    pictures = open_pictures(data, config) if data else None
    model = MODEL(config, args.device, args.precision, args.compile, **networks)
    folder = new_folder(args.out, data, config)
    A, B = pictures or open_pictures([folder / name for name in scenes.FOLDERS], config)
    return Run(args, folder, model, A, B, data or scenes.FOLDERS)


def start_from(path, device):
    """The networks of a run or of the authors' files, by name, and the settings they have."""
    G = cyclegan.load_generator(path, "AtoB", device)
    networks = {"G": G}
    if G.config:
        model, _ = cyclegan.load_checkpoint(path, device, kind=MODEL)
        networks = {name: getattr(model, name) for name in ("G", "F", "D_X", "D_Y")}
    elif (path / "latest_net_G_B.pth").is_file():
        networks["F"] = cyclegan.load_generator(path, "BtoA", device)
        if networks["F"].settings != G.settings:
            raise UserError(f"the generators in {path} have different settings: {G.settings}, "
                            f"{networks['F'].settings}; start from one of the files")
    log(f"starting from {path}: {', '.join(networks)}; the rest is initialised anew")
    return {name: net.train().requires_grad_() for name, net in networks.items()}, G.settings


def new_folder(out, data, config):
    """Makes the folder of a new run, `out` or the next free name in runs/, for all processes."""
    names, k = list(map(os.path.basename, data)), 2
    if names == ["trainA", "trainB"]:  # as in the authors' data sets
        names = [os.path.basename(os.path.dirname(data[0]))]
    name = "-".join(names) or "demo"
    first = folder = out or Path("runs", name)
    while folder.exists() and not out:
        folder, k = Path("runs", f"{name}-{k}"), k + 1
    if folder != first:
        log(f"note: {first} exists; to continue it: --resume {shlex.quote(str(first))}")
    folders = [folder]
    if RANK == 0:
        with cyclegan.as_user_error(f"cannot create the folder {folder}; choose another --out"):
            folder.mkdir(parents=True, exist_ok=out is not None)
        lock(folder)
        if any(not path.match("latest.pt.*.part") for path in folder.iterdir()):  # of a killed one
            hint = f", or use --resume {out}" if (folder / "latest.pt").exists() else ""
            raise UserError(f"--out {out} is not empty; choose another{hint}")
        if not data:
            scenes.draw_pictures(folder, config.load_size)
    if WORLD > 1:
        dist.broadcast_object_list(folders)
    return folders[0]


def lock(folder):
    """Keeps other training runs out of a run's folder until this process ends, however it ends."""
    try:
        import fcntl
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another training run is using {folder}; stop it first") from None
    except (ImportError, OSError):
        pass  # Windows, and some network drives, have no such locks


def open_run(args, settings):
    """Loads a run from its folder; only the epochs may change. Raises UserError."""
    folder, refused = args.resume, settings.keys() - {"epochs", "decay_epochs"}
    if refused or args.out or args.start_from:
        raise UserError("a resumed run keeps its folder and its settings, except --epochs and "
                        f"--decay-epochs; to start a new run from it: --start-from {folder} "
                        "--dataA ... --dataB ...")
    if not (folder / "latest.pt").is_file():
        hint = "; to go back to this file, copy it over latest.pt" if folder.is_file() else ""
        raise UserError(f"--resume takes the folder of a run; there is no {folder / 'latest.pt'}"
                        f"{hint}")
    if RANK == 0:
        lock(folder)
        for parent in (folder, folder / "samples"):
            for part in parent.glob("*.[0-9]*.part"):  # of saves that were killed
                part.unlink(missing_ok=True)
    cyclegan.choose_device(args.device, args.precision, args.compile)  # whose errors come first
    try:
        model, place = cyclegan.load_checkpoint(
            folder, args.device, args.precision, args.compile, MODEL)
    except UserError as error:
        earlier = sorted(folder.glob("epoch_*.pt"), key=os.path.getmtime)
        if not earlier or "damaged" not in str(error):
            raise
        raise UserError(f"{error}; {earlier[-1]} may be intact: copy it over latest.pt") from error
    if set(place or ()) != {"data", "counts", "history", "sums"}:
        raise UserError(f"{folder / 'latest.pt'} was not saved by train.py")
    if "epochs" in settings:  # if fewer than already completed, the decay starts now
        done = max((row["epoch"] for row in place["history"]), default=0)
        settings["epochs"] = max(settings["epochs"], min(done, model.config.epochs))
    model.config = replace(model.config, **settings)
    moved = zip((args.dataA, args.dataB), place.pop("data"), strict=True)
    data = [os.path.realpath(new) if new else old for new, old in moved]
    A, B = open_pictures([folder / path for path in data], model.config)
    return Run(args, folder, model, A, B, data, **place)


# ---- Several processes ---------------------------------------------------------------------------

WORLD = int(os.environ.get("WORLD_SIZE") or 1)  # processes; torchrun sets it
RANK = int(os.environ.get("RANK") or 0) if WORLD > 1 else 0  # 0 alone writes and prints


def connect(device):
    """Joins torchrun's processes. CUDA tensors go through NCCL, everything else through gloo."""
    try:
        if ":" in device:
            raise ValueError(f"--device {device} is one GPU for all of them")
        cuda = device in ("auto", "cuda") and torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        log(f"waiting for {WORLD - 1} more process{'es' * (WORLD > 2)} at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}")
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends the wait
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo",
                                timeout=timedelta(minutes=10))
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"WORLD_SIZE is {WORLD}, but the processes cannot connect ({error}); "
                        "start them with torchrun, one per GPU") from error


def in_any_process(condition):
    """Waits for all processes; returns whether the condition holds in any of them."""
    if WORLD == 1:
        return bool(condition)
    largest = torch.tensor(int(bool(condition)))
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return bool(largest)


# ---- Command line --------------------------------------------------------------------------------

TERMINAL = bool(sys.stdout) and sys.stdout.isatty()


def parse():
    """The arguments, and the fields of Config that are given, by name."""
    demo = " ".join(f"--{name} {value}" for name, value in scenes.SETTINGS.items())
    parser = argparse.ArgumentParser(
        usage="train.py [--dataA FOLDER --dataB FOLDER | --resume RUN] [option ...]",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"The demo has other defaults:\n{demo.replace('_', '-')}", allow_abbrev=False)
    add = parser.add_argument_group("pictures and run").add_argument
    add("--dataA", type=path, metavar="FOLDER", help="pictures of domain A, the paper's X")
    add("--dataB", type=path, metavar="FOLDER", help="pictures of domain B, the paper's Y")
    add("--out", type=path, metavar="RUN", help="new folder (default: an unused name in runs/)")
    add("--resume", type=path, metavar="RUN", help="continue the run in this folder")
    add("--start-from", type=path, metavar="RUN_OR_FILE",
        help="start from the networks and settings of another run, or from the authors' files")
    add("--device", default="auto", metavar="auto|cpu|cuda|mps",
        help="where to compute; cuda:1 is the second GPU (default: cuda if available)")
    add("--precision", default="fp32", choices=("fp32", "bf16"),
        help="fp32 (TF32 in convolutions on recent GPUs) or bf16 (default: fp32)")
    add("--compile", action="store_true",
        help="on CUDA, compile the networks and capture the step: a slow start, then faster steps")
    add("--max-steps", type=int, default=math.inf, metavar="N",
        help="stop after step N of the run, to continue later (default: after all epochs)")
    add("--save-every", type=int, default=50, metavar="N",
        help="keep every Nth epoch's checkpoint as epoch_0050.pt and so on (default: 50)")
    add("--save-minutes", type=float, default=10, metavar="M",
        help="write latest.pt every M minutes, and at the end; 0: after each step (default: 10)")
    add("--sample-every", type=int, default=1, metavar="N",
        help="draw samples after every Nth epoch, and at the end (default: 1)")
    add = parser.add_argument_group("settings").add_argument
    kinds = {int: {"type": int, "metavar": "N"}, float: {"type": float, "metavar": "VALUE"},
             str: {"metavar": "lsgan|log"}, bool: {"action": argparse.BooleanOptionalAction}}
    for f in fields(Config):
        default = "" if f.default is None else f" (default: {f.default})"
        add(f"--{f.name.replace('_', '-')}", help=f.metadata["help"] + default,
            default=argparse.SUPPRESS, **kinds[f.type])
    args, unknown = parser.parse_known_args()
    if unknown:
        parser.error(f"unrecognized arguments: {shlex.join(unknown)}; --help lists all flags; "
                     "--flip, --no-flip and --squash take no value")
    if min(args.max_steps, args.save_every, args.sample_every) < 1 or not args.save_minutes >= 0:
        parser.error("--max-steps, --save-every and --sample-every must be at least 1, "
                     "--save-minutes at least 0")
    return args, {f.name: getattr(args, f.name) for f in fields(Config) if f.name in args}


def path(text):
    return Path(os.path.expanduser(text))


def log(line, transient=False):
    """Prints a line. On a terminal a transient one is cut to fit, and the next one replaces it."""
    if RANK > 0:
        return
    if TERMINAL:
        columns = shutil.get_terminal_size().columns - 1
        line = "\r\033[K" + (line[:columns] if transient else line)
    try:
        print(line if transient and TERMINAL else f"{line}\n", end="", flush=True)
    except OSError:  # whoever read it has gone; that must not end a training
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def errors_as_notes(fatal=""):
    """Prints a note where a file cannot be written or memory runs out, and goes on. With `fatal`, a
    text, it raises a UserError that ends with this text."""
    try:
        yield
    except (MemoryError, RuntimeError, UserError) as error:
        if not isinstance(error, UserError) and not cyclegan.out_of_memory(error):
            raise
        what = str(error) or "out of memory"
        if fatal:
            raise UserError(f"{what}{fatal}") from error
        log(f"note: {what}; training continues")


def signals_to_stop():
    """A list to which Ctrl-C and other signals to stop add their number, unless ignored."""
    received, (listening, told) = [], socket.socketpair()
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):  # schedulers send the last
        number = getattr(signal, name, None)  # Windows lacks the last two
        if number and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, lambda number, _: received.append(number))
    if WORLD > 1:  # torchrun repeats the first
        return received

    def answer():  # in a thread, as the main one may be deep in a step
        listening.recv(1)
        with suppress(OSError):  # the terminal itself may have gone
            os.write(2, b"\nfinishing this step, then saving; once more ends at once\n")
        while listening.recv(1)[0] != signal.SIGINT:
            pass  # a closed terminal sends SIGHUP twice
        os._exit(128 + signal.SIGINT)

    told.setblocking(False)
    signal.set_wakeup_fd(told.detach())
    threading.Thread(target=answer, daemon=True).start()
    return received


def run_program(args, settings):
    """Does what the command line says. Returns the exit status."""
    if WORLD > 1:
        connect(args.device)
    signals = signals_to_stop()
    torch.backends.cudnn.benchmark = True
    run = (open_run if args.resume else new_run)(args, settings)
    model = run.model
    if model.steps >= run.last_step:
        flag = "--epochs" if run.last_step == run.total_steps else "--max-steps"
        log(f"nothing is left to train: {run.folder} is at step {model.steps} of {run.last_step}; "
            f"to train longer, raise {flag}: {run.command} {flag} ...")
        return 0
    log(f"run {run.folder}, at step {model.steps} of {run.last_step}, on {model.device} in "
        f"{model.precision}, processes: {WORLD}\n"
        f"A: {len(run.A.paths):,} pictures in {run.A.folder}\n"
        f"B: {len(run.B.paths):,} pictures in {run.B.folder}\n"
        f"{model.config.epochs} epochs at learning rate {model.config.lr:g}, then "
        f"{model.config.decay_epochs} of linear decay")
    if model.device.type == "cpu" and model.config.image_size * model.config.width >= 2**14:
        log("note: this takes days on a CPU; --image-size 96 --width 32 takes about an hour")
    if args.compile:
        log("the first step compiles the networks, which may take a minute or two")
    train(run, signals)
    if RANK == 0 and run.data == scenes.FOLDERS and not signals:
        scenes.evaluate(model, log)
        log(f"To watch the networks learn, open {run.folder / 'samples.gif'}; its columns are "
            f"{', '.join(TITLES)}.")
    in_any_process(False)  # waits for rank 0; NCCL would end it if the others left
    end, then = "stopped", f"continue with: {run.command}"
    if model.steps >= run.total_steps:
        end = "finished"
        then = ("translate with: python translate.py PICTURES --checkpoint "
                f"{shlex.quote(str(run.folder))}")
    log(f"{end} after step {model.steps}; everything is saved in {run.folder}; {then}")
    return 128 + signals[0] if signals else 0


def main():
    if hasattr(sys.stdout, "reconfigure"):  # notebooks replace stdout
        sys.stdout.reconfigure(errors="replace")  # names may hold what the screen cannot show
    warnings.showwarning = lambda warning, *_: log(f"note: {warning}")
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # phones have 108 megapixels
    arguments = parse()
    try:
        return run_program(*arguments)
    except (MemoryError, OSError, RuntimeError, UserError) as error:
        if isinstance(error, (OSError, UserError)):
            reason = error
        elif WORLD > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            reason = "another process failed; see its message"
        elif cyclegan.out_of_memory(error):
            reason = "out of memory; reduce --image-size, --width or --batch-size"
        else:
            raise
    newline = "\n" if TERMINAL else ""
    print(f"{newline}train.py: {reason}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    status = main()
    if WORLD > 1:  # no teardown of groups, as peers may be dead; gloo's aborted now and then
        os._exit(status)
    sys.exit(status)
