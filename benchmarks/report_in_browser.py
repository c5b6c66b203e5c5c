"""A report whose every text is an attack, opened in headless Chromium.

    python benchmarks/report_in_browser.py [--chromium=PATH] [--out=OUT.json]

No script may run and no request be made: every host name leads to a server of this program. Three
more pages show that it would be noticed: the same texts without escapes, without the policy, and
without both. Needs Chromium.
"""

import argparse
import html
import http.server
from pathlib import Path
import shutil
import subprocess
import tempfile
import threading
import time
from typing import Any

from campaigns import tell
import hostile_page

from moe.reports import page
from moe.reports.read import read

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Server(http.server.ThreadingHTTPServer):
    """Answers every request with nothing, and remembers it."""

    def __init__(self):
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(http.server.BaseHTTPRequestHandler):
    """Notes host and path."""

    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.headers.get('Host')}{self.path}")
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *given: Any) -> None:
        """Print nothing."""


def opened(chromium: str, path: Path, folder: Path) -> dict[str, Any]:
    """Whether a script ran in a page, and the requests that it made."""
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [
        *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--no-proxy-server", "--disable-features=HttpsUpgrades,HttpsFirstModeV2"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        f"--host-resolver-rules=MAP * 127.0.0.1:{server.server_address[1]}",
        *(f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000", "--dump-dom"),
        path.as_uri(),
    ]
    began = time.monotonic()
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    server.shutdown()
    asked = [one for one in server.asked if hostile_page.HOST in one]
    title = html.unescape(shown.stdout.partition("<title>")[2].partition("</title>")[0])
    return {
        "opened": "</html>" in shown.stdout and shown.returncode == 0,
        "script_ran": title == hostile_page.RAN,
        "requests": len(asked),
        "seconds": round(time.monotonic() - began, 1),
    }


def pages(folder: Path) -> dict[str, str]:
    """The report, and the same with its defences taken away."""
    sweep = read(str(hostile_page.sweep(folder / "sweep")))
    report = page.page([sweep])
    # No policy forbids a page to lead to another one: that is left to the escapes.
    inside = [text for text in hostile_page.PAYLOADS[:-1] if "refresh" not in text]
    raw = report.replace("</body>", "-->".join(inside) + "</body>")
    policy = f'<meta http-equiv="Content-Security-Policy" content="{page.POLICY}">'
    assert policy in report
    return {
        "the report": report,
        "without its policy": report.replace(policy, ""),
        "without escapes": raw,
        "without both": raw.replace(policy, ""),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chromium", default=next(filter(None, map(shutil.which, NAMES)), ""))
    parser.add_argument("--out", type=Path)
    given, found = parser.parse_args(), {}
    if not given.chromium:
        parser.error("no Chromium on PATH; name it with --chromium=PATH")
    version = subprocess.run([given.chromium, "--version"], capture_output=True, text=True).stdout
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, text in pages(folder).items():
            path = folder / "page.html"
            path.write_text(text, encoding="utf-8")
            found[name] = opened(given.chromium, path, folder)
    result = {
        "browser": version.split(" built")[0],
        "payloads": len(hostile_page.PAYLOADS),
        **found,
    }
    tell(result, given.out)
    safe = [found[name] for name in found if name != "without both"]
    assert all(one["opened"] and not one["script_ran"] and not one["requests"] for one in safe)
    assert found["without both"]["script_ran"] and found["without both"]["requests"]


if __name__ == "__main__":
    main()
