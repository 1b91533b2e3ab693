"""The API over real connections, with an engine that repeats the prompt: what it accepts, refuses and counts."""

import json
import logging
import socket
import threading
import urllib.parse

import httpx
import openai
import pytest
from helpers.api_server import LOOPS, parrot_service, serving
from helpers.waiting import wait_until
from prometheus_client.parser import text_string_to_metric_families

from experiments.chat_task import write_byte_tokenizer
from mythos_dist.data.chat_template import find_renderer
from mythos_dist.data.tokenizer import Tokenizer
from mythos_dist.generate.chat import prompt_tokens
from mythos_dist.serve.protocol import TimedProtocol
from mythos_dist.serve.service import Limits

# One client, a connection for each request: creating a client reads the certificates of the system, 20 ms.
HTTP = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0), timeout=300)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def renderer(tokenizer):
    return find_renderer(tokenizer, None)


@pytest.fixture(scope="module")
def server(tokenizer, renderer):
    """A server for tests that leave nothing behind: its URL and the engine."""
    service, parrot = parrot_service(tokenizer, renderer)
    with serving(service) as url:
        yield url, parrot


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(url, path="/v1/completions", **body):
    return HTTP.post(url + path, json={"model": "parrot", **body})


def metrics_of(url):
    """Sample name and labels -> value."""
    families = text_string_to_metric_families(HTTP.get(f"{url}/metrics").text)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


# --- completions


def test_a_completion_has_the_text_and_counts_its_tokens(client):
    done = client.completions.create(model="parrot", prompt="abc", max_tokens=7)
    (choice,) = done.choices
    assert (choice.text, choice.finish_reason, choice.index) == ("abcabca", "length", 0)
    assert (done.object, done.model) == ("text_completion", "parrot")
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (3, 7, 10)
    assert done.usage.loops == 7 * LOOPS and choice.loops == [LOOPS] * 7
    assert len(client.completions.create(model="parrot", prompt="abc").choices[0].text) == 16, "OpenAI's default"


def test_loops_are_those_of_the_request(client):
    done = client.completions.create(model="parrot", prompt="abc", max_tokens=4, extra_body={"loops": 5})
    assert done.choices[0].loops == [5] * 4


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["abab"]),
        (["ab", "c"], ["abab", "cccc"]),
        ([65, 66], None),
        ([[65], [66, 67]], None),
        ("", [""]),  # the text of EOS, with which documents begin
    ],
)
def test_prompts_are_texts_or_token_ids(client, server, tokenizer, prompt, texts):
    ids = prompt if texts is None else [tokenizer.encode(text).tolist() for text in texts]
    ids = [ids] if isinstance(ids[0], int) else ids
    done = client.completions.create(model="parrot", prompt=prompt, max_tokens=4)
    if texts is None:
        texts = [tokenizer.decode([one[i % len(one)] for i in range(4)]) for one in ids]
        assert [request.prompt for request in server[1].submitted[-len(ids) :]] == ids
    assert [choice.text for choice in done.choices] == texts


def test_choices_have_indices_and_seeds_of_their_own(client, server):
    done = client.completions.create(model="parrot", prompt=["ab", "c"], n=2, seed=7, max_tokens=2)
    assert [(choice.index, choice.text) for choice in done.choices] == [(0, "ab"), (1, "ab"), (2, "cc"), (3, "cc")]
    assert [request.sampling.seed for request in server[1].submitted[-4:]] == [7, 8, 7, 8]
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (3, 8), "a prompt counts once"
    client.completions.create(model="parrot", prompt="a", n=2, max_tokens=1)
    first, second = (request.sampling.seed for request in server[1].submitted[-2:])
    assert first != second, "without a seed it is drawn"


def test_echo_puts_the_prompt_first(client):
    done = client.completions.create(model="parrot", prompt=["ab", [67, 68]], echo=True, max_tokens=0)
    assert [choice.text[:2] for choice in done.choices] == ["ab", done.choices[1].text]
    done = client.completions.create(model="parrot", prompt="ab", echo=True, max_tokens=3)
    assert (done.choices[0].text, done.usage.completion_tokens) == ("ababa", 3)


def test_a_stream_has_the_text_of_the_complete_response(client):
    arguments = dict(model="parrot", prompt=["abc", "naïve 🙂"], n=2, max_tokens=20)
    complete = client.completions.create(**arguments)
    stream = list(client.completions.create(stream=True, stream_options={"include_usage": True}, **arguments))
    for index, choice in enumerate(complete.choices):
        parts = [part.choices[0] for part in stream if part.choices and part.choices[0].index == index]
        assert "".join(part.text for part in parts) == choice.text and len(parts) == 20
        assert [part.finish_reason for part in parts] == [None] * 19 + ["length"]
    assert stream[-1].choices == [] and stream[-1].usage == complete.usage
    assert all(part.usage is None for part in stream[:-1]) and len({part.id for part in stream}) == 1


@pytest.mark.parametrize(("stop", "text"), [("fg", "abcde"), (["efa", "gab"], "abcdef"), (["cx", "efgx"], None)])
def test_no_part_of_a_stop_string_is_streamed(client, stop, text):
    """Its first characters are kept back until the next ones decide."""
    arguments = dict(model="parrot", prompt="abcdefg", stop=stop, max_tokens=14)
    stream = list(client.completions.create(stream=True, **arguments))
    assert "".join(part.choices[0].text for part in stream) == (text or "abcdefg" * 2)
    assert stream[-1].choices[0].finish_reason == ("stop" if text else "length")


# --- chat


def test_chat_continues_the_conversation_as_it_is_rendered_for_training(client, server, tokenizer, renderer):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "BA"},
        {"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]},
    ]
    done = client.chat.completions.create(model="parrot", messages=messages, max_completion_tokens=3)
    request = server[1].submitted[-1]
    plain = [*messages[:3], {"role": "user", "content": "cd"}]
    assert request.prompt == prompt_tokens(tokenizer, renderer, plain)
    assert set(request.sampling.stop_tokens) == {tokenizer.special_tokens["<|end|>"], tokenizer.eos_id}
    (choice,) = done.choices
    assert (choice.message.role, choice.message.content) == ("assistant", tokenizer.decode(request.prompt[:3]))
    assert (done.object, choice.finish_reason) == ("chat.completion", "length")
    client.chat.completions.create(model="parrot", messages=plain[:2])
    request = server[1].submitted[-1]
    assert request.sampling.max_new_tokens == 64 - len(request.prompt), "by default the rest of the context"


def test_a_chat_stream_begins_with_the_role(client):
    arguments = dict(model="parrot", messages=[{"role": "user", "content": "hello"}], max_tokens=12)
    complete = client.chat.completions.create(**arguments)
    stream = list(client.chat.completions.create(stream=True, **arguments))
    assert stream[0].choices[0].delta.role == "assistant" and stream[0].object == "chat.completion.chunk"
    text = "".join(part.choices[0].delta.content or "" for part in stream)
    assert text == complete.choices[0].message.content and stream[-1].choices[0].finish_reason == "length"


def test_a_model_without_a_template_refuses_chat_only(tokenizer):
    with serving(parrot_service(tokenizer, None)[0]) as url:
        refused = post(url, "/v1/chat/completions", messages=[{"role": "user", "content": "a"}])
        assert refused.status_code == 400 and "no chat template" in refused.json()["error"]["message"]
        assert post(url, prompt="a").status_code == 200


# --- bodies that are refused

BAD_BODIES = [  # body, param, part of the message
    (b"", None, "not valid JSON"),
    (b"{", None, "not valid JSON"),
    (b"[1]", None, "expected a JSON object"),
    (b'{"model": "parrot", "prompt": "\xff\xfe"}', None, "not valid JSON"),
    (b'{"model": "parrot", "prompt": "\\ud800"}', None, "not valid JSON"),
    (b'{"model": "parrot", "temperature": NaN}', None, "not valid JSON"),
    (b'{"model": "parrot", "temperature": 1e999}', "temperature", "temperature"),
    (b'{"model": "parrot", "temperature": -1}', "temperature", "greater than or equal to 0"),
    (b'{"model": "parrot", "temperature": "1"}', "temperature", "valid number"),
    (b'{"model": "parrot", "max_tokens": -1}', "max_tokens", "greater than or equal to 0"),
    (b'{"model": "parrot", "max_tokens": 1.5}', "max_tokens", "valid integer"),
    (b'{"model": "parrot", "max_tokens": true}', "max_tokens", "valid integer"),
    (b'{"model": "parrot", "max_tokens": ' + b"9" * 5000 + b"}", None, "not valid JSON"),
    (b'{"model": "parrot", "max_tokens": 65}', "prompt", "context of this model is 64 tokens"),
    (b'{"model": "parrot", "max_tokens": 0}', "max_tokens", "needs echo"),
    (b'{"model": "parrot", "n": 0}', "n", "greater than or equal to 1"),
    (b'{"model": "parrot", "n": 9}', None, "at most 8"),
    (b'{"model": "parrot", "top_p": 0}', "top_p", "greater than 0"),
    (b'{"model": "parrot", "seed": -1}', "seed", "greater than or equal to 0"),
    (b'{"model": "parrot", "stop": ""}', "stop", "not empty"),
    (b'{"model": "parrot", "stop": [1]}', "stop", "list of such strings"),
    (b'{"model": "parrot", "prompt": [true]}', "prompt", "expected a string"),
    (b'{"model": "parrot", "prompt": []}', "prompt", "expected a string"),
    (b'{"model": "parrot", "prompt": [1, "a"]}', "prompt", "expected a string"),
    (b'{"model": "parrot", "prompt": [-1]}', None, "token id -1 is out of range"),
    (b'{"model": "parrot", "prompt": [260]}', None, "token id 260 is out of range"),
    (b'{"model": "parrot", "prompt": {"a": 1}}', "prompt", "expected a string"),
    (b'{"model": "parrot", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, "not valid JSON"),
    (b'{"model": "parrot", "loops": 0}', "loops", "greater than or equal to 1"),
    (b'{"model": "parrot", "exit_threshold": 1}', "exit_threshold", "needs exit"),
    (b'{"model": "parrot", "exit": "halting"}', None, "needs a model with halting"),
    (b'{"model": "parrot", "exit": "soon", "exit_threshold": 1}', "exit", "'latent', 'kl' or 'halting'"),
    (b'{"model": "parrot", "suffix": "x"}', "suffix", "not supported"),
    (b'{"model": "parrot", "presence_penalty": 0.5}', "presence_penalty", "not supported"),
    (b'{"model": "parrot", "best_of": 2}', "best_of", "not supported"),
    (b'{"model": "parrot", "maxtokens": 2}', "maxtokens", "not a field"),
    (b'{"model": "parrot", "logprobs": 21}', "logprobs", "less than or equal to 20"),
    (b'{"prompt": "a"}', "model", "model is missing"),
    (b'{"model": 1}', "model", "valid string"),
]
BAD_CHATS = [
    ({}, "messages", "messages is missing"),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": "hello"}, "messages", "valid list"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role", "'assistant'"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "is missing"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content", "valid string"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "only parts of type"),
    ({"messages": [{"role": "user", "content": "<|end|>"}]}, "messages", "special token <|end|>"),
    ({"messages": [{"role": "user", "content": "a" * 64}]}, "messages", "context of this model is 64 tokens"),
    ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ({"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}, "tools", "not supported"),
]


def assert_refused(response, status, param, message, code=None):
    error = response.json()["error"]
    assert response.status_code == status, error
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"] == "invalid_request_error" and error["code"] == code) or status != 400
    assert error["param"] == param and message in error["message"], error
    assert len(error["message"]) < 1000


@pytest.mark.parametrize(("body", "param", "message"), BAD_BODIES, ids=lambda value: str(value)[:40])
def test_bad_bodies_get_the_error_object(server, body, param, message):
    response = HTTP.post(f"{server[0]}/v1/completions", content=body, headers={"content-type": "application/json"})
    code = "context_length_exceeded" if "context of" in message else None
    assert_refused(response, 400, param, message, code)
    assert post(server[0], prompt="ab", max_tokens=2).json()["choices"][0]["text"] == "ab", "the server responds still"


@pytest.mark.parametrize(("body", "param", "message"), BAD_CHATS, ids=lambda value: str(value)[:40])
def test_bad_conversations_get_the_error_object(server, body, param, message):
    code = "context_length_exceeded" if "context of" in message else None
    assert_refused(post(server[0], "/v1/chat/completions", **body), 400, param, message, code)


def test_all_problems_of_a_body_are_in_one_message(server):
    message = post(server[0], prompt="a", max_tokens=-1, temperature=3, suffix="x").json()["error"]["message"]
    assert all(name in message for name in ("max_tokens=-1", "temperature=3", "suffix='x'"))


def test_the_client_raises_its_own_errors(client):
    """Of the class that OpenAI's server would cause."""
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="other", prompt="a")
    assert error.value.code == "model_not_found" and error.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="not supported"):
        client.completions.create(model="parrot", prompt="a", frequency_penalty=1)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="parrot", input="a")


def test_models_are_listed(client, server):
    (card,) = client.models.list().data
    assert (card.id, card.owned_by, card.max_model_len, card.loops) == ("parrot", "mythos_dist", 64, LOOPS)
    assert client.models.retrieve("parrot") == card
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    wrong = HTTP.get(f"{server[0]}/v1/completions")
    assert wrong.status_code == 405 and "Method Not Allowed" in wrong.json()["error"]["message"]
    schema = HTTP.get(f"{server[0]}/openapi.json").json()
    assert "loops" in json.dumps(schema["paths"]["/v1/chat/completions"]["post"]["requestBody"])


# --- limits


def test_large_bodies_are_refused(tokenizer):
    """Also where their length is not announced."""
    service, _ = parrot_service(tokenizer, limits=Limits(body_bytes=1000))
    with serving(service) as url:
        assert_refused(post(url, prompt="a" * 1000), 413, None, "larger than 1,000 bytes")
        parts = (b"a" * 100 for _ in range(100))
        header = {"content-type": "application/json"}
        assert_refused(HTTP.post(f"{url}/v1/completions", content=parts, headers=header), 413, None, "larger than")
        assert post(url, prompt="a", max_tokens=1).status_code == 200


def test_a_body_of_another_type_is_refused(server):
    """A page in a browser can send such bodies to any host."""
    response = HTTP.post(f"{server[0]}/v1/completions", content=b'{"model": "parrot"}')
    assert_refused(response, 400, None, "send application/json")


def test_another_host_name_is_refused(server):
    """A name that resolves to 127.0.0.1, of a page that a browser has opened."""
    assert HTTP.get(f"{server[0]}/v1/models", headers={"host": "attacker.example:8000"}).status_code == 403
    assert HTTP.get(f"{server[0]}/v1/models", headers={"host": "localhost:8000"}).status_code == 200


def test_requests_need_the_key_if_there_is_one(tokenizer):
    with serving(parrot_service(tokenizer, key="k" * 20)[0]) as url:
        right = openai.OpenAI(base_url=f"{url}/v1", api_key="k" * 20, max_retries=0)
        assert right.completions.create(model="parrot", prompt="ab", max_tokens=2).choices[0].text == "ab"
        with pytest.raises(openai.AuthenticationError) as error:
            right.with_options(api_key="k" * 19).models.list()
        assert error.value.code == "invalid_api_key"
        for header in ("Bearer", "Basic " + "k" * 20, "Bearer k é"):
            response = HTTP.get(f"{url}/v1/models", headers={"authorization": header.encode()})
            assert_refused(response, 401, None, "API key is wrong", "invalid_api_key")
        assert HTTP.get(f"{url}/metrics").status_code == HTTP.get(f"{url}/nowhere").status_code == 401
        assert HTTP.get(f"{url}/health").json() == {"status": "ok"}


def test_too_many_sequences_get_status_429(tokenizer):
    service, parrot = parrot_service(tokenizer, max_sequences=2)
    parrot.pace = threading.Semaphore(0)
    with serving(service) as url:
        threads = [threading.Thread(target=post, args=(url,), kwargs=dict(prompt="a", max_tokens=2)) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(parrot.submitted) == 2)
        refused = post(url, prompt="a")
        assert_refused(refused, 429, None, "limit of 2 sequences", "rate_limit_exceeded")
        assert refused.headers["retry-after"] == "1"
        assert post(url, prompt="a", max_tokens=0, echo=True).status_code == 429
        parrot.pace.release(2)
        for thread in threads:
            thread.join()
        parrot.pace.release(1)
        assert post(url, prompt="a", max_tokens=1).status_code == 200


def raw_request(url, body, **options):
    """A connection with a request sent, whose response is not read."""
    host, port = urllib.parse.urlsplit(url).netloc.split(":")
    content = json.dumps({"model": "parrot", "prompt": "ab", **body}).encode()
    connection = socket.socket()
    if "receive_buffer" in options:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, options["receive_buffer"])
    connection.connect((host, int(port)))
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    connection.sendall(f"{head}{len(content)}\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_is_gone_frees_its_rows(tokenizer, stream):
    """One that waits for a row as well as one that has one."""
    service, parrot = parrot_service(tokenizer, max_batch=1, max_sequences=2)
    parrot.pace = threading.Semaphore(1)
    with serving(service) as url:
        first = raw_request(url, {"stream": stream})
        wait_until(lambda: parrot.batch_sizes)
        second = raw_request(url, {"stream": stream})
        wait_until(lambda: len(parrot.submitted) == 2)
        second.close()
        wait_until(lambda: parrot.cancelled == parrot.submitted[1:])
        first.close()
        wait_until(lambda: len(parrot.cancelled) == 2 and not parrot.requests)
        parrot.pace = None
        assert post(url, prompt="abc", max_tokens=4, n=2).json()["choices"][1]["text"] == "abca"
        assert metrics_of(url)["mythos_sequences_total", "cancelled"] == 2


@pytest.mark.launch
def test_a_client_that_is_slow_is_disconnected(tokenizer):
    """While it sends the head or the body, and when it does not read what it has asked for."""

    class Impatient(TimedProtocol):
        head_seconds, read_seconds = 0.2, 0.2

    service, parrot = parrot_service(
        tokenizer, context=1 << 20, max_batch=64, max_sequences=64, limits=Limits(body_seconds=0.2)
    )
    with serving(service, Impatient) as url:
        host, port = urllib.parse.urlsplit(url).netloc.split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: ")
            assert connection.recv(100) == b"", "closed without a response"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 10\r\n\r\n{"
            )
            received = b""
            while part := connection.recv(10_000):
                received += part
            assert received.startswith(b"HTTP/1.1 408 ") and b"request_timeout" in received
        with raw_request(url, {"stream": True, "n": 64, "max_tokens": 1 << 19}, receive_buffer=4096):
            wait_until(lambda: len(parrot.cancelled) == 64)
        assert post(url, prompt="a", max_tokens=1).status_code == 200


# --- failures of the engine


def test_a_failed_step_ends_its_requests_and_not_the_server(tokenizer, caplog):
    service, parrot = parrot_service(tokenizer)
    parrot.failures = [RuntimeError("secret detail")]
    with serving(service) as url, caplog.at_level(logging.CRITICAL):
        failed = post(url, prompt="a")
        assert failed.status_code == 500 and "log says why" in failed.json()["error"]["message"]
        assert failed.json()["error"]["type"] == "server_error" and not parrot.requests
        assert post(url, prompt="ab", max_tokens=2).json()["choices"][0]["text"] == "ab"
        assert HTTP.get(f"{url}/health").status_code == 200
        parrot.failures = [RuntimeError()]
        events = post(url, prompt="a", stream=True).text
        assert '"type": "server_error"' in events and "[DONE]" not in events


def test_an_engine_that_cannot_be_emptied_is_reported_as_failed(tokenizer, monkeypatch, caplog):
    service, parrot = parrot_service(tokenizer)
    parrot.failures = [RuntimeError()]
    monkeypatch.setattr(parrot, "cancel", lambda request: 1 / 0)
    with serving(service) as url, caplog.at_level(logging.CRITICAL):
        assert post(url, prompt="a").status_code == 503
        assert post(url, prompt="a").status_code == 503
        assert HTTP.get(f"{url}/health").status_code == 503


# --- metrics


def test_metrics_count_what_was_done(tokenizer):
    service, parrot = parrot_service(tokenizer, max_batch=2)
    with serving(service) as url:
        post(url, prompt="abc", max_tokens=5, n=3, loops=6)
        post(url, prompt="abcd", max_tokens=9, stop="cd")
        post(url, prompt="a", max_tokens=-1)
        found = metrics_of(url)
    assert found["mythos_requests_total", "/v1/completions", "200"] == 2
    assert found["mythos_requests_total", "/v1/completions", "400"] == 1
    assert found[("mythos_prompt_tokens_total",)] == 7
    assert found[("mythos_generated_tokens_total",)] == 3 * 5 + 4
    assert found["mythos_sequences_total", "length"] == 3 and found["mythos_sequences_total", "stop"] == 1
    assert found[("mythos_queue_length",)] == found[("mythos_running_sequences",)] == 0
    assert found[("mythos_batch_size_sum",)] == sum(parrot.batch_sizes) == 19
    assert found[("mythos_batch_size_count",)] == len(parrot.batch_sizes)
    assert found[("mythos_time_to_first_token_seconds_count",)] == 4
    assert found[("mythos_loops_per_token_sum",)] == 15 * 6 + 4 * LOOPS


def test_metrics_show_the_queue(tokenizer):
    service, parrot = parrot_service(tokenizer, max_batch=2)
    parrot.pace = threading.Semaphore(1)
    with serving(service) as url, raw_request(url, {"n": 5}):
        wait_until(lambda: metrics_of(url)[("mythos_running_sequences",)] == 2)
        assert metrics_of(url)[("mythos_queue_length",)] == 3
