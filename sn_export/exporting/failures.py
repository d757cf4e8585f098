"""Describe what torch's exporters fail with: which module, which line, what to try."""

from __future__ import annotations

import itertools
import linecache
import re
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from ..errors import ExportError
from ..results import Exporter, ParityError
from ..running import TorchScriptNode, name_type
from ..text import describe_error, strip_frames

_LONGEST = 1000  # characters of torch's own text
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LINE = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in ')  # torch.fx
_RANGE = re.compile(r"^(?P<file>.+)\((?P<line>\d+)\): ", re.MULTILINE)  # torch.jit
_DIMENSION = re.compile(
    r"(?:dimension )?(?:inputs|L)(?:\['(?:args|tensors)'\](?:\[0\])?)?"
    r"\[(?:'(?P<name>\w+)'|(?P<position>\d+))\]"
    r"\.(?:shape|size\(\))\[(?P<dim>\d+)\]"
)
_SCOPE = re.compile(r"::(?P<name>[^:/]*)(?:/|$)")
_OURS = str(Path(__file__).parent.parent)
_TORCH = str(Path(torch.__file__).parent)
_CHECKING = str(Path(torch.distributions.__file__).parent)  # checks its arguments, no more

_NO_OPERATOR = "write that operator with others that ONNX has"
_NO_COMPLEX = (
    "ONNX has no complex numbers, and dynamo alone of torch's exporters takes some: compute "
    "with real and imaginary parts (torch.view_as_real), an STFT as a convolution"
)
_DECIDES = r"data-dependent|GuardOnDataDependent|DataDependentOutput"
_ADVICE = (
    (
        r"[Cc]omplex(?:$|[^\w ]| types| numbers| tensor| dtype|\d+)|istft"
        r"|aten::(?:fft_|real|imag|view_as_)",
        _NO_COMPLEX,
    ),
    (
        _DECIDES,
        "the forward decides by the values of a tensor: write it with torch.where or torch.cond",
    ),
    (
        r"fake tensor in the exported program",
        "the forward reads a tensor by .data, which torch.export does not follow: use .detach()",
    ),
    (
        r"ConstraintViolation|marked .* dynamic|dynamic dim|specializ|dynamic_shapes|Constraints"
        r"|inferred ranges",
        "leave that dimension fixed, or declare it as torch.export.Dim.AUTO",
    ),
    (
        r"No ONNX function|UnsupportedOperator|not supported|No decompos|Couldn't export operator",
        _NO_OPERATOR,
    ),
    (
        r"has no attribute '(parametrizations|\w+_(orig|mask|[guv]))'",
        "the forward reads what a weight is computed from, and the frozen network has the weight "
        "alone: read the weight, or leave all but spectral norm with freeze='spectral_norm'",
    ),
)

# What dynamo of an older torch fails with, the first torch tested that does it, and what it is.
_SINCE = (
    (r"'tuple' object has no attribute 'dtype'", "2.9", "BatchNorm"),
    (r"'NoneType' object has no attribute 'name'", "2.9", "None among the outputs"),
    (r"n=copy_, n\.args", "2.9", "a forward that copies into a tensor that it makes"),
    (r"requires gradients, and received a mutation", "2.9", "a forward that writes a parameter"),
    (r"Node (arity|keys) mismatch", "2.13", "a forward that adds to its attributes or lists"),
)

Failure = tuple[Exporter, ExportError | ParityError]  # an exporter, and how it failed


@dataclass
class _Place:
    """Where in the user's code something failed, as far as it is known."""

    module: str | None = None
    kind: str = ""
    file: str | None = None
    line: int = 0


@dataclass(frozen=True)
class Explanation:
    """Why an exporter failed.

    Attributes:
        text: the error.
        place: where in the user's model: ``; in 'body.1' (Branching); at net.py:7: if y.sum():``.
        advice: what to try.
        is_at_line: whether the place names a line of the user's code.
    """

    text: str
    place: str
    advice: tuple[str, ...]
    is_at_line: bool

    def __str__(self) -> str:
        """Return error, place and advice on one line."""
        return f"{self.text}{self.place}{_describe_advice(self.advice)}"


class TorchExporterError(ExportError):
    """One of torch's exporters failed.

    Attributes:
        what: the exporter and the model, for a sentence.
        explanation: why it failed.
    """

    def __init__(self, what: str, explanation: Explanation) -> None:
        super().__init__(f"{what}: {explanation}")
        self.what, self.explanation = what, explanation


def _describe_advice(advice: Iterable[str]) -> str:
    """Return a sentence with the pieces of advice, each once, or nothing."""
    pieces = dict.fromkeys(advice)
    return f". What to try: {'; or '.join(pieces)}" if pieces else ""


def describe_failures(failures: Sequence[Failure]) -> str:
    """Return why no exporter makes a right file: the most telling error first, with all advice.

    An error at a line of the user's model tells more than one within torch or onnxruntime, and a
    file that was made and differs tells more than the latter::

        the torchscript exporter cannot export Net: ...; at net.py:8: .... What to try: ...
        with the dynamo exporter: onnxruntime cannot load 'net.onnx': ...
    """
    failures = sorted(failures, key=lambda failure: _is_vague(failure[1]))
    ordered = [error for _, error in failures]
    known = [error for error in ordered if isinstance(error, TorchExporterError)]
    advice = _describe_advice(one for error in known for one in error.explanation.advice)
    lines: dict[str, None] = {}
    places: set[str] = set()
    shared = Counter(map(str, ordered))
    for exporter, error in failures:
        text = str(error)
        if isinstance(error, TorchExporterError):
            found = error.explanation
            place = "" if found.place in places else found.place
            text = f"{error.what}: {found.text}{place}{advice if error is known[0] else ''}"
            places.add(found.place)
        elif not isinstance(error, ParityError) and shared[text] == 1:
            text = f"with the {exporter} exporter: {text}"
        lines[text] = None
    return "\n".join(lines)


def _is_vague(error: Exception) -> bool:
    if isinstance(error, TorchExporterError):
        return not error.explanation.is_at_line
    return not isinstance(error, ParityError)


def explain_failure(
    error: BaseException,
    model: nn.Module,
    method: MethodType | None,
    other: str | None,
    inputs: Sequence[str],
) -> Explanation:
    """Return what failed, where in the user's model, and what to try.

    Args:
        error: what the exporter raised.
        model: the model; its modules are named by their paths.
        method: the method of it that is exported in place of its forward.
        other: another value of ``exporter`` to try; None if there is none.
        inputs: the names of the tensors that it was given, in their order.
    """
    chain = list(_iter_causes(error))
    root = chain[-1]
    text = f"{type(root).__name__}: {_name_dimensions(_shorten(str(root)), inputs)}"
    place = _find_place(chain, model)
    advice = [
        text
        for pattern, text in _ADVICE
        if any(re.search(pattern, describe_error(e)) for e in chain)
    ][:1]
    if advice == [_NO_OPERATOR] and any(
        isinstance(m, ParametrizationList) for m in model.modules()
    ):
        advice.insert(0, "export with freeze='all', so that no parametrization is in the graph")
    advice += [
        f"use torch {since} or newer: dynamo of {torch.__version__} does not take {what}"
        for pattern, since, what in _SINCE
        if torch.__version__ < since and any(re.search(pattern, describe_error(e)) for e in chain)
    ]
    if other is not None and not (advice == [_NO_COMPLEX] and other == "torchscript"):
        advice.append(f"try exporter='{other}'")
    return Explanation(text, _describe_place(place, method), tuple(advice), place.file is not None)


def find_traced_decision(
    error: BaseException, model: nn.Module, method: MethodType | None
) -> str | None:
    """Return where the forward decides by the values of a tensor, if that is what failed.

    Args:
        error: what the exporter raised, or an error that has that as its cause.
        model: as for `explain_failure`.
        method: as for `explain_failure`.
    """
    chain = list(_iter_causes(error))
    if not any(re.search(_DECIDES, describe_error(e)) for e in chain):
        return None
    files = [
        frame.f_code.co_filename for e in chain for frame, _ in traceback.walk_tb(e.__traceback__)
    ]
    if any(file.startswith(_CHECKING) for file in files):
        return None
    return _describe_place(_find_place(chain, model), method).lstrip("; ")


def _iter_causes(error: BaseException) -> Iterator[BaseException]:
    now: BaseException | None = error
    while now is not None:
        yield now
        now = now.__cause__


def _shorten(text: str) -> str:
    """Return the first paragraph of torch's text, without its frames, colours and graph."""
    paragraphs = [p.strip() for p in _COLOUR.sub("", strip_frames(text)).strip().split("\n\n")]
    text = paragraphs[0].partition("[Caused by the value")[0].rstrip()  # torch's graph follows
    if text.endswith(":") and len(paragraphs) > 1:
        text += " " + paragraphs[1]
    text = text.rstrip(".")
    return text if len(text) < _LONGEST else text[:_LONGEST] + " ..."


def _name_dimensions(text: str, inputs: Sequence[str]) -> str:
    """Say ``dimension 0 of 'x'`` where torch says ``L['args'][0].size()[0]``."""

    def name_dimension(match: re.Match[str]) -> str:
        name, position = match["name"], match["position"]
        if name is None and int(position) < len(inputs):
            name = inputs[int(position)]
        return f"dimension {match['dim']} of '{name}'" if name in inputs else match[0]

    return _DIMENSION.sub(name_dimension, text)


def _describe_place(place: _Place, method: MethodType | None) -> str:
    words = ""
    called = "the forward" if method is None else repr(method.__name__)
    if place.module is not None:
        words += f"; in {repr(place.module) if place.module else called} ({place.kind})"
    if place.file is not None:
        source = linecache.getline(place.file, place.line).strip()
        words += f"; at {place.file}:{place.line}" + (f": {source}" if source else "")
    return words


def _find_place(chain: list[BaseException], model: nn.Module) -> _Place:
    """Return the innermost place in the model that the frames of the errors show."""
    paths = {id(module): path for path, module in reversed(list(model.named_modules()))}
    place = _Place()
    for error in chain:
        frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
        for frame, line in frames:
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and id(module) in paths:
                place = _Place(paths[id(module)], name_type(module))
            if place.module is not None and _is_of_user(frame.f_code.co_filename):
                place.file, place.line = frame.f_code.co_filename, line
        for frame, _ in reversed(frames):
            found = _find_place_of_node(frame.f_locals.get("node"), model)
            if found is not None:
                place = found
                break
    return place


def _find_place_of_node(node: Any, model: nn.Module) -> _Place | None:
    """Return the place of a node of torch.fx or of TorchScript."""
    if isinstance(node, torch.fx.Node):
        stack = list(node.meta.get("nn_module_stack", {}).values())
        # As "L['self'].body.1" or "body.1", by version.
        path = stack[-1][0].removeprefix("L['self']").lstrip(".") if stack else None
        lines = _LINE.finditer(node.meta.get("stack_trace") or "")
    elif isinstance(node, TorchScriptNode):
        # As "nets.Net::/torch.nn.Sequential::body/nets.Inner::body.1".
        names = [match["name"] for match in _SCOPE.finditer(node.scopeName())]
        path = names[-1] if names else None
        lines = _RANGE.finditer(str(node.sourceRange()))
    else:
        return None
    # torch.fx lists the outermost call first, TorchScript last.
    calls = [*lines][:: -1 if isinstance(node, torch.fx.Node) else 1]
    # Beyond the first call of this package are those that led to the exporter.
    below = itertools.takewhile(lambda call: not call["file"].startswith(_OURS), calls)
    users = [call for call in below if _is_of_user(call["file"])]
    place = _Place()
    module = dict(model.named_modules()).get(path) if path is not None else None
    if module is not None:
        place = _Place(path, name_type(module))
    if users:
        place.file, place.line = users[0]["file"], int(users[0]["line"])
    return place if place.module is not None or place.file is not None else None


def _is_of_user(file: str) -> bool:
    return not file.startswith((_OURS, _TORCH, "<"))
