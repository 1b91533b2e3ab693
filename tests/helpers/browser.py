"""Chromium without a window: pages as a reader sees them, and values from their DOM."""

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

CHROMIUM = shutil.which("chromium")
HINT = "install it with apt-get install chromium fonts-dejavu-core"
NO_NETWORK = "--host-resolver-rules=MAP * ~NOTFOUND"
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --hide-scrollbars --disable-dev-shm-usage --virtual-time-budget=10000 "
    "--window-size=1400,1800"
).split()


def evaluate(page: Path, expression: str, *options: str):
    """The value, as JSON, of a JavaScript expression after the page's own scripts have run."""
    probe = f"<script>document.title = btoa(unescape(encodeURIComponent(JSON.stringify({expression}))))</script>"
    copy = page.with_name("probe.html")
    copy.write_text(
        page.read_text(encoding="utf-8").replace("</body></html>", probe + "</body></html>"), encoding="utf-8"
    )
    title = re.search(r"<title>(.*?)</title>", _chromium(copy, "--dump-dom", *options).decode(), re.S)
    return json.loads(base64.b64decode(html.unescape(title[1])))


def screenshot(page: Path, file: Path, *options: str):
    """(height, width, 3) pixels, uint8."""
    from matplotlib.image import imread

    _chromium(page, f"--screenshot={file}", *options)
    return (imread(file)[..., :3] * 255).round().astype("uint8")


def _chromium(page: Path, *options: str) -> bytes:
    assert CHROMIUM
    profile = f"--user-data-dir={page.parent / 'chromium'}"
    command = [CHROMIUM, *OPTIONS, NO_NETWORK, profile, *options, page.resolve().as_uri()]
    result = subprocess.run(command, capture_output=True, timeout=600)
    assert result.returncode == 0, result.stderr.decode()[-2000:]
    return result.stdout
