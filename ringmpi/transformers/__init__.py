"""transformers' models on a sequence that is split over ranks: ``attn_implementation="ringmpi"``.

::

    ringmpi.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="ringmpi")
    with ringmpi.torch.sequence_parallel(comm, layout="striped") as sequence:
        loss = model(**ringmpi.transformers.shard(sequence, model, input_ids=tokens, labels=tokens)).loss
"""

from .attention import register
from .batch import shard
from .cache import RingCache
from .models import NAME

__all__ = ["NAME", "RingCache", "register", "shard"]
