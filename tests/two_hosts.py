"""distributed.sample() across two hosts made of network namespaces, whose link is cut in the middle.

    sudo env PYTHONPATH=. python tests/two_hosts.py

Run by hand and in CI: it needs Linux, root and `ip`. Each namespace has one end of a veth pair, and a gloo rank. They
sample once, with the bits of one process; then the link goes down while both are in a step, and each rank must raise a
RankError within the process group's timeout and a bound. Exits with 1 where one does not. The namespaces are named by
this process's id, and are deleted at the end.
"""

import contextlib
import datetime
import os
import subprocess
import sys
import tempfile
import time

TIMEOUT = 5.0
#: How long after the cut a rank may take: its step, the timeout, and a busy machine.
BOUND = 3 * TIMEOUT
ADDRESSES = ("10.213.77.1", "10.213.77.2")
PORT = "29477"


def rank(number, folder):
    """One rank, in its namespace."""
    import torch
    import torch.distributed as dist

    from flowmatch_kernels import FlowMatching, KeyedNoise, distributed

    os.environ["GLOO_SOCKET_IFNAME"] = f"veth{number}"
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=TIMEOUT)
    address = f"tcp://{ADDRESSES[0]}:{PORT}"
    dist.init_process_group("gloo", init_method=address, rank=number, world_size=2, timeout=limit)
    fm, keys = FlowMatching((64, 2), num_inference_steps=4), KeyedNoise(3)
    whole = fm.sample(7, field, noise=keys)
    assert torch.equal(distributed.sample(fm, field, 7, noise=keys), whole)
    print(f"rank {number}: the bits of one process", flush=True)
    cut = os.path.join(folder, "cut")

    def model(x, t):
        open(os.path.join(folder, f"rank{number}"), "w").close()
        while not os.path.exists(cut):
            time.sleep(0.02)
        return field(x, t)

    seconds = BOUND
    try:
        distributed.sample(fm, model, 7, noise=keys)
    except distributed.RankError as error:
        seconds = time.time() - os.path.getmtime(cut)
        print(f"rank {number}: RankError {seconds:.1f} s after the cut: {error}", flush=True)
    os._exit(int(seconds >= BOUND))  # without a goodbye over the link


def field(x, t):
    return (3 * x).sin() * t


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True)


@contextlib.contextmanager
def hosts():
    """Two namespaces with a link between them."""
    names = [f"fmk{os.getpid()}-{number}" for number in range(2)]
    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth1", "netns", names[1])
        for number, name in enumerate(names):
            ip("-n", name, "address", "add", f"{ADDRESSES[number]}/24", "dev", f"veth{number}")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", f"veth{number}", "up")
        yield names
    finally:
        for name in made:
            ip("netns", "delete", name)


def main():
    with hosts() as names, tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(["ip", "netns", "exec", name, sys.executable, __file__, "rank", str(number), folder])
            for number, name in enumerate(names)
        ]
        try:
            end = time.monotonic() + 120
            while not all(os.path.exists(os.path.join(folder, f"rank{number}")) for number in range(2)):
                if time.monotonic() > end or any(one.poll() is not None for one in ranks):
                    raise SystemExit("a rank did not come to its first step")
                time.sleep(0.05)
            ip("-n", names[1], "link", "set", "veth1", "down")
            open(os.path.join(folder, "cut"), "w").close()
            statuses = [one.wait(timeout=BOUND + 60) for one in ranks]
        finally:
            for one in ranks:
                one.kill()
    print("statuses:", *statuses)
    return int(any(statuses))


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        rank(int(sys.argv[2]), sys.argv[3])
    sys.exit(main())
