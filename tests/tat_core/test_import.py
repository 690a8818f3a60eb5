"""The benchmark layout with its pickles, and BIDS."""

from __future__ import annotations

import collections
import json
import os
import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from tat_core.data.benchmark_layout import import_benchmark, read_pickled_array
from tat_core.data.bids import bids_suv_factor, import_bids
from tat_core.data.dataset import open_data_set
from tat_core.data.prepared import open_split, prepare
from tat_core.data.simulate import simulate_low_quality


class Evil:
    """Unpickling this runs a command."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "content",
    [
        torch.arange(12.0).reshape(1, 3, 4),
        torch.arange(12).reshape(1, 3, 4)[:, :, ::2],
        np.arange(12.0).reshape(1, 3, 4),
        np.arange(12, dtype=np.int16).reshape(3, 4),
    ],
)
def test_pickled_arrays_are_read(tmp_path: Path, content, protocol: int) -> None:
    (tmp_path / "a.bin").write_bytes(pickle.dumps(content, protocol))
    np.testing.assert_array_equal(read_pickled_array(tmp_path / "a.bin"), np.asarray(content, np.float32))


def test_malicious_pickles_cannot_run_code(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    inner = pickle.dumps(Evil(os.system, f"touch {witness}"))
    attacks = [
        Evil(os.system, f"touch {witness}"),
        Evil(eval, f"open({str(witness)!r}, 'w')"),
        Evil(exec, f"open({str(witness)!r}, 'w')"),
        Evil(getattr, Evil(__import__, "os"), "system"),
        Evil(torch.load, str(witness)),
        Evil(torch.storage._load_from_bytes, inner),  # torch's own back door: a pickle in a tensor
        Evil(pickle.loads, inner),
        Evil(collections.namedtuple, "a", "b"),
        {"tensor": torch.zeros(1), "more": Evil(os.mkdir, str(witness))},
        [torch.zeros(1)],
        "text",
        np.array([Evil(os.mkdir, str(witness))], dtype=object),
        np.zeros(3, np.complex64),
        torch.zeros(3, dtype=torch.complex64),
    ]
    for attack in attacks:
        for protocol in (0, 2, 4):
            (tmp_path / "a.bin").write_bytes(pickle.dumps(attack, protocol))
            with pytest.raises(ValueError, match="read_pickled_array: expected"):
                read_pickled_array(tmp_path / "a.bin")
    assert not witness.exists()


def make_benchmark(root: Path) -> dict[str, list[np.ndarray]]:
    rng = np.random.default_rng(0)
    slices: dict[str, list[np.ndarray]] = {}
    for split, count in (("train", 5), ("validation", 1), ("test", 2)):
        for number in range(count):
            image = rng.integers(-1000, 1000, (6, 4 + number % 2)).astype(np.float32)
            slices.setdefault(split, []).append(image)
            for side, content in (("LQ", image + 1), ("HQ", image)):
                folder = root / "CT" / split / side
                folder.mkdir(parents=True, exist_ok=True)
                if split == "train":
                    (folder / f"{number}.bin").write_bytes(pickle.dumps(torch.from_numpy(content)[None]))
                else:
                    nib.save(nib.Nifti1Image(content.T, np.eye(4)), folder / f"{number}.nii")
    return slices


def test_benchmark_is_imported_unturned(tmp_path: Path) -> None:
    slices = make_benchmark(tmp_path / "in")
    (folder,) = import_benchmark(tmp_path / "in", tmp_path / "out")
    store = prepare(folder)
    for split, expected in slices.items():
        found = open_split(store, split)
        assert len(found) == len(expected)
        for index in range(len(found)):
            lq, hq = found.pair(index)
            np.testing.assert_array_equal(lq, hq + 1)
            assert any(np.array_equal(hq, image) for image in expected)
    with pytest.raises(ValueError, match="expected no data set"):
        import_benchmark(tmp_path / "in", tmp_path / "out")


def test_benchmark_refuses_what_is_incomplete(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="PET, CT or MRI"):
        import_benchmark(tmp_path, tmp_path / "out")
    make_benchmark(tmp_path / "in")
    (tmp_path / "in/CT/test/LQ/0.nii").unlink()
    with pytest.raises(ValueError, match="1 on one side only"):
        import_benchmark(tmp_path / "in", tmp_path / "out")


SIDECAR = {
    "Units": "Bq/mL",
    "InjectedRadioactivity": 200.0,
    "InjectedRadioactivityUnits": "MBq",
    "TracerRadionuclide": "F18",
    "ImageDecayCorrected": True,
    "ImageDecayCorrectionTime": 6586.2,
    "InjectionStart": 0,
    "BodyWeight": 70.0,
}


def test_bids_suv() -> None:
    assert bids_suv_factor(SIDECAR, None) == pytest.approx(70_000 / (200e6 / 2))
    assert bids_suv_factor(SIDECAR | {"Units": "kBq/mL", "TracerRadionuclide": "18F"}, 35.0) == pytest.approx(35e6 / 100e6)
    for name in ("InjectedRadioactivity", "BodyWeight", "TracerRadionuclide", "InjectionStart", "ImageDecayCorrected"):
        with pytest.raises(ValueError, match=name):
            bids_suv_factor({key: value for key, value in SIDECAR.items() if key != name}, None)


@pytest.mark.parametrize(("task", "suffix", "folder"), [("MRI", "T1w", "anat"), ("PET", "pet", "pet")])
def test_bids_import_then_simulation(tmp_path: Path, task: str, suffix: str, folder: str) -> None:
    rng = np.random.default_rng(0)
    for number in range(4):
        path = tmp_path / f"bids/sub-{number:02}/ses-1/{folder}/sub-{number:02}_ses-1_{suffix}.nii.gz"
        path.parent.mkdir(parents=True)
        nib.save(nib.Nifti1Image(rng.gamma(2, 2000, (20, 24, 3)).astype(np.float32), np.diag([2, 2, 4, 1])), path)
        path.with_name(path.name.replace(".nii.gz", ".json")).write_text(json.dumps(SIDECAR))
    out = import_bids(tmp_path / "bids", tmp_path / "out", task, suffix)
    data = open_data_set(out)
    assert sorted(case.split for case in data.cases) == ["test", "train", "train", "validation"]
    assert simulate_low_quality(out) == {}
    train = open_split(prepare(out), "train")
    assert len(train) == 6
    lq, hq = train.pair(0)
    assert lq.shape == (24, 20)
    assert not np.array_equal(lq, hq)
    if task == "PET":
        assert hq.mean() == pytest.approx(4000 * 70_000 / 100e6, rel=0.2)
    with pytest.raises(ValueError, match="expected settings"):
        simulate_low_quality(out, {"colour": 1.0})
    with pytest.raises(ValueError, match="same settings"):
        simulate_low_quality(out, seed=7)


def test_bids_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="BIDS has no CT"):
        import_bids(tmp_path, tmp_path / "out", "CT", "ct")
    with pytest.raises(ValueError, match="got none"):
        import_bids(tmp_path, tmp_path / "out", "MRI", "T1w")
