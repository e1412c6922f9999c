"""lerobot's shared Euler loop as its callers see it, written from facts: the tests' oracle where lerobot is missing.

Knows nothing of the package.
"""

import torch


def euler_integrate(
    denoise_fn,
    noise,
    num_steps,
    *,
    rtc_processor=None,
    rtc_enabled=False,
    inference_delay=None,
    prev_chunk_left_over=None,
    execution_horizon=None,
    hard_prefix=None,
    hard_prefix_mask=None,
):
    """x' = x + dt*v from t = 1 to 0, dt a Python float; t float32 [B], or [B, T] with 0 under a hard prefix."""
    x, dt = noise, -1.0 / num_steps
    for k in range(num_steps):
        now = 1.0 + k * dt
        t = torch.full((), now, dtype=torch.float32).expand(x.shape[0])
        if hard_prefix is not None:
            x = torch.where(hard_prefix_mask, hard_prefix, x)
            t = torch.where(hard_prefix_mask[..., 0], torch.zeros(()), t[:, None])
        if rtc_enabled:
            v = rtc_processor.denoise_step(
                x_t=x,
                prev_chunk_left_over=prev_chunk_left_over,
                inference_delay=inference_delay,
                time=now,
                original_denoise_step_partial=lambda y, t=t: denoise_fn(y, t),
                execution_horizon=execution_horizon,
            )
        else:
            v = denoise_fn(x, t)
        x = x + dt * v
        if hard_prefix is not None:
            x = torch.where(hard_prefix_mask, hard_prefix, x)
        if rtc_processor is not None and rtc_processor.is_debug_enabled():
            rtc_processor.track(time=now, x_t=x, v_t=v)
    return x


class Processor:
    """What real-time chunking asks of a processor, with its guidance: a gradient through the denoiser."""

    def __init__(self, debug=False):
        self.debug = debug
        self.calls, self.tracked = [], []

    def is_debug_enabled(self):
        return self.debug

    def denoise_step(
        self, x_t, prev_chunk_left_over, inference_delay, time, original_denoise_step_partial, execution_horizon=None
    ):
        self.calls.append((x_t.clone(), inference_delay, time, execution_horizon))
        if prev_chunk_left_over is None:
            return original_denoise_step_partial(x_t)
        x = x_t.clone().detach()
        with torch.enable_grad():
            x.requires_grad_(True)
            v = original_denoise_step_partial(x)
            end = x - time * v
            error = (prev_chunk_left_over - end).detach()
            correction = torch.autograd.grad(end, x, error)[0]
        return v - min(5.0, time) * correction

    def track(self, time, x_t=None, v_t=None, **rest):
        self.tracked.append((time, x_t.clone(), v_t.clone()))
