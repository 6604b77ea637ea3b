"""Where a file lies: pipes, devices, modes, links, long names, writers that die."""

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vernal as vn
from calls import calls_of
from inside import ATOMIC

TREE = {"a": jnp.arange(3.0)}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "fit.vernal"


@pytest.fixture(autouse=True)
def no_hang():
    """A test that waits for a pipe fails, and does not wait."""
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError()))
    signal.alarm(60)
    yield
    signal.alarm(0)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def pipe(path):
    os.mkfifo(path)


def listening(path):
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))


SPECIAL = {
    "a pipe": pipe,
    "a socket": listening,
    "zeros without end": lambda path: path.symlink_to("/dev/zero"),
    "noise without end": lambda path: path.symlink_to("/dev/urandom"),
    "nothing": lambda path: path.symlink_to("/dev/null"),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_what_is_no_regular_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # The name of a socket has to be short.
    file = Path("file")
    SPECIAL[name](file)
    before = file.stat()
    with pytest.raises(vn.ForeignFileError, match=r"`path`: file is not a regular"):
        vn.load(file, TREE)
    with pytest.raises(OSError, match=r"`path`: .* is not a regular file"):
        vn.save(file, TREE)
    assert file.stat().st_mode == before.st_mode
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_read_only_file_is_refused(file):
    vn.save(file, TREE)
    before = file.read_bytes()
    file.chmod(0o444)
    with pytest.raises(PermissionError, match=f"`path`: {file} is read-only"):
        vn.save(file, {"a": 1})
    assert (file.read_bytes(), mode(file)) == (before, 0o444)
    assert vn.load(file, TREE)["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("bits", [0o600, 0o640, 0o664, 0o200, 0o777])
def test_the_mode_stays(bits, file):
    vn.save(file, TREE)
    file.chmod(bits)
    vn.save(file, {"a": 1})
    assert mode(file) == bits


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_new_files_obey_the_umask(umask, file):
    old = os.umask(umask)
    try:
        vn.save(file, TREE)
    finally:
        os.umask(old)
    assert mode(file) == 0o666 & ~umask


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="root may do it")
def test_the_owner_stays(file):
    vn.save(file, TREE)
    os.chown(file, 1234, 4321)
    vn.save(file, {"a": 1})
    assert (file.stat().st_uid, file.stat().st_gid) == (1234, 4321)


def test_links(tmp_path, file):
    folder, target = tmp_path / "folder", tmp_path / "folder" / "target"
    folder.mkdir()
    (tmp_path / "between").symlink_to(target)
    file.symlink_to("between")
    # The target is not there yet.
    vn.save(file, TREE)
    assert file.is_symlink()
    assert not target.is_symlink()
    other = folder / "other"
    other.hardlink_to(target)
    vn.save(file, {"a": 1})
    assert vn.load(target, {"a": 0}) == {"a": 1}
    # The other name is that of the file before.
    assert vn.load(other, TREE)["a"].tolist() == [0, 1, 2]
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for call in (vn.save, vn.load):
        with pytest.raises(OSError, match="loop"):
            call(loop, TREE)


@pytest.mark.parametrize("letter", ["x", "é"])
@pytest.mark.parametrize("size", [221, 222, 254, 255, 256])
def test_long_names_of_files(size, letter, tmp_path):
    name = (letter * size).encode()[:size].decode(errors="ignore")
    file = tmp_path / name
    if len(name.encode()) > 255:
        with pytest.raises(OSError, match="too long"):
            vn.save(file, TREE)
        return
    vn.save(file, TREE)
    vn.save(file, TREE)
    assert vn.load(file, TREE)["a"].tolist() == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("name", [" ", "-", "a\nb", "ü", "*", "[x]", b"\xff"])
def test_odd_names_of_files(name, tmp_path):
    file = tmp_path / os.fsdecode(name)
    vn.save(file, TREE)
    vn.save(str(file), TREE)
    assert vn.load(str(file), TREE)["a"].tolist() == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [file]


WRITER = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("atomic", sys.argv[1])
atomic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(atomic)
"""


def process(code, *args):
    """A process that writes files as `save` does, without importing JAX."""
    return subprocess.Popen(
        [sys.executable, "-c", WRITER + code, ATOMIC, *map(str, args)],
        stdout=subprocess.PIPE,
        text=True,
    )


HALF = """
with atomic.open_to_replace(sys.argv[2]) as file:
    file.write(b"half")
    file.flush()
    print("written", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_nothing_for_long(tmp_path, file):
    vn.save(file, TREE)
    killed, living = process(HALF, file), process(HALF, file)
    try:
        for writer in (killed, living):
            assert writer.stdout.readline() == "written\n"
        killed.kill()
        killed.wait()
        assert len(list(tmp_path.iterdir())) == 3
        assert vn.load(file, TREE)["a"].tolist() == [0, 1, 2]
        vn.save(file, {"a": 1})
        # What a living process writes is not touched.
        assert len(list(tmp_path.iterdir())) == 2
    finally:
        living.kill()
        for writer in (killed, living):
            writer.wait()
            writer.stdout.close()
    vn.save(file, {"a": 2})
    assert list(tmp_path.iterdir()) == [file]
    assert vn.load(file, {"a": 0}) == {"a": 2}


MANY = """
for _ in range(60):
    with atomic.open_to_replace(sys.argv[2]) as file:
        for _ in range(50):
            file.write(sys.argv[3].encode() * 997)
"""


def test_processes_that_race_never_tear_a_file(tmp_path, file):
    writers = [process(MANY, file, letter) for letter in "abc"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if file.exists():
            content = file.read_bytes()
            assert len(content) == 997 * 50
            assert len(set(content)) == 1
            seen |= set(content)
    for writer in writers:
        writer.stdout.close()
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert seen <= set(b"abc")
    assert list(tmp_path.iterdir()) == [file]


def test_threads_that_race_never_tear_a_file(tmp_path, file):
    vn.save(file, np.full(1000, 0.0))
    errors = []

    def write(number):
        try:
            for _ in range(15):
                vn.save(file, np.full(1000, float(number)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        loaded = vn.load(file, np.zeros(1000))
        assert len(np.unique(loaded)) == 1
        time.sleep(0.001)
    assert not errors
    assert list(tmp_path.iterdir()) == [file]


def test_an_interrupted_write_leaves_nothing(tmp_path, file, monkeypatch):
    vn.save(file, TREE)
    before = file.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        vn.save(file, {"a": 1})
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


PEAK = """
import re, sys, jax, vernal as vn
from pathlib import Path
jax.config.update("jax_enable_x64", True)
status = Path("/proc/self/status")
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", status.read_text())[1])
leaf = lambda size: jax.ShapeDtypeStruct((size,), "float64")
vn.load(sys.argv[1], {"a": leaf(1)})
before = peak()
jax.block_until_ready(vn.load(sys.argv[2], {"a": leaf(2**23), "b": leaf(2**23)}))
print((peak() - before) / 1024)
"""


@pytest.mark.as_compiled
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="it says the peak")
def test_loading_takes_little_more_memory_than_the_arrays(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    vn.save(small, {"a": jnp.ones(1)})
    numbers = np.ones(2**23)  # 64 MB.
    vn.save(large, {"a": numbers, "b": numbers})
    command = [sys.executable, "-c", PEAK, small, large]
    out = subprocess.run(command, capture_output=True, check=True)
    large.unlink()
    assert 120 < float(out.stdout) < 150


def test_many_leaves_are_written_in_time(file):
    tree = {f"leaf{i}": np.float64(i) for i in range(3_000)}
    calls = calls_of(lambda: vn.save(file, tree))
    by_numpy = calls_of(lambda: np.savez(file.with_name("numpy.npz"), **tree))
    assert calls < 8 * by_numpy
    loaded = vn.load(file, tree)
    assert jax.tree.leaves(loaded) == jax.tree.leaves(tree)
