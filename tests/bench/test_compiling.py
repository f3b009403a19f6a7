"""Configurations are compiled in processes of their own: what fails, crashes or does not end costs one of them."""

import os
import signal
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from todo_attn.bench import compiling
from todo_attn.bench.cases import Case
from todo_attn.bench.compiling import Launch, compile_all

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
CASE = Case("attention", "sd15", 64, 64, 1, 2, "fp16")


@pytest.fixture
def child(monkeypatch):
    """child(code) has the processes run ``code`` instead."""
    return lambda code: monkeypatch.setattr(compiling, "_CHILD", code)


def test_what_compiles_is_in_tritons_cache_and_what_fails_says_why(monkeypatch, tmp_path):
    from todo_attn.kernels.configs import KernelConfig

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # for this process only
    launches = [Launch(CASE, KernelConfig(128, 64, 4, 3)), Launch(CASE, KernelConfig(100, 64, 4, 3))]
    done = []
    good, bad = compile_all((8, 0), launches, lambda: done.append(1))
    assert good is None and "power of 2" in bad
    assert len(done) == 2
    assert {path.stem for path in tmp_path.rglob("*.cubin")} == {"attention_kernel", "pack_kernel"}


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import os; os.abort()", "its compilation ended with -6"),
        ("raise SystemExit(3)", "its compilation ended with 3"),
        ("raise ValueError('no\\nroom')", "room"),
    ],
)
def test_a_crash_is_said(child, code, error):
    child(code)
    assert compile_all((8, 0), [Launch(CASE)] * 2) == [error] * 2


def test_what_does_not_end_is_ended(child, monkeypatch):
    child("import time; time.sleep(600)")
    monkeypatch.setattr(compiling, "_SECONDS", 0.5)
    assert compile_all((8, 0), [Launch(CASE)]) == ["its compilation did not end within 0 s"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interrupt_ends_the_processes(child, tmp_path):
    child(f"import os, pathlib, time; pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch(); time.sleep(600)")

    def interrupt():
        while not os.listdir(tmp_path):
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            compile_all((8, 0), [Launch(CASE)] * 3)
    finally:
        signal.signal(signal.SIGINT, before)
        thread.join()
    for name in os.listdir(tmp_path):
        assert ended(int(name))


def ended(process: int) -> bool:
    for _ in range(500):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def test_nothing_to_compile():
    assert compile_all((8, 0), []) == []
