"""Decoding against open-mythos 0.5.0 and our class for transformers; expanded against absorbed MLA, products of a
few rows as they are computed and as `F.linear` does, depth batching.

Equal weights and loops, fp32, a prompt of `--prompt` tokens; what is timed is tokens after the prompt. open-mythos and
the class decode as their `generate` does: one forward pass with their cache per token. Rounds are interleaved; a round
is `--new` tokens of every row. CPU seconds are those of the process, which another process on the machine changes less
than elapsed time.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
from common import COMMON, SHAPES, build_reference, run_interleaved, serve

from mythos_dist.config.schema import MythosConfig
from mythos_dist.generate.engine import DecodingEngine
from mythos_dist.generate.sampling import Sampling
from mythos_dist.model import Mythos, attention
from mythos_dist.model.open_mythos import from_open_mythos
from mythos_dist.parallel import few_rows

N_LOOPS = 8
OPEN_MYTHOS, CLASS, EXPANDED = "open-mythos", "transformers class", "engine, keys expanded"
PLAIN = "engine, F.linear"  # see mythos_dist/parallel/few_rows.py
PEERS = (OPEN_MYTHOS, CLASS, "engine", PLAIN, EXPANDED)
DEPTHS = ("slowest row", "depth batching")  # rows with 1 to 8 loops, all at 8 or each at its own


def settings_of(prompt: int) -> dict:
    """The coarse shape, with room for the prompt."""
    return COMMON | SHAPES["coarse"][1] | {"max_seq_len": prompt + 1024}


def random_ids(rows: int, prompt: int) -> torch.Tensor:
    """(rows, prompt) token ids."""
    return torch.randint(COMMON["vocab_size"], (rows, prompt), generator=torch.Generator().manual_seed(1))


def ours(prompt: int) -> Mythos:
    """Our model with the reference's weights."""
    config = MythosConfig(**settings_of(prompt), mode="reference")
    model = Mythos(config)
    model.load_state_dict(from_open_mythos(build_reference(settings_of(prompt)).state_dict(), config))
    return model.eval()


def reference_decoder(rows: int, prompt: int) -> Callable[[], int]:
    """A function that decodes one token of every row with open-mythos."""
    model, ids, cache = build_reference(settings_of(prompt)).eval(), random_ids(rows, prompt), {}
    with torch.inference_mode():
        state = {"ids": model(ids, n_loops=N_LOOPS, kv_cache=cache)[:, -1:].argmax(-1), "start": prompt}

    @torch.inference_mode()
    def step() -> int:
        logits = model(state["ids"], n_loops=N_LOOPS, kv_cache=cache, start_pos=state["start"])
        state["ids"], state["start"] = logits[:, -1:].argmax(-1), state["start"] + 1
        return rows

    return step


def class_decoder(rows: int, prompt: int) -> Callable[[], int]:
    """A function that decodes one token of every row with the class of exports, which has ours' weights."""
    from mythos_dist.huggingface.configuration_mythos import MythosPretrainedConfig
    from mythos_dist.huggingface.modeling_mythos import MythosForCausalLM

    model, state = ours(prompt), {"ids": random_ids(rows, prompt), "past_key_values": None}
    config = MythosPretrainedConfig(**asdict(model.config), act_mode=model.recurrent.act.mode, num_loops=N_LOOPS)
    peer = MythosForCausalLM(config).eval()
    keys = peer.load_state_dict({f"model.{name}": value for name, value in model.state_dict().items()}, strict=False)
    assert not keys.unexpected_keys and set(keys.missing_keys) <= {"lm_head.weight"}, keys
    peer.tie_weights()

    @torch.inference_mode()
    def step() -> int:
        outputs = peer(state["ids"], past_key_values=state["past_key_values"], use_cache=True, logits_to_keep=1)
        state.update(ids=outputs.logits[:, -1:].argmax(-1), past_key_values=outputs.past_key_values)
        return rows

    step()  # reads the prompt
    return step


def engine_decoder(rows: int, prompt: int, loops: list[int]) -> Callable[[], int]:
    """A function that decodes until some rows have a token, with `loops` of row i; returns the number of tokens."""
    engine = DecodingEngine(ours(prompt), None, n_loops=N_LOOPS, max_batch=rows)
    requests = []
    for ids, n_loops in zip(random_ids(rows, prompt).tolist(), loops, strict=True):
        requests.append(engine.submit(ids, Sampling(max_new_tokens=1000, temperature=0, n_loops=n_loops)))
    while not all(request.tokens for request in requests):  # prompts are read in chunks
        engine.step()
    return lambda: len(engine.step())


def worker(peer: str, rows: int, prompt: int, new: int) -> None:
    """Serve rounds of `new` tokens per row."""
    loops = [N_LOOPS] * rows
    if peer == EXPANDED:
        attention.MAX_SCORES = 0
    if peer == PLAIN:
        few_rows.MOST_ROWS = 0
    if peer == "depth batching":
        draw = random.Random(0)
        loops = [draw.randint(1, N_LOOPS) for _ in range(rows)]
    peers = {OPEN_MYTHOS: reference_decoder, CLASS: class_decoder}
    step = peers[peer](rows, prompt) if peer in peers else engine_decoder(rows, prompt, loops)
    step()

    def measure(_: int) -> dict:
        begin, cpu, tokens = time.perf_counter(), time.process_time(), 0
        while tokens < new * rows:
            tokens += step()
        return {
            "tokens_per_second": tokens / (time.perf_counter() - begin),
            "tokens_per_cpu_second": tokens / (time.process_time() - cpu),
        }

    serve({}, measure)


def compare(peers: tuple[str, ...], rows: int, prompt: int, new: int, rounds: int) -> dict[str, dict[str, float]]:
    """Medians of interleaved rounds."""
    numbers = ["--batch", str(rows), "--prompt", str(prompt), "--new", str(new)]
    commands = {peer: [sys.executable, __file__, *numbers, "--worker", peer] for peer in peers}
    messages = run_interleaved(commands, rounds)
    return {
        peer: {key: statistics.median(one[key] for one in measured) for key in measured[0]}
        for peer, (_, *measured) in messages.items()
    }


def main() -> None:
    """Compare and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1, help="rows (%(default)s)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens (%(default)s)")
    parser.add_argument("--new", type=int, default=8, help="tokens per row and round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--depths", action="store_true", help="compare rows at loops of their own with waiting")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", choices=(*PEERS, *DEPTHS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.batch, arguments.prompt, arguments.new)
        return
    peers = DEPTHS if arguments.depths else tuple(arguments.peers)
    results = compare(peers, arguments.batch, arguments.prompt, arguments.new, arguments.rounds)
    if arguments.json:
        print(json.dumps(results))
        return
    base = results[peers[0]]
    print(f"batch {arguments.batch}, prompt {arguments.prompt}, {torch.get_num_threads()} threads")
    print(f"{'':24}{'tokens/s':>10}{'x':>7}{'tokens/CPU s':>14}{'x':>7}")
    for peer, result in results.items():
        columns = [(result[key], result[key] / base[key]) for key in ("tokens_per_second", "tokens_per_cpu_second")]
        (rate, ratio), (cpu_rate, cpu_ratio) = columns
        print(f"{peer:24}{rate:10.2f}{ratio:7.2f}{cpu_rate:14.2f}{cpu_ratio:7.2f}")


if __name__ == "__main__":
    main()
