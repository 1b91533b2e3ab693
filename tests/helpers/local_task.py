"""Local tasks for lm-evaluation-harness: a YAML file, and its documents beside it."""

import json
import random
from pathlib import Path
from typing import Any

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
target_delimiter: ""
{more}
"""
ACC = "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"
MATCH = "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"


def write_choices(folder: Path, name: str, documents: list[dict[str, Any]]) -> Path:
    """A multiple-choice task; documents have `question`, `choices` and the index `answer`."""
    more = f'doc_to_choice: "{{{{choices}}}}"\n{ACC}'
    return _write(folder, name, documents, "multiple_choice", "{{question}}", "{{answer}}", more)


def write_texts(folder: Path, name: str, texts: list[str]) -> Path:
    """Bits per byte of full texts."""
    more = "metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]"
    documents = [{"text": text} for text in texts]
    return _write(folder, name, documents, "loglikelihood_rolling", "", "{{text}}", more)


def write_answers(folder: Path, name: str, documents: list[dict[str, Any]], more: str = "") -> Path:
    """A task of generated answers; documents have `question` and `answer`."""
    settings = f'generation_kwargs: {{until: ["\\n"], max_gen_toks: 3, do_sample: false{more}}}\n{MATCH}'
    return _write(folder, name, documents, "generate_until", "{{question}}", "{{answer}}", settings)


def random_choices(count: int, num_choices: int = 3) -> list[dict[str, Any]]:
    """Questions and choices of random words, of many lengths."""
    draw = random.Random(count)

    def words(number: int) -> str:
        return " ".join("".join(draw.choices("abcdefghij", k=draw.randint(1, 8))) for _ in range(number))

    return [
        {
            "question": words(draw.randint(1, 6)),
            "choices": [f" {words(draw.randint(1, 2))}" for _ in range(num_choices)],
            "answer": draw.randrange(num_choices),
        }
        for _ in range(count)
    ]


def _write(folder: Path, name: str, documents: list[dict], kind: str, text: str, target: str, more: str) -> Path:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))
    file = folder / f"{name}.yaml"
    file.write_text(TASK.format(name=name, kind=kind, text=text, target=target, more=more))
    return file
