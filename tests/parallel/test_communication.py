"""The communication volume of a step equals the planner's formula, to the byte, on every rank."""

import sys
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from helpers.launch import new_process_groups, run_ranks
from helpers.parity import batches, change, routers_of
from helpers.selection import by_ranks

from mythos_dist.config.load import load_config
from mythos_dist.config.schema import Config, ParallelConfig
from mythos_dist.data.stream import MicroBatch
from mythos_dist.model import Mythos
from mythos_dist.ops.plan.communication import communication
from mythos_dist.parallel.context import context_shard
from mythos_dist.parallel.mesh import build_mesh, mesh_coordinates
from mythos_dist.parallel.traffic import Traffic, group_namer
from mythos_dist.train.schedule import loops_at

# Nothing divides: the vocabulary, the latents, the rank of the depth LoRA, an expert's width. Two micro-batches.
# Gradient flows through the last two of three loops. Nothing is learned, so that each pass is as the first.
SMALL = (
    "model.dim=32 model.vocab_size=515 model.kv_lora_rank=16 model.q_lora_rank=18 model.lora_rank=6 "
    "model.expert_dim=30 train.seq_len=32 train.micro_batch=1 experts.z_loss=0.01 "
    "experts.sequence_balance_loss=0.01 loops.mean=3 loops.backprop=2 optim.lr=0"
)
# In half precision the order of a sum may change what the router chooses: here it chooses all.
ALL_EXPERTS = "model.n_experts_per_tok=8"
LARGE = "model.expert_dim=1000 model.vocab_size=6000"  # parameters that ZeRO-3 gathers again for each micro-batch
# Stages without any block, and without experts: stand-ins take their places in the optimizer's groups.
BARE = "model.prelude_layers=0 model.coda_layers=0 model.vocab_size=4000"
# Every loop is read out, and what a looped block can have besides OpenMythos' is there.
LOOPED = "loops.objective=per_loop loops.teacher=0.5 model.injection=parcae model.lora=per_loop model.qk_norm=true"
# Each setting, with others that it works with; the formula has terms for each.
LAYOUTS = {
    2: [
        f"parallel.tensor=2 parallel.sequence=true experts.sequence_balance_loss=0 act.kl=0.1 act.mode=safe {LOOPED} "
        "train.recompute=loop train.recompute_every=2",
        "parallel.tensor=2 train.seq_len=31 train.recompute=selective",
        f"parallel.zero=3 train.recompute=loop train.dtype=fp16 {LARGE}",
        "parallel.zero=2 optim.name=muon train.micro_batch=2",
        f"parallel.expert=2 parallel.zero=1 optim.weight_decay=0 train.dtype=bf16 train.chunk_tokens=12 "
        f"train.recompute=loop train.offload=saved {ALL_EXPERTS}",
        "parallel.pipe=2 train.dtype=fp16 loops.mean=1 loops.backprop=1",
        "parallel.pipe=2 model.loop_layers=2 model.kv_sharing=every:2",
        "parallel.context=2 train.seq_len=31 train.recompute=selective model.attn_type=gqa",
    ],
    4: [
        "parallel.tensor=4 model.attn_type=gqa parallel.sequence=true",
        "parallel.context=2 parallel.expert=4 train.chunk_tokens=14",
        "parallel.tensor=2 parallel.expert=2 parallel.sequence=true train.chunk_tokens=8 train.recompute=selective "
        "model.loop_layers=3",
        f"parallel.pipe=4 loops.mean=2 {BARE}",
        f"parallel.pipe=4 loops.mean=6 loops.backprop=5 {LOOPED}",
        "parallel.pipe=4 loops.mean=12 loops.backprop=6 model.prelude_layers=2",
        "parallel.context=2 parallel.tensor=2 parallel.sequence=true model.attn_type=gqa",
        "parallel.context=2 parallel.pipe=2 train.seq_len=33 model.kv_sharing=every:2",
        f"parallel.tensor=2 parallel.expert=2 parallel.sequence=true parallel.zero=3 model.attn_type=gqa {LARGE}",
        "parallel.pipe=2 parallel.tensor=2 parallel.sequence=true model.attn_type=gqa model.kv_sharing=every:2",
        f"parallel.pipe=2 parallel.expert=2 train.dtype=bf16 {ALL_EXPERTS}",
        f"optim.name=muon parallel.tensor=2 {LOOPED} model.n_shared_experts=2",
    ],
    8: [
        "optim.name=muon parallel.pipe=2 parallel.tensor=2 parallel.expert=2",
    ],
}
# Other combinations of the settings above: they show which one is counted wrong.
LONG = {
    2: [
        "parallel.tensor=2 parallel.sequence=true experts.sequence_balance_loss=0",
        "parallel.zero=2 train.micro_batch=2",
        f"parallel.zero=3 train.recompute=loop {LARGE}",
        "parallel.zero=3 train.dtype=fp16",
        "parallel.zero=1 optim.weight_decay=0",
        "parallel.tensor=2 train.recompute=selective",
        "parallel.tensor=2 train.seq_len=31",
        "parallel.tensor=2 parallel.sequence=true train.recompute=loop train.recompute_every=2",
        f"parallel.expert=2 train.dtype=bf16 {ALL_EXPERTS}",
        f"parallel.expert=2 train.chunk_tokens=12 train.recompute=loop train.offload=saved {ALL_EXPERTS}",
        "parallel.pipe=2 train.dtype=fp16",
        "parallel.pipe=2 loops.mean=1 loops.backprop=1",
        f"parallel.tensor=2 parallel.sequence=true act.kl=0.1 act.mode=safe {LOOPED}",
        "optim.name=muon parallel.zero=2",
        "parallel.context=2",
        "parallel.zero=3 parallel.expert=2",
        "train.dtype=bf16 parallel.zero=2",
        "parallel.pipe=2 train.dtype=bf16",
        "parallel.pipe=2 model.kv_sharing=every:2",
        "parallel.tensor=2 model.kv_sharing=every:2 train.recompute=loop",
        f"parallel.zero=3 {LOOPED}",
        f"optim.name=muon parallel.expert=2 train.dtype=bf16 {ALL_EXPERTS}",
        f"parallel.context=2 parallel.zero=3 train.recompute=loop {LOOPED}",
        "parallel.context=2 parallel.expert=2 parallel.zero=2 train.micro_batch=2",
        "parallel.zero=1",
        "parallel.zero=2",
        "parallel.zero=3",
        "train.dtype=bf16",
        "train.dtype=fp16",
        "parallel.tensor=2",
        "parallel.tensor=2 model.attn_type=gqa",
        "parallel.tensor=2 parallel.sequence=true",
        "parallel.expert=2",
        "parallel.expert=2 train.recompute=loop",
        "parallel.pipe=2",
        "parallel.pipe=2 loops.backprop=1 train.recompute=loop",
        f"parallel.tensor=2 {LOOPED}",
        f"parallel.pipe=2 {LOOPED}",
    ],
    4: [
        "parallel.expert=4",
        "parallel.tensor=2 parallel.expert=2 parallel.sequence=true train.chunk_tokens=8 train.recompute=selective",
        "parallel.pipe=4 loops.mean=2",
        f"parallel.expert=2 parallel.zero=3 {LARGE}",
        "parallel.tensor=2 parallel.expert=2 parallel.sequence=true parallel.zero=3 model.attn_type=gqa",
        "parallel.tensor=2 parallel.expert=2 parallel.sequence=true train.recompute=loop model.loop_layers=3",
        "parallel.tensor=2 parallel.expert=2 parallel.sequence=true train.chunk_tokens=14",
        f"parallel.pipe=4 {BARE}",
        "parallel.context=2 parallel.expert=4 train.dtype=bf16 train.recompute=loop model.n_experts_per_tok=8",
        "parallel.tensor=2 parallel.zero=2",
        f"parallel.expert=2 train.dtype=fp16 {ALL_EXPERTS}",
        "parallel.tensor=2 parallel.sequence=true train.dtype=bf16",
        "parallel.pipe=2 parallel.tensor=2 parallel.sequence=true train.recompute=loop model.attn_type=gqa",
        "parallel.tensor=4",
        "parallel.tensor=4 model.attn_type=gqa",
        "parallel.tensor=2 parallel.zero=3",
        "parallel.expert=2 parallel.zero=2",
        f"parallel.tensor=2 parallel.expert=2 train.dtype=bf16 {ALL_EXPERTS}",
        "parallel.tensor=2 parallel.expert=2 parallel.sequence=true act.mode=safe",
        "parallel.pipe=4",
        "parallel.pipe=2 parallel.tensor=2 train.dtype=bf16",
        "parallel.pipe=2 parallel.expert=2",
    ],
    8: [
        "optim.name=muon parallel.pipe=2 parallel.tensor=2",
        "parallel.pipe=2 parallel.tensor=2 parallel.expert=2",
        "optim.name=muon parallel.expert=2 parallel.tensor=2",
        "parallel.tensor=2 parallel.expert=2 parallel.sequence=true parallel.zero=2",
        f"parallel.pipe=4 parallel.expert=2 train.dtype=bf16 {BARE} {ALL_EXPERTS}",
        "parallel.pipe=2 parallel.tensor=2 parallel.expert=2 parallel.sequence=true",
        f"parallel.pipe=2 parallel.tensor=2 parallel.expert=2 train.dtype=bf16 {ALL_EXPERTS}",
        f"parallel.pipe=4 parallel.expert=2 {BARE}",
    ],
}


def config_of(layout: str, world: int) -> Config:
    config = load_config("configs/tiny_cpu.yaml", [*SMALL.split(), *layout.split(), "data.path=none"])
    replicas = world // ranks_of_replica(config)
    batch = dict(global_batch=2 * config.train.micro_batch * replicas)
    return change(config, train=batch, data=dict(path=""))  # random tokens


def ranks_of_replica(config: Config) -> int:
    return config.parallel.pipe * config.parallel.context * config.parallel.tensor


def passes_of(config: Config) -> int:
    """The step that is counted: the first, where a pipeline's stages send shapes; in bf16 the second, where they do
    not; of ZeRO-3 the third, when it has seen which parameters are needed when."""
    return 3 if config.parallel.zero == 3 else 2 if config.train.dtype == "bf16" else 1


def count(layouts: list[str]) -> list[dict[str, dict[str, int]]]:
    """On each rank: for every layout, what goes over the groups in a step."""
    from mythos_dist.train.engine import Engine

    totals = []
    for layout in layouts:
        print(layout, file=sys.stderr)  # a launch that fails says where it was
        new_process_groups(layout)
        config = config_of(layout, dist.get_world_size())
        mesh = build_mesh(config.parallel)
        engine = Engine(config, mesh)
        engine.ds_engine.train()
        loops = loops_at(config, 1)
        passes = engine._train_inputs(next(batches(config, mesh.data.rank, mesh.data.size)), loops, 1)
        for _ in range(passes_of(config) - 1):
            engine._train_passes(passes, loops)
        with Traffic(mesh) as traffic:
            engine._train_passes(passes, loops)
        totals.append(traffic.totals)
        engine.close()
        del engine
        dist.barrier()
    return totals


def rows_of(config: Config, world: int) -> list[list[list[tuple[int, int]]]]:
    """For each rank of data x context, micro-batch, and layer of each loop of step 1 the rows that it sends and
    receives.

    What the router of the model on one process chooses, token by token: a token goes once to every rank that holds
    one of its experts.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.train.dtype]
    model = Mythos(config.model, experts=config.experts, seed=config.run.seed).to(dtype)
    chosen: list[list[list[int]]] = []  # experts of each token, a list per pass through the router
    for router in routers_of(model):
        router.register_forward_hook(lambda *call: chosen.append(call[2][1].tolist()))
    expert, context = config.parallel.expert, config.parallel.context
    replicas = world // ranks_of_replica(config)
    owned = config.model.n_experts // expert
    # destinations[rank of data x context][micro-batch][loop]: how many tokens go to each rank of the expert axis
    destinations: list[list[list[list[int]]]] = [[] for _ in range(replicas * context)]
    for replica in range(replicas):
        for batch in next(batches(config, replica, replicas)):
            chosen.clear()
            with torch.no_grad():
                model(batch.input_ids, loops_at(config, 1).n_loops, document_ids=batch.document_ids)
            ranks_of_loops = [[{e // owned for e in experts} for experts in tokens] for tokens in chosen]
            for part in range(context):
                own = own_tokens(config, world, part, batch)
                destinations[replica * context + part].append(
                    [[sum(r in loop[token] for token in own) for r in range(expert)] for loop in ranks_of_loops]
                )

    def rows(replica: int, micro_batch: int, loop: int) -> tuple[int, int]:
        first = replica // expert * expert
        received = (destinations[other][micro_batch][loop][replica - first] for other in range(first, first + expert))
        return sum(destinations[replica][micro_batch][loop]), sum(received)

    return [
        [[rows(replica, m, t) for t in range(len(loops))] for m, loops in enumerate(of_replica)]
        for replica, of_replica in enumerate(destinations)
    ]


def own_tokens(config: Config, world: int, part: int, batch: MicroBatch) -> list[int]:
    """The tokens of a micro-batch, (B * S), on rank `part` of the context axis."""
    mesh = mesh_coordinates(config.parallel, world, part * config.parallel.tensor)
    documents = batch.document_ids if config.data.document_mask else None
    shard = context_shard(batch.input_ids.shape, mesh, torch.device("cpu"), documents)
    tokens = torch.arange(batch.input_ids.numel()).view(batch.input_ids.shape)
    return (tokens if shard is None else shard.local(tokens)).flatten().tolist()


@pytest.mark.launch
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("world", "layouts"), by_ranks(LAYOUTS, LONG))
def test_every_byte_of_a_step_is_in_the_formula(world, layouts):
    """By axis and kind, on every rank: what layers send, DeepSpeed's gradients and parameters, and all scalars."""
    for layout, ranks in zip(layouts, zip(*run_ranks(world, count, layouts, seconds=1600), strict=True), strict=True):
        config = config_of(layout, world)
        rows = rows_of(config, world) if config.parallel.expert > 1 else None
        for rank, counted in enumerate(ranks):
            replica = mesh_coordinates(config.parallel, world, rank).data_context.rank
            assert counted == communication(
                config,
                world,
                rank,
                *loops_at(config, 1)[:2],
                rows=rows[replica] if rows else None,
                first_send=passes_of(config) == 1,
            ), f"{layout}, rank {rank}"


SPREAD = [layout for world in (4, 8) for layout in LAYOUTS[world] + LONG[world] if "parallel.expert" in layout]


@pytest.mark.parametrize("no_grad_loops", [0, 2])
@pytest.mark.parametrize("layout", SPREAD)
def test_one_pair_of_row_counts_stands_for_all_loops(layout, no_grad_loops):
    """One pair for all loops and micro-batches against the same pair for each, on every rank of 8, exactly."""
    config = config_of(layout, 8)
    one_by_one = [[(70, 90)] * 5 * config.model.loop_layers] * 8
    for rank in range(8):
        step = config, 8, rank, 5, no_grad_loops
        assert communication(*step, rows=(70, 90)) == communication(*step, rows=one_by_one)


@pytest.mark.parametrize("layout", SPREAD)
def test_rows_are_counted_on_the_stage_that_runs_their_loop(layout):
    """Rows of one loop after the other add up to those of all: each is sent by the stage that runs the loop, and its
    gradient only after the no-grad loops. Exactly, on every rank of 8."""
    config = config_of(layout, 8)
    calls = range(5 * config.model.loop_layers)
    rows = [[(10 + m + 3 * t, 20 + m * t) for t in calls] for m in range(8)]

    def sent(rank: int, rows: list[list[tuple[int, int]]] | None) -> Counter:
        sizes = communication(config, 8, rank, 5, 2, rows=rows)
        return Counter({(axis, kind): size for axis, kinds in sizes.items() for kind, size in kinds.items()})

    for rank in range(8):
        nothing = sent(rank, None)
        total = Counter(nothing)
        for t in calls:
            only = [[pair if i == t else (0, 0) for i, pair in enumerate(loops)] for loops in rows]
            total += sent(rank, only) - nothing
        assert sent(rank, rows) == total


@pytest.mark.parametrize("layout", [layout for world in LAYOUTS for layout in LAYOUTS[world] + LONG[world]])
def test_the_number_of_micro_batches_can_be_passed(layout):
    """Three per replica against a global batch that makes three, on every rank of 8."""
    config = config_of(layout, 8)
    replicas = 8 // ranks_of_replica(config)
    larger = change(config, train=dict(global_batch=3 * config.train.micro_batch * replicas))
    for rank in range(8):
        given = communication(config, 8, rank, 3, 1, rows=(5, 6), micro_batches=3)
        assert given == communication(larger, 8, rank, 3, 1, rows=(5, 6))


def test_groups_have_the_names_of_their_axes():
    """Rank 5 of 16 at tensor=2 pipe=2 expert=2: stage 0, second tensor rank, second of four replicas, by hand."""
    name_of = group_namer(ParallelConfig(tensor=2, pipe=2, expert=2), 16, 5)
    groups = {
        "data": [1, 5, 9, 13],
        "pipe": [5, 7],
        "tensor": [4, 5],
        "expert": [1, 5],
        "expert_data": [5, 13],
        "replica": [4, 5, 6, 7],
        "world": range(16),
    }
    assert {name: name_of(ranks) for name, ranks in groups.items()} == {name: name for name in groups}
    tied = [[1, 3, 5, 7, 9, 11, 13, 15], [1, 3, 5, 7], [5, 7, 13, 15]]  # on both stages, over 4, 2 and 2 replicas
    assert [name_of(ranks[::-1]) for ranks in tied] == ["tied"] * 3
    for no_group in ([4, 7], [5, 9], [0, 1, 4, 5], [5, 6, 7, 8], range(15), range(17)):
        with pytest.raises(AssertionError, match="are not a group of"):
            name_of(no_group)


def test_groups_of_the_context_axis_have_its_names():
    """Rank 5 of 16 at tensor=2 context=2 pipe=2 expert=2: stage 1, first context rank, second tensor rank, first of
    two replicas, by hand. Tied stages are over all ranks of data x context."""
    name_of = group_namer(ParallelConfig(tensor=2, context=2, pipe=2, expert=2), 16, 5)
    groups = {
        "data": [5, 13],
        "pipe": [1, 5],
        "context": [5, 7],
        "tensor": [4, 5],
        "data_context": [5, 7, 13, 15],
        "replica": [0, 1, 4, 5],
        "tensor_data": [4, 5, 12, 13],
        "tensor_data_context": [4, 5, 6, 7, 12, 13, 14, 15],
        "tied": [1, 3, 5, 7, 9, 11, 13, 15],
        "world": range(16),
    }
    assert {name: name_of(ranks) for name, ranks in groups.items()} == {name: name for name in groups}


def test_two_stages_of_a_replica_are_a_part_of_the_pipe_axis():
    """Rank 4 of 12 at pipe=6: its replica is its pipe group, and the other's last stage is tied to its first."""
    name_of = group_namer(ParallelConfig(pipe=6), 12, 4)
    assert [name_of(ranks) for ranks in ([0, 5], [4, 5], range(6), [4, 10], range(12))] == [
        *("pipe", "pipe", "pipe", "data", "tied")
    ]
    assert group_namer(ParallelConfig(tensor=2), 4, 3)([2, 3]) == "tensor"
    assert group_namer(ParallelConfig(), 4, 3)(range(4)) == "data"


def send_one_of_each() -> tuple[dict, dict]:
    """One message of each kind among four ranks, or two of them: what this rank counts, and the sum over ranks."""
    mesh = build_mesh(ParallelConfig(tensor=2, pipe=2))
    rank, pair = dist.get_rank(), mesh.tensor.group
    shards = [torch.zeros(5) for _ in range(4)]
    with Traffic(mesh) as traffic:
        dist.all_reduce(torch.zeros(7))
        dist.all_reduce(torch.zeros(3, dtype=torch.float64), group=pair)
        dist.reduce(torch.zeros(11), 0)
        dist.broadcast(torch.zeros(13), 0)
        dist.all_gather(shards, torch.zeros(5))
        dist.all_gather_into_tensor(torch.zeros(2 * 17), torch.zeros(17), group=pair)
        dist.reduce_scatter(torch.zeros(5), shards)
        dist.reduce_scatter_tensor(torch.zeros(19), torch.zeros(2 * 19), group=pair)
        rows = 1 + mesh.tensor.rank  # from each of the two ranks
        dist.all_to_all_single(torch.zeros(2 * rows), torch.zeros(3), [rows, rows], [1, 2], group=pair)
        if mesh.pipe.rank == 0:
            dist.send(torch.zeros(23), rank + 2)
        else:
            dist.recv(torch.zeros(23), rank - 2)
        dist.broadcast(torch.zeros(0), 0)
        dist.barrier()
    counted = traffic.totals
    return counted, traffic.total_over_ranks()


@pytest.mark.launch
def test_each_kind_of_message_is_counted_by_its_size():
    """Against nccl-tests' sizes: the output of an all-gather, the input of a reduce-scatter and of an all-to-all."""
    tensor = {"all_reduce": 8 * 3, "all_gather": 4 * 34, "reduce_scatter": 4 * 38, "all_to_all": 4 * 3}
    replica = {"all_reduce": 4 * 7, "reduce": 4 * 11, "broadcast": 4 * 13, "all_gather": 4 * 20}
    replica["reduce_scatter"] = 4 * 20
    for rank, (counted, total) in enumerate(run_ranks(4, send_one_of_each)):
        sent = {"pipe": {"send": 4 * 23}} if rank < 2 else {}
        assert counted == {"tensor": tensor, "replica": replica} | sent
        summed = {name: {kind: 4 * size for kind, size in of.items()} for name, of in counted.items() if name != "pipe"}
        assert total == summed | {"pipe": {"send": 2 * 4 * 23}}
