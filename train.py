"""Trains a CycleGAN on two folders of pictures; without any, on apples and oranges that it draws.

    python train.py                                           the drawn demo, minutes on a CPU
    python train.py --dataA apples/ --dataB oranges/          two folders of your own
    python train.py --resume runs/apples-oranges              continues where that run stopped
    torchrun --nproc-per-node 8 train.py --dataA ...          on 8 GPUs, each with its own batch
"""

import argparse
import functools
import io
import math
import os
import shlex
import shutil
import signal
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw

import cyclegan
from cyclegan import Config, CycleGAN, FastStep, UserError, learning_rate

DEMO = {"image_size": 64, "load_size": 64, "width": 16, "blocks": 2, "lambda_identity": 1.0,
        "lr": 1e-3, "epochs": 2, "decay_epochs": 6}
DEMO_FOLDERS = ["pictures/apples", "pictures/oranges"]  # in the run's folder
PORES = 64 / 6               # of an orange, across a picture: 6 pixels apart at 64
AHEAD = 8                    # batches read in advance
EARLY = (10, 30, 100)        # steps with samples, besides 0 and the ends of epochs
TITLES = ("x", "G(x)", "F(G(x))", "y", "F(y)", "G(F(y))")  # of the samples' columns
FRAMES = 40                  # of samples.gif, at most
DIVERGED = ("training diverged; latest.pt is from before that: start again with a lower --lr or "
            "with --precision fp32")
TERMINAL = bool(sys.stdout) and sys.stdout.isatty()
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun, as is the rank
RANK = int(os.environ.get("RANK", 0)) if WORLD > 1 else 0  # 0 alone writes
MEMORY = 2e9 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # bytes of pictures to keep


# ---- Command line --------------------------------------------------------------------------------


def parse():
    """The options that the command line gives, by name."""
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
    add("--start-from", type=Path, metavar="RUN_OR_FILE",
        help="begin a new run with the networks and settings of a run, or with the authors' files")
    add("--device", metavar="auto|cpu|cuda|mps",
        help="where to compute; cuda:1 is the second GPU (default: cuda if there is one, else cpu)")
    add("--precision", choices=("auto", "fp32", "bf16"),
        help="arithmetic of the networks (default: bf16 on a CUDA GPU that has it, else fp32)")
    add("--eager", action="store_true",
        help="on CUDA, neither compile the networks nor capture the step as a graph")
    add("--max-steps", type=positive, metavar="N",
        help="stop after step N of the run, to continue later (default: after all epochs)")
    add("--save-every", type=positive, metavar="N",
        help="keep the checkpoint of every Nth epoch as epoch_0050.pt and so on (default: 50)")
    add("--save-minutes", type=minutes, metavar="M",
        help="save every M minutes, besides every Nth epoch and at the end (default: 10)")
    add("--sample-every", type=positive, metavar="N",
        help="draw samples after every Nth epoch (default: 1)")
    add_settings(parser.add_argument_group("settings"))
    return vars(parser.parse_args([with_hyphens(argument) for argument in sys.argv[1:]]))


def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, not {text}")
    return int(text)


def minutes(text):
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of minutes, not {text}")
    return float(text)


def add_settings(group):
    """A flag for every field of Config."""
    kinds = {int: {"type": int, "metavar": "N"}, float: {"type": float, "metavar": "VALUE"},
             str: {"metavar": "lsgan|log"}, bool: {"action": argparse.BooleanOptionalAction}}
    for f in fields(Config):
        default = "" if f.default is None else f" (default: {f.default})"
        group.add_argument(flag(f.name), help=f.metadata["help"] + default, **kinds[f.type])


def flag(name):
    return f"--{name.replace('_', '-')}"


def with_hyphens(argument):
    """--image_size=64 as --image-size=64."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def log(line, transient=False, everyone=False):
    """Prints a line. On a terminal a transient one is cut to fit, and the next one replaces it."""
    if RANK > 0 and not everyone:
        return
    if TERMINAL:
        width = shutil.get_terminal_size().columns - 1
        line = "\r\033[K" + (line[:width] if transient else line)
    try:
        print(line, end="" if transient and TERMINAL else "\n", flush=True)
    except OSError:  # whoever read it has gone; that must not end a training
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---- Several processes ---------------------------------------------------------------------------


def connect(device):
    """Joins torchrun's processes. On CUDA tensors talk through NCCL, all else through gloo."""
    try:
        cuda = device in ("auto", "cuda") and torch.cuda.is_available()
        if ":" in device:
            raise ValueError(f"--device {device} is one GPU for all of them")
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"WORLD_SIZE is {WORLD}, but the processes cannot connect ({error}); start "
                        "them with torchrun, one for each GPU") from error


def in_any_process(condition):
    """Waits for all processes; returns whether the condition holds in any of them."""
    if WORLD == 1:
        return bool(condition)
    largest = torch.tensor(int(bool(condition)))
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return bool(largest)


def from_rank_0(make):
    """What rank 0 makes, in every process."""
    made = [make() if RANK == 0 else None]
    if WORLD > 1:
        dist.broadcast_object_list(made)
    return made[0]


# ---- Pictures ------------------------------------------------------------------------------------


class Pictures:
    """The pictures under a folder. Each is read when first needed, and kept while there is room."""

    def __init__(self, folder, config):
        self.folder, self.config = folder, config
        self.paths = from_rank_0(lambda: cyclegan.find_pictures(folder))
        self.kept = {}          # number -> picture
        self.unreadable = {}    # number -> the error
        self.room = MEMORY / 2  # bytes; the other domain has as many
        self.whole(0)           # raises UserError if none can be read

    def __len__(self):
        return len(self.paths)

    def whole(self, number):
        """A picture, (H, W, 3) uint8, at the scale of training; if unreadable, the next one."""
        for k in range(number, number + len(self)):
            picture = self.read(k % len(self))
            if picture is not None:
                return picture
        raise UserError(f"no picture in {self.folder} can be read; {self.unreadable[0]}")

    def read(self, number):
        """The picture of a number, or None if it cannot be read, which is said once."""
        if number in self.kept or number in self.unreadable:
            return self.kept.get(number)
        try:
            picture = cyclegan.read_picture(
                self.paths[number], self.config.load_size, self.config.squash)
        except UserError as error:
            if self.unreadable.setdefault(number, error) is error:  # the first thread says it
                log(f"skipped: {error}", everyone=True)
            return None
        if picture.nbytes <= self.room and self.kept.setdefault(number, picture) is picture:
            self.room -= picture.nbytes
        return picture

    def crop(self, number, across, down, coin):
        """A square of image_size, at a place that two numbers on [0, 1) say; perhaps mirrored."""
        picture, side = self.whole(number), self.config.image_size
        height, width = picture.shape[:2]
        top, left = int(down * (height - side + 1)), int(across * (width - side + 1))
        crop = picture[top:top + side, left:left + side]
        return crop[:, ::-1] if self.config.flip and coin < 0.5 else crop


def open_pictures(folders, config):
    """A and B. Raises UserError for folders that cannot be trained on."""
    A, B = (Pictures(Path(folder), config) for folder in folders)
    for one, other in ((A.folder, B.folder), (B.folder, A.folder)):
        if any(other.samefile(folder) for folder in (one, *one.resolve().parents)):
            raise UserError(f"{A.folder} and {B.folder} are one folder, or one lies in the other; "
                            "each domain needs its own")
    return A, B


def batches(config, A, B, epoch, done):
    """Yields x and y of each step of an epoch after its first `done` pictures.

    They are a function of seed, epoch and `done` alone, so a run resumes to the same pictures,
    however many processes share a batch. Threads read up to AHEAD of them in advance.
    """
    count, size = max(len(A), len(B)), WORLD * config.batch_size
    order = np.random.default_rng([config.seed, 1, epoch]).permutation(count)
    batch_at = functools.partial(batch, config, A, B, order, epoch)
    for _, reading in cyclegan.in_threads(batch_at, range(done, count, size), AHEAD):
        yield reading.result()


def batch(config, A, B, order, epoch, start):
    """x and y of one step, (batch_size, image_size, image_size, 3) uint8.

    An epoch has as many of each as the larger folder: every picture of A, again and again if A is
    the smaller, and random ones of B, so that no pair lasts (authors' code). The last batch is
    filled up from the first. Each process takes its share of what is drawn for all.
    """
    size = WORLD * config.batch_size
    random = np.random.default_rng([config.seed, 2, epoch, start])
    chosen = (order[np.arange(start, start + size) % len(order)] % len(A),
              random.integers(len(B), size=size))
    draws = random.random((2, size, 3))
    share = slice(RANK * config.batch_size, (RANK + 1) * config.batch_size)
    x, y = ([pictures.crop(k, *draw) for k, draw in zip(numbers[share], own[share], strict=True)]
            for pictures, numbers, own in zip((A, B), chosen, draws, strict=True))
    return np.stack(x), np.stack(y)


# ---- Runs ----------------------------------------------------------------------------------------

HABITS = ("save_every", "save_minutes", "sample_every")
MAY_CHANGE = {*HABITS, "resume", "device", "precision", "eager", "dataA", "dataB", "epochs",
              "decay_epochs", "max_steps"}  # when a run is resumed
PROGRESS = (*HABITS, "data", "epoch", "done", "history", "sums", "summed")  # is saved


@dataclass
class Run:
    """A training run: its folder, its pictures, its model, and how far it has come."""

    folder: Path
    pictures: tuple              # A and B
    fast: FastStep
    data: list                   # folders of A and B; the demo's are in the run's folder
    epoch: int = 0               # epochs completed
    done: int = 0                # pictures completed of the epoch under way
    save_every: int = 50         # epochs
    save_minutes: float = 10.0
    sample_every: int = 1        # epochs
    history: list = field(default_factory=list)  # rows of losses.csv, as dicts, one an epoch
    sums: dict = field(default_factory=dict)     # of each loss in the epoch under way
    summed: int = 0                              # steps in these sums
    last_step: int = 0
    start: tuple = None          # time and step after the first step, for the pace
    shown: float = 0.0           # time of the last status line
    saved: float = 0.0           # time of the last checkpoint

    @property
    def demo(self):
        return self.data == DEMO_FOLDERS

    @property
    def config(self):
        return self.fast.model.config

    @property
    def count(self):
        """Pictures of each domain in an epoch."""
        return max(map(len, self.pictures))

    def start_epoch(self, epoch):
        self.epoch, self.done, self.sums, self.summed = epoch, 0, {}, 0

    def save_is_due(self):
        return time.perf_counter() - self.saved > 60 * self.save_minutes

    def save(self, name="latest.pt", last=False):
        """Writes a checkpoint. If it cannot, training goes on, unless this was the last one."""
        if RANK > 0:
            return
        if not all(parameter.isfinite().all() for parameter in self.fast.model.parameters()):
            raise UserError(f"a weight is not finite after step {self.fast.steps}; {DIVERGED}")
        self.sums = {name: float(total) for name, total in self.sums.items()}
        try:
            cyclegan.save_checkpoint(self.folder / name, self.fast,
                                     {key: getattr(self, key) for key in PROGRESS})
        except (MemoryError, UserError) as error:
            if last:
                raise
            log(f"note: {str(error) or 'out of memory for a checkpoint'}; training goes on")
        self.saved = time.perf_counter()

    def add(self, losses):
        """Adds the losses of a step to the sums, which stay on the device until they are shown."""
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + loss
        self.summed += 1
        now = time.perf_counter()
        if self.start is None:  # the first step may compile the networks
            self.start = now, self.fast.steps
        if now - self.shown > (1 if TERMINAL else 10):
            self.shown = now
            log(self.status(), transient=True)

    def means(self):
        """The means of the losses in the epoch so far. Raises UserError if one is not finite."""
        means = {name: round(float(total) / self.summed, 6) for name, total in self.sums.items()}
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise UserError(f"the loss {name} is {mean} by step {self.fast.steps}; {DIVERGED}")
        return means

    def status(self):
        """The status line: where training is, the time left, the speed, the mean losses."""
        steps, (began, first) = self.fast.steps, self.start
        line = (f"epoch {self.epoch + 1}/{self.config.epochs + self.config.decay_epochs} "
                f"step {steps}/{self.last_step} | ")
        if steps > first:
            pace = (time.perf_counter() - began) / (steps - first)
            left = timedelta(seconds=round(pace * (self.last_step - steps)))
            line += f"{left} left, {1000 * pace:.0f} ms/step | "
        line += " ".join(f"{name} {mean:.2f}" for name, mean in self.means().items())
        if self.fast.device.type == "cuda":
            line += f" | peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        return line


def pick(names, given):
    return {name: given[name] for name in names if name in given}


def new_run(given, device):
    """Makes the folder of a new run as the command line asks, with a checkpoint at step 0."""
    data = [os.path.realpath(given[name]) for name in ("dataA", "dataB") if name in given]
    if len(data) == 1:
        raise UserError("--dataA and --dataB go together: training takes pictures of both domains")
    networks, settings = {}, {}
    if not data:
        settings = {**DEMO, "load_size": given.get("image_size", 64)}
    if "start_from" in given:
        networks, follow_from_them = start_from(given)
        settings.update(follow_from_them)
    settings.update(pick([f.name for f in fields(Config)], given))
    config = Config(**settings)
    pictures = open_pictures(data, config) if data else None
    fast = FastStep(CycleGAN(config, **networks), device, given.get("precision", "auto"),
                    "eager" in given)
    folder = from_rank_0(lambda: new_folder(given.get("out"), data))
    run = Run(folder, pictures or demo_pictures(folder, config), fast, data or DEMO_FOLDERS,
              **pick(HABITS, given))
    run.save(last=True)
    if networks:
        log(f"from {given['start_from']}: {', '.join(networks)}; all else begins anew")
    return run


def start_from(given):
    """The networks to start from, by name, and the settings that follow from them."""
    path = given["start_from"]
    G = cyclegan.load_generator(path, "AtoB").train().requires_grad_()
    if {"width", "blocks"} & given.keys():
        raise UserError(f"--width and --blocks follow from --start-from {path}; leave them out")
    networks = {"G": G}
    if G.config:
        model = cyclegan.load_checkpoint(path)[0].model
        networks = {name: getattr(model, name) for name in ("G", "F", "D_X", "D_Y")}
    elif (path / "latest_net_G_B.pth").is_file():
        networks["F"] = cyclegan.load_generator(path, "BtoA").train().requires_grad_()
    return networks, G.settings


def new_folder(out, data):
    """Makes the folder of a new run, `out` or the next free name in runs/, and returns it."""
    names = [os.path.basename(path) for path in data]
    if names == ["trainA", "trainB"]:  # as the authors' data sets have them
        names = [os.path.basename(os.path.dirname(data[0]))]
    name, k = "-".join(names) or "demo", 2
    folder = out or Path("runs", name)
    while folder.exists() and not out:
        folder, k = Path("runs", f"{name}-{k}"), k + 1
    folder.mkdir(parents=True, exist_ok=out is not None)
    of_killed_starts = {"latest.pt.part", "pictures"}
    if {path.name for path in folder.iterdir()} - of_killed_starts:
        raise UserError(f"--out {out} is not empty; choose another, or use --resume {out}")
    return folder


def open_run(given, device):
    """Loads the run in a folder from its checkpoint, with the changes that are given."""
    folder = given["resume"]
    fixed = ", ".join(sorted(map(flag, given.keys() - MAY_CHANGE)))
    if fixed:
        raise UserError(f"a resumed run keeps its settings; leave out {fixed}, or begin a new run "
                        f"with its networks: --start-from {folder}")
    if not (folder / "latest.pt").is_file():
        raise UserError(f"--resume takes the folder of a run, with latest.pt in it, not {folder}; "
                        "to go back to an earlier checkpoint, copy it over latest.pt")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} is read-only; copy the run, and resume the copy")
    from_rank_0(lambda: take_whole_part(folder / "latest.pt"))
    fast, place = cyclegan.load_checkpoint(
        folder / "latest.pt", device, given.get("precision", "auto"), "eager" in given)
    if not {"data", "epoch", "done"} <= place.keys():  # saved by another program
        raise UserError(f"{folder / 'latest.pt'} has no progress of a run")
    config = fast.model.config = rescheduled(fast.model.config, place["epoch"], given)
    move_folders(place, given)
    data = [folder / path for path in place["data"]]
    if place["data"] == DEMO_FOLDERS:
        pictures = demo_pictures(folder, config)
    elif all(path.is_dir() for path in data):
        pictures = open_pictures(data, config)
    else:
        raise UserError(f"the pictures of {folder} are no longer in {data[0]} and {data[1]}; say "
                        "with --dataA and --dataB where they are")
    if RANK == 0 and "history" not in place and (folder / "losses.csv").exists():
        os.replace(folder / "losses.csv", folder / "losses-earlier.csv")  # an older program's
    run = Run(folder, pictures, fast, **pick(PROGRESS, {**place, **given}))
    if given.keys() & {"dataA", "dataB", "epochs", "decay_epochs", *HABITS}:
        run.save()  # at once: --resume alone is then enough
    return run


def move_folders(place, given):
    """Replaces the folders of a run by those that are given."""
    before = list(map(os.path.basename, place["data"]))
    for k, name in enumerate(("dataA", "dataB")):
        if name in given:
            place["data"][k] = os.path.realpath(given[name])
    if list(map(os.path.basename, place["data"])) == before[::-1] != before:
        raise UserError(f"--dataA and --dataB are swapped: A was {before[0]}, B was {before[1]}")


def take_whole_part(path):
    """Has a checkpoint that could not take its place when it was saved take it now."""
    part = path.with_name(f"{path.name}.part")
    if part.exists() and part.stat().st_mtime > path.stat().st_mtime:
        with suppress(UserError):  # half of one, of a killed program
            cyclegan.read_checkpoint(part)
            os.replace(part, path)
            log(f"note: {path} was saved as {part.name}, which is taken now")


def rescheduled(config, epoch, given):
    """The Config with other epochs, if they were given: as few as are done begin the decay now."""
    epochs = max(given.get("epochs", config.epochs), min(epoch, config.epochs))
    return replace(config, epochs=epochs,
                   decay_epochs=given.get("decay_epochs", config.decay_epochs))


# ---- losses.csv and losses.png -------------------------------------------------------------------


def write_losses(run):
    """Writes losses.csv, whole, and draws losses.png. Without them training goes on."""
    if RANK > 0 or not run.history:
        return
    names = list(run.history[-1])  # a loss of one's own may have come later
    rows = [names] + [[row.get(name, "") for name in names] for row in run.history]
    text = "".join(",".join(map(str, row)) + "\n" for row in rows)
    write_or_warn(run.folder / "losses.csv", text.encode())
    write_or_warn(run.folder / "losses.png", cyclegan.png(plot_losses(run.history)))


def write_or_warn(path, data):
    try:
        cyclegan.write_file(path, data)
    except UserError as error:
        log(f"note: {error}; training goes on")


def plot_losses(history, width=720, height=96):
    """A curve for each loss, from 0 to its highest mean. (H, W, 3) uint8"""
    panels = []
    for name in list(history[-1])[3:]:  # after epoch, step and rate
        values = np.array([row.get(name, 0.0) for row in history])
        top = max(values.max(), 1e-9)
        across = np.linspace(4, width - 5, len(values))
        panel = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(panel)
        draw.line([*zip(across, (height - 2) * (1 - values / top), strict=True)], "firebrick", 2)
        draw.line([(4, 0), (4, height - 1), (width, height - 1)], "grey")
        title = f"{name}, epochs 1 to {len(values)}, from 0 to {top:.2f}; last {values[-1]:.2f}"
        panels.append(cyclegan.titled(np.asarray(panel), [title]))
    return np.concatenate(panels)


# ---- Samples -------------------------------------------------------------------------------------


def save_samples(run):
    """Writes the samples of an epoch, or within it of a step. Without them training goes on."""
    if RANK > 0:
        return
    name = f"epoch_{run.epoch:04}" + (f"_step_{run.fast.steps:03}" if run.done else "")
    try:
        grid = cyclegan.titled(sample_grid(run), TITLES)
    except (MemoryError, RuntimeError) as error:
        if not cyclegan.out_of_memory(error):
            raise
        log(f"note: out of memory for the samples {name}; training goes on")
        return
    write_or_warn(run.folder / "samples" / f"{name}.png", cyclegan.png(grid))


@torch.no_grad()
def sample_grid(run, rows=4):
    """x, G(x), F(G(x)), y, F(y), G(F(y)) for the centres of fixed pictures. (H, W, 3) uint8"""
    columns, model, (A, B) = [], run.fast.model, run.pictures
    for pictures, there, back in ((A, model.G, model.F), (B, model.F, model.G)):
        squares = [pictures.crop(k * len(pictures) // rows, 0.5, 0.5, 1) for k in range(rows)]
        images = cyclegan.to_tensor(np.stack(squares), run.fast.device)
        fakes = there(images)
        columns += [images, fakes, back(fakes)]
    framed = [torch.nn.functional.pad(images, (2, 2, 2, 2), value=1.0) for images in columns]
    return np.concatenate(cyclegan.to_pictures(torch.cat(framed, 3)))


def animate(folder, epoch):
    """Writes samples.gif: the samples, or FRAMES of them, from the first epoch to this one."""
    paths = sorted((folder / "samples").glob("epoch_*.png"))
    paths = [path for path in paths if path.name <= f"epoch_{epoch + 1:04}"]  # after going back
    some = np.linspace(0, len(paths) - 1, min(FRAMES, len(paths))).round().astype(int)
    frames, file = [], io.BytesIO()
    for k in some:
        title = f"after {paths[k].stem.replace('_', ' ')}"
        with suppress(UserError):  # whatever has become of it
            picture = cyclegan.titled(cyclegan.read_picture(paths[k]), [title])
            frames.append(Image.fromarray(picture))
            frames[-1].thumbnail((960, 960))
    if frames:
        times = [400] * (len(frames) - 1) + [2000]  # milliseconds
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)
        write_or_warn(folder / "samples.gif", file.getvalue())


# ---- Training ------------------------------------------------------------------------------------


def signals_to_stop():
    """A list to which Ctrl-C and other signals to stop add their number, where not ignored."""
    received = []

    def receive(number, frame):
        received.append(number)
        if WORLD == 1:  # a second one ends the program at once; torchrun sends the first again
            signal.signal(number, signal.SIG_DFL)

    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):  # the last is what schedulers send
        number = getattr(signal, name, None)  # Windows lacks the last two
        if number and signal.getsignal(number) is not signal.SIG_IGN:  # as SIGHUP under nohup
            signal.signal(number, receive)
    return received


def train(run, max_steps):
    """Trains to the last epoch, to step max_steps, or until a signal. -> the signals received"""
    fast, config, size = run.fast, run.config, WORLD * run.config.batch_size
    if run.done >= run.count:  # as after pictures were removed
        run.start_epoch(run.epoch + 1)
    later_epochs = config.epochs + config.decay_epochs - run.epoch - 1  # after the last one: -1
    steps_left = math.ceil((run.count - run.done) / size)
    steps_left += later_epochs * math.ceil(run.count / size)
    run.last_step = min(max_steps, fast.steps + steps_left)
    torch.backends.cudnn.benchmark = True

    received, run.saved = signals_to_stop(), time.perf_counter()
    stopping = fast.steps >= run.last_step
    if run.done == 0:
        show_epoch(run)  # again, lest a kill came between the last save and this
    while not stopping:
        stopping = train_epoch(run, received)
        if run.done >= run.count:
            end_epoch(run, last=stopping)
    return received


def train_epoch(run, received):
    """Trains to the end of the epoch under way, unless it is to stop before. -> whether to stop"""
    fast, config, (A, B) = run.fast, run.config, run.pictures
    lr, stopping = learning_rate(config, run.epoch), False
    reading = batches(config, A, B, run.epoch, run.done)
    while run.done < run.count:
        try:
            x, y = next(reading)
        except (MemoryError, UserError):  # between two steps, so rank 0 need lose nothing
            run.save()
            raise
        losses = fast(cyclegan.to_tensor(x, fast.device), cyclegan.to_tensor(y, fast.device), lr)
        run.done += WORLD * config.batch_size
        run.add(losses)
        stopping = in_any_process(received or fast.steps >= run.last_step)
        if run.done < run.count:
            if fast.steps in EARLY:
                save_samples(run)
            if stopping or run.save_is_due():
                run.save(last=stopping)
            if stopping:
                break
    log(run.status())
    return stopping


def end_epoch(run, last):
    """Adds a row to the losses, saves when it is time, and shows the epoch."""
    run.history.append({"epoch": run.epoch + 1, "step": run.fast.steps,
                        "rate": learning_rate(run.config, run.epoch), **run.means()})
    run.start_epoch(run.epoch + 1)
    numbered = run.epoch % run.save_every == 0
    if numbered:  # before latest.pt, so that none is ever missing
        run.save(f"epoch_{run.epoch:04}.pt")
    if numbered or last or run.save_is_due():
        run.save(last=last)
    show_epoch(run)


def show_epoch(run):
    write_losses(run)
    if run.epoch % run.sample_every == 0:
        save_samples(run)


# ==== The demo. Nothing below concerns training on your own pictures. =============================


def draw_scene(random):
    """One or two fruits (x, y, radius, phases of the pores), the light, wall's and table's colour.

    It is always the same wall and table, in slightly different light. The front fruit is the last.
    """
    fruits = [random.uniform([0.3, 0.35, 0.23, 0, 0], [0.7, 0.65, 0.32, 1, 1])]
    if random.random() < 0.5:
        beside = fruits[0][0] + (0.45 if fruits[0][0] < 0.5 else -0.45)
        fruits.insert(0, [beside, *random.uniform([0.3, 0.14, 0, 0], [0.7, 0.2, 1, 1])])
    return (fruits, random.uniform([-0.6, -0.8], [0.6, -0.3]),
            np.array([0.90, 0.70, 0.45]) * random.uniform(0.96, 1.04, 3),
            np.array([0.60, 0.38, 0.20]) * random.uniform(0.95, 1.05, 3))


def on_fruit(fruit, light, side):
    """Coordinates on a picture, those in which the fruit is the unit disc, its light and gloss."""
    x, y, radius = fruit[:3]
    v, u = np.mgrid[:side, :side, :1][:2] / side + 0.5 / side
    a, b = (u - x) / radius, (v - y) / radius
    lit = np.sqrt((1 - a * a - b * b).clip(0)) + a * light[0] + 1.1 * b * light[1]
    gloss = (1 - ((a - 0.5 * light[0]) ** 2 + (b - 0.55 * light[1]) ** 2) / 0.09).clip(0)
    return u, v, a, b, lit, gloss


def paint(scene, kind, side):
    """A scene with "apples" or with "oranges", which alone differ. (side, side, 3) uint8."""
    fruits, light, wall, table = scene
    v = np.mgrid[:side, :side, :1][0] / side + 0.5 / side
    picture = np.where(v < 0.6, wall * (1.1 - 0.3 * v), table * (0.7 + 0.4 * v))
    for fruit in fruits:
        u, v, a, b, lit, gloss = on_fruit(fruit, light, side)
        picture *= 1 - 0.45 * np.exp(-((a - 0.1 * light[0]) / 1.1) ** 2 - ((b - 0.95) / 0.25) ** 2)
        shade = 0.35 + 0.4 * lit.clip(0, 2)
        if kind == "apples":
            ripe = ((b + 0.95) / 0.4).clip(0, 1)  # green-yellow round the stem, red below
            skin = ([0.75, 0.62, 0.15] + [-0.10, -0.59, -0.07] * ripe) * shade + 0.65 * gloss
            mark, colour = (np.abs(a - 0.12 * b - 0.08) < 0.07) & (b < -0.62), [0.30, 0.18, 0.06]
        else:
            pores = np.prod([np.sin(2 * np.pi * (PORES * w + start))
                             for w, start in zip((u, v), fruit[3:], strict=True)], 0)
            skin = ([1.0, 0.55, 0.04] + [0.045, 0.15, 0] * pores) * shade + 0.2 * gloss
            mark, colour = a ** 2 + 3 * (b + 0.72) ** 2 < 0.02, [0.25, 0.38, 0.08]
        edge = ((1 - np.hypot(a, b)) * fruit[2] * side + 0.5).clip(0, 1)
        picture += (np.where(mark, colour, skin) - picture) * edge
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)


def pore_strength(pictures, scenes):
    """The amplitude of the oranges' pattern in the front fruit, wherever its pores sit: a median.

    Least squares of four phases of the pattern, which a quadratic sets off from the shading,
    inside the lit part, away from gloss and navel.
    """
    found = []
    for picture, (fruits, light, _, _) in zip(pictures, scenes, strict=True):
        u, v, a, b, lit, gloss = on_fruit(fruits[-1], light, len(picture))
        s, t = 2 * np.pi * PORES * u, 2 * np.pi * PORES * v
        inside = (np.hypot(a, b) < 0.8) & (b > -0.45) & (gloss == 0) & (lit > 0.2)
        terms = [np.sin(s) * np.sin(t), np.sin(s) * np.cos(t), np.cos(s) * np.sin(t),
                 np.cos(s) * np.cos(t), a ** 0, a, b, a * a, a * b, b * b]
        terms = np.stack([(term + 0 * u * v)[inside] for term in terms], 1)
        values = picture.mean(-1, keepdims=True)[inside]
        found.append(np.linalg.norm(np.linalg.lstsq(terms, values, rcond=None)[0][:4]))
    return np.median(found)


def demo_pictures(folder, config, scenes=200):
    """A and B of the demo. Rank 0 draws what they lack: other scenes as apples than as oranges."""
    for domain, name in enumerate(DEMO_FOLDERS):
        for i in range(scenes):
            path = folder / name / f"{i:03}.png"
            if RANK == 0 and not path.exists():
                scene = draw_scene(np.random.default_rng([domain, i]))
                picture = paint(scene, path.parent.name, config.load_size)
                cyclegan.write_file(path, cyclegan.png(picture))
    in_any_process(False)  # waits for these pictures
    return open_pictures([folder / name for name in DEMO_FOLDERS], config)


def evaluate_demo(run, count=32):
    """Says how near translations of held-out scenes come to the truth, which can be painted."""
    G, F, side = run.fast.model.G, run.fast.model.F, run.config.load_size
    scenes = [draw_scene(np.random.default_rng([2, k])) for k in range(count)]
    apples, oranges = (np.stack([paint(scene, kind, side) for scene in scenes])
                       for kind in ("apples", "oranges"))
    true = pore_strength(oranges, scenes)
    for title, network, source, truth, goal in (
            ("apples to oranges", G, apples, oranges, "100%"),
            ("oranges to apples", F, oranges, apples, "0%")):
        fakes = np.concatenate([cyclegan.translate(network, source[k:k + 4])  # in little memory
                                for k in range(0, count, 4)])
        inside, outside = demo_errors(fakes, source, truth)
        log(f"{title}, {count} held-out scenes: error in the fruit {inside:.0%} of the "
            f"untranslated picture's, elsewhere {outside:.3f} on [-1, 1]; pores "
            f"{pore_strength(fakes, scenes) / true:.0%} of a true orange's (should be {goal})")
    log("The program painted these scenes with either fruit, so it knows what a translation "
        f"should look like.\nTo see the networks learn, open {run.folder / 'samples.gif'}; its "
        f"columns are {', '.join(TITLES)}.")


def demo_errors(fakes, source, truth):
    """Mean errors of translations: in the fruit, as a part of the source's there; elsewhere."""
    fruit = (source != truth).any(-1)
    untranslated = np.abs(np.subtract(source, truth, dtype=float))
    error = np.abs(np.subtract(fakes, truth, dtype=float))
    return error[fruit].mean() / untranslated[fruit].mean(), error[~fruit].mean() / 127.5


# ==== The program =================================================================================


def run_program(given):
    """Does what the command line says. Returns the exit status."""
    if WORLD > 1:
        connect(given.get("device", "auto"))
    device, _ = cyclegan.choose_device(given.get("device", "auto"))
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if WORLD == 1 and os.environ.get(name, "1") != "1":
            log(f"note: {name} is {os.environ[name]}, but this is a run of its own; torchrun "
                "starts processes that train together")
    run = open_run(given, device) if "resume" in given else new_run(given, device)
    fast, config = run.fast, run.config
    log(f"run {run.folder}, at step {fast.steps}, on {device} in {fast.precision}, "
        f"processes: {WORLD}")
    for name, pictures in zip("AB", run.pictures, strict=True):
        log(f"{name}: {len(pictures):,} pictures in {pictures.folder}")
    log(f"{config.epochs} epochs at the learning rate {config.lr:g}, then {config.decay_epochs} of "
        "linear decay")
    if fast.compiles:
        log("the first step compiles the networks, which may take a minute or two")
    received = train(run, given.get("max_steps", math.inf))
    if RANK == 0:
        animate(run.folder, run.epoch)
        if run.demo and not received:
            evaluate_demo(run)
    in_any_process(False)  # waits for rank 0; NCCL would end it if the others left
    end, then = "stopped", "continue with: python train.py --resume"
    if run.epoch >= config.epochs + config.decay_epochs:
        end, then = "finished", "translate with: python translate.py --checkpoint"
    log(f"{end} after step {fast.steps}; everything is saved in {run.folder}; {then} "
        f"{shlex.quote(str(run.folder))}")
    return 128 + received[0] if received else 0


def main():
    if hasattr(sys.stdout, "reconfigure"):  # notebooks replace stdout
        sys.stdout.reconfigure(errors="replace")  # names may hold what the screen cannot show
    warnings.showwarning = lambda warning, *_: log(f"note: {warning}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until training starts
    given = parse()
    try:
        return run_program(given)
    except UserError as error:
        reason = error
    except OSError as error:
        reason = ": ".join(str(part) for part in (error.filename, error.strerror) if part) or error
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
