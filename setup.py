"""The parts of the build that pyproject.toml has no words for: the C reader and the recipes."""

import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Ships `configs/` as align/configs; an editable install finds it in the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree("configs", Path(self.build_lib) / "align/configs", dirs_exist_ok=True)


setup(
    cmdclass={"build_py": BuildWithConfigs},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},  # one wheel for this and later ones
    ext_modules=[
        Extension(
            "featcache._gather",
            ["featcache/_gather.c"],
            extra_compile_args=["-O3", "-pthread"],
            extra_link_args=["-pthread"],
            py_limited_api=True,
            optional=True,  # without a compiler featcache/gather.py reads in Python
        )
    ],
)
