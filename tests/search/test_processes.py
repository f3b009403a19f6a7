"""Several processes, and one that is killed. They are forked: a fresh one would import torch for seconds."""

import json
import multiprocessing
import os
import signal
import socket
import time

import pytest

pytest.importorskip("pymoo")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
PATIENCE = 300  # seconds, on a loaded machine


def points_of(found):
    return [(point.key, point.fidelity, point.cost, point.generation) for point in found.points]


def in_process(rank, world, port, searched, answers):
    from accelerate import PartialState

    from todo_attn.compare.workers import Workers

    PartialState._reset_state()
    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = str(rank)
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    found = searched("shared", workers=Workers.joined("cpu"))
    answers.put((rank, points_of(found)))


def test_two_processes_find_what_one_finds(whole, searched, tmp_path):
    one, folder = whole
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = FORK.Queue()
    both = [FORK.Process(target=in_process, args=(rank, 2, port, searched, answers), daemon=True) for rank in (0, 1)]
    for process in both:
        process.start()
    found = dict(answers.get(timeout=PATIENCE) for _ in both)
    for process in both:
        process.join(PATIENCE)
        assert process.exitcode == 0
    assert found == {0: points_of(one), 1: points_of(one)}
    for name in ("front.json", "search.json", "schedules/front-01.json"):
        assert (folder / name).read_bytes() == (tmp_path / "shared" / name).read_bytes()


def test_a_killed_search_goes_on_to_the_same_front(whole, searched, tmp_path):
    found, folder = whole
    checkpoint = tmp_path / "killed" / "checkpoint.json"

    def known():
        return len(json.loads(checkpoint.read_text())["candidates"]) if checkpoint.exists() else 0

    child = FORK.Process(target=searched, args=("killed",), daemon=True)
    child.start()
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and known() < 6:
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.join(PATIENCE)
    assert child.exitcode == -signal.SIGKILL
    assert 6 <= known() < len(found.points)
    assert points_of(searched("killed")) == points_of(found)
    for name in ("front.json", "schedules/front-01.json"):
        assert (folder / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
