"""Builds the extension flowmatch_kernels._C; everything else is in pyproject.toml.

FLOWMATCH_KERNELS_NO_EXT=1   install pure Python
FORCE_CUDA=1                 build CUDA in, or fail
TORCH_CUDA_ARCH_LIST         the GPU architectures; the default list ends in PTX, so that newer GPUs run too
MAX_JOBS                     how many compilers at once
"""

import os
import warnings

from setuptools import setup


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def extension() -> dict:
    """Arguments for setup() that build the extension, or none, with a warning that says why."""
    if flag("FLOWMATCH_KERNELS_NO_EXT"):
        return {}
    try:
        import pybind11
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        warnings.warn(f"flowmatch_kernels is installed without its C++ extension: {error}", stacklevel=1)
        return {}

    class OptionalBuild(BuildExtension):
        """A missing compiler leaves a pure Python package that says what is missing; other errors too."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if flag("FORCE_CUDA") or flag("FLOWMATCH_KERNELS_REQUIRE_EXT"):
                    raise
                warnings.warn(
                    f"flowmatch_kernels is installed without its C++ extension: {error}", stacklevel=1
                )

    module = CppExtension(
        "flowmatch_kernels._C",
        ["csrc/bindings.cpp", "csrc/fused_step_cpu.cpp"],
        include_dirs=[pybind11.get_include()],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],  # the stable ABI of torch 2.10
        extra_compile_args={
            # No FMA, ever; selects may be computed without a branch, so that loops vectorise.
            "cxx": ["-O3", "-ffp-contract=off", "-fno-trapping-math", "-fvisibility=hidden"]
        },
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": OptionalBuild}}


setup(**extension())
