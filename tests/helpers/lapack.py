"""What LAPACK does in a compiled program at the same time, and with many matrices."""

import re

_CALLED = r"(?:calls|body|true_computation|false_computation)=%?([\w.-]+)"
_BRANCHES = r"branch_computations=\{([^}]*)\}"
_NAME = r"%([\w.-]+)"


def calls_at_once(program):
    """Lists the pairs of calls of which neither waits for the other.

    `program` is the text of a compiled one. A loop or a branch that calls LAPACK counts
    as a call.
    """
    bodies, body = {}, {}
    for line in program.splitlines():
        if found := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            body = bodies[found[1]] = {}
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)$", line):
            body[found[1]] = found[2]

    def is_call(text):
        branches = " ".join(re.findall(_BRANCHES, text))
        inner = re.findall(_CALLED, text) + re.findall(_NAME, branches)
        return "lapack_" in text or any(map(has_call, inner))

    def has_call(name):
        return any(map(is_call, bodies.get(name, {}).values()))

    return [pair for body in bodies.values() for pair in _unordered(body, is_call)]


def stacks(program):
    """Lists the calls with more than one matrix."""
    calls = [line for line in program.splitlines() if "lapack_" in line]
    shapes = [re.findall(r"\[(\d+(?:,\d+)*),\d+,\d+\]", call) for call in calls]
    return [call for call, own in zip(calls, shapes, strict=True) if _is_stack(own)]


def _is_stack(shapes):
    return any(size != "1" for shape in shapes for size in shape.split(","))


def _unordered(body, is_call):
    before = {}
    for name, text in body.items():
        read = {other for other in re.findall(_NAME, text) if other in before}
        before[name] = read.union(*(before[other] for other in read))
    calls = [name for name, text in body.items() if is_call(text)]
    return [
        (first, second)
        for place, second in enumerate(calls)
        for first in calls[:place]
        if first not in before[second]
    ]
