"""The schedule of a ring whose hops packed documents decide, as `counted_ring` runs it."""

from ring_attention.parallel.workload import BACK, HOP, Schedule, Step, Workload


def counted_schedule(work: Workload, backward: bool) -> Schedule:
    """Own keys, those that come forth, and those that come the other way, where the own keys start again.

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
