"""The wheel: what git tracks in the package is in it, and a program that runs from it finds its profiles and pages."""
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.xdist_group("wheel")


def tracked():
    "Files that git tracks, as they are in this folder"
    if not (ROOT / ".git").exists(): pytest.skip("this is no clone")
    said = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in said.split("\0") if (ROOT / name).is_file()]


def build(source):
    "The unzipped wheel of a folder"
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index",
               "--disable-pip-version-check", "-w", source / "dist", source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    wheel, = (source / "dist").glob("*.whl")
    unzipped = source / "unzipped"
    zipfile.ZipFile(wheel).extractall(unzipped)
    code = "import llm_trainer; print(llm_trainer.__file__)"
    assert Path(said(unzipped, source.parent, "-c", code).stdout.strip()).is_relative_to(unzipped)
    return unzipped


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    "A folder of what git tracks and no more, as in a fresh clone"
    folder = tmp_path_factory.mktemp("clone")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def unzipped(clone): return build(clone)


def said(unzipped, cwd, *argv):
    "What a Python that has a wheel says, far from the checkout"
    env = {**os.environ, "PYTHONPATH": str(unzipped), "PYTHONDONTWRITEBYTECODE": "1"}  # or Python adds files
    return subprocess.run([sys.executable, *argv], cwd=cwd, env=env, capture_output=True, text=True)


def program(unzipped, cwd, *argv): return said(unzipped, cwd, "-m", "llm_trainer", *argv)


def test_every_file_of_the_package_is_in_it(clone, unzipped):
    wanted = {name for name in tracked() if name.startswith("llm_trainer/")}
    assert {".py", ".js", ".html", ".tcss", ".typed"} <= {Path(name).suffix or name for name in wanted}
    wanted |= {f"llm_trainer/profiles/{file.name}" for file in (clone / "configs").glob("*.toml")}
    found = {str(file.relative_to(unzipped)) for file in (unzipped / "llm_trainer").rglob("*") if file.is_file()}
    assert found == wanted


def test_its_program_has_the_profiles_and_says_how_to_build_the_pages(unzipped, tmp_path):
    assert "--n_layer" in program(unzipped, tmp_path, "train", "--help").stdout
    assert program(unzipped, tmp_path, "init").returncode == 0
    assert "tiny" in program(unzipped, tmp_path, "train", "--config", "unheard-of").stderr
    done = program(unzipped, tmp_path, "docs", "--print-path")
    assert done.returncode == 3 and "make docs" in done.stderr


@pytest.mark.slow
def test_a_wheel_built_after_make_docs_carries_the_pages(clone, tmp_path):
    source = tmp_path / "built"
    shutil.copytree(clone, source, ignore=shutil.ignore_patterns("build", "dist", "unzipped", "*.egg-info"))
    (source / "_docs" / "tutorials").mkdir(parents=True)
    for name in ("index", "tutorials/05_resume"): (source / "_docs" / f"{name}.html").write_text("<h1>Here</h1>")
    unzipped = build(source)
    for page in ("index", "tutorials/05_resume"):
        done = program(unzipped, tmp_path, "docs", page, "--print-path")
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == (unzipped / "llm_trainer" / "site" / f"{page}.html").as_uri()
