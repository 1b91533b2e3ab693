"""Cut a pretrained model of transformers into prelude, looped block and coda: an export that a run begins with.

The layers of the original keep their order: the first ones are the prelude, consecutive ones in the middle the looped
block (model.loop_layers), the last ones the coda. A dense FFN of a looped layer becomes one expert, which all tokens
get, several copies of it with a router (upcycling, Komatsuzaki et al. 2022), or slices of its hidden channels. The
weights of a token's experts sum to 1, so copies without noise, and slices of which each token gets all, give the same
output: with one loop the result computes what the original does, if no layer is left out.

Decisions: LOOPS-16, CHECKPOINT-19.
"""

import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mythos_dist.checkpoint.export import Dtype, export
from mythos_dist.checkpoint.families import (
    EMBEDDING,
    HEAD,
    PretrainedModel,
    TensorSources,
    layer_sources,
    model_sources,
    parse_model,
)
from mythos_dist.checkpoint.manifest import BUFFER, PARAMETER, CheckpointManifest, TensorEntry, library_versions
from mythos_dist.checkpoint.open_mythos import SafeTensors, mismatches
from mythos_dist.checkpoint.pieces import Piece, overlaps
from mythos_dist.checkpoint.reader import Checkpoint, Wanted
from mythos_dist.config.dump import dump_settings
from mythos_dist.config.layout import divisors, few
from mythos_dist.config.schema import ActConfig, LoopsConfig, MythosConfig
from mythos_dist.errors import UserError, first_line
from mythos_dist.model.init import initial_value
from mythos_dist.model.mythos import Mythos
from mythos_dist.progress import Progress

CONFIG_FILE = "train.yaml"
_TABLE = ".rotary_emb.inv_freq"  # which early versions of transformers saved
_EXPERTS, _DOWN, _ROUTER = ("experts.w1", "experts.w2", "experts.w3"), "experts.w2", "router.weight"


class Cut(NamedTuple):
    """Which layers of the original are prelude, looped block and coda."""

    prelude: int  # the first layers
    first: int  # of the looped layers, counted from 0 as in the names of tensors
    last: int  # of the looped layers, included
    coda: int  # the last layers

    def layers(self, num_layers: int) -> tuple[list[int], list[int], list[int]]:
        """The numbers of the original's layers, by part."""
        every = range(num_layers)
        return (
            list(every[: self.prelude]),
            list(every[self.first : self.last + 1]),
            list(every[num_layers - self.coda :]),
        )

    def problems(self, num_layers: int) -> Iterator[str]:
        """Why a model of `num_layers` layers does not have these parts."""
        what = f"--prelude {self.prelude} --loop {self.first}..{self.last} --coda {self.coda}"
        if self.last < self.first:
            yield f"{what}: the looped block has no layer; --loop FIRST..LAST counts layers from 0, the last included"
        elif self.first < self.prelude or self.last >= num_layers - self.coda:
            free = f"{self.prelude} to {num_layers - self.coda - 1}"
            yield f"{what}: of {num_layers} layers {free} are free for --loop, counted from 0; parts must not overlap"

    def left_out(self, num_layers: int) -> list[int]:
        """Layers of the original that are in no part."""
        return sorted(set(range(num_layers)) - {layer for part in self.layers(num_layers) for layer in part})


class Upcycling(NamedTuple):
    """How dense FFNs of looped layers become experts."""

    n_experts: int = 1
    n_experts_per_tok: int = 1
    noise: float = 0.0  # standard deviation, as a part of that of the matrix
    slices: bool = False  # each expert has a part of the hidden channels; else all, as copies

    @property
    def divisor(self) -> int:
        """Parts that the hidden channels of an FFN are divided into."""
        return self.n_experts if self.slices else 1

    def problems(self, hidden: int) -> Iterator[str]:
        """Why an FFN of `hidden` channels does not become these experts."""
        if self.n_experts_per_tok > self.n_experts:
            yield f"--experts-per-token {self.n_experts_per_tok} is more than --experts {self.n_experts}"
        if hidden % self.divisor:
            (fitting,) = few(divisors(hidden), self.n_experts, most=1)
            yield (
                f"--experts {self.n_experts} --slices: {hidden} hidden channels of an FFN do not divide by it; the "
                f"nearest that does is {fitting}"
            )

    def experts(self, value: Tensor, down: bool) -> Tensor:
        """value (1, F, D): a matrix of a dense FFN; `down`: its last one. Returns (E, F, D), of slices (E, F / E, D).

        The mean of all slices' outputs would be 1 / E of the FFN's, so that of slices is E times as large.
        """
        if not self.slices:
            return value.repeat(self.n_experts, 1, 1)
        return value.reshape(self.n_experts, -1, value.shape[-1]) * (self.n_experts if down else 1)


class PretrainedWeights(Checkpoint):
    """A pretrained model as a checkpoint of step 0 of the looped model that it becomes."""

    def __init__(
        self, folder: Path, cut: Cut, *, loops: int, injection: str = "difference", upcycling: Upcycling | None = None,
        seed: int = 0,
    ):  # fmt: skip
        """Raises UserError, with all problems, if the folder is not a model that can be cut like this."""
        upcycling = upcycling or Upcycling()
        pretrained = read_pretrained(folder, cut, upcycling)
        self.model = MythosConfig(**_settings(pretrained, cut, loops, injection, upcycling))
        self.left_out = cut.left_out(pretrained.num_layers)
        self._upcycling, self._seed = upcycling, seed
        self._state = SafeTensors(sorted(folder.glob("*.safetensors")))
        self._sources = _sources(pretrained, cut)
        self._last: tuple[str, Tensor] | None = None  # blocks of one tensor are read one after the other
        with torch.device("meta"):
            mythos = Mythos(self.model, act=ActConfig(mode="off"))
        tensors = {name: TensorEntry(tuple(value.shape), (PARAMETER,)) for name, value in mythos.named_parameters()}
        tensors |= {name: TensorEntry(tuple(value.shape), (BUFFER,)) for name, value in mythos.named_buffers()}
        self._check_tensors(folder, pretrained, {name: entry.shape for name, entry in tensors.items()})
        self.loops = LoopsConfig(distribution="poisson", mean=loops)
        manifest = CheckpointManifest(
            step=0,
            tokens=0,
            start=0,
            layout={},
            config={"model": asdict(self.model), "act": asdict(ActConfig(mode="off")), "loops": asdict(self.loops)},
            data="",
            versions=library_versions(),
            optimizer={"steps": 0, "skipped_steps": 0, "loss_scale": {}},
            tensors=tensors,
            files={},
        )
        super().__init__(folder, manifest)

    def _check_tensors(self, folder: Path, model: PretrainedModel, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raises UserError if tensors are missing, have other shapes, or are ones that no supported layer has."""
        expected: dict[str, tuple[int, ...]] = {}
        for name, source in self._sources.items():
            shape = shapes[name]
            if name.endswith(_EXPERTS):
                hidden = shape[1] * self._upcycling.divisor
                shape = (hidden, shape[2]) if not name.endswith(_DOWN) else (shape[2], hidden)
            expected |= dict.fromkeys(source.names, shape)
        names = [key for key in self._state if key in expected or not _is_left_out(key, self.left_out)]
        used = {key: self._state[key] for key in names if not key.endswith(_TABLE)}
        problems = list(mismatches(used, expected))  # which does not mind a tied head
        if self.model.tie_embeddings and HEAD in used and not problems and not torch.equal(used[HEAD], used[EMBEDDING]):
            problems.append(f"{HEAD} differs from {EMBEDDING}, but tie_word_embeddings=true")
        if problems:
            raise UserError([f"{folder}: {line}" for line in problems])

    def _copy(self, wanted: Iterable[Wanted], progress: Progress) -> None:
        for one in wanted:
            shape, full = self.manifest.tensors[one.name].shape, self._full_tensor(one.name)
            for source, target in overlaps(Piece.full(shape), one.piece, shape):
                box = one.out[target.offset : target.offset + math.prod(target.shape)].reshape(target.shape)
                box[target.slices] = full[source.slices].numpy()
            progress(one.out.nbytes)

    def _full_tensor(self, name: str) -> Tensor:
        """fp32."""
        last = self._last
        if last is None or last[0] != name:
            self._last = last = name, self._build(name)
        return last[1]

    def _build(self, name: str) -> Tensor:
        shape = self.manifest.tensors[name].shape
        upcycling = self._upcycling
        if name not in self._sources:
            if upcycling.slices and name.endswith(_ROUTER) and upcycling.n_experts_per_tok == upcycling.n_experts:
                return torch.zeros(shape)  # equal weights: the sum of all slices is the FFN
            return initial_value(name, shape, self.model, self._seed)
        source = self._sources[name]
        value = source.convert([self._state[part].float() for part in source.names]).contiguous()
        if name.endswith(_EXPERTS) and upcycling.n_experts > 1:
            value = upcycling.experts(value, name.endswith(_DOWN))
            if upcycling.noise:
                generator = torch.Generator().manual_seed(self._seed << 32 | zlib.crc32(name.encode()))
                value += upcycling.noise * value[0].std() * torch.randn(value.shape, generator=generator)
        assert value.shape == shape, name
        return value


def _is_left_out(name: str, layers: list[int]) -> bool:
    return any(name.startswith(f"model.layers.{layer}.") for layer in layers)


def read_pretrained(folder: Path, cut: Cut, upcycling: Upcycling) -> PretrainedModel:
    """The config of a pretrained model. Raises UserError, with all problems, if it cannot be cut like this."""
    file = folder / "config.json"
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"cannot be read ({first_line(error)}); give a folder of transformers' save_pretrained", str(file)
        ) from None
    model = parse_model(content) if isinstance(content, dict) else ["config.json holds no settings"]
    if isinstance(model, list):
        raise UserError(model, str(folder))
    problems = [*model.problems, *cut.problems(model.num_layers)]
    if not any(folder.glob("*.safetensors")):
        problems.append("holds no .safetensors files; save the model with safe_serialization=True")
    prelude, loop, coda = cut.layers(model.num_layers)
    if mixtures := [layer for layer in prelude + coda if model.is_mixture(layer)]:
        problems.append(
            f"layers {mixtures} are mixtures of experts, and FFNs of prelude and coda are dense here; loop them, with "
            "--prelude 0 --coda 0 for a model without dense layers"
        )
    kinds = {model.is_mixture(layer) for layer in loop}
    if len(kinds) > 1:
        problems.append("some of the looped layers are mixtures of experts and some are dense; loop one kind")
    if kinds == {True} and upcycling != Upcycling():
        problems.append("--experts: the looped layers are mixtures of experts already; leave it out")
    problems += upcycling.problems(model.values["intermediate_size"])
    if problems:
        raise UserError(problems, str(folder))
    return model


def _settings(
    pretrained: PretrainedModel, cut: Cut, loops: int, injection: str, upcycling: Upcycling
) -> dict[str, Any]:
    """The fields of the looped model's `MythosConfig`."""
    prelude, loop, coda = cut.layers(pretrained.num_layers)
    mixture = {
        "n_experts": upcycling.n_experts,
        "n_experts_per_tok": upcycling.n_experts_per_tok,
        "n_shared_experts": 0,
        "expert_dim": pretrained.values["intermediate_size"] // upcycling.divisor,
    }
    if pretrained.is_mixture(loop[0]):
        mixture = pretrained.mixture_settings()
    return {
        **pretrained.settings(),
        **mixture,
        "prelude_layers": len(prelude),
        "loop_layers": len(loop),
        "coda_layers": len(coda),
        "max_loop_iters": loops,
        "injection": injection,
        "lora": "none",
    }


def _sources(pretrained: PretrainedModel, cut: Cut) -> dict[str, TensorSources]:
    """By the names of our tensors; those that are missing are new, and begin with initial values."""
    prelude, loop, coda = cut.layers(pretrained.num_layers)
    names = {layer: f"prelude.{i}" for i, layer in enumerate(prelude)}
    names |= {layer: f"coda.{i}" for i, layer in enumerate(coda)}
    names |= {layer: f"recurrent.blocks.{i}" if i else "recurrent.block" for i, layer in enumerate(loop)}
    sources = model_sources(pretrained)
    for layer, name in names.items():
        sources |= layer_sources(pretrained, layer, name, layer in loop)
    return sources


def retrofit(
    weights: PretrainedWeights,
    out: Path,
    *,
    dtype: Dtype = "fp32",
    tokenizer: Path | None = None,
    progress: Progress = lambda size: None,
    report: Callable[[str], object] = lambda note: None,
) -> list[Path]:
    """Write the looped model to the new folder `out`, with a config for `mythos train`. Returns the weights' files."""
    if weights.left_out:
        report(f"layers {weights.left_out} of the original are left out: one loop does not compute what it does")
    settings = {
        "model": asdict(weights.model),
        "act": {"mode": "off"},
        "loops": {
            "distribution": "poisson",
            "mean": weights.loops.mean,
            "curriculum": "linear",
            "curriculum_steps": 500,
        },
        "train": {"seq_len": min(1024, weights.model.max_seq_len)},
        "optim": {"lr": 1e-4},
    }
    text = (
        f"# {weights.folder.name} as a looped model. Add data.path and what your run needs:\n"
        f"# mythos train {CONFIG_FILE} start_from=THIS_FOLDER data.path=SHARDS run.dir=RUN\n"
    )
    texts = {CONFIG_FILE: text + dump_settings(settings)}
    options: dict[str, Any] = dict(dtype=dtype, tokenizer=tokenizer, progress=progress, report=report)
    return export(weights, out, "safetensors", workers=1, texts=texts, **options)
