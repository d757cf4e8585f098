"""Texts that a file may hold and that must not reach a reader as they are."""

from __future__ import annotations

HOSTILE = {
    "escape": "\x1b[2J\x1b]0;title\x07",
    "bell": "a\x07b",
    "carriage return": "good\rbad",
    "nul": "a\0b",
    "C1": "\x9b31m",
    "delete": "a\x7fb",
    "bidi": "\u202egnp.exe\u202c\u2066\u200f",
    "new line": "a\nsn-export: proved and written: o.onnx",
    "line separator": "a\u2028sn-export: proved",
    "next line": "a\x85sn-export: proved",
    "surrogate": "a\udc80\ud800",
    "byte of another encoding": "a\udcff",
    "zero width": "pay\u200bpal\ufeff",
    "tag": "\U000e0041",
}
