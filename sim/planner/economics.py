"""From a step to a run: time, money, energy. All grow with the step's time, so a lower bound of it bounds them too.

    wall time  =  steps * step * stragglers / goodput
    money      =  GPUs with spares * price of a GPU-hour * wall time  (+ power and people of what is owned or bought)
    energy     =  PUE * wall time * (GPUs' power + rest of the nodes)

A GPU draws a share of its limit while kernels run and a lower one while it waits or communicates; the share of the
time that kernels run is that of the simulated step (``sim/catalog/running.yaml`` has the shares and their sources).
"""

from __future__ import annotations

from dataclasses import dataclass

from sim.catalog import economy
from sim.planner.goodput import Reliability, reliability
from sim.planner.schema import Plan, Site
from sim.planner.space import Candidate


@dataclass(frozen=True, slots=True)
class Cost:
    """A whole training on one machine. ``time_s`` is its expected wall time, failures and restarts included."""

    time_s: float
    usd: float
    joules: float
    num_gpus: int
    """Without spares."""
    goodput: float
    power_w: float
    """Of the whole cluster while it trains, cooling included."""
    usd_gpus: float
    usd_power: float
    usd_people: float
    usd_storage: float

    def objectives(self) -> tuple[float, float, float, int]:
        """Return what the front is made of: time, money, energy, GPUs. Less is better in each."""
        return self.time_s, self.usd, self.joules, self.num_gpus


class Economics:
    """What a step means for the whole training. Works out the reliability of each cluster once."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        shares = economy.running("power")
        self._compute, self._waiting, self._rest = (
            float(shares[key].text) for key in ("compute", "communication", "rest_of_node")
        )
        self._reliability: dict[tuple[int, int], Reliability] = {}

    def reliability(self, site: int, num_gpus: int) -> Reliability:
        """Return how a cluster fails and goes on."""
        found = self._reliability.get((site, num_gpus))
        if found is None:
            found = self._reliability[site, num_gpus] = reliability(self._plan, self._plan.sites[site], num_gpus)
        return found

    def cost(self, c: Candidate, step_s: float, compute_s: float) -> Cost:
        """Return the cost of the training if a step takes ``step_s``, ``compute_s`` of it in kernels on a mean GPU."""
        plan, site = self._plan, self._plan.sites[c.site]
        reliable = self.reliability(c.site, c.num_gpus)
        steps = plan.workload.num_steps(c.global_batch_size)
        work_s = steps * step_s * reliable.straggler_factor
        wall_s = reliable.expected_s(work_s)
        power_w = self.power_w(site, c.num_gpus, min(1.0, compute_s / step_s)) if step_s else 0.0
        idle_w = self.power_w(site, c.num_gpus, 0.0)
        joules = power_w * work_s + idle_w * (wall_s - work_s)
        paid = self.num_paid(c)
        offer, prices = site.offer, plan.prices
        to_pay = max(0, paid - site.owned_gpus)
        own_power = paid - to_pay if not offer.pays_power else paid
        usd_gpus = to_pay * offer.usd_per_gpu_hour * wall_s / 3600
        usd_power = joules / 3.6e6 * prices.usd_per_kwh * own_power / paid
        usd_people = prices.people_usd_per_s * wall_s
        stored = plan.num_parameters * plan.storage.bytes_per_parameter * plan.storage.kept
        usd_storage = stored * prices.storage_usd_per_byte_s * wall_s
        return Cost(
            time_s=wall_s,
            usd=usd_gpus + usd_power + usd_people + usd_storage,
            joules=joules,
            num_gpus=c.num_gpus,
            goodput=work_s / reliable.straggler_factor / wall_s if wall_s else 1.0,
            power_w=power_w,
            usd_gpus=usd_gpus,
            usd_power=usd_power,
            usd_people=usd_people,
            usd_storage=usd_storage,
        )

    def num_paid(self, c: Candidate) -> int:
        """Return the GPUs that are held for a candidate: its own and those of spare nodes."""
        spare_nodes = self.reliability(c.site, c.num_gpus).spare_nodes
        return c.num_gpus + spare_nodes * min(c.num_gpus, self._plan.sites[c.site].node.num_gpus)

    def power_w(self, site: Site, num_gpus: int, busy: float) -> float:
        """Return the watts of a cluster, cooling included, whose GPUs run kernels for a share ``busy`` of the time."""
        gpu_w = site.gpu.power_w * (self._waiting + (self._compute - self._waiting) * busy)
        rest_w = max(0.0, site.node.power_w - site.node.num_gpus * site.gpu.power_w) * self._rest
        return self._plan.prices.pue * num_gpus * (gpu_w + rest_w / site.node.num_gpus)
