"""A policy with a key-value cache that appends and crops at each step, made so that a CUDA graph can hold it.

Before: the cache is a Python object outside of step_fn. Each evaluation appends keys and values by torch.cat and crops
them afterwards. A graph would keep the memory of the first observation's cache, and replay that for ever.

After: the cache is an input of step_fn, allocated with room for the action tokens. An evaluation writes their keys and
values behind the prefix, in place; the next one writes over them, so there is nothing to crop. `graphed` copies each
observation's cache into the memory that the graph reads. On a GPU the whole denoising loop is then one launch.
"""

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from flowmatch_kernels import FlowMatching

PREFIX, HORIZON, ACTION, WIDTH = 40, 16, 7, 64


class Policy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = torch.nn.Linear(ACTION + 1, WIDTH), torch.nn.Linear(WIDTH, ACTION)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))

    def encode(self, observation, room=0):
        """The cache of an observation's tokens: keys and values of each layer, [B, PREFIX + room, WIDTH]."""
        parts = [layer(observation).chunk(3, dim=-1) for layer in self.layers]
        return [{"k": pad(k, (0, 0, 0, room)), "v": pad(v, (0, 0, 0, room))} for _, k, v in parts]

    def forward(self, x, t, cache, append):
        h = self.embed(torch.cat([x, t.expand(*x.shape[:-1], 1)], dim=-1))
        for layer, kept in zip(self.layers, cache, strict=True):
            q, k, v = layer(h).chunk(3, dim=-1)
            append(kept, k, v)
            h = h + scaled_dot_product_attention(q, kept["k"], kept["v"])
        return self.out(h)


def before(policy, cache):
    def append(kept, k, v):
        kept["k"], kept["v"] = torch.cat([kept["k"], k], dim=1), torch.cat([kept["v"], v], dim=1)

    def step_fn(x, t):
        velocity = policy(x, t, cache, append)
        for kept in cache:  # crop
            kept["k"], kept["v"] = kept["k"][:, :PREFIX], kept["v"][:, :PREFIX]
        return velocity

    return step_fn


def after(policy):
    def write(kept, k, v):
        kept["k"][:, PREFIX:], kept["v"][:, PREFIX:] = k, v

    return lambda x, t, cache: policy(x, t, cache, write)


if __name__ == "__main__":
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy, fm = Policy().to(device).eval(), FlowMatching((HORIZON, ACTION))
    with torch.no_grad():
        observations, noise = (
            torch.randn(3, 1, PREFIX, WIDTH, device=device),
            torch.randn(1, HORIZON, ACTION).to(device),
        )
        example = {"cache": policy.encode(observations[0], room=HORIZON)}
        sampler = fm.graphed(after(policy), 1, device, inputs=example, module=policy)
        for observation in observations:
            actions = sampler(cache=policy.encode(observation, room=HORIZON), noise=noise)
            wanted = fm.sample(1, before(policy, policy.encode(observation)), device, noise=noise)
            assert torch.equal(actions, wanted)
    print(f"{len(observations)} observations, with every bit of the cache that appends and crops; {sampler.stats}")
