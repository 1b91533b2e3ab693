"""`tools/serve.py` with a real model, against the official client, plain torch and Mythos.generate."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest
import torch
from helpers.small_checkpoint import write_run
from helpers.small_run import REPOSITORY, SMALL, TINY
from helpers.waiting import wait_until

from experiments.chat_task import write_byte_tokenizer
from mythos_dist.config.load import load_config
from mythos_dist.generate.engine import DecodingEngine
from mythos_dist.generate.sampling import Sampling
from mythos_dist.generate.trained import load_trained

pytestmark = pytest.mark.launch
LOOPS = 2  # model.max_loop_iters of SMALL


class Process:
    """A server in a process of its own."""

    def __init__(self, *arguments):
        command = [sys.executable, str(REPOSITORY / "tools" / "serve.py"), *map(str, arguments), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.greeting = self.process.stdout.readline()
        found = re.search(r"http://\S+/v1", self.greeting)
        assert found, self.greeting + self.process.stderr.read()
        self.url = found[0]
        self.client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=300)

    def metric(self, name):
        text = httpx.get(f"{self.url.removesuffix('/v1')}/metrics").text
        return float(re.search(rf"^{name} (\S+)$", text, re.M)[1])

    def end(self, number):
        """The exit code, output and errors after a signal."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err


@pytest.fixture(scope="module")
def run_dir(conversations, tmp_path_factory) -> Path:
    settings = [*SMALL, "model.vocab_size=260", "model.max_seq_len=96", f"data.path={conversations}"]
    return write_run(tmp_path_factory.mktemp("serve") / "tiny", load_config(str(TINY), settings))


@pytest.fixture(scope="module")
def trained(run_dir):
    return load_trained(run_dir, None)


@pytest.fixture(scope="module")
def server(run_dir):
    server = Process(run_dir, "--max-batch", 8)
    yield server
    assert server.end(signal.SIGTERM)[0] == 0


@pytest.fixture(scope="module")
def client(server):
    return server.client


def greedy(trained, prompt, count, n_loops=LOOPS):
    """Token ids, by the largest logit of the full sequence, without a cache."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(trained.model(torch.tensor([tokens]), n_loops)[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_text_is_that_of_the_model(client, trained):
    """With the loops of training and with others; an answer ends before EOS or the end of its turn."""
    prompt = trained.tokenizer.encode("The story").tolist()
    for loops in (None, 1):
        extra = {} if loops is None else {"loops": loops}
        done = client.completions.create(
            model="tiny", prompt="The story", max_tokens=24, temperature=0, logprobs=0, extra_body=extra
        )
        expected = greedy(trained, prompt, 24, loops or LOOPS)
        if trained.tokenizer.eos_id in expected:
            expected = expected[: expected.index(trained.tokenizer.eos_id)]
        assert done.choices[0].text == trained.tokenizer.decode(expected)
        assert set(done.choices[0].loops) == {loops or LOOPS}


def test_32_parallel_requests_give_the_texts_of_single_ones(client, server):
    """More than the batch holds, of many lengths, complete and streamed."""
    prompts = ["story " * (i % 7) + f"number {i * i}" for i in range(32)]
    arguments = [dict(model="tiny", prompt=p, max_tokens=4 + i % 13, temperature=0) for i, p in enumerate(prompts)]
    alone = [client.completions.create(**one).choices[0].text for one in arguments]
    before = server.metric("mythos_batch_size_count")

    async def ask(client, one, stream):
        if not stream:
            return (await client.completions.create(**one)).choices[0].text
        return "".join([part.choices[0].text async for part in await client.completions.create(stream=True, **one)])

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, one, i % 3 == 0) for i, one in enumerate(arguments)))

    assert asyncio.run(ask_all()) == alone
    steps = server.metric("mythos_batch_size_count") - before
    assert steps < sum(one["max_tokens"] for one in arguments) / 2, "requests share steps"
    assert server.metric("mythos_queue_length") == server.metric("mythos_running_sequences") == 0


def test_a_seed_repeats_a_sample(client):
    """Also among others in a batch; each choice has its own."""
    arguments = dict(model="tiny", prompt="The story", max_tokens=20, temperature=1)
    first = client.completions.create(seed=3, n=4, **arguments).choices
    assert len({choice.text for choice in first}) == 4
    assert [client.completions.create(seed=3 + i, **arguments).choices[0].text for i in range(4)] == [
        choice.text for choice in first
    ]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("exit_", ["latent", "kl"])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.1, 1e9])
def test_exits_through_the_server_are_those_of_the_engine(exit_, threshold, streamed, client, trained):
    """Text and loops of each token; at 0 all loops run, and the greedy text is that of forward passes; far above any
    change each token but the first, whose loops read the prompt, exits after its second loop."""
    loops, prompt = 6, trained.tokenizer.encode("The story").tolist()
    extra = {"loops": loops, "exit": exit_} | ({} if threshold is None else {"exit_threshold": threshold})
    arguments = dict(model="tiny", prompt=prompt, max_tokens=12, temperature=0, extra_body=extra)
    if streamed:
        parts = [part.choices[0] for part in client.completions.create(stream=True, **arguments)]
        text, used = "".join(part.text for part in parts), [n for part in parts for n in part.loops]
    else:
        (choice,) = client.completions.create(**arguments).choices
        text, used = choice.text, choice.loops
    ends = (trained.tokenizer.eos_id,)
    settings = dict(max_new_tokens=12, temperature=0, stop_tokens=ends, exit=exit_, exit_threshold=threshold)
    engine = DecodingEngine(trained.model, trained.tokenizer, n_loops=loops, max_batch=1)
    request = engine.submit(prompt, Sampling(**settings))
    engine.run()
    assert (text, used) == (request.text, request.loops) and used[0] == loops
    if threshold == 0.0:
        expected = [token for token in greedy(trained, prompt, 12, loops)[: len(used)] if token not in ends]
        whole = trained.tokenizer.decode(expected).rstrip("\N{REPLACEMENT CHARACTER}")  # an incomplete last character
        assert text == whole and set(used) == {loops}
    if threshold == 1e9:
        assert len(used) > 1 and set(used[1:]) == {2}


def test_a_stop_string_ends_the_text(client):
    arguments = dict(model="tiny", prompt="The story", max_tokens=20, temperature=0)
    full = client.completions.create(**arguments).choices[0].text
    stop = full[4:6]
    done = client.completions.create(stop=stop, **arguments).choices[0]
    assert (done.text, done.finish_reason) == (full[: full.index(stop)], "stop")


def test_logprobs_are_log_softmax_of_the_logits(client, trained):
    """Of the prompt with `echo`, and of new tokens, in one call; of another number of loops."""
    prompt = trained.tokenizer.encode("A naïve story").tolist()
    done = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=5, temperature=0, logprobs=3, echo=True, extra_body={"loops": 1}
    )
    found = done.choices[0].logprobs
    tokens = prompt + greedy(trained, prompt, 5, 1)[: len(found.token_logprobs) - len(prompt)]
    expected = trained.model(torch.tensor([tokens]), 1)[0].log_softmax(-1)
    values = expected[:-1].gather(-1, torch.tensor(tokens[1:]).unsqueeze(-1))[:, 0]
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    assert found.token_logprobs[1:] == pytest.approx(values.tolist(), abs=1e-4)
    best = expected[:-1].topk(3).values.tolist()
    for top, three in zip(found.top_logprobs[1:], best, strict=True):
        assert max(top.values()) == pytest.approx(three[0], abs=1e-4) and 1 <= len(top) <= 4
    assert found.text_offset[0] == 0 and len(found.text_offset) == len(found.tokens) == len(tokens)
    assert done.usage.completion_tokens == len(tokens) - len(prompt)


def test_chat_logprobs_and_its_stream_agree(client):
    arguments = dict(
        model="tiny", messages=[{"role": "user", "content": "abc"}], temperature=0, max_tokens=8, logprobs=True
    )
    done = client.chat.completions.create(top_logprobs=2, **arguments).choices[0]
    for token in done.logprobs.content:
        assert len(token.top_logprobs) == 2 and token.logprob == token.top_logprobs[0].logprob <= 0
    stream = [part.choices[0] for part in client.chat.completions.create(stream=True, top_logprobs=2, **arguments)]
    assert "".join(part.delta.content or "" for part in stream) == done.message.content
    streamed = [token for part in stream if part.logprobs for token in part.logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in done.logprobs.content]


def test_a_killed_client_frees_its_row(server):
    """SIGKILL of a process that reads a stream."""
    code = (
        "import openai, sys\n"
        "client = openai.OpenAI(base_url=sys.argv[1], api_key='none')\n"
        "for part in client.completions.create(model='tiny', prompt='a', max_tokens=90, n=16, stream=True):\n"
        "    print('part', flush=True)\n"
    )
    before = server.metric("mythos_generated_tokens_total")
    client = subprocess.Popen([sys.executable, "-c", code, server.url], stdout=subprocess.PIPE, text=True)
    assert client.stdout.readline() == "part\n"
    client.kill()
    client.wait()
    wait_until(lambda: server.metric("mythos_running_sequences") == server.metric("mythos_queue_length") == 0)
    assert server.metric("mythos_generated_tokens_total") - before < 16 * 90
    assert server.client.completions.create(model="tiny", prompt="a", max_tokens=2).usage.completion_tokens <= 2


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_signal_lets_requests_finish(run_dir, number):
    """The stream is complete, new connections are refused, and the exit code is 0."""
    server = Process(run_dir, "--model-name", "other")
    assert re.match(r"serving other \(step 3, 2 loops, context 96 tokens\) at http://127", server.greeting)
    stream = server.client.completions.create(model="other", prompt="a", max_tokens=90, n=8, stream=True, seed=1)
    received = [next(iter(stream))]
    server.process.send_signal(number)
    received += list(stream)
    ended = {part.choices[0].index for part in received if part.choices[0].finish_reason in ("stop", "length")}
    assert ended == set(range(8))
    out, err = server.process.communicate(timeout=120)
    assert (server.process.returncode, out, err) == (0, "stopped\n", "")
    with pytest.raises(openai.APIConnectionError):
        server.client.models.list()


def test_a_signal_cancels_requests_after_the_time_given(run_dir):
    server = Process(run_dir, "--shutdown-seconds", 0, "--max-batch", 1)
    stream = server.client.completions.create(model="tiny", prompt="a", max_tokens=90, n=64, stream=True)
    next(iter(stream))
    begin = time.monotonic()
    code, out, _ = server.end(signal.SIGTERM)
    assert (code, out) == (0, "stopped\n") and time.monotonic() > begin


def test_a_server_on_other_addresses_warns_unless_it_has_a_key(run_dir, tmp_path):
    key = tmp_path / "key"
    key.write_text("k" * 32 + "\n")
    key.chmod(0o600)
    server = Process(run_dir, "--host", "0.0.0.0")
    code, _, err = server.end(signal.SIGTERM)
    assert code == 0 and re.fullmatch(r"warning: --host 0\.0\.0\.0 lets other machines .*--api-key-file.*\n", err)
    server = Process(run_dir, "--host", "0.0.0.0", "--api-key-file", key)
    with pytest.raises(openai.AuthenticationError):
        server.client.models.list()
    assert server.client.with_options(api_key="k" * 32).models.list().data[0].id == "tiny"
    assert server.end(signal.SIGTERM)[::2] == (0, "")


@torch.no_grad()
def test_lm_eval_gets_the_log_likelihoods_of_the_model(server, trained, tmp_path):
    """Through its client for completions servers: prompts as token ids, four in a request."""
    pytest.importorskip("tenacity", reason="pip install 'lm-eval[api]'")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    names = write_byte_tokenizer(tmp_path).parent / "tokenizer_config.json"
    names.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": trained.tokenizer.eos}))
    harness = LocalCompletionsAPI(
        base_url=f"{server.url}/completions", model="tiny", tokenizer=str(tmp_path), tokenizer_backend="huggingface",
        batch_size=4, max_length=96,
    )  # fmt: skip
    pairs = [(f"A story of {i}", " " + "word" * (1 + i % 4)) for i in range(9)]
    instances = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for (context, continuation), (found, is_greedy) in zip(pairs, harness.loglikelihood(instances), strict=True):
        before, tokens = (trained.tokenizer.encode(text).tolist() for text in (context, context + continuation))
        logprobs = trained.model(torch.tensor([tokens]), LOOPS)[0, len(before) - 1 : -1].log_softmax(-1)
        new = torch.tensor(tokens[len(before) :])
        assert found == pytest.approx(float(logprobs.gather(-1, new.unsqueeze(-1)).sum()), abs=1e-3)
        assert is_greedy == bool((logprobs.argmax(-1) == new).all())
    (text,) = harness.generate_until(
        [Instance("generate_until", {}, ("A story", {"until": ["\0"], "max_gen_toks": 9}), 0)]
    )
    tokens = greedy(trained, trained.tokenizer.encode("A story").tolist(), 9)
    ends = [tokens.index(trained.tokenizer.eos_id)] if trained.tokenizer.eos_id in tokens else [9]
    assert text == trained.tokenizer.decode(tokens[: ends[0]]).partition("\0")[0]
