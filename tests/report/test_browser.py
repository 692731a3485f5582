"""The page in a real browser: drawn, within its width, quiet, in light and in dark."""

import functools
import html
import http.server
import json
import os
import re
import shutil
import subprocess
import threading

import pytest

from fastpref.report.page import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
WIDTHS = 360, 1280

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed")

# loads every page at every width and leaves what it measured as JSON in its own <pre>
HARNESS = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">
%s
<pre id="found"></pre>
<script>
function measured(frame) {
  const view = frame.contentWindow, page = view.document;
  for (const part of page.querySelectorAll("details")) part.open = true;
  const size = (node) => {
    const box = node.getBoundingClientRect();
    return [box.width, box.height];
  };
  const outside = (node) => {
    const box = node.getBoundingClientRect();
    return box.width > 0 && (box.left < -1 || box.right > view.innerWidth + 1);
  };
  return {
    page: frame.dataset.page,
    asked: frame.width,
    inner: view.innerWidth,
    scroll: page.documentElement.scrollWidth,
    dark: view.matchMedia("(prefers-color-scheme: dark)").matches,
    background: view.getComputedStyle(page.body).backgroundColor,
    figures: [...page.querySelectorAll("figure > svg")].map((node) => [
      ...size(node),
      node.querySelectorAll("path").length,
      view.getComputedStyle(node.querySelector("text")).fill,
      Math.min(...[...node.querySelectorAll("text")].map((text) => size(text)[1])),
    ]),
    outside: [...page.querySelectorAll("body *")]
      .filter((node) => !node.closest(".scroll table") && outside(node))
      .map((node) => node.outerHTML.slice(0, 80)),
  };
}
addEventListener("load", () => {
  const frames = [...document.querySelectorAll("iframe")];
  document.getElementById("found").textContent = JSON.stringify(frames.map(measured));
});
</script>"""


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and keeps what was asked for."""

    def log_message(self, *args):
        self.server.asked.append(self.path)


@pytest.fixture
def browse(tmp_path):
    """browse(pages, dark) -> (what was measured of each page and width, console lines)."""
    make = functools.partial(Handler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), make)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def measure(pages, dark):
        frames = [
            f'<iframe src="{page.name}" data-page="{page.stem}" width="{width}" height="800" '
            'style="border: 0"></iframe>'
            for page in pages
            for width in WIDTHS
        ]
        (tmp_path / "harness.html").write_text(HARNESS % "\n".join(frames))
        done = subprocess.run(
            [
                *(BROWSER, "--headless", "--disable-gpu", "--dump-dom"),
                *(["--no-sandbox"] if os.geteuid() == 0 else []),  # it refuses to start otherwise
                *("--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path / 'profile'}"),
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                f"http://127.0.0.1:{server.server_port}/harness.html",
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.S)
        assert found, f"{done.stdout[-500:]}\n{done.stderr[-2000:]}"
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        assert {*server.asked} == {f"/{page.name}" for page in pages} | {"/harness.html"}
        return json.loads(html.unescape(found[1])), console

    yield measure
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_page_fits_and_draws(browse, make_run, make_quickstart, hostile, tmp_path, dark):
    runs = [make_run(name) for name in ("a", "b", "a-name-with-much-to-say-" * 4)]
    text = [{"step": s, "loss": 9.0 / s, "eval_loss": 10.0 / s} for s in (1, 2, 3)]
    several = [*runs, make_run("sft", text), make_quickstart("told"), make_quickstart("control")]
    pages = [
        write_report(runs[:1], tmp_path / "one.html"),
        write_report(several, tmp_path / "several.html"),
        write_report(several[-1:], tmp_path / "quickstart.html"),
        write_report([hostile], tmp_path / "hostile.html"),
    ]
    found, console = browse(pages, dark)
    assert console == []
    assert [(f["page"], f["asked"]) for f in found] == [
        (page.stem, str(width)) for page in pages for width in WIDTHS
    ]
    for page in found:
        name = page["page"], page["asked"]
        assert page["dark"] == dark, name
        assert page["background"] == ("rgb(20, 22, 26)" if dark else "rgb(252, 252, 250)"), name
        assert page["scroll"] <= page["inner"] <= int(page["asked"]), name
        assert page["outside"] == [], name
        assert len(page["figures"]) >= 11, name
        for width, height, paths, fill, text_height in page["figures"]:
            assert 300 < width < 500 and 160 < height < 300 and paths >= 3, name
            assert fill == ("rgb(163, 168, 178)" if dark else "rgb(92, 97, 107)"), name
            assert text_height >= 9, name  # pixels: readable on a phone


@pytest.mark.slow
def test_the_browser_tells_of_faults(browse, tmp_path):
    """What the test above looks for is found where it is."""
    page = tmp_path / "faulty.html"
    page.write_text(
        '<!doctype html><link rel="icon" href="data:,">'
        '<meta http-equiv="Content-Security-Policy" content="img-src data:">'
        '<script>console.error("loud")</script><img src="/missing.png">'
        '<div style="width: 700px">wide</div><figure><svg width="0"><text></text></svg></figure>'
    )
    (narrow, wide), console = browse([page], False)
    assert any("loud" in line for line in console)
    assert any("missing.png" in line for line in console)  # refused by the policy, never asked for
    assert narrow["scroll"] > narrow["inner"] and wide["scroll"] <= wide["inner"]
    assert any("wide" in node for node in narrow["outside"]) and wide["outside"] == []
    assert narrow["figures"][0][0] == 0
