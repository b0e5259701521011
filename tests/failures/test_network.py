"""Two machines, as network namespaces with a cable between them: cut for a moment, and cut for good."""

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest
import torch
from app_tools import final_state, tensors
from failure_tools import Fault, start

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("failures")]
CUT = "sh ip link set host down"
PLUG = "ip link set host up"


def ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], check=False, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """The namespace and the address of each of two machines, as "NAME=ADDRESS"."""
    names = [f"svi-{os.getpid()}-{each}" for each in "ab"]
    if os.geteuid() or not shutil.which("ip") or not all(ip("netns", "add", name) for name in names):
        pytest.skip("needs root that may make network namespaces, and ip (apt-get install iproute2)")
    ip("link", "add", "host", "netns", names[0], "type", "veth", "peer", "name", "host", "netns", names[1])
    addresses = [f"10.213.77.{number}" for number in (1, 2)]
    for name, address in zip(names, addresses):
        ip("-n", name, "address", "add", f"{address}/24", "dev", "host")
        ip("-n", name, "link", "set", "host", "up")
        ip("-n", name, "link", "set", "lo", "up")
    yield [f"{name}={address}" for name, address in zip(names, addresses)]
    for name in names:
        ip("netns", "del", name)


def same_bits(one, other):
    states = (tensors(final_state(each)[0]) for each in (one, other))
    return all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.failure(what="the network is away for a second", lost="nothing")
def test_a_short_cut_does_no_harm(shards, tmp_path, hosts, seen):
    run = start(shards, tmp_path / "run", hosts=hosts, faults=[Fault(1, 20, f"{CUT}; sleep 1; {PLUG}")]).wait()
    assert run.codes == [0, 0], run.said(0) + run.said(1)
    seen("nothing", 0)


@pytest.mark.failure(what="a machine is lost (its network is cut), and comes back", lost="the chunk")
def test_a_lost_machine_is_named_and_the_run_goes_on_when_it_is_back(shards, tmp_path, hosts, seen):
    cut = start(shards, tmp_path / "run", "trainer.timeout=3", hosts=hosts, faults=[Fault(1, 20, CUT)]).wait()
    assert cut.codes == [1, 1], cut.said(0) + cut.said(1)
    assert cut.err(0).startswith("svi train: rank 1 no longer answers within trainer.timeout=: ")
    assert cut.err(1).startswith("svi train: rank 0 no longer answers within trainer.timeout=: ")
    assert int(final_state(cut.folder)[0].step) == 20
    ip("-n", hosts[1].partition("=")[0], *PLUG.split()[1:])
    assert start(shards, cut.folder, hosts=hosts).wait().codes == [0, 0]
    whole = start(shards, tmp_path / "whole", hosts=hosts).wait()
    assert same_bits(cut.folder, whole.folder)
    seen(cut.err(0), 1)
