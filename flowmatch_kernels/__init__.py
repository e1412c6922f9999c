"""A drop-in, accelerated sampler for flow matching, equal to the eager PyTorch loop to the last bit."""

from .base import BaseDiffusion, StepFn
from .flow_matching import FlowMatching
from .ops.dispatch import available_backends, use_backend

__all__ = ["BaseDiffusion", "FlowMatching", "StepFn", "available_backends", "use_backend"]
__version__ = "0.1.0"
