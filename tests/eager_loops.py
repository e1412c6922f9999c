"""Loops as users write them: the oracle for guidance, hooks and time grids. Knows nothing of the package."""

import torch

# The four published ways to guide, with w the weight as each one's users give it.
GUIDED = {
    "interpolate": lambda w, u, c: (1 - w) * u + w * c,
    "from_unguided": lambda w, u, c: u + w * (c - u),
    "from_guided": lambda w, u, c: c + w * (c - u),
    "extrapolate": lambda w, u, c: (1 + w) * c - w * u,
}
SOLVERS = ("euler", "heun", "ab2")


@torch.no_grad()
def sample(solver, velocity, noise, times, constraint=None, callback=None):
    """The states at each time, [B, T, *x_dims].

    Args:
        solver: "euler", "heun" or "ab2".
        velocity: (x, t, i) -> v, with i the number of the step.
        noise: The first state.
        times: [T].
        constraint: (x, t) -> x, after each step.
        callback: (i, t, x) -> True to stop.
    """
    x, ones = noise.clone(), [1] * (noise.dim() - 1)
    dt = torch.diff(times).double()
    states, before = [x], None

    def at(k):
        return times[k].view(1, *ones).expand(x.shape[0], *ones)

    def scaled(h, v):
        """h*v; with a 16-bit state h is a Python float, for a tensor would widen the state."""
        if x.dtype.itemsize == 2:
            return float(h) * v
        return h.to(x.dtype).view(1, *ones) * v

    for i, h in enumerate(dt):
        v = velocity(x, at(i), i)
        if solver == "euler" or (solver == "ab2" and i == 0):
            x = x + scaled(h, v)
        elif solver == "heun":
            later = velocity(x + scaled(h, v), at(i + 1), i)
            x = x + scaled(h / 2, later) + scaled(h / 2, v)
        else:
            r = h / dt[i - 1]
            x = x + scaled(h * (1 + r / 2), v) + scaled(-h * r / 2, before)
        before = v.clone()
        if constraint is not None:
            x = constraint(x, at(i + 1))
        states.append(x.clone())
        if callback is not None and callback(i, at(i + 1), x):
            break
    return torch.stack(states, dim=1)


def guided(form, weight, guided_fn, unguided_fn):
    """The velocity of two models, as `sample` above takes it; `weight` is (i, t) -> w."""

    def velocity(x, t, i):
        c = guided_fn(x=x, t=t)
        u = unguided_fn(x=x, t=t)
        return GUIDED[form](weight(i, t), u, c)

    return velocity
