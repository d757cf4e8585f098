"""Kill processes that publish: what is there is absent, old or new, and never a mixture."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from export_models import images, small_net
from kills import contents, fill, in_child, killed_at, try_every_step, verdict
from prove_common import Row

from sn_export import check_case, export_onnx

_REPORT = "net.json"
_SETS = ("m", "dm", "cm", "cdm")  # files: m(odel), d(ata), c(ase); the last one names the others


def rows(quick: bool) -> Iterator[Row]:
    """Yield a row for each kind of kill."""
    with tempfile.TemporaryDirectory() as folder:
        yield _kill_publishing(Path(folder), 149 if quick else 7)
    for exporter, count in (("torchscript", 8 if quick else 100), ("dynamo", 1 if quick else 25)):
        with tempfile.TemporaryDirectory() as folder:
            export = _Export(Path(folder), exporter)
            what = f"export_onnx by {exporter}, killed at a"
            yield export.row(f"{what} step of publishing", count, export.at_a_step)
            yield export.row(f"{what} random moment", count, export.at_a_moment)


def _kill_publishing(folder: Path, stride: int) -> Row:
    counts: Counter[str] = Counter()
    for earlier in ("", *_SETS):
        for wanted in _SETS:
            counts.update(try_every_step(folder, earlier, wanted, stride))
    bad = {key: counts.pop(key, 0) for key in ("TORN", "not put back", "left behind")}
    tried = sum(counts.values()) + bad["TORN"]
    note = ", ".join(f"{key} {counts[key]}" for key in ("old", "absent", "new"))
    failures = [f"{key}: {count}" for key, count in bad.items() if count]
    attack = "publishing 1 to 3 files, killed at " + ("each step" if stride == 1 else "some steps")
    return Row(attack, tried, tried - sum(bad.values()), note, failures)


class _Export:
    """Exports of one of two models in turn: weights in the file, in external data, with a case.

    The report is saved afterwards, and is a file of its own: old, new or absent, and whole.
    """

    def __init__(self, folder: Path, exporter: str) -> None:
        self.folder = folder
        self.exporter = exporter
        self.known: dict[tuple[int, bool, bool], dict[str, bytes]] = {}
        self.models = [small_net("hook").eval(), small_net("hook").eval()]
        self.random = random.Random(0)
        self.steps = 400
        self.time = 0.0
        for model in self.models:
            with torch.no_grad():
                model(images())

    def row(self, attack: str, count: int, kill: Callable[[Callable[[], None]], bool]) -> Row:
        """Export, kill the next export of other weights, look, and export that again."""
        counts: Counter[str] = Counter()
        failures: list[str] = []
        for number in range(count):
            earlier, wanted = self.random.choices((False, True), k=2)
            with_case = self.random.random() < 0.5
            old = self._read_whole(0, earlier, with_case)
            new = self._read_whole(1, wanted, with_case)
            fill(self.folder, old)

            def work(external: bool = wanted, case: bool = with_case) -> None:
                self.export(1, external, case)

            if not kill(work):
                counts["ended before"] += 1
            found = contents(self.folder)
            report = found.pop(_REPORT, None)
            said = verdict(found, old, new, "net.onnx")
            counts[said] += 1
            if said in ("old", "new") and with_case:
                assert check_case(self.folder / "net.onnx", self.folder / "net.npz").passed
            work()
            names = {path.name for path in self.folder.iterdir()}
            found = contents(self.folder)
            tidy = _is_whole(found.pop(_REPORT)) and found == new and names == {*new, _REPORT}
            if said == "TORN" or not tidy or not (report is None or _is_whole(report)):
                failures.append(f"kill {number}: {said}, afterwards {sorted(names)}")
        order = ("old", "absent", "new", "ended before")
        note = ", ".join(f"{key} {counts[key]}" for key in order if counts[key])
        return Row(attack, count, count - len(failures), note, failures)

    def export(self, which: int, external: bool, with_case: bool) -> None:
        """Export one of the models to the folder, and save the report."""
        report = export_onnx(
            self.models[which],
            images(),
            self.folder / "net.onnx",
            exporter=self.exporter,  # type: ignore[arg-type]
            external_data=external,
            save_case=self.folder / "net.npz" if with_case else None,
            keep_programs=False,
        )
        report.save(self.folder / _REPORT)

    def at_a_step(self, work: Callable[[], None]) -> bool:
        """Kill at a random line of publishing, or call to the system, the removal of drafts too."""
        step = self.random.randint(1, self.steps)
        was_killed = killed_at(step, work, since="publish")
        self.steps = self.steps if was_killed else step  # it has fewer
        return was_killed

    def at_a_moment(self, work: Callable[[], None]) -> bool:
        """Kill after a random time within what an export takes."""
        if not self.time:
            start = time.perf_counter()
            work()
            self.time = time.perf_counter() - start
        return in_child(work, self.random.uniform(0, self.time))

    def _read_whole(self, which: int, external: bool, with_case: bool) -> dict[str, bytes]:
        key = which, external, with_case
        if key not in self.known:
            fill(self.folder, {})
            self.export(*key)
            self.known[key] = contents(self.folder)
            del self.known[key][_REPORT]
        return self.known[key]


def _is_whole(report: bytes) -> bool:
    try:
        return bool(json.loads(report)["parity"]["passed"])
    except ValueError:
        return False
