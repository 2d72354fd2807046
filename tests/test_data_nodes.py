"""A resident cohort on a cluster that loses the node it lies on: its blocks are read again from the shards."""

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from rich.console import Console
from small_cohort import write_small_cohort

from distributed.batches import resident
from distributed.batches.in_process import bytes_of_a_volume
from distributed.batches.resident import Resident
from distributed.slots.cluster import connect

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
MEMORY = 80_000_000


def test_blocks_that_went_with_their_node_are_read_again(tmp_path, monkeypatch):
    cohort = write_small_cohort(tmp_path / "cohort", subjects=400)
    # large enough not to be kept in the driver's own memory, as objects below 100 kB are
    monkeypatch.setattr(resident, "BLOCK_BYTES", 50 * bytes_of_a_volume(cohort))
    head = {"num_cpus": 0, "object_store_memory": MEMORY, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        lost = cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
        with connect(cluster.address, Console(quiet=True)):
            held = Resident.of(cohort)
            ray.get(held.references[0])  # one copy lies on the head now
            cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
            cluster.remove_node(lost, allow_graceful=False)
            rows = np.array([399, 0, 60, 61, 200])
            np.testing.assert_array_equal(held.read(rows).astype(np.float32), cohort.read(rows))
    finally:
        cluster.shutdown()
