"""Throughput of the image networks: images/s, and the share of the matrix-multiply rate that this device was measured to have.

    make bench                                       # all benchmarks
    python -m pytest benchmarks/bench_networks.py --benchmark-enable -s

On a GPU the paper's networks and batch sizes, plain (float32 without TF32, as written), as stage 2 trains with preset `demo`
(float32, channels last, compiled), and fast (bfloat16, channels last, compiled: as stage 1 trains there).
On a CPU small networks of the same kind. Operations are counted on the plain form; the
time if memory were all that counts takes every layer's output as written once and read once in each pass, as it is without
fusion. Where the time of a step goes, by kernel, is listed after it: what the two bounds leave open has a name there.
"""
import time
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dlsm.data import Images
from dlsm.image_presets import IMAGES
from dlsm.images import batches, classifier_loss, classifier_net, score_loss, score_net
from dlsm.monitor import _output_bytes
from dlsm.ncsnpp import PyramidDown, Resample
from dlsm.parallel import gradients
from dlsm.training import step_generator

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRESET = IMAGES["cifar10"]["paper" if DEVICE.type == "cuda" else "smoke"]
WORK = ("score forward", "score forward and backward", "DLSM' step")
PASSES = {"score forward": 1, "score forward and backward": 3, "DLSM' step": 6}  # through the layers, as far as memory is concerned
WAYS = ("plain", "compiled", "fast") if DEVICE.type == "cuda" else ("plain",)
seen = {}


def synchronise():
    if DEVICE.type == "cuda": torch.cuda.synchronize()


def best_time(step, repeats=10):
    "Shortest wall time of a step in seconds, after two to warm up."
    times = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        step()
        synchronise()
        times.append(time.perf_counter() - began)
    return min(times[2:])


@pytest.fixture(scope="module")
def peak():
    "Measured rates of this device: multiplications and additions a second by dtype, and bytes a second of a copy."
    n = 8192 if DEVICE.type == "cuda" else 1024
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, n, n, device=DEVICE).to(dtype)
        with plain_float32(): rates[dtype] = 2 * n**3 / best_time(lambda a=a, b=b: a @ b)
    source, target = torch.zeros(2, 2**28 if DEVICE.type == "cuda" else 2**25, device=DEVICE)
    rates["copy"] = 2 * source.nbytes / best_time(lambda: target.copy_(source))
    tera = [rates[dtype] / 1e12 for dtype in (torch.float32, torch.bfloat16)]
    print(f"\n{DEVICE}: {tera[0]:.2f} TFLOP/s float32, {tera[1]:.2f} bfloat16, copy {rates['copy'] / 1e9:.0f} GB/s")
    return rates


class plain_float32:
    "Switch TF32 off for a while."
    def __enter__(self):
        self.before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def __exit__(self, *_): torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self.before


class Count(TorchDispatchMode):
    "Count multiplications and additions. (PyTorch's own counter hooks modules, which `torch.func.grad` does not bear.)"
    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count: self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


@dataclass
class Job:
    step: object  # runs it once
    batch: int  # images
    flops: int  # operations
    bytes: float  # written and read, layer by layer, in all passes


def job(work, way):
    "Prepare one kind of work."
    fast, quick = way == "fast", way != "plain"
    layout = torch.channels_last if quick else torch.contiguous_format
    settings = PRESET.classifier if work.startswith("DLSM") else PRESET.score
    pixels = torch.randint(256, (512, 3, 32, 32), dtype=torch.uint8, device=DEVICE)
    images = Images(pixels, torch.arange(512, device=DEVICE) % 10, None, None, ())
    batch = batches(images, PRESET, settings, seed=0)(0, step_generator(0, 0, DEVICE))
    score = score_net(PRESET).to(DEVICE, memory_format=layout)
    if work == "score forward":
        net, loss = score.eval(), None
        call = torch.compile(net) if quick else net

        def run(net, batch, call):
            with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=fast): call(batch["x"], batch["sigma"])
    else:
        net = classifier_net(PRESET).to(DEVICE, memory_format=layout) if work.startswith("DLSM") else score
        frozen = score.eval().requires_grad_(False) if work.startswith("DLSM") else None
        loss = classifier_loss("dlsm_prime", PRESET.classifier, frozen) if work.startswith("DLSM") else score_loss(PRESET.score)
        call = torch.compile(loss) if quick else loss

        def run(net, batch, call):
            net.zero_grad(set_to_none=True)
            gradients(net, call, batch, bf16=fast)
    few = {k: v[:2] for k, v in batch.items()}
    with Count() as counter: run(net, few, loss or net)
    moved = 2 * PASSES[work] * _output_bytes(net, lambda _, n: run(net, few, loss or net)) / len(few["x"])
    if score is not net: moved += 2 * _output_bytes(score, lambda _, n: run(net, few, loss or net)) / len(few["x"])
    size = settings.batch
    return Job(lambda: run(net, batch, call), size, counter.total * size // len(few["x"]), size * moved / (2 if fast else 1))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("work", WORK)
def test_throughput(benchmark, compare, peak, work, way):
    with plain_float32():
        todo = job(work, way)

        def step():
            todo.step()
            synchronise()
        benchmark.pedantic(step, rounds=10, warmup_rounds=3)
    if not benchmark.stats: return
    seconds, rate = benchmark.stats["min"], peak[torch.bfloat16 if way == "fast" else torch.float32]
    seen[work, way] = todo.batch / seconds
    benchmark.extra_info |= {"images_per_s": seen[work, way], "share_of_peak": todo.flops / seconds / rate}
    compare(f"{work}, {way}, batch {todo.batch}", seconds, "its operations at the measured rate of products", todo.flops / rate, aim=0.25 if way == "fast" else None)
    if way != "plain" and (work, "plain") in seen:
        compare(f"{work}, {way}, an image", 1 / seen[work, way], "plain", 1 / seen[work, "plain"], aim=3 if way == "fast" else None)
    gain = f"; {seen[work, way] / seen[work, 'plain']:.1f} times plain" if way != "plain" and (work, "plain") in seen else ""
    share = f"{todo.flops / seconds / rate:.1%} of the measured {'bfloat16' if way == 'fast' else 'float32'} rate"
    bounds = f"operations alone {1e3 * todo.flops / rate:.1f} ms, memory alone {1e3 * todo.bytes / peak['copy']:.1f} ms"
    print(f"\n{work}, {way}: {seen[work, way]:,.0f} images/s, {share} ({1e3 * seconds:.1f} ms for {todo.batch}; {bounds}){gain}")


@pytest.mark.gpu
def test_shifted_pixels_against_convolutions(benchmark, compare, monkeypatch):
    "A step of the score model with its resampling written in either way."
    times = {}
    for way in ("shifted", "convolved"):
        monkeypatch.setattr(Resample, "forward", getattr(Resample, way))
        monkeypatch.setattr(PyramidDown, "forward", lambda self, x, way=way: self.Conv2d_0(getattr(self, way)(x)))
        torch.compiler.reset()
        with plain_float32(): times[way] = best_time(job("score forward and backward", "fast").step)
    benchmark.pedantic(lambda: None, rounds=1)
    compare("a step of the score model, fast, resampled by shifted pixels", times["shifted"], "by convolutions", times["convolved"])
    print("\n" + ", ".join(f"{way}: {1e3 * seconds:.1f} ms" for way, seconds in times.items()))


@pytest.mark.parametrize("work", WORK)
def test_where_the_time_goes(benchmark, work):
    "The kernels (on a CPU the operations) that take most of a step, as shares of the time of all of them."
    from torch.profiler import ProfilerActivity, profile

    def profiled():
        with plain_float32():
            todo = job(work, WAYS[-1])
            for _ in range(3): todo.step()
            synchronise()
            with profile(activities=[ProfilerActivity.CUDA if DEVICE.type == "cuda" else ProfilerActivity.CPU]) as found:
                todo.step()
                synchronise()
        return found.key_averages()
    events = benchmark.pedantic(profiled, rounds=1)
    spent = {e.key: (e.self_device_time_total if DEVICE.type == "cuda" else e.self_cpu_time_total, e.count) for e in events}
    total, kernels = map(sum, zip(*spent.values()))
    assert total > 0
    most = sorted(spent.items(), key=lambda item: item[1], reverse=True)[:16]
    print(f"\n{work}, {WAYS[-1]}: {total / 1e3:.1f} ms in {kernels:,} kernels" + "".join(f"\n{time / total:7.1%}  {n:5,} × {name[:110]}" for name, (time, n) in most))
