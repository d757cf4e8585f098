"""Change a line of the package, and see whether a test notices.

The mutants are those of mutmut, and two kinds of our own: a statement dropped, a condition turned
round. mutmut itself would run the tests in a package of trampolines, which the processes that the
tests start do not import; so each mutant is written to its file, in a copy of the whole project.

The tests that run a line are known from one run of all of them under coverage. A mutant is given
to those of its line, the quickest case of each first, and those of its own wing, until one fails.
A run starts as a fork of a process that has imported torch and all the rest, but not the package.
"""

from __future__ import annotations

import ast
import compileall
import json
import os
import py_compile
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from prove_common import Row

_ROOT = Path(__file__).parents[1]
_COPIED = ("sn_export", "tests", "scripts", "pyproject.toml", "README.md", "CHANGELOG.md")
# What is mutated (no __init__.py: it only lists names), how many mutants, the tests of its wing.
_GROUPS: dict[str, tuple[Sequence[str], int, Sequence[str]]] = {
    "freezing": (("freezing/**/[a-z]*.py",), 40, ("tests/freezing",)),
    "publishing": (
        ("files/[a-z]*.py",),
        15,
        ("tests/test_files", "tests/exporting/test_publishing"),
    ),
    "comparison": (
        (
            *(
                f"proving/{name}.py"
                for name in ("output_errors", "tolerances", "verdicts", "parity")
            ),
        ),
        15,
        ("tests/proving",),
    ),
    "spelling and readers": (("checkpoints/[a-z]*.py",), 30, ("tests/checkpoints",)),
}
# What is run there is not measured.
_OTHER_PROCESSES = (
    "tests/distributed/",
    "tests/test_pytest_plugin.py",
    "tests/test_readme.py",
    "tests/test_workflow_recipe.py",
)
_SEED = 905
_AIM = 0.9  # of the mutants of a group
_NOTICED = ("killed", "hung", "crashed")
# Both sides have one length wherever the package says so: without it nothing is different.
_ONE_LENGTH = re.compile(r",\s*strict=\w+")
# Of tests for one mutant, as they took when nothing was changed, and how many.
_MOST_SECONDS, _MOST_TESTS = 60.0, 300


@dataclass(frozen=True)
class Mutant:
    """One change of one file, with the code before and after."""

    file: str
    line: int
    change: str
    whole: str
    code: Callable[[], str]


@dataclass
class Covering:
    """Which tests run a line, by their whole names, and how long each takes."""

    tests: dict[tuple[str, int], set[str]]
    seconds: dict[str, float]


def rows(quick: bool) -> Iterator[Row]:
    """Yield a row for each group of modules, from a process that has not imported the package."""
    program = [sys.executable, __file__, *(["--quick"] if quick else [])]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield Row(**json.loads(line))
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, program)


def _iter_rows(quick: bool) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        _copy_project(copy)
        covering = _measure(copy, Path(folder))
        for name, (patterns, count, wing) in _GROUPS.items():
            yield _make_row(copy, covering, name, patterns, 4 if quick else count, wing)


def _make_row(
    copy: Path,
    covering: Covering,
    name: str,
    patterns: Sequence[str],
    count: int,
    wing: Sequence[str],
) -> Row:
    chosen, total = _draw(copy, patterns, count)
    ends: Counter[str] = Counter()
    failures = []
    for number, mutant in enumerate(chosen):
        tests = _order_tests(covering, mutant, wing)
        if not number and (end := _run(copy, tests, 600)) != "survived":
            raise RuntimeError(f"{end} where nothing was changed: {tests}")
        end = _try(copy, mutant, tests, covering.seconds)
        ends[end] += 1
        if end not in _NOTICED:
            failures.append(f"{mutant.file}:{mutant.line} {end}: {mutant.change}")
    note = ", ".join(f"{key} {ends[key]}" for key in sorted(ends))
    return Row(
        f"{len(chosen)} of {total} mutants of {name}",
        len(chosen),
        len(chosen) - len(failures),
        note,
        failures,
        aim=_AIM,
    )


def _copy_project(copy: Path) -> None:
    copy.mkdir()
    without_caches = shutil.ignore_patterns("__pycache__")
    for name in _COPIED:
        if (_ROOT / name).is_dir():
            shutil.copytree(_ROOT / name, copy / name, ignore=without_caches)
        else:
            shutil.copy(_ROOT / name, copy)
    # Two mutants of a file may have one size and one second: the bytes are to decide.
    mode = py_compile.PycInvalidationMode.CHECKED_HASH
    compileall.compile_dir(copy, quiet=2, invalidation_mode=mode)


def _make_environment(copy: Path) -> dict[str, str]:
    path = [str(copy), str(copy / "scripts"), str(copy / "tests" / "support"), *_find_tools()]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }


def _find_tools() -> list[str]:
    """Return the folders of the path that are not the project's: of coverage and mutmut."""
    own = (str(_ROOT / "scripts"), str(_ROOT / "tests" / "support"), str(_ROOT), "")
    return [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p not in own]


def _measure(copy: Path, folder: Path) -> Covering:
    """Run all tests under coverage, or take what an earlier run of the same files found."""
    kept = os.environ.get("PROVE_COVERING")  # a folder that outlives this run
    names = sorted(
        str(file.relative_to(copy))
        for file in (copy / "tests").rglob("test_*.py")
        if not file.relative_to(copy).as_posix().startswith(_OTHER_PROCESSES)
    )
    measured = [_Measured(Path(kept or folder) / f"coverage{number}") for number in range(4)]
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(part.run, copy, names[n::4]) for n, part in enumerate(measured)]
        for run in runs:
            run.result()
    seconds: dict[str, float] = defaultdict(float)
    tests: dict[tuple[str, int], set[str]] = defaultdict(set)
    for part in measured:
        seconds.update(json.loads(part.seconds.read_text()))
        for place, found in part.read().items():
            tests[place] |= found
    return Covering(tests, seconds)


@dataclass(frozen=True)
class _Measured:
    """Coverage of some of the tests, in a folder."""

    folder: Path

    @property
    def seconds(self) -> Path:
        return self.folder / "seconds.json"

    def run(self, copy: Path, names: Sequence[str]) -> None:
        """Run tests by name, unless that is done."""
        if self.seconds.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = self.folder / "coveragerc"
        settings.write_text(f"[run]\ndata_file = {self.folder}/coverage\nsource_pkgs = sn_export\n")
        coverage = ["-m", "coverage", "run", f"--rcfile={settings}"]
        pytest = ["-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "-p", "prove_contexts"]
        ran = subprocess.run(
            [sys.executable, *coverage, *pytest, *names],
            cwd=copy,
            env=_make_environment(copy) | {"PROVE_SECONDS": str(self.seconds)},
            stdout=subprocess.PIPE,
        )
        if ran.returncode:
            self.seconds.unlink(missing_ok=True)
            raise RuntimeError(ran.stdout.decode()[-2000:])

    def read(self) -> dict[tuple[str, int], set[str]]:
        """Return the tests that run each line."""
        from coverage import CoverageData

        found = CoverageData(str(self.folder / "coverage"))
        found.read()
        tests = {}
        for file in found.measured_files():
            name = file.rpartition("/sn_export/")[2]
            for line, contexts in found.contexts_by_lineno(file).items():
                tests[name, line] = {context for context in contexts if context}
        return tests


def _draw(copy: Path, patterns: Iterable[str], count: int) -> tuple[list[Mutant], int]:
    """Return some mutants, at most one of each line, and how many there are in all."""
    found = [
        mutant
        for pattern in patterns
        for file in sorted((copy / "sn_export").glob(pattern))
        for mutant in _iter_mutants(file, file.relative_to(copy / "sn_export").as_posix())
    ]
    chance = random.Random(_SEED)
    drawn: dict[tuple[str, int], Mutant] = {}
    for mutant in chance.sample(found, len(found)):
        if _ONE_LENGTH.sub("", mutant.code()) != _ONE_LENGTH.sub("", mutant.whole):
            drawn.setdefault((mutant.file, mutant.line), mutant)
        if len(drawn) == count:
            break
    return list(drawn.values()), len(found)


def _iter_mutants(file: Path, name: str) -> Iterator[Mutant]:
    """Yield the mutants of a file, but for those that nobody can notice.

    The words of a message and of the log are left as they are, and so are names of types, which
    annotations alone read, and a False that would be None.
    """
    import libcst as cst
    from libcst.metadata import MetadataWrapper, PositionProvider
    from mutmut.mutation.file_mutation import MutationVisitor
    from mutmut.mutation.mutators import mutation_operators
    from mutmut.mutation.pragma_handling import IgnoredCode

    code = file.read_text()
    wrapper = MetadataWrapper(cst.parse_module(code))
    ours = [(cst.SimpleStatementLine, _drop), (cst.If, _turn_round)]
    nothing = IgnoredCode(set(), set(), set())
    visitor = MutationVisitor([*mutation_operators, *ours], nothing)
    module = wrapper.visit(visitor)
    places, silent = wrapper.resolve(PositionProvider), _find_silent(code)
    for mutation in visitor.mutations:
        old, new = mutation.original_node, mutation.mutated_node
        place = places.get(old)
        if place is None or (isinstance(old, cst.SimpleString) and " " in old.value):
            continue
        words = [" ".join(module.code_for_node(node).split()) for node in (old, new)]
        if place.start.line in silent or words[0].replace("False", "None") == words[1]:
            continue
        if isinstance(old, cst.If):
            words = [text.partition(":")[0] for text in words]
        change = " -> ".join(word[:90] for word in words)
        yield Mutant(name, place.start.line, change, code, partial(_replace, module, old, new))


def _find_silent(code: str) -> set[int]:
    """Return the lines of names of types, and of calls of the log."""
    tree = ast.parse(code)
    found: list[ast.stmt] = [
        node
        for node in tree.body
        if isinstance(node, ast.Assign)
        and (isinstance(node.value, ast.Subscript) or "TypeVar(" in ast.unparse(node.value))
    ]
    for node in ast.walk(tree):
        match node:
            case ast.Expr(ast.Call(ast.Attribute(ast.Name("_logger")))):
                found.append(node)
            case ast.Assign([ast.Name("_logger")]):
                found.append(node)
    return {line for one in found for line in range(one.lineno, (one.end_lineno or 0) + 1)}


def _replace(module: Any, old: Any, new: Any) -> str:
    return str(module.deep_replace(old, new).code)


def _drop(node: Any) -> Iterator[Any]:
    """Yield ``pass`` for a call whose result is not used, or a raise."""
    import libcst as cst

    (statement,) = node.body if len(node.body) == 1 else (None,)
    is_call = isinstance(statement, cst.Expr) and isinstance(statement.value, cst.Call)
    if is_call or isinstance(statement, (cst.Raise, cst.Del)):
        yield node.with_changes(body=[cst.Pass()])


def _turn_round(node: Any) -> Iterator[Any]:
    """Yield ``if not (x):`` for ``if x:``."""
    import libcst as cst

    inner = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    space = cst.SimpleWhitespace(" ")
    test = cst.UnaryOperation(cst.Not(whitespace_after=space), inner)
    yield node.with_changes(test=test, whitespace_before_test=space)


def _order_tests(covering: Covering, mutant: Mutant, wing: Sequence[str]) -> list[str]:
    """Return the tests for a mutant, as many as fit, in two orders in turn.

    The one has one case of each test first, of its wing; the other has the tests of its file first.
    What runs at import, maybe while some test runs, is given to the latter alone.
    """
    seconds = covering.seconds
    near = _rank_by_file(covering, mutant.file)
    begin = _find_statement(mutant)
    found = set(near)
    if begin:
        found &= covering.tests.get((mutant.file, begin), set())
    by_file = sorted(found, key=lambda test: (near[test], test))
    by_case = _order_by_case(found, covering, wing) if begin else by_file
    chosen: list[str] = []
    total = 0.0
    for test in dict.fromkeys(chain.from_iterable(zip(by_case, by_file, strict=True))):
        if total + seconds[test] <= _MOST_SECONDS and len(chosen) < _MOST_TESTS:
            chosen.append(test)
            total += seconds[test]
    return chosen


def _order_by_case(tests: Iterable[str], covering: Covering, wing: Sequence[str]) -> list[str]:
    seconds = covering.seconds
    cases: Counter[str] = Counter()
    ranks = {}
    for test in sorted(tests, key=lambda test: (seconds[test], test)):
        function = test.partition("[")[0]
        ranks[test] = (cases[function], not test.startswith(tuple(wing)), seconds[test])
        cases[function] += 1
    return sorted(ranks, key=ranks.__getitem__)


def _find_statement(mutant: Mutant) -> int:
    """Return the line where the statement of a mutant begins; 0 if it runs at import."""
    parents = ast.walk(ast.parse(mutant.whole))
    functions = [
        node for node in parents if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    lines = [
        node.lineno
        for function in functions
        for statement in function.body
        for node in ast.walk(statement)
        if isinstance(node, ast.stmt) and node.lineno <= mutant.line <= (node.end_lineno or 0)
    ]
    return max(lines, default=0)


def _rank_by_file(covering: Covering, file: str) -> dict[str, float]:
    """Return the tests that run lines of a file: lowest those that run what few do, and quickly."""
    ranks: dict[str, float] = defaultdict(float)
    for (where, _), tests in covering.tests.items():
        if where == file:
            for test in tests & covering.seconds.keys():
                ranks[test] -= 1 / len(tests) / (covering.seconds[test] + 0.01)
    return ranks


def _try(copy: Path, mutant: Mutant, tests: Sequence[str], seconds: dict[str, float]) -> str:
    """Run tests on a mutant; say what became of it."""
    file = copy / "sn_export" / mutant.file
    file.write_text(mutant.code())
    try:
        return _run(copy, tests, 60 + 6 * sum(seconds[test] for test in tests))
    finally:
        file.write_text(mutant.whole)


def _run(copy: Path, tests: Sequence[str], seconds: float) -> str:
    sys.stdout.flush()
    child = os.fork()
    if not child:
        os.setsid()
        _become_pytest(copy, tests)
    end, deadline = 0, time.monotonic() + seconds
    while not end and time.monotonic() < deadline:
        end, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.05)
    if not end:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "hung"
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return "crashed"
    return {0: "survived", 1: "killed", 2: "killed", 4: "killed"}.get(
        code, f"pytest ended by {code}"
    )


def _become_pytest(copy: Path, tests: Sequence[str]) -> None:
    code = 99
    try:
        silent = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(silent, number)
        os.chdir(copy)
        environment = _make_environment(copy)
        os.environ.update(environment)
        sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
        sys.dont_write_bytecode = True
        import pytest

        quietly = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # it is imported already
        options = ["-q", "-x", "-n0", "-p", "no:cacheprovider", *quietly]
        code = int(pytest.main([*options, *tests]))
    finally:
        os._exit(code)


def main() -> None:
    """Print the rows as JSON, one a line; for a process that has not imported the package."""
    import numpy
    import onnx
    import onnx_ir
    import onnxruntime
    import onnxscript
    import pytest
    import torch
    import torch._dynamo
    import torch.onnx
    import torch.onnx._internal.exporter._core

    _ = numpy, onnx, onnx_ir, onnxruntime, onnxscript, pytest, torch
    torch.set_num_threads(1)
    for row in _iter_rows("--quick" in sys.argv):
        print(json.dumps(row.__dict__), flush=True)


if __name__ == "__main__":
    main()
