"""Train a small Llama whose sequence is split over the ranks, and let it go on by itself.

    mpiexec -n 4 python docs/examples/language_model.py --steps 40

The model is transformers' own, with random weights that are made here; its text counts, which it learns to go on with.
Each rank has every fourth token of it. A model of any size is used in the same way: its parameters are on
all ranks, and its activations are split.
"""

import argparse

import torch
import transformers
from mpi4py import MPI

import ringmpi.torch
import ringmpi.transformers

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=40, help="of training (default: 40)")
parser.add_argument("--tokens", type=int, default=256, help="of the sequence, on all ranks (default: 256)")
arguments = parser.parse_args()
comm = MPI.COMM_WORLD

ringmpi.transformers.register()
torch.manual_seed(0)                                  # the same weights on every rank
config = transformers.LlamaConfig(vocab_size=10, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None)
model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="ringmpi")
optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)


def count(start, tokens):
    """Text that counts up: 7, 8, 9, 0, 1, ..."""
    return (torch.arange(start, start + tokens) % 10)[None]


with ringmpi.torch.sequence_parallel(comm, layout="striped") as sequence:
    for step in range(arguments.steps):
        text = count(step, arguments.tokens)
        batch = ringmpi.transformers.shard(sequence, model, input_ids=text, labels=text)
        loss = model(**batch).loss                    # this rank's share
        optimiser.zero_grad()
        loss.backward()                               # collective, as the forward pass is
        sequence.sum_gradients(model.parameters())
        optimiser.step()
        whole = comm.allreduce(loss.item())
        if comm.rank == 0 and (step % 20 == 0 or step == arguments.steps - 1):
            print(f"step {step}: loss {whole:.3f}")

    # A long prompt goes in split over the ranks; then all go on alike, each with its share of the keys.
    model.eval()
    prompt = count(7, 100)
    cache = ringmpi.transformers.RingCache(sequence, model)
    with torch.no_grad():
        model(**ringmpi.transformers.shard(sequence, model, input_ids=prompt[:, :-1]), cache=cache)
        text = model.generate(prompt, attention_mask=torch.ones_like(prompt), cache=cache, max_new_tokens=24,
                              do_sample=False, pad_token_id=0)
    if comm.rank == 0:
        print("... " + " ".join(map(str, text[0, 94:].tolist())))
