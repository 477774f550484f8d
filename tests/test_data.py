"""Images: digits, CIFAR from a folder or a mirror, what is refused, and the order of the batches."""
import hashlib
import os
import pickle
import shutil
import socket
import tarfile
from pathlib import Path
from threading import Thread

import pytest
import torch

import dlsm.data
from dlsm.data import batch_indices, each_once, flip, image_data, to_unit
from dlsm.runs import ParameterError

CIFAR = Path(os.environ.get("DLSM_DATA", "data"))/"cifar-10-batches-py"
needs_cifar = pytest.mark.skipif(not CIFAR.is_dir(), reason="needs CIFAR-10 in $DLSM_DATA")


def md5(data): return hashlib.md5(data, usedforsecurity=False).hexdigest()


class Bomb:
    "What must never be unpickled."
    def __reduce__(self): return (Path(self.marker).touch, ())
    def __init__(self, marker): self.marker = str(marker)


def tiny_cifar(monkeypatch, folder, dataset="cifar10"):
    "Write a CIFAR of six images into `folder` and make its sums the expected ones; return the archive."
    from torchvision.datasets import CIFAR10, CIFAR100
    source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[dataset]
    base, train, test = folder/source.base_folder, *(("data_batch_1", "test_batch") if dataset == "cifar10" else ("train", "test"))
    base.mkdir(parents=True)
    def write(name, data):
        (base/name).write_bytes(pickle.dumps(data))
        return [name, md5((base/name).read_bytes())]
    def rows(n, first):
        labels = {"labels": [i % 2 for i in range(n)]} if dataset == "cifar10" else {"coarse_labels": [7] * n, "fine_labels": [99 * (i % 2) for i in range(n)]}
        return {"data": torch.arange(first, first + n).to(torch.uint8)[:, None].repeat(1, 3072).numpy()} | labels
    monkeypatch.setattr(source, "train_list", [write(train, rows(4, 0))])
    monkeypatch.setattr(source, "test_list", [write(test, rows(2, 100))])
    key = source.meta["key"]
    meta = write(source.meta["filename"], {key: ["a", "b"] if dataset == "cifar10" else [f"fine {i}" for i in range(100)], "coarse_label_names": ["coarse"] * 20})
    monkeypatch.setattr(source, "meta", {"filename": meta[0], "key": key, "md5": meta[1]})
    archive = folder/source.filename
    with tarfile.open(archive, "w:gz") as tar: tar.add(base, base.name)
    monkeypatch.setitem(dlsm.data.ARCHIVE_MD5, dataset, md5(archive.read_bytes()))
    return archive


# ---- digits

def test_digits_are_scikit_learns_and_their_split_is_fixed():
    a, b = image_data("digits"), image_data("digits")
    assert a.x.dtype == torch.uint8 and a.x.shape == (1442, 1, 8, 8) and a.x_test.shape == (355, 1, 8, 8) and a.classes == tuple("0123456789")
    assert torch.equal(a.x, b.x) and torch.equal(a.y_test, b.y_test)
    assert 0 == a.x.min() and 255 == a.x.max() and to_unit(a.x).max() == 1
    shares = a.y_test.bincount()/(a.y.bincount() + a.y_test.bincount())
    assert shares.min() > 0.19 and shares.max() <= 0.2
    assert (md5(a.x_test.numpy().tobytes()), md5(a.y_test.numpy().tobytes())) == ("80e410ac8cb86629b526dcce9fafbf5a", "cb7c111fdbd6495a1c5dda9c5a6f11f6")


# ---- CIFAR

@needs_cifar
def test_cifar10_from_a_folder():
    found = image_data("cifar10", CIFAR.parent)
    assert found.x.shape == (50_000, 3, 32, 32) and found.x_test.shape == (10_000, 3, 32, 32) and found.x.dtype == torch.uint8
    assert (found.y.bincount() == 5_000).all() and (found.y_test.bincount() == 1_000).all() and found.classes[1] == "automobile"
    mean = found.x.float().mean((0, 2, 3))/255
    assert torch.allclose(mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=1e-3)


def test_cifar_from_the_archive_and_from_the_environment(monkeypatch, tmp_path):
    archive = tiny_cifar(monkeypatch, tmp_path/"a")
    (tmp_path/"b").mkdir()
    shutil.copy(archive, tmp_path/"b")
    found = image_data("cifar10", tmp_path/"b")
    assert found.x[:, 0, 0, 0].tolist() == [0, 1, 2, 3] and found.y.tolist() == [0, 1, 0, 1] and found.x_test.shape == (2, 3, 32, 32)
    monkeypatch.setenv("DLSM_DATA", str(tmp_path/"b"))
    assert torch.equal(image_data("cifar10").x, found.x)


def test_cifar100_has_its_fine_labels(monkeypatch, tmp_path):
    archive = tiny_cifar(monkeypatch, tmp_path/"a", "cifar100")
    (tmp_path/"b").mkdir()
    shutil.copy(archive, tmp_path/"b")
    for folder in "ab":
        found = image_data("cifar100", tmp_path/folder)
        assert found.y.tolist() == [0, 99, 0, 99] and found.y_test.tolist() == [0, 99] and found.x_test[:, 0, 0, 0].tolist() == [100, 101]
        assert len(found.classes) == 100 and found.classes[99] == "fine 99"


def test_unpacking_that_was_cut_off_is_done_again(monkeypatch, tmp_path):
    archive = tiny_cifar(monkeypatch, tmp_path/"a")
    shutil.rmtree(tmp_path/"a"/"cifar-10-batches-py")

    def cut_off(tar, folder, **how):
        (Path(folder)/"cifar-10-batches-py").mkdir()
        raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(tarfile.TarFile, "extractall", cut_off)
        image_data("cifar10", tmp_path/"a")
    assert [path.name for path in archive.parent.iterdir()] == [archive.name]
    assert len(image_data("cifar10", tmp_path/"a").x) == 4 and {path.name for path in archive.parent.iterdir()} == {archive.name, "cifar-10-batches-py"}


def test_nothing_is_unpickled_before_its_md5_is_right(monkeypatch, tmp_path):
    archive, marker = tiny_cifar(monkeypatch, tmp_path), tmp_path/"unpickled"
    batch = tmp_path/"cifar-10-batches-py"/"data_batch_1"
    for name in ("data_batch_1", "batches.meta"):
        path, good = batch.with_name(name), batch.with_name(name).read_bytes()
        path.write_bytes(pickle.dumps(Bomb(marker)))
        with pytest.raises(ParameterError, match="damaged or incomplete: delete that folder"): image_data("cifar10", tmp_path)
        path.write_bytes(good)
    shutil.rmtree(batch.parent)
    archive.write_bytes(archive.read_bytes() + b"x")
    with pytest.raises(ParameterError, match="is damaged .MD5"): image_data("cifar10", tmp_path)
    assert not batch.parent.exists() and not marker.exists()


def test_mirrors_are_tried_in_turn(monkeypatch, tmp_path, capsys):
    archive = tiny_cifar(monkeypatch, tmp_path/"server")
    damaged = tmp_path/"server"/"damaged"/archive.name
    damaged.parent.mkdir()
    damaged.write_bytes(b"not an archive")
    urls = tuple(path.as_uri() for path in (tmp_path/"absent"/archive.name, damaged, archive))
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path))
    monkeypatch.delenv("DLSM_DATA", raising=False)
    monkeypatch.setitem(dlsm.data.MIRRORS, "cifar10", urls[:2])
    with pytest.raises(ParameterError, match="no mirror gave .* MD5 .* into .*data and run again"): image_data("cifar10")
    assert not list((tmp_path/"data").glob("*.gz"))
    monkeypatch.setitem(dlsm.data.MIRRORS, "cifar10", urls)
    assert len(image_data("cifar10").x) == 4
    assert capsys.readouterr().out.count("downloading") == 5
    assert len(image_data("cifar10").x) == 4 and "downloading" not in capsys.readouterr().out


@pytest.mark.parametrize("reply", [b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\nhalf", b""],
                         ids=["another protocol", "cut off in a chunk", "nothing"])
def test_a_server_that_does_not_speak_http_is_passed_over(monkeypatch, tmp_path, capsys, reply):
    archive = tiny_cifar(monkeypatch, tmp_path/"server")
    monkeypatch.setenv("DLSM_ROOT", str(tmp_path))
    monkeypatch.delenv("DLSM_DATA", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        def answer():
            with server.accept()[0] as client:
                client.recv(1 << 16)
                client.sendall(reply)
        thread = Thread(target=answer)
        thread.start()
        monkeypatch.setitem(dlsm.data.MIRRORS, "cifar10", (f"http://127.0.0.1:{server.getsockname()[1]}/{archive.name}",))
        with pytest.raises(ParameterError, match=r"no mirror gave .* \(127\.0\.0\.1:\d+: .+\): put that file") as error: image_data("cifar10")
        assert str(error.value).isprintable()
        thread.join()
    monkeypatch.setitem(dlsm.data.MIRRORS, "cifar10", (dlsm.data.MIRRORS["cifar10"][0], archive.as_uri()))  # nobody answers there any more
    assert len(image_data("cifar10").x) == 4 and capsys.readouterr().out.count("downloading") == 3


def test_a_crawling_server_is_given_up(monkeypatch, tmp_path):
    archive, now = tiny_cifar(monkeypatch, tmp_path), iter(range(0, 10_000, 60))
    monkeypatch.setattr(dlsm.data.time, "monotonic", lambda: float(next(now)))
    with pytest.raises(OSError, match="kB/s"):
        dlsm.data._fetch(archive.as_uri(), tmp_path/"copy", dlsm.data.ARCHIVE_MD5["cifar10"])
    assert not (tmp_path/"copy").exists()


@pytest.mark.parametrize("arguments, told", [
    (("cifar",), "'cifar' is not known"), (("cifar10", "no such folder"), "is not a folder"), (("cifar100", "."), "holds neither")])
def test_wrong_names_and_folders_are_one_line(monkeypatch, arguments, told):
    with pytest.raises(ParameterError, match=told) as error: image_data(*arguments)
    assert "\n" not in str(error.value)


def test_an_unreadable_folder_is_one_line(monkeypatch, tmp_path):
    import torchvision.datasets
    (tmp_path/"cifar-10-batches-py").mkdir()
    def refused(*args, **kwargs): raise PermissionError(13, "Permission denied", "data_batch_1")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", refused)
    with pytest.raises(ParameterError, match="cannot be read or written .Permission denied"): image_data("cifar10", tmp_path)


def test_a_folder_below_a_forbidden_one_is_one_line(monkeypatch, tmp_path):
    def refused(path): raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(Path, "is_dir", refused)  # as Path.stat does, for all but the superuser
    with pytest.raises(ParameterError, match="cannot be read or written .Permission denied") as error: image_data("cifar10", tmp_path)
    assert "\n" not in str(error.value)


# ---- batches

@pytest.mark.parametrize("n, batch", [(10, 4), (10, 10), (7, 20), (1, 1)])
def test_each_epoch_holds_each_image_once(n, batch):
    seen = torch.cat([batch_indices(n, batch, step, seed=3) for step in range(3*n)])
    assert (seen.reshape(-1, n).sort(1).values == torch.arange(n)).all()
    assert torch.equal(seen[batch:2*batch], batch_indices(n, batch, 1, seed=3))
    if n > 5: assert not torch.equal(seen, torch.cat([batch_indices(n, batch, step, seed=4) for step in range(3*n)]))


def test_batches_of_nothing_are_refused():
    with pytest.raises(ValueError, match="at least 1"): batch_indices(0, 1, 0, 0)


def test_flips_and_each_once():
    x = torch.arange(2000*3*2*4).reshape(2000, 3, 2, 4)
    found = flip(x, torch.Generator().manual_seed(0))
    kept, mirrored = (found == x).flatten(1).all(1), (found == x.flip(3)).flatten(1).all(1)
    assert (kept ^ mirrored).all() and abs(mirrored.float().mean() - 0.5) < 0.05
    assert torch.equal(torch.cat([part for part, _ in each_once(x, x, batch=300)]), x)
    with pytest.raises(ValueError, match="parts have 2000, 1999 items; expected as many of each"): list(each_once(x, x[1:], batch=300))
