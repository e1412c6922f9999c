"""diffusers' own pipelines with random weights: their scheduler against `integrations.diffusers`, to the last bit."""

import logging

import pytest
import torch
from operands import assert_same_bits

diffusers = pytest.importorskip("diffusers", reason="the oracle is diffusers itself, of the test extra")
pytest.importorskip("transformers", reason="diffusers' pipeline classes need it; of the test extra")

from flowmatch_kernels import FittedSolver, FlowMatching  # noqa: E402
from flowmatch_kernels.integrations.diffusers import (  # noqa: E402
    FlowMatchEulerDiscreteScheduler,
    FlowMatchSolverScheduler,
)
from flowmatch_kernels.ops import dispatch, native  # noqa: E402

Theirs = diffusers.FlowMatchEulerDiscreteScheduler

# transformers' deprecations, and what diffusers says of a cast, are theirs.
pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 5


@pytest.fixture(autouse=True)
def quiet():
    """Without diffusers' remarks on `to()` and its progress bars."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def embeddings(seed, *shape):
    """In place of what a text encoder returns."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decoder():
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        latent_channels=4,
        norm_num_groups=1,
        sample_size=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )


def texts(*parts):
    """Pipelines without text encoders: their arguments for them."""
    return dict.fromkeys(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in parts)


#: Pipelines, their random weights beside the decoder's, the shape of a prompt's embeddings, and what else a call takes.
PIPELINES = {
    "stable_diffusion_3": (  # 12,100 weights; guided, two batches
        lambda: diffusers.StableDiffusion3Pipeline(
            diffusers.SD3Transformer2DModel(
                sample_size=8,
                patch_size=1,
                in_channels=4,
                out_channels=4,
                num_layers=1,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=16,
                caption_projection_dim=16,
                pooled_projection_dim=16,
                pos_embed_max_size=16,
            ),
            Theirs(shift=3.0),
            decoder(),
            **texts("", "_2", "_3"),
        ),
        {
            "prompt_embeds": 1,
            "negative_prompt_embeds": 2,
            "pooled_prompt_embeds": 3,
            "negative_pooled_prompt_embeds": 4,
        },
        {"guidance_scale": 4.0},
    ),
    "flux": (  # 20,096 weights; its own sigmas, and a shift by resolution
        lambda: diffusers.FluxPipeline(
            Theirs(use_dynamic_shifting=True),
            decoder(),
            transformer=diffusers.FluxTransformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=1,
                joint_attention_dim=16,
                pooled_projection_dim=16,
                axes_dims_rope=(4, 4, 8),
            ),
            **texts("", "_2"),
        ),
        {"prompt_embeds": 1, "pooled_prompt_embeds": 3},
        {},
    ),
}


@pytest.fixture(params=PIPELINES)
def made(request):
    """A pipeline, and the arguments of a call."""
    make, prompts, call = PIPELINES[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = make()
    pipe.set_progress_bar_config(disable=True)
    shapes = {name: (2, 16) if "pooled" in name else (2, 3, 16) for name in prompts}
    return pipe, call | {name: embeddings(seed, *shapes[name]) for name, seed in prompts.items()}


def images(pipe, call, dtype=torch.float32, **more):
    call = {name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    call |= {"num_inference_steps": STEPS, "height": 8, "width": 8, "output_type": "pt"} | more
    return pipe(**call, generator=torch.Generator().manual_seed(7)).images


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_have_the_same_bits(made, dtype, monkeypatch):
    """The one line that users change; each step is one launch."""
    pipe, call = made
    pipe.to(dtype)
    wanted = images(pipe, call, dtype)
    launches = []
    cpu = dispatch.BACKENDS["cpu"]
    counted = cpu._replace(load=lambda: lambda o: (launches.append(o.row), native.fused_step_(o))[0])
    monkeypatch.setitem(dispatch.BACKENDS, "cpu", counted)

    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)

    got = images(pipe, call, dtype)
    assert wanted.shape == (2, 3, 8, 8) and wanted.dtype == dtype and wanted.float().std() > 0.05
    assert_same_bits(got, wanted)
    if native.cpu_unavailable() is None:
        assert launches == list(range(STEPS))


def test_latents_at_each_step_have_the_same_bits(made):
    """What a callback sees, and the timesteps that it is called with."""
    pipe, call = made
    seen = []
    for kind in (Theirs, FlowMatchEulerDiscreteScheduler):
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
        states = []

        def record(pipe, k, t, given, states=states):
            states.append((t, given["latents"]))
            return given

        images(pipe, call, callback_on_step_end=record)
        seen.append(states)
    for (t, x), (their_t, y) in zip(*seen, strict=True):
        assert_same_bits(t, their_t)
        assert_same_bits(x, y)
    assert len(seen[0]) == STEPS


def test_saved_and_loaded(made, tmp_path):
    """A pipeline with our scheduler keeps its settings in a folder, and theirs reads the same folder's scheduler."""
    pipe, call = made
    wanted = images(pipe, call)
    pipe.scheduler = FlowMatchSolverScheduler.from_config(pipe.scheduler.config, int_method="euler")
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    for kind in (FlowMatchEulerDiscreteScheduler, FlowMatchSolverScheduler, Theirs):
        pipe.scheduler = kind.from_pretrained(tmp_path, subfolder="scheduler")
        assert type(pipe.scheduler) is kind
        assert_same_bits(images(pipe, call), wanted)


@pytest.mark.parametrize("int_method", ["ab2", "ab3", "unipc", "heun"])
def test_solvers_run_in_a_pipeline(made, int_method, monkeypatch):
    """Each latent is the state that sample() evaluates at on the pipeline's schedule, given the same velocities."""
    pipe, call = made
    pipe.scheduler = FlowMatchSolverScheduler.from_config(pipe.scheduler.config, int_method=int_method)
    calls, step = [], pipe.scheduler.step

    def recorded(v, t, x, **keywords):
        calls.append((x, v))
        return step(v, t, x, **keywords)

    monkeypatch.setattr(pipe.scheduler, "step", recorded)
    last = images(pipe, call, output_type="latent")
    fm = FlowMatching(last.shape[1:], int_method, noise_at=1, euler_at_final=int_method == "heun")
    assert len(calls) == fm.nfe(STEPS)
    grid, left = pipe.scheduler._grid, iter(calls)

    def step_fn(x, t):
        wanted, v = next(left)
        assert_same_bits(x, wanted)
        return v

    got = fm.sample(2, step_fn, noise=calls[0][0], time_steps=grid)
    assert_same_bits(got, last.reshape(got.shape))


def test_a_fitted_solver_runs_in_a_pipeline(made, tmp_path):
    """At its own times, whatever sigmas the pipeline passes; a folder keeps it."""
    pipe, call = made
    rows = [(1.0, -0.25), *[(1.0, -0.3, 0.05)] * (STEPS - 1)]
    fitted = FittedSolver([1.0, 0.8, 0.55, 0.3, 0.1, 0.0], rows, noise_at=1)
    pipe.scheduler = FlowMatchSolverScheduler.from_config(pipe.scheduler.config, int_method=fitted)
    wanted = images(pipe, call)
    assert torch.equal(pipe.scheduler.sigmas, fitted.grid(torch.float32))
    pipe.scheduler.save_pretrained(tmp_path)
    pipe.scheduler = FlowMatchSolverScheduler.from_pretrained(tmp_path)
    assert_same_bits(images(pipe, call), wanted)
    with pytest.raises(ValueError, match="wanted 3 steps, and the fitted solver has 5 evaluations"):
        images(pipe, call, num_inference_steps=3)


def wan():
    """A pipeline of 12,176 random weights beside the decoder's, which is not called, with Wan's own scheduler."""
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=8,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0
    )
    return diffusers.WanPipeline(None, None, vae, scheduler, transformer)


def test_wans_pipeline():
    """Its UniPC against ours, by one line: the same times, and latents within some eps a step of each other."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = wan()
    pipe.set_progress_bar_config(disable=True)
    seen = []

    def record(pipe, k, t, given):
        seen[-1].append((t, given["latents"]))
        return given

    for change in (False, True):
        if change:
            pipe.scheduler = FlowMatchSolverScheduler.from_config(pipe.scheduler.config, int_method="unipc")
        seen.append([])
        pipe(
            prompt_embeds=embeddings(1, 2, 3, 16),
            negative_prompt_embeds=embeddings(2, 2, 3, 16),
            num_inference_steps=STEPS,
            height=16,
            width=16,
            num_frames=5,
            output_type="latent",
            generator=torch.Generator().manual_seed(7),
            callback_on_step_end=record,
        )
    assert [float(t) for t, _ in seen[1]] == [float(t) for t, _ in seen[0]]
    (*_, (_, wanted)), (*_, (_, got)) = seen
    assert wanted.dtype == got.dtype and wanted.std() > 0.5
    # The guided network, scale 5, passes on differences of the steps before: twice the 4 + STEPS of one run.
    assert float((got - wanted).abs().max() / wanted.abs().max()) <= 2 * (4 + STEPS) * torch.finfo(torch.float32).eps
