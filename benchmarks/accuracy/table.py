"""The result file: one CSV row for each finished (task, configuration, seed)."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from vpdeploy.files import write_atomically

RESULT_FILE = "results.csv"


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One final model and its one evaluation on the test split.

    Attributes:
        rate: Learning rate chosen on validation; for the linear probe the inverse penalty.
        chosen: Phase of the run that was kept: ``train``, or ``prune-1``, ...
        val_accuracy: In [0, 1], on the validation images.
        test_accuracy: In [0, 1], on the test images.
        prompt_parameters: Trained numbers besides the head, minus pruned ones: the paper's count.
        head_parameters: Of the classifier.
        backbone_parameters: Of the backbone without prompts and head.
        bytes: Size of the run's ``prompts.safetensors``.
        macs: Multiply-accumulates one more image costs.
        seconds: Training time of this row; what an interrupted run took before is not in it.
        data: First digits of the digest over the task's images.
    """

    task: str
    configuration: str
    seed: int
    rate: float
    chosen: str
    val_accuracy: float
    test_accuracy: float
    train_images: int
    val_images: int
    test_images: int
    prompt_parameters: int
    head_parameters: int
    backbone_parameters: int
    bytes: int
    macs: int
    seconds: float
    data: str

    @property
    def key(self) -> tuple[str, str, int]:
        return self.task, self.configuration, self.seed

    @property
    def tuned_percent(self) -> float:
        """The paper's figure: trained minus pruned parameters over backbone and head, in percent."""
        tuned = self.prompt_parameters + self.head_parameters
        return 100 * tuned / (self.backbone_parameters + self.head_parameters)


class ResultTable:
    """The rows of a result file; a row that is added is on disk when ``add`` returns.

    Args:
        path: The CSV file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows = read_rows(path)

    def __contains__(self, key: tuple[str, str, int]) -> bool:
        return any(row.key == key for row in self.rows)

    def add(self, row: ResultRow) -> None:
        if row.key in self:
            raise ValueError(f"{self._path}: has a row for {row.key}")
        self.rows.append(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, [field.name for field in fields(ResultRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(each) for each in self.rows)
        write_atomically(self._path, text.getvalue().encode())


def read_rows(path: Path) -> list[ResultRow]:
    """Read a result file; no file is no rows."""
    if not path.exists():
        return []
    kinds = {"int": int, "float": float, "str": str}
    with path.open(newline="") as file:
        return [
            ResultRow(**{field.name: kinds[str(field.type)](values[field.name]) for field in fields(ResultRow)})
            for values in csv.DictReader(file)
        ]
