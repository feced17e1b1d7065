"""The schedules of a ring: what a device computes and sends, step by step."""

from ring_attention.parallel.routes import Route
from ring_attention.parallel.workload import BACK, HOP, Schedule, Step, Workload, later_part


def fixed_schedule(work: Workload, routes: tuple[Route, ...], way: str, backward: bool) -> Schedule:
    """Own keys first, then those of one place more at each hop, along routes that layout and mask decide.

    Backward the own keys are computed in halves: the second one while the first block arrives, the first one while the
    last gradients return. Gradients follow their keys a hop behind.
    """
    last = max((route.hops for route in routes), default=0)
    tokens = [sum(r.stop - r.start for r in routes if r.hops > hop) for hop in range(last + 1)]  # that go on
    keys, gradients = 2 * work.bytes_of(1, work.kv_heads), 2 * work.bytes_of(1, work.kv_heads, 4) * backward
    later = later_part(work) if backward and last else 1.0
    steps = [Step(range(1), later, keys * tokens[0], 0, way)]
    for hop in range(1, last + 1):
        returning = gradients * tokens[hop - 2] if hop > 1 else 0
        steps.append(Step(range(hop, hop + 1), 1.0, keys * tokens[hop], returning, way))
    if backward and last:
        steps.append(Step(range(1), 1 - later, 0, gradients * tokens[last - 1], way))
    return Schedule(work=work, steps=tuple(steps), backward=backward)


def counted_schedule(work: Workload, backward: bool) -> Schedule:
    """Own keys, those that come forth, and those that come back: as `counted_ring` runs it, for `work.hops`.

    Backward, gradients follow their keys a hop behind and are then sent home: on, if one more hop comes full circle,
    else back by powers of two. Beside that nothing is computed, nor beside the first hop back.
    """
    forth, back = work.hops or (0, 0)
    keys = 2 * work.bytes_of(work.shard, work.kv_heads) + work.segment_bytes(work.shard)
    gradients = 2 * work.bytes_of(work.shard, work.kv_heads, 4) * backward
    steps = [Step(range(1), 1.0, keys * bool(forth or back and not backward), 0, HOP if forth else BACK)]
    for hops, way, sign in ((forth, HOP, 1), (back, BACK, -1)):
        if backward and way == BACK and hops:
            steps.append(Step(keys=keys, way=BACK))
        for hop in range(1, hops + 1):
            source, returning = (sign * hop) % work.devices, gradients * (hop > 1)
            if hop < hops:
                steps.append(Step(range(source, source + 1), 1.0, keys, returning, way))
            else:  # forward, the own keys leave the other way beside the last that came forth
                leaves = keys * (way == HOP and back > 0 and not backward)
                steps.append(Step(range(source, source + 1), 1.0, leaves, returning, BACK if leaves else way))
        circle = hops == work.devices - 1
        home = way if circle else BACK if way == HOP else HOP
        steps += [Step(gradients=gradients, way=home)] * ((1 if circle else hops.bit_count()) * backward)
    return Schedule(work=work, steps=tuple(steps), backward=backward)
