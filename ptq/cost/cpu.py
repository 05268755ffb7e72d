"""What a run takes on a CPU, roughly.

Nearly all of it is the search for scales in plain torch, which goes by weights; the rest goes by operations.
"""

from ptq.cost.shape import Shape, operations
from ptq.run.plan import Plan

RATE = 80e9
"""float32 operations a second of one core."""
SECONDS_A_WEIGHT = {"absmax": 2.5e-6, "mse": 5e-6, "local": 6.4e-6, "schur": 6.4e-6, "joint": 16e-6}
"""Of one core, by scale rule, NVFP4; with RATE measured on two layers of SmolLM2-135M's shape, 2048 and 16384 tokens, torch
2.13, two cores shared with others, CPU time.  They give 415 s for the demo, which took 419 s."""


def cpu_seconds(shape: Shape, plan: Plan, threads: int) -> float:
    """On `threads` cores.  Expect it to be off by a factor of two: CPUs differ, and so do formats."""
    searched = sum(SECONDS_A_WEIGHT[plan.recipes[name].rule] * d_out * d_in for name, (d_out, d_in) in plan.linears.items())
    return (searched + sum(operations(shape).values()) / RATE) / threads
