"""How fast images are read and training crops are drawn: `python -m simulations.bench.data`.

Three measurements, those that are compared side by side and in turns in one run: the sample abdomen (512×512×20, JPEG 2000)
through our reader against
pydicom's bare `pixel_array` over the same files; random 128×128 pairs from a prepared store; peak memory of `prepare` for few and
for many cases.
"""

from __future__ import annotations

import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from simulations.sources import IMAGES
from tat_core.data.dataset import write_json
from tat_core.data.patches import sample_batch
from tat_core.data.prepared import open_split, prepare
from tat_core.data.volume import Volume, read_volume, write_nifti
from tat_core.tasks import CT

READ_LIMIT = 1.3  # times pydicom's bare decoding
PAIRS_LIMIT = 20_000  # a second on one core
MEMORY_LIMIT = 1.25  # eight cases against two
_REPEATS = 3


def main() -> int:
    """Print a table and one JSON line; return 1 if a limit is missed."""
    torch.set_num_threads(1)
    reading, bare = alternate([_read_ours, _read_bare], _REPEATS)
    with tempfile.TemporaryDirectory() as folder:
        pairs = pairs_per_second(Path(folder))
        few, many = (prepare_peak_mib(Path(folder), count) for count in (2, 8))
    results = {
        "read_seconds": round(reading, 4),
        "pydicom_seconds": round(bare, 4),
        "read_ratio": round(reading / bare, 3),
        "pairs_per_second": round(pairs),
        "prepare_peak_mib_2_cases": round(few),
        "prepare_peak_mib_8_cases": round(many),
    }
    rows = [
        (
            "read 512x512x20 JPEG 2000, against pydicom",
            f"{reading / bare:.2f}x",
            f"<= {READ_LIMIT}x",
            reading / bare <= READ_LIMIT,
        ),
        ("random 128x128 pairs, one core", f"{pairs:,.0f}/s", f">= {PAIRS_LIMIT:,}/s", pairs >= PAIRS_LIMIT),
        ("peak memory of prepare, 8 cases against 2", f"{many / few:.2f}x", f"<= {MEMORY_LIMIT}x", many / few <= MEMORY_LIMIT),
    ]
    table = Table("what", "measured", "limit", "")
    for what, measured, limit, held in rows:
        table.add_row(what, measured, limit, "held" if held else "MISSED")
    Console().print(table)
    print(json.dumps(results))
    return 0 if all(row[-1] for row in rows) else 1


def alternate(functions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each function, called in turns so that a busy machine slows all alike; the first round is thrown away."""
    seconds: list[list[float]] = [[] for _ in functions]
    for round_number in range(repeats + 1):
        for function, record in zip(functions, seconds, strict=True):
            start = time.process_time()
            function()
            if round_number:
                record.append(time.process_time() - start)
    return [statistics.median(record) for record in seconds]


def _read_ours() -> Volume:
    return read_volume(IMAGES / "ct_abdomen", CT)


def _read_bare() -> None:
    pydicom = importlib.import_module("pydicom")  # by name: in the packages themselves the reader alone may know it
    for path in sorted((IMAGES / "ct_abdomen").iterdir()):
        _ = pydicom.dcmread(path).pixel_array


def pairs_per_second(folder: Path) -> float:
    """Best of a few runs over a store of forty 512×512 slices, batches of 32."""
    split = open_split(prepare(_data_set(folder / "pairs", 2)), "train")
    rng = np.random.default_rng(0)
    best = 0.0
    for _ in range(5):
        start = time.process_time()
        for _ in range(100):
            sample_batch({"CT": split}, 32, 128, rng)
        best = max(best, 3200 / (time.process_time() - start))
    return best


def prepare_peak_mib(folder: Path, cases: int) -> float:
    """Peak memory of a process that prepares so many cases, beyond what its imports take."""
    data = _data_set(folder / f"memory-{cases}", cases)
    code = (
        "import re, sys; from pathlib import Path; from tat_core.data.prepared import prepare\n"
        "def kib(name): return int(re.search(name + r':\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "before = kib('VmRSS')\n"
        "prepare(Path(sys.argv[1]))\n"
        "print(kib('VmHWM') - before)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(data)], capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1]) / 1024


def _data_set(folder: Path, cases: int) -> Path:
    """Cases of the abdomen's size."""
    volume = _read_ours()
    names = [f"case-{number}" for number in range(cases)]
    for number, name in enumerate(names):
        for side, offset in (("LQ", number), ("HQ", number + 1)):
            write_nifti(
                Volume(volume.voxels + np.float32(offset), volume.affine, volume.unit), folder / side / f"{name}.nii", np.int16
            )
    write_json(folder / "dataset.json", {"format": 1, "task": "CT", "unit": "HU"})
    write_json(folder / "splits.json", {"format": 1, "cases": {name: {"patient": name, "split": "train"} for name in names}})
    return folder


if __name__ == "__main__":
    sys.exit(main())
