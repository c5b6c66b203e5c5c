"""A sweep whose every text wants to be a part of the page that reports it; and what may be in one.

Each payload would set the page's title to RAN, or ask HOST for something.
"""

import html.parser
import json
from pathlib import Path

import synthetic_sweep

HOST, RAN = "canary.example", "a script ran"
SET = f"document.title='{RAN}'"
PAYLOADS = (
    f"<script>{SET}</script>",
    f'"><img src=x onerror="{SET}">',
    f"'><svg onload={SET}>",
    f"</title><script>{SET}</script>",
    f"</style><script>{SET}</script>",
    f"</svg></td></table><script>{SET}</script>",
    f"]]><script>{SET}</script><![CDATA[",
    f"--><script>{SET}</script><!--",
    f"&lt;script&gt;{SET}&lt;/script&gt;",
    f"<script src=http://{HOST}/script.js></script>",
    f"<img src=http://{HOST}/image.png>",
    f"<link rel=stylesheet href=http://{HOST}/style.css>",
    f"<iframe src=http://{HOST}/frame></iframe>",
    f'<iframe srcdoc="<script>parent.{SET}</script>"></iframe>',
    f"<object data=http://{HOST}/object></object>",
    f"<meta http-equiv=refresh content='0;url=http://{HOST}/refresh'>",
    f"<base href=http://{HOST}/>",
    f"<body onload={SET}>",
    f"<style>@import 'http://{HOST}/import.css'</style>",
    f"<video autoplay src=http://{HOST}/video></video>",
    f"<details open ontoggle={SET}>x</details>",
    f"<input autofocus onfocus={SET}>",
    f"url(http://{HOST}/url) expression({SET})",
    "\u202eevil\u2066 \x1b]0;owned\x07 \ud800 $\\frac{$ {0}",
)
MAY = {"default-src", "style-src", "img-src", "base-uri", "form-action"}


def sweep(folder: Path) -> Path:
    """A sweep with the payloads as names, settings, reasons and descriptions."""
    synthetic_sweep.write(folder, {"base": 0.0, "good": -0.06, "bad": 0.05}, diverged=("bad",))
    renamed(folder, dict(zip(("base", "good", "bad"), PAYLOADS, strict=False)))
    path = folder / "sweep.json"
    plan, rest = json.loads(path.read_text()), "".join(PAYLOADS[3:])
    plan |= {"question": rest, "name": rest, "match": rest}
    plan["tuning"]["ranges"] = {rest: plan["tuning"]["ranges"]["AdamW.learning_rate"]}
    for cell in plan["cells"]:
        cell |= {"router": rest, "decoding": rest, "causality": rest}
    path.write_text(json.dumps(plan))
    rows = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    for row in rows:
        row["reason"] = row["reason"] and rest
        row["tuned"] = {rest: row["tuned"]["AdamW.learning_rate"]}
    (folder / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def renamed(folder: Path, names: dict[str, str]) -> None:
    """Give cells other names, in every file."""
    for path in folder.glob("*.json*"):
        text = path.read_text()
        for name, new in names.items():
            inner = json.dumps(new)[1:-1]
            text = text.replace(f'"{name}"', f'"{inner}"').replace(f'"{name}/', f'"{inner}/')
        path.write_text(text)


class Parts(html.parser.HTMLParser):
    """What a browser would take for elements of a page.

    Attributes:
        faults: those that run or ask for something.
        policy: of the page's content, by directive.
    """

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.faults: list[str] = []
        self.policy: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        given = {name: value or "" for name, value in attrs}
        if tag == "meta" and "http-equiv" in given:
            if given["http-equiv"] != "Content-Security-Policy" or self.policy:
                self.faults.append(f"meta {given}")
            else:
                parts = (part.strip().split(" ", 1) for part in given["content"].split(";"))
                self.policy = {name: value for name, value in parts}
        refused = "script iframe object embed link base form input video audio frame template"
        if tag in refused.split():
            self.faults.append(tag)
        for name, value in given.items():
            inside = value.startswith(("#", "data:image/png;base64,"))
            asks = name in ("src", "href", "xlink:href", "srcset", "data", "poster", "action")
            if name.startswith("on") or name == "srcdoc" or (asks and not inside):
                self.faults.append(f"{tag} {name}={value[:80]}")
            if "url(" in value and "url(#" not in value:
                self.faults.append(f"{tag} {name}={value[:80]}")
