"""Puts configs/*.toml into the wheel as llm_trainer/profiles/, and the pages of `make docs`, where they were built, as
llm_trainer/site/; everything else is in pyproject.toml."""
from pathlib import Path
from shutil import copy, copytree

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithProfiles(build_py):
    """An installed package has no configs/ beside it; a checkout does, and gets no copy."""
    def run(self):
        super().run()
        if self.editable_mode: return
        profiles = Path(self.build_lib, "llm_trainer", "profiles")
        profiles.mkdir(parents=True, exist_ok=True)
        for file in Path("configs").glob("*.toml"): copy(file, profiles)
        if Path("_docs", "index.html").is_file(): copytree("_docs", profiles.with_name("site"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithProfiles})
