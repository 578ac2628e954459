"""The built site: links, the API's completeness, what a newcomer finds, and how it looks."""

import contextlib
import http.server
import importlib
import inspect
import json
import os
import pkgutil
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest

import asgd_jax
import asgd_jax.flax

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", name="site")
def _site(tmp_path_factory):
    """The site as `make docs` builds it, but for the tutorials, which test_tutorials.py runs."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "ASGD_JAX_DOCS_RUN": "0", "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


class Page(HTMLParser):
    """Addresses and anchors of a page, and the text and links of its article."""

    def __init__(self, file):
        super().__init__()
        self.addresses, self.anchors, self.links, self.text, self.depth = [], set(), [], "", 0
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors.update(attrs[name] for name in ("id", "name") if attrs.get(name))
        address = attrs.get("href") or attrs.get("src")
        if address is not None:
            self.addresses.append(address)
        if tag == "article":
            self.depth += 1
        if self.depth and tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])

    def handle_endtag(self, tag):
        self.depth -= tag == "article"

    def handle_data(self, data):
        if self.depth:
            self.text += data


@pytest.fixture(scope="module", name="pages")
def _pages(site):
    return {file.relative_to(site).as_posix(): Page(file) for file in site.rglob("*.html")}


def is_internal(address):
    return not re.match(r"[a-z]+:|//", address)


def test_every_link_leads_somewhere(site, pages):
    broken = []
    assert sum(len(page.addresses) for page in pages.values()) > 1000
    for name, page in pages.items():
        if name == "404.html":  # its addresses begin at the root of wherever the site is
            continue
        for address in filter(is_internal, page.addresses):
            path, anchor = urldefrag(urljoin(name, address))
            path = unquote(path)
            path = path + "index.html" if path.endswith("/") or not path else path
            if not (site / path).is_file() or (
                anchor and path in pages and unquote(anchor) not in pages[path].anchors
            ):
                broken.append((name, address))
    assert broken == []


def test_nothing_is_fetched_from_elsewhere(pages):
    """No font, script or picture of another host: the site works without a network."""
    loaded = re.compile(r'<(?:script|img|link|iframe)[^>]+(?:src|href)="(?:https?:)?//')
    for name in pages:
        assert not loaded.search(name)


def public_packages():
    """The package and every module of it that says what is public."""
    yield asgd_jax
    yield from (asgd_jax.predict, asgd_jax.flax)
    for found in pkgutil.walk_packages(asgd_jax.__path__, "asgd_jax."):
        if found.ispkg:
            module = importlib.import_module(found.name)
            if hasattr(module, "__all__"):
                yield module


def public_names(module):
    """What `__all__` says, or what a module without it defines."""
    if hasattr(module, "__all__"):
        return module.__all__
    own = [name for name in vars(module) if not name.startswith("_")]
    return [
        name for name in own if getattr(getattr(module, name), "__module__", "") == module.__name__
    ]


def test_every_public_name_is_in_the_reference(pages):
    documented = set().union(*(page.anchors for name, page in pages.items() if "api/" in name))
    missing = []
    for module in public_packages():
        for name in public_names(module):
            value = getattr(module, name)
            if inspect.ismodule(value):
                page = f"api/{value.__name__.removeprefix('asgd_jax.')}.html"
                found = page in pages
            else:
                path = (
                    f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', name)}"
                )
                found = path in documented or documented_as_data(documented, module, name)
            if not found:
                missing.append(f"{module.__name__}.{name}")
    assert missing == []


def documented_as_data(documented, module, name):
    """A constant has no path of its own: it is where some module of the package defines it."""
    pattern = re.compile(rf"{re.escape(module.__name__)}(\.\w+)*\.{name}")
    return any(pattern.fullmatch(anchor) for anchor in documented)


# What a newcomer asks, and words of the place that answers.
QUESTIONS = {
    "my optimizer's threshold": (
        "howto/stable_rate.html",
        "stability.optimizer_max_learning_rate(",
    ),
    "the five lines in NNX": ("howto/own_loop.html", "stale_model(optimizer, model)"),
    "memory of the ring": ("design.html", "4 P (tau + 1) bytes"),
    "how to resume": ("howto/resume.html", "The same command again resumes"),
    "what is a proxy": ("figures.html", "A proxy is a smaller model or data set"),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_newcomer_finds_it_in_two_clicks(pages, question):
    page, words = QUESTIONS[question]
    reached, front = {"index.html": 0}, ["index.html"]
    for clicks in (1, 2):
        front = [
            urldefrag(urljoin(name, link))[0]
            for name in front
            for link in pages[name].links
            if is_internal(link)
        ]
        front = [name for name in front if name in pages and name not in reached]
        reached.update(dict.fromkeys(front, clicks))
    assert reached[page] <= 2
    assert words in re.sub(r"\s+", " ", pages[page].text)


def test_formulas_are_drawn_without_a_script(pages, site):
    text = (site / "index.html").read_text()
    assert text.count("<math") >= 2
    assert "\\frac" not in re.sub(r"<[^>]+>", "", text)


def test_doctests_stand_in_code(site):
    for file in (site / "api").glob("*.html"):
        text = file.read_text()
        assert "&gt;&gt;&gt;" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL), file.name
    assert text.count("<pre>") >= 1


class Server(http.server.ThreadingHTTPServer):
    """Serves the site, and takes what a page of it has to say."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.address, self.said = f"http://127.0.0.1:{self.server_port}", queue.Queue()


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_POST(self):
        self.server.said.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module", name="server")
def _server(site):
    with Server(site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@contextlib.contextmanager
def browser(folder, *arguments):
    """Chromium within a `with`; not by --dump-dom, whose virtual time sometimes stands still."""
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    program = next((path for path in found if path), None)
    if program is None:
        pytest.skip("no headless Chromium here: apt-get install chromium")
    command = [
        program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--disable-background-networking", "--disable-component-update", "--no-first-run",
        "--hide-scrollbars", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}",
        *arguments,
    ]  # fmt: skip
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
        ) as process,
    ):
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its renderers too


# Loads one page after another at a telephone's width, and says how wide each came out.
FRAME = """<body style="margin:0"><script>
const pages = {pages}, widths = {{}};
const next = () => {{
  const page = pages.shift();
  if (!page) return fetch("/widths", {{method: "POST", body: JSON.stringify(widths)}});
  const frame = document.createElement("iframe");
  frame.width = 390; frame.height = 844; frame.style.border = 0;
  frame.onload = () => {{
    widths[page] = frame.contentDocument.documentElement.scrollWidth;
    frame.remove();
    next();
  }};
  frame.src = page;
  document.body.append(frame);
}};
next();
</script></body>"""


def test_every_page_is_readable_on_a_telephone_and_logs_no_error(site, pages, server, tmp_path):
    names = sorted(name for name in pages if name != "404.html")
    (site / "frame.html").write_text(FRAME.format(pages=names))
    # With a port for a debugger it stays until it is killed.
    address = f"{server.address}/frame.html"
    with browser(tmp_path, "--remote-debugging-port=0", address):
        widths = server.said.get(timeout=120)
    (site / "frame.html").unlink()
    assert widths == dict.fromkeys(names, 390)
    log = (tmp_path / "log").read_text()
    assert [line for line in log.splitlines() if "CONSOLE" in line] == []


def test_the_front_page_has_a_picture(server, tmp_path):
    """A screenshot that is not blank: of more than a few colours."""
    picture = tmp_path / "front.png"
    arguments = f"--screenshot={picture}", "--window-size=1200,900", "--timeout=30000"
    with browser(tmp_path, *arguments, f"{server.address}/index.html") as process:
        assert process.wait(timeout=120) == 0
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3].reshape(-1, 3)
    assert len({tuple(pixel) for pixel in (pixels[::97] * 255).astype(int)}) > 20
