"""Executes the PTX of the compiled GPU kernels on the CPU, through their real launch paths.

`parser` reads PTX, `instructions` gives each instruction its meaning in numpy, `arithmetic` rounds, `memory` knows
which bytes there are, and `executor` runs all threads of a grid. `triton_driver` stands where Triton's CUDA driver
would; `cuda_runtime` builds the extension's CUDA half against `cudart.c`, a double of the CUDA runtime library.
"""
