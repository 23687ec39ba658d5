"""Room: what the cluster has, what it may become, and which of its nodes are about to go.

Which question it answers: *can this cluster hold the actors asked for, now or ever?* Place in the flow: under
`service.py` and `crew.py`; the only place that reads Ray's private state, since its public API tells neither which
nodes drain nor what the autoscaler may add (Ray 2.60).
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray._private.state import state as _state
from ray.core.generated.common_pb2 import ActorDiedErrorContext

from polyray.config import Execution, PoolConfig
from polyray.text_config import TextExecution

_GIB = 1024**3


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of one kind that the cluster's autoscaler may add."""

    resources: dict[str, float]
    """Of one node."""
    max_nodes: float
    """How many there may be in all; infinite where nothing bounds them."""


@dataclass(frozen=True)
class Fate:
    """What Ray knows of an actor."""

    is_dead: bool
    node_is_going: bool
    """Its node is dead, or was given notice."""


def nodes() -> list[dict[str, float]]:
    """Resources of the cluster's living nodes, but for those that drain."""
    going = draining()
    return [n["Resources"] for n in ray.nodes() if n["Alive"] and n["NodeID"] not in going]


def living() -> set[str]:
    """Ids of the nodes that are alive, as far as Ray has noticed (up to half a minute late)."""
    return {n["NodeID"] for n in ray.nodes() if n["Alive"]}


def draining() -> set[str]:
    """Ids of the nodes that were given notice."""
    return set(_state.get_draining_nodes())


def groups() -> list[NodeGroup]:
    """What the autoscaler may add, as it reports itself; empty on a cluster without one."""
    config = _state.get_cluster_config()
    if config is None:
        return []
    return [
        NodeGroup({k: float(v) for k, v in g.resources.items()}, math.inf if g.max_count < 0 else float(g.max_count))
        for g in config.node_group_configs
    ]


def fate(handle: ray.actor.ActorHandle) -> Fate:
    """What became of an actor that does not answer, as far as Ray has noticed."""
    known = _state.actor_table(handle._actor_id.hex())
    if not known:
        return Fate(is_dead=True, node_is_going=False)
    going = draining()
    on_node = {n["NodeID"]: n["Alive"] and n["NodeID"] not in going for n in ray.nodes()}
    died_with_node = known["DeathCause"].actor_died_error_context.reason == ActorDiedErrorContext.NODE_DIED
    is_going = died_with_node or not on_node.get(known["Address"]["NodeID"], True)
    return Fate(known["State"] == "DEAD", is_going)


def this_machine() -> dict[str, float]:
    """Resources of the one node that a local cluster would have, without starting it."""
    import torch  # here, since a driver has no need of it

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count()), "memory": 0.7 * memory}


def capacity(pool: PoolConfig, nodes: list[dict[str, float]]) -> int:
    """How many actors of a pool fit on nodes of these resources, all of them empty."""
    need = {"CPU": pool.num_cpus, "GPU": pool.num_gpus, "memory": (pool.memory_gb or 0.0) * _GIB}
    return sum(
        int(min(node.get(name, 0.0) / amount + 1e-9 for name, amount in need.items() if amount > 0)) for node in nodes
    )


def most_actors(
    pool: PoolConfig,
    execution: Execution | TextExecution,
    nodes: list[dict[str, float]],
    groups: Sequence[NodeGroup] = (),
) -> int:
    """How many actors of a pool to ask for at most: `max` where it is given, else what may ever fit.

    On a cluster that may grow, asking for more than fits now is what makes it grow.
    """
    fits = _ever(pool, nodes, groups)
    if pool.max is not None and (execution.address or execution.autoscale):
        return pool.max
    return max(pool.min, pool.max or 0 if math.isinf(fits) else int(min(pool.max or fits, fits)))


def at_once(
    pool: PoolConfig,
    execution: Execution | TextExecution,
    nodes: list[dict[str, float]],
    groups: Sequence[NodeGroup] = (),
) -> int:
    """How many actors of a pool can run at the same time, once the cluster has grown: what a chain is cut into."""
    fits = _ever(pool, nodes, groups)
    return pool.max or pool.min if math.isinf(fits) or (execution.autoscale and not groups) else int(fits)


def lacks(
    execution: Execution | TextExecution, nodes: list[dict[str, float]], groups: Sequence[NodeGroup] = ()
) -> list[str]:
    """What the cluster can never satisfy, with the numbers; empty where every pool's minimum fits.

    Args:
        execution: the actors asked for.
        nodes: resources of the nodes that are there.
        groups: what the autoscaler may add; a cluster of which `autoscale` says that it grows lacks nothing.
    """
    problems = []
    pools = {name: value for name, value in execution if isinstance(value, PoolConfig)}
    for kind, pool in pools.items():
        fits = _ever(pool, nodes, groups)
        unbounded = math.isinf(fits) or (execution.autoscale and not groups)
        if unbounded and pool.max is None:
            problems.append(
                f"execution.{kind}: nothing bounds how far the cluster grows. Set execution.{kind}.max to the most "
                "actors that it should have."
            )
        elif not unbounded and fits < pool.min:
            memory = f", {pool.memory_gb:g} GiB memory" if pool.memory_gb else ""
            hint = execution.address and not groups
            may_add = "; ".join(f"{g.max_nodes:g} × {_said(g.resources)}" for g in groups)
            problems.append(
                f"execution.{kind}: {pool.min} actor(s) of {pool.num_cpus:g} CPU, {pool.num_gpus:g} GPU{memory} each "
                f"do not fit; the cluster's nodes have {'; '.join(map(_said, nodes))}"
                f"{', and its autoscaler may have ' + may_add if may_add else ''}, which hold {fits:g}. "
                "Lower min, num_cpus, num_gpus or memory_gb"
                f"{', or set execution.autoscale where the cluster grows on demand.' if hint else '.'}"
            )
    return problems


def _ever(pool: PoolConfig, nodes: list[dict[str, float]], groups: Sequence[NodeGroup]) -> float:
    """How many actors fit on the nodes that are there, or on those that there may be, if that is more."""
    grown = sum((n_fit * g.max_nodes for g in groups if (n_fit := capacity(pool, [g.resources]))), 0.0)
    return max(float(capacity(pool, nodes)), grown)


def _said(node: dict[str, float]) -> str:
    memory = f", {node.get('memory', 0) / _GIB:.1f} GiB memory"
    return ", ".join(f"{node.get(r, 0):g} {r}" for r in ("CPU", "GPU")) + memory
