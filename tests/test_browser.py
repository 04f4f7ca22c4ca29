"""Real browser stories: a newcomer in JupyterLab, a reader of the site. Skipped, with the reason, without a Chromium."""
import functools
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llm_trainer import launch
from llm_trainer.runs import list_runs

ROOT = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser"),
              pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")]
playwright = pytest.importorskip("playwright.sync_api", reason="needs: pip install playwright")

PATIENCE = 300_000  # milliseconds: for two slow cores that have other things to do
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
READY = """async () => { const a = window.jupyterapp; await a.restored; const w = a.shell.currentWidget;
  await w.context.ready; await w.sessionContext.ready; const k = () => w.sessionContext.session?.kernel;
  while (k()?.status !== 'idle' || k()?.connectionStatus !== 'connected') await new Promise(r => setTimeout(r, 100)); }"""
COMMAND = "async name => { await window.jupyterapp.commands.execute(name) }"
START = "name => { window.jupyterapp.commands.execute(name) }"
RESTART = "async () => { await window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart() }"
POINTS = """() => { const p = [...document.querySelectorAll('.js-plotly-plot')].filter(p => p.offsetParent).at(-1);
  return p && p.data.length > 1 ? p.data[1].x.length : 0 }"""
GROWN = "n => (" + POINTS + ")() > n"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=PATIENCE)
        yield chromium
        chromium.close()


def look(browser, home, width=1280, height=850, **options):
    "A new page, what it will complain about, and what it will ask of others"
    page, errors, foreign = browser.new_page(viewport={"width": width, "height": height}, **options), [], []
    page.set_default_timeout(PATIENCE)
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: errors.append(str(e)))
    local = (home, home.replace("http", "ws"), "data:", "blob:", "about:")
    page.on("request", lambda r: None if r.url.startswith(local) else foreign.append(r.url))
    return page, errors, foreign


# JupyterLab ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab with a home, a temporary folder and a copy of the tutorials of its own"
    home = tmp_path_factory.mktemp("lab")
    for name in ("notebooks", "tmp"): (home / name).mkdir()
    for source in (ROOT / "nbs" / "tutorials").glob("*.ipynb"): shutil.copy(source, home / "notebooks")
    first = home / "notebooks" / "01_first_model.ipynb"  # a run that is still at it when a slow browser comes to press stop
    longer = first.read_text(encoding="utf-8").replace("epochs=1, max_steps=300", "epochs=99")
    assert longer != first.read_text(encoding="utf-8")
    first.write_text(longer, encoding="utf-8")
    env = {**os.environ, "HOME": str(home), "TMPDIR": str(home / "tmp"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
           **{f"JUPYTER_{k}_DIR": str(home / k) for k in ("CONFIG", "DATA", "RUNTIME")}, "IPYTHONDIR": str(home / "ipython")}
    options = ["--no-browser", "--ip=127.0.0.1", "--port=0", "--ServerApp.token=", "--ServerApp.password=", "--allow-root",
               "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None", f"--ServerApp.root_dir={home / 'notebooks'}"]
    with open(home / "lab.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=env, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + PATIENCE / 1000
        while not (said := list((home / "RUNTIME").glob("jpserver-*.json"))) and time.monotonic() < deadline and server.poll() is None:
            time.sleep(.2)
        if not said: pytest.fail((home / "lab.log").read_text()[-2000:])
        yield json.loads(said[0].read_text())["url"].rstrip("/").replace("localhost", "127.0.0.1"), home
    finally:
        for run in list_runs(home / "tmp" / "llm-trainer-lessons" / "runs"):
            if run.locked: launch.stop(run, now=True)
        server.send_signal(signal.SIGTERM)
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()


def open_notebook(page, url, name):
    page.goto(f"{url}/lab/tree/{name}?reset")
    page.wait_for_selector(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Cell")
    page.evaluate(READY)


def run_cells(page, *words):
    "Run, in order, the code cells that contain one of `words`"
    page.evaluate("""async words => { const w = window.jupyterapp.shell.currentWidget, cells = w.content.widgets;
      for (const word of words) { const i = cells.findIndex(c => c.model.type === 'code' && c.model.sharedModel.source.includes(word));
        w.content.activeCellIndex = i; await window.jupyterapp.commands.execute('notebook:run-cell') } }""", list(words))


def press_stop(page):
    "The second click must follow the first within five seconds, which a busy machine may miss"
    while True:
        page.locator("button.jupyter-button", has_text=re.compile("stop|sure")).first.click()
        try: return page.locator("button.jupyter-button", has_text="sure?").first.click(timeout=4000)
        except playwright.TimeoutError: pass


def test_a_newcomer_watches_a_model_learn(lab, browser):
    url, home = lab
    page, errors, foreign = look(browser, url, height=1200)
    open_notebook(page, url, "01_first_model.ipynb")
    page.evaluate(START, "notebook:run-all-cells")

    page.wait_for_selector(".js-plotly-plot")
    page.wait_for_function(GROWN, arg=2)
    seen = page.evaluate(POINTS)
    page.wait_for_function(GROWN, arg=seen)
    runs = home / "tmp" / "llm-trainer-lessons" / "runs"
    newest = list_runs(runs)[0]
    assert newest.status()["status"] == "running" and newest.state()["step"] > 0

    page.locator(".jupyter-widgets.widget-toggle-button", has_text="log").first.click()  # while the next cell waits for the run
    page.wait_for_function("() => document.querySelector('.js-plotly-plot').layout.yaxis.type === 'log'")
    if path := os.environ.get("SCREENSHOTS"): page.screenshot(path=f"{path}/lab.png")

    page.evaluate(RESTART)  # in the middle of it: the kernel dies, the worker does not
    page.evaluate(READY)
    page.evaluate(COMMAND, "notebook:clear-all-cell-outputs")
    run_cells(page, "import tempfile", "workspace.init", "watch(runs=")
    page.wait_for_function(GROWN, arg=seen)
    seen = page.evaluate(POINTS)
    page.wait_for_function(GROWN, arg=seen)
    assert newest.status()["status"] == "running" and page.locator(".jupyter-widgets", has_text=newest.id).count()

    handle = page.locator(".widget-slider .noUi-handle").first
    handle.focus()
    for _ in range(9): handle.press("ArrowRight")
    page.wait_for_function("() => document.querySelector('.js-plotly-plot').data[0].opacity === 0.25")

    page.locator("button.jupyter-button", has_text="save").first.click()
    page.wait_for_selector("text=The last checkpoint is of step")
    assert newest.state()["checkpoint_step"]

    press_stop(page)
    page.wait_for_selector("text=Go on with: llm-trainer resume")
    assert newest.status()["status"] == "stopped" and newest.state()["checkpoint_step"]

    page.locator("button.jupyter-button", has_text="generate").first.click()
    page.wait_for_selector("text=generated from the best checkpoint")
    page.wait_for_selector(f"text={newest.id}, best checkpoint")
    if path := os.environ.get("SCREENSHOTS"): page.screenshot(path=f"{path}/lab-stopped.png")
    page.evaluate(COMMAND, "docmanager:save")
    open_notebook(page, url, "01_first_model.ipynb")  # the page is loaded again, the kernel still holds the view
    page.wait_for_function("n => document.querySelector('.js-plotly-plot')?._fullData[1]?._length > n", arg=seen)
    assert not errors and not foreign, (errors[:5], foreign[:5])
    page.close()


def test_sliders_move_the_distribution(lab, browser):
    url, home = lab
    page, errors, foreign = look(browser, url, height=1200)
    open_notebook(page, url, "06_sampling.ipynb")
    run_cells(page, "import tempfile", "workspace.init", "sliders = dict")
    page.wait_for_selector("img.widget-image")
    before = page.locator("img.widget-image").get_attribute("src")
    handle = page.locator(".widget-slider .noUi-handle").first
    handle.focus()
    for _ in range(8): handle.press("ArrowLeft")
    page.wait_for_function("src => document.querySelector('img.widget-image').src !== src", arg=before)
    assert not errors and not foreign, (errors[:5], foreign[:5])
    page.close()


# The site ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The site, served by a plain file server under a sub-path"
    out = tmp_path_factory.mktemp("www") / "some" / "project"
    out.parent.mkdir()
    done = subprocess.run([sys.executable, ROOT / "dev" / "site.py", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=out.parent.parent))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/some/project", out
    server.shutdown()


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_every_page_reads_well(site, browser, width, scheme):
    url, out = site
    page, errors, foreign = look(browser, url, width, color_scheme=scheme)
    for path in sorted(out.rglob("*.html")):
        page.goto(f"{url}/{path.relative_to(out)}")
        name = path.relative_to(out)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is wider than the screen"
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)"), f"{name}: a picture is missing"
        assert page.evaluate("document.querySelector('main').innerText.length") > 40, f"{name} is empty"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(255, 255, 255)") == (scheme == "light")
    assert not errors and not foreign, (errors[:5], foreign[:5])
    page.close()


def test_a_reader_finds_generate_and_sees_code_in_colour(site, browser):
    url, _ = site
    page, errors, foreign = look(browser, url)
    page.goto(f"{url}/sampler.html")
    colours = page.evaluate("new Set([...document.querySelectorAll('pre code span')].map(s => getComputedStyle(s).color)).size")
    assert colours >= 4
    page.locator("input[type=search], .smalldocs-search input").first.fill("generate")
    hit = page.locator(".smalldocs-search a[href], [role=option] a[href], .search-results a[href]").first
    hit.wait_for()
    hit.click()
    page.wait_for_load_state()
    assert "generate" in page.inner_text("main").lower() and page.url.startswith(url)
    assert not errors and not foreign, (errors[:5], foreign[:5])
    page.close()
