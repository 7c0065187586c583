"""Draws docs/epochs.png from a run's samples after epochs 1, 20 and 200.

    python train.py --epochs 100 --decay-epochs 100 --out runs/long
    python .ci/epochs.py runs/long
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cyclegan

HERE = Path(cyclegan.__file__).parent


def main(run):
    parts = []
    for epoch in (1, 20, 200):
        grid = cyclegan.read_picture(Path(run) / "samples" / f"epoch_{epoch:04}.png")
        half = grid[:len(grid) // 2]  # the titles and two of four rows
        parts.append(cyclegan.titled(half, [f"after epoch {epoch}"]))
    (HERE / "docs" / "epochs.png").write_bytes(cyclegan.png(np.concatenate(parts)))


if __name__ == "__main__":
    main(sys.argv[1])
