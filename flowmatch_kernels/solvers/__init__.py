"""Solvers: each turns a time grid into a table, one row for each evaluation of the velocity field.

stages.py says what a solver takes and returns, ode.py has the solvers, predictions.py changes their columns for a model
that predicts the data or the noise, table.py makes the rows, and requests.py keeps them.
"""

from .ode import SOLVERS as SOLVERS
from .ode import solver as solver
from .requests import Request as Request
from .requests import cache as cache
from .requests import check_finite as check_finite
from .stages import Earlier as Earlier
from .stages import Segment as Segment
from .stages import Stage as Stage
from .stages import Steps as Steps
from .table import Evaluation as Evaluation
from .table import Table as Table
from .table import build as build
from .table import evaluations as evaluations
