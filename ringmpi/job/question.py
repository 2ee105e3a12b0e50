"""What `ringmpi plan` is asked about: what is to be computed, and on what machine."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..layout import make
from ..mask_base import BaseMask
from ..problem import masked
from ..schedules.cost import choose
from ..schedules.machine import Machine
from ..schedules.spec import Schedule, check_schedule, resolve
from ..schedules.traffic import Shape
from ..simulation.case import Case, prepare
from ..simulation.trouble import Trouble
from .inputs import Sizes
from .memory import shape_of
from .options import Options


@dataclass(frozen=True)
class Question:
    """What is asked. Local."""

    sizes: Sizes
    options: Options
    mask: BaseMask
    machine: Machine

    def shape(self, ranks: int) -> Shape:
        """Say what is computed as far as its cost goes by it, on so many ranks. Local."""
        sizes, layout = self.sizes, self.options.layout
        layouts = make(layout, sizes.n_q, ranks), make(layout, sizes.n_k, ranks)
        return masked(shape_of(sizes, self.options), self.mask, *layouts)

    def schedule(self, asked: str) -> Schedule:
        """Give the schedule that is meant; ``"auto"`` as it would choose. Local.

        Raises
        ------
        OptionError
            If it is one of another number of ranks, or none is within the memory limit.
        """
        if asked == "auto":
            return choose(self.shape(self.machine.ranks), self.machine, self.options.memory_limit)
        return resolve(check_schedule(asked), self.machine.ranks)

    def case(self, schedule: Schedule, trouble: Trouble) -> Case:
        """Prepare a schedule for simulation, on as many ranks as it has. Local.

        Raises
        ------
        OptionError
            If its ranks can't share the heads.
        """
        machine, ranks = self.machine, schedule.ranks
        here = min(machine.ranks_per_node, ranks)
        links = min(machine.links, here) if machine.on_gpu else machine.links
        smaller = replace(machine, ranks=ranks, ranks_per_node=here, links=links)
        return prepare(self.shape(ranks), schedule, smaller, self.mask, self.options.layout, trouble)
