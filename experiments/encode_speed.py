"""How fast texts become vectors, beside sentence-transformers and the processor's best products.

Texts of 30 word pieces on average, tokenised, sorted, encoded and pooled on one thread by the
default model. The limit is the time that its matrix products alone would take, in the precision
that is the faster one here. A second run reads the cache, and imports no transformers.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from encoders.text import TextEncoder, _key, _write
from experiments.bench_rows import (
    ROOT,
    Row,
    Speed,
    Work,
    fixed,
    forget_peak,
    in_turn,
    installed,
    peak_mib,
    row,
)

TEXTS, CACHED, SHARD = 512, 40_000, 4096  # encoded in one call, read from the cache, in one file
PIECES = (17, 43)  # of a text, at least and at most, with its two markers: 30 on average
UNIT = "texts per CPU-second"
TOKENS = 1024  # of a batch, the default of the encoder
PRECISIONS = ("fp32", "bf16")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCHES = (256, 1024, 4096, 16_384)  # tokens, padding counted
PEER = "sentence-transformers, fp32, the same weights, batches of 32"
SECOND = """
import sys
from encoders.text import TextEncoder
encoder = TextEncoder(cache_dir=sys.argv[1], device="cpu", progress=False)
vectors, present = encoder.encode([sys.argv[2]] * 3)
assert present.all()
print(sum(name.split(".")[0] == "transformers" for name in sys.modules))
"""


def rows(
    repeats: int = 3, seconds: float = 2.0, seed: int = 0, quick: bool = False, device: str = "cpu"
) -> list[Row]:
    """The encoder beside its peer and its limit, from the cache, and curves over batches."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder)
            found = [fresh(cache, repeats, seconds, seed, quick, device)]
            found += [known(cache, repeats, seconds, quick), imports(cache)]
            return found + curves(cache, repeats, seconds, seed, quick, device)
    finally:
        torch.set_num_threads(before)


def fresh(cache: Path, repeats: int, seconds: float, seed: int, quick: bool, device: str) -> Row:
    """Texts that nobody has encoded yet, in the precision that the encoder chooses."""
    ready = Ready(cache, device, "auto")
    texts = ready.texts(16 if quick else TEXTS, seed)
    works: dict[str, Work] = {"ours": ready.work(texts)}
    works |= {f"bare {p}": bare(ready, texts, p, seed) for p in PRECISIONS}
    if installed("sentence_transformers"):
        works["peer"] = sentence_transformers(ready, texts)
    speed = in_turn(works, repeats, seconds, device)
    best = max(PRECISIONS, key=lambda p: speed[f"bare {p}"].rate)
    other = next(p for p in PRECISIONS if p != best)
    times = speed[f"bare {best}"].rate / speed[f"bare {other}"].rate
    return row(
        "encode", f"new texts of 30 word pieces, {ready.encoder.precision} chosen", UNIT,
        speed["ours"], peer=speed.get("peer"), peer_name=PEER, peer_goal=1.8,
        limit=speed[f"bare {best}"], limit_goal=0.6,
        limit_name=f"products alone in {best}, here {times:.2g} x as fast as in {other}",
    )  # fmt: skip


class Ready:
    """An encoder whose model is in memory: what is timed is encoding, not loading."""

    def __init__(
        self, cache: Path, device: str, precision: str, batch_tokens: int = TOKENS
    ) -> None:
        self.encoder = TextEncoder(
            device=device, precision=precision, batch_tokens=batch_tokens, cache_dir=cache,
            progress=False,
        )  # fmt: skip
        self.loaded = self.encoder._load()
        self.encoder._load = lambda: self.loaded  # type: ignore[method-assign]

    def texts(self, count: int, seed: int) -> list[str]:
        """Texts of so many word pieces as are drawn: of words that are one each."""
        rng = np.random.default_rng(seed)
        vocabulary = self.loaded[1].get_vocab()
        words = sorted(w for w in vocabulary if w.isascii() and w.isalpha() and len(w) > 3)
        sizes = rng.integers(PIECES[0] - 2, PIECES[1] - 1, count)  # two are markers
        return [" ".join(rng.choice(words, size)) for size in sizes]

    def work(self, texts: Sequence[str]) -> Work:
        """Encode all, as if none was in the cache, and write nothing."""

        def encode() -> int:
            for _ in self.encoder._run(list(texts)):
                pass
            return len(texts)

        return encode

    def tokens(self, texts: Sequence[str]) -> int:
        """Word pieces of them all."""
        return sum(map(len, self.loaded[1](list(texts))["input_ids"]))


def bare(ready: Ready, texts: Sequence[str], precision: str, seed: int) -> Work:
    """The products of the model's layers for these tokens, TOKENS at a time, no padding."""
    config, device = ready.loaded[0].config, ready.encoder.device
    generator = torch.Generator(device).manual_seed(seed)
    d, wide = config.hidden_size, config.intermediate_size
    dtype, tokens = DTYPES[precision], ready.tokens(texts)

    def operand(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    sizes = [(d, d)] * 4 + [(d, wide), (wide, d)]
    ready_made = [
        (operand(TOKENS, a), operand(b, a), torch.empty(TOKENS, b, dtype=dtype, device=device))
        for a, b in sizes
    ]
    times = -(-tokens // TOKENS)

    def work() -> int:
        for _ in range(times * config.num_hidden_layers):
            for left, right, out in ready_made:
                torch.mm(left, right.T, out=out)
        return round(len(texts) * times * TOKENS / tokens)

    return work


def sentence_transformers(ready: Ready, texts: Sequence[str]) -> Work:
    """The peer with the same checkpoint: mean over tokens, unit length."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    encoder = ready.encoder
    word = Transformer(str(encoder.folder), max_seq_length=encoder.max_tokens)
    pooling = Pooling(word.get_embedding_dimension(), pooling_mode="mean")
    model = SentenceTransformer(modules=[word, pooling, Normalize()], device=encoder.device)

    def encode() -> int:
        model.encode(list(texts), batch_size=32, show_progress_bar=False)
        return len(texts)

    return encode


def known(cache: Path, repeats: int, seconds: float, quick: bool) -> Row:
    """Texts whose vectors are in the cache, as a second run finds them."""
    encoder = TextEncoder(device="cpu", cache_dir=cache, progress=False)
    texts = [f"text {i}" for i in range(2000 if quick else CACHED)]
    vectors = np.random.default_rng(0).normal(size=(len(texts), size_of(encoder)))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    for start in range(0, len(texts), SHARD):
        part = slice(start, start + SHARD)
        _write(encoder.store, [_key(text) for text in texts[part]], vectors[part])

    def read() -> int:
        return len(encoder.encode(texts)[0])

    speed = in_turn({"ours": read}, repeats, seconds)["ours"]
    return row(
        "encode", f"{len(texts):,} texts known from a run before", UNIT, speed, limit=1e5,
        limit_name="100,000 texts a second", limit_goal=1.0, absolute=True,
    )  # fmt: skip


def size_of(encoder: TextEncoder) -> int:
    """D."""
    from encoders.text import _vector_size

    return _vector_size(encoder.folder)


def imports(cache: Path) -> Row:
    """A fresh process whose texts are all known: transformers stays out of it."""
    done = subprocess.run(
        [sys.executable, "-c", SECOND, str(cache), "text 0"], capture_output=True, text=True,
        cwd=ROOT,
    )  # fmt: skip
    if done.returncode:
        raise ValueError(f"a second run failed: {done.stderr.strip()[-2000:]}")
    modules = int(done.stdout.split()[-1])
    return row(
        "encode", "a process whose texts are all known imports no transformers",
        "runs without transformers", fixed(float(modules == 0)), limit=1.0, limit_name="all",
        limit_goal=1.0, absolute=True,
    )  # fmt: skip


def curves(
    cache: Path, repeats: int, seconds: float, seed: int, quick: bool, device: str
) -> list[Row]:
    """Texts a second against the tokens of a batch, in both precisions."""
    found = []
    for precision in PRECISIONS:
        for batch in BATCHES[:2] if quick else BATCHES:
            forget_peak()
            ready = Ready(cache, device, precision, batch)
            work = ready.work(ready.texts(16 if quick else TEXTS, seed))
            speed: Speed = in_turn({"ours": work}, max(1, repeats - 2), seconds, device)["ours"]
            found.append(
                row("encode", f"new texts, {precision}, {batch:,} tokens at a time", UNIT, speed,
                    memory_mib=peak_mib(), curve=f"batch, {precision}", at=float(batch))
            )  # fmt: skip
    return found
