"""The command as a process: Ctrl-C at any moment, output that cannot be written, other ways to start it."""

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from todo_attn import __version__, doctor
from todo_attn.cli import commands, compare, main

ROOT = Path(__file__).parents[2]
# Ctrl-C as soon as the module that INTERRUPT_AT names is imported, after any meaning that the tests' parent gave to it.
SITE = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPT_AT"]:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
"""
AS_SCRIPT = ("-c", "import sys; sys.argv[0] = '/usr/bin/todo-attn'; from todo_attn.cli import main; main()")
AS_MODULE = ("-m", "todo_attn")


def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, this package first."""
    path = os.pathsep.join(filter(None, (environment.pop("first", ""), str(ROOT))))
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("start_as", "arguments", "moment"),
    [
        (AS_SCRIPT, (), "torch"),
        (AS_MODULE, (), "torch"),
        (AS_SCRIPT, (), "typer"),
        (AS_MODULE, ("schedules",), "diffusers"),
    ],
)
def test_ctrl_c_during_imports_is_one_line(tmp_path, start_as, arguments, moment):
    (tmp_path / "sitecustomize.py").write_text(SITE)
    ran = start(*start_as, *arguments, first=str(tmp_path), INTERRUPT_AT=moment)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "todo-attn: error: interrupted\n")


def test_importing_the_package_leaves_ctrl_c_to_the_program(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SITE)
    program = "try:\n    import todo_attn\nexcept KeyboardInterrupt:\n    print('caught')"
    assert start("-c", program, first=str(tmp_path), INTERRUPT_AT="torch").stdout == "caught\n"


@pytest.mark.parametrize("becomes", [KeyboardInterrupt, ImportError, ValueError])
def test_ctrl_c_that_a_library_makes_an_error_of_its_own(run, monkeypatch, becomes):
    def examine():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise becomes("half imported") from None

    monkeypatch.setattr(doctor, "examine", examine)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run("doctor") == (130, "", "todo-attn: error: interrupted\n")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_without_ctrl_c_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def ends(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit:
        main(list(arguments))
    return exit.value.code


COMMANDS = [("doctor",), ("doctor", "--json"), ("schedules", "--json"), ("--help",), ("--version",)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no file that is always full")
@pytest.mark.parametrize("arguments", COMMANDS)
def test_output_that_has_no_room_is_one_line(monkeypatch, capsys, arguments):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert ends(*arguments) == 1
    assert capsys.readouterr().err == "todo-attn: error: output cannot be written: No space left on device\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no file that is always full")
def test_an_error_that_has_no_room_keeps_its_exit_code(monkeypatch):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert ends("nope") == 2


@pytest.mark.parametrize("arguments", COMMANDS)
def test_a_closed_pipe_is_quiet(monkeypatch, capsys, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert ends(*arguments) == 1
    assert capsys.readouterr().err == ""


def test_a_file_that_has_no_room_is_named(run, monkeypatch):
    def examine():
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/weights")

    monkeypatch.setattr(doctor, "examine", examine)
    ran = run("doctor")
    assert ran == (1, "", "todo-attn: error: /cache/weights cannot be written: No space left on device\n")


@pytest.mark.parametrize("command", ["compare", "tune", "doctor", "bench", "schedules"])
def test_help_in_a_terminal_of_ascii(monkeypatch, command):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert ends(command, "--help") == 0
    assert b"--json" in stream.buffer.getvalue()


def test_an_error_in_a_terminal_of_ascii(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", stream)
    assert ends("doctor", "--schedule", "für", "--model", "sd15") == 2
    assert b"got 'f?r'" in stream.buffer.getvalue()


def test_help_fits_80_columns(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for command in ((), ("compare",), ("tune",), ("doctor",), ("bench",), ("schedules",)):
        text = run(*command, "-h").out
        assert text == run(*command, "--help").out
        assert max(map(len, text.splitlines())) <= 80 and "…" not in text


def test_the_version_as_a_module():
    ran = start(*AS_MODULE, "--version")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"todo-attn {__version__}\n", "")


def test_a_shell_completes_commands_and_options(run, monkeypatch):
    # Which shell it is, typer finds among the processes above, which are others in every test run.
    monkeypatch.setattr("shellingham.detect_shell", lambda *_: ("bash", "/bin/bash"))
    assert "_TODO_ATTN_COMPLETE=complete_bash" in run("--show-completion").out
    monkeypatch.setenv("_TODO_ATTN_COMPLETE", "complete_bash")
    for words, answer in (("todo-attn sch", "schedules"), ("todo-attn bench --mod", "--model")):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        assert run() == (0, f"{answer}\n", "")


OF_A_CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4398046511104 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    "error",
    [RuntimeError(OF_A_CPU), torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), MemoryError()],
)
@pytest.mark.parametrize(
    ("command", "module", "does"),
    [("doctor", commands, "_advise"), ("bench", commands, "_bench"), ("compare", compare, "_compare")],
)
def test_no_memory_is_one_line(run, monkeypatch, tmp_path, error, command, module, does):
    def full(*args):
        raise error

    monkeypatch.setattr(module, does, full)
    ran = run(command, "--height", 64, "--width", 64, *(["--out", tmp_path] if command == "compare" else ()))
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == ("todo-attn: error: out of memory: a smaller --height and --width, or --dtype float16, may fit\n")
