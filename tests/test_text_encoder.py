"""Texts to vectors, and the cache that makes it happen once."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from encoders.text import TextEncoder, _batches, _key, _write, centre

ROOT = Path(__file__).parent.parent
WORDS = ["bread", "milk", "frozen", "ice", "apple", "juice", "white", "fresh", "beer", "soap"]
SIZE = 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of random weights that was written by transformers itself."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=SIZE, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=48, max_position_embeddings=24,
    )  # fmt: skip
    with torch.random.fork_rng():  # transformers draws weights from the global generator
        torch.random.default_generator.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder


Make = Callable[..., TextEncoder]


@pytest.fixture
def encoder(checkpoint: Path, tmp_path: Path) -> Make:
    def make(**keys: object) -> TextEncoder:
        defaults = {"device": "cpu", "precision": "fp32", "cache_dir": tmp_path, "progress": False}
        return TextEncoder(str(checkpoint), **{**defaults, **keys})

    return make


def some_texts(count: int, seed: int = 0) -> list[str]:
    g = np.random.default_rng(seed)
    return [" ".join(g.choice(WORDS, g.integers(1, 15))) for _ in range(count)]


def no_model(*_: object) -> None:
    raise AssertionError("the model was loaded although every text is cached")


def test_a_vector_is_the_unit_mean_over_tokens_of_the_last_layer(encoder, checkpoint):
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(checkpoint)("fresh bread", return_tensors="pt")
    assert tokens["input_ids"].shape == (1, 4)
    with torch.inference_mode():
        model = AutoModel.from_pretrained(checkpoint).eval()
        mean = model(**tokens).last_hidden_state.mean(dim=1)
    vectors, present = encoder().encode(["fresh bread", "a much longer text of bread and ice"])
    torch.testing.assert_close(vectors[0], mean[0] / mean.norm(), rtol=0, atol=1e-5)
    assert vectors.dtype == torch.float32
    assert present.tolist() == [True, True]


def test_a_vector_does_not_depend_on_the_batch(encoder, tmp_path):
    texts = some_texts(40)
    together, _ = encoder().encode(texts)
    one_by_one = encoder(cache_dir=tmp_path / "b", max_tokens=24, batch_tokens=24)
    alone = torch.cat([one_by_one.encode([text])[0] for text in texts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert (together @ together.T).fill_diagonal_(0).max() < 0.9999  # and texts differ


def test_blank_texts_are_absent_zero_rows(encoder):
    vectors, present = encoder().encode(["", "milk", " \n\t "])
    assert present.tolist() == [False, True, False]
    assert vectors.norm(dim=1).tolist() == pytest.approx([0.0, 1.0, 0.0])


def test_no_text_at_all_needs_no_model(encoder, monkeypatch):
    monkeypatch.setattr(TextEncoder, "_load", no_model)
    assert [x.shape for x in encoder().encode([])] == [(0, SIZE), (0,)]
    vectors, present = encoder().encode(["", ""])
    assert vectors.shape == (2, SIZE)
    assert not present.any()


def test_each_text_is_encoded_once_and_only_new_ones_later(encoder, monkeypatch):
    seen: list[int] = []
    embed = TextEncoder._embed

    def counting(self: TextEncoder, model: object, tokens: list, padding: int) -> torch.Tensor:
        seen.append(len(tokens))
        return embed(self, model, tokens, padding)

    monkeypatch.setattr(TextEncoder, "_embed", counting)
    first, _ = encoder().encode(["milk", "bread", "milk", ""])
    assert sum(seen) == 2
    assert torch.equal(first[0], first[2])
    grown, _ = encoder().encode(["ice", "milk", "bread"])
    assert sum(seen) == 3
    assert torch.equal(grown[1:], first[:2])


def test_texts_too_long_for_the_model_are_cut(encoder):
    long = " ".join(["bread"] * 500)
    vectors, _ = encoder().encode([long, long + " soap"])
    assert vectors.isfinite().all()
    assert torch.equal(vectors[0], vectors[1])


def test_bf16_points_where_fp32_does_and_is_kept_apart(encoder):
    texts = some_texts(20)
    exact, rough = (encoder(precision=p).encode(texts)[0] for p in ("fp32", "bf16"))
    assert not torch.equal(exact, rough)
    assert (exact * rough).sum(dim=1).min() > 0.999


def test_many_small_encodes_leave_few_files_and_lose_nothing(encoder, monkeypatch):
    texts = list(dict.fromkeys(some_texts(40)))[:20]
    one = encoder()
    vectors = torch.cat([one.encode([text])[0] for text in texts])
    assert len(list(one.store.iterdir())) < 20
    monkeypatch.setattr(TextEncoder, "_load", no_model)
    assert torch.equal(encoder().encode(texts)[0], vectors)


@pytest.mark.parametrize("damage", ["cut", "other", "zeros", "empty"])
def test_a_damaged_cache_is_rebuilt_with_a_line_saying_so(encoder, damage, capsys):
    texts = some_texts(8)
    vectors, _ = encoder().encode(texts)
    (path,) = encoder().store.glob("*.npy")
    whole = path.read_bytes()
    broken = {
        "cut": whole[: len(whole) // 2],
        "other": b"not what it was",
        "zeros": whole[:200] + bytes(len(whole) - 200),
        "empty": b"",
    }
    path.write_bytes(broken[damage])
    again, _ = encoder().encode(texts)
    assert torch.equal(again, vectors)
    assert "is damaged" in capsys.readouterr().err
    assert path.read_bytes() == whole


def test_weights_trained_further_are_another_model(encoder, checkpoint, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in checkpoint.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert (
        TextEncoder(str(copy), cache_dir=tmp_path).store.name
        == encoder(precision="auto").store.name
    )
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    assert (
        TextEncoder(str(copy), cache_dir=tmp_path).store.name
        != encoder(precision="auto").store.name
    )


def test_what_cannot_be_encoded_is_refused_in_plain_words(encoder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="got float in row 1: use ''"):
        encoder().encode(["milk", float("nan")])
    with pytest.raises(ValueError, match=r"precision must be auto, fp32 or bf16, got 'int8'"):
        encoder(precision="int8")
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda, got 'tpu'"):
        encoder(device="tpu")
    with pytest.raises(
        ValueError, match="at most batch_tokens, got max_tokens=128, batch_tokens=9"
    ):
        encoder(batch_tokens=9)
    with pytest.raises(ValueError, match=r"has no config\.json: save one with save_pretrained"):
        TextEncoder(str(tmp_path), cache_dir=tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device=cuda was asked for but torch sees no CUDA"):
        encoder(device="cuda")


def test_an_unknown_hub_name_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot load the text model 'no/such-model'.*all-minilm"):
        TextEncoder("no/such-model", cache_dir=tmp_path)


def test_a_checkpoint_without_weights_says_so(checkpoint, tmp_path):
    for name in ("config.json", "vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    with pytest.raises(ValueError, match="cannot load the text model"):
        TextEncoder(str(tmp_path), cache_dir=tmp_path, progress=False).encode(["milk"])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="no hidden_size"):
        TextEncoder(str(tmp_path), cache_dir=tmp_path).encode(["milk"])


def test_batches_hold_all_texts_and_no_more_tokens_than_asked():
    lengths = sorted(np.random.default_rng(0).integers(3, 60, 300).tolist())
    tokens = [[0] * n for n in lengths]
    batches = list(_batches(list(range(300)), tokens, 256))
    assert [i for batch in batches for i in batch] == list(range(300))
    assert max(len(batch) * lengths[batch[-1]] for batch in batches) <= 256
    assert len(batches) < 60


def test_centred_vectors_have_no_common_part():
    g = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(50, 8, generator=g) + 3.0, dim=1)
    present = torch.arange(50) % 5 != 0
    out = centre(vectors, present)
    assert vectors.mean(dim=0).norm() > 0.9
    assert out[present].mean(dim=0).norm() < 0.1
    torch.testing.assert_close(out.norm(dim=1), present.float())
    by_hand = vectors[1] - vectors[present].mean(dim=0)
    torch.testing.assert_close(out[1], by_hand / by_hand.norm())
    assert not centre(vectors, torch.zeros(50, dtype=torch.bool)).any()


def test_the_default_model_knows_what_is_alike_without_a_network(tmp_path):
    texts = ["frozen pizza with cheese", "pepperoni pizza, frozen", "dog food, dry",
             "cat food, canned", "laundry detergent"]  # fmt: skip
    vectors, present = TextEncoder(cache_dir=tmp_path, progress=False).encode(texts)
    assert vectors.shape == (5, 384)
    assert present.all()
    nearest = (vectors @ vectors.T).fill_diagonal_(-1).argmax(dim=1)
    assert nearest[:4].tolist() == [1, 0, 3, 2]


def test_known_texts_come_from_disk_without_transformers_and_fast(encoder, checkpoint, tmp_path):
    texts = [f"text {i} {'bread' * (i % 7)}" for i in range(100_000)]
    store, g = encoder().store, np.random.default_rng(0)
    vectors = g.standard_normal((len(texts), SIZE)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    _write(store, [_key(text) for text in texts], vectors)
    began = time.process_time()
    out, present = encoder().encode(texts)
    assert time.process_time() - began < 1.0
    assert present.all()
    np.testing.assert_array_equal(out.numpy(), vectors)
    code = f"""
import sys
from encoders.text import TextEncoder
checkpoint, cache = {str(checkpoint)!r}, {str(tmp_path)!r}
encoder = TextEncoder(checkpoint, device="cpu", precision="fp32", cache_dir=cache)
assert encoder.encode(["text 0 ", "text 1 bread"])[1].all()
print([name for name in ("transformers", "huggingface_hub") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
