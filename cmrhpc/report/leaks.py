"""All images that the accepted predictions test, and whether any training saw any of them or of their patients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cmrhpc.errors import BadInput
from cmrhpc.planning import Task

Data = Mapping[str, np.ndarray]  # datasets of one shard; arrays that are equal are one object
PARTS = {
    "train_id": "train",
    "validation_id": "validation",
    "made_from_id": "the training of a generator or refiner",
}


@dataclass(frozen=True)
class ImageTable:
    """Every tested image once, sorted by id: class, and row of `patients`."""

    ids: np.ndarray
    label: np.ndarray
    patient: np.ndarray
    patients: list[str]

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Row of each id, -1 where no accepted shard tests it."""
        place = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.where(self.ids[place] == ids, place, -1)


def image_table(data: Mapping[str, Data]) -> ImageTable:
    """All tested images, each once. Raises BadInput when two shards disagree about one."""
    distinct: dict[tuple[int, ...], tuple[str, Data]] = {}  # equal arrays are one object, so identity tells
    for name, one in data.items():
        distinct.setdefault(tuple(id(one[n]) for n in ("id", "patient", "label")), (name, one))
    parts = [one for _, one in distinct.values()]
    ids, patient, label = (np.concatenate([part[n] for part in parts]) for n in ("id", "patient", "label"))
    unique, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    contradiction = (patient != patient[first][inverse]) | (label != label[first][inverse])
    if contradiction.any():
        where = int(np.flatnonzero(contradiction)[0])
        owner = np.repeat(np.arange(len(parts)), [len(part["id"]) for part in parts])[where]
        raise BadInput(
            f"shards disagree about the patient or class of image {ids[where].decode('utf-8', 'replace')}",
            list(distinct.values())[owner][0],
            "predictions of two cohorts are mixed here: keep those of one",
        )
    names, rows = np.unique(patient[first], return_inverse=True)
    patients = [name.decode("utf-8", "replace") for name in names.tolist()]
    return ImageTable(unique, label[first], rows, patients)


def find_leaks(
    data: Mapping[str, Data], tasks: Mapping[str, Task], table: ImageTable, by_image: bool
) -> tuple[list[str], int]:
    """Test images or patients that training or validation saw, one line per fold and kind; and ids not checkable.

    data holds of every shard `id`, the tested ids of its fold, and those of PARTS that it has.
    by_image: the study splits images, so only shared images are counted; the report calls the whole study leaking.
    """
    found: dict[tuple[int, int, str], list[str]] = {}
    checked: dict[tuple[int, ...], list[str]] = {}
    unknown: set[bytes] = set()
    for name, one in data.items():
        task = tasks[name]
        key = tuple(id(one.get(n)) for n in ("id", *PARTS))
        if key not in checked:
            checked[key] = _leaks_of(one, table, unknown, by_image)
        for line in checked[key]:
            found.setdefault((task.repeat, task.fold, line), []).append(name)
    lines = [
        f"repeat {repeat} fold {fold}: {line} ({len(names)} shard{'s' * (len(names) > 1)})"
        for (repeat, fold, line), names in sorted(found.items())
    ]
    return lines, len(unknown)


def _leaks_of(data: Data, table: ImageTable, unknown: set[bytes], by_image: bool) -> list[str]:
    lines = []
    tested = np.unique(table.patient[table.rows(data["id"])])
    for name, part in PARTS.items():
        ids = np.unique(data.get(name, data["id"][:0]))
        if both := len(np.intersect1d(ids, data["id"])):
            lines.append(f"{both} test image{'s' * (both > 1)} in {part}")
        rows = table.rows(ids)
        unknown.update(ids[rows < 0].tolist())
        patients = np.intersect1d(table.patient[rows[rows >= 0]], tested)
        if len(patients) and not by_image:
            some = ", ".join(table.patients[p] for p in patients[:5]) + (", ..." if len(patients) > 5 else "")
            lines.append(f"{len(patients)} test patient{'s' * (len(patients) > 1)} in {part}: {some}")
    return lines
