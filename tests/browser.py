"""A page in a headless Chromium, where there is one."""

import html
import json
import re
import shutil
import subprocess

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
needed = pytest.mark.skipif(not BROWSER, reason=f"none of {', '.join(BROWSERS)} is installed")

# Collects what goes wrong: errors of scripts, what is written by console.error, what is not loaded.
WATCH = """<script>
const wrong = [];
addEventListener("error", (event) => wrong.push(event.message || `no ${event.target.src}`), true);
addEventListener("unhandledrejection", (event) => wrong.push(String(event.reason)));
console.error = (...values) => wrong.push(values.join(" "));
const told = (name, value) => {
  const paragraph = document.createElement("p");
  paragraph.id = name;
  paragraph.textContent = JSON.stringify(value);
  document.body.append(paragraph);
};
</script>"""
TELL = "<script>setTimeout(() => told('wrong', wrong), 20000);</script>"


def told_by(page, script, folder):
    """What a script, run at the end of a page, tells by `told("name", value)`: {name: value}.

    Fails where anything has gone wrong on the page within 20 seconds of its own time, which passes
    as fast as there is nothing to do. `folder` takes the page and the browser's own files.
    """
    file = folder / "page.html"
    watched = page.replace("<head>", f"<head>{WATCH}", 1)
    file.write_text(watched.replace("</body>", f"<script>{script}</script>{TELL}</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-sync"]
    command += ["--disable-component-update", "--disable-quic"]  # nothing is fetched
    command += ["--virtual-time-budget=30000", f"--user-data-dir={folder / 'profile'}"]
    found = subprocess.run(
        [*command, file.as_uri()], capture_output=True, text=True, check=True, timeout=300
    )
    values = {
        name: json.loads(html.unescape(value))
        for name, value in re.findall(r'<p id="(\w+)">(.*?)</p>', found.stdout)
    }
    assert values.pop("wrong") == []
    return values
