"""Solvers: each turns a time grid into a table, one row for each evaluation of the velocity field.

stages.py says what a solver takes and returns, ode.py has the solvers with a name, stochastic.py those that add noise,
fitted.py those that were fitted to a model, predictions.py changes their columns for a model that predicts the data or
the noise, table.py makes the rows, per_sample.py puts those of several grids side by side, grid.py checks times and
step sizes, and requests.py keeps the tables.
"""

from .fitted import FittedSolver, titled
from .grid import Grid, checked_grid
from .ode import SOLVERS, IntMethod, ab2, ab3, dpmpp_2m, euler, heun, loaded, midpoint, rk4, rk4_classic, solver, unipc
from .requests import Request, cache, check_finite, table_for
from .stages import Earlier, Segment, Stage, Steps
from .stochastic import ADDING, STOCHASTIC, Loaded, StochasticSolver, of_the_ode
from .table import Evaluation, Table, build, evaluations

__all__ = [
    "ADDING",
    "SOLVERS",
    "STOCHASTIC",
    "Earlier",
    "Evaluation",
    "FittedSolver",
    "Grid",
    "IntMethod",
    "Loaded",
    "Request",
    "Segment",
    "Stage",
    "Steps",
    "StochasticSolver",
    "Table",
    "ab2",
    "ab3",
    "build",
    "cache",
    "check_finite",
    "checked_grid",
    "dpmpp_2m",
    "euler",
    "evaluations",
    "heun",
    "loaded",
    "midpoint",
    "of_the_ode",
    "rk4",
    "rk4_classic",
    "solver",
    "table_for",
    "titled",
    "unipc",
]
