"""Hosts on one machine, for benchmarks: network namespaces behind a switch that limits their links or delays frames.

    with Hosts(4, rate="500mbit") as hosts:
        subprocess.run(hosts.command(0, ["ping", "-c", "1", hosts.addresses[3]]))

Without a delay the switch is the kernel's bridge and the limits are the kernel's (tbf): exact, and they cost little.
With one it is a small program (switch.c, compiled at the start), since few kernels on virtual machines have netem. A
limit holds in both directions, for each host's link. Needs Linux, root, iproute2, util-linux, and a C compiler for
delays. All names begin with ``distloop-`` and the process's number; what a killed run left behind is removed at the
start of the next.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

NAMESPACES, SETTINGS = Path("/run/netns"), Path("/etc/netns")
BURST = "128kb"  # as large as the largest frame that the kernel hands over in one piece, twice
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_numbers = itertools.count()


class Unavailable(Exception):  # noqa: N818 (no error: the caller says so and goes on)
    """There can be no emulated hosts here; says why."""


class Hosts:
    """``count`` hosts; ``rate`` is that of each one's link, ``delay_ms`` that between any two, one way.

    Raises:
        Unavailable: on entering, if they cannot be made here.
    """

    def __init__(self, count: int, *, rate: str | None = None, delay_ms: float = 0.0):
        self.count, self._rate, self._delay_ms = count, rate, delay_ms
        self._name = f"distloop-{os.getpid()}-{next(_numbers)}"
        self._hosts = [f"{self._name}-h{i}" for i in range(count)]
        self._delays = delay_ms > 0
        self._switch: subprocess.Popen[str] | None = None
        self.addresses = [f"10.77.0.{i + 1}" for i in range(count)]

    def __enter__(self) -> Hosts:
        check(compiler=self._delays)
        remove_leftovers()
        try:
            _run("ip", "netns", "add", self._name)
            for namespace in self._hosts:
                _run("ip", "netns", "add", namespace)
            if self._delays:
                self._start_switch()
            else:
                _ip(self._name, "link add bridge type bridge", "link set bridge up")
            for i, namespace in enumerate(self._hosts):
                self._connect(i, namespace)
            self.shape(self._rate, self._delay_ms)
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.remove()

    def command(self, host: int, argv: Sequence[str]) -> list[str]:
        """Return the command that runs ``argv`` on a host, under a host name of its own; the process stays the same."""
        rename = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', f"h{host}"]
        return ["ip", "netns", "exec", self._hosts[host], *rename, *argv]

    def shape(self, rate: str | None = None, delay_ms: float = 0.0) -> None:
        """Change the network under the running hosts; a delay can only be changed where there was one at the start."""
        if delay_ms and not self._delays:
            raise ValueError("these hosts were made without a delay: the kernel's bridge has none")
        for i, namespace in enumerate(self._hosts):
            _limit(namespace, "eth0", rate)
            if not self._delays:
                _limit(self._name, f"port{i}", rate)
        if self._delays:
            self._tell_switch(f"delay {delay_ms * 1000:.0f}")
            self._tell_switch(f"rate {bits_per_second(rate) if rate else 0:.0f}")

    def namespace(self, host: int) -> str:
        """Return the name of a host's network namespace."""
        return self._hosts[host]

    def cut(self, host: int) -> None:
        """Unplug a host: nothing passes, and no connection is reset; hosts with delays cannot be."""
        _ip(self._name, f"link set port{host} down")

    def heal(self, host: int) -> None:
        """Plug it in again."""
        _ip(self._name, f"link set port{host} up")

    def remove(self) -> None:
        """Remove everything, with the processes that still run there."""
        if self._switch is not None:
            self._switch.kill()
            self._switch.communicate()
        for namespace in [*self._hosts, self._name]:
            _remove(namespace)

    def _connect(self, i: int, namespace: str) -> None:
        settings = SETTINGS / namespace
        settings.mkdir(parents=True)
        # Names, and the names of addresses, come from this file at once, not from a server that cannot be reached.
        names = [f"{address} h{j}" for j, address in enumerate(self.addresses)]
        (settings / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names]) + "\n")
        (settings / "nsswitch.conf").write_text("hosts: files\n")
        if self._delays:
            _ip(self._name, f"link set port{i} netns {namespace}")
            _ip(namespace, f"link set port{i} name eth0")
        else:
            _ip(
                self._name,
                f"link add port{i} type veth peer name eth0 netns {namespace}",
                f"link set port{i} master bridge up",
            )
        _ip(
            namespace,
            "link set lo up",
            f"link set eth0 address 02:00:00:00:00:{i:02x} up",
            f"addr add {self.addresses[i]}/24 dev eth0",
        )

    def _start_switch(self) -> None:
        with tempfile.TemporaryDirectory() as folder:  # a program that runs needs no file
            program = str(Path(folder) / "switch")
            _run("cc", "-O2", "-o", program, str(Path(__file__).parent / "switch.c"))
            self._switch = subprocess.Popen(
                ["ip", "netns", "exec", self._name, program, "port", str(self.count)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                bufsize=1,
                start_new_session=True,  # Ctrl-C is for the benchmark, which then removes this
            )
            self._expect("ready")

    def _tell_switch(self, command: str) -> None:
        assert self._switch is not None and self._switch.stdin is not None
        self._switch.stdin.write(f"{command}\n")
        self._expect("ok")

    def _expect(self, answer: str) -> None:
        assert self._switch is not None and self._switch.stdout is not None and self._switch.stderr is not None
        if self._switch.stdout.readline().strip() != answer:
            self._switch.kill()
            raise Unavailable(f"the switch failed: {self._switch.stderr.read().strip() or 'no reason given'}")


def check(*, compiler: bool) -> None:
    """Raise if something is missing that emulated hosts need."""
    if sys.platform != "linux":
        raise Unavailable(f"emulated hosts need Linux, this is {sys.platform}")
    if os.geteuid() != 0:
        raise Unavailable("emulated hosts need root")
    tools = ["ip", "tc", "unshare", "hostname", *(["cc"] if compiler else [])]
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        raise Unavailable(f"emulated hosts need the command {missing[0]}")
    if compiler and not Path("/dev/net/tun").exists():
        raise Unavailable("delays need /dev/net/tun")


def remove_leftovers() -> None:
    """Remove what runs left behind whose process is gone."""
    for folder in (NAMESPACES, SETTINGS):
        for path in sorted(folder.glob("distloop-*")):
            owner = re.match(r"distloop-(\d+)-", path.name)
            if owner is not None and not Path(f"/proc/{owner[1]}").exists():
                _remove(path.name)


def bits_per_second(rate: str) -> float:
    """Return ``rate``, written as tc does, as a number."""
    number, unit = re.fullmatch(r"([\d.]+)([kmg]bit)", rate).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit]


def _limit(namespace: str, device: str, rate: str | None) -> None:
    if rate is None:
        with suppress(Unavailable):  # there may be no limit
            _run("tc", "-n", namespace, "qdisc", "del", "dev", device, "root")
    else:
        limit = ["tbf", "rate", rate, "burst", BURST, "latency", "100ms"]
        _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *limit)


def _remove(namespace: str) -> None:
    if (NAMESPACES / namespace).exists():
        with suppress(Unavailable):
            for pid in _run("ip", "netns", "pids", namespace).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _run("ip", "netns", "del", namespace)
    shutil.rmtree(SETTINGS / namespace, ignore_errors=True)


def _ip(namespace: str, *commands: str) -> None:
    """Run commands of ip in a namespace."""
    for command in commands:
        _run("ip", "-n", namespace, *command.split())


def _run(*argv: str) -> str:
    ended = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60)
    if ended.returncode:
        reason = (ended.stderr.strip().splitlines() or [f"it ended with {ended.returncode}"])[0]
        raise Unavailable(f"{' '.join(argv)}: {reason}")
    return ended.stdout
