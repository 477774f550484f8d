"""The classification accuracy score: what it sees, that it resumes, and whose score it is."""
import dataclasses

import pytest
import torch

from dlsm.cas import answers, cas, cas_net, centred, digits_classifier, fit_cas
from dlsm.data import image_data
from dlsm.evaluation_presets import EVALUATION, CASSettings

SHORT = CASSettings("small", batch=32, steps=60, lr=2e-3, decay="cosine", every=20, checkpoint_every=20)


@pytest.fixture(scope="module")
def digits(): return image_data("digits")


def test_score_of_real_images_and_of_wrong_labels(digits, tmp_path):
    real = cas(digits.x, digits.y, digits, SHORT, tmp_path/"real")
    assert [point["step"] for point in real["curve"]] == [0, 20, 40, 60] and real["curve"][-1]["accuracy"] == real["accuracy"] > 0.85
    assert real["answers"].shape == digits.y_test.shape and (real["answers"] == digits.y_test).double().mean().item() == real["accuracy"]
    wrong = cas(digits.x, (digits.y + 1) % 10, digits, SHORT, tmp_path/"wrong")
    assert wrong["accuracy"] < 0.1


def test_resumes_to_the_same_score(digits, tmp_path):
    whole = cas(digits.x, digits.y, digits, SHORT, tmp_path/"whole")
    for state in fit_cas(digits.x, digits.y, digits, SHORT, tmp_path/"broken"):
        if state.step == 45: break  # the newest checkpoint is that of step 40
    assert sorted(p.name for p in (tmp_path/"broken").glob("step-*"))[-1] == "step-00000040"
    again = cas(digits.x, digits.y, digits, SHORT, tmp_path/"broken")
    assert again["accuracy"] == whole["accuracy"] and torch.equal(again["answers"], whole["answers"]) and again["curve"] == whole["curve"]


def test_other_images_are_another_score(digits, tmp_path):
    few = dataclasses.replace(SHORT, steps=2)
    cas(digits.x[:100], digits.y[:100], digits, few, tmp_path)
    for x, settings, seed in ((digits.x[100:200], few, 0), (digits.x[:100], dataclasses.replace(few, lr=1e-3), 0), (digits.x[:100], few, 1)):
        with pytest.raises(ValueError, match="another configuration"): cas(x, digits.y[:100], digits, settings, tmp_path, seed)


def test_networks():
    assert centred(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]
    net = cas_net("resnet50", 3, 100)
    assert net.conv1.kernel_size == (7, 7) and net.conv1.stride == (2, 2) and net.fc.out_features == 100
    assert answers(net, torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2,) and not net.training
    assert EVALUATION["cifar10"]["paper"].cas == CASSettings() and CASSettings().steps == 400_000
    for name, told in (("resnet50", "images have 1 channels; ResNet-50 takes 3"), ("vgg", "net='vgg' is not known: resnet50 or small")):
        with pytest.raises(ValueError, match=told): cas_net(name, 1, 10)


def test_digits_classifier_is_one_network(digits, tmp_path):
    first, second = digits_classifier(digits, tmp_path), digits_classifier(digits, tmp_path)
    assert first.digest == second.digest and first.name == "digits classifier"


def test_mistakes_are_one_line_each(digits, tmp_path):
    x, y = digits.x[:8], digits.y[:8]
    for images, labels, told in ((x.float() / 255, y, "are float32, range 0 … 1; expected bytes"),
                                 (x[..., :4], y, r"images have shape \(1, 8, 4\) and the test images \(1, 8, 8\)"),
                                 (x, y[:7], "8 images, 7 labels"), (x, y + 10, "expected one of 0 … 9 for each")):
        with pytest.raises(ValueError, match=told) as error: cas(images, labels, digits, SHORT, tmp_path)
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
