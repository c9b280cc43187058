"""A cluster of several nodes on one machine, as a process that is told what to do by lines.

A process of its own, because a client of Ray in the soak's process would end with the head node.
Each line of the output is a JSON record of a node: address of the cluster, process ids.
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

from ray.cluster_utils import Cluster


def main() -> None:
    """Start a head without CPUs; then a node of so many CPUs for each line that is read."""
    cluster = Cluster(shutdown_at_exit=False)
    address = itertools.count(2)

    def add(num_cpus: int) -> None:
        options: dict[str, Any] = {"include_dashboard": False}
        if cluster.head_node is not None:
            # Each an address of its own: a driver joins any node that has its address, and would
            # die with it. The head keeps the machine's address, and with it the driver.
            options = {"node_ip_address": f"127.0.0.{next(address)}"}
        node = cluster.add_node(num_cpus=num_cpus, **options)
        pids = [process.pid for _, process in node.live_processes()]
        sys.stdout.write(json.dumps({"address": cluster.address, "pids": pids}) + "\n")
        sys.stdout.flush()

    add(0)
    for line in sys.stdin:
        add(int(line))


if __name__ == "__main__":
    main()
