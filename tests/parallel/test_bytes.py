"""No rank has a full large tensor, neither as a parameter nor during forward and backward."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.launch import launch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mythos_dist.config.load import load_config
from mythos_dist.config.schema import MythosConfig, ParallelConfig
from mythos_dist.model import Mythos
from mythos_dist.model.recompute import Recompute
from mythos_dist.parallel.mesh import SINGLE, Mesh, build_mesh, mesh_coordinates
from mythos_dist.parallel.tensor import shard_of

CONFIGS = Path(__file__).parents[2] / "configs"

# ---- Parameters of 10b on 32 ranks, on the meta device

PARALLEL, WORLD = ParallelConfig(tensor=4, expert=8), 32
LARGE = 1_000_000  # elements


@pytest.fixture(scope="module", params=["reference", "train"])
def mode(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def ranks(mode) -> list[nn.Module]:
    """10b as each of 32 ranks holds it: tensor 4, and 8 replicas that share one copy of the experts."""
    config = load_config(CONFIGS / "10b.yaml", [f"model.mode={mode}"]).model
    with torch.device("meta"):
        return [Mythos(config, mesh=mesh_coordinates(PARALLEL, WORLD, rank)) for rank in range(WORLD)]


def elements_per_rank(c: MythosConfig, tensor: int, expert: int) -> dict[str, int]:
    """A rank's parameters from the config: sharded widths are rounded up, norms and router are replicated."""

    def shard(width: int) -> int:
        return math.ceil(width / tensor)

    queries = c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    attention = (
        c.dim * shard(c.q_lora_rank)
        + c.q_lora_rank * shard(queries)
        + c.dim * shard(c.kv_lora_rank + c.qk_rope_head_dim)
        + c.kv_lora_rank * shard(c.n_heads * (c.qk_nope_head_dim + c.v_head_dim))
        + c.dim * shard(c.n_heads * c.v_head_dim)
        + (c.q_lora_rank + c.kv_lora_rank)  # norms of the latents
        + 2 * c.dim  # the block's norms
        + (c.qk_nope_head_dim + c.qk_rope_head_dim) * c.qk_norm
    )
    parcae = c.dim * shard(c.dim) + 2 * c.dim + c.dim  # B; decay and step; the norm of e
    shared = c.n_shared_experts * c.expert_dim * c.n_experts_per_tok
    return {
        "embedding": shard(c.vocab_size) * c.dim,
        "prelude and coda": (c.prelude_layers + c.coda_layers) * (attention + 3 * c.dim * shard(4 * c.dim // 3)),
        "looped block": attention + c.n_experts * c.dim + 3 * c.dim * shard(shared),
        "experts": 3 * math.ceil(c.n_experts / expert) * shard(c.expert_dim) * c.dim,
        "depth LoRA": (2 * c.dim + c.max_loop_iters) * shard(c.lora_rank),
        "injection": parcae if c.injection == "parcae" else 2 * c.dim + 1,
        "halting": c.dim + 1,
        "norms before the loops and the head": 2 * c.dim,
    }


def test_every_rank_holds_its_share_of_10b(ranks, mode):
    """In bytes, in the fp32 that a model is built in. The FFN's 5461 channels are the one width that 4 does not divide.

    Buffers are the router's bias and nothing else.
    """
    config = load_config(CONFIGS / "10b.yaml", [f"model.mode={mode}"]).model
    expected = 4 * sum(elements_per_rank(config, PARALLEL.tensor, PARALLEL.expert).values())
    for model in ranks:
        assert sum(p.numel() * p.element_size() for p in model.parameters()) == expected
        assert sum(b.numel() for b in model.buffers()) == config.n_experts


def test_no_rank_has_a_full_large_parameter(ranks, mode):
    """Of each parameter of more than a million elements a rank has a quarter, of experts 1 / 32, plus less than 0.1 %
    padding."""
    for model in ranks:
        for name, parameter in model.named_parameters():
            elements = math.prod(shard_of(parameter).full_shape)
            if elements > LARGE:
                share = 32 if ".experts." in name else 4
                assert elements / share <= parameter.numel() < 1.001 * elements / share, name
            else:
                assert parameter.numel() <= LARGE
    large = {name for name, p in ranks[0].named_parameters() if math.prod(shard_of(p).full_shape) > LARGE}
    # Embedding; in 5 blocks q_down, q_up, kv_down, kv_up, wo and three of an FFN, which is the shared one in the loop;
    # three stacks of experts; Parcae's matrix.
    assert len(large) == 1 + 5 * (5 + 3) + 3 + (mode == "train")


def test_the_shards_of_all_ranks_are_the_reference_model(ranks, mode, open_mythos):
    """Distinct slices of one copy of the model tile every tensor and count as many numbers as OpenMythos has, and with
    the loops that train as many as Parcae's injection (B, and a norm and a step where there was a factor) and a weight
    for each channel of a query's and a key's norm are more."""
    boxes: dict[str, set] = {}
    full_shape_of = {}
    for model in ranks:
        for name, parameter in model.named_parameters():
            part = shard_of(parameter)
            full_shape_of[name] = part.full_shape
            boxes.setdefault(name, set()).add((part.start, part.stop))
    total = 0
    for name, box_list in boxes.items():
        volumes = sum(math.prod(b - a for a, b in zip(start, stop, strict=True)) for start, stop in box_list)
        assert volumes == math.prod(full_shape_of[name]), name
        for dim in range(len(full_shape_of[name])):  # a grid: along each dim adjacent spans
            spans = sorted({(start[dim], stop[dim]) for start, stop in box_list})
            assert [0, *(b for _, b in spans)] == [*(a for a, _ in spans), full_shape_of[name][dim]], name
        total += volumes
    with torch.device("meta"):
        reference = open_mythos.main.OpenMythos(open_mythos.variants.mythos_10b())
    c = load_config(CONFIGS / "10b.yaml").model
    more = c.dim * c.dim + c.dim - 1 + (4 + 1) * (c.qk_nope_head_dim + c.qk_rope_head_dim) if mode == "train" else 0
    assert total == sum(p.numel() for p in reference.parameters()) + more


# ---- A pass through a small model of that shape, as one of 32 ranks

# Every large tensor has 24576 numbers or more, all logits too; every slice and every activation of a rank fewer.
# 561 tokens, 181 channels of the FFN and 6 of the LoRA are not divisible by 4.
SMALL = MythosConfig(
    vocab_size=561,
    dim=136,
    n_heads=8,
    max_seq_len=44,
    max_loop_iters=2,
    prelude_layers=1,
    coda_layers=1,
    q_lora_rank=128,
    kv_lora_rank=64,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=32,
    n_experts=16,
    n_shared_experts=1,
    n_experts_per_tok=2,
    expert_dim=120,
    lora_rank=6,
)
SEQ_LEN = 44
LARGE_IN_SMALL = {
    "q_up": 8 * (16 + 8) * 128,
    "kv_up": 8 * (16 + 32) * 64,
    "wo": 8 * 32 * 136,
    "FFN": 181 * 136,
    "shared": 2 * 120 * 136,
    "experts": 16 * 120 * 136,
    "embedding": 561 * 136,
    "logits": SEQ_LEN * 561,
    # Sharded over one axis only, these are still large.
    "experts sharded by tensor": 16 * 30 * 136,
    "experts sharded by expert": 2 * 120 * 136,
}
BOUND = min(LARGE_IN_SMALL.values())


class Outputs(TorchDispatchMode):
    """Records size, operation and shape of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.seen: set[tuple[int, str, tuple[int, ...]]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.seen.add((leaf.numel(), str(func), tuple(leaf.shape)))
        return out


def echo(output: Tensor, input: Tensor, *_, **__) -> None:
    """All-to-all as if every rank sent the same as this one; with the fake group, row counts would be random."""
    output.copy_(input)


def pass_through(mesh: Mesh, kind: str) -> list[tuple[int, str, tuple[int, ...]]]:
    """Everything that a forward and a backward pass allocate, largest first."""
    model = Mythos(SMALL, mesh=mesh, recompute=Recompute(kind))  # type: ignore[arg-type]
    tokens = torch.randint(SMALL.vocab_size, (1, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    with Outputs() as outputs:
        losses = model(tokens[:, :-1], labels=tokens[:, 1:])
        losses["objective"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return sorted(outputs.seen, reverse=True)


def as_ranks(ranks: list[int], kinds: list[tuple[bool, str]]) -> list[list]:
    """`pass_through` as each of some ranks of 32, without the other ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.all_to_all_single = echo
    results = []
    for rank in ranks:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
        for sequence, kind in kinds:
            mesh = build_mesh(ParallelConfig(tensor=4, expert=8, sequence=sequence))
            assert (mesh.tensor.rank, mesh.expert.rank) == (rank % 4, rank // 4)
            results.append(pass_through(mesh, kind)[:10])
        dist.destroy_process_group()
    return results


def test_the_check_sees_the_full_tensors_of_one_process():
    """Without a mesh every large tensor occurs, at least as a gradient."""
    sizes = {numel for numel, _, _ in pass_through(SINGLE, "none")}
    assert sizes >= {numel for name, numel in LARGE_IN_SMALL.items() if " sharded by " not in name}


@pytest.mark.launch
def test_no_operation_of_a_rank_returns_a_large_tensor():
    """The first and the last of 32 ranks, under a fake world, with all kinds of recomputation, forward and backward.

    Weights, gradients, activations, logits and what messages carry: all are smaller than the smallest large tensor.
    """
    kinds = [(False, "none"), (True, "none"), (True, "selective"), (False, "selective"), (True, "loop")]
    result = launch(1, as_ranks, [0, 31], kinds)
    assert result.codes == [0], result.err
    assert len(result.values[0]) == 2 * len(kinds)
    for largest in result.values[0]:
        assert largest[0][0] < BOUND, largest
