"""Images/s of guided samplers: ours against the plain loop that evaluates the score and the classifier separately in float32.

    make bench                                       # all benchmarks
    python -m pytest benchmarks/bench_sampling.py --benchmark-enable -s

The plain loop is the same sampler written out: for each evaluation the score model, then the classifier with autograd through
networks whose weights also ask for gradients, as they come out of a checkpoint. Ours freezes the weights, keeps them channels-last,
and on a GPU computes the score model's layers in bfloat16. On a GPU CIFAR's demo networks, on a CPU those of digits; weights do
not matter for speed. The walk of the predictor and corrector is timed over 20 of its 1,000 levels.
"""
import pytest
import torch

from dlsm.guidance import posterior_score
from dlsm.image_presets import IMAGES
from dlsm.images import classifier_net, score_net
from dlsm.samplers import heun_sample, in_bf16, karras_levels, pc_sample
from dlsm.schedule import VESchedule

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRESET = IMAGES["cifar10" if DEVICE.type == "cuda" else "digits"]["demo"]
BATCH = 500 if DEVICE.type == "cuda" else 200
LEVELS = {"heun": karras_levels(PRESET.sigma_min, PRESET.sigma_max, 18), "pc": VESchedule(PRESET.sigma_min, PRESET.sigma_max).levels(20)}
FULL = {"heun": 1, "pc": 50}  # how much longer the whole walk is
seen = {}


def plain(score, classifier, y):
    "Evaluate score and classifier one after the other, as in a first draft."
    def guided(x, sigma):
        prior = score(x, sigma).detach()
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_p = classifier(x, sigma).log_softmax(1).gather(1, y[:, None]).sum()
            return prior + torch.autograd.grad(log_p, x)[0]
    return guided


def job(name, way):
    "Prepare the sampling of one batch."
    score, classifier = (net(PRESET).to(DEVICE).eval().requires_grad_(way == "plain") for net in (score_net, classifier_net))
    y = torch.arange(BATCH, device=DEVICE) % PRESET.n_classes
    if way == "ours": score, classifier = (net.to(memory_format=torch.channels_last) for net in (score, classifier))  # as `dlsm.stages` loads them
    if way == "ours" and DEVICE.type == "cuda": score = in_bf16(score)
    guided = plain(score, classifier, y) if way == "plain" else posterior_score(score, classifier, y)
    generator = torch.Generator(DEVICE).manual_seed(0)
    start = PRESET.sigma_max * torch.randn(BATCH, PRESET.channels, PRESET.image_size, PRESET.image_size, generator=generator, device=DEVICE)

    def run():
        if name == "heun": heun_sample(guided, start, LEVELS[name])
        else: pc_sample(guided, start, LEVELS[name])
        if DEVICE.type == "cuda": torch.cuda.synchronize()
    return run


@pytest.mark.parametrize("way", ["plain", "ours"])
@pytest.mark.parametrize("name", ["heun", "pc"])
def test_images_per_second(benchmark, compare, name, way):
    run = job(name, way)
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    if not benchmark.stats: return
    seen[name, way] = BATCH / (benchmark.stats["min"] * FULL[name])
    gain = f"; {seen[name, 'ours'] / seen[name, 'plain']:.2f} times plain" if way == "ours" and (name, "plain") in seen else ""
    if gain: compare(f"an image of {PRESET.dataset} along {'Heun, 18 levels' if name == 'heun' else 'PC, 1,000 levels'}", 1 / seen[name, "ours"],
                     "the plain loop", 1 / seen[name, "plain"])
    print(f"\n{'Heun-18' if name == 'heun' else 'PC-1000'}, {way}: {seen[name, way]:,.2f} images/s on {DEVICE}{gain}")
