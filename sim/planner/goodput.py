"""The run, not only the step: failures, checkpoints, restarts, spare nodes, stragglers.

A cluster of N GPUs in n nodes is interrupted at the rate  1/M = N / (MTBF of a GPU) + n / (MTBF of a node's rest).
After an interruption the job waits for detection and the restart (R together), perhaps for a node (W on average; it
does not fail meanwhile), and does again what it had done since the last checkpoint. A checkpoint every tau seconds of
work takes delta. Expected interruptions F and wall time:

    F = e^(R/M) (e^((tau + delta)/M) - 1) T_work / tau        T_wall = F (M + W)

Source: Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22 (2006), eq. 20.
Its minimum is near tau = sqrt(2 delta M) - delta (Young, CACM 17 (1974), first order; Daly's eq. 37 is the higher one).

Stragglers: what GPUs of one kind differ is in the step's time (``sim/cost/spread.py``). Beyond that, if a plan says so,
all wait for the slowest of N GPUs whose speeds are normal with standard deviation s: a step is longer by s times the
expected largest of N standard normals.

Leaves out: several nodes failing at once, checkpoints that fail, work that goes on at a smaller size meanwhile.
Checked by: sim/engine/outages.py, which simulates the same run event by event.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, expm1, sqrt

from sim.cost.spread import expected_largest
from sim.engine.outages import RunSettings, simulate_run
from sim.planner.schema import Plan, Site

ENOUGH_SPARES = 0.99
"""Share of failures at which a spare node stands ready, where the planner chooses their number."""


@dataclass(frozen=True, slots=True)
class Reliability:
    """How a cluster fails and goes on.

    ``mtbf_s`` between interruptions of the job; ``recovery_s`` to detect one and restart, ``waiting_s`` for a node on
    average; ``checkpoint_s`` of a checkpoint, every ``interval_s`` of work.
    """

    mtbf_s: float
    recovery_s: float
    waiting_s: float
    checkpoint_s: float
    interval_s: float
    spare_nodes: int
    straggler_factor: float

    def expected_s(self, work_s: float) -> float:
        """Return the expected wall time of so much work."""
        return expected_s(work_s, self.mtbf_s, self.recovery_s, self.checkpoint_s, self.interval_s, self.waiting_s)


def expected_s(
    work_s: float, mtbf_s: float, recovery_s: float, checkpoint_s: float, interval_s: float, wait_s: float = 0.0
) -> float:
    """Return Daly's expected wall time, waits for nodes added. One interval at least is worked through."""
    interval_s = min(interval_s, work_s) or 1e-9
    grown = expm1(min(500.0, (interval_s + checkpoint_s) / mtbf_s))
    return (mtbf_s + wait_s) * exp(min(500.0, recovery_s / mtbf_s)) * grown * work_s / interval_s


def young_s(mtbf_s: float, checkpoint_s: float) -> float:
    """Return Young's optimal interval of work between checkpoints, to first order: sqrt(2 delta M)."""
    return sqrt(2 * checkpoint_s * mtbf_s)


def daly_s(mtbf_s: float, checkpoint_s: float) -> float:
    """Return Daly's optimal interval, to higher order (eq. 37); M itself where checkpoints take longer than 2 M."""
    if checkpoint_s >= 2 * mtbf_s:
        return mtbf_s
    x = checkpoint_s / (2 * mtbf_s)
    return sqrt(2 * checkpoint_s * mtbf_s) * (1 + sqrt(x) / 3 + x / 9) - checkpoint_s


def straggler_factor(num_gpus: int, spread: float) -> float:
    """Return how much longer all take that wait for the slowest of so many."""
    if num_gpus <= 1 or not spread:
        return 1.0
    return 1.0 + spread * expected_largest(num_gpus)


def spares_for(failures_per_s: float, repair_s: float) -> int:
    """Return the spare nodes with which a failure finds one ready in 99 of 100 cases.

    Nodes under repair at one time are Poisson with mean rate * repair time (an M/G/infinity queue).
    """
    mean, spares = failures_per_s * repair_s, 0
    term = total = exp(-min(700.0, mean))
    while total < ENOUGH_SPARES and spares < 10_000:
        spares += 1
        term *= mean / spares
        total += term
    return spares


def waiting_s(failures_per_s: float, repair_s: float, spares: int) -> float:
    """Return the mean wait for a node at a failure: none where a spare is ready, else for the next repair.

    The job stands still without enough nodes, so at most all spares are away when one more fails: with the probability
    that Erlang's loss formula gives (Poisson, cut off at the spares). The next of spares + 1 comes back after
    repair / (spares + 1) on average.
    """
    mean = failures_per_s * repair_s
    blocked = 1.0
    for servers in range(1, spares + 1):
        blocked = mean * blocked / (servers + mean * blocked)
    return blocked * repair_s / (spares + 1)


def reliability(plan: Plan, site: Site, num_gpus: int) -> Reliability:
    """Return how a cluster of a plan fails and goes on."""
    failures, storage = plan.failures, plan.storage
    nodes = -(-num_gpus // site.node.num_gpus)
    rate = num_gpus / failures.gpu_mtbf_s + nodes / failures.node_mtbf_s
    spares = failures.spare_nodes if failures.spare_nodes is not None else spares_for(rate, failures.repair_s)
    checkpoint_s = (
        plan.num_parameters
        * storage.bytes_per_parameter
        / min(nodes * storage.write_bytes_per_s_per_node, storage.write_bytes_per_s)
    )
    return Reliability(
        mtbf_s=1 / rate,
        recovery_s=failures.detect_s + failures.restart_s,
        waiting_s=waiting_s(rate, failures.repair_s, spares),
        checkpoint_s=checkpoint_s,
        interval_s=failures.checkpoint_interval_s or max(1.0, daly_s(1 / rate, checkpoint_s)),
        spare_nodes=spares,
        straggler_factor=straggler_factor(num_gpus, failures.gpu_spread),
    )


MAX_FAILURES = 20_000
"""Failures that are simulated for one distribution: of very large clusters fewer runs are drawn."""
LEAST_REPLICAS = 40


@dataclass(frozen=True, slots=True)
class Distribution:
    """Wall times of simulated runs, and where the mean run's time goes (the parts add up to ``mean_s``)."""

    p10_s: float
    p50_s: float
    p90_s: float
    mean_s: float
    work_s: float
    checkpoints_s: float
    lost_s: float
    down_s: float
    failures: float
    """Of a run, on average."""
    replicas: int
    by_deadline: float | None
    """Share of the runs that end by the deadline; None without one."""


def distribution(plan: Plan, reliable: Reliability, work_s: float) -> Distribution:
    """Return how long the training takes, simulated event by event; ``work_s`` with stragglers."""
    failures = plan.failures
    settings = RunSettings(
        work_s=work_s,
        failures_per_s=1 / reliable.mtbf_s,
        checkpoint_s=reliable.checkpoint_s,
        interval_s=min(reliable.interval_s, work_s),
        detect_s=failures.detect_s,
        restart_s=failures.restart_s,
        repair_s=failures.repair_s,
        spare_nodes=reliable.spare_nodes,
    )
    expected = max(1.0, work_s / reliable.mtbf_s)
    replicas = max(LEAST_REPLICAS, min(failures.replicas, int(MAX_FAILURES / expected)))
    runs = [simulate_run(settings, failures.seed * 1_000_003 + number) for number in range(replicas)]
    walls = sorted(run.wall_s for run in runs)
    deadline = plan.goal.deadline_s

    def mean(values: list[float]) -> float:
        return sum(values) / replicas

    return Distribution(
        p10_s=_quantile(walls, 0.1),
        p50_s=_quantile(walls, 0.5),
        p90_s=_quantile(walls, 0.9),
        mean_s=mean(walls),
        work_s=mean([run.work_s for run in runs]),
        checkpoints_s=mean([run.checkpoints_s for run in runs]),
        lost_s=mean([run.lost_s for run in runs]),
        down_s=mean([run.down_s for run in runs]),
        failures=mean([float(run.num_failures) for run in runs]),
        replicas=replicas,
        by_deadline=None if deadline is None else sum(wall <= deadline for wall in walls) / replicas,
    )


def _quantile(ascending: list[float], share: float) -> float:
    """Return the value below which a share of the values lies, between two of them linearly."""
    at = share * (len(ascending) - 1)
    low = int(at)
    high = min(low + 1, len(ascending) - 1)
    return ascending[low] + (ascending[high] - ascending[low]) * (at - low)
