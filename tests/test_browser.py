"""Real browser stories: a newcomer in JupyterLab, a reader of the site. Skipped, with a reason, without Chromium."""
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
from conftest import end_runs, until
from test_report import bewitched

from llm_trainer.runs.report import report
from llm_trainer.runs.run import list_runs

ROOT = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None,
                                                      reason="no Chromium here: apt-get install chromium")]
in_lab, on_site = pytest.mark.xdist_group("browser"), pytest.mark.xdist_group("site")
playwright = pytest.importorskip("playwright.sync_api", reason="needs: pip install playwright")

RUNS = Path(f"tmp/llm-trainer-lessons-{os.getuid()}/runs")  # of the lessons, in a JupyterLab's home
PATIENCE = 240_000  # milliseconds a wait may take: for two slow cores that have other things to do
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
# every word to the page is answered within `most` milliseconds or fails
SAY = """([most, arg]) => Promise.race([(JS)(arg),
  new Promise((_, fail) => setTimeout(() => fail(new Error(`no answer within ${most} ms`)), most))])"""
KERNEL = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
CONNECTED = f"() => {KERNEL}?.connectionStatus === 'connected'"
IDLE = f"() => {KERNEL}?.connectionStatus === 'connected' && {KERNEL}?.status === 'idle'"
COMMAND = "async name => { await window.jupyterapp.commands.execute(name) }"
START = "name => { window.jupyterapp.commands.execute(name) }"
BUSY = f"code => {{ {KERNEL}.requestExecute({{ code }}) }}"
RESTART = f"async () => {{ await {KERNEL}.restart() }}"
SHOWN = "() => [...document.querySelectorAll('.llm-chart')].filter(chart => chart.offsetParent).at(-1)"
POINTS = f"() => ({SHOWN})()?.lines?.find(line => line.style === 'line')?.x.length ?? 0"
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


def say(page, js, arg=None):
    "What a function says in the page, with a bound on its promise"
    return page.evaluate(SAY.replace("JS", js), [PATIENCE, arg])


# JupyterLab ----------------------------------------------------------------------------------------------------------

OURS = r'/llm_trainer/(?!.*site-packages)|site-packages/(?:ipywidgets|anywidget|comm)/'


def faults(home):
    "How tracebacks in the kernels' log end that came through the view or its widgets; Jupyter's server has its own"
    log = (home / "lab.log").read_text(errors="replace")
    ends = re.findall(r"Traceback \(most recent call last\):\n((?:[ \t].*\n)*)(\S.*)", log)
    return [end for frames, end in ends if re.search(OURS, frames)]


@pytest.mark.parametrize("frame, ours", [
    ("/me/llm_trainer/.venv/lib/python3.12/site-packages/tornado/websocket.py", False),
    ("/me/llm_trainer/.venv/lib/python3.12/site-packages/ipykernel/kernelbase.py", False),
    ("/me/llm_trainer/.venv/lib/python3.12/site-packages/ipywidgets/widgets/widget.py", True),
    ("/me/llm_trainer/llm_trainer/notebook/view.py", True)])
def test_a_fault_is_one_of_the_view_or_its_widgets(tmp_path, frame, ours):
    (tmp_path / "lab.log").write_text("[IPKernelApp] ERROR | Exception in message handler:\n"
                                      "Traceback (most recent call last):\n"
                                      f"  File \"{frame}\", line 7, in told\n    act(told)\nValueError: no\n")
    assert faults(tmp_path) == ["ValueError: no"] * ours


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab with a home, a temporary folder and a copy of the tutorials of its own"
    home = tmp_path_factory.mktemp("lab")
    for name in ("notebooks", "tmp"): (home / name).mkdir()
    for source in (ROOT / "nbs" / "tutorials").glob("*.ipynb"): shutil.copy(source, home / "notebooks")
    # one run is still at it when a slow browser comes to press stop, one needs to be no better than it is
    for name, steps, others in (("01_first_model", "epochs=1, max_steps=300", "epochs=99"),
                                ("06_sampling", "max_steps=250", "max_steps=20")):
        text = (notebook := home / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
        assert steps in text
        notebook.write_text(text.replace(steps, others), encoding="utf-8")
    env = {**os.environ, "HOME": str(home), "TMPDIR": str(home / "tmp"), "OMP_NUM_THREADS": "1",
           "PYTHONPATH": str(ROOT), **{f"JUPYTER_{k}_DIR": str(home / k) for k in ("CONFIG", "DATA", "RUNTIME")},
           "IPYTHONDIR": str(home / "ipython")}
    options = ["--no-browser", "--ip=127.0.0.1", "--port=0", "--ServerApp.token=", "--ServerApp.password=",
               "--allow-root", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None",
               f"--ServerApp.root_dir={home / 'notebooks'}"]
    with open(home / "lab.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=env, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + PATIENCE / 1000
        while not (said := list((home / "RUNTIME").glob("jpserver-*.json"))):
            if time.monotonic() > deadline or server.poll() is not None: break
            time.sleep(.2)
        if not said: pytest.fail((home / "lab.log").read_text()[-2000:])
        yield json.loads(said[0].read_text())["url"].rstrip("/").replace("localhost", "127.0.0.1"), home
    finally:
        end_runs(home / RUNS)
        server.send_signal(signal.SIGTERM)
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()


def open_notebook(page, url, name):
    page.goto(f"{url}/lab/tree/{name}?reset")
    page.wait_for_selector(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Cell")
    page.wait_for_function(IDLE)


def load_again(page, url, name, seen, errors):
    """Load a notebook's page until the view that its kernel holds shows more than `seen` points. On a very slow machine
    JupyterLab may restore none of the kernel's widgets ("widget model not found"), and a person would load it anew"""
    for _ in range(4):
        open_notebook(page, url, name)
        try: return page.wait_for_function(GROWN, arg=seen, timeout=PATIENCE / 3)
        except playwright.TimeoutError:
            errors[:] = [said for said in errors if "widget model not found" not in said]
    pytest.fail(f"no view has more than {seen} points")


def run_cells(page, *words):
    "Run, in order, the code cells that contain one of `words`"
    say(page, """async words => { const w = window.jupyterapp.shell.currentWidget, cells = w.content.widgets;
      const says = (c, word) => c.model.type === 'code' && c.model.sharedModel.source.includes(word);
      for (const word of words) { const i = cells.findIndex(c => says(c, word));
        if (i < 0) throw new Error(`no cell says ${word}`);
        w.content.activeCellIndex = i; await window.jupyterapp.commands.execute('notebook:run-cell') } }""",
                  list(words))


def press_stop(page):
    "The second click must follow the first within five seconds, which a busy machine may miss"
    for _ in range(10):
        page.locator("button.jupyter-button", has_text=re.compile("stop|sure")).first.click()
        try: return page.locator("button.jupyter-button", has_text="sure?").first.click(timeout=4000)
        except playwright.TimeoutError: pass
    pytest.fail("the second click on stop never came in time")


def photograph(page, folder):
    "Pictures of the view, in JupyterLab's light and dark"
    for theme, name in ("JupyterLab Dark", "dark"), ("JupyterLab Light", "light"):
        say(page, "theme => window.jupyterapp.commands.execute('apputils:change-theme', { theme })", theme)
        page.wait_for_selector(f"body[data-jp-theme-name='{theme}']", state="attached")
        say(page, "() => new Promise(drawn => setTimeout(drawn, 1000))")
        page.locator(".jp-OutputArea-output:has(.llm-chart)").last.screenshot(path=f"{folder}/notebook-{name}.png")


@in_lab
def test_a_newcomer_watches_a_model_learn(lab, browser):
    url, home = lab
    page, errors, foreign = look(browser, url, height=1200)
    open_notebook(page, url, "01_first_model.ipynb")
    say(page, START, "notebook:run-all-cells")

    page.wait_for_selector(".llm-chart")
    page.wait_for_function(GROWN, arg=2)
    seen = page.evaluate(POINTS)
    page.wait_for_function(GROWN, arg=seen)
    newest = list_runs(home / RUNS)[0]
    assert newest.status().status == "running" and newest.state().step > 0

    page.locator(".jupyter-widgets.widget-toggle-button",
                 has_text="log").first.click()  # while the next cell waits for the run
    page.wait_for_function(f"() => ({SHOWN})().content.log")
    if path := os.environ.get("SCREENSHOTS"): page.screenshot(path=f"{path}/lab.png")

    say(page, RESTART)  # in the middle of it: the kernel dies, the worker does not
    page.wait_for_function(IDLE)
    say(page, COMMAND, "notebook:clear-all-cell-outputs")
    run_cells(page, "import tempfile", "workspace.init", "lt.watch()")
    page.wait_for_function(GROWN, arg=seen)
    seen = page.evaluate(POINTS)
    page.wait_for_function(GROWN, arg=seen)
    assert newest.status().status == "running" and page.locator(".jupyter-widgets", has_text=newest.id).count()

    handle = page.locator(".widget-slider .noUi-handle").first
    handle.focus()
    for _ in range(9): handle.press("ArrowRight")
    page.wait_for_function(f"() => ({SHOWN})()?.lines[0].style === 'raw'")

    page.locator("button.jupyter-button", has_text="save").first.click()
    page.wait_for_selector("text=The last checkpoint is of step")
    assert newest.state().checkpoint_step

    press_stop(page)
    page.wait_for_selector("text=Go on with: llm-trainer resume")
    assert newest.status().status == "stopped" and newest.state().checkpoint_step

    page.locator("button.jupyter-button", has_text="generate").first.click()
    page.wait_for_selector("text=generated from the best checkpoint")
    page.wait_for_selector(f"text={newest.id}, best checkpoint")
    if path := os.environ.get("SCREENSHOTS"): photograph(page, path)
    assert not faults(home)  # at what a page tells a kernel, and nobody sees
    assert not errors and not foreign, (errors[:5], foreign[:5])
    page.close()


@in_lab
@pytest.mark.slow
def test_a_page_loaded_again_shows_all_of_the_run_and_goes_on(lab, browser):
    url, home = lab
    end_runs(home / RUNS)
    page, errors, foreign = look(browser, url, height=1200)
    open_notebook(page, url, "01_first_model.ipynb")
    say(page, COMMAND, "notebook:clear-all-cell-outputs")  # or JupyterLab would not trust what it loads
    run_cells(page, "import tempfile", "workspace.init", "run = lt.start(config)", "lt.watch(run)")
    page.wait_for_function(GROWN, arg=2)
    seen = page.evaluate(POINTS)
    say(page, COMMAND, "docmanager:save")
    load_again(page, url, "01_first_model.ipynb", seen, errors)  # the kernel still holds the view
    seen = page.evaluate(POINTS)
    page.wait_for_function(GROWN, arg=seen)
    say(page, COMMAND, "docmanager:save")
    say(page, BUSY, "import time; time.sleep(15)")
    load_again(page, url, "01_first_model.ipynb", seen, errors)  # and while the kernel computes
    seen = page.evaluate(POINTS)
    page.wait_for_function(GROWN, arg=seen)
    press_stop(page)
    page.wait_for_selector("text=Go on with: llm-trainer resume")
    say(page, COMMAND, "docmanager:save")
    load_again(page, url, "01_first_model.ipynb", seen, errors)
    assert not faults(home)
    assert not errors and not foreign, (errors[:5], foreign[:5])
    page.close()


PAIR = ["""import os, tempfile
from pathlib import Path
import llm_trainer as lt
from llm_trainer import workspace
os.chdir(workspace.init(Path(tempfile.gettempdir())/f"llm-trainer-lessons-{os.getuid()}").root)""",
        """config = lt.load_config("tiny", device="cpu", threads=1, epochs=100_000, sample_every=0, eval_every=0)
lt.watch(lt.start(config, name="pair", devices=2))"""]


@in_lab
@pytest.mark.slow
def test_the_buttons_work_for_a_run_on_two_devices_and_on_a_page_loaded_again(lab, browser):
    url, home = lab
    end_runs(home / RUNS)
    (home / "notebooks/pair.ipynb").write_text(json.dumps(dict(
        nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=dict(name="python3", display_name="Python 3")),
        cells=[dict(cell_type="code", id=f"c{i}", metadata={}, execution_count=None, outputs=[], source=source)
               for i, source in enumerate(PAIR)])))
    page, errors, foreign = look(browser, url, height=1000)
    open_notebook(page, url, "pair.ipynb")
    say(page, START, "notebook:run-all-cells")
    page.wait_for_function(GROWN, arg=2)
    page.wait_for_selector("text=devices: 2 (cpu), ddp")
    run = list_runs(home / RUNS)[0]
    first = run.state().ranks
    assert run.id == "pair" and len(first) == 2

    page.locator("button.jupyter-button", has_text="save").first.click()
    page.wait_for_selector("text=The last checkpoint is of step")
    assert run.state().checkpoint_step

    press_stop(page)
    page.wait_for_selector("text=Go on with: llm-trainer resume pair")
    stopped = run.status()
    assert stopped.status == "stopped" and stopped.checkpoint_step == stopped.step and not run.locked

    page.wait_for_function(IDLE)
    seen = page.evaluate(POINTS)
    say(page, COMMAND, "docmanager:save")
    say(page, BUSY, "import time; time.sleep(10)")
    load_again(page, url, "pair.ipynb", seen - 1, errors)  # while the kernel, which still holds the view, computes

    page.locator("button.jupyter-button", has_text="resume").first.click()
    page.wait_for_selector(f"text=pair goes on from step {stopped.step:,}")
    until(lambda: len(run.state().ranks) == 2 and run.state().step > stopped.step)
    assert not {rank["pid"] for rank in first} & {rank["pid"] for rank in run.state().ranks}
    page.wait_for_function(IDLE)
    page.wait_for_selector("text=devices: 2 (cpu), ddp")
    page.wait_for_function(GROWN, arg=seen)

    press_stop(page)
    until(lambda: not run.locked)
    assert run.status().status == "stopped" and run.status().step > stopped.step
    assert not faults(home)
    assert not errors and not foreign, (errors[:5], foreign[:5])
    page.close()


@in_lab
@pytest.mark.slow
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


# The chart alone -----------------------------------------------------------------------------------------------------

MODEL = """async ([code, content]) => {
  const { default: chart } = await import(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
  const packed = c => ({ ...c, lines: c.lines.map(l => ({ ...l, x: new DataView(Float64Array.from(l.x).buffer),
    y: new DataView(Float64Array.from(l.y, v => v ?? NaN).buffer) })) });
  window.model = { content: packed(content), heard: [], get() { return this.content }, off() {},
    on(name, call) { this.heard.push(call) },
    set(c) { this.content = packed(c); this.heard.forEach(call => call()) } };
  chart.render({ model, el: document.body }) }"""
INK = """([x, y, w, h]) => { const c = document.querySelector('canvas');
  const d = c.getContext('2d').getImageData(x, y, w, h).data;
  return d.filter((v, i) => i % 4 === 3 && v > 200).length }"""


@on_site
@pytest.mark.parametrize("width, scheme", [(720, "light"), (360, "dark")])
def test_a_chart_tells_values_zooms_and_hides(browser, width, scheme):
    page, errors, foreign = look(browser, "http://127.0.0.1", width, 400, color_scheme=scheme)
    page.goto("about:blank")
    page.evaluate("() => { document.documentElement.style.colorScheme = 'light dark' }")
    xs = list(range(1, 101))
    content = dict(across="optimizer step", up="loss, nats per token", log=False, view="step loss", seams=[40], lines=[
        dict(name="training", colour="#3b7dd8", style="line", x=xs, y=[None if x == 9 else 7 - x / 20 for x in xs]),
        dict(name="validation", colour="#e07b39", style="dots", x=[50, 100], y=[4.7, 2.2]),
        dict(name="best", colour="#3b7dd8", style="star", x=[100], y=[2.2])])
    page.evaluate(MODEL, [(ROOT / "llm_trainer" / "notebook" / "chart.js").read_text(encoding="utf-8"), content])
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    canvas, tip = page.locator(".llm-chart canvas"), page.locator(".llm-chart .tip")
    assert "loss, nats per token" in canvas.get_attribute("aria-label")
    assert page.evaluate(INK, [62, 12, width - 80, 280]) > 100
    whole = canvas.bounding_box()
    middle = whole["x"] + 62 + (whole["width"] - 76) * 49 / 99, whole["y"] + 150
    page.mouse.move(*middle)
    assert tip.inner_text().split("\n") == ["optimizer step 50", "━ training 4.5", "━ validation 4.7"]
    page.mouse.down()
    page.mouse.move(middle[0] + 60, middle[1])
    page.mouse.up()
    page.mouse.move(whole["x"] + 63, middle[1])
    assert "optimizer step 50" in tip.inner_text()  # the left edge is now where the drag began
    page.evaluate("c => model.set(c)", content)
    assert page.locator("text=whole curve").is_visible(), "news must not end a zoom"
    page.locator("text=whole curve").click()
    page.mouse.move(whole["x"] + 63, middle[1])
    assert "optimizer step 1" in tip.inner_text() and not page.locator("text=whole curve").is_visible()
    canvas.focus()
    page.keyboard.press("ArrowRight")
    page.locator(".legend button", has_text="validation").click()
    canvas.hover(position=dict(x=100, y=150))
    assert "validation" not in tip.inner_text() and "training" in tip.inner_text()
    page.evaluate("c => model.set(c)", {**content, "lines": [], "log": True})  # a run without a line yet
    assert page.locator(".legend button").count() == 0
    if path := os.environ.get("SCREENSHOTS"):
        page.evaluate("c => model.set(c)", {**content, "log": True})
        canvas.hover(position=dict(x=200, y=150))
        page.screenshot(path=f"{path}/chart-{scheme}.png")
    assert not errors and not foreign, (errors[:5], foreign[:5])
    page.close()


# A report ------------------------------------------------------------------------------------------------------------

@on_site
@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_a_report_asks_for_nothing_and_runs_nothing(space, browser, width, scheme):
    file = space.root / "report.html"
    file.write_text(report(bewitched(space, "spelled", config=False), space), encoding="utf-8")
    page, errors, foreign = look(browser, file.as_uri(), width, color_scheme=scheme)
    page.goto(file.as_uri())
    assert "window.hit = 1" in page.inner_text("body") and page.locator("svg").count() == 4
    assert page.evaluate("document.scripts.length") == 0 and page.evaluate("window.hit") is None
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not errors and not foreign, (errors[:5], foreign[:5])
    page.close()


# The site ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def served(site):
    "The site behind a plain file server, under a sub-path"
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site.parent.parent))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/some/project", site
    server.shutdown()


CONTRAST = """() => {
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length > 3 ? m : [...m, 1]; };
  const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b; };
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3]));
  const ground = e => { const all = [];
    for (let n = e; n; n = n.parentElement) {
      const c = parse(getComputedStyle(n).backgroundColor);
      all.push(c);
      if (c[3] === 1) break;
    }
    return all.reverse().reduce((below, c) => over(c, below), [255, 255, 255]); };
  const faint = {}, walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, s = getComputedStyle(e);
    if (!walk.currentNode.textContent.trim() || !e.getClientRects().length) continue;
    if (e.closest('script,style,svg,.skip-link')) continue;
    const below = ground(e), a = light(over(parse(s.color), below)) + .05, b = light(below) + .05;
    const big = parseFloat(s.fontSize) >= 24 || (parseFloat(s.fontSize) >= 18.66 && +s.fontWeight >= 700);
    if (Math.max(a, b) / Math.min(a, b) < (big ? 3 : 4.5))
      faint[e.tagName + ' ' + s.color] = walk.currentNode.textContent.trim();
  }
  return faint; }"""

# the ground turns at once, and what is written on it with a class that comes later
TURNED = """white => (getComputedStyle(document.body).backgroundColor === 'rgb(255, 255, 255)') === white
  && document.documentElement.classList.contains('quarto-dark') !== white"""

AT_ONCE = "*, ::before, ::after { transition: none !important; animation: none !important }"  # colours, when turned

# of each kind: front page, chapter with maths, chapter with tables, chapter with pictures, tutorial, generated page
KINDS = ["index", "transformer", "filters", "benchmarks", "tutorials/02_reading_a_loss_curve", "commands",
         "configuration"]


@on_site
@pytest.mark.parametrize("kinds", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["each kind", "the others"])
def test_every_page_reads_well(served, browser, kinds):
    "On a wide screen and a narrow one, by day and by night"
    url, out = served
    page, errors, foreign = look(browser, url)
    names = {path.relative_to(out).with_suffix("").as_posix() for path in out.rglob("*.html")}
    assert names > set(KINDS)
    looks = [("light", 1280), *([("light", 390), ("dark", 1280)] if kinds else []), ("dark", 390)]
    for name in KINDS if kinds else sorted(names - set(KINDS)):
        for scheme, width in looks:  # loaded as the first, turned to the others
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": 850})
            if (scheme, width) == looks[0]:
                page.goto(f"{url}/{name}.html")
                page.add_style_tag(content=AT_ONCE)
            page.wait_for_function(TURNED, arg=scheme == "light")
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, f"{name} is wider than the screen"
            if kinds: assert page.evaluate(CONTRAST) == {}, f"{scheme}: {name}"
        looks.reverse()
        whole = page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert whole, f"{name}: a picture is missing"
        assert page.evaluate("document.querySelector('main').innerText.length") > 40, f"{name} is empty"
    assert not errors and not foreign, (errors[:5], foreign[:5])
    page.close()


@on_site
def test_a_folder_is_read_and_searched_without_a_mouse_and_with_nothing_that_serves_it(site, browser):
    page, errors, foreign = look(browser, site.as_uri())
    page.goto((site / "tutorials/02_reading_a_loss_curve.html").as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip-link"
    page.fill("#quarto-search input", "temperature")
    page.wait_for_selector(".smalldocs-search-results a")
    assert not errors and not foreign, (errors[:5], foreign[:5])
    page.close()


@on_site
def test_a_reader_finds_generate_and_sees_code_in_colour(served, browser):
    url, _ = served
    page, errors, foreign = look(browser, url)
    page.goto(f"{url}/sampler.html")
    colours = page.evaluate("new Set([...document.querySelectorAll('pre code span')].map(s => "
                            "getComputedStyle(s).color)).size")
    assert colours >= 4
    page.locator("input[type=search], .smalldocs-search input").first.fill("generate")
    hit = page.locator(".smalldocs-search a[href], [role=option] a[href], .search-results a[href]").first
    hit.wait_for()
    hit.click()
    page.wait_for_load_state()
    assert "generate" in page.inner_text("main").lower() and page.url.startswith(url)
    assert not errors and not foreign, (errors[:5], foreign[:5])
    page.close()
