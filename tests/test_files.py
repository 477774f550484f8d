"""Files are written whole or not at all."""
import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dlsm.files import alive, atomic_path, atomic_tensors, atomic_write, sha256


def files(folder): return sorted(p.name for p in folder.iterdir() if p.is_file())


def test_write_replaces(tmp_path):
    path = tmp_path/"deep/file.txt"
    for text in ("one", "zwei ü"): assert atomic_write(path, text).read_text(encoding="utf-8") == text
    assert files(path.parent) == ["file.txt"] and len(sha256(path)) == 64


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(tmp_path, monkeypatch, code):
    path = atomic_write(tmp_path/"file.bin", b"old")
    def full(self, data):
        with open(self, "wb") as file: file.write(data[:2])
        raise OSError(code, os.strerror(code))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="disk is full.*make room") as e: atomic_write(path, b"new")
    assert e.value.errno == code and path.read_bytes() == b"old" and files(tmp_path) == ["file.bin"]


def test_full_disk_while_flushing(tmp_path, monkeypatch):
    def full(fd): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    path = atomic_write(tmp_path/"file.bin", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk is full"): atomic_write(path, b"new")
    assert path.read_bytes() == b"old" and files(tmp_path) == ["file.bin"]


def test_tensors_are_written_as_all_else(tmp_path, monkeypatch):
    "Read by the same people, and on a full disk the same error."
    path = atomic_tensors(tmp_path/"x.safetensors", {"a": torch.arange(3)}, {"kind": "test"})
    with safe_open(path, "pt") as file: assert file.metadata() == {"kind": "test"} and file.get_tensor("a").tolist() == [0, 1, 2]
    assert path.stat().st_mode == atomic_write(tmp_path/"x.txt", "x").stat().st_mode
    before = path.read_bytes()
    def full(self, data): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="disk is full"): atomic_tensors(path, {"a": torch.arange(4)})
    assert path.read_bytes() == before and files(tmp_path) == ["x.safetensors", "x.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_error_leaves_the_old_file(tmp_path, error):
    path = atomic_write(tmp_path/"file.txt", "old")
    with pytest.raises(error), atomic_path(path) as part:
        part.write_text("half")
        raise error
    assert path.read_text() == "old" and files(tmp_path) == ["file.txt"]


def test_killed_writer(tmp_path):
    "SIGKILL in the middle of a write: the old file stays whole, and the next write removes what was left."
    path = atomic_write(tmp_path/"file.txt", "old")
    code = f"""
        import time
        from dlsm.files import atomic_path
        with atomic_path({str(path)!r}) as part:
            part.write_text("half")
            print("written", flush=True)
            time.sleep(60)"""
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "written\n"
        atomic_write(path, "from another process")  # must not take away what a living process writes
        assert len(files(tmp_path)) == 2
        writer.send_signal(signal.SIGKILL)
    assert path.read_text() == "from another process" and len(files(tmp_path)) == 2
    atomic_write(path, "new")
    assert path.read_text() == "new" and files(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("mine, other", [("gpu", "gpu-b"), ("gpu", "gpu-1"), ("gpu-b", "gpu"), ("g[pu]", "gp")])
def test_parts_of_other_machines_stay(tmp_path, monkeypatch, mine, other):
    "Names of machines begin with each other; a process of another machine cannot be asked for, and what is named otherwise is somebody's own."
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    def left(host, middle=f"{gone.pid}-0123abcd"): return tmp_path/f".part-{host}-{middle}-a[1].txt"
    own = [left(other), left(mine, "x-0123abcd"), left(mine, f"{gone.pid}-mine"), left(mine, f"{10**30}-0123abcd"), left(f"{mine}-{gone.pid}", "5-89abcdef")]
    for path in (left(mine), *own): path.write_text("half")
    monkeypatch.setattr("socket.gethostname", lambda: f"{mine}.domain")
    atomic_write(tmp_path/"a[1].txt", "whole")
    assert files(tmp_path) == sorted([*(path.name for path in own), "a[1].txt"]) and all(map(alive, own)) and not alive(left(mine))
