"""Converting real text, against the usual loop: `sp.encode` per document, MDSWriter per window.

All figures come from one interleaved run and are CPU seconds of the conversion alone, without imports, each in its own
process. The text is Debian's documentation (benchmarks/debian_text.py), the tokenizers are trained on every fourth
document of it, so they have not seen most of the text.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

SEQ_LEN = 2048
VOCAB_SIZE = 32000


def main() -> None:
    """Run all rounds and print the table; with --run, run as one of the timed processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=Path("data/debian-text"), help="folder of the text (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument(
        "--memory", action="store_true", help="also measure memory for a file of 4 GB and a document of 200 MB"
    )
    parser.add_argument("--run", nargs=3, metavar=("KIND", "MODEL", "INPUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(measure(*arguments.run)))
        return
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # as `mythos shards` does
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name("debian_text.py")), "--out", str(arguments.text)], check=True
    )
    text = str(arguments.text / "*.parquet")
    models = {kind: train(arguments.text, kind) for kind in ("bpe", "unigram")}
    runs: dict[str, list[dict]] = {}
    for number in range(arguments.rounds):
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
        for name, (kind, model) in {
            "plain": ("plain", "bpe"),
            "bpe": ("ours:1", "bpe"),
            "unigram": ("ours:1", "unigram"),
            "share": ("share", "bpe"),
            "share unigram": ("share", "unigram"),
            "read plain": ("read-plain", "bpe"),
            "read": ("read", "bpe"),
        }.items():
            runs.setdefault(name, []).append(call(kind, models[model], text))
    report(runs)
    scaling(arguments.text, models["unigram"], arguments.rounds + 2)
    if arguments.memory:
        memory(arguments.text, models["bpe"])


def call(kind: str, model: Path, text: str) -> dict[str, Any]:
    """One timed process."""
    return result(start(kind, model, text))


def start(kind: str, model: Path, text: str) -> subprocess.Popen:
    """Start a timed process."""
    return subprocess.Popen(
        [sys.executable, __file__, "--run", kind, str(model), text], stdout=subprocess.PIPE, text=True
    )


def result(process: subprocess.Popen) -> dict[str, Any]:
    """The result of a timed process."""
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(process.returncode)
    return json.loads(output.splitlines()[-1])


def report(runs: dict[str, list[dict]]) -> None:
    """Medians and ratios."""
    cpu = {name: statistics.median(run["cpu"] for run in some) for name, some in runs.items()}
    wall = {name: statistics.median(run["wall"] for run in some) for name, some in runs.items()}
    tokens = {name: some[0]["tokens"] for name, some in runs.items()}
    megabytes = {name: max(run["worker_mb"] for run in some) for name, some in runs.items()}
    print(f"{'':24}{'CPU s':>8}{'wall s':>8}{'Mtok/s':>8}{'x plain':>9}{'MB':>6}")
    for name, label in [
        ("plain", "plain loop, BPE"),
        ("bpe", "ours, same BPE model"),
        ("unigram", "ours, unigram"),
    ]:
        rate = tokens[name] / cpu[name] / 1e6
        ratio = cpu["plain"] / cpu[name]
        print(f"{label:24}{cpu[name]:8.2f}{wall[name]:8.2f}{rate:8.2f}{ratio:9.2f}{megabytes[name]:6.0f}")
    for name in ("share", "share unigram"):
        print(f"encoding, {'unigram' if 'unigram' in name else 'BPE'}: {runs[name][0]['share']:.0%} of the CPU time")
    for name, label in [("read plain", "StreamingDataset and DataLoader"), ("read", "ours")]:
        rate = statistics.median(run["samples"] / run["wall"] for run in runs[name])
        print(f"reading, {label}: {rate:,.0f} samples of {SEQ_LEN} tokens per second")


def scaling(folder: Path, model: Path, rounds: int) -> None:
    """Wall time of two workers against one, and the machine's limit: two concurrent conversions of half the text.

    The fastest of each, because other load on the machine only adds time.
    """
    halves = sorted(map(str, folder.glob("*.parquet")))
    walls: dict[str, list[float]] = {"one": [], "two": [], "apart": []}
    for _ in range(rounds):
        walls["one"].append(call("ours:1", model, str(folder / "*.parquet"))["wall"])
        walls["two"].append(call("ours:2", model, str(folder / "*.parquet"))["wall"])
        both = [start("ours:1", model, half) for half in halves]
        walls["apart"].append(max(result(one)["wall"] for one in both))
    one, two, apart = (min(some) for some in walls.values())
    print(f"two workers: {one / two:.2f} x one worker in wall time; two concurrent conversions: {one / apart:.2f} x")


def measure(kind: str, model: str, text: str) -> dict[str, Any]:
    """The work of one process; returns its time and memory."""
    if kind.startswith("read"):
        return measure_reading(kind, model, text)
    folder = Path(tempfile.mkdtemp())
    if kind == "plain":
        from streaming import MDSWriter  # noqa: F401 — the import is not timed

        work, share = (lambda: plain(model, text, folder / "out")), None
    else:
        from mythos_dist.data.tokenizer import Tokenizer
        from mythos_dist.prepare.convert import convert

        tokenizer: Any = Tokenizer.load(model)
        share = Timed(tokenizer) if kind == "share" else None
        timed = cast(Tokenizer, share or tokenizer)
        workers = int(kind.partition(":")[2] or 0)

        def work() -> int:
            manifest = convert(text, timed, SEQ_LEN, folder / "out", workers=workers, quiet=True, heldout=0.02)
            return manifest.tokens

    begin, before = time.perf_counter(), cpu_seconds()
    tokens = work()
    wall, cpu = time.perf_counter() - begin, cpu_seconds() - before
    shutil.rmtree(folder)
    who = resource.RUSAGE_CHILDREN if kind.startswith("ours") else resource.RUSAGE_SELF
    mb = resource.getrusage(who).ru_maxrss / 1024
    return {
        "tokens": tokens,
        "wall": wall,
        "cpu": cpu,
        "worker_mb": mb,
        "share": share.seconds / cpu if share else None,
    }


def cpu_seconds() -> float:
    """CPU seconds of this process and of its finished workers."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


class Timed:
    """A tokenizer that sums up its CPU time."""

    def __init__(self, tokenizer: Any):
        self._tokenizer, self.seconds = tokenizer, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode_documents(self, *arguments: Any) -> Any:
        begin = time.process_time()
        result = self._tokenizer.encode_documents(*arguments)
        self.seconds += time.process_time() - begin
        return result


def plain(model: str, text: str, out: Path) -> int:
    """The usual loop; returns the number of tokens."""
    import glob

    import numpy as np
    import pyarrow.parquet as pq
    import sentencepiece as spm
    from streaming import MDSWriter

    processor, count, pending = spm.SentencePieceProcessor(model_file=model), 0, []
    with MDSWriter(out=str(out), columns={"tokens": "ndarray:int32"}, hashes=["sha1", "xxh64"]) as writer:
        for file in sorted(glob.glob(text)):
            for batch in pq.ParquetFile(file).iter_batches(columns=["text"]):
                for document in batch.column(0).to_pylist():
                    ids = processor.encode(document)
                    count += len(ids)
                    pending += [*ids, processor.eos_id()]
                    while len(pending) > SEQ_LEN:
                        writer.write({"tokens": np.array(pending[: SEQ_LEN + 1], dtype=np.int32)})
                        pending = pending[SEQ_LEN + 1 :]
    return count


def measure_reading(kind: str, model: str, text: str) -> dict[str, Any]:
    """Samples a second in one process without loader workers, micro-batches of 8, after a first epoch."""
    from mythos_dist.data.tokenizer import Tokenizer
    from mythos_dist.prepare.convert import convert

    folder = Path(tempfile.mkdtemp())
    manifest = convert(text, Tokenizer.load(model), SEQ_LEN, folder / "out", quiet=True)
    samples = manifest.splits["train"].windows // 8 * 8
    if kind == "read":
        from mythos_dist.data.stream import ReplicaStream

        stream = ReplicaStream(
            folder / "out",
            "train",
            seq_len=SEQ_LEN,
            vocab_size=VOCAB_SIZE,
            global_batch=8,
            micro_batch=8,
            replica=0,
            num_replicas=1,
            seed=0,
        )
        batches = stream.steps(0)
    else:
        from streaming import StreamingDataLoader, StreamingDataset

        data = StreamingDataset(local=str(folder / "out" / "train"), shuffle=True, batch_size=8)
        batches = (batch for _ in range(3) for batch in StreamingDataLoader(data, batch_size=8))
    for _ in range(samples // 8):
        next(batches)
    begin, before = time.perf_counter(), cpu_seconds()
    for _ in range(samples // 8 - 1):
        next(batches)
    wall, cpu = time.perf_counter() - begin, cpu_seconds() - before
    shutil.rmtree(folder)
    return {"samples": samples - 8, "wall": wall, "cpu": cpu, "tokens": 0, "worker_mb": 0}


def train(folder: Path, kind: str) -> Path:
    """A tokenizer of VOCAB_SIZE pieces, trained on every fourth document; stored with the text."""
    from mythos_dist.prepare.corpus import read_documents
    from mythos_dist.prepare.tokenizer_training import train_tokenizer

    model = folder / f"{kind}.model"
    if not model.exists():
        print(f"training a tokenizer: {kind}", file=sys.stderr)
        texts = read_documents(str(folder / "*.parquet"))
        train_tokenizer((one for i, one in enumerate(texts) if i % 4 == 0), model, VOCAB_SIZE, kind)
    return model


def memory(folder: Path, model: Path) -> None:
    """Peak memory of a worker for a parquet file of 4 GB of text, and for one document of 200 MB; BPE's word cache
    included."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from mythos_dist.prepare.corpus import read_documents

    texts = list(read_documents(str(folder / "*.parquet")))
    with tempfile.TemporaryDirectory() as temporary:
        large = Path(temporary) / "large.parquet"
        with pq.ParquetWriter(large, pa.schema({"text": pa.string()})) as writer:
            for copy in range(-(-4 * 10**9 // sum(map(len, texts)))):
                writer.write_table(pa.table({"text": [f"{copy} {text}" for text in texts]}), row_group_size=1000)
        print(f"a file with 4 GB of text: {call('ours:1', model, str(large))['worker_mb']:.0f} MB in a worker")
        large.unlink()
        book = ("\n".join(texts) * 4)[:200_000_000]
        (Path(temporary) / "book.txt").write_text(book, encoding="utf-8")
        (Path(temporary) / "book.jsonl").write_text(json.dumps({"text": book}), encoding="utf-8")
        pq.write_table(pa.table({"text": [book]}), Path(temporary) / "book.parquet")
        for suffix in ("txt", "jsonl", "parquet"):
            used = call("ours:1", model, str(Path(temporary) / f"book.{suffix}"))["worker_mb"]
            print(f"one document of 200 MB, {suffix}: {used:.0f} MB in a worker")


if __name__ == "__main__":
    main()
