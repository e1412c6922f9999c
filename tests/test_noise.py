"""Keyed noise: known answers, invariance, bits on every backend, statistics, accuracy, errors."""

import math
from pathlib import Path

import interpreted
import numpy as np
import pytest
import torch
from operands import assert_same_bits
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import static
from flowmatch_kernels import DDPM, FlowMatching, KeyedNoise, available_backends, use_backend
from flowmatch_kernels.noise import keys as _keys
from flowmatch_kernels.ops import dispatch, native, reference_noise
from flowmatch_kernels.ops.fused_step import VELOCITY_DTYPES

CASES = Path(__file__).with_name("noise_interpreter_cases.py")
BACKENDS = ["cpu", "reference"]
CPU = torch.device("cpu")
WORD = 2**32 - 1

on_each_backend = pytest.mark.parametrize("backend", BACKENDS)


def philox(counter, key):
    """Philox4x32-10 in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & WORD, p0 >> 32 ^ c3 ^ k1, p0 & WORD
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return c0, c1, c2, c3


def words(*entries):
    return [torch.tensor([entry]) for entry in entries]


# ---- the bits ----

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)


@pytest.mark.parametrize(
    "counter, key, wanted",
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (*PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers(counter, key, wanted):
    """Random123's kat_vectors, philox4x32 with 10 rounds."""
    assert philox(counter, key) == wanted
    assert tuple(int(word) for word in reference_noise.philox(words(*counter), words(*key))) == wanted


@on_each_backend
def test_bits_stay(backend):
    """What a key stands for is a promise: these bits may never change."""
    wanted = ["0x1.31bb180000000p-12", "-0x1.3829ce0000000p-2", "0x1.c9ec000000000p+0", "0x1.1160180000000p+0"]
    wanted += ["0x1.816fec0000000p-2", "-0x1.49799a0000000p+0", "0x1.cfbeb80000000p+0", "-0x1.f707dc0000000p-2"]
    assert [z.hex() for z in KeyedNoise(7).draw(1, (8,), backend=backend).flatten().tolist()] == wanted
    last = KeyedNoise(2**64 - 1, first=2**48 - 1, stream=2**16 - 1)
    wanted = ["0x1.a303820000000p-2", "-0x1.8704940000000p-1", "0x1.0418920000000p-2", "-0x1.d2d2f00000000p-1"]
    wanted += ["0x1.c8c2c80000000p-3"]
    assert [z.hex() for z in last.draw(1, (5,), evaluation=65535, backend=backend).flatten().tolist()] == wanted


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**63, 2**64 - 1])
@pytest.mark.parametrize("index", [0, 2**32 - 1, 2**32, 2**48 - 1])
def test_layout_of_the_counter(seed, index):
    """As ops.keyed_noise's table says, word by word; of every word each bit counts."""
    stream, evaluation, block = 0xABCD, 0x8001, torch.tensor([0, 1, 2**32 - 1, 2**32, 0x8000_1234_5678])
    keys = _keys(KeyedNoise(seed, index, stream), 1, CPU)
    counter, key = reference_noise.counters(keys, block, evaluation)
    for k, b in enumerate(block.tolist()):
        got = [int(word.expand(1, len(block))[0, k]) for word in (*counter, *key)]
        assert got == [
            *(b % 2**32, b // 2**32 + index // 2**32 * 2**16, stream + evaluation * 2**16, index % 2**32),
            *(seed % 2**32, seed // 2**32),
        ]
    whole = KeyedNoise(seed, index, stream).draw(1, (8,), evaluation=evaluation)[0]
    for k in range(2):
        w = words(*philox((k, index >> 32 << 16, got[2], got[3]), got[4:]))
        z = [*reference_noise.normals(w[0], w[1]), *reference_noise.normals(w[2], w[3])]
        assert_same_bits(whole[4 * k : 4 * k + 4], torch.cat(z))


SHAPES = [(1,), (3,), (4,), (7,), (64, 2), (1023,), (1024,), (1025,), (3, 5, 7)]


@pytest.mark.parametrize("dtype", VELOCITY_DTYPES, ids=str)
@pytest.mark.parametrize("level", [0, 1, 2], ids=["SSE2", "AVX2", "AVX-512"])
def test_instruction_sets(dtype, level):
    """Each loop of csrc/keyed_noise_cpu.cpp; a machine without one takes the next narrower."""
    noise = KeyedNoise(0x9234567887654321, first=2**32 - 2, stream=40000)
    for x_dims in SHAPES:
        wanted = noise.draw(5, x_dims, dtype=dtype, evaluation=3, backend="reference")
        got, keys = torch.full_like(wanted, math.nan), _keys(noise, 5, CPU)
        elements = math.prod(x_dims)
        native._C.keyed_noise(*(got.data_ptr(), native.DTYPES[dtype], keys.data_ptr(), 5, elements, 3), level=level)
        assert_same_bits(got, wanted)


def test_threads():
    """Far more counters than a thread takes at once, and samples that end within a strip."""
    noise = KeyedNoise(3)
    wanted = noise.draw(301, (1001,), backend="reference")
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            assert_same_bits(noise.draw(301, (1001,), backend="cpu"), wanted)
        finally:
            torch.set_num_threads(before)


@on_each_backend
def test_dtypes(backend):
    """float64 is float32, widened; 16 bits are rounded from it."""
    noise = KeyedNoise(11)
    z = noise.draw(3, (1001,), dtype=torch.float32, backend=backend)
    for dtype in VELOCITY_DTYPES:
        got = noise.draw(3, (1001,), dtype=dtype, backend=backend)
        assert got.dtype == dtype
        assert_same_bits(got, z.to(dtype))


def test_nothing_is_empty():
    for backend in BACKENDS:
        assert KeyedNoise(1).draw(0, (3,), backend=backend).shape == (0, 3)
        assert KeyedNoise(1).draw(3, (0, 2), backend=backend).shape == (3, 0, 2)


def test_triton_interpreter():
    assert interpreted.run(CASES) == "15 cases\n"


@pytest.mark.parametrize("fours", [True, False])
def test_triton_does_not_contract(fours):
    """The PTX: products, sums and square roots rounded to nearest, and no FMA; four elements are one access."""
    pytest.importorskip("triton", reason="Triton is not installed: its kernel is not tested")
    ptx = static.compile_keyed_noise(torch.float32, fours, "sm_90").assembly
    assert ptx.count("sqrt.rn.f32") == 2
    assert ptx.count("mul.rn.f32") > 80 and ptx.count("add.rn.f32") > 80
    for wrong in ("fma", ".ftz", ".approx", "mul.f32", "add.f32", "local"):
        assert wrong not in ptx, wrong
    assert ptx.count("st.global.v4.b32") == fours


# ---- invariance ----


@on_each_backend
@pytest.mark.parametrize("x_dims", [(5,), (64, 2)], ids=str)
def test_a_sample_is_the_same_everywhere(backend, x_dims):
    """Alone, in any batch, at any place, in any order, whatever its batch starts at."""
    noise = KeyedNoise(7)
    whole = noise.draw(9, x_dims, backend=backend)
    assert len(set(map(tuple, whole.flatten(1).tolist()))) == 9
    fm = FlowMatching(x_dims, num_inference_steps=0, backend=backend)
    assert_same_bits(fm.sample(9, torch.add, noise=noise), whole)
    for i in range(9):
        assert_same_bits(noise.draw(i + 1, x_dims, backend=backend), whole[: i + 1])
        assert_same_bits(KeyedNoise(7, first=i).draw(9 - i, x_dims, backend=backend), whole[i:])
    order = [4, 0, 8, 8, 2]
    got = fm.sample(5, torch.add, noise=[KeyedNoise(7, first=i) for i in order])
    assert_same_bits(got, whole[order])
    across = KeyedNoise(7, first=2**32 - 3).draw(6, x_dims, backend=backend)
    assert_same_bits(KeyedNoise(7, first=2**32).draw(3, x_dims, backend=backend), across[3:])


@on_each_backend
def test_seeds_of_requests(backend):
    seeds = [0, 1, 2**32, 2**63, 2**64 - 1]
    fm = FlowMatching((3, 2), backend=backend)
    together = fm.sample(5, step_fn, noise=[KeyedNoise(s) for s in seeds])
    for k, seed in enumerate(seeds):
        assert_same_bits(fm.sample(1, step_fn, noise=KeyedNoise(seed)), together[k : k + 1])
    assert_same_bits(fm.sample(5, step_fn, noise=tuple(KeyedNoise(s) for s in seeds)), together)


def test_every_part_of_the_key_counts():
    draws = [KeyedNoise(s, f, k).draw(1, (4,)) for s in (0, 1, 2**32) for f in (0, 1, 2**32) for k in (0, 1)]
    draws += [KeyedNoise(0).draw(1, (4,), evaluation=e) for e in (1, 2)]
    assert len({tuple(z.flatten().tolist()) for z in draws}) == len(draws)


def test_torch_generator_is_left_alone():
    """And where nothing is given, the draw is PyTorch's, to the bit."""
    torch.manual_seed(0)
    state = torch.get_rng_state()
    fm = FlowMatching(3, num_inference_steps=0)
    fm.sample(2, step_fn, noise=KeyedNoise(0))
    assert torch.equal(torch.get_rng_state(), state)
    wanted = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert_same_bits(fm.sample(4, step_fn), wanted)
    assert_same_bits(fm.sample(4, step_fn, generator=torch.Generator().manual_seed(0)), wanted)


@pytest.mark.parametrize("dtype", VELOCITY_DTYPES, ids=str)
def test_generators(dtype):
    """One for each sample, each drawn by itself; of 16 elements on PyTorch draws in another order."""
    for x_dims in ((3,), (5, 4)):
        fm = FlowMatching(x_dims, num_inference_steps=0)
        generators = [torch.Generator().manual_seed(s) for s in (5, 6, 7)]
        got = fm.sample(3, step_fn, noise=generators, dtype=dtype)
        again = [torch.Generator().manual_seed(s) for s in (5, 6, 7)]
        wanted = torch.cat([torch.randn(1, *x_dims, generator=g, dtype=dtype) for g in again])
        assert_same_bits(got, wanted)
        assert_same_bits(
            fm.sample(3, step_fn, noise=generators, dtype=dtype), fm.sample(3, step_fn, noise=again, dtype=dtype)
        )


def test_generators_as_diffusers_draws():
    torch_utils = pytest.importorskip("diffusers.utils.torch_utils")
    make = lambda: [torch.Generator().manual_seed(s) for s in (5, 6)]  # noqa: E731
    wanted = torch_utils.randn_tensor((2, 4, 8), generator=make(), device=CPU, dtype=torch.float32)
    assert_same_bits(FlowMatching((4, 8), num_inference_steps=0).sample(2, step_fn, noise=make()), wanted)


# ---- sample() ----


def step_fn(x, t):
    return (torch.sin(3 * x) - x * t).to(x.dtype)


@pytest.mark.parametrize("dtype", VELOCITY_DTYPES, ids=str)
def test_sample(dtype):
    """As with the same noise as a tensor; temperature and trajectory too."""
    fm, noise = FlowMatching((5, 3), "heun"), KeyedNoise(9, first=3)
    drawn = noise.draw(4, (5, 3), dtype=dtype)
    for options in ({}, {"temperature": 0.7}, {"differentiable": True}):
        wanted = fm.sample(4, step_fn, noise=drawn, return_all_steps=True, **options)
        got = fm.sample(4, step_fn, noise=noise, dtype=dtype, return_all_steps=True, **options)
        assert_same_bits(got[0], wanted[0])
    assert fm.sample(4, step_fn, noise=noise).dtype == torch.float32


def test_backends_agree_in_sample():
    results = [FlowMatching(7, backend=b).sample(3, step_fn, noise=KeyedNoise(1)) for b in BACKENDS]
    assert_same_bits(*results)
    with use_backend("reference"):
        assert_same_bits(FlowMatching(7).sample(3, step_fn, noise=KeyedNoise(1)), results[0])


def test_fit_and_compare_take_it():
    comparison = FlowMatching(3).compare_solvers(step_fn, [2], ["euler"], batch_size=4, noise=KeyedNoise(1))
    assert comparison is not None


# ---- what watches ----


@pytest.mark.filterwarnings("ignore")  # a tracer says what it unrolls
def test_traced():
    """By torch.jit.trace, which records no draw: the noise is a constant of the trace. Keys, a list, of each step."""
    one, two, x = KeyedNoise(7), [KeyedNoise(1), KeyedNoise(2)], torch.full((1,), 0.3)
    grid = {"time_steps": [0.0, 0.5, 0.9]}

    def field(c):
        return lambda x, t: x * c

    for drawn in (
        lambda c: FlowMatching((4,)).sample(2, field(c), noise=one),
        lambda c: FlowMatching((4,)).sample(2, field(c), noise=two),
        lambda c: FlowMatching((4,), "sde").sample(2, field(c), noise=one, **grid),
        lambda c: FlowMatching((4,), "sde").sample(2, field(c), noise=torch.zeros(2, 4), step_noise=two, **grid),
        lambda c: DDPM((4,), 3).sample(2, field(c), noise=one),
        lambda c: one.draw(2, 4) * c,
    ):
        assert_same_bits(torch.jit.trace(drawn, x + 1, check_trace=False)(x), drawn(x))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compiled(compiler):
    """In one graph, made within it or given to it; on each backend."""
    torch.compiler.reset()
    for backend in BACKENDS:
        fm = FlowMatching((5, 3), num_inference_steps=2, backend=backend)

        def drawn(x, noise, fm=fm):
            return x + fm.sample(3, lambda x, t: torch.zeros_like(x), noise=noise)

        compiled = torch.compile(drawn, backend=compiler, fullgraph=True)
        for noise in (
            KeyedNoise(7),
            KeyedNoise(2**64 - 1, first=2**48 - 3, stream=9),
            [KeyedNoise(s) for s in (1, 2, 3)],
        ):
            x = torch.zeros(3, 5, 3)
            assert_same_bits(compiled(x, noise), drawn(x, noise))

        def made(backend=backend):
            return KeyedNoise(5).draw(3, (4,), backend=backend)

        inside = torch.compile(made, backend=compiler, fullgraph=True)
        assert_same_bits(inside(), KeyedNoise(5).draw(3, (4,)))


def test_a_compiler_does_not_look_inside():
    """It might contract what the reference computes."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    for backend in ("auto", *BACKENDS):
        torch.compiler.reset()
        compiled = torch.compile(lambda b=backend: KeyedNoise(5).draw(1, (4,), backend=b), backend=keep, fullgraph=True)
        assert_same_bits(compiled(), KeyedNoise(5).draw(1, (4,)))
        targets = [str(node.target) for node in graphs[-1].graph.nodes if node.op == "call_function"]
        assert "flowmatch_kernels.keyed_noise" in targets and len(targets) < 10
        drawn = next(node for node in graphs[-1].graph.nodes if "keyed_noise" in str(node.target))
        assert drawn.args[-1] == (backend if backend != "auto" else dispatch.choose("auto", "cpu").name)


def test_a_compiled_graph_keeps_its_backend():
    with use_backend("reference"):
        compiled = torch.compile(lambda: KeyedNoise(5).draw(1, (4,)), backend="aot_eager", fullgraph=True)
        wanted = compiled()
    assert_same_bits(compiled(), wanted)


def test_exported():
    class Sampler(torch.nn.Module):
        def forward(self, x):
            return x + FlowMatching(4, num_inference_steps=1).sample(2, lambda x, t: x, noise=KeyedNoise(3))

    program = torch.export.export(Sampler(), (torch.zeros(2, 4),))
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    assert any(str(node.target).startswith("flowmatch_kernels.keyed_noise") for g in graphs for node in g.nodes)
    assert_same_bits(program.module()(torch.zeros(2, 4)), Sampler()(torch.zeros(2, 4)))


def test_op():
    op = torch.ops.flowmatch_kernels.keyed_noise
    keys = _keys(KeyedNoise(3), 5, CPU)
    torch.library.opcheck(op.default, (keys, (3, 2), torch.bfloat16, 4, "reference"))
    for backend in ("auto", *BACKENDS):
        got = op(keys, (3, 2), torch.float32, 4, backend)
        assert_same_bits(got, KeyedNoise(3).draw(5, (3, 2), evaluation=4))


def test_fake():
    with FakeTensorMode():
        x = FlowMatching((3, 2)).sample(4, step_fn, noise=KeyedNoise(1))
        assert x.shape == (4, 3, 2)


def test_transforms():
    """Under torch.func the reference draws, in PyTorch's own operations; the bits are the same."""
    fm = FlowMatching(3, num_inference_steps=1, backend="auto")
    wanted = fm.sample(2, lambda x, t: x, noise=KeyedNoise(1))
    got = torch.func.vmap(lambda s: s * fm.sample(2, lambda x, t: x, noise=KeyedNoise(1)))(torch.ones(4))
    for one in got:
        assert_same_bits(one, wanted)


# ---- statistics ----


@pytest.fixture(scope="module")
def many():
    """10^7 values as one long sample: from the cpu backend; without it, of the reference, fewer."""
    n = 10**7 if available_backends()["cpu"] is None else 10**6
    return KeyedNoise(0).draw(1, (n,))[0]


def test_moments(many):
    """To the fourth, within four standard deviations of what independent normals give."""
    z, n = many.double(), len(many)
    for power, wanted, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - wanted) < 4 * math.sqrt(variance / n), power


def test_kolmogorov_smirnov(many):
    """The largest distance from the distribution function, times sqrt(n): above 1.95 by chance 1 time in 1000."""
    z = many.numpy().copy()
    z.sort()
    z = torch.from_numpy(z).double()
    law = (1 + torch.erf(z * math.sqrt(0.5))) / 2
    steps = torch.arange(len(z) + 1, dtype=torch.float64) / len(z)
    distance = max((steps[1:] - law).max(), (law - steps[:-1]).max())
    assert distance * math.sqrt(len(z)) < 1.95


def test_tails(many):
    """As many beyond 4 and 4.5 as the law says, within four standard deviations; each sign half."""
    for bound in (3.0, 4.0, 4.5):
        for side in (many, -many):
            wanted = len(many) * math.erfc(bound / math.sqrt(2)) / 2
            assert abs(int((side > bound).sum()) - wanted) < 4 * math.sqrt(wanted)


def correlation(x, y):
    """Times sqrt(n): about standard normal."""
    x, y = x.double().flatten(), y.double().flatten()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).mean() / (x.std() * y.std()) * math.sqrt(x.numel()))


def test_neighbouring_elements(many):
    z = many[:1_000_000]
    for lag in (1, 2, 3, 4, 5, 8, 128):
        assert abs(correlation(z[lag:], z[:-lag])) < 4, lag
        assert abs(correlation(z[lag:] ** 2, z[:-lag] ** 2)) < 4, lag


@pytest.mark.parametrize(
    "one, other",
    [
        ({"seed": 0}, {"seed": 1}),
        ({"seed": 0}, {"seed": 2**32}),
        ({"seed": 0, "first": 0}, {"seed": 0, "first": 1000}),
        ({"seed": 0, "first": 0}, {"seed": 0, "first": 2**32}),
        ({"seed": 0}, {"seed": 0, "stream": 1}),
        ({"seed": 0, "evaluation": 0}, {"seed": 0, "evaluation": 1}),
    ],
    ids=str,
)
def test_keys_that_differ_little(one, other):
    draws = []
    for options in (one, other):
        options = dict(options)
        evaluation = options.pop("evaluation", 0)
        draws.append(KeyedNoise(**options).draw(1000, (500,), evaluation=evaluation))
    a, b = draws
    assert abs(correlation(a, b)) < 4
    assert abs(correlation(a**2, b**2)) < 4
    assert abs(correlation(a[1:], a[:-1])) < 4  # neighbouring samples
    assert abs(correlation(a[1:] ** 2, a[:-1] ** 2)) < 4


# ---- accuracy ----

EDGES = [
    0,
    1,
    2,
    2**22,
    2**23 - 1,
    2**24 - 1,
    2**24,
    2**24 + 1,
    2**29 - 1,
    2**29,
    2**29 + 1,
    2**30,
    3 * 2**29,
    2**31 - 1,
]
EDGES += [WORD - edge for edge in EDGES] + [round((1 - 0.5**0.5) * 2**32) + k for k in range(-300, 300)]


@pytest.fixture(scope="module")
def tried():
    """Two words for each of a million normals: the edges of one with those of the other, and at random."""
    edges = torch.tensor(EDGES)
    generator = torch.Generator().manual_seed(0)
    radius, angle = torch.randint(0, 2**32, (2, 500_000), generator=generator)
    small = (
        torch.randint(0, 2**32, (500_000,), generator=generator) >> torch.arange(500_000) % 32
    )  # far out, and near 0
    small[::2] = WORD - small[::2]  # far out, and near 0
    pairs = torch.cartesian_prod(edges, edges[:28])
    turned = torch.randint(0, 2**32, (len(small),), generator=generator)
    return torch.cat([radius, small, pairs[:, 0]]), torch.cat([angle, turned, pairs[:, 1]])


def ulp(got, exact):
    """The error in units of float32's last place at the exact value."""
    spacing = torch.from_numpy(np.spacing(exact.abs().float().numpy())).double()
    return ((got.double() - exact).abs() / spacing).max().item()


def exact_radius(word):
    """-2 ln u in float64."""
    distance, upper = reference_noise.uniform(word)
    d = distance.double() * 2.0**-33
    return -2 * torch.where(upper, torch.log1p(-d), torch.log(d))


def exact_sine_cosine(word):
    quarter, y = reference_noise.angle(word)
    s, c = torch.sin(y.double() * (math.pi / 2)), torch.cos(y.double() * (math.pi / 2))
    table = torch.stack([torch.stack([c, -s, -c, s]), torch.stack([s, c, -s, -c])])
    k = quarter.view(1, 1, -1).expand(2, 1, -1)
    return table.gather(1, k)[:, 0], s, c


def test_accuracy(tried):
    """The stated bound is 2 ulp each; measured: logarithm 0.86, sine 0.66, cosine 0.70, normal 0.76."""
    word, angle = tried
    wanted = exact_radius(word)
    measured = {"logarithm": ulp(reference_noise.minus_twice_logarithm(word).high, wanted)}
    (cosine, sine), s, c = exact_sine_cosine(angle)
    _, y = reference_noise.angle(angle)
    mine = reference_noise.sine_cosine(y)
    measured |= {"sine": ulp(mine[0].high, s), "cosine": ulp(mine[1].high, c)}
    z0, z1 = reference_noise.normals(word, angle)
    root = wanted.sqrt()
    measured["normal"] = max(ulp(z0, root * cosine), ulp(z1, root * sine))
    assert max(measured.values()) < 1, measured


def test_where_an_fma_has_the_same_bits(tried):
    """csrc/keyed_noise.h has FMAs for these products, which float32 holds, and for what a square root leaves."""
    word, angle = tried
    square = reference_noise.minus_twice_logarithm(word)
    root = reference_noise.radius(square).high
    left = square.high.double() - root.double() ** 2  # exact: the square has 48 digits
    assert torch.equal(left, left.float().double())
    assert torch.equal(reference_noise._remainder(square.high, root), left.float())
    x = reference_noise._halves(root)
    for factor in reference_noise.sine_cosine(reference_noise.angle(angle)[1]):
        y = reference_noise._halves(factor.high)
        products = [a.double() * b.double() for a in x for b in y]
        assert all(torch.equal(product, product.float().double()) for product in products)
        whole = root.double() * factor.high.double()
        assert not torch.equal(whole, whole.float().double()), "these words cannot tell"


def test_reach():
    """Beyond 6.6 sigma, at both ends of the word; and never infinite, NaN or 0."""
    z, _ = reference_noise.normals(torch.tensor([0, WORD]), torch.tensor([0, 0]))
    assert z[0] > 6.76
    assert 0 < z[1] < 2e-5
    for word in (0, WORD, 2**31 - 1, 2**31):
        both = torch.stack(reference_noise.normals(torch.full((len(EDGES),), word), torch.tensor(EDGES)))
        assert both.isfinite().all() and both.ne(0).all()


# ---- errors ----


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((-1,), ValueError, r"seed must be in \[0, 2\^64\), got -1"),
        ((2**64,), ValueError, r"seed must be in \[0, 2\^64\)"),
        ((1.0,), TypeError, r"seed must be an int, got 1\.0"),
        ((True,), TypeError, "seed must be an int, got True"),
        (("7",), TypeError, "seed must be an int, got '7'"),
        ((None,), TypeError, "seed must be an int, got None"),
        ((0, -1), ValueError, r"first must be in \[0, 2\^48\), got -1"),
        ((0, 2**48), ValueError, r"first must be in \[0, 2\^48\)"),
        ((0, 0, -1), ValueError, r"stream must be in \[0, 2\^16\), got -1"),
        ((0, 0, 2**16), ValueError, r"stream must be in \[0, 2\^16\)"),
    ],
    ids=str,
)
def test_bad_keys(arguments, error, message):
    with pytest.raises(error, match=message):
        KeyedNoise(*arguments)


def test_keys_are_values():
    assert KeyedNoise(np.int64(3), first=np.uint8(4)) == KeyedNoise(3, 4) and hash(KeyedNoise(3)) == hash(KeyedNoise(3))
    assert type(KeyedNoise(np.int64(3)).seed) is int
    with pytest.raises(AttributeError):
        KeyedNoise(3).seed = 4


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"noise": [KeyedNoise(1)]}, ValueError, "noise must have an entry for each sample, 2; got 1"),
        ({"noise": []}, ValueError, "noise must have an entry for each sample, 2; got 0"),
        ({"noise": [KeyedNoise(1), 2]}, TypeError, "holds KeyedNoise only, or torch.Generator only; got 2 in"),
        ({"noise": [KeyedNoise(1), torch.Generator()]}, TypeError, "got both"),
        ({"noise": [torch.zeros(3), torch.zeros(3)]}, TypeError, "got tensor"),
        ({"noise": 7}, TypeError, "noise must be a tensor .2, 3., a KeyedNoise, .* got 7"),
        ({"noise": KeyedNoise(1), "generator": torch.Generator()}, ValueError, "leave one of them out"),
        ({"noise": KeyedNoise(1, first=2**48 - 1)}, ValueError, r"first \+ batch_size must be at most 2\^48"),
        ({"noise": KeyedNoise(1), "backend": "cuda"}, RuntimeError, "'cuda' was asked for and cannot be used"),
    ],
)
def test_bad_noise(options, error, message):
    with pytest.raises(error, match=message):
        FlowMatching(3).sample(2, step_fn, **options)


def test_draws_of_any_form_of_dims():
    """As FlowMatching takes them: an int, a sequence, an array, a tensor, an iterator; also none and empty ones."""
    wanted = KeyedNoise(1).draw(2, (3, 2))
    for x_dims in ([3, 2], torch.Size([3, 2]), np.array([3, 2]), torch.tensor([3, 2]), iter((3, 2))):
        assert_same_bits(KeyedNoise(1).draw(2, x_dims), wanted)
    assert KeyedNoise(1).draw(2, 3).shape == (2, 3)
    assert KeyedNoise(1).draw(2, ()).shape == (2,)
    assert KeyedNoise(1).draw(2, (0, 3)).shape == (2, 0, 3)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"dtype": torch.int32}, TypeError, "dtype must be float32"),
        ({"evaluation": 2**16}, ValueError, r"evaluation must be in \[0, 65536\), got 65536"),
        ({"evaluation": 1.5}, TypeError, "evaluation must be an int, got 1.5"),
        ({"batch_size": True}, TypeError, "batch_size must be an int, got True"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an int, got 2.5"),
        ({"batch_size": -2}, ValueError, "batch_size must not be negative, got -2"),
        ({"x_dims": (3, -1)}, ValueError, "x_dims must not be negative, got -1"),
        ({"evaluation": -1}, ValueError, r"evaluation must be in \[0, 65536\), got -1"),
        ({"backend": "triton"}, RuntimeError, "'triton' was asked for"),
        ({"backend": "none"}, ValueError, "unknown backend 'none'"),
    ],
)
def test_bad_draw(options, error, message):
    with pytest.raises(error, match=message):
        KeyedNoise(1).draw(**{"batch_size": 2, "x_dims": (3,)} | options)


@pytest.mark.parametrize(
    "keys, x_dims, error, message",
    [
        (torch.zeros(2, 3, dtype=torch.int32), (3,), TypeError, "keys must be torch.int64"),
        (torch.zeros(2, 2, dtype=torch.int64), (3,), ValueError, r"keys must be contiguous, \[B, 3\], got \[2, 2\]"),
        (torch.zeros(3, 2, dtype=torch.int64).T, (3,), ValueError, "keys must be contiguous"),
        (torch.zeros(0, 3, dtype=torch.int64), (2**50,), ValueError, "fewer than 2\\^50 elements"),
        (torch.zeros(2, 3, dtype=torch.int64), (-1,), ValueError, "x_dims must not be negative"),
    ],
    ids=["dtype", "shape", "layout", "elements", "x_dims"],
)
def test_bad_operands(keys, x_dims, error, message):
    with pytest.raises(error, match=message):
        torch.ops.flowmatch_kernels.keyed_noise(keys, x_dims, torch.float32)
