"""Kill a small run many times and compare it bit for bit with an uninterrupted one: `python tests/soak.py --kills 200`.

The run is killed at random times, and before, after and in the middle of every call that changes the run folder. On
success the exit code is 0; otherwise a traceback shows the differences and the points of the last kills. The folder is
kept.
"""

import argparse
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

from helpers.small_run import SMALL, TINY
from helpers.soak import Soak, remove_shared_memory
from tqdm import tqdm

from mythos_dist.prepare.convert import convert
from mythos_dist.prepare.corpus import read_documents, write_sample_corpus
from mythos_dist.prepare.tokenizer_training import train_tokenizer


def main() -> None:
    """Build shards, then kill and compare runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seed", type=int, default=random.SystemRandom().randrange(2**32), help="seed of all random choices (random)"
    )
    parser.add_argument("--kills", type=int, default=200, help="number of kills (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3600, help="stop after this time (%(default)s)")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"seed {arguments.seed}, in {folder}", flush=True)
    corpus = write_sample_corpus(folder / "corpus.parquet")
    tokenizer = train_tokenizer(read_documents(corpus), folder / "tokenizer.model", 512)
    convert(corpus, tokenizer, 32, folder / "shards", heldout=0.1, quiet=True)
    begin = time.monotonic()
    try:
        with tqdm(total=arguments.kills, unit="kill", mininterval=10) as bar:
            settings = [str(TINY), *SMALL, f"data.path={folder / 'shards'}"]
            soak = Soak(settings, folder, arguments.seed, on_kill=bar.update)
            soak.run(arguments.kills, arguments.seconds)
    finally:
        remove_shared_memory(folder)
    points = Counter(kill.partition(" ")[0] for kill in soak.kills)
    print(
        f"{len(soak.kills)} kills in {time.monotonic() - begin:.0f} s: {points['before']} before, {points['after']} "
        f"after and {points['half']} in the middle of a call, {points['at']} at random; "
        f"{len(soak.untried_points())} points untried; {soak.runs} runs, each equal to the uninterrupted one"
    )


if __name__ == "__main__":
    main()
