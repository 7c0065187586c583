"""Breaks real runs of train.py, resumes them, and compares their files with an unbroken run's.

    python .ci/faults.py A B                    two folders of pictures; 20 minutes on two cores
    python .ci/faults.py A B stops=3 memory     some of it; of stops only three

Prints the table of docs/faults.md; the exit status says whether all was as promised. Checkpoints
are compared by their tensors and their place, all other files byte for byte.
"""

import json
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch._dynamo  # programs are forked from this one, so that none has to wait for imports

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import cyclegan  # noqa: E402

A, B = (Path(folder).resolve() for folder in sys.argv[1:3])
EPOCH = max(len(cyclegan.find_pictures(folder)) for folder in (A, B))  # steps
RUN = [f"--dataB={B}", "--image-size=32", "--width=4", "--blocks=1", "--buffer-size=4",
       "--epochs=1", "--decay-epochs=2", "--device=cpu"]
SAVING = ["--save-every=2", "--save-minutes=0.05"]  # is given at each start
PEACE = Path("peace")  # a run left in peace
BROKEN = []            # promises

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
STEP = cyclegan.FastCycleGAN, "train_step"
MOMENTS = (os, "fsync"), (cyclegan, "save_checkpoint"), (cyclegan, "png")


class Program:
    """train.py in a process of its own. hook: owner and name of a function, n, and the signal
    that the process gets when that function has ended for the nth time."""

    def __init__(self, *arguments, hook=None):
        self.said = [Path(tempfile.mkdtemp(), name) for name in ("output", "errors")]
        self.process = multiprocessing.get_context("fork").Process(
            target=self.run, args=(["train.py", *map(str, arguments)], hook))
        self.process.start()

    def run(self, arguments, hook):
        for number, path in enumerate(self.said, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        for number in SIGNALS:  # nohup, or a shell's &, may have some of them ignored
            signal.signal(number, signal.SIG_DFL)
        sys.argv = arguments
        import train  # which looks whether it has a terminal
        if hook:
            insert(*hook)
        sys.exit(train.main())

    def end(self):
        """-> (exit status, output, errors)"""
        self.process.join(900)
        out, err = (path.read_text() for path in self.said)
        expect("Traceback" not in err, err)
        return self.process.exitcode, out, err


def insert(owner, name, nth, number):
    plain, calls = getattr(owner, name), []

    def hooked(*given):
        result = plain(*given)
        calls.append(name)
        if len(calls) == nth:
            os.kill(os.getpid(), number)
        return result

    setattr(owner, name, hooked)


def new(out, hook=None):
    return Program(f"--dataA={A}", *RUN, *SAVING, f"--out={out}", hook=hook)


def expect(true, what):
    if not true:
        BROKEN.append(str(what))
        print("not as promised:", what, file=sys.stderr, flush=True)


def contents(run):
    """{name of a file: what is in it}"""
    def content(path):
        if path.suffix != ".pt":
            return path.read_bytes()
        saved = cyclegan.read_checkpoint(path)
        return json.dumps(saved, default=torch.Tensor.tolist, sort_keys=True)

    return {str(path.relative_to(run)): content(path) for path in run.rglob("*.*")}


def finish(out, how, may_lose="nothing"):
    """Resumes a broken run and compares it with PEACE. -> the steps that it had"""
    whole, before = contents(PEACE), contents(out)
    for name in before:
        grows = re.search("part$|latest.pt|losses|gif", name)
        expect(grows or before[name] == whole.get(name), f"{how}: {name} differs at first")
    begun = "latest.pt" in before
    status, _, err = (Program(f"--resume={out}", *SAVING) if begun else new(out)).end()
    expect(status == 0, f"{how}: {err}")
    after = contents(out)
    for name in sorted(whole.keys() | after.keys()):
        expect(after.get(name) == whole.get(name) or re.match(may_lose, name),
               f"{how}: {name} {'differs' if name in after else 'is missing'} at the end")
    return json.loads(before["latest.pt"])["steps"] if begun else 0


# ---- Faults: each returns a row of the table -----------------------------------------------------


def stops(count=10):
    """Signals to stop; every third one comes in the last step of an epoch."""
    at = [random.randint(1, 3) * EPOCH if k % 3 == 0 else random.randint(1, 3 * EPOCH)
          for k in range(count)]
    for k, step in enumerate(at):
        number, out = SIGNALS[k % 4], Path(f"stops{k}")
        status, text, err = new(out, (*STEP, step, number)).end()
        how = f"{number.name} at step {step}"
        expect(status == 128 + number and f" after step {step};" in text, f"{how}: {text} {err}")
        expect(finish(out, how) == step, f"{how}: saved at another step")
    return (f"Ctrl-C, SIGTERM, a closed terminal, SIGUSR1, at steps {at} of {3 * EPOCH}", count,
            "nothing")


def kills(count=20):
    """kill -9: half of them at any moment, half as something has just been done."""
    steps = []
    for k in range(count):
        out, seconds = Path(f"kills{k}"), random.uniform(2, SECONDS)
        hook = (*random.choice(MOMENTS), random.randint(1, 6), 9) if k % 2 else None
        process = new(out, hook)
        if not hook:
            time.sleep(seconds)
            process.process.kill()
        process.end()
        for part in out.rglob("*.part"):  # as if killed a little earlier
            os.truncate(part, random.randint(0, part.stat().st_size))
        how = f"{hook[1]} {hook[2]}" if hook else f"{seconds:.1f} s"
        steps.append(finish(out, f"kill -9 after {how}"))
    return ("`kill -9` at any moment, half of them in the midst of saving", count,
            "the steps since the last checkpoint, done again to the same bytes; resumed from "
            f"{sorted(steps)}")


def disks(count=6):
    """Files that may not grow beyond a size, for a while or to the end."""
    reasons = set()
    for k in range(count):
        out, for_a_while = Path(f"disks{k}"), k % 2 == 0
        process = new(out)
        limits = (8192, -1) if for_a_while else ((PEACE / "latest.pt").stat().st_size * 4 // 5,)
        for limit in limits:
            while for_a_while and not (out / "losses.csv").exists():
                time.sleep(0.1)
            resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (limit, -1))
            time.sleep(0.3 * SECONDS if limit == 8192 else 0)
        status, text, err = process.end()
        notes = re.findall("note: cannot write .*: (.*); training continues", text)
        expect(notes and status == len(err.splitlines()) == (not for_a_while), f"disk {k}: {err}")
        expect(not list(out.rglob("*.part")), f"disk {k}: part files are left")
        reasons |= set(notes)
        finish(out, f"disk {k}", may_lose="samples|epoch_")
    return (f"a disk full for a while, or to the end ({', '.join(reasons)})", count,
            "samples and numbered checkpoints of that time; training went on")


def memory(steps=36_000):
    """Memory and open files over many small steps, an hour's at ten a second."""
    process = Program(f"--dataA={A}", *RUN, *SAVING, f"--epochs={steps // EPOCH}",
                      "--out=long").process
    used, files, here = [], [], Path(f"/proc/{process.pid}")
    while process.is_alive():
        used.append(int((here / "statm").read_text().split()[1]) * resource.getpagesize() / 2**20)
        files.append(len(os.listdir(here / "fd")))
        time.sleep(0.5)
    early, late = used[len(used) // 10], used[len(used) * 98 // 100]  # then samples.gif is made
    said = (f"memory {early:.0f} MiB after a tenth of them, {late:.0f} MiB after 98 % "
            f"({late / early - 1:+.1%}), {used[-2]:.0f} MiB at the end, with samples.gif; at "
            f"most {max(files)} files open")
    expect(process.exitcode == 0 and late < 1.02 * early and max(files) < 20, said)
    return f"{steps:,} steps in one run", 1, said


if __name__ == "__main__":
    os.chdir(tempfile.mkdtemp())
    torch.set_num_threads(1)  # before it is forked
    random.seed(0)
    began = time.perf_counter()
    expect(new(PEACE).end()[0] == 0, "the run left in peace")
    SECONDS = time.perf_counter() - began
    print(f"| on {os.cpu_count()} CPU cores, torch {torch.__version__} | times | lost or changed |")
    print("|---|---|---|", flush=True)
    for argument in sys.argv[3:] or "stops kills disks memory".split():
        name, _, times = argument.partition("=")
        before = len(BROKEN)
        what, often, lost = globals()[name](*[int(times)] if times else [])
        if BROKEN[before:]:
            lost = f"**not as promised**: {'; '.join(BROKEN[before:])}"
        print(f"| {what} | {often} | {lost} |", flush=True)
    sys.exit(bool(BROKEN))
