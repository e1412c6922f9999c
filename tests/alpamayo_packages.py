"""Stand-ins for the sampler modules of Alpamayo R1, 1.5 and 2, where those packages are not installed.

Written from facts: where the classes are, their arguments and their order, which arguments they swallow. Knows nothing
of the package; the steps are `published.sample`.
"""

import importlib.util
import sys
import types
from abc import ABC, abstractmethod

import published
import torch

PACKAGES = {"R1": "alpamayo_r1", "1.5": "alpamayo1_5", "2": "alpamayo2_super"}


def base_class():
    class BaseDiffusion(ABC, torch.nn.Module):
        def __init__(self, x_dims, *args, **kwargs):
            super().__init__()
            self.x_dims = [x_dims] if isinstance(x_dims, int) else list(x_dims)

        @abstractmethod
        def sample(self, batch_size, step_fn, *args, **kwargs):
            raise NotImplementedError

    return BaseDiffusion


def run(sampler, batch_size, step_fn, device, return_all_steps, inference_step, guided=False, u=None, w=None, t=None):
    w = sampler.inference_guidance_weight if w is None else w
    if guided and u is None:
        raise ValueError("unguided_step_fn is required when using classifier free guidance")
    return published.sample(
        *(batch_size, step_fn, sampler.x_dims, inference_step or sampler.num_inference_steps),
        return_all_steps=return_all_steps,
        unguided_step_fn=u if guided else None,
        weight=w,
        temperature=t,
        device=device,
    )


def sampler_class(generation, base):
    if generation == "1.5":

        class FlowMatching(base):
            def __init__(
                self,
                int_method="euler",
                num_inference_steps=10,
                inference_guidance_weight=1.0,
                x_dims=None,
                use_classifier_free_guidance=False,
                *args,
                **kwargs,
            ):
                super().__init__(x_dims)
                self.int_method, self.num_inference_steps = int_method, num_inference_steps
                self.inference_guidance_weight = inference_guidance_weight
                self.use_classifier_free_guidance = use_classifier_free_guidance

            def sample(
                self,
                batch_size,
                step_fn,
                unguided_step_fn=None,
                device="cpu",
                return_all_steps=False,
                inference_step=None,
                int_method=None,
                use_classifier_free_guidance=None,
                inference_guidance_weight=None,
                temperature=1.0,
                *args,
                **kwargs,
            ):
                guided = use_classifier_free_guidance
                guided = self.use_classifier_free_guidance if guided is None else guided
                return run(
                    *(self, batch_size, step_fn, device, return_all_steps, inference_step, guided),
                    *(unguided_step_fn, inference_guidance_weight, temperature),
                )

        return FlowMatching

    class FlowMatching(base):
        def __init__(
            self,
            int_method="euler",
            train_timestep_sampler="beta",
            num_inference_steps=10,
            train_ignore_guidance_rate=0.1,
            inference_guidance_weight=1.0,
            *args,
            **kwargs,
        ):
            if generation == "2":
                self_guided = kwargs.pop("use_classifier_free_guidance", False)
            super().__init__(*args, **kwargs)
            self.int_method, self.num_inference_steps = int_method, num_inference_steps
            self.train_timestep_sampler = train_timestep_sampler
            self.train_ignore_guidance_rate = train_ignore_guidance_rate
            self.inference_guidance_weight = inference_guidance_weight
            if generation == "2":
                self.use_classifier_free_guidance = self_guided

        def sample(
            self,
            batch_size,
            step_fn,
            device="cpu",
            return_all_steps=False,
            inference_step=None,
            int_method=None,
            *args,
            unguided_step_fn=None,
            use_classifier_free_guidance=None,
            inference_guidance_weight=None,
            temperature=1.0,
            **kwargs,
        ):
            if generation == "R1":
                return run(self, batch_size, step_fn, device, return_all_steps, inference_step)
            guided = use_classifier_free_guidance
            guided = self.use_classifier_free_guidance if guided is None else guided
            return run(
                *(self, batch_size, step_fn, device, return_all_steps, inference_step, guided),
                *(unguided_step_fn, inference_guidance_weight, temperature),
            )

    return FlowMatching


def install(generation, monkeypatch):
    """The module that defines FlowMatching: the real one, where it is installed, else a stand-in for one test."""
    package = PACKAGES[generation]
    if importlib.util.find_spec(package) is None:
        base, sampler = types.ModuleType(f"{package}.diffusion.base"), f"{package}.diffusion.flow_matching"
        base.BaseDiffusion = base_class()
        modules = {package: types.ModuleType(package), f"{package}.diffusion": types.ModuleType(f"{package}.diffusion")}
        modules |= {base.__name__: base, sampler: types.ModuleType(sampler)}
        modules[sampler].FlowMatching = sampler_class(generation, base.BaseDiffusion)
        modules[sampler].FlowMatching.__module__ = sampler
        modules[sampler].FlowMatching.__qualname__ = "FlowMatching"
        for name, module in modules.items():
            module.__path__ = []
            monkeypatch.setitem(sys.modules, name, module)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(modules[parent], child, module)
    return importlib.import_module(f"{package}.diffusion.flow_matching")


def model(generation, sampler):
    """A model of that generation, as far as a sampler is concerned: it holds one, and calls it by keyword."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.action_out_proj = torch.nn.Linear(2, 2)
            if generation == "2":
                self.expert = torch.nn.Module()
                self.expert.diffusion = sampler
            else:
                self.expert = torch.nn.Linear(2, 2)
                self.diffusion = sampler

        @torch.no_grad()
        def forward(self, batch_size, **diffusion_kwargs):
            def step_fn(x, t):
                return self.action_out_proj(x) * t

            diffusion = self.expert.diffusion if generation == "2" else self.diffusion
            return diffusion.sample(
                batch_size=batch_size,
                step_fn=step_fn,
                device=torch.device("cpu"),
                return_all_steps=False,
                **diffusion_kwargs,
            )

    return Model()
