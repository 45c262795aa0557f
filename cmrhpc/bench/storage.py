"""Reading shards against reading the same bytes with numpy, and ingest against plain SimpleITK reading."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from cmrhpc import shards
from cmrhpc.bench.timing import interleaved, medians, ratio


def reading(folder: Path, rounds: int, n_images: int = 2000) -> dict[str, Any]:
    """Images of a shard against `numpy.load` of the same bytes, both from the page cache.

    read_ratio: all images from a shard whose checksum was checked when it was opened. checked_ratio: with opening it,
    which reads and hashes the whole file, as every task does once per shard.
    """
    pixels = np.random.default_rng(0).random((n_images, 1, 80, 80), np.float32)
    path, raw = folder / "read.h5", folder / "read.npy"
    shards.write_shard(path, {"image": pixels}, schema="bench", task={}, settings={}, inputs={}, seed=0)
    np.save(raw, pixels)
    opened = shards.read_shard(path)
    times = interleaved(
        {
            "numpy": lambda: np.load(raw),
            "shard": lambda: opened["image"],
            "checked": lambda: shards.read_shard(path)["image"],
        },
        max(5, 3 * rounds),
    )
    middle = medians(times)
    path.unlink()
    raw.unlink()
    return {
        "read_ratio": ratio(times, "numpy", "shard"),
        "checked_ratio": ratio(times, "numpy", "checked"),
        "megabytes_per_second": pixels.nbytes / middle["shard"] / 1e6,
        "checked_megabytes_per_second": pixels.nbytes / middle["checked"] / 1e6,
    }


def many_images(raw: Path, folder: Path, count: int) -> Path:
    """A raw folder of `count` images: hard links to those of `raw`, each patient's set again and again."""
    with open(raw / "cohort.csv", newline="") as stream:
        header, *rows = list(csv.reader(stream))
    folder.mkdir()
    table = [header]
    columns = {name: header.index(name) for name in ("image", "mask", "patient")}
    for number in range(count):
        row, again = list(rows[number % len(rows)]), number // len(rows)
        for name in ("image", "mask"):
            source = raw / row[columns[name]]
            row[columns[name]] = f"{number:06d}_{name}{source.suffix}"
            os.link(source, folder / row[columns[name]])
        row[columns["patient"]] += f"-{again}"
        table.append(row)
    with open(folder / "cohort.csv", "w", newline="") as stream:
        csv.writer(stream).writerows(table)
    return folder


def ingest(raw: Path, folder: Path, count: int) -> dict[str, Any]:
    """Images per second and peak memory of ingesting `count` images, beside plain SimpleITK reading of the same."""
    source = many_images(raw, folder / "raw", count)
    command = [sys.executable, "-m", "cmrhpc.bench.child", "ingest", str(source), str(folder)]
    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {
        "images": count,
        "images_per_second": count / told["ingest_s"],
        "plain_images_per_second": count / told["plain_s"],
        "peak_mib": told["peak_mib"],
    }
