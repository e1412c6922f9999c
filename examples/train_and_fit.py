"""Trains a small network on a ring of points, and fits a solver to it: fewer evaluations for the same samples."""

import torch

from flowmatch_kernels import FlowMatching

torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.GELU(), torch.nn.Linear(64, 64), torch.nn.GELU())
network.append(torch.nn.Linear(64, 2))
optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
fm = FlowMatching(x_dims=2)


def step_fn(*, x, t):
    """The velocity of x [B, 2] at t [B, 1]."""
    return network(torch.cat([x, t.expand(x.shape[0], 1)], dim=-1))


for _ in range(400):
    angle = 6.2832 * torch.rand(256)
    pair = fm.construct_training_data(torch.stack([angle.cos(), angle.sin()], dim=-1))
    loss = fm.compute_loss_from_pred(pair, step_fn(x=pair["noisy_x"], t=pair["timesteps"]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

solver = fm.fit_solver(step_fn, evaluations=4, batch_size=128, reference_steps=128, search_grid=32)
comparison = fm.compare_solvers(step_fn, (4, 10, 20), ("euler", "ab3", solver), batch_size=128)
print(comparison)
errors = {(point.solver, point.evaluations): point.error for point in comparison.points}
assert errors["fitted", 4] < errors["euler", 10]
