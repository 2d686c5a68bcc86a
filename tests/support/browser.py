"""A page in headless Chromium, where it is installed: what it measures in itself, and a picture of it.

The page stands in a frame of the asked width, because Chromium's own window has a least width. The script that measures
is the test's; pages have none.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from html import escape, unescape
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
_MEASURE = """
const light = c => { const p = c.map(v => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4 });
  return .2126 * p[0] + .7152 * p[1] + .0722 * p[2] };
const parts = text => (text.match(/[\\d.]+/g) || []).map(Number);
function behind(node) {
  for (; node && node.nodeType === 1; node = node.parentElement) {
    const found = parts(getComputedStyle(node).backgroundColor);
    if (found.length === 3 || found[3] > 0) return found.slice(0, 3);
  }
  return dark ? [18, 18, 18] : [255, 255, 255];
}
const dark = matchMedia('(prefers-color-scheme: dark)').matches;
function measured(errors) {
  const texts = [], least = [];
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
    const box = node.getBoundingClientRect();
    const style = getComputedStyle(node), svg = node.closest('svg');
    if (!own || node.closest('title, script, style') || !box.width || style.display === 'none') continue;
    const [a, b] = [light(parts(svg ? style.fill : style.color)), light(behind(svg || node))];
    texts.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), node.textContent.trim().slice(0, 40)]);
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    least.push([parseFloat(style.fontSize) * scale, node.textContent.trim().slice(0, 40)]);
  }
  const first = list => list.sort((a, b) => a[0] - b[0])[0];
  const svgs = [...document.querySelectorAll('svg[role=img]')];
  const cut = svgs.flatMap(svg => [...svg.querySelectorAll('text')].filter(t => {
    const box = t.getBoundingClientRect(), all = svg.getBoundingClientRect();
    return box.width && (box.left < all.left - 1 || box.right > all.right + 1 || box.bottom > all.bottom + 1);
  }).map(t => t.textContent));
  return { dark, errors, cut, width: innerWidth, scrolls: document.documentElement.scrollWidth, contrast: first(texts),
    smallest: first(least), figures: document.querySelectorAll('figure').length, named: svgs.map(s => s.ariaLabel),
    requests: performance.getEntriesByType('resource').map(entry => entry.name) };
}
const errors = [];
addEventListener('error', event => errors.push(event.message || String(event.target.src || event.target.href)), true);
addEventListener('securitypolicyviolation', event => errors.push(event.blockedURI));
addEventListener('load', () => parent.document.getElementById('found').textContent = JSON.stringify(measured(errors)));
"""


def measure(page: str, width: int, *, dark: bool = False) -> dict[str, Any]:
    """What the browser finds in a page that is `width` pixels wide."""
    script = f"<head><script>{_MEASURE}</script>"
    dom = _chromium(page.replace("<head>", script, 1), width, 4000, dark, "--dump-dom", "--virtual-time-budget=3000")
    match = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert match and match[1], "the page did not load"
    measured: dict[str, Any] = json.loads(unescape(match[1]))
    return measured


def picture(page: str, width: int, height: int, to: Path, *, dark: bool = False) -> None:
    """Write a picture of a page, for the eye."""
    _chromium(page, width, height, dark, f"--screenshot={to}", f"--window-size={max(width, 500)},{height}")


def _chromium(page: str, width: int, height: int, dark: bool, *arguments: str) -> str:
    assert CHROMIUM is not None
    frame = f'<iframe width={width} height={height} style="border:0;display:block" srcdoc="{escape(page)}"></iframe>'
    scheme = "dark" if dark else "light"
    outer = f'<!doctype html><html style="color-scheme:{scheme}"><meta charset="utf-8"><body style="margin:0">'
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(f'{outer}{frame}<pre id="found"></pre></body></html>', encoding="utf-8")
        flags = [
            *_FLAGS,
            f"--user-data-dir={folder}/profile",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        ]
        command = [CHROMIUM, *flags, *arguments, file.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout
