"""Compiles the kernels; what is static is in pyproject.toml."""

import importlib.util
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

jaxlib = Path(importlib.util.find_spec("jaxlib").origin).parent

setup(
    ext_modules=[
        Extension(
            "darts_jax_native._kernels",
            sorted(glob("darts_jax_native/*.cc")),
            depends=["darts_jax_native/common.h"],
            include_dirs=[str(jaxlib / "include")],
            extra_compile_args=["-std=c++17", "-O3", "-Wno-psabi"],
            language="c++",
        )
    ]
)
