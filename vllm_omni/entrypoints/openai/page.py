"""The page to look at: one static file that talks to the same server through the public interface."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import HTMLResponse

PATH = "/ui"
FILE = Path(__file__).parent.parent / "ui" / "page.html"
router = APIRouter(tags=["page"])
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
}


@router.get(PATH, response_class=HTMLResponse)
async def page() -> HTMLResponse:
    """The page."""
    return HTMLResponse(FILE.read_text(encoding="utf-8"), headers=_HEADERS)
