"""How long a decision of the queue takes: 10,000 runs of 100 users on 1,000 nodes, simulated.

Each call of the queue is timed: for an arrival, an end, a run that made room, and the tick of the
clock. Time passes in the simulation only; what is measured is the scheduler itself, in one thread.
"""
