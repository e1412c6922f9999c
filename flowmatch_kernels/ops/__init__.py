"""The fused step and its backends; importing this registers the ops with PyTorch."""

from . import dispatch as dispatch
from . import fused_step as fused_step
