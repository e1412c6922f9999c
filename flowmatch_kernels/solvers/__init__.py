"""Solvers: each turns a time grid into a table, one row for each evaluation of the velocity field.

stages.py says what a solver takes and returns, ode.py has the solvers, predictions.py changes their columns for a model
that predicts the data or the noise, table.py makes the rows, and requests.py keeps them.
"""

from .ode import SOLVERS, ab2, ab3, dpmpp_2m, euler, heun, midpoint, rk4, rk4_classic, solver
from .requests import Request, cache, check_finite
from .stages import Earlier, Segment, Stage, Steps
from .table import Evaluation, Table, build, evaluations

__all__ = [
    "SOLVERS",
    "Earlier",
    "Evaluation",
    "Request",
    "Segment",
    "Stage",
    "Steps",
    "Table",
    "ab2",
    "ab3",
    "build",
    "cache",
    "check_finite",
    "dpmpp_2m",
    "euler",
    "evaluations",
    "heun",
    "midpoint",
    "rk4",
    "rk4_classic",
    "solver",
]
