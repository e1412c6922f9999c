"""A drop-in, accelerated sampler for flow matching, equal to the eager PyTorch loop to the last bit."""

from .base import BaseDiffusion, StepFn
from .constraints import inpaint
from .diffusion import DDIM, DDPM
from .flow_matching import FlowMatching, Sample
from .noise import KeyedNoise
from .ops.dispatch import available_backends, use_backend
from .ops.native import empty_cache
from .solver_comparison import SolverComparison
from .solvers import FittedSolver
from .step_functions import StepFunction

__all__ = [
    "DDIM",
    "DDPM",
    "BaseDiffusion",
    "FittedSolver",
    "FlowMatching",
    "KeyedNoise",
    "Sample",
    "SolverComparison",
    "StepFn",
    "StepFunction",
    "available_backends",
    "empty_cache",
    "inpaint",
    "use_backend",
]
__version__ = "0.1.0"
