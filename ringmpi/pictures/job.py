"""A page on a job: what ran, by its record, and its pictures."""

from __future__ import annotations

from typing import Any

from .draw import draw_balance, draw_timeline
from .page import make_page
from .record import Timeline, make_timeline


def describe_job(record: dict[str, Any], timeline: Timeline) -> dict[str, str]:
    """Give what a page says above its pictures, by name. Local."""
    hosts = dict.fromkeys(timeline.hosts)
    facts = {
        "command": record.get("command", ""), "made": record.get("created", ""), "ringmpi": record["ringmpi"],
        "MPI": record.get("mpi", ""),
        "ranks": f"{record['ranks']} on {len(hosts)} host{'' if len(hosts) == 1 else 's'}: "
                 f"{', '.join(list(hosts)[:8])}{' ...' if len(hosts) > 8 else ''}",
        "input": _describe_sizes(record.get("sizes", {})), "schedule": record["grid"],
        "backend": record.get("backend", ""),
        "speed": f"{record.get('gflops', 0.0):.1f} GFLOP/s, {record.get('attend_seconds', 0.0):.2f} s of attention",
        "seconds": ", ".join(f"{name} {seconds:.2f}" for name, seconds in record.get("phases", {}).items()),
        "hidden": f"{100 * timeline.hidden:.1f} % of the seconds of all steps were spent computing",
        "moved": f"{record.get('bytes_moved', 0) / 2**20:,.1f} MiB",
        "peak of a rank": f"{record.get('peak_bytes', 0) / 2**20:,.0f} MiB",
        "energy": describe_energy(record.get("energy"))}
    return {name: text for name, text in facts.items() if text}


def describe_energy(energy: dict[str, Any] | None) -> str:
    """Say what a run has spent, or why that is not known. Local."""
    if energy is None:
        return ""
    if energy["joules"] is None:
        return "not read: " + "; ".join(dict.fromkeys(
            f"{node['host']}: {reason}" for node in energy["nodes"] for reason in node["not_read"]))
    share = energy["joules_per_token"]
    return f"{energy['joules']:,.1f} J{'' if share is None else f', {share:.3g} J a token'}"


def make_job_page(record: dict[str, Any]) -> str:
    """Give a page in HTML that stands alone. Local.

    Parameters
    ----------
    record : dict
        As `read_record` gives it.
    """
    timeline = make_timeline(record)
    figures = [("Timeline", draw_timeline(timeline)), ("Balance", draw_balance(timeline))]
    return make_page("ringmpi attend", describe_job(record, timeline), figures)


def _describe_sizes(sizes: dict[str, Any]) -> str:
    """Say how large q, k and v are."""
    if not sizes:
        return ""
    elements = "" if sizes.get("batch") is None else f"{sizes['batch']} x "
    return (f"{elements}{sizes['n_q']:,} queries of {sizes['heads']} heads, "
            f"{sizes['n_k']:,} keys of {sizes['kv_heads']}, dim {sizes['dim']}, dim_v {sizes['dim_v']}, "
            f"{sizes['dtype']}")
