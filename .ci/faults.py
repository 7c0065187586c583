"""Breaks runs of train.py in every way that the README promises to survive; counts what was lost.

    python .ci/faults.py                     all of it, in about 20 minutes on two CPU cores
    python .ci/faults.py signals=2 memory    some of it; signals only twice

A failed check is an AssertionError.
"""

import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from shutil import copytree
from statistics import median

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import test_cyclegan as tests
from cyclegan import UserError, load_generator, read_picture

NEW = (f"{tests.TRAIN} --epochs 16 --decay-epochs 16 --buffer-size 4 --save-every 4 "
       "--save-minutes 0.001 --out")  # 32 epochs of 8 steps; saves every few steps
PEACE = Path("peace")  # a run left in peace


def draw(folder, count, side=40):
    Path(folder).mkdir(parents=True)
    for k in range(count):
        picture = Image.frombytes("RGB", (9, 7), random.randbytes(3 * 9 * 7))
        picture.resize((side, side)).save(f"{folder}/{k}.png")


def wait(program, line=None):
    """Waits for a line, by default that of some epoch, and up to 0.4 seconds more."""
    program.wait_for(line or f"epoch {random.randint(1, 8)}/")
    time.sleep(random.uniform(0, 0.4))


def contents(run):
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*.*")}


def check(out):
    """A broken run must have whole files, those of PEACE once resumed. -> the steps it had."""
    whole, growing = contents(PEACE), ("latest.pt", "losses.csv", "losses.png", "samples.gif")
    for name, content in contents(out).items():
        assert name in growing or name.endswith(".part") or content == whole[name], out / name
    steps = tests.steps_of(out)
    tests.ok(".", f"train.py --resume {out}")
    assert contents(out) == whole, out
    return steps


def signals(count=10):
    """Ctrl-C, SIGTERM or a closed terminal."""
    steps = []
    for k in range(count):
        out, number = Path(f"signals{k}"), (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[k % 3]
        program = tests.Program(".", f"{NEW} {out}")
        wait(program)
        program.send(number)
        status, text, err = program.finish()
        steps.append(check(out))
        assert status == 128 + number and f"after step {steps[-1]};" in text, (text, err)
    return f"{count} stopped, after steps {steps}; nothing lost"


def kills(count=50):
    """kill -9, each fifth time while pictures are read."""
    parts, again = 0, []
    for k in range(count):
        out = Path(f"kills{k}")
        program = tests.Program(".", f"{NEW} {out}")
        wait(program, "new run" if k % 5 == 0 else None)
        program.send(signal.SIGKILL)
        program.finish()
        parts += len(list(out.rglob("*.part")))
        logged = tests.logged_steps(out) if (out / "losses.csv").exists() else []
        again.append(len(logged) - check(out))
    return (f"{count} killed, {parts} half-written files left; at most {max(again)} logged steps "
            "done again, to the same bytes")


def full_disk(count=5):
    """A limit on the size of files or, each second time, a small tmpfs, if we may mount one."""
    steps, reasons = [], set()
    for k in range(count):
        disk, out, limit = f"disk{k}", Path(f"full{k}"), random.randint(150_000, 220_000)
        os.mkdir(disk)
        mount = f"mount -t tmpfs -o size={4 * limit} none {disk} 2> /dev/null"
        mounted = k % 2 == 1 and os.system(mount) == 0
        program = tests.Program(".", f"{NEW} {disk}", file_size=None if mounted else limit)
        status, _, err = program.finish()
        copytree(disk, out)
        if mounted:
            os.system(f"umount {disk}")
        assert status == 1 and len(err.splitlines()) == 1 and "cannot write" in err, err
        assert not list(out.rglob("*.part")), out
        reasons.add(err.split(": ")[-1].strip())
        steps.append(check(out))
    return f"{count} filled up ({', '.join(sorted(reasons))}), resumed from steps {steps}"


def mutated(count=200):
    """Checkpoints with code in them, or none at all; then one that is cut short or changed."""
    torch.save({**torch.load(PEACE / "latest.pt"), "place": tests.Malice()}, "code.pt")
    torch.save(tests.Malice(), "legacy.pt", _use_new_zipfile_serialization=False)
    special = [Path(name).read_bytes() for name in ("code.pt", "legacy.pt", "oranges/0.png")]
    special += [b"", b"hello\n", b"PK\x03\x04", b"\x80\x02.", bytes(1000)]
    good, path, refused = (PEACE / "latest.pt").read_bytes(), Path("mutated/latest.pt"), 0
    path.parent.mkdir()
    for k in range(count):
        at, length = random.randrange(len(good)), random.choice([1, 100, 5000])
        end = good[at + length:]
        end = random.choice([b"", end, bytes(length) + end, random.randbytes(length) + end])
        path.write_bytes(special[k] if k < len(special) else good[:at] + end)
        with suppress(UserError):
            load_generator(path)
        try:
            assert tests.same_state(path.parent, PEACE), k  # changed only where nothing is
            continue
        except UserError as error:
            assert str(path) in str(error), error
        refused += 1
        if k < len(special) or k % 20 == 0:  # by the programs, too
            for status, _, err in tests.run(".", "train.py --resume mutated",
                                            "translate.py oranges --checkpoint mutated"):
                assert status == 1 and len(err.splitlines()) == 1 and str(path) in err, err
    assert not Path("malice_was_here").exists()
    return f"{refused} of {count} refused, the others had lost nothing; no code ran"


def pictures():
    """Odd pictures, in both programs: handled, or named and skipped."""
    data, picture = Path("oranges/0.png").read_bytes(), Image.open("oranges/0.png")
    rotated = picture.rotate(90)
    odd = {
        "1 x 1.png": Image.new("RGB", (1, 1)), "50 x 5000.png": Image.new("RGB", (50, 5000)),
        "5000 x 50.png": Image.new("RGB", (5000, 50)), "palette.png": picture.convert("P"),
        "palette too.gif": picture.convert("P"), "cmyk.jpg": picture.convert("CMYK"),
        "16 bits.png": Image.new("I;16", (40, 30), 5000), "alpha.png": picture.convert("RGBA"),
        "grey and alpha.png": picture.convert("LA"), "animated.gif": picture,
        "animated too.webp": picture, "a png called.jpg": data,
        "näme with späces and 日本.png": data, "line\nbreak.png": data,
        "bad: cut short.png": data[:600], "bad: a text.png": b"hello", "bad: zero bytes.png": b"",
        "bad: a program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "bad: cut short.jpg": picture, "bad: 1 x 5000.png": Image.new("RGB", (1, 5000)),
        "bad: 200 megapixels.png": Image.new("1", (20000, 10000))}
    os.mkdir("odd")
    for name, content in odd.items():
        if isinstance(content, bytes):
            Path("odd", name).write_bytes(content)
        else:
            content.save(f"odd/{name}", save_all="animated" in name, append_images=[rotated])
    os.truncate("odd/bad: cut short.jpg", 600)
    trained, translated = tests.run(
        ".", f"{tests.TRAIN} --dataA odd --epochs 1 --decay-epochs 0 --out odd-run",
        f"translate.py odd --checkpoint {PEACE} --out translated")
    assert trained[0] == 0 and translated[0] == 1, (trained, translated)
    skipped = [name for name in odd if name.startswith("bad")]
    for name in skipped:
        assert f"\nskipped: cannot read {Path.cwd()}/odd/{name}: " in trained[1], trained
        assert f"skipped: cannot read odd/{name}: " in translated[2], translated
    handled = odd.keys() - skipped
    assert f"A: {len(handled)} pictures" in trained[1] and translated[2].count("\n") == len(skipped)
    for name in handled:
        result = read_picture(f"translated/{Path(name).stem}.png")
        assert result.shape == read_picture(f"odd/{name}").shape, name
    return f"{len(handled)} handled, {len(skipped)} named and skipped"


def ranks(count=5):
    """One of two processes killed: the other ends, and one or two continue the run."""
    seconds = []
    for k in range(count):
        out = Path(f"ranks{k}")
        programs = tests.pair(".", f"{NEW} {out}")
        wait(programs[0])
        killed, other = programs[::-1] if k % 2 else programs
        killed.send(signal.SIGKILL)
        began = time.perf_counter()
        status, _, err = other.finish()
        seconds.append(time.perf_counter() - began)
        assert status == 1 and f"(rank {1 - k % 2}): another process failed" in err, (status, err)
        killed.finish()
        line = f"train.py --resume {out}"
        for program in tests.pair(".", line) if k % 2 else [tests.Program(".", line)]:
            status, _, err = program.finish()
            assert status == 0, err
        assert tests.logged_steps(out) == list(range(1, tests.steps_of(out) + 1))
    return f"{count} killed, the other ended within {max(seconds):.1f} s; all resumed to the end"


def memory(steps=36_000):
    """An hour's worth of small steps, ten a second: memory and open files."""
    draw("many", 60)
    line = (f"{tests.TRAIN} --dataA many --epochs {steps // 60} --decay-epochs 0 "
            "--sample-every 10 --out long")
    process = subprocess.Popen([sys.executable, tests.HERE / "train.py", *line.split()[1:]],
                               env=tests.ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    used, files = [], []
    for line in process.stdout:
        if line.startswith("epoch"):
            pages = Path(f"/proc/{process.pid}/statm").read_text().split()[1]
            used.append(int(pages) * resource.getpagesize() / 2**20)
            files.append(len(os.listdir(f"/proc/{process.pid}/fd")))
    assert process.wait() == 0 and tests.steps_of(Path("long")) == steps
    tenth = len(used) // 10
    early, late, files = median(used[tenth:2 * tenth]), median(used[-tenth:]), {*files[tenth:]}
    assert abs(late / early - 1) < 0.02 and max(files) - min(files) <= 1, (early, late, files)
    return (f"{steps} steps: {early:.0f} MiB after a tenth of them, {late:.0f} MiB at the end "
            f"({late / early - 1:+.1%}); open files {files}")


def main():
    faults = {f.__name__: f for f in (signals, kills, full_disk, mutated, pictures, ranks, memory)}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        random.seed(0)
        draw("apples", 8, 3000)  # takes a second to read
        draw("oranges", 5)
        tests.ok(".", f"{NEW} {PEACE}")
        for argument in sys.argv[1:] or faults:
            name, _, count = argument.partition("=")
            began = time.perf_counter()
            said = faults[name](int(count)) if count else faults[name]()
            print(f"{name}: {said} [{time.perf_counter() - began:.0f} s]", flush=True)


if __name__ == "__main__":
    main()
