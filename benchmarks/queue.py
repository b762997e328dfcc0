"""How long a decision of the queue takes: 10,000 runs of 100 users on 1,000 nodes, simulated.

Each call of the queue is timed: for an arrival, an end, a run that made room, and the tick of the
clock. Time passes in the simulation only; what is measured is the scheduler itself, in one thread.
"""

import random
import statistics
import sys
import time
from typing import Any

from benchmarks.harness import Report, Target
from cluster.queue import Queue, QueuedRun
from cluster.room import Shape, Worker
from cluster.shares import Policy, Terms
from tests.support.queue_simulation import Simulation, Work
