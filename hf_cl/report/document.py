"""One HTML file that needs nothing else and may do nothing else: its style and its pictures are inside."""

import base64
import html
from pathlib import Path

from hf_cl.report.words import plain, safe

CSS = Path(__file__).with_name("page.css")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What the page may do, should anything of the data ever be taken for markup: show its own pictures, nothing else."""


def document(title: str, maker: str, header: str, main: str, footer: str) -> str:
    """Return a page of parts that are HTML already; the title and the maker are plain text."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="{safe(maker)}">
<title>{safe(title)}</title>
<style>
{CSS.read_text("utf-8")}</style>
</head>
<body>
<header>
{header}
</header>
<main>
{main}</main>
<footer>
{footer}
</footer>
</body>
</html>
"""


def picture(png: Path, title: str, alt: str, caption: str = "", level: str = "h3") -> str:
    """Return a picture with its bytes inside, and the text that tells the same to who cannot see it."""
    data = base64.b64encode(png.read_bytes()).decode("ascii")
    below = f"<figcaption>{html.escape(plain(caption))}</figcaption>" if caption else ""
    return (
        f"<figure><{level}>{safe(title)}</{level}>"
        f'<img alt="{html.escape(plain(alt))}" src="data:image/png;base64,{data}">{below}</figure>\n'
    )
