"""Two machines on one: network namespaces joined by a cable that can be pulled; they share the disk."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_PORT = 29400  # of the meeting point; within a namespace nobody else has it


def why_not() -> str | None:
    """Why there can be no namespaces here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the program ip (iproute2)"
    name = f"mae-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode == 0:
        tried = subprocess.run(["ip", "netns", "exec", name, "true"], capture_output=True, text=True, check=False)
        _ip("netns", "delete", name)
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else None


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Node:
    """A namespace with one network card, and the launchers that were started in it."""

    def __init__(self, number: int, logs: Path) -> None:
        self.number = number
        self._logs = logs
        self.name = f"mae-{os.getpid()}-{number}"
        self.card = f"mae{os.getpid()}n{number}"  # 15 letters at most
        self.address = f"10.77.0.{number + 1}"
        self._launchers: list[subprocess.Popen[bytes]] = []

    def launch(self, script: Path, arguments: Sequence[str], restarts: int) -> None:
        """Start torchrun here, with one rank on the CPU; the meeting point is at node 0."""
        self._log = self._logs / f"{self.name}-{len(self._launchers)}.log"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        torchrun += ["--max-restarts", str(restarts), "--rdzv-backend", "c10d", "--rdzv-id", "test"]
        # These namespaces have no names for each other, so that torchrun must be told what it finds out elsewhere.
        is_host = str(self.number == 0).lower()
        torchrun += ["--rdzv-endpoint", f"10.77.0.1:{_PORT}", "--local-addr", self.address]
        torchrun += ["--rdzv-conf", f"is_host={is_host},keep_alive_interval=1,keep_alive_max_attempt=3"]
        variables = {
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else a node that comes back waits in vain for rank 0's address
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": self.card,
        }
        command = ["ip", "netns", "exec", self.name, *torchrun, str(script), *arguments]
        with self._log.open("wb") as log:
            started = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **variables}, start_new_session=True
            )
        self._launchers.append(started)

    def exit_code(self, seconds: float) -> int:
        """Of the newest launcher, which has `seconds` to end."""
        try:
            return self._launchers[-1].wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"node {self.number} still runs:\n{self.output()[-4000:]}") from None

    def output(self) -> str:
        """What the newest launcher and its rank have said."""
        return self._log.read_text(errors="replace")

    def processes(self) -> list[int]:
        """Ids of all processes in this namespace."""
        return _processes_in(self.name)

    def ranks(self, script: Path) -> list[int]:
        """Ids of the processes that run `script` for torchrun, the launcher itself not among them."""
        return [pid for pid in self.processes() if _words_of(pid)[1:3] == ["-u", str(script)]]

    def wait_until_no_rank_runs(self, script: Path, seconds: float) -> None:
        """Fails if there still is one after so many seconds."""
        deadline = time.monotonic() + seconds
        while self.ranks(script):
            assert time.monotonic() < deadline, f"node {self.number} still trains:\n{self.output()[-4000:]}"
            time.sleep(0.1)

    def kill(self) -> None:
        """All processes at once; returns when none is left."""
        _empty(self.name)
        for launcher in self._launchers:
            launcher.wait()

    def set_link(self, is_up: bool) -> None:
        """Plug the cable in, or pull it."""
        _ip("-n", self.name, "link", "set", self.card, "up" if is_up else "down")


@contextmanager
def two_nodes(logs: Path) -> Iterator[tuple[Node, Node]]:
    """Two namespaces joined by a cable; nothing of them is left afterwards."""
    _remove_leftovers()
    nodes = Node(0, logs), Node(1, logs)
    try:
        for node in nodes:
            _ip("netns", "add", node.name)
        first, second = nodes
        _ip("link", "add", first.card, "netns", first.name, "type", "veth",
            "peer", "name", second.card, "netns", second.name)  # fmt: skip
        for node in nodes:
            _ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", node.card)
            _ip("-n", node.name, "link", "set", "lo", "up")
            node.set_link(True)
        yield nodes
    finally:
        for node in nodes:
            if node.name in _names():
                node.kill()
                _ip("netns", "delete", node.name)


def _names() -> list[str]:
    return [line.split()[0] for line in _ip("netns", "list").splitlines()]


def _processes_in(name: str) -> list[int]:
    return [int(word) for word in _ip("netns", "pids", name).split()]


def _empty(name: str) -> None:
    while pids := _processes_in(name):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _remove_leftovers() -> None:
    """Namespaces of tests that were killed themselves."""
    for name in _names():
        owner = re.fullmatch(r"mae-(\d+)-[01]", name)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            _empty(name)
            _ip("netns", "delete", name)


def _words_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:  # it has just ended
        return []
