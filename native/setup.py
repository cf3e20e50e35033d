"""Compiles the kernels; what is static is in pyproject.toml."""

import importlib.util
from pathlib import Path

from setuptools import Extension, setup

jaxlib = Path(importlib.util.find_spec("jaxlib").origin).parent

setup(
    ext_modules=[
        Extension(
            "darts_jax_native._kernels",
            [f"darts_jax_native/{name}.cc" for name in ("depthwise", "pointwise", "reductions")],
            depends=["darts_jax_native/common.h"],
            include_dirs=[str(jaxlib / "include")],
            extra_compile_args=["-std=c++17", "-O3", "-Wno-psabi"],
            language="c++",
        )
    ]
)
