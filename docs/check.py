"""Check a built site: python -m docs.check [FOLDER].

No page loads anything from another host, each formula is MathML, each picture has a description, each link inside of
the site has a target. Prints a line for each problem; exit code 1 where there is one.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src")}
LOADING_LINKS = {"stylesheet", "icon", "preconnect", "preload", "dns-prefetch", "manifest", "modulepreload"}


class Page(HTMLParser):
    """What one page loads, which anchors it has, and where its links lead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.problems: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Sort an element's addresses into loads and links."""
        values = {name: value or "" for name, value in attrs}
        self.loads += [value for name, value in values.items() if (tag, name) in LOADS]
        if tag == "link" and LOADING_LINKS & set(values.get("rel", "").split()):
            self.loads.append(values.get("href", ""))
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "img" and not values.get("alt") and "twemoji" not in values.get("class", ""):
            self.problems.append(f"picture {values.get('src')!r} has no description")
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}


def problems(site: Path) -> list[str]:
    """Each problem of the site in a line that begins with the page."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(site.rglob("*.html"))}
    pages = {path: Page(text) for path, text in texts.items()}
    items = []
    for path, page in pages.items():
        own = path.relative_to(site)
        items += [f"{own}: {problem}" for problem in page.problems]
        items += [f"{own}: loads {address} from another host" for address in page.loads if urlsplit(address).netloc]
        if 'class="arithmatex"' in texts[path]:
            items.append(f"{own}: a formula is not MathML")
        if own.name != "404.html":
            items += [f"{own}: {reason}" for reason in _broken(path, page, pages)]
    for path in sorted(site.rglob("*.css")):
        for address in re.findall(r"(?:url\(|@import )[\"']?(https?:[^\"')]+)", path.read_text(encoding="utf-8")):
            items.append(f"{path.relative_to(site)}: loads {address} from another host")
    return items


def _broken(path: Path, page: Page, pages: dict[Path, Page]) -> list[str]:
    reasons = []
    for link in page.links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
        target = target / "index.html" if target.is_dir() else target
        known = next((other for at, other in pages.items() if at.resolve() == target), None)
        if known is None and not target.exists():
            reasons.append(f"link {link!r} has no target")
        elif known is not None and parts.fragment and unquote(parts.fragment) not in known.anchors:
            reasons.append(f"link {link!r} has no anchor")
    return reasons


def main() -> int:
    """1 where the site has a problem, 2 where there is no site."""
    site = Path(sys.argv[1] if len(sys.argv) > 1 else "site")
    if not (site / "index.html").is_file():
        print(f"{site} holds no site: run mkdocs build", file=sys.stderr)
        return 2
    result = problems(site)
    print("\n".join(result) or f"{site}: no problem", file=sys.stderr)
    return 1 if result else 0


if __name__ == "__main__":
    sys.exit(main())
