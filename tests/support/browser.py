"""A headless Chromium: what a reader of a page sees, measured in the page."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")

# Windows are never narrower than 500 pixels, frames are. The page itself holds no script.
_WRAPPER = """<!DOCTYPE html><body style="margin:0">
<iframe id="page" style="border:0;width:{width}px;height:4000px" srcdoc="{page}"></iframe>
<pre id="found"></pre>
<script>
const frame = document.getElementById("page");
const rgb = text => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
const light = color => {{
  const [r, g, b] = color.slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}};
const contrast = (a, b) => {{
  const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
}};
frame.onload = () => {{
  const page = frame.contentDocument, view = frame.contentWindow;
  const below = element => {{
    for (let e = element; e; e = e.parentElement) {{
      const color = rgb(view.getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] > 0) return color;
    }}
    return [255, 255, 255];
  }};
  const poor = [];
  for (const e of page.body.querySelectorAll("*")) {{
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || !e.checkVisibility() || ["title", "desc"].includes(e.tagName)) continue;
    const style = view.getComputedStyle(e);
    const color = rgb(e.tagName === "text" ? style.fill : style.color);
    const ratio = contrast(color, below(e));
    if (ratio < 4.5) poor.push([e.textContent.slice(0, 40), ratio]);
  }}
  const small = [...page.querySelectorAll("text")]
    .filter(t => t.checkVisibility() && t.getBoundingClientRect().height < 9);
  document.getElementById("found").textContent = JSON.stringify({{
    width: page.documentElement.scrollWidth,
    height: page.body.scrollHeight,
    text: page.body.innerText,
    drawn: [...page.querySelectorAll("svg text, svg .label")].map(t => t.textContent),
    cut: [...page.querySelectorAll("svg text, svg bdi")].filter(t => {{
      const at = t.getBoundingClientRect();
      const room = t.closest("figure").getBoundingClientRect();
      return at.right > room.right + 1 || (t.tagName != "BDI" && at.left < room.left - 1);
    }}).map(t => t.textContent),
    bars: [...page.querySelectorAll("svg rect")].map(r => ({{
      kind: r.classList[0], width: r.getBoundingClientRect().width,
      fill: view.getComputedStyle(r).fill,
    }})),
    background: view.getComputedStyle(page.body).backgroundColor,
    title: page.title, poor: poor, small: small.length,
  }});
}};
</script>
"""


def look(page: str, folder: Path, width: int = 1000, dark: bool = False) -> dict[str, Any]:
    """Return what is visible of ``page`` in a frame of ``width`` pixels."""
    wrapper = folder / "wrapper.html"
    wrapper.write_text(_WRAPPER.format(width=width, page=html.escape(page)), encoding="utf-8")
    dom = _run(folder, "--dump-dom", *(["--force-dark-mode"] if dark else []), wrapper.as_uri())
    match = re.search(r'<pre id="found">(.+?)</pre>', dom, re.DOTALL)
    assert match, dom[-2000:]
    found: dict[str, Any] = json.loads(html.unescape(match[1]))
    return found


def screenshot(page: str, folder: Path) -> bytes:
    """Return a picture of ``page`` as PNG."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    _run(folder, f"--screenshot={folder / 'page.png'}", (folder / "page.html").as_uri())
    return (folder / "page.png").read_bytes()


def printed(page: str, folder: Path) -> bytes:
    """Return ``page`` printed as PDF."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    _run(folder, f"--print-to-pdf={folder / 'page.pdf'}", (folder / "page.html").as_uri())
    return (folder / "page.pdf").read_bytes()


def _run(folder: Path, *args: str) -> str:
    assert BROWSER is not None
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",  # it cannot be had as root, as in containers
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
        *args,
    ]
    done = subprocess.run(command, capture_output=True, check=True, timeout=120)
    return done.stdout.decode()
