"""A record as a trace that Chrome's tracing and Perfetto open."""

from __future__ import annotations

from typing import Any

from .record import Timeline


def make_trace(timeline: Timeline) -> dict[str, Any]:
    """Give the events of a timeline: a thread for each rank, a process for each host, times in microseconds. Local.

    The format is Google's *Trace Event Format*: complete events (``X``), and flows from the work on a block to the
    next rank's (``s``, ``f``).
    """
    hosts = list(dict.fromkeys(timeline.hosts))
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": number, "args": {"name": host}}
                                    for number, host in enumerate(hosts)]
    process = [hosts.index(host) for host in timeline.hosts]
    events += [{"ph": "M", "name": "thread_name", "pid": process[rank], "tid": rank, "args": {"name": f"rank {rank}"}}
               for rank in range(timeline.ranks)]
    for span in timeline.spans:
        if span.stop > span.start:
            arguments = {"source": span.source, "pairs": span.pairs} if span.what == "compute" else {}
            name = f"block of rank {span.source}" if span.what == "compute" else span.name or span.what
            events.append({"ph": "X", "name": name, "cat": span.what, "pid": process[span.rank], "tid": span.rank,
                           "ts": span.start * 1e6, "dur": (span.stop - span.start) * 1e6, "args": arguments})
    for number, message in enumerate(timeline.messages):
        for phase, rank, at in (("s", message.sender, message.start), ("f", message.receiver, message.stop)):
            events.append({"ph": phase, "name": f"block of rank {message.source}", "cat": "message", "id": number,
                           "pid": process[rank], "tid": rank, "ts": at * 1e6,
                           **({"bp": "e"} if phase == "f" else {"args": {"bytes": message.nbytes}})})
    return {"traceEvents": events, "displayTimeUnit": "ms"}
