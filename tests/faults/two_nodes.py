"""A Ray of two nodes on this machine, in a process of its own; the second node can be killed."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 300.0  # seconds until its process has ended


@contextmanager
def two_nodes() -> Iterator[tuple[str, Callable[[], None]]]:
    """Its address, and what kills the node on which no driver runs."""
    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    said = process.stdin

    def kill() -> None:
        print("kill", file=said, flush=True)

    try:
        yield process.stdout.readline().strip(), kill
    finally:
        process.communicate(timeout=PATIENCE)


def main() -> None:
    """Prints the address, does what it is told, and ends with its input."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    for line in sys.stdin:
        if line.strip() == "kill":
            cluster.remove_node(node, allow_graceful=False)
    cluster.shutdown()


if __name__ == "__main__":
    main()
