"""Breaks runs in every way that the README promises to survive, and counts what was lost.

    python .ci/faults.py                     all of it, about half an hour on two CPU cores
    python .ci/faults.py signals memory      some of it

Every run is one of train.py itself. What a fault left is resumed to the end and compared, bit for
bit, with a run that was left in peace. A failed check is an AssertionError.
"""

import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
from cyclegan import UserError, load_checkpoint, load_generator, read_picture  # noqa: E402

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # runs go side by side here
os.environ["OMP_NUM_THREADS"] = "1"
FLAGS = ("--dataA apples --dataB oranges --image-size 24 --load-size 28 --width 2 --blocks 1 "
         "--buffer-size 4 --epochs 12 --decay-epochs 12 --save-every 6").split()
STEPS = 24 * 8  # epochs, pictures of the larger domain


def start(*arguments, processes=1, **options):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), HERE / "train.py",
         *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for(process, beginning):
    """The first line of a program's output that begins so."""
    return next(line for line in process.stdout if line.startswith(beginning))


def run(*arguments, **options):
    """A whole run of train.py -> (exit status, its output, its last error line)."""
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def draw(folder, count, seed, height=40):
    Path(folder).mkdir(parents=True)
    for k in range(count):
        picture = np.random.default_rng([seed, k]).integers(256, size=(height, 30 + k % 7, 3))
        Image.fromarray(picture.astype(np.uint8)).save(Path(folder, f"{k:04}.png"))


def state(path):
    """Every bit of a checkpoint but the place of the run."""
    model, place = load_checkpoint(path)
    adams = [v for adam in (model.adam_G, model.adam_D) for s in adam.state.values()
             for v in s.values()]
    tensors = [*model.state_dict().values(), *adams, torch.tensor(model.steps)]
    return ([t.numpy().tobytes() for t in tensors], {**place, "save_minutes": None}, model.config)


def same(one, two):
    """Whether two runs ended with the same bits, the same log, the same samples."""
    assert state(one / "latest.pt") == state(two / "latest.pt"), (one, two)
    names = ["losses.csv", *(f"samples/{path.name}" for path in two.glob("samples/*"))]
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), (one, name)
    for path in two.glob("epoch_*.pt"):
        assert state(one / path.name) == state(path), (one, path)
    assert not list(one.rglob("*.part")), one


def whole(folder):
    """Every file of a run that a reader may see can be read; -> the steps of its checkpoint."""
    for path in folder.rglob("*"):
        if path.suffix == ".pt":
            load_checkpoint(path)
        elif path.suffix == ".png":
            read_picture(path)
        elif path.suffix == ".bytes":
            assert path.stat().st_size % (28 * 28 * 3) == 0 < path.stat().st_size
    latest = folder / "latest.pt"
    return load_checkpoint(latest)[0].steps if latest.exists() else None


def side_by_side(trial, count):
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(trial, range(count)))


def signals(count=10):
    """Ctrl-C, SIGTERM or a closed terminal at a random step, then resume."""
    def trial(k):
        chance, out = random.Random(f"signals {k}"), Path(f"signal{k}")
        number = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[k % 3]
        process = start(*FLAGS, "--out", out)
        wait_for(process, f"epoch {1 + chance.randrange(12)}/")
        time.sleep(chance.random() / 10)
        process.send_signal(number)
        rest, err = process.communicate(timeout=60)
        steps = whole(out)
        assert f"stopped after step {steps};" in rest and process.returncode == 128 + number, (
            steps, rest, err, process.returncode, number)
        assert run("--resume", out)[0] == 0
        same(out, Path("reference"))
        return steps
    steps = side_by_side(trial, count)
    return f"{count} stopped, at steps {steps}: 0 bits changed"


def kills(count=50):
    """kill -9 while training, saving, building the cache or writing samples, then resume."""
    draw("crowd", 400, 2, height=1000)  # takes a second to read
    crowd = [*FLAGS, "--dataA", "crowd", "--max-steps", 10]
    assert run(*crowd, "--out", "reference-crowd")[0] == 0

    def trial(k):
        chance, out, building = random.Random(f"kills {k}"), Path(f"killed{k}"), k % 5 == 0
        flags = crowd if building else FLAGS
        saving = ["--save-minutes", 1e-9] if k % 2 else []  # a checkpoint after every step
        process = start(*flags, "--out", out, *saving)
        wait_for(process, "new run" if building else f"epoch {1 + chance.randrange(12)}/")
        time.sleep(chance.random() * (1.0 if building else 0.2))
        process.kill()
        process.communicate()
        parts = [path.name for path in out.rglob("*.part")]
        saved, log = whole(out), out / "losses.csv"
        logged = len(log.read_text().splitlines()) - 1 if log.exists() else 0
        status, _, err = run("--resume", out, *(["--max-steps", 10] if building else []))
        assert status == 0, err
        same(out, Path("reference-crowd" if building else "reference"))
        return parts, max(0, logged - saved)
    parts, again = zip(*side_by_side(trial, count))
    cut = [re.sub("-[0-9a-f]{16}", "", name) for names in parts for name in names]
    return (f"{count} killed, {len(cut)} half-written files left ({', '.join(sorted(set(cut)))}); "
            f"all resumed to the same bits; at most {max(again)} logged steps done again "
            "(an epoch has 8)")


def full_disk(count=5):
    """No space for the next checkpoint: a limit on the size of files, or a full tmpfs if we may."""
    size, told = Path("reference/latest.pt").stat().st_size, set()
    small = Path("small")
    small.mkdir()
    mounted = not subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "none",
                                  small], stderr=subprocess.DEVNULL).returncode
    for k in range(count):
        out, limit = Path(f"full{k}"), size * (2 * k + 5) // 20
        limits = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))}
        if mounted and k % 2:
            out, limits = small / f"full{k}", {}
        assert run(*FLAGS, "--out", out, "--max-steps", 1)[0] == 0
        before = whole(out)
        if not limits:  # fills it
            Path(small, "other").write_bytes(bytes(size * 3 // 2 - 4096 * 20 - sum(
                path.stat().st_size for path in out.rglob("*") if path.is_file())))
        status, _, err = run("--resume", out, **limits)
        assert status == 1 and len(err.splitlines()) == 1 and "cannot write" in err, err
        assert whole(out) >= before and not list(out.rglob("*.part"))
        told.add(err.split(": ")[-1].strip())
        if not limits:
            Path(small, "other").unlink()
            out = Path(shutil.move(out, f"full{k}"))
        assert run("--resume", out)[0] == 0
        same(out, Path("reference"))
    if mounted:
        subprocess.run(["umount", small], check=True)
    return f"{count} filled up ({', '.join(sorted(told))}), all resumed to the same bits"


class Malice:
    def __reduce__(self):
        return (os.mkdir, ("malice_was_here",))


def mutated(count=200):
    """Checkpoints cut short, with bytes changed, with code in them, or that are none at all."""
    good = Path("reference/latest.pt").read_bytes()
    expected = state("reference/latest.pt")
    chance, refused, harmless = random.Random("mutated"), 0, 0
    torch.save({**torch.load("reference/latest.pt"), "place": Malice()}, "code.pt")
    torch.save(Malice(), "legacy.pt", _use_new_zipfile_serialization=False)
    specials = [b"", b"hello\n", b"PK\x03\x04", pickle.dumps(Malice()), pickle.dumps({"model": 1}),
                Path("code.pt").read_bytes(), Path("legacy.pt").read_bytes(),
                Path("apples/0000.png").read_bytes(), bytes(1000), b"\x80\x02."]
    for k in range(count):
        data = bytearray(good)
        if k < len(specials):
            data = specials[k]
        elif k % 3 == 0:
            data = data[:chance.randrange(len(data))]
        elif k % 3 == 1:
            for _ in range(chance.randint(1, 8)):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        else:
            at, length = chance.randrange(len(data)), chance.randint(1, 5000)
            data[at:at + length] = chance.choice([b"", bytes(length), chance.randbytes(length)])
        path = Path("mutated.pt")
        path.write_bytes(data)
        for load in (state, load_generator):
            try:
                result = load(path)
            except UserError as error:
                assert str(path) in str(error) and len(str(error).splitlines()) == 1, error
                refused += load is state
            else:
                assert load is load_generator or result == expected, k
                harmless += load is state
        if k % 20 < 2:  # and by the programs themselves
            Path("damaged").mkdir(exist_ok=True)
            shutil.copy(path, "damaged/latest.pt")
            for program in (["train.py", "--resume", "damaged"],
                            ["translate.py", "--checkpoint", "damaged", "apples"]):
                done = subprocess.run([sys.executable, HERE / program[0], *program[1:]],
                                      capture_output=True, text=True)
                assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
                assert "damaged/latest.pt" in done.stderr, done.stderr
    assert not Path("malice_was_here").exists()
    return (f"{refused} of {count} refused in one sentence, {harmless} changed where nothing is "
            f"(all bits as saved); no code ran")


def pictures():
    """Odd pictures, each in both programs: handled, or named and skipped."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(256, size=(40, 30, 3), dtype=np.uint8))
    good = Path("apples/0000.png").read_bytes()
    makers = {
        "cut short.png": lambda p: p.write_bytes(good[:len(good) // 2]),
        "cut short.jpg": lambda p: (colour.save(p), p.write_bytes(p.read_bytes()[:600])),
        "zero bytes.png": lambda p: p.write_bytes(b""),
        "a png called.jpg": lambda p: p.write_bytes(good),
        "a text called.png": lambda p: p.write_text("hello"),
        "a program called.png": lambda p: p.write_text(
            "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(malice_was_here) (w) file\n"),
        "1 x 1.png": lambda p: Image.new("RGB", (1, 1)).save(p),
        "1 x 5000.png": lambda p: Image.new("RGB", (1, 5000)).save(p),
        "5000 x 1.png": lambda p: Image.new("RGB", (5000, 1)).save(p),
        "palette.png": lambda p: colour.convert("P").save(p),
        "palette.gif": lambda p: colour.convert("P").save(p),
        "cmyk.jpg": lambda p: colour.convert("CMYK").save(p),
        "16 bits.png": lambda p: Image.fromarray(
            rng.integers(65536, size=(40, 30), dtype=np.uint16)).save(p),
        "alpha.png": lambda p: colour.convert("RGBA").save(p),
        "grey and alpha.png": lambda p: colour.convert("LA").save(p),
        "animated.gif": lambda p: colour.save(p, save_all=True, append_images=[colour] * 3),
        "animated.webp": lambda p: colour.save(p, save_all=True, append_images=[colour] * 3),
        "200 megapixels.png": lambda p: Image.new("1", (20000, 10000)).save(p),
        "näme with späces and 日本.png": lambda p: p.write_bytes(good),
        "line\nbreak.png": lambda p: p.write_bytes(good)}
    handled, skipped = [], []

    def trial(k):
        name, make = list(makers.items())[k]
        folder = Path(f"odd{k}")
        draw(folder, 1, 0)
        make(folder / name)
        status, out, err = run(*FLAGS, "--out", f"odd-run{k}", "--dataA", folder, "--max-steps", 2)
        assert status == 0 and not err, err
        taken = "A: 2 pictures" in out
        shown = " ".join(name.split("\n"))
        assert taken or f"skipped: cannot read {Path.cwd() / folder / shown}" in out, out
        done = subprocess.run([sys.executable, HERE / "translate.py", folder / name, folder,
                               "--checkpoint", "reference", "--out", f"odd-out{k}"],
                              capture_output=True, text=True)
        assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 2, done.stderr
        results = [path for path in Path(f"odd-out{k}").rglob("*.png")
                   if path.stem.startswith(Path(name).stem)]
        if taken:
            assert done.returncode == 0 and len(results) == 2, (name, results)
            for result in results:
                with Image.open(folder / name) as source, Image.open(result) as translation:
                    assert source.size == translation.size
        else:
            assert done.returncode == 1 and not results and shown in done.stderr, done.stderr
        (handled if taken else skipped).append(name)
    side_by_side(trial, len(makers))
    return f"{len(handled)} handled, {len(skipped)} named and skipped: {', '.join(sorted(skipped))}"


def ranks(count=5):
    """One of two processes killed: the other ends, and the run can be resumed by one or two."""
    seconds = []
    for k in range(count):
        chance, out = random.Random(f"ranks {k}"), Path(f"rank{k}")
        process = start(*FLAGS, "--out", out, processes=2)
        wait_for(process, f"epoch {2 + chance.randrange(10)}/")
        time.sleep(chance.random() / 5)
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True,
                                 text=True).stdout.split()
        began = time.perf_counter()
        os.kill(int(workers[k % 2]), signal.SIGKILL)
        err = process.communicate(timeout=60)[1]
        seconds.append(time.perf_counter() - began)
        assert process.returncode and f"train.py (rank {1 - k % 2}): another process" in err, err
        assert seconds[-1] < 30
        steps = whole(out)
        status, text, err = run("--resume", out, processes=1 + k % 2)
        assert status == 0 and f"run {out} from step {steps} on" in text, err
        lines = (out / "losses.csv").read_text().splitlines()[1:]
        assert [int(line.split(",")[0]) for line in lines] == list(range(1, len(lines) + 1))
        assert load_checkpoint(out / "latest.pt")[1]["epoch"] == 24
    return f"{count} killed, the other ended within {max(seconds):.1f} s, all resumed to the end"


def memory(steps=36_000):
    """An hour's worth of small steps (ten a second): memory and open files."""
    draw("many/a", 60, 0)
    draw("many/b", 50, 1)
    process = start("--dataA", "many/a", "--dataB", "many/b", "--image-size", 24, "--load-size", 28,
                    "--width", 2, "--blocks", 1, "--epochs", steps // 60, "--decay-epochs", 0,
                    "--sample-every", 10, "--out", "long")
    seen = []
    for line in process.stdout:
        if line.startswith("epoch"):
            status = Path(f"/proc/{process.pid}/status").read_text()
            kilobytes = int(re.search(r"VmRSS:\s+(\d+)", status)[1])
            files = len(os.listdir(f"/proc/{process.pid}/fd"))
            seen.append((int(re.search(r" step (\d+)/", line)[1]), kilobytes, files))
    assert process.wait() == 0 and seen[-1][0] == steps, process.stderr.read()
    warm = [kilobytes for step, kilobytes, _ in seen if steps // 10 < step <= steps // 5]
    last = [kilobytes for step, kilobytes, _ in seen if step > steps - steps // 10]
    growth = np.median(last) / np.median(warm) - 1
    files = {n for step, _, n in seen if step > steps // 10}
    assert abs(growth) < 0.02 and max(files) - min(files) <= 1, (growth, files, seen[::50])
    return (f"{steps} steps: from {np.median(warm) / 1024:.0f} MiB to {np.median(last) / 1024:.0f} "
            f"MiB ({growth:+.1%}), open files {sorted(files)}")


def main():
    faults = (signals, kills, full_disk, mutated, pictures, ranks, memory)
    chosen = [fault for fault in faults if not sys.argv[1:] or fault.__name__ in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        draw("apples", 8, 0)
        draw("oranges", 5, 1)
        status, _, err = run(*FLAGS, "--out", "reference")
        assert status == 0 and load_checkpoint("reference/latest.pt")[0].steps == STEPS, err
        for fault in chosen:
            began = time.perf_counter()
            result = fault()
            print(f"{fault.__name__}: {result} [{time.perf_counter() - began:.0f} s]", flush=True)
        os.chdir("/")


if __name__ == "__main__":
    main()
