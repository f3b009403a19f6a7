"""A ComfyUI server of one's own: started from a checkout, given workflows over HTTP, and timed by its own messages."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from .workflow import Workflow

_START_TIMEOUT = 300.0


class WorkflowError(RuntimeError):
    """What ComfyUI says of a workflow that it refused or that failed."""


@dataclass(frozen=True)
class Done:
    """One workflow that ran."""

    seconds: dict[str, float]  # of each node that ran
    cpu_seconds: dict[str, float]  # of the server's process in that time, which other processes hardly lengthen
    files: dict[str, list[Path]]  # what each node saved


class Server:
    """A running server, at ``address``, whose files lie in ``base``."""

    def __init__(self, address: str, base: Path, session: aiohttp.ClientSession, process: psutil.Process) -> None:
        self._url, self._base, self._session, self._process = f"http://{address}", base, session, process

    async def nodes(self) -> dict[str, Any]:
        """ComfyUI's description of every node."""
        async with self._session.get(f"{self._url}/object_info") as answer:
            return await answer.json()

    async def run(self, workflow: Workflow) -> Done:
        """Run ``workflow`` (in the API format) to its end.

        Raises:
            WorkflowError: ComfyUI refused it, or a node raised.
        """
        async with self._session.ws_connect(f"{self._url}/ws?clientId=bench", max_msg_size=0) as messages:
            body = {"prompt": workflow, "client_id": "bench"}
            async with self._session.post(f"{self._url}/prompt", json=body) as answer:
                posted = await answer.json()
            if posted.get("node_errors") or "prompt_id" not in posted:
                raise WorkflowError(str(posted.get("node_errors") or posted))
            started: list[tuple[str | None, float, float]] = []
            async for message in messages:
                if message.type != aiohttp.WSMsgType.TEXT:
                    continue
                event = message.json()
                data = event.get("data", {})
                if data.get("prompt_id") != posted["prompt_id"]:
                    continue
                if event["type"] == "execution_error":
                    raise WorkflowError(f"{data['node_type']}: {data['exception_type']}: {data['exception_message']}")
                if event["type"] == "executing":
                    cpu = self._process.cpu_times()
                    started.append((data["node"], time.perf_counter(), cpu.user + cpu.system))
                    if data["node"] is None:
                        break
        between = list(pairwise(started))
        seconds = {one[0]: two[1] - one[1] for one, two in between if one[0]}
        cpu_seconds = {one[0]: two[2] - one[2] for one, two in between if one[0]}
        async with self._session.get(f"{self._url}/history/{posted['prompt_id']}") as answer:
            outputs = (await answer.json())[posted["prompt_id"]]["outputs"]
        folder = self._base / "output"
        files = {
            node: [folder / file["subfolder"] / file["filename"] for kind in saved.values() for file in kind]
            for node, saved in outputs.items()
        }
        return Done(seconds, cpu_seconds, files)


@contextlib.asynccontextmanager
async def serve(comfyui: Path, base: Path) -> AsyncIterator[Server]:
    """Start ``comfyui``'s server on the CPU; its models, custom nodes and output lie in ``base``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "main.py", "--cpu", "--port", str(port), "--base-directory", str(base)]
    command += ["--disable-metadata", "--database-url", "sqlite:///:memory:"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    with open(base / "server.log", "wb") as log:
        process = subprocess.Popen(
            command, cwd=comfyui, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)}
        )
    try:
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            server = Server(f"127.0.0.1:{port}", base, session, psutil.Process(process.pid))
            begin = time.monotonic()
            while True:
                try:
                    await server.nodes()
                    break
                except aiohttp.ClientError:
                    if process.poll() is not None or time.monotonic() - begin > _START_TIMEOUT:
                        raise RuntimeError(f"ComfyUI did not start: see {base / 'server.log'}") from None
                    await asyncio.sleep(1)
            yield server
    finally:
        process.terminate()
        process.wait()
