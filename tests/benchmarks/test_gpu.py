"""The one call for a bare machine: its time keeping, its steps, and what is left when it must stop."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import pytest

from benchmarks import gpu
from benchmarks.gpu import Step
from todo_attn.bench import harness
from todo_attn.bench.cases import Case

CASE = Case("gather", "sd15", 64, 96, 1, 2, "fp32")


@pytest.fixture(autouse=True)
def _interruptible():
    """As the command has it: steps inherit an interrupt that is ignored."""
    before = [signal.signal(kind, signal.default_int_handler) for kind in (signal.SIGINT, signal.SIGTERM)]
    yield
    for kind, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(kind, handler)


def python(code, *, name="step", log="a.log", share=1.0):
    return Step(name, log, share, lambda seconds: [sys.executable, "-u", "-c", code])


def run(tmp_path, *steps, seconds=60.0):
    return gpu.run_all(steps, seconds, tmp_path, dict(os.environ))


def test_a_step_has_its_share_of_what_is_left():
    first, second, third = (python("", share=share) for share in (1, 2, 1))
    assert gpu.seconds_for(first, [second, third], 100) == 25
    assert gpu.seconds_for(second, [third], 90) == 60  # the first took 10 s of its 25
    assert gpu.seconds_for(third, [], 7) == 7
    assert gpu.seconds_for(third, [], -3) == 0


def test_steps_run_in_order_and_say_what_became_of_them(tmp_path):
    missing = Step("missing", "b.log", 1, lambda seconds: [str(tmp_path / "no-such-program")])
    outcomes = run(tmp_path, python("print('one')"), python("raise SystemExit('two is broken')"), missing)
    done, failed, absent = (outcome.said for outcome in outcomes)
    assert done == "done"
    assert failed == "failed: two is broken"
    (framed,) = run(tmp_path, python("raise SystemExit('╭─ Error ─╮\\n│ --size must be │\\n╰─────────╯')"))
    assert framed.said == "failed: --size must be"
    assert absent.startswith("could not start: ")
    log = (tmp_path / "a.log").read_text()
    assert log.index("one") < log.index("two is broken")


def test_a_step_is_interrupted_at_its_limit_and_what_it_wrote_stays(tmp_path):
    rows = tmp_path / "rows"
    polite = f"""
import time
try:
    while True:
        open({str(rows)!r}, "a").write("row\\n")
        time.sleep(0.02)
except KeyboardInterrupt:
    print("stopping")
"""
    start = time.monotonic()
    stopped, after = run(tmp_path, python(polite, share=1), python("print('next')", share=3), seconds=12)
    assert stopped.said == "stopped at its limit"
    assert "stopping" in (tmp_path / "a.log").read_text()
    assert rows.read_text().startswith("row\n")
    assert after.said == "done"
    assert time.monotonic() - start < 12


def test_a_step_that_will_not_stop_is_killed_with_all_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_GRACE", dict.fromkeys(gpu._GRACE, 0.2))
    code = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open("PIDS", "w").write(f"{os.getpid()} {child.pid}")
time.sleep(60)
""".replace("PIDS", str(tmp_path / "pids"))
    (outcome,) = run(tmp_path, python(code), seconds=3)
    assert outcome.said == "stopped at its limit"
    for pid in (tmp_path / "pids").read_text().split():
        for _ in range(1500):  # 30 s: by themselves they end after 60
            if not _alive(pid):
                break
            time.sleep(0.02)
        assert not _alive(pid)


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_steps_of_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/usr/bin/{name}")
    steps = gpu.steps("cuda", tmp_path, sys.path)
    commands = [" ".join(step.command(100)) for step in steps]
    assert len({step.log for step in steps} | {"summary.txt", "kernels.jsonl", "unet.jsonl"}) <= 8
    logs = ["doctor.log", "tests.log", "kernels.log", *["unet.log"] * 5, "tests.log", "doctor.log"]
    assert [step.log for step in steps] == logs
    assert commands[0].startswith(sys.executable) and commands[0].endswith("todo_attn.cli doctor")
    assert "pytest" in commands[1] and "tests/kernels/test_exp2.py" in commands[1]
    assert f"benchmarks.kernels --device cuda --out {tmp_path / 'kernels.jsonl'} --minutes 1.4" in commands[2]
    assert "--methods dense,todo,tome --size 1024 --size 2048" in commands[3]
    assert "--methods dense,dato,deepcache --calls 50 --size 512" in commands[4]
    assert "--methods dense,todo+dato --calls 50 --rounds 1 --size 2048" in commands[5]
    assert "--methods dense,todo --model sdxl --size 2048" in commands[6]
    assert "--methods dense,todo --compile --size 1024" in commands[7]
    assert "-m gpu" in commands[8]
    assert commands[9].startswith("compute-sanitizer ") and commands[9].endswith(commands[0])
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert len(gpu.steps("cuda", tmp_path, sys.path)) == 9


def test_the_files_of_the_steps_need_no_package_that_a_bare_machine_lacks(tmp_path):
    """All of them in one process: it starts slowly."""
    commands = [step.command(9) for step in gpu.steps("cuda", tmp_path, sys.path)]
    files = [name for command in commands if "pytest" in command for name in command if name.startswith("tests/")]
    assert len(files) >= 5
    collect_without("psutil", "transformers", "accelerate", "peft", "tokenizers", "skimage", "rich", files=files)


def collect_without(*hidden, files):
    """Collect the tests of ``files`` as if the packages ``hidden`` were not installed."""
    options = ["-q", "-p", "no:xdist", "-p", "no:timeout", "-p", "no:cacheprovider", "--collect-only", *files]
    code = f"import sys; sys.modules.update(dict.fromkeys({hidden!r}))\n"
    code += f"import pytest; sys.exit(pytest.main({options!r}))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=gpu.ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-2000:]


def test_the_other_settings_in_place_of_the_benchmarks(tmp_path):
    steps = gpu.steps("cuda", tmp_path, sys.path, tune=True)
    doctor, settings, candidates = (" ".join(step.command(300)) for step in steps)
    assert doctor.endswith("todo_attn.cli doctor")
    assert f"benchmarks.tune --device cuda --out {tmp_path / 'tune.jsonl'} --minutes 4.00" in settings
    assert candidates == settings.replace("benchmarks.tune", "benchmarks.experiments.hopper.tune")


def test_tests_run_without_what_a_bare_machine_lacks(tmp_path):
    """One file that needs more than pytest, torch and Triton would end the collection of all."""
    steps = {step.name: " ".join(step.command(9)) for step in gpu.steps("cuda", tmp_path, [])}
    gpu_tests = [command for command in steps.values() if " pytest " in command]
    assert len(gpu_tests) == 2
    for command in gpu_tests:
        assert "--continue-on-collection-errors" in command
        assert " -n " not in command and "tests/diffusers" not in command
    with_diffusers = [" ".join(step.command(9)) for step in gpu.steps("cuda", tmp_path, sys.path)]
    assert any("tests/diffusers" in command for command in with_diffusers)
    collect_without("psutil", "diffusers", "transformers", files=["tests/ops", "tests/csrc"])


def test_wheels_go_into_a_folder_of_their_own(tmp_path):
    wheels, target = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    assert gpu.install(wheels, target, tmp_path / "log") == f"no wheels in {wheels}"
    with zipfile.ZipFile(wheels / "todo_test_wheel-1.0-py3-none-any.whl", "w") as wheel:
        folder = "todo_test_wheel-1.0.dist-info"
        wheel.writestr("todo_test_wheel.py", "VALUE = 1\n")
        wheel.writestr(f"{folder}/METADATA", "Metadata-Version: 2.1\nName: todo-test-wheel\nVersion: 1.0\n")
        wheel.writestr(
            f"{folder}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{folder}/RECORD", "")
    assert gpu.install(wheels, target, tmp_path / "log") is None
    assert (target / "todo_test_wheel.py").exists()
    assert gpu.environment_in(tmp_path)["PYTHONPATH"].split(os.pathsep)[0] == str(target)
    assert gpu.install(None, target, tmp_path / "log") is None


def test_all_of_it_with_steps_that_do_little(tmp_path, monkeypatch, capsys):
    sides = [harness.Measured(harness.Candidate(name, print), [1.0]) for name in ("torch", "todo")]
    (row,) = harness.compare("gather", CASE.describe(), {"device": "none"}, sides)
    write = f"open('kernels.jsonl', 'a').write({json.dumps(row)!r} + chr(10))"
    out = tmp_path / "deep" / "out"
    steps = [
        python(f"import os; os.chdir({str(out)!r}); {write}", name="good", log="kernels.log"),
        python("print('no such module'); raise SystemExit(1)", name="bad", log="unet.log"),
    ]
    monkeypatch.setattr(gpu, "steps", lambda device, out, path, tune: steps)
    assert gpu.main(["--device", "cpu", "--minutes", "1", "--out", str(out)]) == 1
    text = (out / "summary.txt").read_text()
    assert "good: done" in text and "bad: failed: no such module" in text
    assert "sd15 96x64 level 1, batch 2, fp32" in text
    assert text in capsys.readouterr().out


def test_a_dry_run_runs_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert gpu.main(["--minutes", "9", "--out", str(out), "--dry-run"]) == 0
    assert not out.exists()
    seconds = [int(line.split()[0]) for line in capsys.readouterr().out.splitlines() if not line.startswith("  " * 4)]
    assert sum(seconds) == pytest.approx(9 * 60 - gpu._TABLE_SECONDS, abs=4)


@pytest.mark.parametrize("minutes", ["0.1", "nan"])
def test_too_little_time_is_refused(tmp_path, capsys, minutes):
    with pytest.raises(SystemExit):
        gpu.main(["--minutes", minutes, "--out", str(tmp_path)])
    assert f"--minutes must be more than 0.33, got {minutes}" in capsys.readouterr().err


def test_nothing_is_measured_without_a_gpu_or_a_commit(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(out)])
    assert "--device cuda needs a GPU" in capsys.readouterr().err
    monkeypatch.setattr("todo_attn.machine.commit", lambda: None)
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--out", str(out)])
    assert "give it as GIT_COMMIT" in capsys.readouterr().err
    assert not out.exists()
