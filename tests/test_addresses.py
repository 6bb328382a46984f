"""Where ranks meet, and by which interface: pure where it can be, real sockets on loopback where not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from typing import Any

import pytest

from distloop.errors import WorldError
from distloop.master import Master, first_host
from distloop.transports import addresses, listening
from distloop.transports.addresses import interface_of, own_address, resolve, source_address
from distloop.world import World

BARE = {"MASTER_ADDR": "h0", "MASTER_PORT": "29500"}
SLURM = {"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "gpu[07-09,12]-ib,login"}


@pytest.mark.parametrize(
    ("launcher", "environment", "master"),
    [
        ("torchrun", BARE, Master("h0", (29500,))),
        ("torchrun", BARE | {"MASTER_ADDR": " [::1]"}, Master("::1", (29500,))),
        ("torchrun", BARE | {"TORCHELASTIC_RUN_ID": "none"}, Master("h0", (29500,))),
        (
            "torchrun",
            BARE | {"TORCHELASTIC_RUN_ID": "a1", "TORCHELASTIC_RESTART_COUNT": "2"},
            Master("h0", (29500,), "torchrun a1", 2),
        ),
        ("Open MPI", BARE | {"PMIX_NAMESPACE": "prterun-7"}, Master("h0", (29500,), "Open MPI prterun-7")),
        ("Slurm", SLURM | BARE, Master("h0", (29500,), "Slurm 17.2, start 0")),
        ("Slurm", SLURM | {"MASTER_PORT": "1"}, Master("gpu07-ib", (1,), "Slurm 17.2, start 0")),
    ],
)
def test_where_rank_0_answers(launcher: str, environment: dict[str, str], master: Master) -> None:
    assert Master.from_environment(World(0, 2, 0, 1, launcher), environment) == master


def test_steps_of_slurm_meet_at_ports_of_their_own() -> None:
    world = World(0, 2, 0, 1, "Slurm")
    one, again = (Master.from_environment(world, SLURM | {"SLURM_PROCID": rank}) for rank in "01")
    other = Master.from_environment(world, SLURM | {"SLURM_STEP_ID": "3"})
    assert one == again and len(set(one.ports)) == 8 and not set(one.ports) & set(other.ports)
    assert all(15000 <= port < 30000 for port in one.ports)


@pytest.mark.parametrize("port", ["0", "65536", "-1", "abc", "2950٣", "9" * 50])
def test_a_port_that_is_none(port: str) -> None:
    with pytest.raises(WorldError, match=r"MASTER_PORT='.*' is no port: it must be a number from 1 to 65535"):
        Master.from_environment(World(0, 2), BARE | {"MASTER_PORT": port})


@pytest.mark.parametrize(
    ("environment", "missing"),
    [
        ({}, "MASTER_ADDR and MASTER_PORT is"),
        ({"MASTER_ADDR": "h0"}, "MASTER_PORT is"),
        ({"MASTER_PORT": "1"}, "ADDR is"),
    ],
)
def test_what_is_missing_is_named(environment: dict[str, str], missing: str) -> None:
    with pytest.raises(WorldError, match=missing):
        Master.from_environment(World(0, 2, launcher="torchrun"), environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("x,y[1-2]", "x"), ("gpu[07-09,12]-ib,login", "gpu07-ib"), ("a[1-2]b[3-4]", "a1b3"), ("", "")],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_name_that_does_not_resolve_is_given_time_and_named() -> None:
    begun = time.monotonic()
    with pytest.raises(
        WorldError, match=r"MASTER_ADDR='no-host.invalid' does not resolve on .*: .*; give a name or an"
    ):
        resolve("no-host.invalid", 0.6)
    assert 0.1 < time.monotonic() - begun < 5
    with pytest.raises(WorldError, match="does not resolve"):
        resolve("ü" * 70, 5)


def test_a_resolver_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*what: Any, **more: Any) -> list[Any]:
        time.sleep(5)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with pytest.raises(WorldError, match=r"no answer within 0\.1 s"):
        resolve("slow", 0.1)


def test_ipv4_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(0, 0, 0, "", (address, 0)) for address in ("::1", "10.0.0.2", "10.0.0.2")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *what, **more: found)
    assert resolve("both") == ["10.0.0.2", "::1"]


def test_the_interface_leads_to_the_master(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(addresses, "resolve", lambda name: ["10.1.0.9"])
    monkeypatch.setattr(
        addresses, "source_address", lambda towards: "10.1.0.1" if towards == "10.1.0.9" else "10.2.0.1"
    )
    assert own_address("h9") == "10.1.0.1"
    # On the master's own host its name may be loopback (127.0.1.1): then it is the way out.
    monkeypatch.setattr(addresses, "resolve", lambda name: ["127.0.1.1"])
    monkeypatch.setattr(addresses, "source_address", lambda t: "127.0.0.1" if t.startswith("127") else "10.2.0.1")
    assert own_address("h0") == "10.2.0.1"
    monkeypatch.setattr(addresses, "source_address", lambda towards: "127.0.0.1" if towards.startswith("127") else "")
    with pytest.raises(WorldError, match=r"no network interface leads from .* to other hosts \(MASTER_ADDR='h0' is an"):
        own_address("h0")
    monkeypatch.setattr(addresses, "source_address", lambda towards: "")
    monkeypatch.setattr(addresses, "resolve", lambda name: ["10.1.0.9"])
    with pytest.raises(WorldError, match=r"\(there is no route to MASTER_ADDR='h9', 10\.1\.0\.9\), and"):
        own_address("h9")


def test_a_chosen_interface_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "with_addresses", lambda: {"eth0": ["10.0.0.1"], "ib0": ["10.1.0.1", "10.1.0.2"]})
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert own_address("anything") == "10.1.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    with pytest.raises(WorldError, match=r"GLOO_SOCKET_IFNAME='eth9' is no interface .* \(there are: eth0, ib0\)"):
        own_address("anything")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    assert interface_of("10.1.0.2") == "ib0" and interface_of("10.9.0.1") == ""
    addresses.use_interface("10.1.0.2")
    assert os.environ.pop("GLOO_SOCKET_IFNAME") == "ib0"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0,eth0")  # torch takes a list
    assert own_address("anything") == "10.1.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0,eth9")
    with pytest.raises(WorldError, match="GLOO_SOCKET_IFNAME='eth9' is no"):
        own_address("anything")


def test_the_interface_that_we_told_gloo_is_no_choice_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "with_addresses", lambda: {"eth0": ["10.0.0.1", "fd00::1"], "ib0": ["10.1.0.1"]})
    monkeypatch.setattr(addresses, "resolve", lambda name: [name])
    monkeypatch.setattr(addresses, "source_address", lambda towards: "fd00::1" if ":" in towards else "10.1.0.1")
    monkeypatch.setattr(addresses, "_own", addresses._Own())
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    for master, address, interface in (("fd00::9", "fd00::1", "eth0"), ("10.1.0.9", "10.1.0.1", "ib0")):
        for _ in range(2):
            assert own_address(master) == address
            addresses.use_interface(address)
            assert os.environ["GLOO_SOCKET_IFNAME"] == interface
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    addresses.use_interface("10.1.0.1")
    assert own_address("fd00::9") == "10.0.0.1" and os.environ["GLOO_SOCKET_IFNAME"] == "eth0"


def test_real_addresses() -> None:
    assert source_address("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1") in ("lo", "lo0")
    assert resolve("127.0.0.1") == ["127.0.0.1"]


def master(address: str, port: int = 29500, **more: Any) -> Master:
    return Master(address, (port,), **more)


@pytest.mark.parametrize(
    ("world", "address", "resolved", "where", "here"),
    [
        (World(0, 2, 0, 2), "h0", ["10.0.0.1"], ["127.0.0.1"], True),  # nobody else is to reach it
        (World(0, 2, 0, 2), "::1", ["::1"], ["::1"], True),
        (World(0, 2, 0, 1), "h0", ["10.0.0.1", "fd00::1"], ["10.0.0.1", "fd00::1"], False),
        (World(0, 2, 0, 1), "h0", ["127.0.1.1", "10.0.0.1"], ["10.0.0.1"], False),
        (World(0, 2, 0, 1), "h0", ["127.0.1.1"], ["127.0.1.1"], False),  # as Debian resolves a host's own name
        (World(0, 2, 0, 1), "localhost", ["127.0.0.1"], ["127.0.0.1"], False),  # as some operators tell rank 0
        (World(1, 2, 1, 2, host_known=False), "127.0.0.1", ["127.0.0.1"], ["127.0.0.1"], True),
        (World(1, 2, 1, 2, host_known=False), "h0", ["127.0.1.1"], ["127.0.1.1"], False),
        (World(2, 4, 1, 2), "h0", ["127.0.1.1"], ["127.0.1.1"], False),  # on rank 0's host, where ranks are dealt out
    ],
)
def test_where_rank_0_is_looked_for(
    monkeypatch: pytest.MonkeyPatch, world: World, address: str, resolved: list[str], where: list[str], here: bool
) -> None:
    monkeypatch.setattr(listening, "resolve", lambda name: resolved)
    assert listening.addresses_of_master(world, master(address)) == (where, here)


def test_whether_rank_0_is_on_another_host() -> None:
    for launcher, variables in (("torchrun", {"GROUP_RANK": "1"}), ("Slurm", SLURM | {"SLURM_NODEID": "1"})):
        assert Master.from_environment(World(1, 2, 0, 1, launcher), BARE | variables).other_host
    assert not Master.from_environment(World(1, 2, 0, 1, "torchrun"), BARE | {"GROUP_RANK": "0"}).other_host


def test_listeners_close_where_one_address_is_taken() -> None:
    with socket.create_server(("127.0.0.2", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(WorldError, match=rf"127\.0\.0\.2:{port} is in use by process {os.getpid()} \("):
            listening.listen(["127.0.0.1", "127.0.0.2"], master("h0", port))
        with socket.create_server(("127.0.0.1", port)):
            pass  # it is free again


def test_an_address_before_this_host_is_answered_on_all_of_its_own() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    (listener,) = listening.listen(["192.0.2.77"], master("service", port))
    with listener, socket.create_connection(("127.0.0.1", port), 5):
        pass
    with socket.create_server(("", 0)) as taken, pytest.raises(WorldError, match=r"192\.0\.2\.77:\d+ is in use by"):
        listening.listen(["192.0.2.77"], master("service", taken.getsockname()[1]))


def test_the_next_port_is_taken_where_there_is_a_choice() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as free:
        ports = (taken.getsockname()[1], free.getsockname()[1])
        free.close()
        (listener,) = listening.listen(["127.0.0.1"], Master("h0", ports))
        assert listener.getsockname()[1] == ports[1]
        listener.close()


def test_all_addresses_of_an_interface_are_seen() -> None:
    """In a network of its own; who may not make one has the other tests."""
    ask = "import json; from distloop.transports.addresses import *; print(json.dumps(with_addresses()))"
    script = (
        "{ ip link set lo up && ip addr add 10.5.0.1/24 dev lo && ip addr add 10.5.0.2/24 dev lo && "
        'ip addr add 10.5.0.3/24 dev lo label lo:x; } || exit 77; exec "$0" -c "$1"'
    )
    try:
        done = subprocess.run(
            ["unshare", "--map-root-user", "--net", "sh", "-c", script, sys.executable, ask],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if done.returncode == 77 or done.stderr.startswith("unshare"):
        pytest.skip(f"no network can be made here: {done.stderr.strip()}")
    found = json.loads(done.stdout)
    assert found.pop("lo:x") == ["10.5.0.3"]
    (own,) = found.values()
    assert own[:3] == ["127.0.0.1", "10.5.0.1", "10.5.0.2"] and set(own[3:]) <= {"::1"}
