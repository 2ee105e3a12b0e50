"""transformers' models, unmodified, with their sequence split over ranks, beside one process. Runs under mpiexec."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, masking_utils  # noqa: E402

import ringmpi  # noqa: E402
import ringmpi.transformers  # noqa: E402
from ringmpi.torch import sequence_parallel  # noqa: E402
from ringmpi.transformers.masks import Structure, structure_of  # noqa: E402
from ringmpi.transformers.models import TESTED  # noqa: E402

pytestmark = [pytest.mark.mpi, *(pytest.mark.filterwarnings(f"ignore::{kind}")         # of transformers' own
                                 for kind in ("FutureWarning", "DeprecationWarning", "UserWarning"))]
VOCABULARY = 61
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": None,
         "eos_token_id": None, "pad_token_id": None}
FEW = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=8, use_sliding_window=True, sliding_window=9,
                                              max_window_layers=1),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256,
                                            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=None,
                                            eos_token_id=None),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, head_dim=8, sliding_window=7),
    "gpt_oss": lambda: transformers.GptOssConfig(**SIZES, head_dim=8, sliding_window=8, num_local_experts=2,
                                                 num_experts_per_tok=1),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=7),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**SIZES, num_experts=2, num_experts_per_tok=1,
                                                     moe_intermediate_size=24, shared_expert_intermediate_size=24),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=7,
                                                         layer_types=["sliding_attention", "full_attention"]),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**FEW),
    "gptj": lambda: transformers.GPTJConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, rotary_dim=4,
                                            n_positions=256, bos_token_id=None, eos_token_id=None, **NO_DROPOUT),
    "opt": lambda: transformers.OPTConfig(vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2,
                                          num_attention_heads=4, max_position_embeddings=256, dropout=0.0,
                                          word_embed_proj_dim=32, pad_token_id=1, bos_token_id=2, eos_token_id=2),
    "phi": lambda: transformers.PhiConfig(**SIZES),
    "olmo2": lambda: transformers.Olmo2Config(**SIZES),
    "cohere2": lambda: transformers.Cohere2Config(**SIZES, sliding_window=7),
    "stablelm": lambda: transformers.StableLmConfig(**SIZES),
}
ringmpi.transformers.register()


def models(name):
    """The same model twice: of one process, and of this run's ranks."""
    torch.manual_seed(0)
    one = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager")
    split = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="ringmpi")
    split.load_state_dict(one.state_dict())
    return one, split


def tokens(batch=2, length=45, seed=1):
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def near(found, exact, bound=1e-5):
    assert found.shape == exact.shape
    assert (found - exact).abs().max() <= bound * max(1.0, exact.abs().max())


def check_gradients(split, one):
    for (name, a), b in zip(split.named_parameters(), one.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if b.grad is not None:
            assert (a.grad - b.grad).abs().max() <= 1e-5 * max(1e-3, b.grad.abs().max()), name


def test_all_that_are_said_to_be_tested_are():
    assert set(CONFIGS) == TESTED


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_loss_and_gradients(comm, name):
    layout = "contiguous" if len(name) % 2 else "striped"
    one, split = models(name)
    x = tokens() % 58 + 3                     # none that stands for padding
    labels = x.clone()
    labels[0, 5:9] = -100
    exact = one(input_ids=x, labels=labels)
    exact.loss.backward()
    with sequence_parallel(comm, layout=layout) as sequence:
        out = split(**ringmpi.transformers.shard(sequence, split, input_ids=x, labels=labels))
        out.loss.backward()
        sequence.sum_gradients(split.parameters())
        near(sequence.gather(out.logits), exact.logits)
    assert abs(comm.allreduce(out.loss.item()) - exact.loss.item()) <= 1e-5
    check_gradients(split, one)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch(comm, name, side):
    """Elements of several lengths: logits of what is there, and gradients of its loss."""
    one, split = models(name)
    x, there = tokens(3, 37), torch.ones(3, 37, dtype=torch.long)
    for element, padding in enumerate((0, 5, 20)):
        where = slice(0, padding) if side == "left" else slice(37 - padding, 37)
        there[element, where] = 0
    labels = x.masked_fill(there == 0, -100)
    if side == "left":
        labels[:, 1:][there[:, :-1] == 0] = -100        # nothing is made of what padding says
    exact = one(input_ids=x, attention_mask=there, labels=labels)
    exact.loss.backward()
    with sequence_parallel(comm, layout="striped") as sequence:
        out = split(**ringmpi.transformers.shard(sequence, split, input_ids=x, attention_mask=there, labels=labels))
        out.loss.backward()
        sequence.sum_gradients(split.parameters())
        near(sequence.gather(out.logits)[there == 1], exact.logits[there == 1])
    check_gradients(split, one)


@pytest.mark.parametrize("layout", ["contiguous", "striped"])
def test_packed_documents(comm, layout):
    """Positions that begin anew begin a document."""
    one, split = models("llama")
    x = tokens(1, 40)
    positions = torch.cat([torch.arange(n) for n in (13, 1, 20, 6)])[None]
    exact = one(input_ids=x, position_ids=positions, use_cache=False)
    with sequence_parallel(comm, layout=layout) as sequence:
        out = split(**ringmpi.transformers.shard(sequence, split, input_ids=x, position_ids=positions))
        near(sequence.gather(out.logits), exact.logits)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_generate(comm, name):
    """Token for token, with the prompt on all ranks or split over them; each rank has its share of the keys."""
    one, split = (model.eval() for model in models(name))
    prompt = tokens(2, 11)
    options = {"max_new_tokens": 64, "do_sample": False, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    exact = one.generate(prompt, **options)
    with sequence_parallel(comm, layout="striped") as sequence, torch.no_grad():
        cache = ringmpi.transformers.RingCache(sequence, split)
        assert torch.equal(split.generate(prompt, cache=cache, **options), exact)
        held = comm.allgather([layer._cache.tokens for layer in cache.layers])
        assert sum(x[0] for x in held) == 11 + 63 or name == "qwen3"
        if comm.size > 1:
            assert max(x[0] for x in held) <= 2 * (11 + 64) // comm.size + 64
        cache.reset()
        split(**ringmpi.transformers.shard(sequence, split, input_ids=prompt[:, :-1]), cache=cache)
        assert cache.get_seq_length() == 10
        assert torch.equal(split.generate(prompt, cache=cache, **options), exact)
        beams = {**options, "num_beams": 3, "max_new_tokens": 12}
        cache = ringmpi.transformers.RingCache(sequence, split)
        assert torch.equal(split.generate(prompt, cache=cache, **beams), one.generate(prompt, **beams))


def test_training(comm):
    """Twenty steps with clipping, a schedule and accumulation: the losses of one process."""
    one, split = models("llama")
    losses = {}
    with sequence_parallel(comm, layout="striped") as sequence:
        for model in (one, split):
            optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
            schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, 20)
            losses[model] = []
            for step in range(20):
                x = tokens(2, 33, seed=step % 2)
                batch = ({"input_ids": x, "labels": x} if model is one else
                         ringmpi.transformers.shard(sequence, split, input_ids=x, labels=x))
                loss = model(**batch).loss
                optimiser.zero_grad()
                loss.backward()
                if model is split:
                    sequence.sum_gradients(model.parameters())
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimiser.step()
                schedule.step()
                losses[model].append(loss.item() if model is one else comm.allreduce(loss.item()))
    assert max(abs(a - b) for a, b in zip(losses[one], losses[split], strict=True)) <= 2e-5
    assert losses[one][-1] < losses[one][0]


def test_gradient_checkpointing(comm):
    one, split = models("llama")
    split.gradient_checkpointing_enable()
    x = tokens()
    one(input_ids=x, labels=x).loss.backward()
    split.train()
    with sequence_parallel(comm, layout="striped") as sequence:
        split(**ringmpi.transformers.shard(sequence, split, input_ids=x, labels=x), use_cache=False).loss.backward()
        sequence.sum_gradients(split.parameters())
    check_gradients(split, one)


def test_masks_are_recognised_or_refused(comm):
    causal = masking_utils.causal_mask_function
    assert structure_of(causal) == Structure(causal=True)
    assert structure_of(masking_utils.sliding_window_causal_mask_function(7)) == Structure(True, (6, None))
    assert structure_of(masking_utils.sliding_window_bidirectional_mask_function(7)) == Structure(False, (7, 7))
    assert structure_of(masking_utils.chunked_causal_mask_function(8, torch.zeros(1))) == Structure(
        True, (None, None), 8)
    for odd in (lambda b, h, i, j: j <= i, masking_utils.or_masks(causal, causal),
                masking_utils.blockwise_overlay(torch.zeros(1, 4))):
        with pytest.raises(ringmpi.MaskError, match="whose meaning is not known"):
            structure_of(odd)


@pytest.mark.parametrize("padded", [False, True])
def test_chunks_are_those_of_transformers(comm, padded):
    """Beside the flags that transformers itself makes of its function."""
    from ringmpi.transformers.masks import make_mask
    there = torch.ones(2, 20, dtype=torch.bool)
    if padded:
        there[1, :3] = False
    function = masking_utils.chunked_causal_mask_function(6, (~there).sum(1))
    flags = masking_utils.sdpa_mask(2, 20, 20, mask_function=function, attention_mask=there, allow_is_causal_skip=False)
    mask = make_mask(structure_of(function), 20, there.numpy() if padded else None, None)
    for element in range(2):
        one = mask[element] if padded else mask
        seen = torch.zeros(20, 20, dtype=torch.bool)
        for low, high in one.bounds(range(20), 20, 20):
            for i in range(20):
                seen[i, low[i]:high[i]] = True
        rows = there[element]
        assert torch.equal(seen[rows], flags[element, 0][rows])


def test_what_is_refused(comm):
    """Each an error on all ranks: none of it drops a mask, or forgets a position."""
    _, split = models("llama")
    x = tokens()
    odd = comm.rank == comm.size - 1
    with sequence_parallel(comm, layout="striped") as sequence:
        part = ringmpi.transformers.shard(sequence, split, input_ids=x)
        if comm.size > 1:
            with pytest.raises(ringmpi.OptionError, match="makes up"):
                split(part["input_ids"])
            with pytest.raises(ringmpi.OptionError, match="the same on all ranks, which a model makes up"):
                split(input_ids=x, position_ids=torch.arange(45)[None])
            with pytest.raises(ringmpi.OptionError, match="position_ids: expected"):
                split(part["input_ids"], position_ids=part["position_ids"] + 3 * odd)
        with pytest.raises(ringmpi.OptionError, match="one rank's tokens"):
            split(part["input_ids"], position_ids=part["position_ids"],
                  attention_mask=torch.ones(2, 1, 45, 45) if odd else None)
        with pytest.raises(ringmpi.OptionError, match="position_bias"):
            split(**part, **({"position_bias": torch.ones(1)} if odd else {}))
        cache = ringmpi.transformers.RingCache(sequence, split)
        with pytest.raises(ringmpi.OptionError, match="no gradients"):
            split(**part, cache=cache)
        with torch.no_grad():
            there = torch.ones_like(x)
            there[0, :3] = 0
            with pytest.raises(ringmpi.OptionError, match="elements of one length"):
                split(**ringmpi.transformers.shard(sequence, split, input_ids=x, attention_mask=there), cache=cache)
            with pytest.raises(ringmpi.OptionError, match="after the tokens in the cache"):
                split(part["input_ids"], position_ids=part["position_ids"] + 7, cache=cache)
    with pytest.raises(ringmpi.OptionError, match="expected to be called within"):
        split(x)
    with (sequence_parallel(comm, mask=ringmpi.Mask(causal=True)) as sequence,
          pytest.raises(ringmpi.OptionError, match="no mask for a model")):
        split(**ringmpi.transformers.shard(sequence, split, input_ids=x))
    with pytest.raises(ringmpi.OptionError, match="either input_ids"):
        ringmpi.transformers.shard(sequence, split)
    with pytest.raises(ringmpi.ShapeError, match="labels"):
        ringmpi.transformers.shard(sequence, split, input_ids=x, labels=x[:, :-1])


def test_models_that_may_not_be_split(comm):
    """Those whose layers would not say that a split sequence is wrong."""
    one, split = models("llama")
    with sequence_parallel(comm) as sequence:
        for change, said in (({"model_type": "bamba"}, "untested=True"),
                             ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "longest that a rank has"),
                             ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "longrope"),
                             ({"output_router_logits": True}, "routers")):
            _, other = models("llama")
            for name, x in change.items():
                setattr(other.config, name, x)
            with pytest.raises(ringmpi.OptionError, match=said):
                ringmpi.transformers.shard(sequence, other, input_ids=tokens())
            with pytest.raises(ringmpi.OptionError, match=said):
                ringmpi.transformers.RingCache(sequence, other)
        with pytest.raises(ringmpi.OptionError, match="among the tokens of each rank"):
            ringmpi.transformers.shard(sequence, one, input_ids=tokens())
        split.config.model_type = "of_mine"
        assert "input_ids" in ringmpi.transformers.shard(sequence, split, input_ids=tokens(), untested=True)
        if comm.size > 1:
            with pytest.raises(ringmpi.ShapeError, match="a token for each of"):
                ringmpi.transformers.shard(sequence, split, input_ids=tokens(length=comm.size - 1), untested=True)


def test_other_caches_are_refused(comm):
    """transformers' own have the keys of one rank alone."""
    _, split = models("llama")
    x = tokens(2, 24)
    with sequence_parallel(comm) as sequence, torch.no_grad():
        cache = transformers.DynamicCache(config=split.config)
        first = ringmpi.transformers.shard(sequence, split, input_ids=x[:, :12])
        split(**first, cache=cache)
        later = ringmpi.transformers.shard(sequence, split, input_ids=x[:, 12:])
        later["position_ids"] = later["position_ids"] + 12
        with pytest.raises(ringmpi.OptionError, match="own caches"):
            split(**later, cache=cache)
        odd = comm.rank == comm.size - 1
        there = {"attention_mask": torch.ones_like(later["input_ids"])}
        if comm.size > 1:
            with pytest.raises(ringmpi.OptionError, match="attention_mask is given"):
                split(**first, **({} if odd else there))


def test_other_models_on_other_ranks(comm):
    """Are told apart, by scores or shapes."""
    if comm.size == 1:
        pytest.skip("needs two ranks")
    _, split = models("llama" if comm.rank else "gemma2")
    with sequence_parallel(comm, timeout=20) as sequence, pytest.raises(ringmpi.RingError):
        split(**ringmpi.transformers.shard(sequence, split, input_ids=tokens()))
